"""sample.py through its command line: published and our own files, the hub, labels, trajectories, outputs."""

import itertools
import math
import os
import resource
import signal
import sys
import zipfile
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import timm
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
OUR_PIXELS, IMAGENET = (dict(mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)),
                        dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))


def diffusion_model(seed=0, num_classes=6, **other):
    torch.manual_seed(seed)  # for the random frequencies of the time embedding, which are saved
    model = randomize(dits.DiT(**(LATENT | TRUNK | dict(num_classes=num_classes, depth=1) | other)), seed, std=0.05)
    model.y_embedder.embedding_table.weight.mul_(20)  # so that the class has an effect
    return model


def small_decoder(seed=3, **other):
    settings = LATENT | decoders.SIZES["ViT-tiny"] | dict(patch=2, depth=1, mlp=64) | other
    model = randomize(decoders.Decoder(**settings), seed, 0.05)
    model.embed.weight.mul_(10)  # so that the latents have an effect
    return model


def ours(path, kind, model, encoder=RECORD, **other):
    torch.save(dict(kind=kind, config=model.config, model=model.state_dict(), encoder=encoder, **other), path)


def diffusers(model, stats):
    """A decoder in the layout of diffusers' AutoencoderRAE: its prefix and names, the statistics, no positions."""
    names = {"attention.attention.query": "attention.to_q", "attention.attention.key": "attention.to_k",
             "attention.attention.value": "attention.to_v", "attention.output.dense": "attention.to_out.0"}
    state = {"encoder.layer.weight": torch.ones(2), "encoder_mean": model.mean, "encoder_std": model.std,
             "_latents_mean": stats["mean"], "_latents_std": (stats["var"] + 1e-5).sqrt()}
    for key, value in published_decoder(model).items():
        for theirs, name in names.items():
            key = key.replace(theirs, name)
        state[f"decoder.{key}"] = value
    del state["decoder.decoder_pos_embed"]
    return {key: value.clone().contiguous() for key, value in state.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small diffusion model and decoder, in published files and in ours."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    stats = {"mean": torch.randn(8, 4, 4, generator=generator), "var": torch.rand(8, 4, 4, generator=generator) + 0.5}
    rest = dict(stats=stats, shift=20.0, label_dropout=0.1, epoch=1.0)
    torch.save(published_dit(diffusion_model()), folder / "stage2.pt")
    torch.save({"ema": published_dit(diffusion_model(seed=1))}, folder / "guide.pt")
    torch.save(published_decoder(small_decoder()), folder / "model.pt")
    torch.save({"mean": None, "var": stats["var"]}, folder / "stat.pt")
    ours(folder / "dit.pt", "dit", diffusion_model(), classes=NAMES, **rest)
    ours(folder / "decoder.pt", "decoder", small_decoder(**OUR_PIXELS), epoch=1.0)
    ours(folder / "unconditional.pt", "dit", diffusion_model(num_classes=0), **rest)
    layers = RECORD | dict(layers=[0, 2])
    ours(folder / "dit_02.pt", "dit", diffusion_model(), layers, **rest)
    ours(folder / "decoder_02.pt", "decoder", small_decoder(), layers)
    # The paper's decoder upsampling: images of 32 px for the encoder (4 x 4 tokens), of 64 px from the decoder.
    upsampling = small_decoder(latent_dim=128, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    ours(folder / "upsampling.pt", "decoder", upsampling)
    ours(folder / "upsampling_02.pt", "decoder", upsampling, layers)
    Image.effect_noise((40, 60), 90).convert("RGB").save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def inside(files, monkeypatch):
    monkeypatch.chdir(files)


PUBLISHED = ["--dit", "stage2.pt", "--decoder", "model.pt", "--stats", "stat.pt"]
OURS = ["--dit", "dit.pt", "--decoder", "decoder.pt"]
QUICK = ["--steps", "4", "--device", "cpu"]
TWO = ["--classes", 4, 0, "--per-class", 1]


def run(out, *arguments):
    sample.main([*QUICK, *map(str, arguments), "--out", str(out)])


def images(path, *arguments):
    run(path, *arguments)
    with np.load(path) as file, zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].file_size == 128 + file["arr_0"].nbytes, "the right number of images"
        return file["arr_0"]


def picture(path, *arguments):
    run(path, *arguments)
    return np.asarray(Image.open(path))


def refused(capsys, *arguments):
    """The error line, after the usage; the exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        sample.main([*QUICK, *map(str, arguments)])
    usage, line = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and usage.startswith("usage: "), usage
    return line


def by_hand(labels, seed=0, scale=1.0, guide=None, interval=(0.0, 1.0), steps=4, trajectory=False, pixels=IMAGENET):
    """The samples of the published files, computed with the models themselves; or the estimates of all steps."""
    model, decoder = diffusion_model(), small_decoder(**pixels)
    noise = [np.random.default_rng((seed, i)).standard_normal((8, 4, 4), dtype=np.float32) for i in range(len(labels))]
    y, null = torch.tensor(labels), torch.full((len(labels),), 6)

    def decoded(x):
        z = x * (torch.load("stat.pt")["var"] + 1e-5).sqrt()
        return (decoder(z).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()

    x, estimates = torch.from_numpy(np.stack(noise)), []
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps)
        v = model(x, t, y)
        if interval[0] <= t[0] <= interval[1]:
            weak = guide(x, t, y) if guide else model(x, t, null)
            v = weak + scale * (v - weak)
        estimates.append(decoded(x - (1 - step / steps) * v))
        x = x - v / steps
    return estimates if trajectory else decoded(x)


def same(a, b):
    """Equal up to one level, by rounding."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("arguments, settings", [
    ([], {}),
    (["--seed", "7"], dict(seed=7)),
    (["--scale", "3"], dict(scale=3.0)),
    (["--scale", "3", "--interval", "0.3", "0.75"], dict(scale=3.0, interval=(0.3, 0.75))),
    (["--guide", "guide.pt", "--scale", "1.42"], dict(scale=1.42, guide=1)),
    (["--scale", "3", "--interval", "0.3", "0.4"], {}),  # it contains no time of the grid
    (["--scale", "3", "--guide", "stage2.pt"], {}),
    (["--unconditional", "--per-class", 4], dict(labels=[6] * 4)),
])
def test_samples_of_published_files_equal_the_formulas(tmp_path, arguments, settings):
    """`sample.py --dit stage2_model.pt --decoder model.pt --stats stat.pt --classes ...`"""
    classes = [] if "--unconditional" in arguments else ["--classes", 4, 0, "--per-class", 2]
    sampled = images(tmp_path / "x.npz", *PUBLISHED, *classes, *arguments)
    settings = dict(labels=[4, 4, 0, 0]) | settings
    if "guide" in settings:
        settings["guide"] = diffusion_model(seed=1)
    assert same(sampled, by_hand(**settings))
    assert sampled.std() > 10 and ((sampled > 0) & (sampled < 255)).mean() > 0.5, "differences have an effect"
    for other in ({}, dict(seed=7), dict(scale=3.0), dict(labels=[6] * 4)):
        if dict(labels=[4, 4, 0, 0]) | other != settings:
            assert not same(sampled, by_hand(**(dict(labels=[4, 4, 0, 0]) | other))), other


