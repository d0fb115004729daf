"""What a shared machine does to a run: kills, signals, full disks, broken images, dead processes, two runs at once.

Through the real scripts, both stages with the settings of kill_check.py: the same tests say what both promise.
"""

import csv
import functools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import kill_check
import numpy as np
import pytest
import torch
from conftest import ROOT
from kill_check import differences, logged, start, terminal
from PIL import Image

import dit
import encoder as encoders
import fid
import sample
import train_decoder
import train_dit

SCRIPTS = {"train_decoder": train_decoder, "train_dit": train_dit}
RESULT = {"train_decoder": "decoder.pt", "train_dit": "dit.pt"}
STEPS = 13
RESUMES = "he same command resumes"

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
            at_step(patch, script, STEPS - 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train(script, flags[script], out)["step"] == STEPS - 3
        return out

    def copy(script, out):
        shutil.copytree(stopped(script), out)
        return torch.load(out / "last.pt", weights_only=True)

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
    return torch.load(out / "last.pt", weights_only=True)


def ended(capsys, code, script, argv, out, *more):
    """The one line with which the script ends, and its exit code checked."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train(script, argv, out, *more)
    end_children()
    message = exit.value.code
    if not isinstance(message, str):  # a string is printed at the end of the process, whose exit code is then 1
        assert message == code
        message = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert (code == 1) == isinstance(exit.value.code, str)
    assert "\n" not in message
    return message


def end_children():
    """As at the end of a process; the loader of a failed run, which its traceback keeps, would wait for them later."""
    for process in multiprocessing.active_children():
        process.terminate()


def at_step(monkeypatch, script, step, action):
    """Call action() once the step is done, before it is logged and saved. A signal then stops the step after."""

    class Bar(SCRIPTS[script].tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                action()

    monkeypatch.setattr(SCRIPTS[script], "tqdm", Bar)


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.pt")}


def rows(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def wait_for(condition, process):
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
@pytest.mark.parametrize(
    "save, moment",
    [("first", "last.pt half written"), ("first", "last.pt not moved"), ("final", "last.pt half written"),
     ("final", "nothing moved"), ("final", "last.pt not moved"), ("final", "log.csv not moved")],
)  # fmt: skip
def test_killed_at_a_moment_that_is_rarely_met(save, moment, script, flags, whole, begun, tmp_path, monkeypatch):
    """Then last.pt is the old one, no file is behind it, and the same command ends with the undisturbed run's files."""
    out, argv = tmp_path / "run", [*flags[script], "--workers", "0"]
    if save == "final":
        begun(script, out)
        argv += ["--save-every", "99"]
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
    assert not kill_check.damage(script, out)
    after = contents(out)
    assert after.get("last.pt") == before.get("last.pt")
    assert (after == before) == (moment != "last.pt not moved")
    train(script, argv, out)
    assert not differences(out, whole(script))


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@both_stages
def test_a_signal_saves_and_the_same_command_resumes(script, flags, whole, tmp_path, monkeypatch, capsys):
    """SIGTERM; then Ctrl-C twice, to the whole process group, loader processes included; then on to the end."""
    out, argv = tmp_path / "run", [*flags[script], "--save-every", "99"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, script, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(script, argv, out)["step"] == 3
    assert f"stopped and saved at step 3; t{RESUMES}\n" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    process, gone = start(script, argv, out)
    wait_for(lambda: logged(out) > 3, process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    process.join(120)
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert process.exitcode == 0 and 3 < step < STEPS and gone.poll(30)
    assert f"stopped and saved at step {step}; t{RESUMES}\n" in terminal(out)

    train(script, argv, out)
    assert f"steps {step} to {STEPS}" in capsys.readouterr().out
    assert not differences(out, whole(script))
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    train(script, argv, out)
    assert f"finished: {out}/{RESULT[script]} has its" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_loader_processes_outlive_signals_but_their_trainer_s():
    images = encoders.Images(encoders.Shapes(12, 16), lambda image, rng: image)
    loader = iter(encoders.make_loader(images, [[(i, i)] for i in range(12)], 1, "cpu"))
    batches = [next(loader)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as the cluster's manager would
    batches += loader  # more than it had prepared
    assert [batch[2].item() for batch in batches] == list(range(12))

    loader = iter(encoders.make_loader(images, [[(i, i)] for i in range(12)], 1, "cpu"))
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)  # as Python does at its end
    worker.join(10)
    assert worker.exitcode == 0


KILLED = """
import os, sys
import {script}

class Bar({script}.tqdm):
    steps = 0
    def update(self, n=1):
        self.steps += 1
        if self.steps == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)

{script}.tqdm = Bar
print("pid", os.getpid(), flush=True)
{script}.main()
"""


def test_one_rank_dies_and_the_other_ends_too(flags, tmp_path):
    """Under torchrun, at step 3, before it is logged; the checkpoint of step 2 stays, and one process goes on."""
    script, out = "train_dit", tmp_path / "run"
    (tmp_path / "killed.py").write_text(KILLED.format(script=script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "killed.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, *flags[script], "--out", out], env=env, capture_output=True, text=True, timeout=150)
    assert run.returncode != 0 and "-9" in run.stderr
    for line in run.stdout.splitlines():
        if line.startswith("pid "):
            with pytest.raises(ProcessLookupError):
                os.kill(int(line.split()[1]), 0)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2 and not kill_check.damage(script, out)
    assert train(script, flags[script], out)["step"] == STEPS


# ---------------------------------------------------------------------------------------------------------------------
# The disk, the folder


@pytest.fixture
def largest_file():
    """largest_file(n): from now on the kernel lets no file grow beyond n bytes, as on a full disk; None: it does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@both_stages
def test_a_full_disk_leaves_the_old_checkpoint(script, flags, whole, begun, tmp_path, capsys, largest_file):
    out = tmp_path / "run"
    begun(script, out)
    before = contents(out)
    largest_file((out / RESULT[script]).stat().st_size + 2**20)  # which has room, last.pt has not
    message = ended(capsys, 1, script, flags[script], out)
    largest_file(None)
    assert message.startswith("cannot write ") and str(out) in message and "untouched" in message
    assert "File too large" in message and "make room" in message
    assert contents(out) == before and not list(out.glob("*.tmp"))
    train(script, flags[script], out)
    assert not differences(out, whole(script))


@both_stages
def test_a_disk_too_full_for_the_log(script, flags, whole, begun, tmp_path, capsys, largest_file):
    out = tmp_path / "run"
    begun(script, out)
    largest_file((out / "log.csv").stat().st_size + 10)
    message = ended(capsys, 1, script, flags[script], out, "--workers", 0)
    largest_file(None)
    assert "File too large" in message and RESUMES in message
    train(script, flags[script], out)
    assert not differences(out, whole(script))


@both_stages
def test_a_truncated_checkpoint_is_named_and_a_copy_put_back_serves(script, flags, whole, begun, tmp_path, capsys):
    out = tmp_path / "run"
    begun(script, out)
    content = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(content[: len(content) // 2])
    message = ended(capsys, 2, script, flags[script], out)
    assert f"{out}/last.pt is no checkpoint of this script, or damaged" in message and "put back a copy" in message
    (out / "last.pt").write_bytes(content)
    train(script, flags[script], out)
    assert not differences(out, whole(script))


@both_stages
def test_a_second_run_into_a_folder_is_refused(script, flags, whole, begun, tmp_path, monkeypatch):
    """And leaves the first one alone; `kill_check` shows that a killed run frees its folder at once."""
    out, second = tmp_path / "run", []
    begun(script, out)

    def start_another():
        process, _ = start(script, flags[script], out)
        process.join(120)
        second.append(process.exitcode)

    at_step(monkeypatch, script, STEPS - 1, start_another)
    train(script, flags[script], out)
    assert second == [2] and f"error: another run is writing to {out}: wait" in terminal(out)
    assert terminal(out).count("\n") == 1 and not differences(out, whole(script))


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


def write(path, size=(40, 40), color=(200, 30, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def break_image(path, how):
    if how == "truncated":
        Image.effect_noise((40, 40), 90).save(path)
        path.write_bytes(path.read_bytes()[:700])
    elif how == "vanished":
        path.unlink()
    else:
        path.write_bytes(dict(empty=b"", text=b"not an image")[how])


@both_stages
def test_broken_images_are_replaced_counted_and_named(script, flags, tmp_path, monkeypatch, capsys):
    """Each file has a colour: so every image of every batch is predicted, from the keys. One vanishes on the way.

    What stands in comes with its own label; the key of the place draws it, and once more where it is broken itself.
    """
    count, batch, steps, seen = 12, kill_check.BATCH[script], 6, []
    paths = [tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png" for i in range(count)]
    for i, path in enumerate(paths):
        write(path, color=(20 * i, 100, 50))
    listed = sorted(range(count), key=lambda i: (i % 2, i))  # as the folder is read: class by class
    broken = {2: "truncated", 5: "empty", 8: "text"}
    for i, how in broken.items():
        break_image(paths[i], how)
    torch.save({"mean": None, "var": torch.ones(128, 4, 4)}, tmp_path / "stat.pt")

    def watched(*arguments, make_loader=encoders.make_loader):
        for delivered in make_loader(*arguments):
            seen.append(delivered)
            yield delivered

    monkeypatch.setattr(encoders, "make_loader", watched)
    at_step(monkeypatch, script, 3, lambda: break_image(paths[7], "vanished"))
    more = ["--data", tmp_path / "data", "--workers", 0, "--epochs", steps * batch / count, "--preview-every", 0]
    more += ["--stats", tmp_path / "stat.pt"] if script == "train_dit" else []
    last = train(script, flags[script], tmp_path / "run", *more)

    complaints, total = [], 0
    assert len(seen) == steps == last["step"]
    for step, (pixels, labels, keys, replaced) in enumerate(seen):
        side = 32 if script == "train_dit" else 16
        assert pixels.shape == (batch, 3, side, side)
        for i in range(batch):
            epoch, place = divmod(step * batch + i, count)
            index, key = int(encoders.epoch_order(count, 0, epoch)[place]), encoders.random_key(0, epoch, place)
            rng, before = np.random.default_rng(key), total
            while listed[index] in broken or listed[index] == 7 and step >= 3:
                complaints.append(str(paths[listed[index]]))
                index, total = int(rng.integers(count)), total + 1
            assert (pixels[i, 0] == 20 * listed[index]).all() and labels[i] == listed[index] % 2 and keys[i] == key
            assert replaced[i] == total - before
    assert total > 6 and last["replaced"] == int(rows(tmp_path / "run")[-1]["replaced"]) == total
    named = [line for line in capsys.readouterr().err.splitlines() if "unreadable image replaced by another: " in line]
    assert [line.partition("another: ")[2].partition(" (")[0] for line in named] == complaints
    assert str(paths[7]) in complaints


@pytest.fixture
def damaged(tmp_path):
    """Six images, the third of which is cut off and the fifth of which is text."""
    for i in range(6):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", color=(40 * i, 0, 0))
    break_image(tmp_path / "a" / "2.png", "truncated")
    break_image(tmp_path / "a" / "4.png", "text")
    return encoders.ImageFolder(tmp_path)


def crop(image, rng):
    return encoders.center_crop(image, 8)


def test_any_other_image_may_stand_in_for_a_broken_one(damaged):
    images = encoders.Images(damaged, crop)
    assert [os.path.basename(os.fsdecode(path)) for path in damaged.paths] == [f"{i}.png" for i in (0, 2, 4, 1, 3, 5)]
    good, label, key, replaced = images[3, 77]
    assert (good.dtype, tuple(good.shape), label, key, replaced) == (torch.uint8, (3, 8, 8), 1, 77, 0)
    for index in (1, 2):
        seen = set()
        for key in range(60):
            image, label, _, replaced = images[index, key]
            assert torch.equal(image, images[index, key][0]), "the same key, the same replacement"
            red = int(image[0, 0, 0])
            assert replaced >= 1 and label == red // 40 % 2, "the label is that of the image that stands in"
            seen.add(red)
        assert seen == {0, 40, 120, 200}


def test_broken_images_are_an_error_in_evaluation(damaged):
    images = encoders.Images(damaged, crop, strict=True)
    for index, name in ((1, "2.png"), (2, "4.png")):
        with pytest.raises(ValueError, match=name) as error:
            images[index, 0]
        assert "\n" not in str(error.value)
    images[0, 0]


EVALUATIONS = {
    "sample": (sample, ["--reconstruct", "IMAGES", "--decoder", "DECODER", "--out", "out.npz"]),
    "fid": (fid, ["IMAGES", "--save-stats", "out.npz", "--features", "random-tiny", "--size", "16"]),
}


def refused_evaluation(script, whole, images, workers, capsys):
    """The last line on stderr."""
    module, argv = EVALUATIONS[script]
    paths = {"IMAGES": str(images), "DECODER": str(whole("train_decoder") / "decoder.pt")}
    with pytest.raises(SystemExit, match="2"):
        module.main([paths.get(flag, flag) for flag in argv]
                    + ["--batch", "1", "--workers", str(workers), "--device", "cpu"])  # fmt: skip
    end_children()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "vanished"])
@pytest.mark.parametrize("script", EVALUATIONS)
def test_an_evaluation_ends_with_the_broken_image_s_path(script, how, workers, whole, tmp_path, monkeypatch, capsys):
    """Nothing is written. The image vanishes after the folder has been read."""
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png")

    def listed(root, find_images=encoders.find_images):
        found = find_images(root)
        break_image(tmp_path / "in" / "1.png", how)
        return found

    monkeypatch.setattr(encoders, "find_images", listed)
    line = refused_evaluation(script, whole, tmp_path / "in", workers, capsys)
    assert f"error: cannot read {tmp_path}/in/1.png (" in line and line.endswith(": repair or remove it")
    assert not (tmp_path / "out.npz").exists()


@both_stages
@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_where_nothing_can_be_read(script, workers, flags, tmp_path, capsys):
    """A hundred images of one key in a row: the disk is gone, not a file."""
    for i in range(2):
        write(tmp_path / "data" / f"{i}.png")
        break_image(tmp_path / "data" / f"{i}.png", "text")
    more = ["--data", tmp_path / "data", "--workers", workers, "--preview-every", 0]
    message = ended(capsys, 1, script, flags[script], tmp_path / "run", *more)
    assert f"100 images in a row could not be read, the last one {tmp_path}/data/" in message
    assert RESUMES in message


# ---------------------------------------------------------------------------------------------------------------------
# Loader processes that die, gradients that are not finite


@pytest.mark.parametrize("script", EVALUATIONS)
def test_a_dead_loader_process_ends_an_evaluation_with_its_cause(script, whole, tmp_path, monkeypatch, capsys):
    write(tmp_path / "in" / "1.png"), write(tmp_path / "in" / "2.png")
    monkeypatch.setattr(encoders, "open_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    line = refused_evaluation(script, whole, tmp_path / "in", 1, capsys)
    assert "error: DataLoader worker (pid " in line and "is killed by signal: Killed." in line


@both_stages
@pytest.mark.parametrize("moment", ["in a step", "in a save"])
def test_a_dead_loader_process_is_named_with_its_cause(moment, script, flags, whole, begun, tmp_path, monkeypatch,
                                                       capsys):  # fmt: skip
    """Killed as the system does where memory is short; a save is where it is shortest, and must not blame the disk."""
    out = tmp_path / "run"
    begun(script, out)

    def kill_one():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(5)  # which the signal of its death ends

    with monkeypatch.context() as patch:
        if moment == "in a step":
            at_step(patch, script, STEPS - 2, kill_one)
        else:
            patch.setattr(torch, "save", lambda *_: kill_one())
        message = ended(capsys, 1, script, flags[script], out)
    assert "DataLoader worker (pid " in message and "is killed by signal: Killed." in message
    assert RESUMES in message and "fewer --workers" in message and "cannot write" not in message
    train(script, flags[script], out)
    assert not differences(out, whole(script))


PARTS = {"decoder": (train_decoder, "draw"), "discriminator": (train_decoder, "quantize"),
         "dit": (dit, "flow_matching_loss")}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_gradients_that_are_not_finite_never_reach_the_weights(part, flags, begun, tmp_path, monkeypatch, capsys):
    """Of two steps of three; then of all until training gives up, with the weights from before."""
    owner, name = PARTS[part]
    script, optimizer = ("train_dit" if part == "dit" else "train_decoder",
                         "disc_optimizer" if part == "discriminator" else "optimizer")  # fmt: skip
    good = begun(script, tmp_path / "some")
    bad, calls, works = (0, 1), [], getattr(owner, name)

    def fails(*inputs):
        calls.append(1)
        result = works(*inputs)
        if bad and len(calls) - 1 not in bad:
            return result
        return (result[0] * math.nan, result[1]) if part == "decoder" else result * math.nan

    argv = [*flags[script], "--workers", "0"]
    monkeypatch.setattr(owner, name, fails)
    last = train(script, argv, tmp_path / "some")
    assert (last["step"], last["skipped"]) == (STEPS, 2)
    assert [int(row["skipped"]) for row in rows(tmp_path / "some")[-4:]] == [0, 1, 2, 2]
    steps = {key: int(last[key]["state"][0]["step"]) for key in ("optimizer", "disc_optimizer") if key in last}
    expected = dict(optimizer=STEPS, disc_optimizer=STEPS - 2)  # the discriminator begins at step 2
    assert steps == {key: expected[key] - 2 * (key == optimizer) for key in steps}
    assert all(value.isfinite().all() for value in kill_check.leaves(last).values() if torch.is_tensor(value))
    if part == "dit":  # the log averages over the steps that count
        some = rows(tmp_path / "some")
        assert [row["loss"] for row in some[-3:-1]] == [row["grad_norm"] for row in some[-3:-1]] == ["nan", "nan"]
        begun(script, tmp_path / "averaged")
        calls.clear()
        train(script, argv, tmp_path / "averaged", "--log-every", 99)
        assert rows(tmp_path / "averaged")[-1]["loss"] == some[-1]["loss"] != "nan"

    bad, all_out = (), tmp_path / "all"
    begun(script, all_out)
    message = ended(capsys, 1 if part == "dit" else 2, script, argv, all_out, "--epochs", 99, "--save-every", 99)
    assert f"stopped at step {STEPS - 3 + 20}: the gradient was not finite 20 times in a row" in message
    last = torch.load(all_out / "last.pt", weights_only=True)
    assert (last["step"], last["skipped"]) == (STEPS - 3 + 20, 20)
    kept = ["model", "ema"] if part == "dit" else ["model"] if part == "decoder" else []
    for key in kept:
        assert all(torch.equal(value, good[key][name]) for name, value in last[key].items())
    a, b = (kill_check.leaves(content[optimizer]["state"]) for content in (last, good))
    assert a.keys() == b.keys() and all(kill_check.same(a[key], b[key]) for key in a)
    assert all(value.isfinite().all() for value in kill_check.leaves(last).values() if torch.is_tensor(value))
    monkeypatch.setattr(owner, name, works)
    more = ["--epochs", (last["step"] + 1) * kill_check.BATCH[script] / kill_check.IMAGES]
    resumed = train(script, argv, all_out, *more)
    assert (resumed["step"], resumed["skipped"]) == (last["step"] + 1, 20)
