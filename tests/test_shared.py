"""What the scripts share, the last section of encoder.py: flags, processes, checkpoints, the log, signals."""

import argparse
import datetime
import math
import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_images, read, rows, save_tiny_dino
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import encoder
import train_decoder
import train_dit
from dit import DiT
from encoder import (PRESETS, RUN_FLAGS, Images, Log, Parser, Plan, Shapes, agree, amount, count, distribute, finish,
                     make_ema, make_loader, make_parser, natural, one_line_refusals, positive, resume,
                     save_checkpoint, set_up, share, stop_by_signal, training_loader)

CPU = torch.device("cpu")


def settings(**changes):
    """The arguments of a run, as far as this section looks at them."""
    return argparse.Namespace(**dict(batch=8, micro_batch=4, epochs=10.0, log_every=None, save_every=None, rank=0,
                                     world_size=1, seed=0, workers=0, lr=0.1, device="cpu", precision="tf32",
                                     compile=None) | changes)


def two_ranks(monkeypatch, **operations):
    """This process believes to be one of several, with stand-ins for torch.distributed's operations."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name, operation in operations.items():
        monkeypatch.setattr(dist, name, operation)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("kind, good, bad, words", [
    (natural, {"0": 0, "7": 7}, ["-1", "1.5", "x", "", "nan", "1e3"], "is not an integer of at least 0"),
    (count, {"1": 1, "12": 12}, ["0", "-3", "2.0", "inf"], "is not an integer of at least 1"),
    (amount, {"0": 0, "1e-3": 0.001, "2": 2}, ["-0.1", "nan", "x", "1e400"], "is not a number of at least 0"),
    (positive, {"1e-9": 1e-9, "3": 3}, ["0", "-1", "nan", "inf"], "is not a number above 0"),
    (share, {"0": 0, "0.999": 0.999}, ["1", "-0.1", "nan", "inf"], "is not a number of at least 0 and below 1"),
])
def test_types_of_numbers(kind, good, bad, words):
    for text, value in good.items():
        parsed = kind(text)
        assert parsed == value and type(parsed) is (int if "integer" in words else float)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value).startswith(f"{text} {words}")


def test_seeds_have_63_bits():
    assert natural(str(2**63 - 1)) == 2**63 - 1
    with pytest.raises(argparse.ArgumentTypeError):
        natural(str(2**63))


FLAGS = [
    ("--data", str, "x", "y", "shapes", "images"),
    ("--lr", positive, 2e-4, 1e-4, 3e-3, "learning rate, 100% of it"),
    ("--model", ("S", "XL"), "XL", "XL", "S", "size"),
    ("--classes", [natural], None, None, [1, 2], "some numbers"),
    ("--interval", [amount, amount], [0.0, 1.0], [0.0, 1.0], [0.1, 0.9], "two numbers"),
    ("--fast", bool, False, False, False, "a switch"),
] + RUN_FLAGS


def parsed(*argv):
    return make_parser("What it does.\n\nMore.", FLAGS, argv).parse_args(argv)


def test_a_preset_is_a_column_and_flags_override_it():
    assert PRESETS == ("imagenet256", "imagenet512", "demo")
    columns = {"imagenet256": ("x", 2e-4, "XL", None, [0, 1], False),
               "imagenet512": ("y", 1e-4, "XL", None, [0, 1], False),
               "demo": ("shapes", 3e-3, "S", [1, 2], [0.1, 0.9], False)}
    for preset, column in columns.items():
        args = parsed("--preset", preset)
        assert (args.data, args.lr, args.model, args.classes, args.interval, args.fast) == column
        assert args.preset == preset and vars(parsed(f"--preset={preset}")) == vars(args)
    assert vars(parsed()) == vars(parsed("--preset", "imagenet256"))
    args = parsed("--lr", "0.5", "--preset", "demo", "--classes", "4", "--interval", "0", "0.5", "--fast", "--model",
                  "XL", "--compile", "--out", "there")
    assert (args.lr, args.classes, args.interval, args.fast, args.model) == (0.5, [4], [0, 0.5], True, "XL")
    assert args.compile is True and parsed("--no-compile").compile is False and parsed().compile is None
    assert args.out == Path("there") and parsed().out is None


def test_device_is_the_gpu_where_there_is_one(monkeypatch, capsys):
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert parsed().device == device and parsed("--device", "cpu").device == "cpu"
    with pytest.raises(SystemExit, match="2"):
        parsed("--device", "cuda")
    assert "error: --device cuda: PyTorch finds no GPU here, use --device cpu\n" in capsys.readouterr().err


@pytest.mark.parametrize("argv, reason", [
    (["--lr", "0"], "argument --lr: 0 is not a number above 0"), (["--model", "M"], "argument --model: invalid choice"),
    (["--preset", "huge"], "argument --preset: invalid choice"), (["--preset"], "argument --preset: expected one"),
    (["--interval", "1"], "argument --interval: expected 2"),
    (["--classes"], "argument --classes: expected at least one"), (["--data", ""], "--data is empty: give a value"),
    (["--out", ""], "--out is empty: give a value or leave the flag out"),
    (["--nothing", "1"], "unrecognized arguments: --nothing"),
])
def test_refusals_are_one_line_and_exit_with_2(argv, reason, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in (None, "0", "1"):
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            parsed(*argv)
        printed = capsys.readouterr()
        assert not printed.out and printed.err.count("\n") == 1 and f": error: {reason}" in printed.err
    assert waited == [10], "rank 0 speaks first; torchrun then ends the others"


def test_help_shows_the_defaults_of_the_preset(capsys):
    for preset, shown in {"imagenet256": ["0.0002", "XL", "[0.0, 1.0]"], "demo": ["0.003", "S", "[1, 2]"]}.items():
        with pytest.raises(SystemExit, match="0"):
            parsed("--preset", preset, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert "What it does. options" in text.replace("--flag VALUE ...] ", "") and "More" not in text
        assert f"learning rate, 100% of it (default: {shown[0]})" in text and "a switch --" in text
        assert all(f"(default: {value})" in text for value in shown) and "default: None" not in text


# ---------------------------------------------------------------------------------------------------------------------
# The frame around a script


def raise_in(file, error):
    """Raise an error from a line of this file."""
    exec(compile("raise error", str(file), "exec"), {"error": error})


def test_bad_input_is_one_line_and_all_else_keeps_its_traceback(capsys):
    """And the handlers of signals are back, however the script ends."""
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    parser, before = Parser(prog="script.py"), handlers()
    for error, line in {
        ValueError("--lr is wrong"): "--lr is wrong",
        ValueError(f'Caught\n  File "torch/x.py"\n  File "{ROOT / "encoder.py"}"\nValueError: first\n'): "first",
    }.items():
        with pytest.raises(SystemExit, match="2"), one_line_refusals(parser):
            stop_by_signal(0)
            raise_in(f"{ROOT}/tests/../dit.py", error)  # as Python has it after `python ../dit.py`
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("script.py: error: ") and printed.err.endswith(line + "\n")
        assert printed.err.count("\n") == 1 and handlers() == before
    for error in (RuntimeError("CUDA out of memory"), OSError(28, "No space left"), FileNotFoundError("x"),
                  KeyError("x"), KeyboardInterrupt(), SystemExit("stopped"),
                  ValueError(f'File "{ROOT}/x.py"\n  File "torch/y.py"\n')):
        with pytest.raises(type(error)) as raised, one_line_refusals(parser):
            stop_by_signal(0)
            raise_in(ROOT / "dit.py", error)
        assert raised.value is error and not capsys.readouterr().err and handlers() == before
    with pytest.raises(ValueError, match="of another library"), one_line_refusals(parser):
        raise_in("numpy.py", ValueError("of another library"))


def test_an_error_of_a_loader_process_is_one_line(tmp_path, capfd):
    images = Images(encoder.ImageFolder(make_images(tmp_path, 2)), lambda image, rng: image)
    for path in tmp_path.iterdir():
        path.write_text("no image")
    with pytest.raises(SystemExit, match="2"), one_line_refusals(Parser(prog="script.py")):
        next(iter(make_loader(images, [[(0, 0)]], 1, "cpu")))
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("script.py: error: 100 images in a row could not be read, the last one ")
    assert all(line.startswith("cannot read ") for line in lines[:-1])


def test_the_group_of_processes_ends_with_the_work_but_not_with_a_failure(monkeypatch):
    ended = []
    two_ranks(monkeypatch, destroy_process_group=lambda: ended.append(1))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SystemExit), one_line_refusals(Parser()):
        raise_in(ROOT / "dit.py", ValueError("one rank alone"))
    assert not ended
    with one_line_refusals(Parser()):
        pass
    assert ended == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


@pytest.fixture
def groups(monkeypatch):
    """The calls of init_process_group; no launcher's variables."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: calls.append((given, named)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize("environment", [
    {}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "3"},
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "SLURM_NPROCS": "4"},
])
def test_one_process_needs_no_group(environment, groups, monkeypatch):
    """Inside a SLURM allocation too, unless torchrun started the processes."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = settings(rank=None, world_size=None)
    device, _ = set_up(args)
    assert (args.rank, args.world_size, device.type, args.compile) == (0, 1, "cpu", False) and not groups


def test_torchrun_s_processes_form_a_group_that_waits_for_two_hours(groups, monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    args = settings()
    set_up(args)
    assert (args.rank, args.world_size) == (5, 8)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    args = settings(device="cuda")
    device, _ = set_up(args)
    assert args.compile is True
    two_hours = datetime.timedelta(hours=2)
    assert device == torch.device("cuda:1") and chosen == [device]
    assert groups == [(("gloo",), dict(timeout=two_hours, device_id=None)),
                      (("nccl",), dict(timeout=two_hours, device_id=device))]


@pytest.mark.parametrize("precision, matmul, tf32, bf16", [
    ("float32", "highest", False, False), ("tf32", "high", True, False), ("bf16", "high", True, True)])
def test_precision(precision, matmul, tf32, bf16, groups, monkeypatch):
    """On a CPU only bf16 changes anything."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    try:
        torch.set_float32_matmul_precision("medium")
        _, autocast = set_up(settings(precision=precision))
        with autocast:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast says that there is no GPU
            device, autocast = set_up(settings(device="cuda", precision=precision))
        assert device == torch.device("cuda:0") and (autocast.device, autocast.fast_dtype) == ("cuda", torch.bfloat16)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, tf32)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def in_two_processes(work, folder):
    """work(rank) in two forked processes that know each other -> what they return."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def run(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)
        try:
            torch.save(work(rank), folder / f"rank{rank}.pt")
        except BaseException:
            traceback.print_exc()
            raise

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_distributed_model(tmp_path):
    """Gradients are means over the ranks and stay views of DDP's buckets; buffers stay each rank's own."""
    assert distribute(nn.Linear(1, 1), CPU).__class__ is nn.Linear, "one process needs no DDP"

    def work(rank):
        set_up(settings())
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            model[0].weight.fill_(1.0 + rank)  # DDP starts all ranks from the weights of rank 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ddp = distribute(model, CPU)
        assert isinstance(ddp, DistributedDataParallel) and (model[0].weight == 1).all()
        model.eval()
        model[1].running_mean.fill_(rank)
        seen = []
        for step in range(3):
            ddp(torch.full((4, 3), step + rank + 1.0)).sum().backward()
            grad = model[0].weight.grad
            seen.append((grad.clone(), grad.data_ptr(), grad._is_view()))
            model.zero_grad(set_to_none=False)
            assert model[0].weight.grad is grad and not grad.any()
        dist.destroy_process_group()
        return dict(seen=seen, buffer=model[1].running_mean)

    first, second = in_two_processes(work, tmp_path)
    for step, ((a, place, view), (b, *_)) in enumerate(zip(first["seen"], second["seen"], strict=True)):
        assert torch.equal(a, b) and view
        assert step < 2 or place == first["seen"][1][1]  # DDP lays its buckets out anew after the first step
        torch.testing.assert_close(a, torch.full((2, 3), 4 * (step + 1.5)), rtol=1e-4, atol=0)  # eps of the norm
    assert not first["buffer"].any() and (second["buffer"] == 1).all()


@pytest.mark.parametrize("script", [train_decoder, train_dit])
def test_two_processes_train_without_warnings_of_our_making(script, tmp_path):
    """Neither stage calls what a library is going to drop."""
    flags = ["--preset", "demo", "--batch", 4, "--epochs", 0.001, "--workers", 0, "--device", "cpu", "--out", tmp_path]
    if script is train_dit:
        flags += ["--stats-images", 8, "--preview-every", 0]
    else:
        flags += ["--size", 16, "--gan", 0.75, "--disc-start", 0, "--gan-start", 0, "--dino-weights",
                  save_tiny_dino(tmp_path / "dino.pt")]

    def work(rank):
        os.chdir(tmp_path)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            script.main([str(flag) for flag in flags])
        return [f"{warning.filename}: {warning.message}" for warning in seen
                if issubclass(warning.category, FutureWarning | DeprecationWarning)]

    assert in_two_processes(work, tmp_path) == [[], []]
    assert read(tmp_path / "last.pt")["step"] == len(rows(tmp_path)) == 2


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
        encoder.compile_blocks(model)
    for batch in (4, 3, 4):
        model(torch.randn(batch, 16, 2, 2), torch.rand(batch), torch.zeros(batch).long())
    assert runs == [1, 1, 2, 2, 1, 1]  # two blocks each
    assert not torch._dynamo.config.optimize_ddp


def test_moving_average():
    """The decay warms up; the copy is frozen and in eval mode; buffers follow the model."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).train()
    model[0].weight.data.fill_(1.0)
    ema = make_ema(model, 0.5)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    expected = 1.0
    for step in range(1, 30):
        model[0].weight.data.fill_(float(step))
        model[1].running_mean.fill_(float(step))
        ema.update(model, step)
        decay = min(0.5, (step - 1) / (step + 8))
        expected = decay * expected + (1 - decay) * step
        assert ema.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
        assert ema.module[1].running_mean.item() == step
    assert decay == 0.5 and model[0].weight.requires_grad


