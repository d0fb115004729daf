"""The section "The run" of both trainers, and how train() uses it: flags, processes, checkpoints, the log, signals."""

import argparse
import contextlib
import datetime
import math
import os
import signal
import time
import types
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import assert_identical, finish, make_images, read, rows, save_tiny_dino, start_ranks
from torch import nn

import train_decoder
import train_dit
from dit import DiT
from train_dit import Log, compile_blocks, load_last, make_parser, save_checkpoint, say, set_up

TRAINERS = pytest.mark.parametrize("it", [train_decoder, train_dit], ids=lambda it: it.__name__)
RESULT = {train_decoder: "decoder.pt", train_dit: "dit.pt"}
TINY = ["--preset", "demo", "--size", "16", "--batch", "4", "--warmup", "0", "--device", "cpu", "--log-every", "1",
        "--lr-end", "2e-3", "--lr", "2e-3", "--preview-every", "0"]  # an epoch of `shapes` has 2,000 steps


class Stop(Exception):
    """Ends a run where a test has seen enough."""


stop = mock.Mock(side_effect=Stop)


def run(it, out, steps, *flags):
    """main() until so many steps of `shapes` are done -> last.pt."""
    own = ["--resize", "16"] if it is train_decoder else ["--stats-images", "8"]
    it.main([*TINY, *own, "--out", str(out), "--epochs", str(steps / 2000), *map(str, flags)])
    return read(out / "last.pt")


