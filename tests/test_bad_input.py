"""Bad input, told plainly: every wrong use of the four scripts ends within seconds in one line, and nothing is written.

A row of a table is `arguments | part of the line | another part`: what is added to a command that works, and what the
line has to say. Every row runs in one folder, `world`, and must leave it as it was.
"""

import ast
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import warnings

import demo_check
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, published_decoder, published_dit
from PIL import Image
from test_losses import save_tiny_dino
from test_sample import diffusion_model, ours, small_decoder

import dit
import encoder as encoders
import fid
import sample
import train_decoder
import train_dit

TRAIN = "--preset demo --data data --out run --batch 4 --micro-batch 4 --epochs 0.5 --workers 0 --device cpu "
COMMANDS = {  # what works
    "train_decoder": (train_decoder, TRAIN),
    "train_dit": (train_dit, TRAIN + "--stats-images 4"),
    "sample": (sample, "--dit stage2.pt --decoder model.pt --stats stat.pt --classes 1 --per-class 1 --steps 2 "
                       "--device cpu --out out.png"),
    "fid": (fid, "--features random-tiny --workers 0 --device cpu"),
}  # fmt: skip


class Trap:
    """Its unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def make_images(folder, count=4, size=32):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((size, size), 50 + i).convert("RGB").save(folder / f"{i}.png")


def changed(path, source, **values):
    """The checkpoint `source` again, with other values; a value of None leaves its key out."""
    content = torch.load(source, weights_only=True) | values
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def damaged(state, how):
    """A state dict of the same model with one tensor missing, of another shape, or with a NaN."""
    key = next(key for key in state if key.endswith("weight"))
    values = {"short": {}, "shape": {key: state[key][:1]}, "nan": {key: state[key] * np.nan}}[how]
    return {name: value for name, value in state.items() if name != key} | values


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(folder)
    return folder


def build(folder):
    # images
    for name in ("data/a", "data/b", "flat", "hole/a", "loose/a", "damaged"):
        make_images(folder / name)
    for name in ("empty", "hole/nothing", "texts", "folder.png", "folder.npz", "folder.json"):
        (folder / name).mkdir()
    (folder / "texts" / "notes.txt").write_text("no image")
    shutil.copy("flat/0.png", "loose/stray.png")
    shutil.copy("flat/0.png", "photo.png")
    (folder / "damaged" / "1.png").write_bytes((folder / "damaged" / "1.png").read_bytes()[:60])

    # what is no checkpoint, or dangerous
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("text")
    shutil.copy("text.pt", "text.safetensors")
    torch.save([1], "list.pt")
    torch.save({"weight": torch.ones(2)}, "foreign.pt")
    torch.save({"model": Trap()}, "trap.pt")
    (folder / "trap.bin").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))  # without torch's archive around it

    # our files: true runs of one step, whose checkpoints are then spoilt
    for name, (script, command) in list(COMMANDS.items())[:2]:
        run = name.replace("train_", "") + "_run"
        script.main([*command.split(), "--out", run])
        result, kind = f"{run}/{run[:-4]}.pt", run[:-4]
        last = torch.load(f"{run}/last.pt", weights_only=True)
        for how in ("short", "shape", "nan"):
            changed(f"{kind}_{how}.pt", result, model=damaged(last["model"], how))
        for how in ("short", "shape", "none", "step"):
            shutil.copytree(run, f"{run}_{how}")
        changed(f"{run}_short/last.pt", f"{run}/last.pt", model=damaged(last["model"], "short"))
        changed(f"{run}_shape/last.pt", f"{run}/last.pt", ema=damaged(last["ema"], "shape"))
        changed(f"{run}_none/last.pt", f"{run}/last.pt", optimizer=None)
        changed(f"{run}_step/last.pt", f"{run}/last.pt", step=None)
        for how, file in {"trap.pt": "trap.pt", "trap.bin": "trap.bin", "text": "text.pt", "empty": "empty.pt"}.items():
            (folder / f"{run}_{how}").mkdir()
            shutil.copy(file, f"{run}_{how}/last.pt")
        (folder / f"{run}_lost").mkdir()
        shutil.copy(result, f"{run}_lost")
        (folder / f"{kind}_cut.pt").write_bytes((folder / result).read_bytes()[:-1000])
        encoder = torch.load(result, weights_only=True)["encoder"]
        changed(f"{kind}_mae.pt", result, encoder=encoder | {"name": "mae-b"})
        changed(f"{kind}_dino.pt", result, encoder=encoder | {"name": "dinov2-s"})
        changed(f"{kind}_unsigned.pt", result, encoder=None)
    torch.save(torch.load("dit_run/stat.pt"), "stat_run.pt")
    bad = {"nan": torch.full((128, 4, 4), np.nan), "negative": -torch.ones(128, 4, 4), "words": "var"}
    for name, var in bad.items():
        torch.save({"mean": None, "var": var}, f"stat_{name}.pt")
    changed("dit_statless.pt", "dit_run/dit.pt", stats=None)
    torch.save(published_dit(dit.load_dit("dit_run/dit.pt")[0]), "bare.pt")
    model = diffusion_model(latent_dim=128, num_classes=2, allow_narrow=True)
    ours("dit_deep.pt", "dit", model, stats=torch.load("stat_run.pt"), shift=1.0, label_dropout=0.1, epoch=1.0)

    # published files, of 8 x 4 x 4 latents, and others that do not fit them
    torch.save(published_dit(diffusion_model()), "stage2.pt")
    torch.save(published_decoder(small_decoder()), "model.pt")
    torch.save({"mean": None, "var": torch.ones(8, 4, 4)}, "stat.pt")
    torch.save({"mean": None, "var": torch.ones(16, 4, 4)}, "stat16.pt")
    torch.save({"ema": published_dit(diffusion_model(seed=1))}, "guide.pt")
    torch.save(published_dit(diffusion_model(num_classes=4)), "guide4.pt")
    torch.save(published_dit(diffusion_model(grid=2)), "guide_grid.pt")
    torch.save(published_decoder(small_decoder(latent_dim=16)), "wide.pt")
    torch.save(published_decoder(small_decoder(grid=8)), "grid.pt")
    ours("mae.pt", "decoder", small_decoder(), "mae-b"), ours("tiny.pt", "decoder", small_decoder())
    rest = dict(stats=torch.load("stat.pt") | {"mean": torch.zeros(8, 4, 4)}, shift=1.0, label_dropout=0.1, epoch=1.0)
    ours("mae_guide.pt", "dit", diffusion_model(seed=1), "mae-b", **rest)
    ours("unconditional.pt", "dit", diffusion_model(num_classes=0), **rest)
    ours("undropped.pt", "dit", diffusion_model(), **rest | dict(label_dropout=0.0))

    # weights of the frozen networks
    save_tiny_dino(folder / "dino.pt")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).half().state_dict()  # 192 wide
    torch.save(vit, "vit.pt"), torch.save(damaged(vit, "nan"), "vit_nan.pt")
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate(fid.LPIPS.layers.values())},
               "heads.pt")  # fmt: skip

    # arrays
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    np.savez("a.npz", images), np.savez("five.npz", images[[0, 1, 2, 3, 0]])
    np.savez("odd.npz", images.repeat(2, 1).repeat(2, 2)[:, :20, :20])
    np.savez("float.npz", images / 255.0), np.savez("grey.npz", images[..., 0])
    np.savez("one.npz", images[:1]), np.savez("none.npz", images[:0]), np.savez("pixelless.npz", images[:, :0])
    np.savez("small.npz", images[:, :8, :8])
    np.savez("other.npz", x=images)
    np.savez("wide.npz", images.repeat(2, 1)[:, :24])
    np.savez("stats64.npz", mu=np.zeros(64), sigma=np.eye(64), features="random-tiny")
    np.savez("stats.npz", mu=np.zeros(128), sigma=np.eye(128), features="random-tiny")
    np.savez("stats_nan.npz", mu=np.full(128, np.nan), sigma=np.eye(128), features="random-tiny")
    np.savez("stats_mu.npz", mu=np.zeros(128), features="random-tiny")
    np.savez("stats_words.npz", mu=np.array(["a"] * 128), sigma=np.eye(128), features="random-tiny")
    inception = dict(mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    np.savez_compressed("inception.npz", **inception)
    np.savez_compressed("inception_nan.npz", **inception | dict(mu=np.full(2048, np.nan)))
    np.savez_compressed("inception_mu.npz", mu=inception["mu"])
    np.savez_compressed("inception_sigma.npz", mu=inception["mu"], sigma=np.eye(3))
    trap = np.array([Trap()], object)
    np.savez("trap.npz", arr_0=trap), np.savez("trap_mu.npz", mu=trap, sigma=np.eye(1), features="random-tiny")
    np.savez("trap_features.npz", mu=np.zeros(2), features=trap), np.savez("trap_settings.npz", settings=trap)
    np.savez("foreign.npz", arr_0=images, settings=np.frombuffer(b"{}", np.uint8))
    (folder / "text.npz").write_text("text")
    (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:1000])
    data = bytearray((folder / "a.npz").read_bytes())
    data[1000] ^= 255  # inside the pixels, which the zip's checksum covers
    (folder / "crc.npz").write_bytes(data)
    np.savez_compressed("later.npz", np.random.default_rng(0).integers(0, 99, (400, 16, 16, 3), np.uint8))
    data = bytearray((folder / "later.npz").read_bytes())
    data[200_000:200_100] = bytes(100)
    (folder / "later.npz").write_bytes(data)
    (folder / "scores.json").write_text("{}")
    (folder / "locked").mkdir(mode=0o555)


def listing(folder):
    """Every folder, and every file with what changes when it is written or replaced."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: path.is_dir() or (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def refused(world, monkeypatch, capfd, caplog):
    """refused(main, arguments) -> the one line with which it ended; the rest of the promise is checked here."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(encoders, "latent_statistics", lambda *_: pytest.fail("this may take an hour"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "cache"))

    def run(main, arguments):
        before, start = listing(world), (time.perf_counter(), time.process_time())
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as exit:
            main(arguments)
        seconds, busy = time.perf_counter() - start[0], time.process_time() - start[1]
        error, code = capfd.readouterr().err, exit.value.code
        if isinstance(code, str):  # which Python prints
            error, code = error + code + "\n", 1
        assert code in (1, 2)
        shown = [line.rpartition("\r")[2] for line in error.rstrip("\n").split("\n")]  # beside progress bars
        assert len(shown) == 1, error
        assert error.endswith("\n") and "Traceback" not in error, error
        assert not caplog.records and not warned, "these would be further lines"
        assert busy < 5 and seconds < 60, "told late"  # other work on the machine makes no test fail
        assert listing(world) == before, "something was written"
        return shown[0]

    return run


def table(text):
    rows = [[part.strip() for part in line.split(" | ")] for line in text.strip().splitlines()]
    return pytest.mark.parametrize("arguments, said", [(row[0], row[1:]) for row in rows], ids=[row[0] for row in rows])


def check(refused, name, arguments, said):
    script, command = COMMANDS[name]
    error = refused(script.main, shlex.split(f"{command} {arguments}"))
    assert said and all(part in error for part in said), error


# ---------------------------------------------------------------------------------------------------------------------
# The tables


@table("""
--preset Demo | 'Demo' | did you mean demo
--preset | --preset
--learning-rate 1e-3 | --learning-rate
--discstart 1 | --discstart | did you mean --disc-start
--data absent | --data absent | folder
--data photo.png | photo.png | folder
--data empty | empty | no images | give
--data texts | texts | no images
--data hole | hole/nothing | remove
--data loose | loose | stray.png | move
--out photo.png | photo.png | choose
--out photo.png/run | photo.png/run | choose
--out /dev/null/run | /dev/null/run | choose
--size 0 | --size 0 | above 0
--size 30 | 30 | multiple of 8
--size 33 --encoder-size 32 | --size 33 | multiple of
--size 32.5 | --size | 32.5
--encoder-size -32 | --encoder-size -32
--encoder-size 30 | 30 | multiple of 8
--resize 16 | --resize 16 | --size 32
--resize 0 | --resize 0
--encoder random-tin | random-tin | did you mean random-tiny
--encoder dinov2-x | dinov2-x | did you mean dinov2
--encoder resnet18 --encoder-weights foreign.pt | resnet18 | ResNet
--encoder-weights foreign.pt | --encoder-weights | random-tiny
--encoder dinov2-s | --encoder-weights | https://huggingface.co/timm/vit_small
--encoder dinov2-s --encoder-weights absent.pt | absent.pt | --encoder-weights
--encoder dinov2-s --encoder-weights data | data | --encoder-weights
--encoder dinov2-s --encoder-weights empty.pt | empty.pt | --encoder-weights
--encoder dinov2-s --encoder-weights text.pt | text.pt | --encoder-weights
--encoder dinov2-s --encoder-weights text.safetensors | text.safetensors | --encoder-weights
--encoder dinov2-s --encoder-weights list.pt | list.pt | --encoder-weights
--encoder dinov2-s --encoder-weights foreign.pt | foreign.pt | cls_token | --encoder-weights
--encoder dinov2-s --encoder-weights dino.pt | dino.pt | --encoder-weights
--encoder vit_tiny_patch16_224 --encoder-weights vit_nan.pt | vit_nan.pt | finite
--model ViT-XXL | 'ViT-XXL' | did you mean ViT-XL
--precision fp16 | 'fp16' | bf16
--device tpu | 'tpu' | cpu
--device cuda | --device cuda | --device cpu
--epochs nan | --epochs nan | number
--epochs 0 | --epochs 0.0 | above 0
--batch 0 | --batch 0 | above 0
--batch 2.5 | --batch | 2.5
--micro-batch -1 | --micro-batch -1 | above 0
--lr 0 | --lr 0.0 | above 0
--lr nan | --lr nan
--lr inf | --lr inf
--lr-end -1 | --lr-end -1.0
--tau -1 | --tau -1.0
--tau nan | --tau nan
--lpips -1 | --lpips -1.0
--gan nan | --gan nan
--beta1 1 | --beta1 1.0 | below 1
--beta2 nan | --beta2 nan
--ema 1 | --ema 1.0
--warmup -1 | --warmup -1.0
--disc-start 2 --gan-start 1 | --gan-start 1 | --disc-start 2
--save-every 0 | --save-every 0.0
--preview-every nan | --preview-every nan
--log-every 0 | --log-every 0
--seed -1 | --seed -1
--seed 99999999999999999999 | --seed 99999999999999999999
--workers -1 | --workers -1
--size 8 --lpips 1 | --size 8 | --lpips 0
--lpips 1 | --lpips-weights | --vgg-weights
--lpips 1 --lpips-weights absent.pt | absent.pt | --lpips-weights
--lpips 1 --lpips-weights text.pt | text.pt | --lpips-weights
--lpips 1 --lpips-weights foreign.pt | foreign.pt | --lpips-weights
--lpips 1 --lpips-weights heads.pt --vgg-weights absent.pt | absent.pt | --vgg-weights
--lpips 1 --lpips-weights heads.pt --vgg-weights empty.pt | empty.pt | --vgg-weights
--lpips 1 --lpips-weights heads.pt --vgg-weights heads.pt | heads.pt | --vgg-weights
--gan 1 | --dino-weights | https://huggingface.co/timm/vit_small_patch8_224.dino
--gan 1 --dino-weights absent.pt | absent.pt | --dino-weights
--gan 1 --dino-weights text.pt | text.pt | --dino-weights
--gan 1 --dino-weights heads.pt | heads.pt | --dino-weights
--out decoder_run --lr 1 | decoder_run | lr 0.002, now 1.0 | choose
--out decoder_run --tau 0.5 | decoder_run | tau 0.1, now 0.5 | choose
--out decoder_run --data flat --seed 7 | seed 0, now 7 | images 8, now 4
--out dit_run | dit_run/last.pt | no checkpoint of this script
--out decoder_run_text | decoder_run_text/last.pt | put back
--out decoder_run_empty | decoder_run_empty/last.pt | put back
--out decoder_run_lost | decoder_run_lost | no last.pt | choose
--out decoder_run_short --epochs 1 | decoder_run_short/last.pt | put back
--out decoder_run_shape --epochs 1 | decoder_run_shape/last.pt | put back
--out decoder_run_none --epochs 1 | decoder_run_none/last.pt | put back
--out decoder_run_step | decoder_run_step/last.pt | put back
""")
def test_train_decoder(refused, arguments, said):
    check(refused, "train_decoder", arguments, said)


@table("""
--preset imagenet25 | 'imagenet25' | did you mean imagenet256
--preset | --preset
--label-dropuot 0.1 | --label-dropuot | did you mean --label-dropout
--data absent | absent | folder
--data photo.png | photo.png | folder
--data empty | empty | no images
--data hole | hole/nothing | remove
--data loose | loose | stray.png | move
--out photo.png | photo.png | choose
--out photo.png/run | photo.png/run | choose
--size 0 | --size 0 | above 0
--size 33 | 33 | multiple of 8
--encoder nothing | nothing | random-tiny
--encoder dinov2b | dinov2b | did you mean dinov2-b
--encoder dinov2-s --encoder-weights absent.pt | absent.pt | --encoder-weights
--encoder dinov2-s --encoder-weights text.pt | text.pt | --encoder-weights
--encoder dinov2-s | --encoder-weights | https://huggingface.co/timm/vit_small
--encoder-weights foreign.pt | --encoder-weights | random-tiny
--model DiT-DH-XS | 'DiT-DH-XS' | did you mean DiT-DH-S or DiT-DH-XL?
--encoder vit_tiny_patch16_224 --encoder-weights vit.pt | 160 | 192-wide | DiT-DH-S | --allow-narrow
--precision f32 | 'f32' | float32
--device tpu | 'tpu' | cpu
--device cuda | --device cuda | --device cpu
--epochs nan | --epochs nan
--epochs -1 | --epochs -1.0
--batch 0 | --batch 0
--micro-batch 0 | --micro-batch 0
--lr 0 | --lr 0.0
--lr inf | --lr inf
--lr-end nan | --lr-end nan
--warmup -1 | --warmup -1.0
--clip -1 | --clip -1.0
--clip nan | --clip nan
--ema 1 | --ema 1.0
--ema nan | --ema nan
--label-dropout 1 | --label-dropout 1.0
--label-dropout nan | --label-dropout nan
--decay-start 9 --decay-end 3 | --decay-start 9.0 --decay-end 3.0
--decay-end nan | --decay-end nan
--shift-base 0 | --shift-base 0.0
--shift-base nan | --shift-base nan
--stats-images 0 | --stats-images 0
--save-every 0 | --save-every 0.0
--keep-every -1 | --keep-every -1.0
--preview-every inf | --preview-every inf
--log-every 0 | --log-every 0
--seed -1 | --seed -1
--seed 99999999999999999999 | --seed 99999999999999999999
--workers -1 | --workers -1
--stats absent.pt | absent.pt | --stats
--stats text.pt | text.pt | stat.pt
--stats empty.pt | empty.pt | stat.pt
--stats data | data | stat.pt
--stats foreign.pt | foreign.pt | weight | give
--stats '' | --stats ''
--stats stat16.pt | stat16.pt | (16, 4, 4) | (128, 4, 4)
--stats stat_nan.pt | stat_nan.pt | finite
--stats stat_negative.pt | stat_negative.pt | negative
--stats stat_words.pt | stat_words.pt | give
--stats dit_run/dit.pt | dit_run/dit.pt | dit
--init '' | --init ''
--init absent.pt | absent.pt | give
--init text.pt | text.pt | give
--init dit_cut.pt | dit_cut.pt | give
--init decoder_run/decoder.pt | decoder_run/decoder.pt | decoder
--init dit_short.pt | dit_short.pt | weight
--init dit_shape.pt | dit_shape.pt | weight
--init dit_nan.pt | dit_nan.pt | finite
--init dit_deep.pt | dit_deep.pt | depth 1 instead of 3 | --model
--init dit_mae.pt | dit_mae.pt | mae-b | --encoder
--init bare.pt | bare.pt | --stats
--decoder absent.pt | absent.pt | --decoder
--decoder text.pt | text.pt | give
--decoder decoder_cut.pt | decoder_cut.pt | give
--decoder dit_run/dit.pt | dit_run/dit.pt | not a decoder
--decoder decoder_nan.pt | decoder_nan.pt | finite
--decoder decoder_mae.pt | decoder_mae.pt | random-tiny | --preview-every 0
--decoder decoder_unsigned.pt | decoder_unsigned.pt | encoder
--decoder wide.pt | wide.pt | 32 px | --preview-every 0
--fid-every 1 | --fid-reference
--fid-reference inception.npz | --fid-every
--fid-every 1 --fid-reference inception.npz | --decoder
--fid-every 1 --fid-reference inception.npz --fid-num 1 --decoder decoder_run/decoder.pt | --fid-num 1
--fid-every 1 --fid-reference absent.npz --decoder decoder_run/decoder.pt | absent.npz | --fid-reference
--fid-every 1 --fid-reference data --decoder decoder_run/decoder.pt | data | --save-stats
--fid-every 1 --fid-reference stats64.npz --decoder decoder_run/decoder.pt | stats64.npz | --fid-reference
--fid-every 1 --fid-reference inception_nan.npz --decoder decoder_run/decoder.pt | inception_nan.npz | finite
--fid-every 1 --fid-reference inception_mu.npz --decoder decoder_run/decoder.pt | inception_mu.npz | --save-stats
--fid-every 1 --fid-reference inception_sigma.npz --decoder decoder_run/decoder.pt | inception_sigma.npz | --save-stats
--fid-every 1 --fid-reference inception.npz --decoder decoder_run/decoder.pt | --inception-weights | https
--fid-every 1 --fid-reference inception.npz --decoder decoder_run/decoder.pt --inception-weights absent.pt | absent.pt
--fid-every 1 --fid-reference inception.npz --decoder decoder_run/decoder.pt --inception-weights heads.pt | heads.pt
--out dit_run --lr 1 --qk-norm | dit_run | lr 0.003, now 1.0; qk_norm False, now True | choose
--out dit_run --unconditional | classes 2, now 0 | unconditional False, now True
--out dit_run --data flat | images 8, now 4 | classes 2, now 1
--out decoder_run | decoder_run/last.pt | no checkpoint of this script
--out dit_run_text | dit_run_text/last.pt | put back
--out dit_run_empty | dit_run_empty/last.pt | put back
--out dit_run_lost | dit_run_lost | no last.pt | choose
--out dit_run_short --epochs 1 | dit_run_short/last.pt | put back
--out dit_run_shape --epochs 1 | dit_run_shape/last.pt | put back
--out dit_run_none --epochs 1 | dit_run_none/last.pt | put back
--out dit_run_step | dit_run_step/last.pt | put back
""")
def test_train_dit(refused, arguments, said):
    check(refused, "train_dit", arguments, said)


@table("""
--preset demo2 | 'demo2' | did you mean demo
--preset | --preset
--unconditonal | --unconditonal | did you mean --unconditional
--dit absent.pt | absent.pt | give
--dit data | data | give
--dit empty.pt | empty.pt | give
--dit text.pt | text.pt | give
--dit photo.png | photo.png | give
--dit list.pt | list.pt | list
--dit foreign.pt | foreign.pt | weight
--dit dit_cut.pt | dit_cut.pt | give
--dit dit_short.pt | dit_short.pt | weight | give
--dit dit_shape.pt | dit_shape.pt | weight
--dit dit_nan.pt | dit_nan.pt | finite
--dit dit_statless.pt | dit_statless.pt | stats
--dit dit_unsigned.pt | dit_unsigned.pt | encoder
--dit dit_run/last.pt | dit_run/last.pt | found in it: train_dit
--dit stat.pt | stat.pt | mean | var
--dit model.pt | model.pt | not a diffusion model | decoder_pos_embed
--dit mae.pt | mae.pt | not a diffusion model | found in it: decoder
--decoder absent.pt | absent.pt | --decoder
--decoder text.pt | text.pt | give
--decoder decoder_cut.pt | decoder_cut.pt | give
--decoder decoder_short.pt | decoder_short.pt | weight
--decoder decoder_shape.pt | decoder_shape.pt | weight
--decoder decoder_nan.pt | decoder_nan.pt | finite
--decoder stage2.pt | stage2.pt | not a decoder | t_embedder.W
--decoder dit_run/dit.pt | dit_run/dit.pt | not a decoder | found in it: dit
--decoder stat.pt | stat.pt | mean
--decoder wide.pt | wide.pt | (16, 4, 4) | stage2.pt | (8, 4, 4)
--decoder grid.pt | grid.pt | (8, 8, 8) | (8, 4, 4)
--decoder mae.pt | mae.pt | encoder mae-b | dinov2-b | --encoder
--stats stat_run.pt --dit dit_run/dit.pt --decoder decoder_mae.pt | encoder mae-b | random-tiny
--stats absent.pt | absent.pt | --stats
--stats text.pt | text.pt | stat.pt
--stats stat16.pt | stat16.pt | (16, 4, 4) | (8, 4, 4)
--stats stage2.pt | stage2.pt | no latent statistics | t_embedder.W
--stats stat_nan.pt --dit dit_run/dit.pt --decoder decoder_run/decoder.pt | stat_nan.pt | finite
--stats stat_negative.pt --dit dit_run/dit.pt --decoder decoder_run/decoder.pt | stat_negative.pt | negative
--guide guide.pt | --guide guide.pt | 1.42
--guide absent.pt --scale 2 | absent.pt | give
--guide guide4.pt --scale 2 | guide4.pt | num_classes 4 instead of 6
--guide guide_grid.pt --scale 2 | guide_grid.pt | grid 2 instead of 4
--guide mae_guide.pt --scale 2 | mae_guide.pt | encoder mae-b instead of dinov2-b
--guide decoder_run/decoder.pt --scale 2 | decoder_run/decoder.pt | not a diffusion model
--encoder random-tiny --dit undropped.pt --scale 2 | --scale 2 | --guide
--scale 2 --unconditional | --scale 2 | --guide
--dit unconditional.pt --encoder random-tiny --scale 2 | --scale 2 | --guide
--scale nan | --scale nan
--scale inf | --scale inf
--scale -1 | --scale -1
--interval 0.5 0.2 | 0.5 0.2 | LOW <= HIGH
--interval nan 1 | nan 1 | LOW <= HIGH
--interval 0 2 | 0 2 | LOW <= HIGH
--interval 0.5 | --interval
--encoder dino | dino | did you mean dinov2
--classes 6 | --classes 6 | 0 to 5
--classes -1 | --classes -1 | 0 to 5
--classes dog | --classes | 'dog'
--classes 1 --num-samples 5 | --num-samples | --classes
--per-class 0 | --per-class 0
--steps 0 | --steps 0
--steps nan | --steps | 'nan'
--batch 0 | --batch 0
--seed -1 | --seed -1
--workers -1 | --workers -1
--precision fp32 | 'fp32' | float32
--device cuda | --device cuda | --device cpu
--per-class 10001 | 10001 | .npz
--out '' | --out ''
--per-class 10001 --out out.PNG | 10001 | .npz
--out x.jpg | x.jpg | .png
--out x.gif | x.gif | .png
--out x.pt | x.pt | .png
--out data | data | choose
--out text.pt | text.pt | .png
--out photo.png/x.png | photo.png/x.png | choose
--out photo.png/x.npz | photo.png/x.npz | choose
--out photo.png/x | photo.png/x | choose
--out folder.png | folder.png | choose
--out folder.npz | folder.npz | choose
--out folder.npz --overwrite | folder.npz | choose
--out foreign.npz | foreign.npz | --overwrite
--out text.npz | text.npz | --overwrite
--reconstruct '' | --reconstruct ''
--reconstruct absent | absent | --reconstruct
--reconstruct empty --decoder decoder_run/decoder.pt | empty | no images | give
--reconstruct hole --decoder decoder_run/decoder.pt | hole/nothing | remove
--reconstruct text.pt --decoder decoder_run/decoder.pt | text.pt | --reconstruct
--reconstruct damaged --decoder decoder_run/decoder.pt --out x.npz | damaged/1.png | repair
--reconstruct damaged --decoder decoder_run/decoder.pt --workers 1 | damaged/1.png | repair
--reconstruct damaged/1.png --decoder decoder_run/decoder.pt | damaged/1.png | --reconstruct
--reconstruct photo.png --decoder decoder_dino.pt --encoder-weights absent.pt | absent.pt | --encoder-weights
--reconstruct photo.png --decoder decoder_dino.pt --encoder-weights text.pt | text.pt | --encoder-weights
--reconstruct photo.png --decoder decoder_run/decoder.pt --out recon.npz | recon.npz | .png
--reconstruct photo.png --decoder decoder_run/decoder.pt --out photo.png | photo.png | --out
--reconstruct photo.png --decoder decoder_run/decoder.pt --out text.pt/x.png | text.pt/x.png | choose
--reconstruct photo.png --decoder decoder_run/decoder.pt --out folder.png | folder.png | choose
--reconstruct photo.png --decoder tiny.pt | tiny.pt | 128-wide
""")
def test_sample(refused, arguments, said):
    check(refused, "sample", arguments, said)


@table("""
a.npz | SAMPLES is missing
a.npz a.npz --pairred | --pairred
absent.npz a.npz | REFERENCE absent.npz | not there
text.npz a.npz | REFERENCE text.npz | neither a folder of images nor a whole npz
photo.png a.npz | REFERENCE photo.png | neither a folder of images nor a whole npz
a.npz cut.npz | SAMPLES cut.npz | whole npz
a.npz dit_run/dit.pt | SAMPLES dit_run/dit.pt | give images (arr_0)
a.npz float.npz | SAMPLES float.npz: arr_0 is float64 (4, 16, 16, 3): images must be uint8
grey.npz a.npz | grey.npz: arr_0 is uint8 (4, 16, 16): images must be uint8 (N, H, W, 3)
a.npz one.npz | one.npz: holds 1 images: give at least 2
none.npz a.npz | none.npz: holds 0 images: give at least 2
pixelless.npz pixelless.npz | pixelless.npz | (4, 0, 16, 3)
a.npz empty | SAMPLES empty | no images
a.npz hole | hole/nothing | remove
a.npz loose | loose | stray.png
a.npz other.npz | other.npz: holds ['x']: give images (arr_0) or statistics of random-tiny
inception.npz a.npz | inception.npz: holds ['mu', 'sigma']: give images
stats64.npz a.npz | stats64.npz | has D = 128
stats_mu.npz a.npz | stats_mu.npz | has D = 128
stats_nan.npz a.npz | stats_nan.npz | finite
stats_words.npz a.npz | stats_words.npz | measure
stats.npz stats_nan.npz | stats_nan.npz | finite
a.npz five.npz --paired | not 4 images of 16 x 16 and 5 images of 16 x 16
a.npz wide.npz | not 4 images of 16 x 16 and 4 images of 24 x 16
small.npz small.npz --paired | at least 16 pixels
stats.npz a.npz --paired | stats.npz holds statistics alone
odd.npz odd.npz | image size 20 | multiple of 8
a.npz a.npz --features random-tin | random-tin | did you mean random-tiny
a.npz a.npz --features incepton | incepton | random-tiny
a.npz a.npz --features inception | --inception-weights | https
a.npz a.npz --features inception --inception-weights absent.pt | absent.pt | --inception-weights
a.npz a.npz --features inception --inception-weights text.pt | text.pt | --inception-weights
a.npz a.npz --features inception --inception-weights list.pt | list.pt | --inception-weights
a.npz a.npz --features inception --inception-weights heads.pt | heads.pt | --inception-weights
a.npz a.npz --features dinov2-s --encoder-weights foreign.pt | foreign.pt | --encoder-weights
a.npz a.npz --encoder-weights foreign.pt | --encoder-weights | random-tiny
a.npz a.npz --paired | --lpips-weights | https
a.npz a.npz --paired --lpips-weights absent.pt | absent.pt | --lpips-weights
a.npz a.npz --paired --lpips-weights empty.pt | empty.pt | --lpips-weights
a.npz a.npz --paired --lpips-weights heads.pt --vgg-weights text.pt | text.pt | --vgg-weights
a.npz a.npz --paired --lpips-weights heads.pt --vgg-weights heads.pt | heads.pt | --vgg-weights
a.npz a.npz --batch 0 | --batch 0: give at least 1
a.npz a.npz --size -1 | --size -1: give at least 1
a.npz a.npz --size nan | --size | 'nan'
a.npz a.npz --workers -1 | --workers -1: give at least 0
a.npz a.npz --device tpu | 'tpu' | cpu
a.npz a.npz --device cuda | --device cuda | --device cpu
a.npz a.npz --json scores.json | scores.json exists: pass --overwrite
a.npz --save-stats five.npz | five.npz exists: pass --overwrite
a.npz a.npz --json no/scores.json | no/scores.json is not a file in an existing folder
a.npz a.npz --json folder.json --overwrite | folder.json is not a file
a.npz a.npz --json photo.png/x.json | photo.png/x.json is not a file
a.npz --save-stats a.npz --overwrite | a.npz is an input
a.npz a.npz --json x.npz --save-stats x.npz | x.npz
stats.npz --save-stats new.npz | stats.npz holds random-tiny statistics already
a.npz crc.npz | SAMPLES crc.npz | CRC
a.npz later.npz | of later.npz (Bad CRC-32 | repair
a.npz damaged --size 16 | damaged/1.png | repair
a.npz damaged --size 16 --workers 1 | damaged/1.png | repair
""")
def test_fid(refused, arguments, said):
    check(refused, "fid", arguments, said)


@pytest.mark.parametrize("name, command, said", [
    ("train_decoder", "", ["--data"]),
    ("train_dit", "", ["--data"]),
    ("sample", "", ["runs/imagenet256/dit/dit.pt", "give"]),
    ("sample", "--preset demo --dit stage2.pt --decoder model.pt", ["stage2.pt", "--stats"]),
    ("fid", "", ["REFERENCE"]),
])  # fmt: skip
def test_what_is_missing(refused, name, command, said):
    error = refused(COMMANDS[name][0].main, command.split())
    assert all(part in error for part in said), error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name, arguments", [
    ("train_decoder", "--out locked/run"), ("train_dit", "--out locked"), ("sample", "--out locked/x.png"),
    ("sample", "--out locked/x"), ("fid", "a.npz a.npz --json locked/x.json"), ("fid", "a.npz --save-stats locked/x"),
])  # fmt: skip
def test_folders_that_may_not_be_written(refused, name, arguments):
    check(refused, name, arguments, ["locked", "change" if name == "fid" else "choose"])


# ---------------------------------------------------------------------------------------------------------------------
# Files that would run code

TRAPS = """
train_decoder | --encoder dinov2-s --encoder-weights TRAP
train_decoder | --lpips 1 --lpips-weights TRAP
train_decoder | --lpips 1 --lpips-weights heads.pt --vgg-weights TRAP
train_decoder | --gan 1 --dino-weights TRAP
train_decoder | --out decoder_run_TRAP
train_dit | --encoder dinov2-s --encoder-weights TRAP
train_dit | --decoder TRAP
train_dit | --stats TRAP
train_dit | --init TRAP
train_dit | --fid-every 1 --decoder decoder_run/decoder.pt --fid-reference trap.npz
train_dit | --fid-every 1 --decoder decoder_run/decoder.pt --fid-reference trap_mu.npz
train_dit | --fid-every 1 --decoder decoder_run/decoder.pt --fid-reference inception.npz --inception-weights TRAP
train_dit | --out dit_run_TRAP
sample | --dit TRAP
sample | --decoder TRAP
sample | --stats TRAP
sample | --guide TRAP --scale 2
sample | --reconstruct photo.png --decoder decoder_dino.pt --encoder-weights TRAP
sample | --reconstruct TRAP --decoder decoder_run/decoder.pt
sample | --out trap_settings.npz
fid | a.npz trap.npz
fid | trap_mu.npz a.npz
fid | trap_features.npz a.npz
fid | a.npz TRAP
fid | a.npz a.npz --features inception --inception-weights TRAP
fid | a.npz a.npz --features dinov2-s --encoder-weights TRAP
fid | a.npz a.npz --paired --lpips-weights TRAP
fid | a.npz a.npz --paired --lpips-weights heads.pt --vgg-weights TRAP
"""
TRAPS = [line.replace("TRAP", kind).split(" | ") for line in TRAPS.strip().splitlines()
         for kind in (["trap.pt", "trap.bin"] if "TRAP" in line else [""])]  # fmt: skip


@pytest.mark.parametrize("name, arguments", TRAPS, ids=[" ".join(row) for row in TRAPS])
def test_no_file_runs_code(refused, world, name, arguments):
    check(refused, name, arguments, [re.findall(r"\S*trap\S*", arguments)[-1]])
    assert not (world / "sprung").exists()


def test_the_traps_work(world, tmp_path, monkeypatch):
    """Loaded carelessly, each of these files makes its folder."""
    monkeypatch.chdir(tmp_path)
    for name, load in {
        "trap.pt": lambda path: torch.load(path, weights_only=False),
        "decoder_run_trap.pt/last.pt": lambda path: torch.load(path, weights_only=False),
        "trap.bin": lambda path: pickle.loads(path.read_bytes()),
        **{f"trap{name}.npz": lambda path: dict(np.load(path, allow_pickle=True))
           for name in ("", "_mu", "_features", "_settings")},
    }.items():  # fmt: skip
        load(world / name)
        os.rmdir("sprung")


def test_every_load_is_a_safe_one_and_has_its_trap():
    loads, rows = 0, [" ".join(row) for row in TRAPS]
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call):
                name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert not name.startswith(("pickle", "marshal", "joblib")) and name not in ("eval", "exec")
                assert "allow_pickle" not in given
                if name in ("torch.load", "torch.hub.load_state_dict_from_url", "timm.models.load_state_dict"):
                    assert given["weights_only"] == "True", (path.name, call.lineno)
                    loads += 1
        for flag in re.findall(r'add\("(--[a-z-]+)",[^\n]*metavar="(?:PATH|NPZ)"', source):
            assert any(row.startswith(path.stem) and f"{flag} trap" in row for row in rows), (path.name, flag)
    assert loads == 8


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere


@pytest.mark.parametrize("command, line", [
    ("train_dit.py --preset demo --batch 5", "--batch 5 does not divide over 2 processes"),
])  # fmt: skip
def test_one_of_several_processes_speaks(tmp_path, command, line):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script, *arguments = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, str(ROOT / script), *arguments], cwd=tmp_path, env=environment, capture_output=True,
                         text=True, timeout=100)  # fmt: skip
    (error,) = [shown for shown in run.stderr.splitlines() if "error: " in shown and script in shown]
    assert run.returncode and error.startswith(f"{script}: error: ") and line in error
    assert not list(tmp_path.iterdir())


def test_what_works_is_not_refused(world, tmp_path, monkeypatch):
    """The commands that the rows add to; those of the trainers have made the runs in `world`."""
    monkeypatch.chdir(world)
    sample.main([*COMMANDS["sample"][1].split(), "--out", str(tmp_path / "out.png")])
    fid.main([*COMMANDS["fid"][1].split(), "a.npz", "a.npz", "--json", str(tmp_path / "scores.json")])
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "scores.json"}
    for run in ("decoder_run", "dit_run"):
        assert torch.load(f"{run}/last.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_defaults_that_there_are(name, capsys):
    with pytest.raises(SystemExit) as exit:
        COMMANDS[name][0].main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and not re.search(r"default:? (None|False)", printed)
    known = {"train_decoder": "(default: 0.0002)", "train_dit": "(default: 0.0002)", "sample": "(default: 50)",
             "fid": "(default: 256)"}  # fmt: skip
    assert known[name] in printed


def test_demo_check_needs_the_demo(refused):
    assert "demo/dit/dit.pt" in refused(demo_check.main, ["--runs", "demo"])