def test_ranks_agree_to_stop(monkeypatch):
    loss, norm = torch.tensor(0.25), torch.tensor(math.inf)
    assert agree([], norm, loss) == (math.inf, 0.25, False) and agree([15], norm, loss) == (math.inf, 0.25, True)
    for other in (0, 1):
        calls = []

        def all_reduce(stop, op, other=other, calls=calls):
            calls.append(op)
            stop.clamp_(min=other)

        two_ranks(monkeypatch, all_reduce=all_reduce)
        assert agree([], loss, norm) == (0.25, math.inf, bool(other)) and agree([2], loss)[-1] is True
        assert calls == [dist.ReduceOp.MAX] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_is_written_beside_its_place_and_moved_last(tmp_path, monkeypatch):
    """All files are on the disk before the first is moved; last.pt moves last, and is written without checksums."""
    events = []

    def watched(name, works):
        def work(*given):
            paths = [getattr(item, "name", item) for item in given if not isinstance(item, dict | int)]
            events.append((name, *(Path(path).name for path in paths)))
            return works(*given)

        return work

    for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    files = {tmp_path / name: {"x": torch.arange(1000.0) + i, "name": name}
             for i, name in enumerate(["stat.pt", "dit.pt", "last.pt"])}
    save_checkpoint(files)
    assert events == [("save", "stat.pt.tmp"), ("fsync",), ("save", "dit.pt.tmp"), ("fsync",), ("save", "last.pt.tmp"),
                      ("fsync",), ("replace", "stat.pt.tmp", "stat.pt"), ("replace", "dit.pt.tmp", "dit.pt"),
                      ("replace", "last.pt.tmp", "last.pt")]
    assert {path.name for path in tmp_path.iterdir()} == {"stat.pt", "dit.pt", "last.pt"}
    for path, content in files.items():
        assert torch.equal(read(path)["x"], content["x"]) and read(path)["name"] == path.name
    with zipfile.ZipFile(tmp_path / "dit.pt") as sums, zipfile.ZipFile(tmp_path / "last.pt") as none:
        assert sums.testzip() is None and none.testzip() is not None
    assert torch.serialization.get_crc32_options()


