"""sample.py through its command line: published and our own files, labels, trajectories, outputs, reconstruction."""

import os
import signal
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import finish, make_images, published_decoder, published_dit, randomize, start_ranks
from PIL import Image

import decoder as decoders
import dit as dits
import encoder as encoders
import sample

TRUNK = {key: value for key, value in dits.SIZES["DiT-DH-tiny"].items() if "head_" not in key}
LATENT = dict(latent_dim=8, grid=4)
RECORD = dict(name="random-tiny", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def diffusion_model(seed=0, num_classes=6, **other):
    torch.manual_seed(seed)  # the frequencies of the time are drawn, and saved
    model = randomize(dits.DiT(**(LATENT | TRUNK | dict(num_classes=num_classes, depth=1) | other)), seed, std=0.05)
    model.y_embedder.embedding_table.weight.mul_(20)  # so that the class shows
    return model


def small_decoder(seed=3, **other):
    settings = LATENT | dict(patch=2, width=128, depth=1, heads=4, mlp=64) | other
    model = randomize(decoders.Decoder(**settings), seed, 0.05)
    model.embed.weight.mul_(10)  # so that the latents show
    return model


def ours(path, kind, model, name="random-tiny", **other):
    record = RECORD | dict(name=name)
    torch.save(dict(kind=kind, config=model.config, model=model.state_dict(), encoder=record, **other), path)


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
    ours(folder / "dit.pt", "dit", diffusion_model(), classes=NAMES, **rest)
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


def run(out, *arguments):
    sample.main([*QUICK, *map(str, arguments), "--out", str(out)])


def images(path, *arguments):
    run(path, *arguments)
    with np.load(path) as file, zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].file_size == 128 + file["arr_0"].nbytes, "no image too many"
        return file["arr_0"]


