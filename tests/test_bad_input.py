"""Bad input, told plainly: every wrong use of the scripts ends within seconds in one line, and nothing is written.

A row of a table is `arguments | part of the line | another part`: what is added to a command that works, and what the
line has to say. There is one row for each kind of check: flags of one type, and what scripts share, have one row. All
rows run in one folder, `world`, and must leave it as it was.
"""

import os
import pickle
import re
import shlex
import shutil
import time
import warnings
import zipfile

import demo_check
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, make_images, published_decoder, published_dit, read

import decoder
import dit
import fid
import sample
import train_decoder
import train_dit

TRAIN = "--preset demo --data data --out run --batch 4 --micro-batch 4 --epochs 0.5 --workers 0 --device cpu "
COMMANDS = {  # what works
    "train_decoder": (train_decoder.main, TRAIN),
    "train_dit": (train_dit.main, TRAIN + "--stats-images 4"),
    "sample": (sample.main, "--preset demo --dit dit_run/dit.pt --decoder decoder_run/decoder.pt --per-class 1 "
                            "--scale 1 --steps 2 --device cpu --out out.png"),
    "fid": (fid.main, "--workers 0 --device cpu"),
}


class Trap:
    """Its unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def changed(path, source, **values):
    """The checkpoint `source` again, with other values; a value of None leaves its key out."""
    content = read(source) | values
    torch.save({key: value for key, value in content.items() if value is not None}, path)


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
    for name in ("flat", "loose/a", "damaged", "split/val/a"):
        make_images(name, 4)
    for path in ("photo.png", "loose/stray.png"):
        shutil.copy("flat/0000.png", path)
    for name in ("empty", "folder.png", "run_lost"):
        (folder / name).mkdir()
    os.truncate("damaged/0001.png", 60)

    # What is no checkpoint, or dangerous.
    (folder / "text.pt").write_text("text")
    torch.save({"weight": torch.ones(2)}, "foreign.pt")
    torch.save({"model": Trap()}, "trap.pt")
    (folder / "trap.bin").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))  # without torch's archive around it

    # Our own files: true runs of one step, whose checkpoints are then spoilt.
    for kind in ("decoder", "dit"):
        main, command = COMMANDS[f"train_{kind}"]
        main([*command.split(), "--out", f"{kind}_run"])
        path = f"{kind}_run/{kind}.pt"
        result = read(path)
        key, value = list(result["model"].items())[-1]
        changed(f"{kind}_nan.pt", path, model=result["model"] | {key: value * np.nan})
        changed(f"{kind}_vit.pt", path, encoder=result["encoder"] | {"name": "vit_tiny_patch16_224"})
        del result["model"][key]
        changed(f"{kind}_short.pt", path, model=result["model"])
        shutil.copy(path, f"{kind}_cut.pt")
        os.truncate(f"{kind}_cut.pt", os.path.getsize(path) - 1000)
        for last in ("trap.pt", "trap.bin", "text.pt"):
            (folder / f"{kind}_run_{last}").mkdir()
            shutil.copy(last, f"{kind}_run_{last}/last.pt")
    shutil.copy("decoder_run/decoder.pt", "run_lost")
    trained = dit.load_dit("dit_run/dit.pt")[0]
    torch.save(published_dit(trained), "stage2.pt")
    torch.save(published_decoder(decoder.load_decoder("decoder_run/decoder.pt")[0]), "model.pt")
    for name, values in {"deep": dict(depth=1), "four": dict(num_classes=4), "classless": dict(num_classes=0)}.items():
        other = dit.DiT(**trained.config | values)
        stats = dict.fromkeys(("mean", "var"), torch.ones(other.latent_shape))
        changed(f"dit_{name}.pt", "dit_run/dit.pt", config=other.config, model=other.state_dict(), stats=stats)
    changed("dit_statless.pt", "dit_run/dit.pt", stats=None)
    changed("dit_undropped.pt", "dit_run/dit.pt", label_dropout=0.0)
    wide = decoder.Decoder(16, 4, 8, **decoder.SIZES["ViT-tiny"])
    changed("decoder_wide.pt", "decoder_run/decoder.pt", config=wide.config, model=wide.state_dict())
    torch.save({"mean": None, "var": torch.ones(16, 4, 4)}, "stat_16.pt")

    # Weights of the frozen networks.
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).half().state_dict()  # 192 wide
    torch.save(vit, "vit.pt")
    heads = {f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate(fid.LPIPS.layers.values())}
    torch.save(heads, "heads.pt")

    # Arrays.
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    arrays = dict(a=images, five=images[[0, 1, 2, 3, 0]], float=images / 255.0, grey=images[..., 0], one=images[:1],
                  small=images[:, :15, :15], wide=images.repeat(2, 1)[:, :24])
    for name, array in arrays.items():
        np.savez(f"{name}.npz", array)
    np.savez("other.npz", x=images)
    with zipfile.ZipFile("a.npz") as whole, zipfile.ZipFile("more.npz", "w") as archive:  # 9 images, says its header
        archive.writestr("arr_0.npy", whole.read("arr_0.npy").replace(b"(4, 16", b"(9, 16"))
    shutil.copy("a.npz", "cut.npz")
    os.truncate("cut.npz", 1000)
    np.savez("inception.npz", mu=np.zeros(2048), sigma=np.broadcast_to(np.float16(0), (2048, 2048)))
    statistics = dict(np.load("inception.npz"))
    np.savez("dinov2.npz", mu=np.zeros(1024), sigma=np.zeros((1024, 1024)), features="dinov2")
    np.savez("stats_nan.npz", **statistics | dict(mu=np.full(2048, np.nan)))
    np.savez("stats_sigma.npz", **statistics | dict(sigma=np.eye(64)))
    trap = np.array([Trap()], object)
    np.savez("trap.npz", arr_0=trap)
    np.savez("trap_mu.npz", **statistics | dict(mu=trap))
    np.savez("trap_features.npz", mu=np.zeros(2), features=trap)

    # The other two commands work as well.
    sample.main(COMMANDS["sample"][1].split())
    fid.main([*COMMANDS["fid"][1].split(), "inception.npz", "inception.npz"])


def listing(folder):
    """Every folder, and every file with what changes when it is written or replaced."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: path.is_dir() or (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def check(world, tmp_path, monkeypatch, capfd, caplog):
    """check(main, arguments, said): the command ends in one line that says all of `said`, and keeps the promise."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # so timm's own download would try and try
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fid.DINOv2.__init__, "__defaults__", (None, "vit_small_patch14_dinov2.lvd142m"))  # quick
    monkeypatch.setattr(train_dit, "latent_statistics", lambda *_: pytest.fail("this may take an hour"))
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds and pytest.fail(f"waits for {seconds} s"))
    before = listing(world)

    def run(main, arguments, said):
        capfd.readouterr()
        began = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as exit:
            main(arguments)
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        error, code = capfd.readouterr().err, exit.value.code
        if isinstance(code, str):  # Python prints it
            error, code = error + code + "\n", 1
        assert code in (1, 2) and error.endswith("\n") and "Traceback" not in error, error
        lines = [line.rpartition("\r")[2] for line in error[:-1].split("\n")]
        lines = [line for line in lines if "%|" not in line and not line.startswith("cannot read ")]  # bars, bad images
        assert len(lines) == 1 and not caplog.records and not warned, error
        assert said and all(part in error for part in said), error
        assert busy < 3 and seconds < 20, "told late"  # other work on the machine makes no test fail
        assert listing(world) == before, "something was written"

    yield run
    shutil.rmtree("run", ignore_errors=True)  # of a row that was not refused


def table(text):
    """Parametrise a test by name, arguments, said; a line without `|` names the script of the rows below it."""
    name, rows = None, []
    for line in text.strip().splitlines():
        arguments, *said = (part.strip() for part in line.split(" | "))
        name = name if said else arguments
        rows += [pytest.param(name, arguments, said, id=f"{name} {arguments}")] if said else []
    return pytest.mark.parametrize("name, arguments, said", rows)


@table("""
train_decoder
--preset Demo | 'Demo' | demo
--preset | --preset | expected
--learning-rate 1e-3 | --learning-rate
--device cuda | --device cuda | --device cpu
--init '' | --init is empty
--out '' | --out is empty
--size 32.5 | --size: 32.5 | integer
--size 0 | --size: 0 | at least 1
--lr 0 | --lr: 0 | above 0
--lr inf | --lr: inf | above 0
--tau nan | --tau: nan | number
--ema 1 | --ema: 1 | below 1
--data absent | absent | folder
--data empty | empty | no images
--data loose | loose | stray.png | move
--data split | split | val/ | train/
--out photo.png | --out photo.png | folder
--size 30 | 30 | multiple of 8
--size 34 --resize 34 --encoder-size 32 | --size 34 | multiple
--resize 16 | --resize 16 | --size 32
--encoder random-tin | random-tin | dinov2-s
--encoder resnet18 | resnet18 | ResNet
--encoder-weights foreign.pt | --encoder-weights foreign.pt | random-tiny
--encoder vit_tiny_patch16_224 | --encoder-weights | https://huggingface.co/timm/vit_tiny
--encoder vit_tiny_patch16_224 --encoder-weights absent.pt | absent.pt | No such file | --encoder-weights
--encoder vit_tiny_patch16_224 --encoder-weights foreign.pt | foreign.pt | cls_token | --encoder-weights
--disc-start 2 --gan-start 1 | --gan-start 1 | --disc-start 2
--size 8 --lpips 1 | --size 8 | --lpips 0
--lpips 1 | --lpips-weights | https
--lpips 1 --lpips-weights heads.pt --vgg-weights absent.pt | absent.pt | --vgg-weights
--lpips 1 --lpips-weights foreign.pt | foreign.pt | --lpips-weights
--gan 1 | --dino-weights | https://huggingface.co/timm/vit_small_patch8_224.dino
--gan 1 --dino-weights absent.pt | absent.pt | FileNotFoundError | --dino-weights
--gan 1 --dino-weights foreign.pt | foreign.pt | --dino-weights
--init decoder_vit.pt | decoder_vit.pt | vit_tiny | --encoder
--init decoder_wide.pt | decoder_wide.pt | latent_dim 16 instead of 128
--out decoder_run --tau 0.5 --data flat | decoder_run | tau 0.1, now 0.5 | images 8, now 4 | --out
--out dit_run | dit_run/last.pt | no checkpoint of train_decoder.py
--out decoder_run_text.pt | decoder_run_text.pt/last.pt | put back
--out run_lost | run_lost | no last.pt | choose
train_dit
--decay-start 9 --decay-end 3 | --decay-start 9 | --decay-end 3
--decay-end nan | --decay-end: nan | number
--encoder vit_tiny_patch16_224 --encoder-weights vit.pt | 160 | 192-wide | DiT-DH | --allow-narrow
--stats absent.pt | --stats absent.pt | No such file
--stats stat_16.pt | --stats stat_16.pt | (16, 4, 4) | (128, 4, 4)
--init dit_deep.pt | dit_deep.pt | depth 1 instead of 3 | --model
--init dit_vit.pt | dit_vit.pt | vit_tiny | --encoder
--init stage2.pt | stage2.pt | --stats
--decoder decoder_vit.pt | decoder_vit.pt | random-tiny | --preview-every 0
--decoder decoder_wide.pt | decoder_wide.pt | 32 px | --preview-every 0
--fid-every 1 | --fid-reference
--fid-every 1 --fid-reference inception.npz | --decoder | decoder.pt
--fid-every 1 --fid-reference inception.npz --decoder decoder_run/decoder.pt --fid-num 1 | --fid-num 1 | at least 2
--fid-every 1 --fid-reference dinov2.npz --decoder decoder_run/decoder.pt | dinov2.npz | inception
sample
--dit absent.pt | absent.pt | give
--dit dit_cut.pt | dit_cut.pt | cannot load
--dit dit_short.pt | dit_short.pt | Missing
--dit dit_nan.pt | dit_nan.pt | finite
--dit dit_statless.pt | dit_statless.pt | --stats
--dit decoder_run/decoder.pt | decoder_run/decoder.pt | as a diffusion model
--decoder absent.pt | absent.pt | give
--decoder decoder_cut.pt | decoder_cut.pt | cannot load
--decoder decoder_short.pt | decoder_short.pt | Missing
--decoder decoder_nan.pt | decoder_nan.pt | finite
--decoder decoder_wide.pt | decoder_wide.pt | (16, 4, 4) | dit_run/dit.pt | (128, 4, 4)
--decoder decoder_vit.pt | decoder_vit.pt | vit_tiny | random-tiny
--dit stage2.pt --stats dit_run/stat.pt --decoder model.pt --encoder dino | dino | dinov2-s
--guide dit_run/dit.pt | --guide dit_run/dit.pt | 1.42
--guide dit_four.pt --scale 2 | dit_four.pt | num_classes
--guide dit_vit.pt --scale 2 | dit_vit.pt | encoder
--scale 2 --unconditional | --scale 2 | --guide
--scale 2 --dit dit_undropped.pt | --scale 2 | --guide
--scale 2 --dit dit_classless.pt | --scale 2 | --guide
--interval 0.5 0.2 | 0.5 0.2 | LOW <= HIGH
--interval 0 2 | 0 2 | HIGH <= 1
--classes 2 | --classes 2 | 0 to 1 | a, b
--num-samples 5 | --num-samples | --per-class
--per-class 10001 | 20002 | .npz
--trajectory | --trajectory | --steps 2
--out x.jpg | x.jpg | .png
--out folder.png | folder.png | give
--out a.npz | a.npz | --overwrite
--reconstruct absent | --reconstruct absent
--reconstruct damaged/0001.png | damaged/0001.png | damaged
--reconstruct damaged --workers 1 | damaged/0001.png | repair
--reconstruct photo.png --decoder decoder_wide.pt | decoder_wide.pt | (128, 4, 4)
--reconstruct photo.png --out x.npz | x.npz | .png
--reconstruct photo.png --out photo.png | photo.png | another
fid
a.npz | SAMPLES is missing
a.npz a.npz --batch 0 | --batch | 0
absent.npz a.npz | absent.npz
a.npz cut.npz | cut.npz | whole npz
a.npz more.npz | more.npz | (9, 16, 16, 3)
a.npz float.npz | float.npz | float64 (4, 16, 16, 3) | uint8
a.npz grey.npz | grey.npz | uint8 (4, 16, 16)
a.npz one.npz | 4 and 1 | at least 2
a.npz other.npz | other.npz | inception
dinov2.npz a.npz | dinov2.npz | inception
stats_nan.npz a.npz | stats_nan.npz | finite
stats_sigma.npz a.npz | stats_sigma.npz | (2048, 2048)
a.npz five.npz --paired | 4 | 5
a.npz wide.npz | 16 x 16 | 24 x 16
inception.npz a.npz --paired | --paired | images
a.npz small.npz | 15 x 15 | 16 x 16
small.npz small.npz --paired | 15 x 15 | --no-lpips
a.npz a.npz --features incepton | incepton | dinov2
a.npz a.npz | --inception-weights | https
a.npz a.npz --features dinov2 | --dinov2-weights | https
inception.npz --save-stats a.npz | a.npz | exists
inception.npz --save-stats no/stats.npz | no/stats.npz
""")
def test_one_line(check, name, arguments, said):
    main, command = COMMANDS[name]
    check(main, shlex.split(f"{command} {arguments}"), said)


@pytest.mark.parametrize("main, command, said", [
    (train_decoder.main, "", "--data"), (train_dit.main, "", "--data"), (fid.main, "", "REFERENCE"),
    (sample.main, "", "runs/imagenet256/dit/dit.pt"), (demo_check.main, "--runs demo", "demo/dit/dit.pt"),
])
def test_what_is_missing(check, main, command, said):
    check(main, command.split(), [said])


def test_one_of_several_processes_speaks(monkeypatch, capsys):
    """Every other rank leaves rank 0 ten seconds to say it; torchrun ends them meanwhile."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            train_dit.main(["--batch", "0"])
    assert waits == [10]