def begin(out, step=3, **changes):
    """A folder with a run of train_dit that has done three steps -> its arguments."""
    args = settings(out=out)
    *_, recorded, start = resume(args, "train_dit", "dit.pt", images=20, classes=["a", "b"])
    assert start == 0
    out.mkdir()
    save_checkpoint({out / "dit.pt": {}, out / "last.pt": dict(kind="train_dit", args=recorded, step=step) | changes})
    return args


def resumed(args, images=20, classes=("a", "b")):
    return resume(args, "train_dit", "dit.pt", images=images, classes=list(classes))


def test_a_run_resumes_with_other_arguments_that_shape_no_result(tmp_path):
    args = begin(tmp_path / "run")
    last, recorded, start = resumed(args)
    assert start == last["step"] == 3
    assert recorded == last["args"] == dict(batch=8, seed=0, lr=0.1, precision="tf32", images=20, classes=["a", "b"])
    free = dict(epochs=99.0, workers=3, micro_batch=1, log_every=7, save_every=2.0, rank=1, world_size=4, device="cuda")
    assert resumed(settings(out=args.out, **free))[1] == recorded
    assert resume(settings(out=tmp_path / "new", **free), "train_dit", "dit.pt", images=20, classes=["a", "b"]) == (
        None, recorded, 0)


