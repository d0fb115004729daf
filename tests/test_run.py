"""The section "The run" of both trainers and its use in train(): flags, processes, checkpoints, the log, signals."""

import argparse
import contextlib
import datetime
import math
import os
import pickle
import signal
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import assert_identical, make_images, read, rows
from torch import nn

import fid
import sample
import train_decoder
import train_dit
from dit import DiT
from train_dit import SIGNALS, SWITCH, Log, compile_blocks, due, load_last, parse_flags, save_checkpoint, say, set_up

TRAINERS = pytest.mark.parametrize("it", [train_decoder, train_dit], ids=lambda it: it.__name__)
RESULT = {train_decoder: "decoder.pt", train_dit: "dit.pt"}
TINY = ["--preset", "demo", "--size", "16", "--batch", "4", "--warmup", "0", "--device", "cpu", "--log-every", "1",
        "--lr-end", "2e-3", "--lr", "2e-3", "--preview-every", "0"]  # an epoch of `shapes` has 2,000 steps
Stop = type("Stop", (Exception,), {})
stop = mock.Mock(side_effect=Stop)  # ends a run early


def run(it, out, steps, *flags):
    """Train for `steps` steps of `shapes` in total -> last.pt."""
    own = ["--resize", "16"] if it is train_decoder else ["--stats-images", "8"]
    it.main([*TINY, *own, "--out", str(out), "--epochs", str(steps / 2000), *map(str, flags)])
    return read(out / "last.pt")


