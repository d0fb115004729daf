"""sample.py through its command line: published and our own files, outputs, guidance."""

import argparse
import contextlib
import os
import socket

import numpy as np
import pytest
import torch
from conftest import published_decoder, published_dit, randomize
from PIL import Image

import decoder as decoders
import dit as dits
import encoder as encoders
import sample

TRUNK = {key: value for key, value in dits.SIZES["DiT-DH-tiny"].items() if "head_" not in key}
LATENT = dict(latent_dim=8, grid=4)
RECORD = dict(name="random-tiny", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)


def diffusion_model(seed=0, num_classes=6, **other):
    torch.manual_seed(seed)  # the frequencies of the time are drawn, and saved
    model = randomize(dits.DiT(**(LATENT | TRUNK | dict(num_classes=num_classes, depth=1) | other)), seed, std=0.05)
    model.y_embedder.embedding_table.weight.mul_(20)  # so that the class shows
    return model


def small_decoder(seed=3, **other):
    model = randomize(
        decoders.Decoder(**(LATENT | dict(patch=2, width=128, depth=1, heads=4, mlp=64) | other)), seed, 0.05
    )
    model.embed.weight.mul_(10)  # so that the latents show
    return model


def ours(path, kind, model, name="random-tiny", **other):
    torch.save(
        dict(kind=kind, config=model.config, model=model.state_dict(), encoder=RECORD | dict(name=name), **other), path
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Published and our own files of one small pair."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    stats = {"mean": torch.randn(8, 4, 4, generator=generator), "var": torch.rand(8, 4, 4, generator=generator) + 0.5}
    rest = dict(stats=stats, shift=20.0, label_dropout=0.1, epoch=1.0)
    torch.save(published_dit(diffusion_model()), folder / "stage2.pt")
    torch.save({"ema": published_dit(diffusion_model(seed=1))}, folder / "guide.pt")
    torch.save(published_decoder(small_decoder()), folder / "model.pt")
    torch.save({"mean": None, "var": stats["var"]}, folder / "stat.pt")
    ours(folder / "dit.pt", "dit", diffusion_model(), **rest)
    ours(folder / "decoder.pt", "decoder", small_decoder(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)), epoch=1.0)
    ours(folder / "unconditional.pt", "dit", diffusion_model(num_classes=0), **rest)
    Image.effect_noise((40, 60), 90).convert("RGB").save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def inside(files, monkeypatch):
    monkeypatch.chdir(files)


PUBLISHED = ["--dit", "stage2.pt", "--decoder", "model.pt", "--stats", "stat.pt"]
OURS = ["--dit", "dit.pt", "--decoder", "decoder.pt"]
QUICK = ["--steps", "4", "--device", "cpu"]


def images(path, *arguments):
    sample.main([*map(str, arguments), *QUICK, "--out", str(path)])
    with np.load(path) as file:
        return file["arr_0"]