@pytest.mark.parametrize("changes, data, reason", [
    (dict(lr=0.2), {}, "lr 0.1, now 0.2"), (dict(seed=1, batch=4), {}, "batch 8, now 4; seed 0, now 1"),
    ({}, dict(classes=["a", "c"]), "classes ['a', 'b'], now ['a', 'c']"), ({}, dict(images=21), "images 20, now 21"),
    (dict(clip=1.0), {}, "clip None, now 1.0"), ({}, dict(classes=["x" * 90]), "['" + "x" * 58 + ")"),
])
def test_another_run_in_the_folder_is_refused_by_what_differs(changes, data, reason, tmp_path):
    out = begin(tmp_path / "run").out
    with pytest.raises(ValueError) as error:
        resumed(settings(out=out, **changes), **data)
    message = str(error.value)
    assert message.startswith(f"{out} holds a run with other settings (") and reason in message and "\n" not in message
    assert message.endswith(f"): choose another --out, and --init {out}/dit.pt to go on from its weights")


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    args = begin(tmp_path / "run")
    path, reason = args.out / "last.pt", "last.pt is damaged, or no checkpoint of train_dit.py"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            resumed(args)
    for content in ([1], {}, dict(step=1), dict(kind="train_decoder", args={}, step=1), nn.Linear(1, 1),
                    dict(kind="train_dit", step=1)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=reason) as error:
            resumed(args)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
        assert str(error.value).endswith("): put back a copy, or move the folder away")
    path.write_bytes(whole)
    assert resumed(args)[2] == 3