def refused(it, capsys, *argv):
    """The error message of main(), which follows the usage line."""
    with pytest.raises(SystemExit, match="^2$"):
        it.main([str(word) for word in argv])
    usage, error = capsys.readouterr().err.splitlines()[-2:]
    assert usage.startswith("usage: ") and ": error: " in error
    return error.split(": error: ")[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TABLE = {
    "data": (None, "shapes", "images"), "lr": (2e-4, 3e-3, "learning rate"), "size": (256, 32, "pixels"),
    "model": ("XL", "S", "size", dict(choices=("S", "XL"))), "layers": ([], [], "numbers", dict(type=int, nargs="+")),
    "betas": ([0.9, 0.95], [0.5, 0.9], "two numbers", dict(type=float, nargs=2)), "fast": (False, False, "on", SWITCH),
}


def parsed(*argv):
    return parse_flags(argv, "Title.", TABLE, dict(size=512), lambda args: dict(lr=7.0) if args.fast else {})[1]


def test_flags_override_the_defaults_of_the_preset():
    paper = dict(data=None, lr=2e-4, size=256, model="XL", layers=[], betas=[0.9, 0.95], fast=False)
    presets = dict(imagenet256=paper, imagenet512=paper | dict(size=512),
                   demo=dict(data="shapes", lr=3e-3, size=32, model="S", layers=[], betas=[0.5, 0.9], fast=False))
    for preset, expected in presets.items():
        assert vars(parsed("--preset", preset)) == vars(parsed(f"--preset={preset}")) == expected | dict(preset=preset)
    assert parsed() == parsed("--preset", "imagenet256")
    args = parsed("--lr", "1", "--preset", "demo", "--layers", "4", "2", "--betas", "0", "1", "--fast", "--model", "XL")
    assert (args.lr, args.layers, args.betas, args.fast, args.model) == (1.0, [4, 2], [0.0, 1.0], True, "XL")
    assert type(args.lr) is float and parsed("--data", "7").data == "7" and parsed("--fast").lr == 7


@pytest.mark.parametrize("it", [train_decoder, train_dit, sample, fid], ids=lambda it: it.__name__)
def test_help_shows_the_docstring_and_the_defaults_of_the_preset(it, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    table = {} if it is fid else sample.FLAGS if it is sample else it.RECIPE | it.RUN
    for column, argv in enumerate([[]] if it is fid else [[], ["--preset", "demo"]]):
        with pytest.raises(SystemExit, match="^0$"):
            it.main([*argv, "--help"])
        text = capsys.readouterr().out
        assert it.__doc__.strip() in text and "(default: None)" not in text
        for name, row in table.items():
            shown = "" if row[column] in (None, []) or row[column] is False else f" (default: {row[column]})"
            assert f" {row[2]}{shown}\n" in text, name


BAD = {f"--{name} {value}": f"--{name} {value!r} is empty or out of range" for name, value in [
    ("batch", 0), ("micro-batch", 0), ("epochs", 0.0), ("lr", -1.0), ("epochs", math.nan), ("warmup", -0.1),
    ("seed", -1), ("layers", -1), ("out", ""), ("data", ""), ("init", ""), ("ema", 1.0)]}
BAD |= {f"--{name} x": f"argument --{name}: invalid choice" for name in ("precision", "model", "device", "preset")}
BAD |= {"--batch 1.5": "argument --batch: invalid int", "--epoch 1": "unrecognized argum"}


@TRAINERS
def test_bad_values_are_refused_before_anything_is_built(it, capsys, monkeypatch):
    monkeypatch.setattr(it, "train", lambda args: pytest.fail("the run started"))
    for words, reason in BAD.items():
        assert refused(it, capsys, *TINY, *words.split(" ")).startswith(reason), words


def test_due():
    due_steps = {every: [step for step in range(1, 8) if due(step, every)] for every in (0, 1, 3, 9)}
    assert due_steps == {0: [], 1: [1, 2, 3, 4, 5, 6, 7], 3: [3, 6], 9: []}


@TRAINERS
def test_processes_that_see_different_files_are_refused(it, tmp_path, monkeypatch):
    """As on two nodes without a shared disk: one would resume, the other start."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    others = [None, 20]

    def gather(steps, mine):
        steps[:] = [mine, others.pop(0)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert it.load_last(tmp_path, "x.pt", {}) is None
    with pytest.raises(ValueError, match="on a disk that all nodes share"):
        it.load_last(tmp_path, "x.pt", {})


@TRAINERS
def test_an_empty_list_of_arguments(it, capsys, monkeypatch):
    """main([]) does not read sys.argv, main() does."""
    calls = []
    monkeypatch.setattr(it, "train", calls.append)
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "x", "--preset", "demo", "--batch", "8"])
    assert "--data is missing" in refused(it, capsys) and not calls
    it.main()
    assert calls[0].preset == "demo" and calls[0].batch == 8 and calls[0].data == "x"


@TRAINERS
def test_which_errors_become_one_line(it, capsys, monkeypatch):
    """ValueError, and OSError with a filename; neither in development mode. Others keep their traceback."""
    ended, train = [], mock.Mock()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(it, "train", train)
    bad_input = {ValueError("--lr is wrong"): "--lr is wrong", OSError(2, "No such", "x"): "[Errno 2] No such: 'x'",
                 ValueError("Caught ValueError in DataLoader\nTrace\nValueError: 100 images\n"): "100 images"}
    for train.side_effect, line in bad_input.items():
        assert refused(it, capsys, *TINY) == line
    others = [RuntimeError("Missing key(s)"), OSError(28, "No space left"), KeyError(), KeyboardInterrupt()]
    for dev_mode, errors in ((False, others), (True, [*bad_input, *others])):
        for train.side_effect in errors:
            with monkeypatch.context() as patch, pytest.raises(type(train.side_effect)) as raised:
                patch.setattr(sys, "flags", mock.Mock(dev_mode=dev_mode))
                it.main(TINY)
            assert raised.value is train.side_effect
    assert not ended, "after an error the process group is not destroyed"
    train.side_effect, train.return_value = None, 0
    it.main(TINY)
    assert ended == [1]


@TRAINERS
def test_the_first_step_of_a_warm_up_has_a_learning_rate(it):
    args = argparse.Namespace(lr=0.5, lr_end=0.1, warmup=2.0, epochs=8.0, decay_start=8.0, decay_end=9.0)
    assert [it.lr_at(step, args, 2) for step in range(5)] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


def test_process_group_of_torchrun(monkeypatch, capsys):
    """With a time limit of two hours. One process needs none, not even inside a SLURM allocation."""
    groups, chosen = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: groups.append((given, named)))
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert set_up(argparse.Namespace(device="cpu", precision="tf32"))[:3] == (0, 1, torch.device("cpu"))
    assert not groups
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    for device, expected in (("cpu", "cpu"), ("cuda", "cuda:1")):
        assert set_up(argparse.Namespace(device=device, precision="tf32"))[:3] == (5, 8, torch.device(expected))
    gpu, two_hours = torch.device("cuda:1"), datetime.timedelta(hours=2)
    assert chosen == [gpu] and groups == [(("gloo",), dict(timeout=two_hours, device_id=None)),
                                          (("nccl",), dict(timeout=two_hours, device_id=gpu))]
    say("rank 5")
    monkeypatch.setenv("RANK", "0")
    say("rank 0")
    assert capsys.readouterr().out == "rank 0\n"


@pytest.mark.parametrize("precision, matmul, tf32, bf16", [
    ("float32", "highest", False, False), ("tf32", "high", True, False), ("bf16", "high", True, True)])
def test_precision(precision, matmul, tf32, bf16, monkeypatch):
    """On a CPU tf32 equals float32."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    *_, autocast = set_up(argparse.Namespace(device="cpu", precision=precision))
    with autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not chosen and torch.backends.cudnn.allow_tf32 is not tf32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast warns without a GPU
        *_, device, autocast = set_up(argparse.Namespace(device="cuda", precision=precision))
    assert device == torch.device("cuda:0") and (autocast.device, autocast.fast_dtype) == ("cuda", torch.bfloat16)
    assert chosen == [matmul] and torch.backends.cudnn.allow_tf32 is tf32


@TRAINERS
@pytest.mark.parametrize("compile, device, expected", [
    ("auto", "cpu", False), ("on", "cpu", True), ("off", "cpu", False), ("auto", "cuda", True), ("off", "cuda", False)])
def test_compiled_models(compile, device, expected, it, tmp_path, monkeypatch):
    """The default depends on --device, not on the devices of the machine; models are compiled before DDP."""
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(it, "compile_blocks", lambda *models: compiled.append([type(m).__name__ for m in models]))
    monkeypatch.setattr(it, "training_batches", stop)
    if device == "cuda":  # without a GPU
        monkeypatch.setattr(it, "set_up", lambda args: (0, 1, torch.device("cuda"), contextlib.nullcontext()))
        monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
        monkeypatch.setattr(it, "latent_statistics", lambda *_: {}, raising=False)
    with pytest.raises(Stop):
        run(it, tmp_path / "out", 1, "--compile", compile)
    model = "Decoder" if it is train_decoder else "DiT"
    assert compiled == ([["VisionTransformer", model]] if expected else [])


def test_compiled_blocks_keep_a_graph_for_each_shape(monkeypatch):
    """After a smaller batch, the usual one still runs its own graph, not a dynamic one."""
    graphs, runs = [], []
    torch._dynamo.reset()  # other tests' graphs

    def backend(module, inputs):
        graphs.append(module)
        number = len(graphs)
        return lambda *values: runs.append(number) or module(*values)

    model = DiT(16, 2, 4, width=16, depth=2, heads=2)
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    compile_blocks(model)
    for batch in (4, 3, 4):
        model(torch.randn(batch, 16, 2, 2), torch.rand(batch), torch.zeros(batch).long())
    assert runs == [1, 1, 2, 2, 1, 1]  # two blocks each
    assert not torch._dynamo.config.optimize_ddp


@TRAINERS
def test_the_batch_is_split(it, tmp_path, monkeypatch, capsys):
    """Into processes and micro-batches. DDP does not broadcast buffers; gradients are views of its buckets."""
    ddp = types.SimpleNamespace()
    monkeypatch.setattr(it, "training_batches", mock.Mock(side_effect=Stop))
    monkeypatch.setattr(it, "DistributedDataParallel", lambda model, **how: ddp.__dict__.update(how) or ddp)
    for batch, world_size, limit, accumulate, micro_batch in [
            (8, 1, 4, 2, 4), (8, 1, 100, 1, 8), (8, 1, 3, 3, 3), (8, 2, 3, 2, 2), (128, 1, 50, 3, 43), (4, 4, 1, 1, 1)]:
        ranks = (world_size - 1, world_size, torch.device("cpu"), contextlib.nullcontext())
        monkeypatch.setattr(it, "set_up", lambda args, ranks=ranks: ranks)
        ddp.__dict__.clear()
        with pytest.raises(Stop):
            run(it, tmp_path / "out", 100, "--batch", batch, "--micro-batch", limit)
        steps = round(100 * 4 / batch)
        it.training_batches.assert_called_with(8000, batch, micro_batch, range(steps), 0, world_size - 1, world_size)
        line = f"; batch {batch} = {world_size} processes x {accumulate} x {micro_batch}; {steps} steps, "
        assert line + f"{8000 / batch:.4g} per epoch; from step 0" in capsys.readouterr().out
        expected = dict(gradient_as_bucket_view=True, broadcast_buffers=False) if world_size > 1 else {}
        assert vars(ddp) == expected, "one process needs no DDP"
    monkeypatch.setattr(it, "training_batches", lambda *_: pytest.fail("the run started"))
    for batch in (6, 3):
        assert f"--batch {batch} is not divisible by 4 processes" in refused(it, capsys, *TINY, "--batch", batch)


def test_checkpoints_are_written_to_temporary_files(tmp_path, monkeypatch):
    """All are on the disk before the first is renamed; last.pt is renamed last, and has no checksums."""
    events, names = [], ["stat.pt", "dit.pt", "last.pt"]
    for owner, name, works in ((torch, "save", torch.save), (os, "fsync", os.fsync), (os, "replace", os.replace)):
        def work(*given, name=name, works=works):
            paths = [Path(getattr(item, "name", item)).name for item in given if not isinstance(item, dict | int)]
            events.append(" ".join([name, *paths]))
            return works(*given)

        monkeypatch.setattr(owner, name, work)
    files = {tmp_path / name: {"x": torch.arange(1000.0) + i, "name": name} for i, name in enumerate(names)}
    save_checkpoint(files)
    assert events == [event for name in names for event in (f"save {name}.tmp", "fsync")] + [
        f"replace {name}.tmp {name}" for name in names]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    for path, content in files.items():
        assert torch.equal(read(path)["x"], content["x"]) and read(path)["name"] == path.name
    with zipfile.ZipFile(tmp_path / "dit.pt") as sums, zipfile.ZipFile(tmp_path / "last.pt") as none:
        assert sums.testzip() is None and none.testzip() is not None
    assert torch.serialization.get_crc32_options()


SETTINGS = dict(batch=4, layers=[], seed=0, images=20, classes=["a", "b"])


def test_a_run_with_other_settings_is_refused(tmp_path):
    """A setting that an older last.pt lacks counts as its default."""
    save_checkpoint({tmp_path / "last.pt": dict(settings=SETTINGS, step=3)})
    for settings in (dict(reversed(SETTINGS.items())), SETTINGS | dict(clip=1.0, label_dropout=0.1)):
        assert load_last(tmp_path, "dit.pt", settings)["step"] == 3
    for changes, reason in [
            (dict(batch=8), "batch 4, now 8"), (dict(seed=1, layers=[1]), "layers [], now [1]; seed 0, now 1"),
            (dict(classes=["a", "c"]), "classes ['a', 'b'], now ['a', 'c']"), (dict(images=21), "images 20, now 21"),
            (dict(clip=0.5), "(clip 1.0, now 0.5)"), (dict(new=1), "(new None, now 1)"),
            (dict(seed=None), "seed 0, now None"), (dict(classes=["x" * 90]), "['" + "x" * 58)]:
        with pytest.raises(ValueError) as error:
            load_last(tmp_path, "dit.pt", SETTINGS | changes)
        message = str(error.value)
        assert message.startswith(f"{tmp_path} contains a run with other settings (") and reason in message
        assert message.endswith(f"): choose another --out, and --init {tmp_path}/dit.pt to start from its weights")


def test_a_damaged_or_foreign_last_pt_is_an_error(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint({path: dict(settings=SETTINGS, step=3, x=torch.ones(1000))})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"text", [1], {}, dict(step=1), nn.Linear(1, 1)):
        path.unlink()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises((RuntimeError, OSError, pickle.UnpicklingError, KeyError, TypeError)):
            load_last(tmp_path, "dit.pt", SETTINGS)


@TRAINERS
def test_a_result_without_last_pt_is_refused_except_after_a_kill_in_the_first_save(it, tmp_path, capsys, monkeypatch):
    """The kill comes after the first file was renamed; the run and its log then start from step 0."""
    out = tmp_path / "run"

    def replace(source, target, works=os.replace):
        works(source, target) if RESULT[it] in str(target) or "stat.pt" in str(target) else stop()

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", replace)
        run(it, out, 2)
    assert (out / RESULT[it]).exists() and (out / "last.pt.tmp").exists() and not (out / "last.pt").exists()
    assert run(it, out, 2)["step"] == 2 and [row["step"] for row in rows(out)] == ["1", "2"]
    assert not (out / "last.pt.tmp").exists()
    (out / "last.pt").unlink()
    monkeypatch.setattr(it, "Encoder", lambda *_: pytest.fail("the encoder was built"))
    message = refused(it, capsys, *TINY, "--out", out)
    assert f"{out} contains a {RESULT[it]} but no last.pt to resume from: choose another --out" in message


@TRAINERS
def test_a_finished_run_and_other_settings_are_found_before_anything_is_built(it, tmp_path, capsys, monkeypatch):
    """Settings that do not have to match on resume may differ."""
    run(it, tmp_path / "run", 2)
    monkeypatch.setattr(it, "Encoder", stop)
    for steps in (2, 1):
        capsys.readouterr()
        run(it, tmp_path / "run", steps)
        assert f"finished: {tmp_path}/run/{RESULT[it]} has all 2 steps; raise --epochs" in capsys.readouterr().out
    differs = refused(it, capsys, *TINY, "--out", tmp_path / "run", "--batch", 8, "--layers", 1)
    assert "batch 4, now 8" in differs and "layers [], now [1]" in differs
    with pytest.raises(Stop):  # in Encoder()
        run(it, tmp_path / "run", 3, "--lr", 1, "--lr-end", 0.5, "--micro-batch", 2, "--precision", "bf16", "--workers",
            1, "--log-every", 7, "--save-every", 9, "--init", "gone.pt", "--checkpointing", "--compile", "on")


def test_a_wrong_decoder_is_refused_before_a_model_is_built(tmp_path, capsys, monkeypatch):
    run(train_decoder, tmp_path / "decoder", 1, "--size", 24, "--resize", 24)
    monkeypatch.setattr(train_dit, "DiT", lambda *_, **__: pytest.fail("a model was built"))
    message = refused(train_dit, capsys, *TINY, "--preview-every", 1, "--decoder", tmp_path / "decoder" / "decoder.pt")
    assert "/decoder.pt is for latents of random-tiny, layer the last, shape (128, 3, 3), not of random-tiny" in message


COLUMNS = ["step", "epoch", "loss", "bin", "lr", "images_per_s", "memory_gb"]
HEADER = (",".join(COLUMNS) + "\n").encode()


def test_a_row_has_the_means_of_finite_values_over_images_and_ranks(tmp_path, monkeypatch, capsys):
    """Steps are not rounded. A column may be finite on one rank only. Rank 1 does not write."""
    clock = types.SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train_dit, "time", clock)
    logs = [Log(tmp_path / "log.csv", COLUMNS, 0, 12298, rank) for rank in (0, 1)]
    for log, bin in zip(logs, (math.nan, math.inf), strict=True):
        log.add(loss=torch.tensor([1.0, 2.0, math.nan]), bin=torch.tensor(bin))  # one value per image
        log.add(2, loss=torch.tensor(6.0, requires_grad=True))  # a mean over two images
    logs[1].add(loss=torch.tensor([[7.0, 8.0]], dtype=torch.bfloat16), bin=torch.tensor([2.0, 5.0]))
    sums = sum(torch.stack(list(log.sums.values())) for log in logs)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sums))
    clock.now += 4
    for log in logs:
        log.write(12300, 12400, 0.123456, 8, lr=2.5e-4)
    numbers = "step 12300 epoch 0.1235 lr 0.00025 loss 4.5 bin 3.5 images_per_s 4 memory_gb 0"  # (15 + 15 + 15) / 10
    assert capsys.readouterr().out == f"{numbers} left 0:03:20\n" * 2  # both print as rank 0
    words = numbers.split()
    expected = dict(zip(words[::2], words[1::2], strict=True))
    assert rows(tmp_path) == [expected]
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    logs[0].add(loss=torch.tensor([9.0]), bin=torch.tensor(math.nan))
    clock.now += 2
    logs[0].write(12301, 12400, 1.0, 8, lr=1.0)
    assert capsys.readouterr().out == "step 12301 epoch 1.0000 lr 1 loss 9 images_per_s 4 memory_gb 0 left 0:03:18\n"
    assert rows(tmp_path)[1] == expected | dict(step="12301", epoch="1.0000", loss="9", bin="", lr="1")