def refused(it, capsys, *argv):
    """The error that main() prints below the usage line."""
    with pytest.raises(SystemExit, match="^2$"):
        it.main([str(word) for word in argv])
    usage, error = capsys.readouterr().err.splitlines()[-2:]
    assert usage.startswith("usage: ") and ": error: " in error
    return error.split(": error: ")[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TABLE = [
    ("--data", None, "shapes", "images"), ("--lr", 2e-4, 3e-3, "rate, 100% of it"), ("--size", 256, 32, "pixels"),
    ("--model", "XL", "S", "size", "S", "XL"), ("--layers", [int], [int], "some numbers"),
    ("--betas", [0.9, 0.95], [0.5, 0.9], "two numbers"), ("--fast", False, False, "a switch"),
]


def parser_of(*argv):
    return make_parser("What it does.\n\nMore.", TABLE, {"--size": 512}, argv)


def parsed(*argv):
    return parser_of(*argv).parse_args(argv)


def test_a_preset_is_a_column_and_flags_override_it():
    """And help shows the defaults of the preset."""
    paper = dict(data=None, lr=2e-4, size=256, model="XL", layers=[], betas=[0.9, 0.95], fast=False)
    columns = dict(imagenet256=paper, imagenet512=paper | dict(size=512),
                   demo=dict(data="shapes", lr=3e-3, size=32, model="S", layers=[], betas=[0.5, 0.9], fast=False))
    for preset, column in columns.items():
        assert vars(parsed("--preset", preset)) == column | dict(preset=preset)
        assert vars(parsed(f"--preset={preset}")) == column | dict(preset=preset)
        text = " ".join(parser_of("--preset", preset).format_help().split())
        assert "What it does. options" in text and "More" not in text and text.endswith("--fast a switch")
        assert f"rate, 100% of it (default: {column['lr']})" in text and "default: None" not in text
        assert all(f"(default: {column[name]})" in text for name in ("size", "model", "betas")) and "[]" not in text
    assert parsed() == parsed("--preset", "imagenet256")
    args = parsed("--lr", "1", "--preset", "demo", "--layers", "4", "2", "--betas", "0", "1", "--fast", "--model", "XL")
    assert (args.lr, args.layers, args.betas, args.fast, args.model) == (1.0, [4, 2], [0.0, 1.0], True, "XL")
    assert type(args.lr) is float and parsed("--data", "7").data == "7"


BAD = {f"--{name} 0": f"--{name} 0" for name in
       ("size", "batch", "micro-batch", "epochs", "lr", "log-every", "save-every")}
BAD |= {f"--{name} {value}": f"--{name} {value!r} is empty or out of range" for name, value in dict(
    lr=-1.0, epochs=float("nan"), warmup=-0.1, seed=2**63, out="", data="", init="", ema=1.0).items()}
BAD |= {f"--{name} x": f"argument --{name}: invalid choice" for name in
        ("precision", "model", "compile", "device", "preset")}
BAD |= {"--lr inf": "--lr inf is", "--seed -1": "--seed -1 is", "--warmup inf": "--warmup inf is",
         "--batch 1.5": "argument --batch: invalid int", "--epoch 1": "unrecognized argum"}


@TRAINERS
def test_a_bad_value_is_one_line_before_anything_is_built(it, capsys, monkeypatch):
    monkeypatch.setattr(it, "train", lambda args: pytest.fail("the run began"))
    for words, reason in BAD.items():
        assert refused(it, capsys, *TINY, *words.split(" ")).startswith(reason), words


@TRAINERS
def test_processes_that_see_different_files_are_refused(it, tmp_path, monkeypatch):
    """As on two nodes whose --out is on no shared disk: one would go on, the other begin."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for other in (None, 20):
        def gather(steps, mine, other=other):
            steps[:] = [mine, other]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        if other is None:
            assert it.load_last(tmp_path, "x.pt", {}) is None
        else:
            with pytest.raises(ValueError, match="on a disk that all nodes share"):
                it.load_last(tmp_path, "x.pt", {})


@TRAINERS
def test_no_arguments_are_no_arguments(it, capsys, monkeypatch):
    """main([]) leaves the command line of whoever calls it alone; main() reads it."""
    begun = []
    monkeypatch.setattr(it, "train", begun.append)
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "x", "--preset", "demo", "--batch", "8"])
    assert "--data is missing" in refused(it, capsys) and not begun
    it.main()
    assert begun[0].preset == "demo" and begun[0].batch == 8 and begun[0].data == "x"


@TRAINERS
def test_a_refusal_in_the_run_is_one_line_and_all_else_keeps_its_traceback(it, capsys, monkeypatch):
    ended, fails = [], mock.Mock(side_effect=ValueError("--lr is wrong"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(it, "train", fails)
    assert refused(it, capsys, *TINY) == "--lr is wrong"
    for fails.side_effect in (RuntimeError("out of memory"), OSError(28, "No space left"), KeyError, KeyboardInterrupt):
        with pytest.raises((RuntimeError, OSError, KeyError, KeyboardInterrupt)):
            it.main(TINY)
    assert not ended, "a group whose rank has failed is not left in order"
    fails.side_effect = None
    it.main(TINY)
    assert ended == [1]


@TRAINERS
def test_the_first_step_of_a_warm_up_is_not_lost(it):
    args = argparse.Namespace(lr=0.5, lr_end=0.1, warmup=2.0, epochs=8.0, decay_start=8.0, decay_end=9.0)
    assert [it.lr_at(step, args, 2) for step in range(5)] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


def test_torchrun_s_processes_form_a_group_that_waits_for_two_hours(monkeypatch, capsys):
    """One process needs none, inside a SLURM allocation too, unless torchrun started the processes."""
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
    for device, whole in (("cpu", "cpu"), ("cuda", "cuda:1")):
        assert set_up(argparse.Namespace(device=device, precision="tf32"))[:3] == (5, 8, torch.device(whole))
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
    """On a CPU only bf16 changes anything."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    *_, autocast = set_up(argparse.Namespace(device="cpu", precision=precision))
    with autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert not chosen and torch.backends.cudnn.allow_tf32 is not tf32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast says that there is no GPU
        *_, device, autocast = set_up(argparse.Namespace(device="cuda", precision=precision))
    assert device == torch.device("cuda:0") and (autocast.device, autocast.fast_dtype) == ("cuda", torch.bfloat16)
    assert chosen == [matmul] and torch.backends.cudnn.allow_tf32 is tf32


@TRAINERS
@pytest.mark.parametrize("compile, device, expected", [
    ("auto", "cpu", False), ("on", "cpu", True), ("off", "cpu", False), ("auto", "cuda", True), ("off", "cuda", False)])
def test_what_is_compiled(compile, device, expected, it, tmp_path, monkeypatch):
    """By the device that is used, not by the one that is there; before DDP."""
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(it, "compile_blocks", lambda *models: compiled.append([type(m).__name__ for m in models]))
    monkeypatch.setattr(it, "training_batches", stop)
    if device == "cuda":  # all of it but the GPU
        monkeypatch.setattr(it, "set_up", lambda args: (0, 1, torch.device("cuda"), contextlib.nullcontext()))
        monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
        monkeypatch.setattr(it, "latent_statistics", lambda *_: {}, raising=False)
    with pytest.raises(Stop):
        run(it, tmp_path / "out", 1, "--compile", compile)
    model = "Decoder" if it is train_decoder else "DiT"
    assert compiled == ([["VisionTransformer", model]] if expected else [])


def test_compiled_blocks_keep_a_graph_for_each_shape():
    """A smaller batch in between leaves no dynamic graph that would serve the usual one from then on."""
    graphs, runs = [], []
    torch._dynamo.reset()  # other tests' graphs

    def backend(module, inputs):
        graphs.append(module)
        number = len(graphs)
        return lambda *values: runs.append(number) or module(*values)

    model = DiT(16, 2, 4, width=16, depth=2, heads=2)
    with pytest.MonkeyPatch.context() as patch:
        compile_module = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
        compile_blocks(model)
    for batch in (4, 3, 4):
        model(torch.randn(batch, 16, 2, 2), torch.rand(batch), torch.zeros(batch).long())
    assert runs == [1, 1, 2, 2, 1, 1]  # two blocks each
    assert not torch._dynamo.config.optimize_ddp


@TRAINERS
def test_how_a_batch_splits(it, tmp_path, monkeypatch, capsys):
    """Over processes and micro-batches; DDP's buffers stay each rank's own and gradients are views of its buckets."""
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
        words = f"; batch {batch} = {world_size} processes x {accumulate} x {micro_batch}; {steps} steps, "
        assert words + f"{8000 / batch:.4g} an epoch; from step 0" in capsys.readouterr().out
        expected = dict(gradient_as_bucket_view=True, broadcast_buffers=False) if world_size > 1 else {}
        assert vars(ddp) == expected, "one process needs no DDP"
    monkeypatch.setattr(it, "training_batches", lambda *_: pytest.fail("the run began"))
    for batch in (6, 3):
        assert f"--batch {batch} does not divide over 4 processes" in refused(it, capsys, *TINY, "--batch", batch)


@TRAINERS
def test_two_processes_train_without_warnings_of_our_making(it, tmp_path):
    """Neither stage calls what a library is going to drop."""
    flags = [*TINY, "--epochs", 0.001, "--workers", 0, "--out", tmp_path]
    if it is train_decoder:
        flags += ["--gan", 0.75, "--disc-start", 0, "--gan-start", 0, "--dino-weights", save_tiny_dino("dino.pt")]
    printed = "\n".join(finish(*start_ranks(f"{it.__name__}.py", *flags, PYTHONWARNINGS="always")))
    assert "FutureWarning" not in printed and "DeprecationWarning" not in printed, printed
    assert read(tmp_path / "last.pt")["step"] == len(rows(tmp_path)) == 2


def test_a_checkpoint_is_written_beside_its_place_and_moved_last(tmp_path, monkeypatch):
    """All files are on the disk before the first is moved; last.pt moves last, and is written without checksums."""
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


SETTINGS = {"--lr": 0.1, "--layers": [], "--seed": 0, "images": 20, "classes": ["a", "b"]}


def test_another_run_in_the_folder_is_refused_by_what_differs(tmp_path):
    save_checkpoint({tmp_path / "last.pt": dict(settings=SETTINGS, step=3)})
    assert load_last(tmp_path, "dit.pt", dict(reversed(SETTINGS.items())))["step"] == 3
    for changes, reason in [
            ({"--lr": 0.2}, "--lr 0.1, now 0.2"), ({"--seed": 1, "--layers": [1]}, "--layers [], now [1]; --seed 0, n"),
            ({"classes": ["a", "c"]}, "classes ['a', 'b'], now ['a', 'c']"), ({"images": 21}, "images 20, now 21"),
            ({"--clip": 1.0}, "--clip None, now 1.0"), ({"classes": ["x" * 90]}, "['" + "x" * 58)]:
        with pytest.raises(ValueError) as error:
            load_last(tmp_path, "dit.pt", SETTINGS | changes)
        message = str(error.value)
        assert message.startswith(f"{tmp_path} holds a run with other settings (") and reason in message
        assert message.endswith(f"): choose another --out, and --init {tmp_path}/dit.pt to go on from its weights")


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint({path: dict(settings=SETTINGS, step=3, x=torch.ones(1000))})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"text", [1], {}, dict(step=1), nn.Linear(1, 1)):
        path.unlink()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_last(tmp_path, "dit.pt", SETTINGS)
        message = str(error.value)
        assert message.startswith(f"{path} is damaged or of another version (") and "\n" not in message
        assert message.endswith(f"): put back a copy, or move {tmp_path} away")


