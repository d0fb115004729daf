"""fid.py against golden values, closed forms, second ways to compute the same, and its real command line."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, assert_close, golden, read_golden
from PIL import Image

import encoder
import fid


def by_formula(shapes, bias):
    """Weights as tests/golden/README.md makes them: key name -> seed -> values."""
    state = {}
    for key, shape in shapes.items():
        rs = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith(("running_var", "bn.weight")):
            value = 1 + 0.1 * rs.rand(*shape)
        elif key.endswith(("running_mean", "bias")):
            value = bias * rs.standard_normal(shape)
        else:
            value = rs.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(by_formula(json.loads((ROOT / "tests/golden/inception_state_shapes.json").read_text()), 0.1), path)
    return str(path)


@pytest.fixture(scope="module")
def inception(inception_weights):
    return fid.load_inception(inception_weights)


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory):
    """Paths of VGG16 by formula and of the published heads."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(by_formula(json.loads((ROOT / "tests/golden/vgg16_state_shapes.json").read_text()), 0.05), folder / "v")
    arrays, *_ = read_golden(ROOT / "tests/golden/lpips.npz")
    torch.save({f"lin{i}.model.1.weight": arrays[f"lin{i}"].view(1, -1, 1, 1) for i in range(5)}, folder / "l")
    return str(folder / "v"), str(folder / "l")