def test_a_result_without_its_last_checkpoint_is_not_overwritten(tmp_path):
    args = begin(tmp_path / "run")
    (args.out / "last.pt").rename(args.out / "last.pt.tmp")  # as a kill in the first save leaves it
    assert resumed(args)[::2] == (None, 0)
    (args.out / "last.pt.tmp").unlink()
    with pytest.raises(ValueError, match="run holds a dit.pt but no last.pt to resume from: choose another --out"):
        resumed(args)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: choose a folder"):
        resumed(settings(out=tmp_path / "file"))


@pytest.mark.parametrize("others, agreed", [([3, 3], True), ([3, 0], False), ([2, 3], False)])
def test_ranks_must_see_the_same_checkpoint(others, agreed, tmp_path, monkeypatch):
    args = begin(tmp_path / "run")
    args.world_size = 2
    own = []

    def gather(starts, start):
        own.append(start)
        starts[:] = others

    two_ranks(monkeypatch, all_gather_object=gather)
    if agreed:
        assert resumed(args)[2] == 3
    else:
        with pytest.raises(ValueError, match="the processes see different files at .*last.pt: put --out on a disk"):
            resumed(args)
    assert own == [3]


def test_training_goes_on_with_the_images_of_its_step():
    images, args = Images(Shapes(20, 8), lambda image, rng: image), settings(epochs=1.0, rank=1, world_size=2)
    plan = Plan(args, 20)
    batches, steps = training_loader(images, args, plan, 1, "cpu")
    keys = torch.cat([keys for _, _, keys in batches]).tolist()
    expected = encoder.training_batches(20, 8, 4, range(1, 2), 0, 1, 2)
    assert steps == range(1, 2) and keys == [key for part in expected for _, key in part] and len(keys) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("batch, world_size, micro, local, accumulate, micro_batch", [
    (8, 1, 4, 8, 2, 4), (8, 1, 8, 8, 1, 8), (8, 1, 100, 8, 1, 8), (8, 1, 3, 8, 3, 3), (8, 2, 3, 4, 2, 2),
    (1024, 8, 50, 128, 3, 43), (4, 4, 1, 1, 1, 1), (6, 1, 1, 6, 6, 1),
])
def test_how_a_batch_splits(batch, world_size, micro, local, accumulate, micro_batch):
    plan = Plan(settings(batch=batch, world_size=world_size, micro_batch=micro), 100)
    assert (plan.local_batch, plan.accumulate, plan.micro_batch) == (local, accumulate, micro_batch)
    assert f"batch {batch} = {world_size} processes x {accumulate} x {micro_batch}; " in plan.words


