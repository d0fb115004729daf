"""Faults during training: kills, signals, full disks, unreadable files, dead processes, gradients that are not finite.

The tests run the real scripts, both stages with the settings of kill_check.py.
"""

import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import kill_check
import pytest
import torch
from conftest import ROOT, finish, flat, make_images, read, rows, start_ranks
from kill_check import at_step, differences, logged, start, terminal

import train_decoder
import train_dit

SCRIPTS = {"train_decoder": train_decoder, "train_dit": train_dit}
RESULT = {"train_decoder": "decoder.pt", "train_dit": "dit.pt"}
STEPS = 9  # an epoch has 5 in stage 1 and 2.5 in stage 2
NO_SAVES = ["--save-every", "99"]  # except at the last step
NO_WORKERS = ["--workers", "0"]
MAY_DIFFER = (  # on resume
    "epochs lr lr_end data encoder_weights init stats stats_images out decoder micro_batch checkpointing precision "
    "compile device workers log_every preview_every save_every keep_every vgg_weights lpips_weights "
    "dino_weights").split()


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: arguments}, with a checkpoint at every step."""
    return kill_check.prepare(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def argv(script, flags):
    return flags[script]


@pytest.fixture(scope="module")
def whole(script, argv, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / script
    train(script, argv, out)
    return out


@pytest.fixture(scope="module")
def stopped(script, argv, tmp_path_factory):
    """The folder of a run that a SIGTERM stopped three steps before its end."""
    out = tmp_path_factory.mktemp("stopped") / script
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^143$"):
        at_step(patch, STEPS - 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(script, argv + NO_SAVES, out)
    assert read(out / "last.pt")["step"] == STEPS - 3
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a run of the demo
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: pytest.fail(f"{number} is not caught"))
    yield
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def train(script, argv, out, *more):
    """Run the script in this process -> last.pt."""
    SCRIPTS[script].main([*argv, "--out", str(out), *map(str, more)])
    return read(out / "last.pt")


def refused(capsys, script, argv, out, *more):
    """The error message of the script, which exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        train(script, argv, out, *more)
    _, line = capsys.readouterr().err.splitlines()
    return line


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.pt")}


def wait_until(condition, process):
    limit = time.time() + 120
    while not condition():
        assert process.is_alive() and time.time() < limit
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def test_a_run_that_was_killed_three_times_equals_an_uninterrupted_one(script, argv, whole, tmp_path):
    """All files, bit for bit. After each kill all checkpoints load; no process is left over."""
    seed = random.randrange(10**6)
    inside, problems = kill_check.survives(script, argv, whole, tmp_path / "run", 3, random.Random(seed))
    assert not problems, f"seed {seed}: {problems}"
    assert inside, f"seed {seed}: no kill during the write of a checkpoint"


class Killed(BaseException):
    """Not an Exception, so that nothing handles it."""


