"""Bad input: the scripts exit within seconds with a one-line error below the usage, and write no file.

A row of a table is `arguments | part of the line | another part`: arguments that are added to a correct command, and
parts of the error message. If the first part is the name of an exception, that is raised: errors of torch and Pillow
pass through. Each kind of check has one row. All rows run in one folder, `world`, and leave it unchanged.
"""

import os
import pickle
import re
import shlex
import shutil
import time
import warnings

import demo_check
import numpy as np
import pytest
import torch
from conftest import ROOT, make_images, published_decoder, published_dit, read

import decoder
import dit
import fid
import sample
import train_decoder
import train_dit

TRAIN = "--preset demo --data data --out run --batch 4 --micro-batch 4 --epochs 0.5 --workers 0 --device cpu "
COMMANDS = {  # correct ones
    "train_decoder": (train_decoder.main, TRAIN),
    "train_dit": (train_dit.main, TRAIN + "--stats-images 8"),
    "sample": (sample.main, "--preset demo --dit dit_run/dit.pt --decoder decoder_run/decoder.pt --per-class 1 "
                            "--scale 1 --steps 2 --device cpu --out out.png"),
    "fid": (fid.main, "--workers 0 --device cpu"),
}


class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def changed(path, source, **values):
    """Save a copy of the checkpoint `source` with other values; None removes a key."""
    torch.save({key: value for key, value in (read(source) | values).items() if value is not None}, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(folder)
    return folder


def build(folder):
    # Images.
    make_images("data", 8, classes=("a", "b"))
    for name in ("flat", "damaged"):
        make_images(name, 4)
    shutil.copy("flat/0000.png", "photo.png")
    for name in ("empty", "folder.png", "run_lost"):
        (folder / name).mkdir()
    os.truncate("damaged/0001.png", 60)

    # Files that are not checkpoints, or dangerous.
    torch.save({"weight": torch.ones(2)}, "foreign.pt")
    torch.save({"model": Trap()}, "trap.pt")
    (folder / "trap.bin").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))  # not in a zip archive

    # Our own files: runs of one step, and copies of their checkpoints with wrong values.
    for kind in ("decoder", "dit"):
        main, command = COMMANDS[f"train_{kind}"]
        main([*command.split(), "--out", f"{kind}_run"])
        path = f"{kind}_run/{kind}.pt"
        result = read(path)
        key, value = list(result["model"].items())[-1]
        changed(f"{kind}_nan.pt", path, model=result["model"] | {key: value * np.nan})
        changed(f"{kind}_vit.pt", path, encoder=result["encoder"] | {"name": "vit_tiny_patch16_224"})
        for last in ("trap.pt", "trap.bin"):
            (folder / f"{kind}_run_{last}").mkdir()
            shutil.copy(last, f"{kind}_run_{last}/last.pt")
    shutil.copy("decoder_run/decoder.pt", "run_lost")
    trained = dit.load_dit("dit_run/dit.pt")[0]
    torch.save(published_dit(trained), "stage2.pt")
    torch.save(published_decoder(decoder.load_decoder("decoder_run/decoder.pt")[0]), "model.pt")
    for name, count in dict(four=4, classless=0).items():
        other = dit.DiT(**trained.config | dict(num_classes=count))
        stats = dict.fromkeys(("mean", "var"), torch.ones(other.latent_shape))
        changed(f"dit_{name}.pt", "dit_run/dit.pt", config=other.config, model=other.state_dict(), stats=stats)
    changed("dit_statless.pt", "dit_run/dit.pt", stats=None)
    changed("dit_undropped.pt", "dit_run/dit.pt", label_dropout=0.0)
    wide = decoder.Decoder(16, 4, 8, **decoder.SIZES["ViT-tiny"])
    changed("decoder_wide.pt", "decoder_run/decoder.pt", config=wide.config, model=wide.state_dict())
    torch.save({"mean": None, "var": torch.ones(16, 4, 4)}, "stat_16.pt")
    ones = torch.ones(128, 4, 4)
    for name, stats in dict(nan=dict(mean=ones * np.nan, var=ones), inf=dict(mean=None, var=ones * np.inf),
                            negative=dict(mean=ones, var=-ones)).items():
        torch.save(stats, f"stat_{name}.pt")

    # Weights of the frozen networks.
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate(fid.LPIPS.layers.values())},
               "heads.pt")

    # Arrays.
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for name, array in dict(a=images, five=images[[0, 1, 2, 3, 0]], float=images / 255.0, one=images[:1]).items():
        np.savez(f"{name}.npz", array)
    np.savez("inception.npz", mu=np.zeros(2048), sigma=np.broadcast_to(np.float16(0), (2048, 2048)))
    trap = np.array([Trap()], object)
    np.savez("trap.npz", arr_0=trap)
    np.savez("trap_mu.npz", mu=trap, sigma=np.zeros((2, 2)))
    np.savez("trap_features.npz", mu=np.zeros(2), features=trap)

    # The other two commands.
    sample.main(COMMANDS["sample"][1].split())
    fid.main([*COMMANDS["fid"][1].split(), "inception.npz", "inception.npz"])


