"""Resume training after SIGKILL: both stages at small scale, about two minutes, run by hand:

    python tests/kill_check.py [--kills 20] [--seed 0]

Each stage is trained without interruption, and again with kills at random moments, two of three of them while a
checkpoint is being written; after each kill the same command resumes. After each kill all checkpoints must load; at the
end all files must equal those of the uninterrupted run, bit for bit. Prints a line for each kill; exit code 1 if this
fails, or if no kill was during a write. tests/test_faults.py does the same with three kills.
"""

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder as decoders
import dit

if __name__ != "__mp_main__":  # not in the runs, which import this file too
    from conftest import TINY_DINO, flat, make_images, save_tiny_dino

TESTS = Path(__file__).resolve().parent
# Runs are forked from a process that has imported the scripts, which takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train_decoder", "train_dit"])
BATCH = {"train_decoder": 4, "train_dit": 8}
IMAGES = 20
TIMING = ("images_per_s", "/log_bytes")  # these differ: a column of log.csv, and its size


def prepare(folder, steps):
    """Make images of two classes and a small DINO -> {script: its arguments without --out} for a run of `steps` steps.

    A checkpoint and a row of the log at every step; two loader processes; latents of two layers; a discriminator from
    step 2 on.
    """
    make_images(folder / "images", IMAGES, classes="ab")
    save_tiny_dino(folder / "dino.pt")
    flags = {}
    for script, batch in BATCH.items():
        flags[script] = ["--preset", "demo", "--data", folder / "images", "--batch", batch, "--micro-batch", batch,
                         "--epochs", steps * batch / IMAGES, "--save-every", 1, "--log-every", 1, "--workers", 2,
                         "--layers", 0, 2, "--device", "cpu"]
    flags["train_decoder"] += ["--size", 16, "--gan", 0.75, "--disc-start", 0.4, "--gan-start", 0.8, "--dino-weights",
                               folder / "dino.pt", "--preview-every", 5]
    flags["train_dit"] += ["--stats-images", 16, "--keep-every", 5, "--preview-every", 0]
    return {script: [str(flag) for flag in argv] for script, argv in flags.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A run in another process


def script_main(script, argv, terminal, alive, environment, tiny_dino):
    """Run main() of a script, with its output in a file. It and its loader processes keep the connection `alive`."""
    os.setsid()  # a process group, as for a command in a shell
    os.environ.update(environment)
    with open(terminal, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # the platform's default, as for a command
    torch.set_num_threads(1)
    importlib.import_module("train_decoder").DINO.update(tiny_dino)
    importlib.import_module(script).main(argv)


def start_server():
    """Start the process that runs are forked from, once; it must be able to import the scripts."""
    environment = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(environment)


def start(script, argv, out, **environment):
    """The running process, and a connection that ends when it and all of its children have exited."""
    start_server()
    gone, alive = PROCESSES.Pipe(duplex=False)
    argv = [*map(str, argv), "--out", str(out)]
    process = PROCESSES.Process(target=script_main, args=(script, argv, f"{out}.txt", alive, environment, TINY_DINO))
    process.start()
    alive.close()
    return process, gone


def at_step(patch, step, action):
    """In this process: call action() at the start of this step, counted from 0. A signal stops the run after it."""

    class Bar(tqdm):
        def __iter__(self):
            for i in super().__iter__():
                if i == step:
                    action()
                yield i

    for script in BATCH:
        patch.setattr(importlib.import_module(script), "tqdm", Bar)


def terminal(out):
    """The output of all runs in this folder."""
    return Path(f"{out}.txt").read_text()


def logged(out):
    """The last step in log.csv, which has a row for each step."""
    path = out / "log.csv"
    return max(path.read_text().count("\n") - 1, 0) if path.exists() else 0


def partial(out):
    """Checkpoints that are being written, or were when the run was killed: {(name, size, time of the last change)}."""
    found = set()
    for path in out.glob("*.pt.tmp"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            status = path.stat()
            found.add((path.name, status.st_size, status.st_mtime_ns))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def damage(script, out):
    """The problems of the checkpoints in a folder, a list of texts."""
    results = {"train_decoder": ("decoder", decoders.load_decoder), "train_dit": ("dit", dit.load_dit)}
    name, load = results[script]
    problems, step = [], 0
    for path in sorted(out.glob("*.pt"), reverse=True):  # last.pt before dit.pt and decoder.pt
        try:
            content = torch.load(path, weights_only=True)
            if path.name.startswith(name):
                load(path)
        except Exception as error:
            problems.append(f"{path.name} does not load: {error}")
            continue
        step = content["step"] if path.name == "last.pt" else step
        if path.name == f"{name}.pt" and round(content["epoch"] * IMAGES / BATCH[script]) < step:
            problems.append(f"{path.name} is of epoch {content['epoch']}, behind last.pt of step {step}")
    return problems


def read(path):
    """The content of a file of a run, without values that depend on time."""
    if path.suffix == ".pt":
        return {key: value for key, value in flat(torch.load(path, weights_only=True)).items() if key not in TIMING}
    if path.suffix == ".csv":
        with open(path) as file:
            return flat([{key: row[key] for key in row if key not in TIMING} for row in csv.DictReader(file)])
    return {"bytes": path.read_bytes()}


def differences(out, whole):
    """The differences of two folders of runs, a list of texts: files, or the first value in each of them."""
    names, wanted = ({path.name for path in folder.iterdir()} for folder in (out, whole))
    problems = [f"{name} is in one of {out} and {whole} only" for name in sorted(names ^ wanted)]
    for name in sorted(names & wanted):
        a, b = read(out / name), read(whole / name)
        apart = [key for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])]
        problems += [f"{name} differs from that of the uninterrupted run, first in {apart[0]}"] if apart else []
    return problems


def same(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b


# ---------------------------------------------------------------------------------------------------------------------
# The check


def run_whole(script, argv, out):
    """Train without interruption -> problems."""
    process, _ = start(script, argv, out)
    process.join()
    return [] if process.exitcode == 0 else [f"{script} ended with {process.exitcode}: {terminal(out)[-2000:]}"]


def kill_once(script, argv, out, in_write, bytes_of_a_save, rng):
    """Start or resume, and kill -> (where, whether a checkpoint was being written, problems, connection)."""
    before, first = partial(out), logged(out)
    step, size = first + rng.randint(0, 2), rng.uniform(0, 0.9) * bytes_of_a_save
    process, gone = start(script, argv, out)
    while process.is_alive() and logged(out) < step:
        time.sleep(0.001)
    if in_write:
        while process.is_alive() and sum(n for _, n, _ in partial(out) - before) <= size:
            time.sleep(0.0002)
    else:
        process.join(rng.uniform(0, 1 if step == first else 0.1))  # the start takes longer than a step
    process.kill()
    process.join()
    written = sorted(partial(out) - before)
    where = f"{script}: step {logged(out)}" + "".join(f", {n / 1e6:.1f} MB of {name[:-4]}" for name, n, _ in written)
    where += ", which was its last" if process.exitcode == 0 else ""
    ended = process.exitcode in (-signal.SIGKILL, 0)
    problems = [] if ended else [f"{script} ended with {process.exitcode}: {terminal(out)[-2000:]}"]
    return where, bool(written), problems + damage(script, out), gone


def survives(script, argv, whole, out, kills, rng, say=print):
    """Kill and resume a run in `out`, then compare it with `whole` -> (kills during a write, problems)."""
    inside, connections = 0, []
    bytes_of_a_save = sum(path.stat().st_size for path in whole.glob("*.pt") if "-" not in path.name)
    for i in range(kills):
        where, written, problems, gone = kill_once(script, argv, out, i % 3 < 2, bytes_of_a_save, rng)
        say(f"kill {i + 1:2} {where}{', during a write' if written else ''}", flush=True)
        inside += written
        connections.append(gone)
        if problems:
            return inside, problems
    problems = run_whole(script, argv, out) or differences(out, whole)
    for gone in connections:
        if not gone.poll(30):
            problems.append("30 s after a kill, loader processes are still running")
    return inside, problems


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args(argv)
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for script, flags in prepare(folder, steps=3 * args.kills + 4).items():
            whole, out = folder / f"{script}-whole", folder / f"{script}-killed"
            inside, problems = 0, run_whole(script, flags, whole)
            if not problems:
                inside, problems = survives(script, flags, whole, out, args.kills, rng)
            if not inside:
                problems.append("no kill during the write of a checkpoint")
            verdict = "; ".join(problems) or "all files equal those of the uninterrupted run"
            print(f"{script}: {args.kills} kills, {inside} of them during a write: {verdict}", flush=True)
            failed |= bool(problems)
    print("FAILED" if failed else "passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