def by_sampler(model, labels, shift):
    """The samples of `model` and our decoder, with the statistics of our files."""
    noise = dits.sample_noise(0, range(len(labels)), (8, 4, 4))
    x = dits.sample(dits.guided(model, torch.tensor(labels)), noise, 4, shift)
    return decoders.to_uint8(small_decoder(**OUR_PIXELS)(dits.denormalize(x, torch.load("dit.pt")["stats"]))).numpy()


def test_statistics_shift_and_pixels_of_our_files(tmp_path):
    """For a published model the shift is computed, here 1; diffusers' file has a decoder and the statistics."""
    stats = torch.load("dit.pt")["stats"]
    torch.save(stats, tmp_path / "stat.pt")
    torch.save(diffusers(small_decoder(**OUR_PIXELS), stats), tmp_path / "both.pt")
    bare = ["--dit", "stage2.pt", "--encoder", "random-tiny", "--classes", 1, 2]
    for i, (shift, flags) in enumerate([
        (20.0, [*OURS, "--classes", "bee", 2]),
        (1.0, [*bare, "--decoder", "decoder.pt", "--stats", tmp_path / "stat.pt"]),
        (1.0, [*bare, "--decoder", tmp_path / "both.pt", "--stats", tmp_path / "both.pt"]),
    ]):
        sampled = images(tmp_path / f"{i}.npz", *flags, "--per-class", 1)
        assert same(sampled, by_sampler(diffusion_model(), [1, 2], shift)), flags