def make_images(path, count, size=32, seed=0, save=np.savez):
    """An npz of smooth random images, each with a brightness of its own; returns them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)) // 2 + rng.integers(0, 128, (count, 1, 1, 1))
    images = coarse.repeat(size // 4, 1).repeat(size // 4, 2).astype(np.uint8)
    save(path, images)
    return images


def run(tmp_path, *argv, ranks=1, out="scores.json"):
    """The command line, in this process or under torchrun; returns what --json wrote."""
    argv = [*map(str, argv), "--json", str(tmp_path / out), "--overwrite", "--device", "cpu"]
    if ranks == 1:
        fid.main(argv)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        subprocess.run([*launch, ROOT / "fid.py", *argv], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((tmp_path / out).read_text())


def numbers(scores):
    return {key: value for key, value in scores.items() if isinstance(value, float)}


def frechet_by_sqrtm(a, b):
    """The formula as it is written, of features (N, D) with more images than dimensions."""
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


def precision_recall_by_loops(reference, samples, k=3):
    """Distances as differences in float64, one pair of sets at a time."""

    def distances(a, b):
        return np.stack([np.sqrt(((row - b) ** 2).sum(1)) for row in a])

    def share(manifold, points):
        radii = np.sort(distances(manifold, manifold), 1)[:, k]
        return (distances(manifold, points) <= radii[:, None]).any(0).mean()

    reference, samples = reference.astype(np.float64), samples.astype(np.float64)
    return share(reference, samples), share(samples, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Golden values


@golden("inception")
def test_golden_inception(file, inception):
    arrays, *_ = read_golden(file)
    for j in range(sum(key.startswith("images") for key in arrays)):
        outputs = inception(arrays[f"images_{j}"].permute(0, 3, 1, 2))
        for name, x in zip(("pool", "spatial", "logits_unbiased"), outputs, strict=True):
            assert_close(x, arrays[f"{name}_{j}"])


@golden("metrics")
def test_golden_metrics(file):
    arrays, *_ = read_golden(file)
    statistics = []
    for features in (arrays["ref"], arrays["sample"]):
        measured = fid.FeatureStatistics(features.shape[1])
        for batch in features.split(77):
            measured.update(batch)
        statistics += [measured.mean, measured.cov]
    assert fid.frechet_distance(*statistics) == pytest.approx(arrays["fid"].item(), rel=1e-6)
    expected = arrays["precision"].item(), arrays["recall"].item()
    assert fid.precision_recall(arrays["ref"], arrays["sample"]) == pytest.approx(expected, rel=1e-6)
    score = fid.inception_score(arrays["logits"], arrays["is_split_size"].item())
    assert score == pytest.approx(arrays["inception_score"].item(), rel=1e-6)


@golden("image_quality")
def test_golden_image_quality(file):
    arrays, *_ = read_golden(file)
    a, b = (arrays[key].permute(0, 3, 1, 2) / 255 for key in ("reference", "reconstruction"))
    torch.testing.assert_close(fid.psnr(a, b).float(), arrays["psnr"], rtol=1e-6, atol=0)
    torch.testing.assert_close(fid.ssim(a, b).float(), arrays["ssim"], rtol=1e-6, atol=0)


@golden("lpips")
def test_golden_lpips(file, lpips_weights):
    arrays, *_ = read_golden(file)
    assert_close(fid.LPIPS(*lpips_weights)(arrays["a"], arrays["b"]), arrays["lpips"])


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 20))
    a = rng.standard_normal((40, 20))
    sigma = a.T @ a
    shift = ((mu1 - mu2) ** 2).sum()
    assert fid.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(shift, rel=1e-10)
    # tr(S + c S - 2 sqrt(c) S) = (1 - sqrt(c))^2 tr S
    assert fid.frechet_distance(mu1, sigma, mu1, 9 * sigma) == pytest.approx(4 * np.trace(sigma), rel=1e-10)
    assert fid.frechet_distance(mu1, np.eye(20), mu2, 4 * np.eye(20)) == pytest.approx(shift + 20, rel=1e-10)
    assert 0 <= fid.frechet_distance(mu1, sigma, mu1, sigma) < 1e-10
    assert fid.frechet_distance(mu1, 0 * sigma, mu2, 0 * sigma) == pytest.approx(shift, rel=1e-10)


def test_frechet_agrees_with_sqrtm():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 30)) @ rng.standard_normal((30, 30)), rng.standard_normal((200, 30)) + 0.3
    ours = fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert ours == pytest.approx(frechet_by_sqrtm(a, b), rel=1e-9)


def test_frechet_of_singular_covariances():
    """60 and 50 images in 600 dimensions, where the root's trace is also the nuclear norm of the small Gram matrix."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((60, 600)), rng.standard_normal((50, 600)) + 0.1
    side_a, side_b = (a.mean(0), np.cov(a.T)), (b.mean(0), np.cov(b.T))
    ca, cb = (a - a.mean(0)) / np.sqrt(59), (b - b.mean(0)) / np.sqrt(49)
    root = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca**2).sum() + (cb**2).sum() - 2 * root
    ours = fid.frechet_distance(*side_a, *side_b)
    assert ours == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(*side_b, *side_a) == pytest.approx(ours, rel=1e-12)
    assert 0 <= fid.frechet_distance(*side_a, *side_a) < 1e-9


def test_frechet_refuses_statistics_that_do_not_match():
    eye = np.eye(3)
    for bad in ((np.zeros(3), eye, np.zeros(4), np.eye(4)), (np.zeros(3), eye, np.zeros(3), np.eye(4))):
        with pytest.raises(ValueError, match="shapes"):
            fid.frechet_distance(*bad)
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(np.zeros(3), eye, np.array([0, np.nan, 0]), eye)