@pytest.mark.parametrize("before, kept, after", [
    (None, 0, HEADER), (None, 500, HEADER), (b"", 9, HEADER), (HEADER + b"1,\n2,\n", len(HEADER) + 3, HEADER + b"1,\n"),
    (HEADER + b"1,\n", len(HEADER) + 3, HEADER + b"1,\n"), (HEADER + b"1,\n", 900, HEADER + b"1,\n"),
    (HEADER + b"1,\n", 0, HEADER), (b"\xff\x00 stray", 7, b"\xff\x00 stra"), (b"\xff\xfe", 0, HEADER),
])
def test_the_log_is_cut_back_to_its_size_at_the_checkpoint(before, kept, after, tmp_path):
    """It is not read. tell() is correct at once, since last.pt may be saved before the next row."""
    if before is not None:
        (tmp_path / "log.csv").write_bytes(before)
    log = Log(tmp_path / "log.csv", COLUMNS, kept, 3, 0)
    size = log.file.tell()
    log.file.flush()
    assert (tmp_path / "log.csv").read_bytes() == after and size == len(after)
    log.add(loss=torch.tensor(1.0))
    log.write(4, 5, 0.1, 8)
    assert (tmp_path / "log.csv").read_bytes().startswith(after + b"4,0.1000,1,,,")