def test_compiled_blocks_have_one_shape_and_the_same_samples(tmp_path, graphs):
    """All batches have one size: one graph for the decoder's blocks and one for those of model and guide."""
    arguments = [*OURS, "--guide", "guide.pt", "--encoder", "random-tiny", "--scale", 2, "--num-samples", 5]
    sampled = images(tmp_path / "compiled.npz", *arguments, "--batch", 3, "--compile", "on")
    assert len(graphs) == 2
    assert same(sampled, images(tmp_path / "eager.npz", *arguments, "--batch", 5))
    assert len(graphs) == 2, "by default nothing is compiled on a CPU"


def test_what_is_compiled(monkeypatch):
    model = Namespace(to=lambda device: model, num_classes=6)
    monkeypatch.setattr(sample, "load_models", lambda args: (model, None, model, dict(stats={}, shift=1.0)))
    monkeypatch.setattr(sample, "compile_blocks", lambda *models: made.append(models))
    monkeypatch.setattr(sample, "write_images", lambda *_: None)
    for row, compiled in {"cuda --num-samples 1000": True, "cuda --num-samples 999": False, "cuda": False,
                          "cuda --compile on": True, "cuda --num-samples 1000 --compile off": False,
                          "cpu --num-samples 1000": False}.items():
        made, (device, *flags) = [], row.split()
        sample.generate(sample.parse_args(["--out", "x.npz", *flags])[1], 0, 1, torch.device(device), None)
        assert bool(made) == compiled, row


AUTHORS = "nyu-visionx/RAE-collections/"
THEIRS = {  # flag -> the authors' file at 256 px, at 512 px, and ours in its place
    "--dit": ("DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
              "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt", "stage2.pt"),
    "--stats": ("stats/dinov2/wReg_base/imagenet1k/stat.pt", "stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
                "stat.pt"),
    "--decoder": ("decoders/dinov2/wReg_base/ViTXL_n08/model.pt", "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                  "model.pt"),
    "--guide": ("DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt",
                "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt", "guide.pt"),
}


@pytest.mark.parametrize("preset, place, scale", [("imagenet256", 0, 1.42), ("imagenet512", 1, 1.5), ("", 2, 2.0)])
def test_published_is_the_authors_files_with_their_guidance(preset, place, scale, monkeypatch, tmp_path):
    """The hub has only these files. The last row: without --published, each flag takes a path on the hub."""
    held, asked = {(AUTHORS if preset else "me/mine/deep/") + row[place]: row[2] for row in THEIRS.values()}, []
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda repository, path: asked.append(f"{repository}/{path}") or held[asked[-1]])
    paths = [part for flag, path in zip(THEIRS, held, strict=True) for part in (flag, f"hf:{path}")]
    flags = [*TWO, *(["--published", "--preset", preset] if preset else [*paths, "--scale", scale])]
    guided = by_hand([4, 0], scale=scale, guide=diffusion_model(seed=1))
    assert same(images(tmp_path / "x.npz", *flags), guided) and asked == list(held)
    for path, (flag, row) in zip(held, THEIRS.items(), strict=True):
        asked.clear()
        assert same(images(tmp_path / f"{flag}.npz", *flags, flag, row[2]), guided)
        assert asked == [other for other in held if other != path], "the file of the flag replaces it"
    if preset:
        asked.clear()
        assert same(images(tmp_path / "1.npz", *flags, "--scale", 1), by_hand([4, 0])) and asked == list(held)[:3]
        sampled = images(tmp_path / "3.npz", *flags, "--scale", 3)
        assert same(sampled, by_hand([4, 0], scale=3.0, guide=diffusion_model(seed=1))) and not same(sampled, guided)