@pytest.mark.parametrize("batch", (1, 7, 200))
def test_feature_statistics_do_not_cancel(batch):
    """A mean of 1e5 and a spread of 1, where a sum of squares in float32 would lose every digit."""
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double() + 1e5
    measured = fid.FeatureStatistics(12)
    for part in x.split(batch):
        measured.update(part)
    np.testing.assert_allclose(measured.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(measured.cov, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall, Inception score, LPIPS, resizes


@pytest.mark.parametrize("offset", (0, 1000))
def test_precision_recall_by_brute_force(offset):
    """The offset makes |a|^2 + |b|^2 - 2ab cancel: in float32 the distances would be noise."""
    rng = np.random.default_rng(3)
    reference = (0.1 * rng.standard_normal((150, 8)) + offset).astype(np.float32)
    samples = (0.12 * rng.standard_normal((130, 8)) + 0.05 + offset).astype(np.float32)
    expected = precision_recall_by_loops(reference, samples)
    assert 0.05 < min(expected) and max(expected) < 0.95 and expected[0] != expected[1]
    for block in (1, 7, 64, 1000):
        ours = fid.precision_recall(torch.from_numpy(reference), torch.from_numpy(samples), block=block)
        assert ours == pytest.approx(expected, abs=1e-12)


def test_precision_recall_of_duplicates():
    """Five times the same image: radius 0, so a copy lies inside and anything else outside."""
    x = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0)) + 100
    reference, samples = x.expand(5, -1), torch.cat([x, x, x, x, x + 0.01])
    assert fid.precision_recall(reference, samples, block=2) == (0.8, 1.0)
    x = torch.randn(300, 2048, generator=torch.Generator().manual_seed(1)).double()
    squares = fid.squared_distances(x, torch.cat([x, x + 1e-5]))
    assert (squares[:, :300].diagonal() == 0).all()
    torch.testing.assert_close(squares[:, 300:].diagonal(), torch.full((300,), 2048 * 1e-10), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="not 3 and 5"):
        fid.precision_recall(reference[:3], samples)


def test_inception_score_of_certain_and_uniform_classes():
    certain = 1e4 * torch.eye(10).repeat(3, 1)  # the softmax's other classes underflow to 0
    assert fid.inception_score(certain) == pytest.approx(10)
    assert fid.inception_score(torch.zeros(30, 10)) == pytest.approx(1)
    # splits of 20 and 10, each counted once: 5 classes in the first, 1 in the second
    logits = 1e4 * torch.eye(10)[torch.tensor([0, 1, 2, 3, 4] * 4 + [7] * 10)]
    assert fid.inception_score(logits, split_size=20) == pytest.approx((5 + 1) / 2)


def test_lpips_is_differentiable_and_frozen(lpips_weights):
    lpips = fid.LPIPS(*lpips_weights)
    a = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a.flip(0).clone().requires_grad_()
    lpips(a, b).sum().backward()
    step = 1e-2 * b.grad / b.grad.norm()
    with torch.no_grad():
        change = (lpips(a, b + step) - lpips(a, b - step)).sum() / 2
    assert change.item() == pytest.approx((b.grad * step).sum().item(), rel=0.02)
    assert not any(p.requires_grad for p in lpips.parameters())
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)  # equal images: distance 0, and no 0 / 0 in the gradient
    value = lpips(flat.detach(), flat)
    value.sum().backward()
    assert value.item() == 0 and flat.grad.abs().max() == 0


