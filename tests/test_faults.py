"""What a shared machine does to a run: kills, signals, full disks, unreadable files, dead processes, bad gradients.

Through the real scripts, both stages with the settings of kill_check.py: the same tests say what both promise.
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
STEPS = 9  # a decoder's epoch has 5 of them, a diffusion model's 2.5
NO_SAVES = ["--save-every", "99"]  # but the last
NO_WORKERS = ["--workers", "0"]
FREE = {f"--{name}" for name in (  # what a resumed run may have otherwise
    "epochs lr lr-end data encoder-weights init stats stats-images out decoder micro-batch checkpointing precision "
    "compile device workers log-every preview-every save-every keep-every vgg-weights lpips-weights "
    "dino-weights").split()}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: arguments}, with a checkpoint in every step."""
    return kill_check.prepare(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def argv(script, flags):
    return flags[script]


@pytest.fixture(scope="module")
def whole(script, argv, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / script
    train(script, argv, out)
    return out


@pytest.fixture(scope="module")
def stopped(script, argv, tmp_path_factory):
    """The folder of a run that a SIGTERM has stopped three steps before its end."""
    out = tmp_path_factory.mktemp("stopped") / script
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, STEPS - 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(script, argv + NO_SAVES, out)["step"] == STEPS - 3
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    """A folder of a test's own, into which such a run went."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run of the demo is found
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: pytest.fail(f"nothing handles {number}"))
    yield
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def train(script, argv, out, *more):
    """Run the script in this process; returns last.pt."""
    SCRIPTS[script].main([*argv, "--out", str(out), *map(str, more)])
    return read(out / "last.pt")


def refused(capsys, script, argv, out, *more):
    """The line by which the script ends with 2, behind the usage's."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
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


def test_killed_three_times_and_resumed_equals_undisturbed(script, argv, whole, tmp_path):
    """Bit for bit, every file; each checkpoint loads after each kill; no process stays behind."""
    seed = random.randrange(10**6)
    inside, problems = kill_check.survives(script, argv, whole, tmp_path / "run", 3, random.Random(seed))
    assert not problems, f"seed {seed}: {problems}"
    assert inside, f"seed {seed}: no kill fell into the write of a checkpoint"


class Killed(BaseException):
    """Nothing runs after a kill, so the simulated one is no Exception."""


@pytest.mark.parametrize("save, moment", [
    ("first", "last.pt half written"), ("first", "last.pt not moved"), ("final", "last.pt half written"),
    ("final", "nothing moved"), ("final", "last.pt not moved"),
])
def test_killed_at_a_moment_that_is_rarely_met(save, moment, script, argv, whole, stopped, tmp_path, monkeypatch):
    """Then last.pt is the old one, no file is behind it, and the same command ends with the undisturbed run's files."""
    out, argv = tmp_path / "run", argv + NO_WORKERS
    if save == "final":
        shutil.copytree(stopped, out)
        argv = argv + NO_SAVES
    before, write, move = contents(out), torch.save, os.replace

    def half_written(content, file):
        if moment == "last.pt half written" and file.name == f"{out}/last.pt.tmp":
            file.write(b"half")
            file.flush()
            raise Killed
        write(content, file)

    def not_moved(source, target):
        if moment == "nothing moved" and source.endswith(".pt.tmp") or moment == f"{target.name} not moved":
            raise Killed
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", half_written)
        patch.setattr(os, "replace", not_moved)
        train(script, argv, out)
    torch.serialization.set_crc32_options(True)  # a kill leaves no process whose options stay
    assert not kill_check.damage(script, out)
    after = contents(out)
    assert after.get("last.pt") == before.get("last.pt")
    assert (after == before) == (moment != "last.pt not moved")
    train(script, argv, out, *NO_SAVES)
    assert not differences(out, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_signals_to_the_process_group_spare_the_loader(script, argv, tmp_path):
    """Ctrl-C, then SIGTERM, as from torchrun, to the run and its loader processes, which the last step still needs."""
    out = tmp_path / "run"
    process, gone = start(script, argv + [*NO_SAVES, "--epochs", 999], out)
    wait_until(lambda: logged(out) > 3, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    process.join(120)
    assert process.exitcode == 0 and gone.poll(30), terminal(out)[-2000:]
    assert f"stopped and saved at step {read(out / 'last.pt')['step']}; the same command resumes\n" in terminal(out)


def test_one_rank_dies_and_the_other_ends_too(script, argv, tmp_path):
    """With an error, its loader's processes with it, and the last checkpoint is whole."""
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


def test_what_a_resumed_run_may_have_otherwise(script, argv, begun, tmp_path, monkeypatch, capsys):
    """What is FREE, if the images are as many and of the same classes. All else is refused by name;
    that, and that a run is finished, is said before a model is built or statistics are measured."""
    module, before, result = SCRIPTS[script], contents(begun), f"{begun}/{RESULT[script]}"
    monkeypatch.setattr(module, "Encoder", None)  # building one raises TypeError
    same = vars(module.parse_args(argv)[1])
    others = dict(ema=0.5, layers=[0, 1], betas=[0.5, 0.9], model=list(module.SIZES)[0], precision="bf16", compile="on",
                  device="cpu", decay_end=20, out=begun, data=make_images(tmp_path / "moved", 20, classes="ab"))
    for flag, *_ in module.RECIPE + module.RUN:
        name = flag.strip("-").replace("-", "_")
        value = same[name]
        other = others.get(name, 2 * value or 1 if isinstance(value, (int, float)) else "other")
        words = [flag] if value is False else [flag, *map(str, other if isinstance(other, list) else [other])]
        if flag in FREE:
            with pytest.raises(TypeError, match="NoneType"):
                train(script, argv, begun, *words)
            continue
        message = refused(capsys, script, argv, begun, *words).replace("(", "; ")
        assert f"{begun} holds a run with other settings ; " in message and f"; {flag} {value}, now " in message
        assert f"choose another --out, and --init {result} to go on from its weights" in message
    for count, classes, said in ((18, "ab", "images 20, now 18"), (20, "ac", "classes ['a', 'b'], now ['a', 'c']")):
        data = make_images(tmp_path / said, count, classes=classes)
        assert f"({said})" in refused(capsys, script, argv, begun, "--data", data)
    train(script, argv, begun, "--epochs", (STEPS - 3) * kill_check.BATCH[script] / kill_check.IMAGES)
    assert f"finished: {result} has its {STEPS - 3} steps; a larger --epochs goes on" in capsys.readouterr().out
    assert contents(begun) == before


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_leaves_the_old_checkpoint(script, argv, whole, begun):
    """And the traceback; with room on the disk the same command goes on."""
    before, argv = contents(begun), argv + NO_WORKERS
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = (begun / RESULT[script]).stat().st_size + 2**20  # it has room, last.pt has not
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))  # the kernel lets no file grow beyond it
    try:
        with pytest.raises((OSError, RuntimeError)):
            train(script, argv, begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(begun) == before
    train(script, argv, begun)
    assert not differences(begun, whole)


def test_training_ends_where_nothing_can_be_read(script, argv, tmp_path, monkeypatch, capfd):
    """The files vanish at the fourth step, as with a disk that goes away: a hundred images in a row fail."""
    data = shutil.copytree(argv[argv.index("--data") + 1], tmp_path / "data")
    at_step(monkeypatch, 3, lambda: [path.unlink() for path in data.glob("*/*")])
    with pytest.raises(SystemExit, match="2"):
        train(script, argv, tmp_path / "run", "--data", data, *NO_SAVES, *NO_WORKERS)
    assert f"error: 100 images in a row could not be read, the last one {data}/" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


TWO = """
import copy, os, sys, warnings
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import conftest, train_decoder, train_dit
from torch.nn.parallel import DistributedDataParallel

def spoil(module, name, bad, pick):  # NaN in rank 1's call `bad`
    works, calls = getattr(module, name), []
    def spoilt(*inputs):
        calls.append(1)
        result = works(*inputs)
        if os.environ["RANK"] == "1" and len(calls) - 1 == bad:
            pick(result).fill_(float("nan"))
        return result
    setattr(module, name, spoilt)

warnings.simplefilter("error", FutureWarning)
train_decoder.DINO.update(conftest.TINY_DINO)
DistributedDataParallel._sync_buffers = None  # which broadcasts them
spoil(train_decoder, "draw", 6, lambda drawn: drawn[0])  # the noise
spoil(train_dit, "draw", 6, lambda drawn: drawn[1])
spoil(train_decoder, "quantize", 5, lambda images: images)  # the discriminator begins at step 2
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
    """Weights, average and moments; in the heads the vectors of the spectral norms move with every forward."""
    if part == "model":
        return dict(model=last["model"], ema=last["ema"], moments=last["optimizer"]["state"])
    heads = {key: value for key, value in last["discriminator"].items() if not key.endswith(("._u", "._v"))}
    return dict(heads=heads, moments=last["disc_optimizer"]["state"])


def test_a_gradient_that_is_not_finite_in_one_process_is_left_out_in_all(flags, tmp_path):
    """The models' at step 6, the discriminator's at step 7: nothing else is left out, and one line says so. Also:
    nobody broadcasts buffers, main() leaves the group of processes, nothing warns of the future."""
    argvs = [[*flags[script], *NO_WORKERS, "--out", str(tmp_path / script)] for script in SCRIPTS]
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT), out=str(tmp_path), argvs=argvs,
                                                ports=[free_port() for _ in argvs]))
    printed, other = finish(*start_ranks(tmp_path / "two.py"))
    said = [line for line in printed.splitlines() if "not finite" in line]
    model = "step 6: the gradient is not finite; weights, moments and average stay as they are"
    assert said == [model, "step 7: the discriminator's gradient is not finite; it stays as it is", model]
    assert "not finite" not in other
    for script, parts in (("train_decoder", ["model", "discriminator"]), ("train_dit", ["model"])):
        saved = read(tmp_path / f"{script}-0.pt")
        assert not read(tmp_path / f"{script}-1.pt"), "rank 0 alone saves"
        for part in parts:
            for step in range(4, STEPS):
                before, after = flat(learned(saved[step], part)), flat(learned(saved[step + 1], part))
                moved = {key.split("/")[1] for key in after if not torch.equal(after[key], before[key])}
                left_out = (step, part) in [(6, "model"), (7, "discriminator")]
                assert moved == (set() if left_out else set(learned(saved[step], part)))
        assert all(value.isfinite().all() for value in flat(saved[STEPS]).values() if torch.is_tensor(value))
        log = rows(tmp_path / script)
        loss, norm = ("loss", "grad_norm") if script == "train_dit" else ("disc", "disc_norm")
        bad = 6 if script == "train_dit" else 7  # at 6 rank 0's own losses stay
        assert [step for step, row in enumerate(log) if not row[norm]] == ([bad] if bad == 6 else [0, 1, bad])
        assert all(row[loss] for row in log[2:]) and "nan" not in str(log)