def test_a_published_decoder_of_dinov3_has_neither_scale_nor_shift(tmp_path):
    """The encoder is named by --encoder, or by the record of the diffusion model."""
    torch.save(torch.load("dit.pt") | dict(shift=1.0, encoder=RECORD | dict(name="dinov3-l")), tmp_path / "dit.pt")
    expected = by_hand([4, 0], pixels=dict(mean=(0.0,) * 3, std=(1.0,) * 3))
    for flags in (["--encoder", "dinov3-s"], ["--dit", tmp_path / "dit.pt"]):
        assert same(images(tmp_path / f"{flags[0]}.npz", *PUBLISHED, *TWO, *flags), expected)


def test_layers_must_be_the_same_in_both_files(capsys, tmp_path):
    """--layers are those of files that do not name them."""
    bare = [*PUBLISHED, "--decoder", "decoder_02.pt", "--encoder", "random-tiny"]
    alone = ["--dit", "dit_02.pt"]
    for flags in ([*OURS, "--decoder", "decoder_02.pt"], [*OURS, *alone], bare, [*bare, "--layers", 0, 1]):
        line = refused(capsys, *flags, "--out", tmp_path / "x.png")
        assert all(part in line for part in ("--decoder decoder", "random-tiny, layer 0 2", "give another file")), line
    pair = [*alone, "--decoder", "decoder_02.pt"]
    line = refused(capsys, *pair, "--guide", "dit.pt", "--scale", 2, "--out", tmp_path / "x.png")
    assert "--guide dit.pt is for latents of random-tiny, layer the last" in line and not list(tmp_path.iterdir())
    for flags in (pair, [*bare, "--layers", 0, 2]):
        run(tmp_path / "x.png", *flags, "--classes", 4)


def choose_labels(classes=(), names=(), num_classes=6, **other):
    args = dict(classes=list(classes), per_class=1, num_samples=0, unconditional=False, dit="dit.pt", seed=0) | other
    return sample.choose_labels(Namespace(**args), Namespace(num_classes=num_classes, null_class=num_classes), names)


def test_labels(capsys):
    assert choose_labels(["3", "1"], per_class=2) == [3, 3, 1, 1]
    assert choose_labels(num_classes=1000) == list(range(10)), "the first ten"
    assert choose_labels(per_class=2) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "or all"
    assert choose_labels(num_samples=3, unconditional=True) == [6, 6, 6]
    assert choose_labels(num_samples=3, num_classes=0) == choose_labels(num_classes=0, per_class=3) == [0, 0, 0]
    months = sorted(map(str, range(1, 13)))  # 1, 10, 11, 12, 2, ...: as folders are sorted
    capsys.readouterr()
    assert choose_labels(["1", "10", "0", "9"], names=months, num_classes=12) == [0, 1, 0, 11], "names before numbers"
    assert capsys.readouterr().out == "1 samples of each class: 0 1, 1 10, 0 1, 11 9\n"


def test_labels_for_scores_are_balanced_and_shuffled():
    labels = choose_labels(num_samples=50000, num_classes=1000)
    assert np.bincount(labels).tolist() == [50] * 1000
    splits = [np.bincount(part, minlength=1000) for part in np.split(np.array(labels), 10)]
    # With labels in turn each class would have 5 in each split of 5,000. Shuffled, the variance is 5 x 0.9.
    assert all(3.9 < split.var() < 5.1 for split in splits)
    for batch, seed, count in [(7, 0, 50000), (1, 1, 50000), (1, 0, 51000)]:
        other = choose_labels(num_samples=count, num_classes=1000, batch=batch, seed=seed)
        assert (other[:50000] == labels) == (batch == 7) and np.ptp(np.bincount(other)) == 0
    assert np.ptp(np.bincount(choose_labels(num_samples=20))) == 1, "20 samples of 6 classes: 3 or 4 of each"