# Progress bars, unreadable images, and fid.py's description of its sets.
PROGRESS = re.compile(r"%\||^cannot read |^loading |^\S+: \d+ images of ")


def listing(folder):
    """All folders, and all files with the numbers that change if they are written or replaced."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: path.is_dir() or (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def check(world, tmp_path, monkeypatch, capfd, caplog):
    """check(main, arguments, said): the command exits with one line with all parts of `said`, and writes nothing."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # timm's client would retry
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fid.DINOv2.__init__, "__defaults__", (None, "vit_small_patch14_dinov2.lvd142m"))  # quick
    for name in ("normal_", "kaiming_uniform_"):  # of VGG16's 138 M weights, too
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(train_dit, "latent_statistics", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits before it retries
    before = listing(world)

    def run(main, arguments, said):
        capfd.readouterr()
        start, busy = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as warned, pytest.raises((SystemExit, Exception)) as raised:
            main(arguments)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        error, code = capfd.readouterr().err, getattr(raised.value, "code", None)
        if raised.typename == said[0]:
            error = f"{raised.typename}: {raised.value}"
        else:
            error += f"{code}\n" if isinstance(code, str) else ""  # Python prints it
            assert (code == 2 or isinstance(code, str)) and error.endswith("\n") and "Traceback" not in error, error
            error = re.sub(r"^usage: .*\n( .*\n)*", "", error, count=1, flags=re.M)
            lines = [line.rpartition("\r")[2] for line in error[:-1].split("\n")]
            assert len([line for line in lines if not PROGRESS.search(line)]) == 1, error
        # In a process with threads, Python 3.12 and 3.13 warn of every process that a loader forks from it.
        warned = [w for w in warned if "use of fork() may lead to deadlocks" not in str(w.message)]
        logged = [r for r in caplog.records if not r.name.startswith("huggingface_hub")]  # that it retries
        assert not logged and not warned, (logged, warned, error)
        assert all(part in error for part in said), error
        assert busy < 3 and seconds < 20, "too late"  # `busy` does not count other work on the machine
        assert listing(world) == before, "something was written"

    yield run
    shutil.rmtree("run", ignore_errors=True)  # of a row that failed


def table(text):
    """Parametrise a test by name, arguments, said; a line without `|` is the script of the rows below it."""
    name, rows = None, []
    for line in text.strip().splitlines():
        arguments, *said = (part.strip() for part in line.split(" | "))
        name = name if said else arguments
        rows += [pytest.param(name, arguments, said, id=f"{name} {arguments}")] if said else []
    return pytest.mark.parametrize("name, arguments, said", rows)


@table("""
train_decoder
--preset Demo | 'Demo' | demo
--learning-rate 1e-3 | --learning-rate
--init '' | --init '' is empty
--out '' | --out '' is empty
--size 32.5 | --size | int | 32.5
--epochs 0 | --epochs 0.0
--tau nan | --tau nan
--data absent | No such file or directory: 'absent'
--data empty | empty | no images
--out photo.png | File exists: 'photo.png'
--layers 3 | layers 3 | blocks 0 to 2
--size 30 | 30 | multiple of 8
--encoder random-tin | random-tin | dinov2-s
--encoder vit_tiny_patch16_224 | --encoder-weights | vit_tiny_patch16_224 | network
--encoder vit_tiny_patch16_224 --encoder-weights absent.pt | absent.pt | No such file | --encoder-weights
--encoder vit_tiny_patch16_224 --encoder-weights foreign.pt | foreign.pt | cls_token | --encoder-weights
--lpips 1 | --lpips-weights | network
--lpips 1 --lpips-weights heads.pt --vgg-weights absent.pt | absent.pt | --vgg-weights
--lpips 1 --lpips-weights foreign.pt | foreign.pt | --lpips-weights
--gan 1 | --dino-weights | vit_small_patch8_224.dino | network
--gan 1 --dino-weights absent.pt | absent.pt | FileNotFoundError | --dino-weights
--gan 1 --dino-weights foreign.pt | foreign.pt | --dino-weights
--out decoder_run --tau 0.5 --data flat | decoder_run | now 0.5 | images 8, now 4 | --out
--out dit_run | dit_run | kind train_dit, now train_decoder | --out
--out run_lost | run_lost | no last.pt | choose
--out decoder_run_trap.pt | UnpicklingError | mkdir
--out decoder_run_trap.bin | RuntimeError | torch.save
train_dit
--decay-end nan | --decay-end nan
--stats stat_16.pt | stat_16.pt | (16, 4, 4) | (128, 4, 4) | --stats
--out dit_run_trap.pt | UnpicklingError | mkdir
--out dit_run_trap.bin | RuntimeError | torch.save
sample
--dit absent.pt | cannot read absent.pt | No such file | give a checkpoint
--dit dit_nan.pt | dit_nan.pt | finite
--dit dit_statless.pt | dit_statless.pt | --stats
--dit dit_run/last.pt | dit_run/last.pt is not a diffusion model | dit.pt
--dit hf:owner/repository | hf:owner/repository | hf:OWNER/REPO/PATH
--dit hf:owner/repository/dit.pt | cannot read hf:owner/repository/dit.pt | give a checkpoint
--preset imagenet256 --published | hf:nyu-visionx/RAE-collections/stats/dinov2/wReg_base/imagenet1k/stat.pt
--published | --published | demo
--stats stat_nan.pt | stat_nan.pt | finite
--stats stat_inf.pt | stat_inf.pt | finite
--stats stat_negative.pt | stat_negative.pt | negative
--stats photo.png | cannot read photo.png | give a checkpoint
--decoder decoder_wide.pt | --decoder decoder_wide.pt | (16, 4, 4) | (128, 4, 4)
--decoder decoder_vit.pt | decoder_vit.pt | vit_tiny | random-tiny
--decoder decoder_run/last.pt | decoder_run/last.pt is not a decoder | decoder.pt
--dit stage2.pt --stats dit_run/stat.pt --decoder model.pt --encoder dino | dino | dinov2-s
--guide dit_run/dit.pt | --guide dit_run/dit.pt | 1.42
--guide dit_four.pt --scale 2 | dit_four.pt has 4 classes | 2
--guide dit_vit.pt --scale 2 | --guide dit_vit.pt | vit_tiny | --encoder
--guide decoder_run/decoder.pt --scale 2 | decoder_run/decoder.pt is not a diffusion model
--scale nan | --scale nan
--scale 2 --unconditional | --scale 2 | --guide
--scale 2 --dit dit_undropped.pt | --scale 2 | --guide
--scale 2 --dit dit_classless.pt | --scale 2 | --guide
--interval 0.5 0.2 | 0.5 0.2 | LOW <= HIGH
--interval 0 2 | 0 2 | HIGH <= 1
--classes 2 | --classes 2: dit_run/dit.pt knows 0 to 1, a, b
--classes a cow | --classes cow: dit_run/dit.pt knows 0 to 1, a, b
--classes 0 --dit dit_classless.pt | --classes 0 | dit_classless.pt has no classes
--classes 0 --num-samples 5 | --classes | --num-samples
--classes 0 --unconditional | --classes | --unconditional
--num-samples 5 | --num-samples | --per-class
--seed -1 | --seed -1
--batch 0 | --batch 0
--per-class 10001 | 20002 | .npz
--trajectory | --trajectory | --steps 2
--out x.jpg | x.jpg | .png
--out folder.png | folder.png | give a .png
--out photo.png/x.png | File exists: 'photo.png'
--out a.npz | a.npz | --overwrite
--reconstruct absent | No such file or directory: 'absent'
--reconstruct '' | --reconstruct ''
--reconstruct trap.pt | UnidentifiedImageError | 'trap.pt'
--reconstruct damaged/0001.png | OSError | truncated
--reconstruct damaged --workers 1 | damaged/0001.png | repair
--reconstruct photo.png --decoder decoder_wide.pt | decoder_wide.pt | (128, 4, 4)
--reconstruct photo.png --out x.npz | x.npz | .png
--reconstruct photo.png --out photo.png | photo.png | not the photo itself
fid
a.npz | SAMPLES is missing
absent.npz a.npz | absent.npz
a.npz float.npz | float.npz | float64 (4, 16, 16, 3) | uint8
a.npz one.npz | one.npz: 1 images | at least 2
a.npz five.npz --paired | 4 | 5
a.npz a.npz | --inception-weights | https
a.npz a.npz --features dinov2 | --dinov2-weights | network
""")
def test_one_line(check, name, arguments, said):
    main, command = COMMANDS[name]
    check(main, shlex.split(f"{command} {arguments}"), said)


@pytest.mark.parametrize("main, command, said", [
    (train_decoder.main, "", "--data"), (train_dit.main, "", "--data"), (fid.main, "", "REFERENCE"),
    (sample.main, "", "runs/imagenet256/dit/dit.pt"), (demo_check.main, "--runs demo", "demo/dit/dit.pt"),
])
def test_required_arguments_and_files(check, main, command, said):
    check(main, command.split(), [said])


# ---------------------------------------------------------------------------------------------------------------------
# Files that would run code if they were unpickled

VIT = "--encoder vit_tiny_patch16_224 --encoder-weights TRAP"
TRAPS = {
    "train_decoder": [VIT, "--lpips 1 --lpips-weights TRAP", "--lpips 1 --lpips-weights heads.pt --vgg-weights TRAP",
                      "--gan 1 --dino-weights TRAP", "--init TRAP"],
    "train_dit": [VIT, "--decoder TRAP", "--stats TRAP", "--init TRAP"],
    "sample": ["--dit TRAP", "--decoder TRAP", "--stats TRAP", "--guide TRAP --scale 2",
               "--reconstruct photo.png --decoder decoder_vit.pt --encoder-weights TRAP"],
    "fid": ["a.npz trap.npz", "trap_mu.npz a.npz", "trap_features.npz a.npz", "a.npz TRAP",
            "a.npz a.npz --inception-weights TRAP", "a.npz a.npz --paired --lpips-weights TRAP",
            "a.npz a.npz --features dinov2 --dinov2-weights TRAP",
            "a.npz a.npz --paired --lpips-weights heads.pt --vgg-weights TRAP"],
}
TRAPS = [(name, row.replace("TRAP", file)) for name, rows in TRAPS.items() for row in rows
         for file in (("trap.pt", "trap.bin") if "TRAP" in row else ("",))]


@pytest.mark.parametrize("name, arguments", TRAPS, ids=map(" ".join, TRAPS))
def test_no_file_runs_code(check, name, arguments, monkeypatch):
    main, command = COMMANDS[name]
    if "--paired" in arguments:  # Inception is loaded before LPIPS
        monkeypatch.setattr(fid, "InceptionV3", lambda weights: torch.nn.Identity())
    said = ["allow_pickle=False"] if "trap_" in arguments else re.findall(r"\S*trap\S*", arguments)  # the first: numpy
    check(main, shlex.split(f"{command} {arguments}"), said)


def test_the_traps_work(world, tmp_path, monkeypatch):
    """Unpickled without restrictions, each of these files makes its folder."""
    monkeypatch.chdir(tmp_path)
    for name, load in {
        "trap.pt": lambda path: torch.load(path, weights_only=False),
        "trap.bin": lambda path: pickle.loads(path.read_bytes()),
        **dict.fromkeys(("trap.npz", "trap_mu.npz", "trap_features.npz"), lambda path: dict(np.load(path, None, True))),
    }.items():
        load(world / name)
        os.rmdir("sprung")


def test_every_flag_that_takes_a_file_has_its_trap():
    tables = {it.__name__: it.RECIPE | it.RUN for it in (train_decoder, train_dit)} | {"sample": sample.FLAGS}
    flags = {script: {f"--{name.replace('_', '-')}" for name, (default, _, _, *options) in rows.items()
                      if default is None and not options} for script, rows in tables.items()}
    flags["fid"] = set(re.findall(r'"(--[a-z0-9]+-weights)"', (ROOT / "fid.py").read_text()))
    assert {name: len(found) for name, found in flags.items()} == dict(train_decoder=7, train_dit=6, sample=6, fid=4)
    for name, found in flags.items():
        for flag in found - {"--data", "--out", "--reconstruct"}:
            assert any(row[0] == name and f"{flag} trap" in row[1] for row in TRAPS), (name, flag)