def by_hand(labels, seed=0, scale=1.0, guide=None, interval=(0.0, 1.0), heun=False, shift=1.0):
    """What the published files draw, written out with the models themselves."""
    model, decoder = diffusion_model(), small_decoder(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    noise = torch.stack([
        torch.from_numpy(np.random.default_rng((seed, i)).standard_normal((8, 4, 4), dtype=np.float32))
        for i in range(len(labels))
    ])  # fmt: skip
    y, null = torch.tensor(labels), torch.full((len(labels),), 6)
    times = [shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]

    def velocity(x, t):
        t = torch.full((len(x),), t)
        v = model(x, t, y)
        if interval[0] <= t[0] <= interval[1]:
            weak = guide(x, t, y) if guide else model(x, t, null)
            v = weak + scale * (v - weak)
        return v

    x = noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        if heun and t_next:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    z = x * (torch.load("stat.pt")["var"] + 1e-5).sqrt()
    return (decoder(z).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()


def same(a, b):
    """Equal up to the rounding of a float that lies between two levels."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("arguments, settings", [
    ([], {}),
    (["--seed", "7"], dict(seed=7)),
    (["--scale", "3"], dict(scale=3.0)),
    (["--scale", "3", "--interval", "0.3", "0.75"], dict(scale=3.0, interval=(0.3, 0.75))),
    (["--guide", "guide.pt", "--scale", "1.42"], dict(scale=1.42, guide=1)),
    (["--heun", "--scale", "3"], dict(scale=3.0, heun=True)),
    (["--unconditional"], dict(labels=[6] * 4)),
])  # fmt: skip
def test_published_files_draw_what_the_models_give(tmp_path, arguments, settings):
    """`sample.py --dit stage2_model.pt --decoder model.pt --stats stat.pt --classes ...`, against the formulas."""
    drawn = images(tmp_path / "x.npz", *PUBLISHED, "--classes", 4, 0, "--per-class", 2, *arguments)
    settings = dict(labels=[4, 4, 0, 0]) | settings
    if "guide" in settings:
        settings["guide"] = diffusion_model(seed=1)
    expected = by_hand(**settings)
    assert same(drawn, expected)
    assert drawn.std() > 10 and ((drawn > 0) & (drawn < 255)).mean() > 0.5, "the test can see differences"
    for other in ({}, dict(seed=7), dict(scale=3.0), dict(labels=[6] * 4), dict(scale=3.0, heun=True)):
        if dict(labels=[4, 4, 0, 0]) | other != settings:
            assert not same(drawn, by_hand(**(dict(labels=[4, 4, 0, 0]) | other))), other


def test_guidance_that_changes_nothing(tmp_path):
    classes = [*PUBLISHED, "--classes", 4, 0, "--per-class", 2]
    plain = images(tmp_path / "plain.npz", *classes)
    assert same(images(tmp_path / "one.npz", *classes, "--scale", 1), plain)
    assert same(images(tmp_path / "self.npz", *classes, "--guide", "stage2.pt", "--scale", 3), plain)
    outside = images(tmp_path / "outside.npz", *classes, "--scale", 3, "--interval", "0.3", "0.4")
    assert same(outside, plain), "no time of the grid lies in the interval"


def test_guidance_of_all_times_guides_every_step():
    """t' of t = 1 is a hair above 1 in float32 for these latents; the default interval ends at 1."""
    seen = []

    def weak(x, t, y):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    velocity = dits.guided(lambda x, t, y: x, torch.zeros(1).long(), 1.42, weak)
    dits.sample(velocity, torch.randn(1, 2, 2, 2), 50, dits.shift_for((384, 16, 16)))
    assert len(seen) == 50 and seen[0] == 1


def test_a_batch_script_of_slurm_is_no_launch_of_several_processes(monkeypatch):
    """Its job has SLURM_NTASKS tasks, but this command is none of them: timm would wait for the others."""
    monkeypatch.setenv("WORLD_SIZE", "")  # so that it is put back
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(device="cpu", precision="float32")
    device, _ = encoders.set_up(args)
    assert device.type == "cpu" and (args.distributed, args.rank, args.world_size) == (False, 0, 1)


def test_our_files_know_their_statistics_shift_and_pixels(tmp_path):
    ours = images(tmp_path / "ours.npz", *OURS, "--classes", 1, 2, "--per-class", 1)
    stats = torch.load("dit.pt")["stats"]
    torch.save(stats, tmp_path / "stat.pt")
    noise = dits.sample_noise(0, range(2), (8, 4, 4))
    x = dits.sample(dits.guided(diffusion_model(), torch.tensor([1, 2])), noise, 4, shift=20.0)
    decoder = small_decoder(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    assert same(ours, decoders.to_uint8(decoder(dits.denormalize(x, stats))).numpy())
    bare = images(tmp_path / "bare.npz", "--dit", "stage2.pt", "--decoder", "decoder.pt", "--encoder", "random-tiny",
                  "--stats", tmp_path / "stat.pt", "--classes", 1, 2, "--per-class", 1)  # fmt: skip
    assert not same(bare, ours), "a published model has the shift of its latents, here 1, ours the recorded one"


def test_labels_in_turn_and_unconditional_models(tmp_path):
    assert same(images(tmp_path / "num.npz", *PUBLISHED, "--num", 8), by_hand([0, 1, 2, 3, 4, 5, 0, 1]))
    drawn = images(tmp_path / "u.npz", "--dit", "unconditional.pt", "--decoder", "decoder.pt", "--num", 3)
    model, stats = diffusion_model(num_classes=0), torch.load("dit.pt")["stats"]
    noise, y = dits.sample_noise(0, range(3), (8, 4, 4)), torch.zeros(3, dtype=torch.long)
    x = dits.sample(dits.guided(model, y), noise, 4, shift=20.0)
    decoder = small_decoder(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    assert same(drawn, decoders.to_uint8(decoder(dits.denormalize(x, stats))).numpy())


def on_rank(rank, ports, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for port, arguments in zip(ports, (
        ["--batch", "2", "--out", "two.npz"],
        ["--seed", "1", "--out", "two"],
        ["--overwrite", "--out", "two"],  # replaces the last one: every rank has to draw its share again
    ), strict=True):  # fmt: skip
        os.environ["MASTER_PORT"] = str(port)
        sample.main([*PUBLISHED, "--num", "7", *QUICK, *arguments])


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def test_sample_i_is_the_same_for_any_batch_and_process_count(files, tmp_path):
    one = images(tmp_path / "one.npz", *PUBLISHED, "--num", 7, "--batch", 7)
    assert len({image.tobytes() for image in one}) == 7
    for batch in (1, 3):
        assert same(images(tmp_path / f"{batch}.npz", *PUBLISHED, "--num", 7, "--batch", batch), one)
    assert same(images(tmp_path / "few.npz", *PUBLISHED, "--num", 2), one[:2])
    torch.multiprocessing.spawn(on_rank, (free_ports(3), str(files)), nprocs=2)
    with np.load("two.npz") as file:
        assert same(file["arr_0"], one)
    folder = [np.asarray(Image.open(f"two/{i:06}.png")) for i in range(7)]
    assert same(np.stack(folder), one)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_grid_is_row_by_row_and_replaced(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    for seed in ("1", "0"):
        sample.main(
            [*PUBLISHED, "--classes", "4", "0", "5", "--per-class", "2", "--seed", seed, *QUICK, "--out", str(out)]
        )
    picture, expected = np.asarray(Image.open(out)), by_hand([4, 4, 0, 0, 5, 5])
    assert picture.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3)
    for i, image in enumerate(expected):
        top, left = i // 2 * 10, i % 2 * 10
        assert same(picture[top : top + 8, left : left + 8], image)
    assert (picture[8:10] == 255).all() and (picture[:, 8:10] == 255).all()
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"], "nothing else is left"
    assert f"6 images in {out}" in capsys.readouterr().out
    sample.main([*PUBLISHED, "--num", "3", *QUICK, "--out", str(out)])
    assert Image.open(out).size == (3 * 8 + 2 * 2, 8), "a row that is not full has no empty places"


def test_npz_is_finished_or_refused_or_replaced(tmp_path, capsys):
    out = tmp_path / "x.npz"
    first = images(out, *PUBLISHED, "--num", 3)
    time = out.stat().st_mtime_ns
    capsys.readouterr()
    images(out, *PUBLISHED, "--num", 3)
    assert capsys.readouterr().out.startswith("finished") and out.stat().st_mtime_ns == time
    for other in (["--seed", "1"], ["--steps", "5"], ["--scale", "2"], ["--guide", "guide.pt", "--scale", "2"]):
        with pytest.raises(SystemExit) as exit:
            sample.main([*PUBLISHED, "--num", "3", *QUICK, *other, "--out", str(out)])
        assert exit.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == time
    second = images(out, *PUBLISHED, "--num", 3, "--seed", 1, "--overwrite")
    assert not same(first, second) and [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    np.savez(tmp_path / "foreign.npz", arr_0=first)
    with pytest.raises(SystemExit):
        images(tmp_path / "foreign.npz", *PUBLISHED, "--num", 3)


def test_a_folder_is_completed(tmp_path, capsys):
    out = tmp_path / "x"
    arguments = [*PUBLISHED, "--num", "5", *QUICK, "--out", str(out)]
    sample.main(arguments)
    content = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert sorted(content) == [f"{i:06}.png" for i in range(5)]
    assert same(np.stack([np.asarray(Image.open(out / name)) for name in sorted(content)]), by_hand([0, 1, 2, 3, 4]))
    (out / "000001.png").unlink()
    (out / "000003.png").unlink()
    kept = (out / "000000.png").stat().st_mtime_ns
    sample.main(arguments)
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == content
    assert (out / "000000.png").stat().st_mtime_ns == kept, "what was there is not drawn again"

    with pytest.raises(SystemExit):
        sample.main([*arguments, "--seed", "1"])
    # An interrupted replacement must not leave old images among the new ones.
    draw, calls = decoders.to_uint8, []

    def interrupted(pixels):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(pixels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoders, "to_uint8", interrupted)
        sample.main([*arguments, "--seed", "1", "--batch", "2", "--overwrite"])
    assert len(list(out.glob("*.png"))) == 2
    sample.main([*arguments, "--seed", "1"])
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
    assert same(drawn, by_hand([0, 1, 2, 3, 4], seed=1))


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


@pytest.fixture(scope="module")
def upsampling(files):
    """A decoder for the encoder at 32 px (4 x 4 tokens) that puts out 64 px: the paper's decoder upsampling."""
    model = small_decoder(latent_dim=128, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    ours(files / "upsampling.pt", "decoder", model)
    return model


def reconstruct(model, image):
    encoder = encoders.Encoder("random-tiny", 32)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    assert pixels.shape[-1] == 64  # the encoder resizes it to 32
    return decoders.to_uint8(model(encoder(pixels)))[0].numpy()


def test_reconstruct_a_photo(upsampling, tmp_path):
    out = tmp_path / "new" / "recon.png"
    sample.main(["--decoder", "upsampling.pt", "--reconstruct", "photo.png", "--device", "cpu", "--out", str(out)])
    picture = np.asarray(Image.open(out))
    assert picture.shape == (64, 64 + 2 + 64, 3)
    photo = encoders.center_crop(Image.open("photo.png"), 64)
    np.testing.assert_array_equal(picture[:, :64], photo)
    assert same(picture[:, 66:], reconstruct(upsampling, photo))


@pytest.mark.parametrize("workers", [0, 2])
def test_reconstruct_a_folder(upsampling, tmp_path, workers):
    (tmp_path / "in").mkdir()
    photos = [Image.effect_noise((90 + i, 70), 40 * i + 10).convert("RGB") for i in range(5)]
    for i, photo in enumerate(photos):
        photo.save(tmp_path / "in" / f"{i}.png")
    photo_args = ["--reconstruct", str(tmp_path / "in"), "--workers", workers]
    arguments = ["--decoder", "upsampling.pt", "--batch", "2", *photo_args]
    drawn = images(tmp_path / "recon.npz", *arguments)
    assert same(drawn, np.stack([reconstruct(upsampling, encoders.center_crop(photo, 64)) for photo in photos]))
    photos[0].save(tmp_path / "in" / "9.png")  # the folder has grown: not what was finished
    with pytest.raises(SystemExit):
        images(tmp_path / "recon.npz", *arguments)