def refused(capsys, *arguments):
    """The one line by which the script refuses these arguments."""
    with pytest.raises(SystemExit) as exit:
        sample.main([*QUICK, *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def by_hand(labels, seed=0, scale=1.0, guide=None, interval=(0.0, 1.0), steps=4, trajectory=False):
    """What the published files draw, written out with the models themselves; or the estimates of all steps."""
    model, decoder = diffusion_model(), small_decoder(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    noise = [np.random.default_rng((seed, i)).standard_normal((8, 4, 4), dtype=np.float32) for i in range(len(labels))]
    y, null = torch.tensor(labels), torch.full((len(labels),), 6)

    def velocity(x, t):
        t = torch.full((len(x),), t)
        v = model(x, t, y)
        if interval[0] <= t[0] <= interval[1]:
            weak = guide(x, t, y) if guide else model(x, t, null)
            v = weak + scale * (v - weak)
        return v

    def pixels(x):
        z = x * (torch.load("stat.pt")["var"] + 1e-5).sqrt()
        return (decoder(z).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()

    x, estimates = torch.from_numpy(np.stack(noise)), []
    for step in range(steps):
        t = 1 - step / steps
        v = velocity(x, t)
        estimates.append(pixels(x - t * v))
        x = x - v / steps
    return estimates if trajectory else pixels(x)


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
    (["--unconditional"], dict(labels=[6] * 4)),
])
def test_published_files_draw_what_the_models_give(tmp_path, arguments, settings):
    """`sample.py --dit stage2_model.pt --decoder model.pt --stats stat.pt --classes ...`, against the formulas."""
    drawn = images(tmp_path / "x.npz", *PUBLISHED, "--classes", 4, 0, "--per-class", 2, *arguments)
    settings = dict(labels=[4, 4, 0, 0]) | settings
    if "guide" in settings:
        settings["guide"] = diffusion_model(seed=1)
    assert same(drawn, by_hand(**settings))
    assert drawn.std() > 10 and ((drawn > 0) & (drawn < 255)).mean() > 0.5, "the test can see differences"
    for other in ({}, dict(seed=7), dict(scale=3.0), dict(labels=[6] * 4)):
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
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, value)
    args = Namespace(device="cpu", precision="float32", compile=None)
    device, _ = encoders.set_up(args)
    assert device.type == "cpu" and (args.rank, args.world_size) == (0, 1)
    assert not torch.distributed.is_initialized()


def test_our_files_know_their_statistics_shift_and_pixels(tmp_path):
    ours = images(tmp_path / "ours.npz", *OURS, "--classes", 1, 2, "--per-class", 1)
    stats = torch.load("dit.pt")["stats"]
    torch.save(stats, tmp_path / "stat.pt")
    noise = dits.sample_noise(0, range(2), (8, 4, 4))
    x = dits.sample(dits.guided(diffusion_model(), torch.tensor([1, 2])), noise, 4, shift=20.0)
    decoder = small_decoder(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    assert same(ours, decoders.to_uint8(decoder(dits.denormalize(x, stats))).numpy())
    bare = images(tmp_path / "bare.npz", "--dit", "stage2.pt", "--decoder", "decoder.pt", "--encoder", "random-tiny",
                  "--stats", tmp_path / "stat.pt", "--classes", 1, 2, "--per-class", 1)
    assert not same(bare, ours), "a published model has the shift of its latents, here 1, ours the recorded one"


def test_compiled_blocks_meet_one_shape_and_draw_the_same(tmp_path, graphs):
    """A smaller last batch is filled up: one graph for the decoder's blocks and one for those of model and guide."""
    arguments = [*OURS, "--guide", "guide.pt", "--encoder", "random-tiny", "--scale", 2, "--num-samples", 5]
    drawn = images(tmp_path / "compiled.npz", *arguments, "--batch", 3, "--compile")
    assert len(graphs) == 2
    assert same(drawn, images(tmp_path / "eager.npz", *arguments, "--batch", 5))
    assert len(graphs) == 2, "on a CPU nothing is compiled unless it is asked for"


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def test_classes_by_name_and_number(tmp_path):
    arguments = [*OURS, "--per-class", 2, "--classes"]
    numbers = images(tmp_path / "numbers.npz", *arguments, 4, 0, 5)
    np.testing.assert_array_equal(images(tmp_path / "names.npz", *arguments, "eel", "ant", "fox"), numbers)
    np.testing.assert_array_equal(images(tmp_path / "mixed.npz", *arguments, "eel", 0, "fox"), numbers)
    assert not same(images(tmp_path / "other.npz", *arguments, "bee", 0, "fox"), numbers)


def labels_of(classes=None, names=(), num_classes=6, **other):
    args = Namespace(**dict(classes=classes, per_class=1, num_samples=None, unconditional=False, dit="dit.pt") | other)
    return sample.labels_of(args, Namespace(num_classes=num_classes, null_class=num_classes), names)


def test_labels():
    assert labels_of(["3", "1"], per_class=2) == [3, 3, 1, 1]
    assert labels_of(num_classes=1000) == list(range(10)), "the model's own first ten"
    assert labels_of(per_class=2) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "or as many as it has"
    assert labels_of(["1", "2", "x"], names=["1", "2", "4", "x"], num_classes=4) == [1, 2, 3], "a number is a number"
    assert labels_of(names=["1", "2", "4", "x"], num_classes=4) == [0, 1, 2, 3]
    assert labels_of(num_samples=8) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert labels_of(num_samples=3, unconditional=True) == [6, 6, 6]
    assert labels_of(num_samples=3, num_classes=0) == labels_of(num_classes=0, per_class=3) == [0, 0, 0]
    assert labels_of(["3", "1"], per_class=2, unconditional=True) == [6] * 4


def test_images_of_each_class():
    def per_class(*flags):
        return sample.parse_args(list(flags))[1].per_class

    assert (per_class(), per_class("--preset", "demo")) == (4, 10)
    assert per_class("--trajectory") == per_class("--trajectory", "--preset", "demo") == 1
    assert per_class("--trajectory", "--per-class", "3") == per_class("--per-class", "3") == 3


@pytest.mark.parametrize("arguments, said", [
    ([*OURS, "--classes", "3", "cow"],
     "--classes cow: dit.pt knows 0 to 5, ant, bee, cat, dog, eel"),
    ([*OURS, "--classes", "6"], "--classes 6: dit.pt knows 0 to 5, ant, bee, cat, dog, eel"),
    ([*PUBLISHED, "--classes", "-1"], "--classes -1: stage2.pt knows 0 to 5"),
    ([*PUBLISHED, "--classes", "ant"], "--classes ant: stage2.pt knows 0 to 5"),
    ([*OURS, "--num-samples", "5", "--classes", "3"], "leave --classes and --per-class out"),
    ([*OURS, "--num-samples", "5", "--per-class", "4"], "leave --classes and --per-class out"),
    ([*OURS, "--trajectory", "--steps", "7"], "--trajectory needs sampling in at least 8 steps, not --steps 7"),
    ([*OURS, "--trajectory", "--steps", "8", "--reconstruct", "photo.png"], "--trajectory needs sampling"),
    ([*OURS, "--num-samples", "10001"], "10001 images are too many for one picture: give --out an .npz"),
    (["--dit", "stage2.pt", "--decoder", "model.pt"], "give its latent statistics with --stats"),
], ids=str)
def test_refusals(arguments, said, capsys, tmp_path):
    line = refused(capsys, *arguments, "--out", tmp_path / "x.png")
    assert said in line
    assert line.endswith(said) or said.endswith("such as") or "--classes" not in said
    assert not list(tmp_path.iterdir())


def test_labels_in_turn_and_unconditional_models(tmp_path):
    drawn = images(tmp_path / "turn.npz", *PUBLISHED, "--num-samples", 8)
    assert same(drawn, by_hand([0, 1, 2, 3, 4, 5, 0, 1]))
    drawn = images(tmp_path / "u.npz", "--dit", "unconditional.pt", "--decoder", "decoder.pt", "--num-samples", 3)
    model, stats = diffusion_model(num_classes=0), torch.load("dit.pt")["stats"]
    noise, y = dits.sample_noise(0, range(3), (8, 4, 4)), torch.zeros(3, dtype=torch.long)
    x = dits.sample(dits.guided(model, y), noise, 4, shift=20.0)
    decoder = small_decoder(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    assert same(drawn, decoders.to_uint8(decoder(dits.denormalize(x, stats))).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def test_trajectory(tmp_path):
    """A row for each sample, eight columns: the estimates x_t - t v of eight steps, from t = 1 to the sample."""
    arguments = [*PUBLISHED, "--steps", 12, "--classes", 4, 0, "--scale", 60]  # so that the steps differ
    rows = images(tmp_path / "rows.npz", *arguments, "--trajectory")
    assert rows.shape == (2 * 8, 8, 8, 3)
    rows = rows.reshape(2, 8, 8, 8, 3)
    drawn = images(tmp_path / "drawn.npz", *arguments, "--per-class", 1)
    assert same(rows[:, -1], drawn), "the last one is the sample that is drawn without the flag"

    estimates = by_hand([4, 0], scale=60.0, steps=12, trajectory=True)  # 12 of (2, 8, 8, 3)
    steps = [0, 2, 3, 5, 6, 8, 9, 11]  # of 12, evenly spaced: t = 1 - step / 12 falls from column to column
    assert same(rows, np.stack([estimates[step] for step in steps], 1))
    for column, step in enumerate(steps[:5]):  # the step after it would show; towards the end they differ by too little
        assert not same(rows[:, column], estimates[step + 1])

    noise = dits.sample_noise(0, range(2), (8, 4, 4))
    v, v_null = (diffusion_model()(noise, torch.ones(2), torch.tensor(y)) for y in ([4, 0], [6, 6]))
    first = noise - (v_null + 60 * (v - v_null))
    z = first * (torch.load("stat.pt")["var"] + 1e-5).sqrt()
    decoder = small_decoder(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert same(rows[:, 0], decoders.to_uint8(decoder(z)).numpy())


def test_trajectory_as_a_picture(tmp_path):
    arguments = [*PUBLISHED, "--classes", 4, 0, "--trajectory", "--steps", 8]
    run(tmp_path / "x.png", *arguments)
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert picture.shape == (2 * 8 + 2, 8 * 8 + 7 * 2, 3)
    expected = images(tmp_path / "x.npz", *arguments)
    for i, image in enumerate(expected):
        top, left = i // 8 * 10, i % 8 * 10
        np.testing.assert_array_equal(picture[top : top + 8, left : left + 8], image)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_sample_i_is_the_same_for_any_batch_and_process_count(tmp_path):
    one = images(tmp_path / "one.npz", *PUBLISHED, "--num-samples", 7, "--batch", 7)
    assert len({image.tobytes() for image in one}) == 7
    for batch in (1, 3):
        assert same(images(tmp_path / f"{batch}.npz", *PUBLISHED, "--num-samples", 7, "--batch", batch), one)
    assert same(images(tmp_path / "few.npz", *PUBLISHED, "--num-samples", 2), one[:2])
    two = tmp_path / "two" / "x.npz"
    printed = finish(*start_ranks("sample.py", *PUBLISHED, *QUICK, "--num-samples", 7, "--batch", 2, "--out", two))
    with np.load(two) as file:
        assert same(file["arr_0"], one)
    assert [path.name for path in two.parent.iterdir()] == ["x.npz"], "the parts of the processes are gone"
    assert f"7 images in {two}" in printed[0] and "images in" not in printed[1]


def test_many_samples_are_compiled_on_a_gpu(monkeypatch):
    for gpu, flags, compiled in [(True, ["--num-samples", "1000"], True), (True, ["--num-samples", "999"], False),
                                 (True, [], False), (True, ["--compile"], True),
                                 (False, ["--num-samples", "1000"], False)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert sample.parse_args(["--out", "x.npz", *flags])[1].compile is compiled, (gpu, flags)


def test_an_npz_is_whole_and_refused_or_replaced(tmp_path, capsys):
    out = tmp_path / "x.npz"
    first = images(out, *PUBLISHED, "--num-samples", 3)
    assert first.dtype == np.uint8 and first.shape == (3, 8, 8, 3) and first.flags.c_contiguous
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy"]
        assert archive.infolist()[0].file_size == 128 + first.nbytes
    time = out.stat().st_mtime_ns
    capsys.readouterr()
    line = refused(capsys, *PUBLISHED, "--num-samples", 3, "--out", out)
    assert f"--out {out} exists: give --overwrite" in line and out.stat().st_mtime_ns == time
    second = images(out, *PUBLISHED, "--num-samples", 3, "--seed", 1, "--overwrite")
    assert not same(first, second) and [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("moment", ["drawing", "joining"])
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_leaves_no_file(how, moment, tmp_path, monkeypatch):
    """Neither an incomplete npz nor a temporary file; what was there stays as it was."""
    calls = []

    def interrupt_the_second(function):
        def called(*arguments):
            calls.append(sorted(path.name for path in tmp_path.iterdir()))
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
            return function(*arguments)

        return called

    if moment == "drawing":
        monkeypatch.setattr(sample, "to_uint8", interrupt_the_second(sample.to_uint8))
    else:
        calls.append(0)
        monkeypatch.setattr(sample.zipfile.ZipFile, "write", interrupt_the_second(sample.zipfile.ZipFile.write))
    (tmp_path / "x.npz").write_text("what was there")
    arguments = [*PUBLISHED, "--num-samples", 6, "--batch", 2, "--overwrite"]
    with pytest.raises(SystemExit if how == "SIGTERM" else KeyboardInterrupt) as ended:
        run(tmp_path / "x.npz", *arguments)
    assert how != "SIGTERM" or ended.value.code == 143
    assert len(calls) == 2 and "x.npz.tmp.npy" in calls[1] and ("x.npz.tmp" in calls[1]) == (moment == "joining")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_text() == "what was there"


def test_grid_is_row_by_row_and_replaced(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    for seed in (1, 0):
        run(out, *PUBLISHED, "--classes", 4, 0, 5, "--per-class", 2, "--seed", seed)
    picture, expected = np.asarray(Image.open(out)), by_hand([4, 4, 0, 0, 5, 5])
    assert picture.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3)
    for i, image in enumerate(expected):
        top, left = i // 2 * 10, i % 2 * 10
        assert same(picture[top : top + 8, left : left + 8], image)
    assert (picture[8:10] == 255).all() and (picture[:, 8:10] == 255).all()
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"], "nothing else is left"
    assert f"6 images in {out}" in capsys.readouterr().out
    run(out, *PUBLISHED, "--num-samples", 3)
    assert Image.open(out).size == (3 * 8 + 2 * 2, 8), "a row that is not full has no empty places"


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


def test_reconstruct_a_photo(upsampling, tmp_path, monkeypatch):
    out = tmp_path / "new" / "recon.png"
    run(out, "--decoder", "upsampling.pt", "--reconstruct", "photo.png")
    picture = np.asarray(Image.open(out))
    assert picture.shape == (64, 64 + 2 + 64, 3)
    photo = encoders.center_crop(Image.open("photo.png"), 64)
    np.testing.assert_array_equal(picture[:, :64], photo)
    assert same(picture[:, 66:], reconstruct(upsampling, photo))

    with monkeypatch.context() as patch:  # the photo is of one rank alone
        patch.setattr(sample, "write_images", lambda *given: seen.append(given))
        seen = []
        run(out, "--decoder", "upsampling.pt", "--reconstruct", "photo.png")
        assert not list(seen[0][-1](range(0))) and len(list(seen[0][-1](range(1)))) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_reconstruct_a_folder(upsampling, tmp_path, workers, capfd):
    folder = make_images(tmp_path / "in", 5, size=(90, 70))
    arguments = ["--decoder", "upsampling.pt", "--reconstruct", folder, "--batch", 2, "--workers", workers]
    drawn = images(tmp_path / "recon.npz", *arguments)
    photos = [encoders.center_crop(Image.open(path), 64) for path in sorted(folder.iterdir())]
    assert same(drawn, np.stack([reconstruct(upsampling, photo) for photo in photos]))

    paths = sorted(folder.iterdir())
    for broken in ([paths[0], paths[3]], [paths[0], paths[2], paths[3]]):
        for path in broken:
            path.write_bytes(path.read_bytes()[:60])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(tmp_path / "other" / "recon.npz", *arguments)
        lines = [line for line in capfd.readouterr().err.splitlines() if "read" in line]
        assert exit.value.code == 2 and len(lines) == len(broken) + 1, lines
        for path in broken:
            assert sum(f"cannot read {path} (" in line for line in lines) == 1, "every one is named once"
        said = f"{len(broken)} images in {folder} cannot be read, see above: repair or remove them"
        assert lines[-1].endswith(said)
        assert not list((tmp_path / "other").iterdir()), "and nothing is written"