def test_num_samples_and_unconditional_models(tmp_path):
    sampled = images(tmp_path / "shuffled.npz", *PUBLISHED, "--num-samples", 8, "--seed", 3)
    order = np.random.default_rng((3, 8)).permutation(8) % 6
    assert same(sampled, by_hand(order.tolist(), seed=3)) and order.tolist() != sorted(order)
    sampled = images(tmp_path / "u.npz", *OURS, "--dit", "unconditional.pt", "--num-samples", 3)
    assert same(sampled, by_sampler(diffusion_model(num_classes=0), [0] * 3, 20.0))


def test_trajectory(tmp_path):
    """A row for each sample, one per class by default; eight columns, the estimates x_t - t v from t = 1 to t = 0."""
    arguments = [*PUBLISHED, "--steps", 12, "--scale", 60, "--classes", 4, 0]  # at this scale all steps differ
    rows = images(tmp_path / "rows.npz", *arguments, "--trajectory").reshape(2, 8, 8, 8, 3)
    sampled = images(tmp_path / "sampled.npz", *arguments, "--per-class", 1)
    assert same(rows[:, -1], sampled), "the last column is the sample"
    estimates = by_hand([4, 0], scale=60.0, steps=12, trajectory=True)  # 12 of (2, 8, 8, 3)
    steps = [0, 2, 3, 5, 6, 8, 9, 11]  # of 12, evenly spaced: t = 1 - step / 12
    assert same(rows, np.stack([estimates[step] for step in steps], 1))
    for column, step in enumerate(steps[:5]):  # the last steps differ by less than the tolerance
        assert not same(rows[:, column], estimates[step + 1])
    three = images(tmp_path / "three.npz", *PUBLISHED, "--steps", 8, "--classes", 4, "--per-class", 3, "--trajectory")
    assert len(three) == 3 * 8 and same(three[7::8], by_hand([4] * 3, steps=8))