# ---------------------------------------------------------------------------------------------------------------------
# Files that would run code

VIT = "--encoder vit_tiny_patch16_224 --encoder-weights TRAP"
FID = "--fid-every 1 --decoder decoder_run/decoder.pt --fid-reference"
TRAPS = {
    "train_decoder": [VIT, "--lpips 1 --lpips-weights TRAP", "--lpips 1 --lpips-weights heads.pt --vgg-weights TRAP",
                      "--gan 1 --dino-weights TRAP", "--init TRAP", "--out decoder_run_TRAP"],
    "train_dit": [VIT, "--decoder TRAP", "--stats TRAP", "--init TRAP", "--out dit_run_TRAP", f"{FID} trap_mu.npz",
                  f"{FID} inception.npz --inception-weights TRAP"],
    "sample": ["--dit TRAP", "--decoder TRAP", "--stats TRAP", "--guide TRAP --scale 2", "--reconstruct TRAP",
               "--reconstruct photo.png --decoder decoder_vit.pt --encoder-weights TRAP"],
    "fid": ["a.npz trap.npz", "trap_mu.npz a.npz", "trap_features.npz a.npz", "a.npz TRAP",
            "a.npz a.npz --inception-weights TRAP", "a.npz a.npz --paired --lpips-weights TRAP",
            "a.npz a.npz --features dinov2 --dinov2-weights TRAP",
            "a.npz a.npz --paired --lpips-weights heads.pt --vgg-weights TRAP"],
}
TRAPS = [(name, row.replace("TRAP", file)) for name, rows in TRAPS.items() for row in rows
         for file in (("trap.pt", "trap.bin") if "TRAP" in row else ("",))]