@TRAINERS
def test_any_log_lets_a_run_resume_and_no_step_is_logged_twice(it, tmp_path):
    """It may be damaged, longer, shorter, or missing: the weights are the same."""
    whole = run(it, tmp_path / "whole", 4)
    out, log = tmp_path / "run", tmp_path / "run" / "log.csv"
    run(it, out, 2)
    old, saved = log.read_bytes(), (out / "last.pt").read_bytes()
    for content, steps in {old: "1234", old + b"3,0.0015,9\n4,0.00": "1234", old[:-9]: "", b"": "34", None: "34",
                           b"\xff\xfe" + old[2:]: "", old.replace(b"1", b"\x00", 1): ""}.items():
        log.unlink()
        if content is not None:
            log.write_bytes(content)
        (out / "last.pt").write_bytes(saved)
        last = run(it, out, 4)
        assert last.pop("log_bytes") == log.stat().st_size
        assert_identical(last, {key: value for key, value in whole.items() if key != "log_bytes"})
        assert not steps or "".join(row["step"] for row in rows(out)) == steps


@TRAINERS
@pytest.mark.parametrize("sent, ignored, total, end, printed", [
    (["SIGINT"], False, 4, 130, 1), (["SIGTERM", "SIGINT"], False, 4, None, 1), (["SIGHUP"], False, 4, 129, 1),
    (["SIGINT", "SIGTERM", "SIGTERM"], False, 4, 143, 3), (["SIGINT", "SIGINT"], False, 4, None, 1),
    (["SIGHUP"], True, 4, 0, 0), (["SIGTERM"], False, 2, 0, 1)])