@pytest.mark.parametrize("batch, world_size", [(8, 3), (4, 8), (1, 2)])
def test_a_batch_that_does_not_split_is_refused(batch, world_size):
    with pytest.raises(ValueError, match=f"--batch {batch} does not divide over {world_size} processes"):
        Plan(settings(batch=batch, world_size=world_size), 100)


def test_lengths_and_intervals():
    plan = Plan(settings(epochs=2.5), 20)  # 2.5 steps an epoch
    assert plan.steps_per_epoch == 2.5 and plan.total == round(6.25) and plan.log_every == 1
    assert plan.words.endswith("; 6 steps, 2.5 an epoch")
    assert plan.save_every == plan.interval(None, 1) == 200 and plan.interval(None, 300) == 300
    assert plan.interval(0.0, 5) == 0 and plan.interval(0.1, 5) == 0.1
    assert Plan(settings(epochs=0.001), 20).total == 1
    plan = Plan(settings(batch=1024, epochs=80.0), 1281167)
    assert plan.total == 100091 and plan.log_every == 100 and plan.save_every == 1
    assert Plan(settings(epochs=10.0), 800).log_every == 50 and Plan(settings(log_every=3), 800).log_every == 3
    plan = Plan(settings(save_every=0.5), 20)
    assert plan.save_every == 0.5


@pytest.mark.parametrize("images, batch, epochs", [
    (20, 8, 1), (20, 8, 0.4), (1281167, 1024, 1), (100, 7, 0.3), (9, 8, 5)])
def test_intervals_do_not_drift(images, batch, epochs):
    """The k-th is due at the step nearest to k intervals, for thousands of them; each once, in turn."""
    plan = Plan(settings(batch=batch), images)
    due = [done for done in range(1, 20000) if plan.due(done, epochs)]
    steps = epochs * images / batch
    assert len(due) >= min(int(19998 / steps), 9)
    assert all(abs(done - interval * steps) <= 0.5 for interval, done in enumerate(due, 1))


def test_nothing_is_due_without_an_interval_and_everything_with_a_short_one():
    plan = Plan(settings(), 20)
    assert not any(plan.due(done, 0) for done in range(1, 100))
    assert all(plan.due(done, 0.01) for done in range(1, 100))


# ---------------------------------------------------------------------------------------------------------------------
# The log