def test_offline_weights_are_one_clear_line(monkeypatch, lpips_weights, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(fid.timm, "create_model", no_network)
    cases = (
        (partial(fid.load_inception), "pt_inception.*pass it with --inception-weights$"),
        (partial(fid.LPIPS), "vgg.pth.*pass it with --lpips-weights$"),
        (partial(fid.load_inception, lpips_weights[1]), "does not fit.*Check --inception-weights$"),
        (partial(fid.load_inception, "nowhere.pth"), "nowhere.pth.*--inception-weights$"),
    )
    for build, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


def test_vgg_weights_that_cannot_be_had(monkeypatch, lpips_weights):
    create_model = fid.timm.create_model

    def no_network(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no network")
        return create_model(name, **kwargs)

    monkeypatch.setattr(fid.timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"model.safetensors of https://.*/vgg16.tv_in1k .*--vgg-weights$"):
        fid.LPIPS(lpips_weights=lpips_weights[1])


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory):
    """FD-DINOv2's network with ViT-S for ViT-L; the position embedding's patches are ramps in x and y."""
    name = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(0)
    state = fid.timm.create_model(name).state_dict()
    y, x = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    state["pos_embed"][0, 1:, 0], state["pos_embed"][0, 1:, 1] = x.flatten(), y.flatten()
    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(state, path)
    return partial(fid.DINOv2, str(path), model=name)


def test_dinov2_positions_and_resize(small_dinov2):
    network = small_dinov2()
    # output i reads at (i + 0.5) / (16.1 / 37) - 0.5, from four neighbours by Keys' cubic with a = -0.75
    grid = network.vit.pos_embed[0, 1:, :2].view(16, 16, 2)
    position = (torch.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5  # away from the border
    taps = position.floor()[:, None] + torch.tensor([-1, 0, 1, 2])
    d = (position[:, None] - taps).abs()
    near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    expected = (torch.where(d <= 1, near, far) * taps).sum(1)
    torch.testing.assert_close(grid[0, 1:15, 0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(grid[1:15, 0, 1], expected, rtol=0, atol=1e-4)
    # it sees what Pillow's resize gives, up to one of 255 levels, normalised
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    resized = np.array(Image.fromarray(image).resize((224, 224), Image.BICUBIC))
    x, y = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (image, resized))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    seen = []
    network.vit.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = network(x)
    assert (255 * (seen[0] * std + mean) - y).abs().max() < 1.01
    assert_close(features, network.vit(seen[0]))  # timm's own forward ends with the normalised CLS token


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_command_line_inception(tmp_path, inception, inception_weights, capsys):
    """All five numbers against second ways to compute them, for two batch sizes, with workers and under two ranks."""
    sides = [make_images(tmp_path / f"{name}.npz", n, seed=n) for name, n in (("a", 6), ("b", 5))]
    argv = tmp_path / "a.npz", tmp_path / "b.npz", "--inception-weights", inception_weights
    alone = run(tmp_path, *argv, "--batch", 4, "--workers", 1)
    printed = capsys.readouterr()
    outputs = [inception(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in sides]
    (pool_a, spatial_a, _), (pool_b, spatial_b, logits) = [[x.double().numpy() for x in side] for side in outputs]
    for key, a, b in (("FID", pool_a, pool_b), ("sFID", spatial_a, spatial_b)):
        ca, cb = (a - a.mean(0)) / np.sqrt(5), (b - b.mean(0)) / np.sqrt(4)
        root = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca**2).sum() + (cb**2).sum() - 2 * root
        assert alone[key] == pytest.approx(expected, rel=1e-5)
        assert f"{alone[key]:.4f}" in printed.out
    p = scipy.special.softmax(logits, 1)
    assert alone["IS"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-5)
    expected = precision_recall_by_loops(pool_a, pool_b)
    assert (alone["precision"], alone["recall"]) == pytest.approx(expected)
    assert (alone["REFERENCE_count"], alone["SAMPLES_count"]) == (6, 5)
    assert "6 images in REFERENCE" in printed.err and "5 images in SAMPLES" in printed.err and "biased" in printed.err

    together = run(tmp_path, *argv, "--batch", 3, "--workers", 0, ranks=2)
    assert together.keys() == alone.keys()
    assert numbers(together) == pytest.approx(numbers(alone), rel=1e-4)


def test_paired_does_not_depend_on_batches_or_ranks(tmp_path, lpips_weights):
    vgg, heads = lpips_weights
    a, b = make_images(tmp_path / "a.npz", 21), make_images(tmp_path / "b.npz", 21, seed=1)
    mixed = (0.7 * a + 0.3 * b).astype(np.uint8)
    np.savez_compressed(tmp_path / "b.npz", mixed)
    argv = (tmp_path / "a.npz", tmp_path / "b.npz", "--paired", "--features", "random-tiny")
    weights = ("--vgg-weights", vgg, "--lpips-weights", heads)
    alone = run(tmp_path, *argv, *weights, "--batch", 64, "--workers", 0)
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 for images in (a, mixed))
    network = encoder.Encoder("random-tiny", 32)
    features = [network(images).mean((2, 3)).double().numpy() for images in (x, y)]
    moments = [moment for f in features for moment in (f.mean(0), np.cov(f.T))]
    assert alone["FD"] == pytest.approx(fid.frechet_distance(*moments), rel=1e-6)
    mse = ((a / 255.0 - mixed / 255.0) ** 2).mean((1, 2, 3))
    assert alone["PSNR"] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-6)
    assert alone["SSIM"] == pytest.approx(fid.ssim(x, y).mean().item(), rel=1e-6)
    assert alone["LPIPS"] == pytest.approx(fid.LPIPS(vgg, heads)(2 * x - 1, 2 * y - 1).mean().item(), rel=1e-5)

    small = run(tmp_path, *argv, *weights, "--batch", 5, "--workers", 1)
    assert numbers(small) == pytest.approx(numbers(alone), rel=1e-5)
    ranks = run(tmp_path, *argv, *weights, "--batch", 4, "--workers", 0, ranks=2)
    assert numbers(ranks) == pytest.approx(numbers(alone), rel=1e-5)

    equal = run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz", *argv[2:], "--no-lpips")
    assert equal["SSIM"] == pytest.approx(1) and equal["PSNR"] is None and "LPIPS" not in equal  # infinite: not in JSON
    assert equal["FD"] < 1e-9


def test_statistics_serve_as_reference(tmp_path, capsys):
    make_images(tmp_path / "a.npz", 150), make_images(tmp_path / "b.npz", 140, seed=1)
    small = ("--features", "random-tiny", "--workers", 0)
    direct = run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz", *small)
    assert "biased" not in capsys.readouterr().err  # 140 images in 128 dimensions
    fid.main([str(x) for x in (tmp_path / "a.npz", "--save-stats", tmp_path / "stats.npz", *small)])
    with np.load(tmp_path / "stats.npz") as saved:
        assert saved["mu"].shape == (128,) and saved["sigma"].shape == (128, 128) and saved["count"] == 150
    capsys.readouterr()
    through = run(tmp_path, tmp_path / "stats.npz", tmp_path / "b.npz", *small)
    assert through["FD"] == pytest.approx(direct["FD"], rel=1e-9) and direct["FD"] > 1e-4
    assert through["REFERENCE_count"] == 150
    # a file with Inception's statistics and images serves other features by its images
    with np.load(tmp_path / "a.npz") as a:
        np.savez(tmp_path / "both.npz", arr_0=a["arr_0"], mu=np.zeros(2048), sigma=np.eye(2048))
    both = run(tmp_path, tmp_path / "both.npz", tmp_path / "b.npz", *small)
    assert both["FD"] == pytest.approx(direct["FD"], rel=1e-9)


def test_statistics_without_images(tmp_path, capsys):
    """Inception statistics on both sides: FID and sFID without a network; what needs images is '-' and null."""
    for name, scale in (("a", 1), ("b", 4)):
        mu, eye = np.zeros(64), scale * np.eye(64)
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=eye, mu_s=mu[:50], sigma_s=eye[:50, :50])
    scores = run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
    assert scores["FID"] == pytest.approx(64) and scores["sFID"] == pytest.approx(50)
    assert [scores[key] for key in ("IS", "precision", "recall")] == [None] * 3
    printed = capsys.readouterr().out
    assert "IS        - (needs images in SAMPLES)" in printed
    assert "precision - (needs 4 images on each side)" in printed