@TRAINERS
def test_a_result_alone_is_not_overwritten_and_a_killed_first_save_locks_nothing(it, tmp_path, capsys, monkeypatch):
    """The kill comes after the first file has been moved; the run then begins anew, its log too."""
    out = tmp_path / "run"
    moved = []

    def replace(source, target, works=os.replace):
        works(source, target) if RESULT[it] in str(target) or "stat.pt" in str(target) else stop()
        moved.append(target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", replace)
        run(it, out, 2)
    assert (out / RESULT[it]).exists() and (out / "last.pt.tmp").exists() and not (out / "last.pt").exists()
    assert run(it, out, 2)["step"] == 2 and [row["step"] for row in rows(out)] == ["1", "2"]
    assert not (out / "last.pt.tmp").exists()
    (out / "last.pt").unlink()
    monkeypatch.setattr(it, "Encoder", lambda *_: pytest.fail("the encoder was built"))
    message = refused(it, capsys, *TINY, "--out", out)
    assert f"{out} holds a {RESULT[it]} but no last.pt to resume from: choose another --out" in message


@TRAINERS
def test_what_ends_a_run_is_told_before_anything_is_built(it, tmp_path, capsys, monkeypatch):
    """A finished run, one of other settings; what shapes no result may differ."""
    run(it, tmp_path / "run", 2)
    monkeypatch.setattr(it, "Encoder", stop)
    for steps in (2, 1):
        capsys.readouterr()
        run(it, tmp_path / "run", steps)
        assert f"finished: {tmp_path}/run/{RESULT[it]} has its 2 steps" in capsys.readouterr().out
    differs = refused(it, capsys, *TINY, "--out", tmp_path / "run", "--batch", 8, "--layers", 1)
    assert "--batch 4, now 8; --layers [], now [1]" in differs
    with pytest.raises(Stop):  # it goes on as far as the encoder
        run(it, tmp_path / "run", 3, "--lr", 1, "--lr-end", 0.5, "--micro-batch", 2, "--precision", "bf16", "--workers",
            1, "--log-every", 7, "--save-every", 9, "--init", "gone.pt", "--checkpointing", "--compile", "on")


def test_a_wrong_decoder_is_told_before_a_model_is_built(tmp_path, capsys, monkeypatch):
    run(train_decoder, tmp_path / "decoder", 1, "--size", 24, "--resize", 24)
    capsys.readouterr()
    monkeypatch.setattr(train_dit, "DiT", lambda *_, **__: pytest.fail("a model was built"))
    message = refused(train_dit, capsys, *TINY, "--preview-every", 1, "--decoder", tmp_path / "decoder" / "decoder.pt")
    assert "decodes (128, 3, 3) of random-tiny, this run draws (128, 2, 2) of random-tiny" in message


COLUMNS = ["step", "epoch", "loss", "bin", "lr", "images_per_s", "memory_gb"]


def test_a_row_is_the_mean_over_images_and_ranks_without_what_is_not_finite(tmp_path, monkeypatch):
    """Steps print as they are. A column may be finite on the other rank only. The other rank writes nothing."""
    clock = types.SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train_dit, "time", clock)
    logs = [Log(tmp_path / "new" / "run", COLUMNS, 0, 12298, rank) for rank in (0, 1)]
    for log, bin in zip(logs, (math.nan, math.inf), strict=True):
        log.add(loss=torch.tensor([1.0, 2.0, math.nan]), bin=torch.tensor(bin))  # one value for each image
        log.add(2, loss=torch.tensor(6.0, requires_grad=True))  # a mean over two images
    logs[1].add(loss=torch.tensor([[7.0, 8.0]], dtype=torch.bfloat16), bin=torch.tensor([2.0, 5.0]))
    sums = sum(torch.stack(list(log.sums.values())) for log in logs)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sums))
    clock.now += 4
    lines = [log.line(12300, 12400, 0.123456, 8, lr=2.5e-4) for log in logs]
    numbers = "step 12300 epoch 0.1235 lr 0.00025 loss 4.5 bin 3.5 images_per_s 4 memory_gb 0"  # (15 + 15 + 15) / 10
    assert lines == [f"{numbers} left 0:03:20"] * 2
    words = numbers.split()
    expected = dict(zip(words[::2], words[1::2], strict=True))
    assert rows(tmp_path / "new" / "run") == [expected]
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    logs[0].add(loss=torch.tensor([9.0]), bin=torch.tensor(math.nan))
    clock.now += 2
    assert logs[0].line(12301, 12400, 1.0, 8, lr=1.0) == (
        "step 12301 epoch 1.0000 lr 1 loss 9 images_per_s 4 memory_gb 0 left 0:03:18")
    assert rows(tmp_path / "new" / "run")[1] == expected | dict(step="12301", epoch="1.0000", loss="9", bin="", lr="1")