class Clock:
    """Stands in for the module time: a second passes where the test says so."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(encoder, "time", clock)
    return clock


def start_log(out, start=0, **changes):
    args = settings(out=out, **changes)
    return Log(args, Plan(args, 20), ["loss", "bin", "lr"], start, CPU)


def test_a_row_is_the_mean_of_its_steps_without_what_is_not_finite(tmp_path, clock, capsys):
    log = start_log(tmp_path / "new" / "run")
    log.add(loss=torch.tensor([1.0, 2.0, math.nan]), bin=torch.tensor([math.nan, math.nan]))
    log.add(loss=torch.tensor([6.0], requires_grad=True), bin=torch.tensor(math.inf))
    log.add(loss=torch.tensor(3.0, dtype=torch.bfloat16))
    clock.now += 4
    log.step(0.5)
    log.row(2, lr=0.125, skipped=1)
    log.add(loss=torch.tensor(7.0), bin=torch.tensor([[2.0, 4.0]]))
    clock.now += 2
    log.row(3, lr=0.25, skipped=1)
    first, second = rows(tmp_path / "new" / "run")
    assert list(first) == ["step", "epoch", "loss", "bin", "lr", "images_per_s", "memory_gb", "skipped"]
    assert first == dict(step="2", epoch="0.8000", loss="3", bin="", lr="0.125", images_per_s="4", memory_gb="",
                         skipped="1")
    assert second == dict(step="3", epoch="1.2000", loss="7", bin="3", lr="0.25", images_per_s="4", memory_gb="",
                          skipped="1")
    printed = capsys.readouterr().out
    assert "step 2 epoch 0.8000 loss 3 lr 0.125 skipped 1 images_per_s 4 left 0:00:46\n" in printed
    assert "step 3 epoch 1.2000 loss 7 bin 3 lr 0.25 skipped 1 images_per_s 4 left 0:00:44\n" in printed


def test_a_row_is_the_mean_over_ranks(tmp_path, clock, monkeypatch, capsys):
    """Of a column that is finite on the other rank only, too; the other rank writes nothing."""
    logs = [start_log(tmp_path / "run", rank=rank, world_size=2) for rank in (0, 1)]
    sums = []
    clock.now += 2
    for log, loss, other in zip(logs, ([1.0, 2.0], [6.0]), (math.nan, 5.0), strict=True):
        log.add(loss=torch.tensor(loss), bin=torch.tensor(other))
        sums.append(torch.stack(list(log.sums.values())))
    two_ranks(monkeypatch, all_reduce=lambda tensor: tensor.copy_(sums[0] + sums[1]))
    for log in logs:
        log.row(1)
        log.write(1, bin=4.5)
    a, b = rows(tmp_path / "run")
    assert (a["loss"], a["bin"], a["images_per_s"], b["loss"], b["bin"]) == ("3", "5", "4", "", "4.5")
    printed = capsys.readouterr()
    assert printed.out.count("step 1 ") == 2 and "step 1 epoch 0.4000 bin 4.5\n" in printed.out


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    log = start_log(tmp_path)
    for step in (2, 4, 6):
        log.add(loss=torch.tensor(float(step)))
        log.row(step)
    log.write(4, lr=1)
    log = start_log(tmp_path, start=4)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "4"]
    log.add(loss=torch.tensor(1.0))
    log.row(5)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "4", "5"]
    assert rows(tmp_path)[1]["loss"] == "4" and not (tmp_path / "log.csv.tmp").exists()
    start_log(tmp_path)  # a run from the start
    assert rows(tmp_path) == []
    start_log(tmp_path / "fresh", start=3)  # its log was moved away
    assert rows(tmp_path / "fresh") == []


# ---------------------------------------------------------------------------------------------------------------------
# The end


def test_the_first_ctrl_c_speaks_at_once_and_the_second_ends(capfd):
    stopping = stop_by_signal(0)
    assert not stopping
    os.kill(os.getpid(), signal.SIGINT)
    assert stopping == [signal.SIGINT]
    line = "\nstopping after this step; a second Ctrl-C stops at once, without a checkpoint\n"
    assert capfd.readouterr().err == line
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_sigterm_after_ctrl_c_lets_the_step_finish(capfd):
    """torchrun sends both; a SIGTERM may come twice."""
    stopping = stop_by_signal(0)
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), kind)
    assert stopping == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]
    assert capfd.readouterr().err.count("stopping after this step") == 1
    stopping = stop_by_signal(1)
    for kind in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), kind)
    assert stopping == [signal.SIGTERM, signal.SIGINT] and not capfd.readouterr().err


def test_last_words(capsys):
    finish(settings(out="run"), 7, False, 19)
    finish(settings(out="run", rank=1), 7, True, 0)
    assert not capsys.readouterr().out
    finish(settings(out="run"), 7, True, 0)
    assert capsys.readouterr().out == "stopped and saved at step 7; the same command resumes\n"
    for rank in (0, 1):
        with pytest.raises(SystemExit) as exit:
            finish(settings(out="run", rank=rank), 30, True, 20)
        words = exit.value.code
        assert words == 1 if rank else words.startswith("stopped at step 30: the gradient was not finite 20 times in a")
    assert "run/last.pt has the weights from before" in str(words) or rank == 1
    assert not capsys.readouterr().out
