"""What a shared machine does to a run: kills, signals, full disks, unreadable files, dead processes, bad gradients.

Through the real scripts, both stages with the settings of kill_check.py: the same tests say what both promise.
"""

import functools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time

import kill_check
import pytest
import torch
from conftest import flat, read, rows
from kill_check import differences, logged, start, terminal

import encoder
import train_decoder
import train_dit

SCRIPTS = {"train_decoder": train_decoder, "train_dit": train_dit}
RESULT = {"train_decoder": "decoder.pt", "train_dit": "dit.pt"}
STEPS = 9  # a decoder's epoch has 5 of them, a diffusion model's 2.5
NO_SAVES = ["--save-every", "99"]  # but the last
NO_WORKERS = ["--workers", "0"]

both_stages = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: arguments}, with a checkpoint in every step."""
    return kill_check.prepare(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """script -> the folder of an undisturbed run."""

    @functools.cache
    def folder(script):
        out = tmp_path_factory.mktemp("whole") / script
        train(script, flags[script], out)
        return out

    return folder


@pytest.fixture(scope="module")
def begun(flags, tmp_path_factory):
    """(script, folder) -> a run into this folder that a SIGTERM has stopped three steps before its end; its last.pt."""

    @functools.cache
    def stopped(script):
        out = tmp_path_factory.mktemp("begun") / script
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, STEPS - 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train(script, flags[script] + NO_SAVES, out)["step"] == STEPS - 3
        return out

    def copy(script, out):
        shutil.copytree(stopped(script), out)
        return read(out / "last.pt")

    return copy


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run of the demo is found
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nothing handles SIGTERM"))
    yield
    signal.signal(signal.SIGTERM, before)


def train(script, argv, out, *more):
    """Run the script in this process; returns last.pt."""
    SCRIPTS[script].main([*argv, "--out", str(out), *map(str, more)])
    return read(out / "last.pt")


def end_children():
    """As at the end of a process; the loader of a failed run, which its traceback keeps, would wait for them later."""
    for process in multiprocessing.active_children():
        process.terminate()


def at_step(monkeypatch, step, action):
    """Call action() once the step is done, before it is logged and saved. A signal then stops the step after."""

    class Bar(encoder.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                action()

    monkeypatch.setattr(encoder, "tqdm", Bar)


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.pt")}


def wait_until(condition, process):
    limit = time.time() + 120
    while not condition():
        assert process.is_alive() and time.time() < limit
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


@both_stages
def test_killed_three_times_and_resumed_equals_undisturbed(script, flags, whole, tmp_path):
    """Bit for bit, every file; each checkpoint loads after each kill; no process stays behind."""
    seed, out = random.randrange(10**6), tmp_path / "run"
    inside, problems = kill_check.survives(script, flags[script], whole(script), out, 3, random.Random(seed))
    assert not problems, f"seed {seed}: {problems}"
    assert inside, f"seed {seed}: no kill fell into the write of a checkpoint"


class Killed(BaseException):
    """Nothing runs after a kill, so the simulated one is no Exception."""


@both_stages
@pytest.mark.parametrize("save, moment", [
    ("first", "last.pt half written"), ("first", "last.pt not moved"), ("final", "last.pt half written"),
    ("final", "nothing moved"), ("final", "last.pt not moved"), ("final", "log.csv not moved"),
])
def test_killed_at_a_moment_that_is_rarely_met(save, moment, script, flags, whole, begun, tmp_path, monkeypatch):
    """Then last.pt is the old one, no file is behind it, and the same command ends with the undisturbed run's files."""
    out, argv = tmp_path / "run", flags[script] + NO_WORKERS
    if save == "final":
        begun(script, out)
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
    assert not differences(out, whole(script))


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@both_stages
def test_a_signal_saves_and_the_same_command_resumes(script, flags, whole, tmp_path, monkeypatch, capsys):
    """SIGTERM; then Ctrl-C and SIGTERM, as from torchrun, to the process group with the loader; then to the end."""
    out, argv = tmp_path / "run", flags[script] + NO_SAVES
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(script, argv, out)["step"] == 3
    assert "stopped and saved at step 3; the same command resumes\n" in capsys.readouterr().out

    process, gone = start(script, argv + ["--epochs", 999], out)
    wait_until(lambda: logged(out) > 3, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    process.join(120)
    step = read(out / "last.pt")["step"]
    assert process.exitcode == 0 and step > 3 and gone.poll(30)
    assert f"stopped and saved at step {step}; the same command resumes\n" in terminal(out)
    assert terminal(out).count("\nstopping after this step; a second Ctrl-C stops at once") == 1

    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    epochs = step * kill_check.BATCH[script] / kill_check.IMAGES
    train(script, argv, out, "--epochs", epochs)
    assert f"finished: {out}/{RESULT[script]} has its {epochs:g} epochs" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@both_stages
def test_a_stopped_run_goes_on_to_the_files_of_an_undisturbed_one(script, flags, whole, begun, tmp_path, capsys):
    out = tmp_path / "run"
    begun(script, out)
    capsys.readouterr()
    train(script, flags[script], out)
    assert f"from step {STEPS - 3}\n" in capsys.readouterr().out
    assert not differences(out, whole(script))


def test_a_signal_to_the_process_group_spares_the_loader_s_processes():
    """Ctrl-C and torchrun's SIGTERM; Python's own SIGTERM at its end is for them."""

    def run(connection):
        os.setpgid(0, 0)
        images = encoder.Images(encoder.Shapes(12, 16), lambda image, rng: image)
        loader = iter(encoder.make_loader(images, [[(i, i)] for i in range(12)], 1, "cpu"))
        keys = [next(loader)[2].item()]
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer, which ends after its step
        os.killpg(0, signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        connection.send(keys + [batch[2].item() for batch in loader])  # more than it had prepared
        loader = iter(encoder.make_loader(images, [[(i, i)] for i in range(12)], 1, "cpu"))
        next(loader)
        (worker,) = multiprocessing.active_children()
        worker.terminate()
        worker.join(10)
        connection.send(worker.exitcode)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    assert ours.poll(60) and ours.recv() == list(range(12))
    assert ours.poll(60) and ours.recv() == 0
    process.join(10)


@both_stages
def test_one_rank_dies_and_the_other_ends_too(script, flags, tmp_path):
    """With an error, its loader's processes with it, and the last checkpoint is whole."""
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [start(script, flags[script] + ["--epochs", 999], out, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    (first, _), (second, _) = ranks
    wait_until(lambda: logged(out) >= 3, first)
    second.kill()
    first.join(60)
    assert first.exitcode == 1, terminal(out)[-2000:]
    assert all(gone.poll(30) for _, gone in ranks)
    assert read(out / "last.pt")["step"] >= 2 and not kill_check.damage(script, out)


# ---------------------------------------------------------------------------------------------------------------------
# The disk


@pytest.fixture
def largest_file():
    """largest_file(n): from now on the kernel lets no file grow beyond n bytes, as on a full disk; None: it does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@both_stages
def test_a_full_disk_leaves_the_old_checkpoint(script, flags, whole, begun, tmp_path, largest_file):
    """And the traceback; with room on the disk the same command goes on."""
    out = tmp_path / "run"
    begun(script, out)
    before = contents(out)
    largest_file((out / RESULT[script]).stat().st_size + 2**20)  # it has room, last.pt has not
    with pytest.raises((OSError, RuntimeError)):
        train(script, flags[script] + NO_WORKERS, out)
    largest_file(None)
    assert contents(out) == before
    train(script, flags[script] + NO_WORKERS, out)
    assert not differences(out, whole(script))


@both_stages
def test_a_truncated_checkpoint_is_named_in_one_line(script, flags, begun, tmp_path, capsys):
    out = tmp_path / "run"
    begun(script, out)
    content = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(script, flags[script], out)
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert f"error: {out}/last.pt is damaged, or no checkpoint of {script}.py (" in printed.err
    assert "put back a copy, or move the folder away" in printed.err


@both_stages
@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_in_one_line_where_nothing_can_be_read(script, workers, flags, tmp_path, monkeypatch, capsys):
    """The files vanish at the fourth step, as with a disk that goes away: a hundred images in a row fail."""
    data = tmp_path / "data"
    shutil.copytree(flags[script][flags[script].index("--data") + 1], data)
    at_step(monkeypatch, 3, lambda: [path.unlink() for path in data.glob("*/*")])
    with pytest.raises(SystemExit, match="2"):
        train(script, flags[script] + NO_SAVES, tmp_path / "run", "--data", data, "--workers", workers, "--epochs", 50)
    end_children()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"error: 100 images in a row could not be read, the last one {data}/" in line
    assert line.endswith(": check the data folder")


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


@pytest.mark.parametrize("part, script, name", [
    ("decoder", "train_decoder", "draw"), ("discriminator", "train_decoder", "quantize"),
    ("dit", "train_dit", "flow_matching_loss"),
])
def test_gradients_that_are_not_finite_never_reach_the_weights(part, script, name, flags, begun, tmp_path, monkeypatch,
                                                               capsys):
    """Of two steps of three; then of all, until training gives up with the weights from before."""
    good, works = begun(script, tmp_path / "some"), getattr(SCRIPTS[script], name)
    argv, calls, bad = flags[script] + NO_WORKERS, [], (0, 1)

    def fails(*inputs):
        calls.append(1)
        result = works(*inputs)
        if bad and len(calls) - 1 not in bad:
            return result
        return (result[0] * math.nan, result[1]) if part == "decoder" else result * math.nan

    monkeypatch.setattr(SCRIPTS[script], name, fails)
    last = train(script, argv, tmp_path / "some")
    some = rows(tmp_path / "some")
    assert (last["step"], last["skipped"]) == (STEPS, 2)
    assert [int(row["skipped"]) for row in some[-4:]] == [0, 1, 2, 2]
    optimizer = "disc_optimizer" if part == "discriminator" else "optimizer"
    steps = {key: int(last[key]["state"][0]["step"]) for key in ("optimizer", "disc_optimizer") if key in last}
    expected = dict(optimizer=STEPS, disc_optimizer=STEPS - 2)  # the discriminator begins at step 2
    assert steps == {key: expected[key] - 2 * (key == optimizer) for key in steps}
    assert all(value.isfinite().all() for value in flat(last).values() if torch.is_tensor(value))
    if part == "dit":  # the log averages over the steps that count
        assert [row["loss"] for row in some[-3:-1]] == [row["grad_norm"] for row in some[-3:-1]] == ["", ""]
        begun(script, tmp_path / "averaged")
        calls.clear()
        train(script, argv, tmp_path / "averaged", "--log-every", 99)
        assert rows(tmp_path / "averaged")[-1]["loss"] == some[-1]["loss"] != ""

    bad, out = (), tmp_path / "all"
    begun(script, out)
    with pytest.raises(SystemExit) as exit:
        train(script, argv, out, "--epochs", 99, *NO_SAVES)
    assert exit.value.code == (  # printed, with exit code 1
        f"stopped at step {STEPS - 3 + 20}: the gradient was not finite 20 times in a row; {out}/last.pt has the "
        "weights from before. Try another --precision or a smaller --lr")
    last = read(out / "last.pt")
    assert (last["step"], last["skipped"]) == (STEPS - 3 + 20, 20)
    kept = ["discriminator", "disc_optimizer"] if part == "discriminator" else ["model", "ema", "optimizer"]
    for key in kept:  # power iterations and learning rates go on
        a, b = ({name: value for name, value in flat(content[key]).items() if "parametrizations" not in name
                 or "original" in name} for content in (last, good))
        assert all(torch.equal(a[name], b[name]) for name in a if torch.is_tensor(a[name])) and a.keys() == b.keys()
    assert all(value.isfinite().all() for value in flat(last).values() if torch.is_tensor(value))

    monkeypatch.setattr(SCRIPTS[script], name, works)
    more = ["--epochs", (last["step"] + 1) * kill_check.BATCH[script] / kill_check.IMAGES]
    resumed = train(script, argv, out, *more)
    assert (resumed["step"], resumed["skipped"]) == (last["step"] + 1, 20)