@pytest.mark.parametrize("save, moment", [
    ("first", "last.pt half written"), ("first", "last.pt not renamed"), ("final", "last.pt half written"),
    ("final", "nothing renamed"), ("final", "last.pt not renamed"),
])
def test_a_kill_at_a_rare_moment(save, moment, script, argv, whole, stopped, tmp_path, monkeypatch):
    """last.pt is then the old one, no file is older, and a resumed run ends with the files of an uninterrupted one."""
    out, argv = tmp_path / "run", argv + NO_WORKERS
    if save == "final":
        shutil.copytree(stopped, out)
        argv = argv + NO_SAVES
    before, write, rename = contents(out), torch.save, os.replace

    def half_written(content, file):
        if moment == "last.pt half written" and file.name == f"{out}/last.pt.tmp":
            file.write(b"half")
            file.flush()
            raise Killed
        write(content, file)

    def not_renamed(source, target):
        if moment == "nothing renamed" and source.endswith(".pt.tmp") or moment == f"{target.name} not renamed":
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", half_written)
        patch.setattr(os, "replace", not_renamed)
        train(script, argv, out)
    torch.serialization.set_crc32_options(True)  # it would be the default in a new process
    assert not kill_check.damage(script, out)
    after = contents(out)
    assert after.get("last.pt") == before.get("last.pt")
    assert (after == before) == (moment != "last.pt not renamed")
    train(script, argv, out, *NO_SAVES)
    assert not differences(out, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_signals_to_the_process_group_do_not_end_the_loader(script, argv, tmp_path):
    """Ctrl-C, then SIGTERM, as from torchrun, to the run and its loader processes, which the last step needs."""
    out = tmp_path / "run"
    process, gone = start(script, argv + [*NO_SAVES, "--epochs", 999], out)
    wait_until(lambda: logged(out) > 3, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    process.join(120)
    assert process.exitcode in (130, 143) and gone.poll(30), terminal(out)[-2000:]  # 130: SIGTERM came too late
    assert f"stopped and saved at step {read(out / 'last.pt')['step']}; running the same command again" in terminal(out)


def test_if_a_rank_is_killed_the_other_exits_too(script, argv, tmp_path):
    """With an error and without leftover loader processes; the last checkpoint loads."""
    out, torchrun = tmp_path / "run", dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [start(script, argv + ["--epochs", 999], out, RANK=rank, LOCAL_RANK=rank, **torchrun) for rank in "01"]
    (first, _), (second, _) = ranks
    wait_until(lambda: logged(out) >= 3, first)
    second.kill()
    first.join(60)
    assert first.exitcode == 1, terminal(out)[-2000:]
    assert all(gone.poll(30) for _, gone in ranks)
    assert read(out / "last.pt")["step"] >= 2 and not kill_check.damage(script, out)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_which_settings_must_match_on_resume(script, argv, begun, tmp_path, monkeypatch, capsys):
    """All but MAY_DIFFER, and the number of images and the classes. The error names them. It comes, as does the message
    that the run is finished, before a model is built or statistics are measured."""
    module, before, result = SCRIPTS[script], contents(begun), f"{begun}/{RESULT[script]}"
    monkeypatch.setattr(module, "Encoder", None)  # building one raises TypeError
    same = vars(module.parse_args(argv)[1])
    others = dict(ema=0.5, layers=[0, 1], betas=[0.5, 0.9], model=list(module.SIZES)[0], precision="bf16", compile="on",
                  device="cpu", decay_end=20, out=begun, data=make_images(tmp_path / "moved", 20, classes="ab"))
    for name in module.RECIPE | module.RUN:
        flag, value = f"--{name.replace('_', '-')}", same[name]
        other = others.get(name, 2 * value or 1 if isinstance(value, (int, float)) else "other")
        words = [flag] if value is False else [flag, *map(str, other if isinstance(other, list) else [other])]
        if name in MAY_DIFFER:
            with pytest.raises(TypeError, match="NoneType"):
                train(script, argv, begun, *words)
            continue
        message = refused(capsys, script, argv, begun, *words).replace("(", "; ")
        assert f"{begun} contains a run with other settings ; " in message and f"; {name} {value}, now " in message
        assert f"choose another --out, and --init {result} to start from its weights" in message
    for count, classes, reason in ((18, "ab", "images 20, now 18"), (20, "ac", "classes ['a', 'b'], now ['a', 'c']")):
        data = make_images(tmp_path / reason, count, classes=classes)
        assert f"({reason})" in refused(capsys, script, argv, begun, "--data", data)
    train(script, argv, begun, "--epochs", (STEPS - 3) * kill_check.BATCH[script] / kill_check.IMAGES)
    assert f"finished: {result} has all {STEPS - 3} steps; raise --epochs to train longer" in capsys.readouterr().out
    assert contents(begun) == before


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_leaves_the_old_checkpoint(script, argv, whole, begun):
    """The error keeps its traceback. With space on the disk, the same command resumes."""
    before, argv = contents(begun), argv + NO_WORKERS
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = (begun / RESULT[script]).stat().st_size + 2**20  # it fits, last.pt does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))  # the largest size of a file
    try:
        with pytest.raises((OSError, RuntimeError)):
            train(script, argv, begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(begun) == before
    train(script, argv, begun)
    assert not differences(begun, whole)


def test_training_ends_if_no_image_can_be_read(script, argv, tmp_path, monkeypatch, capfd):
    """All files are removed at the fourth step, as if a disk failed."""
    data = shutil.copytree(argv[argv.index("--data") + 1], tmp_path / "data")
    at_step(monkeypatch, 3, lambda: [path.unlink() for path in data.glob("*/*")])
    with pytest.raises(SystemExit, match="^2$"):
        train(script, argv, tmp_path / "run", "--data", data, *NO_SAVES, *NO_WORKERS)
    assert f"error: 100 images in a row could not be read, the last one {data}/" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite

TWO = """
import copy, os, sys, warnings
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import conftest, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
warnings.simplefilter("error", FutureWarning)
warnings.simplefilter("error", DeprecationWarning)
import train_decoder, train_dit

def patch(module, name, call, pick):  # NaN in this call on rank 1
    function, calls = getattr(module, name), []
    def patched(*inputs):
        calls.append(1)
        result = function(*inputs)
        if os.environ["RANK"] == "1" and len(calls) - 1 == call:
            pick(result).fill_(float("nan"))
        return result
    setattr(module, name, patched)

train_decoder.DINO.update(conftest.TINY_DINO)
DistributedDataParallel._sync_buffers = None  # broadcasting would fail
patch(train_decoder, "step_randomness", 6, lambda numbers: numbers[0])  # the noise
patch(train_dit, "step_randomness", 6, lambda numbers: numbers[1])
patch(train_decoder, "quantize", 5, lambda images: images)  # the discriminator starts at step 2
for module, port, argv in zip((train_decoder, train_dit), {ports!r}, {argvs!r}):
    os.environ["MASTER_PORT"] = port
    saved, save = {{}}, module.save_checkpoint
    def save_checkpoint(files):
        content = list(files.values())[-1]
        saved[content["step"]] = copy.deepcopy(content)
        save(files)
    module.save_checkpoint = save_checkpoint
    module.main(argv)
    assert not dist.is_initialized()
    torch.save(saved, Path({out!r}) / f"{{module.__name__}}-{{os.environ['RANK']}}.pt")
"""


def learned(last, part):
    """Weights, EMA and AdamW's moments, without the vectors of the spectral norms, which change in every forward."""
    if part == "model":
        return dict(model=last["model"], ema=last["ema"], moments=last["optimizer"]["state"])
    heads = {key: value for key, value in last["discriminator"].items() if not key.endswith(("._u", "._v"))}
    return dict(heads=heads, moments=last["disc_optimizer"]["state"])


def test_a_step_with_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(flags, tmp_path):
    """The models' at step 6, the discriminator's at step 7, with one line for each; no other step is skipped. Also: no
    broadcast of buffers, no process group after main(), no deprecation warnings."""
    argvs = [[*flags[script], *NO_WORKERS, "--out", str(tmp_path / script)] for script in SCRIPTS]
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT), out=str(tmp_path), argvs=argvs,
                                                ports=[free_port() for _ in argvs]))
    printed, other = finish(*start_ranks(tmp_path / "two.py"))
    lines = [line for line in printed.splitlines() if "not finite" in line]
    model = "step 6: skipped, its gradient is not finite"
    assert lines == [model, "step 7: the discriminator's step is skipped, its gradient is not finite", model]
    assert "not finite" not in other
    for script, parts in (("train_decoder", ["model", "discriminator"]), ("train_dit", ["model"])):
        saved = read(tmp_path / f"{script}-0.pt")
        assert not read(tmp_path / f"{script}-1.pt"), "rank 0 alone saves"
        for part in parts:
            for step in range(4, STEPS):
                before, after = flat(learned(saved[step], part)), flat(learned(saved[step + 1], part))
                changed = {key.split("/")[1] for key in after if not torch.equal(after[key], before[key])}
                skipped = (step, part) in [(6, "model"), (7, "discriminator")]
                assert changed == (set() if skipped else set(learned(saved[step], part)))
        assert all(value.isfinite().all() for value in flat(saved[STEPS]).values() if torch.is_tensor(value))
        log = rows(tmp_path / script)
        loss, norm = ("loss", "grad_norm") if script == "train_dit" else ("disc", "disc_norm")
        bad = 6 if script == "train_dit" else 7  # at 6 the losses of rank 0 are finite
        assert [step for step, row in enumerate(log) if not row[norm]] == ([bad] if bad == 6 else [0, 1, bad])
        assert all(row[loss] for row in log[2:]) and "nan" not in str(log)