HEADER = (",".join(COLUMNS) + "\n").encode()


@pytest.mark.parametrize("before, kept, after", [
    (None, 0, HEADER), (None, 500, HEADER), (b"", 9, HEADER), (HEADER + b"1,\n2,\n", len(HEADER) + 3, HEADER + b"1,\n"),
    (HEADER + b"1,\n", len(HEADER) + 3, HEADER + b"1,\n"), (HEADER + b"1,\n", 900, HEADER + b"1,\n"),
    (HEADER + b"1,\n", 0, HEADER), (b"\xff\x00 stray", 7, b"\xff\x00 stra"), (b"\xff\xfe", 0, HEADER),
])
def test_the_log_is_cut_back_to_what_was_saved_and_never_read(before, kept, after, tmp_path):
    """What tell() says at once is where the next row will stand: last.pt may be saved before that row."""
    if before is not None:
        (tmp_path / "log.csv").write_bytes(before)
    log = Log(tmp_path, COLUMNS, kept, 3, 0)
    told = log.file.tell()
    log.file.flush()
    assert (tmp_path / "log.csv").read_bytes() == after and told == len(after)
    log.add(loss=torch.tensor(1.0))
    log.line(4, 5, 0.1, 8)
    assert (tmp_path / "log.csv").read_bytes().startswith(after + b"4,0.1000,1,,,")