@pytest.mark.parametrize("name, arguments", TRAPS, ids=map(" ".join, TRAPS))
def test_no_file_runs_code(check, name, arguments):
    main, command = COMMANDS[name]
    check(main, shlex.split(f"{command} {arguments}"), re.findall(r"\S*trap\S*", arguments))


def test_the_traps_work(world, tmp_path, monkeypatch):
    """Loaded carelessly, each of these files makes its folder."""
    monkeypatch.chdir(tmp_path)
    for name, load in {
        "trap.pt": lambda path: torch.load(path, weights_only=False),
        "trap.bin": lambda path: pickle.loads(path.read_bytes()),
        **dict.fromkeys(("trap.npz", "trap_mu.npz", "trap_features.npz"), lambda path: dict(np.load(path, None, True))),
    }.items():
        load(world / name)
        os.rmdir("sprung")


def test_every_flag_that_takes_a_file_has_its_trap():
    tables = dict(train_decoder=train_decoder.RECIPE, train_dit=train_dit.RECIPE, sample=sample.FLAGS)
    flags = {name: {row[0] for row in rows if row[1] is str} for name, rows in tables.items()}
    flags["fid"] = set(re.findall(r'"(--[a-z0-9]+-weights)"', (ROOT / "fid.py").read_text()))
    assert {name: len(found) for name, found in flags.items()} == dict(train_decoder=7, train_dit=8, sample=8, fid=4)
    for name, found in flags.items():
        for flag in found - {"--data", "--encoder", "--out"}:
            assert any(row[0] == name and f"{flag} trap" in row[1] for row in TRAPS), (name, flag)