def test_signals_stop_a_run_after_its_step(sent, ignored, total, end, printed, it, tmp_path, monkeypatch, capfd):
    """The exit code is 128 + the signal's number; 0 if the run finishes with that step. Ctrl-C after another signal
    stops at once. nohup ignores SIGHUP. main() restores the previous handlers."""
    def lr_at(step, *given, works=it.lr_at):
        for name in sent if step == 1 else []:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0)
        return works(step, *given)

    monkeypatch.setattr(it, "lr_at", lr_at)
    handlers = {number: lambda *_: pytest.fail("not caught") for number in SIGNALS}
    handlers |= {signal.SIGHUP: signal.SIG_IGN} if ignored else {}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    exit = pytest.raises(KeyboardInterrupt if end is None else SystemExit, match=f"^{end or ''}$")
    with exit if end != 0 else contextlib.nullcontext():
        run(it, tmp_path / "out", total)
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    assert Path("out", "last.pt").exists() == (end is not None)
    assert end is None or read("out/last.pt")["step"] == len(rows("out")) == (2 if end else total)
    out, err = capfd.readouterr()
    stopped = "stopped and saved at step 2; running the same command again resumes"
    assert (stopped in out) == bool(end) and err.count("stopping after this step, with a checkpoint") == printed


@TRAINERS
def test_unreadable_images_are_counted_at_the_end(it, tmp_path, capfd):
    make_images(tmp_path / "data", 20, (16, 16))
    (tmp_path / "data" / "0003.png").write_text("no image")
    run(it, tmp_path / "out", 2000, "--data", tmp_path / "data", "--epochs", 1)
    assert "rank 0: 1 images could not be read, see above; others replaced them\n" in capfd.readouterr().out