def test_statistics_beside_images_are_used(tmp_path, inception_weights, monkeypatch, capsys):
    """As in the ADM release's references: statistics of more images than the file holds."""
    images = make_images(tmp_path / "b.npz", 4)
    np.savez(tmp_path / "a.npz", arr_0=images, mu=np.full(2048, 7), sigma=np.eye(2048))
    monkeypatch.setattr(fid, "frechet_distance", lambda mu1, sigma1, mu2, sigma2: float(mu1.sum()))  # saves seconds
    weights = ("--inception-weights", inception_weights, "--workers", 0)
    scores = run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz", *weights)
    assert scores["FID"] == 7 * 2048 and scores["sFID"] is None
    assert (scores["precision"], scores["recall"]) == (1, 1)  # of the images, which are the same
    warning = capsys.readouterr().err
    assert "4 images in SAMPLES" in warning and "REFERENCE, fewer" not in warning


def test_folder_is_cropped_as_adm_does(tmp_path):
    """A folder of odd sizes gives what an npz of its crops gives, in the sorted order of its files."""
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    crops = []
    for i in range(5):
        image = Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3)).astype(np.uint8))
        image.save(tmp_path / "folder" / f"{i}.png")
        crops.append(np.array(encoder.center_crop(image, 32)))
    np.savez(tmp_path / "crops.npz", np.stack(crops))
    options = ("--paired", "--no-lpips", "--features", "random-tiny", "--size", 32, "--workers", 2, "--batch", 2)
    scores = run(tmp_path, tmp_path / "folder", tmp_path / "crops.npz", *options)
    assert scores["PSNR"] is None and scores["SSIM"] == pytest.approx(1) and scores["FD"] < 1e-9
    np.savez(tmp_path / "crops.npz", np.stack(crops[::-1]))
    assert run(tmp_path, tmp_path / "folder", tmp_path / "crops.npz", *options)["SSIM"] < 0.9