def test_a_png_is_row_by_row_and_replaced(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    for seed in (1, 0):
        run(out, *PUBLISHED, "--classes", 4, 0, 5, "--per-class", 2, "--seed", seed)
    shown = np.asarray(Image.open(out))
    assert shown.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3) and (shown[8:10] == 255).all() and (shown[:, 8:10] == 255).all()
    for i, image in enumerate(by_hand([4, 4, 0, 0, 5, 5])):
        assert same(shown[i // 2 * 10 :, i % 2 * 10 :][:8, :8], image)
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"], "and no temporary file"
    assert f"6 images in {out}" in capsys.readouterr().out
    run(out, *PUBLISHED, "--num-samples", 3)
    assert Image.open(out).size == (3 * 8 + 2 * 2, 8), "three columns, not eight"
    run(out, *PUBLISHED, *TWO, "--trajectory", "--steps", 8)
    assert Image.open(out).size == (8 * 8 + 7 * 2, 2 * 8 + 2), "eight columns, a row for each sample"


# ---------------------------------------------------------------------------------------------------------------------
# Batches and the npz


def test_rank_batches():
    """All ranks have the same number and size of batches, with every index in the order in which they are gathered."""
    cases = itertools.product(range(1, 60), (1, 2, 5, 8), (1, 2, 3, 8))
    for count, batch, ranks in [*cases, (50000, 32, 8), (50001, 32, 8)]:
        parts = [sample.rank_batches(count, batch, rank, ranks) for rank in range(ranks)]
        gathered = [part for together in zip(*parts, strict=True) for part in together]
        indices = [i for part in gathered for i in part]
        assert len({len(part) for part in gathered}) == 1 and 0 < len(gathered[0]) <= batch
        assert indices == list(range(len(indices))) and count <= len(indices) < count + len(gathered)
        assert len(parts[0]) == math.ceil(count / (batch * ranks)), "no more batches than needed"


def test_sample_i_is_the_same_for_any_batch_and_process_count(tmp_path):
    one = images(tmp_path / "one.npz", *PUBLISHED, "--num-samples", 7, "--batch", 7)
    assert len({image.tobytes() for image in one}) == 7
    for batch in (1, 2):
        assert same(images(tmp_path / f"{batch}.npz", *PUBLISHED, "--num-samples", 7, "--batch", batch), one)
    few, more = (images(tmp_path / f"n{n}.npz", *PUBLISHED, "--classes", 4, "--per-class", n) for n in (2, 5))
    assert same(few, more[:2])
    two = tmp_path / "two" / "x.npz"
    printed = finish(*start_ranks("sample.py", *PUBLISHED, *QUICK, "--num-samples", 7, "--batch", 2, "--out", two))
    assert two.read_bytes() == (tmp_path / "2.npz").read_bytes(), "byte for byte as from one process"
    assert [path.name for path in two.parent.iterdir()] == ["x.npz"]
    assert f"7 images in {two}" in printed[0] and "images in" not in printed[1]


@pytest.mark.parametrize("limit, fits", [(884736, True), (720000, False)])
def test_an_npz_needs_no_more_space_than_its_size(limit, fits, tmp_path):
    """240 samples of 32 px, 737,280 bytes, in one file; the limit for files is 1.2 times as much. With a smaller limit
    the run fails and no file remains."""
    ours(tmp_path / "decoder.pt", "decoder", small_decoder(patch=8))
    written, watching = set(), [True]

    def note(event, given):
        if watching and event == "open" and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            written.add(str(given[0]))

    sys.addaudithook(note)  # it cannot be removed
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        run(tmp_path / "new" / "x.npz", *OURS, "--decoder", tmp_path / "decoder.pt", "--num-samples", 240, "--steps", 1)
        assert fits
    except OSError:
        assert not fits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        watching.clear()
    assert written == {str(tmp_path / "new" / "x.npz.tmp")}
    assert [path.stat().st_size > 737280 for path in (tmp_path / "new").iterdir()] == [True] * fits


def test_an_npz_is_complete_and_refused_or_replaced(tmp_path, capsys):
    out = tmp_path / "x.npz"
    first = images(out, *PUBLISHED, "--num-samples", 3)
    assert first.dtype == np.uint8 and first.shape == (3, 8, 8, 3) and first.flags.c_contiguous
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy"]
    time = out.stat().st_mtime_ns
    line = refused(capsys, *PUBLISHED, "--num-samples", 3, "--out", out)
    assert f"--out {out} exists: give --overwrite" in line and out.stat().st_mtime_ns == time
    second = images(out, *PUBLISHED, "--num-samples", 3, "--seed", 1, "--overwrite")
    assert not same(first, second) and [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, None), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_after_an_interruption_no_file_remains(number, code, tmp_path, monkeypatch):
    """Neither an incomplete npz nor a temporary file; an old npz is unchanged. Under nohup SIGHUP is ignored."""
    seen, draw = [], sample.to_uint8

    def interrupt_the_second(pixels):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 2:
            assert signal.getsignal(number) != signal.SIG_DFL  # else it would end the tests
            os.kill(os.getpid(), number)
        return draw(pixels)

    monkeypatch.setattr(sample, "to_uint8", interrupt_the_second)
    (tmp_path / "x.npz").write_text("an old file")
    arguments, before = [*PUBLISHED, "--num-samples", 6, "--batch", 2, "--overwrite"], signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        with pytest.raises(SystemExit if code else KeyboardInterrupt) as ended:
            run(tmp_path / "x.npz", *arguments)
        assert not code or ended.value.code == code
        assert len(seen) == 2 and seen[1] == ["x.npz", "x.npz.tmp"]
        assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
        assert (tmp_path / "x.npz").read_text() == "an old file"
        if number == signal.SIGHUP:
            seen.clear()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            assert len(images(tmp_path / "x.npz", *arguments)) == 6
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def reconstruct(image, **how):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    assert pixels.shape[-1] == 64  # the encoder resizes it to 32
    return decoders.to_uint8(decoders.load_decoder("upsampling.pt")[0](encoders.Encoder("random-tiny", 32, **how)(
        pixels)))[0].numpy()


def test_reconstruct_a_photo(tmp_path):
    """Next to ADM's crop; with a photo of exactly twice the size each pixel of it is the mean of four."""
    photo, pictures = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8), []
    Image.fromarray(photo).save(tmp_path / "photo.png")
    half = photo.reshape(64, 2, 64, 2, 3).mean((1, 3)).round().astype(np.uint8)
    for name, layers in (("upsampling.pt", []), ("upsampling_02.pt", [0, 2])):  # layers of the file, not of the flag
        flags = ["--decoder", name, "--reconstruct", tmp_path / "photo.png", "--layers", 1]
        shown = picture(tmp_path / "new" / "x.png", *flags)
        assert shown.shape == (64, 64 + 2 + 64, 3) and same(shown[:, :64], half)
        assert same(shown[:, 66:], reconstruct(shown[:, :64], layers=layers))
        pictures.append(shown)
    assert not same(*pictures)


def test_one_decoder_in_three_layouts_gives_one_picture(tmp_path, capsys):
    """An encoder with patch 16, named by flags if the file does not name it; the last block, and two layers."""
    torch.manual_seed(0)
    name, weights = "vit_tiny_patch16_224", tmp_path / "vit.pt"
    torch.save(timm.create_model(name).state_dict(), weights)
    flags = ["--encoder", name, "--encoder-weights", weights, "--reconstruct", "photo.png", "--decoder"]
    for grid, layers, more in [(16, [], []), (16, [2, 5], ["--layers", 5, 2]), (32, [], ["--preset", "imagenet512"])]:
        model = small_decoder(latent_dim=192, grid=grid, mean=(0.5,) * 3, std=(0.5,) * 3)
        record = RECORD | dict(name=name, image_size=16 * grid, layers=layers)
        ours(tmp_path / "ours.pt", "decoder", model, record)
        torch.save(published_decoder(model), tmp_path / "published.pt")
        state = diffusers(model, dict.fromkeys(("mean", "var"), torch.ones(192, grid, grid)))
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "diffusers.safetensors")
        pixels = np.array(encoders.center_crop(Image.open("photo.png"), 2 * grid))
        z = encoders.Encoder(name, 16 * grid, weights, layers)(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
        expected = np.hstack([pixels, np.full((2 * grid, 2, 3), 255), decoders.to_uint8(model(z))[0].numpy()])
        assert expected[:, 2 * grid + 2 :].std() > 10
        for file in ("ours.pt", "published.pt", "diffusers.safetensors"):
            assert same(picture(tmp_path / "x.png", *flags, tmp_path / file, *more), expected), (file, grid, layers)
    assert picture(tmp_path / "x.png", *flags, tmp_path / "diffusers.safetensors").shape == (32, 66, 3), "grid 16"
    line = refused(capsys, *flags, tmp_path / "published.pt", "--layers", 12, "--out", tmp_path / "y.png")
    assert f"layers 12: encoder {name} has the blocks 0 to 11" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_reconstruct_a_folder(tmp_path, workers, capfd):
    folder = make_images(tmp_path / "in", 5, size=(90, 70))
    arguments = ["--decoder", "upsampling.pt", "--reconstruct", folder, "--batch", 2, "--workers", workers]
    sampled = images(tmp_path / "recon.npz", *arguments)
    paths = sorted(folder.iterdir())
    assert same(sampled, np.stack([reconstruct(encoders.center_crop(Image.open(path), 64)) for path in paths]))
    finish(*start_ranks("sample.py", *QUICK, *arguments, "--out", tmp_path / "two.npz"))
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "recon.npz").read_bytes(), "two processes, byte for byte"
    for path in (broken := [paths[0], paths[2], paths[3]]):
        os.truncate(path, 60)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "other" / "recon.npz", *arguments)
    lines = [line for line in capfd.readouterr().err.splitlines() if "read" in line]
    assert exit.value.code == 2 and len(lines) == len(broken) + 1, lines
    assert all(sum(f"cannot read {path} (" in line for line in lines) == 1 for path in broken), "each is named once"
    assert lines[-1].endswith(f"3 images in {folder} cannot be read, see above: repair or remove them")
    assert not list((tmp_path / "other").iterdir()), "no file is written"