@TRAINERS
def test_no_log_stops_a_run_and_no_step_stands_in_it_twice(it, tmp_path):
    """Damaged, longer, shorter, gone, a folder that was killed between two saves: the weights come out the same."""
    whole = run(it, tmp_path / "whole", 4)
    out, log = tmp_path / "run", tmp_path / "run" / "log.csv"
    run(it, out, 2)
    begun, saved = log.read_bytes(), (out / "last.pt").read_bytes()
    for content, steps in {begun: "1234", begun + b"3,0.0015,9\n4,0.00": "1234", begun[:-9]: "", b"": "34", None: "34",
                           b"\xff\xfe" + begun[2:]: "", begun.replace(b"1", b"\x00", 1): ""}.items():
        log.unlink()
        if content is not None:
            log.write_bytes(content)
        (out / "last.pt").write_bytes(saved)
        last = run(it, out, 4)
        assert last.pop("log_bytes") == log.stat().st_size
        assert_identical(last, {key: value for key, value in whole.items() if key != "log_bytes"})
        assert not steps or "".join(row["step"] for row in rows(out)) == steps


@TRAINERS
@pytest.mark.parametrize("sent, ignored, steps, said", [
    (["SIGINT"], False, 2, 1), (["SIGTERM", "SIGINT"], False, None, 1), (["SIGINT", "SIGTERM", "SIGTERM"], False, 2, 3),
    (["SIGHUP"], False, 2, 1), (["SIGHUP"], True, 4, 0), (["SIGINT", "SIGINT"], False, None, 1)])
def test_signals_end_a_run_after_its_step(sent, ignored, steps, said, it, tmp_path, monkeypatch, capfd):
    """torchrun sends several; a Ctrl-C after the first signal ends at once; nohup has SIGHUP ignored."""
    def lr_at(step, *given, works=it.lr_at):
        for name in sent if step == 1 else []:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0)
        return works(step, *given)

    monkeypatch.setattr(it, "lr_at", lr_at)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with contextlib.nullcontext() if steps else pytest.raises(KeyboardInterrupt):
            assert run(it, tmp_path / "out", 4)["step"] == steps == len(rows(tmp_path / "out"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "last.pt").exists() == bool(steps)
    printed = capfd.readouterr()
    assert ("stopped and saved at step 2; the same command resumes" in printed.out) == (steps == 2)
    assert printed.err.count("stopping after this step, with a checkpoint; Ctrl-C stops at once") == said


@TRAINERS
def test_unreadable_images_are_counted_at_the_end(it, tmp_path, capfd):
    make_images(tmp_path / "data", 20, (16, 16))
    (tmp_path / "data" / "0003.png").write_text("no image")
    run(it, tmp_path / "out", 2000, "--data", tmp_path / "data", "--epochs", 1)
    assert "rank 0: 1 images could not be read, see above; others took their place\n" in capfd.readouterr().out