def test_fd_dinov2(tmp_path, monkeypatch, small_dinov2):
    images = make_images(tmp_path / "a.npz", 4), make_images(tmp_path / "b.npz", 4, seed=1)
    network = small_dinov2()
    monkeypatch.setattr(fid, "DINOv2", lambda weights: network)
    scores = run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz", "--features", "fd-dinov2", "--workers", 0)
    features = [network(torch.from_numpy(side).permute(0, 3, 1, 2)).double().numpy() for side in images]
    expected = fid.frechet_distance(*(moment for f in features for moment in (f.mean(0), np.cov(f.T))))
    assert scores["FD"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_npz_images_are_read_in_any_order(tmp_path, save):
    images = make_images(tmp_path / "a.npz", 9, save=save)
    stream = fid.Images(str(tmp_path / "a.npz"), 256)
    assert len(stream) == 9
    for index in (0, 1, 2, 7, 8, 3, 3, 0):
        assert torch.equal(stream[index], torch.from_numpy(images[index]))


def test_memory_stays_flat(tmp_path):
    """Peak memory of the command line for 1,000 and 4,000 images, of which the latter are 37 MB more."""
    code = "import resource, sys, torch; torch.set_num_threads(1); import fid; fid.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for count in (1000, 4000):
        np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))
        argv = [tmp_path / "a.npz", "--save-stats", tmp_path / f"{count}.npz", "--features", "random-tiny"]
        command = [sys.executable, "-c", code, *argv, "--workers", "0", "--device", "cpu"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]) / 1024)  # MiB on Linux
    assert peaks[1] - peaks[0] < 15, f"peaks of {peaks} MiB"


def test_overwrite_replaces_whole_files(tmp_path):
    make_images(tmp_path / "a.npz", 4)
    (tmp_path / "scores.json").write_text("old")
    scores = run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz", "--features", "random-tiny", "--workers", 0)
    assert scores["FD"] < 1e-9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "scores.json"]


def test_copied_alone(tmp_path):
    """The library works without the other files, and the command line says what it misses."""
    shutil.copy(ROOT / "fid.py", tmp_path)
    code = """
import torch
from fid import InceptionV3, frechet_distance, precision_recall
with torch.device("meta"):
    assert len(InceptionV3().state_dict()) > 500
x = torch.eye(8)
assert frechet_distance(x[0], x, x[1], x) == 2 and precision_recall(x, x) == (1, 1)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
    (tmp_path / "images").mkdir()
    argv = [sys.executable, "fid.py", "images", "images"]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "need encoder.py beside this file" in result.stderr.splitlines()[-1]
