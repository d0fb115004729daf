"""fid.py against golden values, closed forms, second ways to compute the same, and its real command line."""

import math
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, assert_close, golden, make_images, read_golden
from PIL import Image

import encoder
import fid


@pytest.fixture(scope="module")
def inception(inception_weights):
    return fid.load_inception(inception_weights)


def save_images(path, count, size=32, seed=0, save=np.savez):
    """An npz of smooth random images, each with a brightness of its own; returns them, uint8 (B, 3, H, W)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)) // 2 + rng.integers(0, 128, (count, 1, 1, 1))
    images = coarse.repeat(size // 4, 1).repeat(size // 4, 2).astype(np.uint8)
    save(path, images)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def run(*argv):
    """The command line -> its scores."""
    kept, work = {}, fid.run
    with mock.patch.object(fid, "run", lambda args: kept.update(work(args)) or kept):
        fid.main([*map(str, argv), "--device", "cpu", "--workers", "0"])
    return kept


def moments(features):
    """Mean and covariance (ddof 1) of features (N, D)."""
    x = np.asarray(features, np.float64)
    return x.mean(0), np.cov(x.T)


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


def test_feature_statistics_of_two_ranks(monkeypatch):
    """Two threads play the ranks, of 5 and 3 features."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    barrier, parts = threading.Barrier(2), {}

    def all_reduce(tensor):
        parts[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = sum(parts.values())
        barrier.wait()
        tensor.copy_(total)

    monkeypatch.setattr(fid, "dist", SimpleNamespace(is_initialized=lambda: True, all_reduce=all_reduce))
    ranks = [fid.FeatureStatistics(4) for _ in range(2)]
    for rank, part in zip(ranks, x.split(5), strict=True):
        rank.update(part)
    threads = [threading.Thread(target=rank.all_reduce) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mean, cov = moments(x)
    for rank in ranks:
        assert rank.count == 8
        np.testing.assert_allclose(rank.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(rank.cov, cov, rtol=1e-12)


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
    lpips.features[28].bias -= 1e6  # no channel passes the last ReLU anywhere: features of norm 0
    assert lpips(a, b).isfinite().all()


def test_inception_refuses_images_in_0_1(inception):
    with pytest.raises(ValueError, match="float32: give uint8"):
        inception(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("build, message", (
    (lambda paths: fid.load_inception(), "pt_inception.*pass it with --inception-weights$"),
    (lambda paths: fid.load_inception("nowhere.pth"), "nowhere.pth .*FileNotFound.*--inception-weights$"),
    (lambda paths: fid.load_inception(paths[1]), "heads.pth .*KeyError.*--inception-weights$"),
    (lambda paths: fid.LPIPS(), "lpips/weights/v0.1/vgg.pth and pass it with --lpips-weights$"),
    (lambda paths: fid.LPIPS(lpips_weights=paths[1]), "/timm/vgg16.tv_in1k/.*model.safetensors .* --vgg-weights$"),
    (lambda paths: fid.DINOv2(model="vit_tiny_patch16_224"), "/timm/vit_tiny_patch16_224/.* --dinov2-weights$"),
))
def test_missing_weights_are_one_clear_line(build, message, lpips_weights, monkeypatch, tmp_path):
    """At once, too: without a network nothing is asked twice."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=message) as error:
        build(lpips_weights)
    assert "\n" not in str(error.value)


def test_weights_are_downloaded_once(monkeypatch, tmp_path):
    """A timm model's file goes to torch's folder under its own name; the second time the network is not asked."""
    fetched = []

    def download(url, path):
        fetched.append(url)
        torch.save({"a.weight": torch.ones(1, 2), "b": torch.zeros(1)}, path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid.urllib.request, "urlopen", lambda url, timeout: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    layer = torch.nn.Linear(2, 1, bias=False)
    for _ in range(2):
        fid.load_weights(layer, "https://huggingface.co/timm/x/resolve/main/y.pth", None, "--flag", prefix="a.")
    assert torch.equal(layer.weight, torch.ones(1, 2)) and len(fetched) == 1
    assert (tmp_path / "hub" / "checkpoints" / "timm_x_resolve_main_y.pth").exists()


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
    return fid.DINOv2(str(path), model=name)


def test_dinov2_positions_and_resize(small_dinov2):
    network = small_dinov2
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
    (features,) = network(x)
    assert (255 * (seen[0] * std + mean) - y).abs().max() < 1.01
    assert_close(features, network.vit(seen[0]))  # timm's own forward ends with the normalised CLS token


# ---------------------------------------------------------------------------------------------------------------------
# The command line

TINY = ("--features", "dinov2")


class TinyNetwork(torch.nn.Module):
    """A quick network in DINOv2's place: the mean token of the demo's encoder."""

    def __init__(self, weights=None):
        super().__init__()
        self.encoder = encoder.Encoder("random-tiny", 32)

    def forward(self, images):
        return (self.encoder(images[..., :32, :32] / 255).mean((2, 3)),)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(fid, "DINOv2", TinyNetwork)


def quick_distance(mu1, sigma1, mu2, sigma2):
    """Stands for the Frechet distance, of 4 seconds in 2048 dimensions, where the point is what it is given."""
    return float(((mu1 - mu2) ** 2).sum() + (sigma1 * sigma2).sum())


def test_inception_suite(tmp_path, inception, monkeypatch, capsys):
    """All five numbers against second ways to compute them, from the features of the same pass."""
    a = save_images(tmp_path / "a.npz", 6)
    b = torch.cat([a[:2], a[:2] // 2, a[:1] // 3])  # a part of what a shows: recall is below precision
    np.savez(tmp_path / "b.npz", b.permute(0, 2, 3, 1))
    seen = []

    def load_inception(weights, device):
        assert (weights, device) == ("inception.pth", "cpu")
        return lambda images: seen.append((images.clone(), *inception(images))) or seen[-1][1:]

    monkeypatch.setattr(fid, "load_inception", load_inception)
    monkeypatch.setattr(fid, "frechet_distance", quick_distance)
    argv = (tmp_path / "a.npz", tmp_path / "b.npz", "--inception-weights", "inception.pth", "--batch", 4)
    scores = run(*argv)
    printed = capsys.readouterr().out
    assert [len(batch[0]) for batch in seen] == [4, 2, 4, 1]
    images, *outputs = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(images, torch.cat([a, b]))
    (pool_a, pool_b), (spatial_a, spatial_b), (_, logits) = (np.split(x.double().numpy(), [6]) for x in outputs)
    assert scores["FID"] == pytest.approx(quick_distance(*moments(pool_a), *moments(pool_b)), rel=1e-5)
    assert scores["sFID"] == pytest.approx(quick_distance(*moments(spatial_a), *moments(spatial_b)), rel=1e-5)
    p = scipy.special.softmax(logits, 1)
    assert scores["IS"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-5)
    expected = precision_recall_by_loops(pool_a, pool_b)
    assert (scores["precision"], scores["recall"]) == pytest.approx(expected) and expected[0] != expected[1]
    assert all(f"{name:<10}{value:.4f}\n" in printed for name, value in scores.items())


@pytest.fixture
def instead_of_inception(monkeypatch):
    """Mean colours, in Inception's place and shapes: (B, 3), thrice."""
    monkeypatch.setattr(fid, "load_inception", lambda *_: lambda images: 3 * (images.float().mean((2, 3)),))


def test_paired_inception_is_rfid(tmp_path, instead_of_inception):
    save_images(tmp_path / "a.npz", 4)
    scores = run(tmp_path / "a.npz", tmp_path / "a.npz", "--paired", "--no-lpips")
    assert scores.keys() == {"rFID", "PSNR", "SSIM"} and scores["PSNR"] == math.inf


def test_statistics_beside_images_are_used(tmp_path, instead_of_inception, monkeypatch):
    """As in the ADM release's references: statistics of more images than the file holds. Three images: no precision."""
    monkeypatch.setattr(fid, "frechet_distance", lambda mu1, sigma1, mu2, sigma2: float(mu1.sum()))
    images = save_images(tmp_path / "b.npz", 3).permute(0, 2, 3, 1)
    np.savez(tmp_path / "a.npz", arr_0=images, mu=np.full(2048, 7), sigma=np.eye(2048))
    scores = run(tmp_path / "a.npz", tmp_path / "b.npz")
    assert scores.keys() == {"FID", "IS"} and scores["FID"] == 7 * 2048


def test_statistics_without_images(tmp_path, monkeypatch):
    """Inception statistics on both sides: FID and sFID without a network, and nothing else."""
    monkeypatch.setattr(fid, "frechet_distance", quick_distance)
    for name, scale in (("a", 1), ("b", 4)):
        mu, eye = np.full(2048, scale), scale * np.eye(2048, dtype=np.int8)
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=eye, mu_s=mu[:2023], sigma_s=eye[:2023, :2023])
    scores = run(tmp_path / "a.npz", tmp_path / "b.npz")
    assert scores == {"FID": (9 + 4) * 2048, "sFID": (9 + 4) * 2023}


def test_statistics_serve_as_reference(tmp_path, tiny):
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    features = [TinyNetwork()(save_images(path, 150 - 10 * i, seed=i))[0] for i, path in enumerate(paths)]
    direct = run(*paths, *TINY)
    expected = fid.frechet_distance(*moments(features[0]), *moments(features[1]))
    assert direct == {"FD-DINOv2": pytest.approx(expected, rel=1e-5)} and expected > 1e-4
    fid.main([str(x) for x in (paths[0], "--save-stats", tmp_path / "stats.npz", *TINY)])
    assert fid.load_statistics(tmp_path / "stats.npz", "dinov2")["sigma"].shape == (128, 128)
    assert run(tmp_path / "stats.npz", paths[1], *TINY) == pytest.approx(direct, rel=1e-9)
    # a file with Inception's statistics and images serves other features by its images
    np.savez(tmp_path / "both.npz", arr_0=np.load(paths[0])["arr_0"], mu=np.zeros(2048), sigma=np.eye(2048))
    assert run(tmp_path / "both.npz", paths[1], *TINY) == pytest.approx(direct, rel=1e-9)


def test_paired_does_not_depend_on_batches(tmp_path, lpips_weights, tiny):
    vgg, heads = lpips_weights
    a, other = save_images(tmp_path / "a.npz", 7), save_images(tmp_path / "b.npz", 7, seed=1)
    b = (0.7 * a + 0.3 * other).byte()
    np.savez_compressed(tmp_path / "b.npz", b.permute(0, 2, 3, 1))
    argv = (tmp_path / "a.npz", tmp_path / "b.npz", "--paired", *TINY, "--vgg-weights", vgg, "--lpips-weights", heads)
    scores = run(*argv)
    mse = ((a / 255.0 - b / 255.0) ** 2).mean((1, 2, 3)).numpy()
    assert scores["PSNR"] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-6)
    assert scores["SSIM"] == pytest.approx(fid.ssim(a / 255, b / 255).mean().item(), rel=1e-6)
    lpips = fid.LPIPS(vgg, heads)(a / 127.5 - 1, b / 127.5 - 1).mean().item()
    assert scores["LPIPS"] == pytest.approx(lpips, rel=1e-5)
    assert (run(*argv, "--batch", 3)) == pytest.approx(scores, rel=1e-5)


def test_folder_is_cropped_as_adm_does(tmp_path, tiny):
    """A folder of odd sizes gives what an npz of its crops gives, in order; its size is the npz's, or --size's."""
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    crops = []
    for i in range(5):
        image = Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3)).astype(np.uint8))
        image.save(tmp_path / "folder" / f"{i}.png")
        crops.append(np.array(encoder.center_crop(image, 32)))
    np.savez(tmp_path / "crops.npz", np.stack(crops))
    argv = (tmp_path / "folder", tmp_path / "crops.npz", "--paired", "--no-lpips", *TINY, "--batch", 2)
    for more in ((), ("--size", 32), ("--workers", 1)):
        scores = run(*argv, *more)
        assert scores["PSNR"] == math.inf and scores["SSIM"] == pytest.approx(1) and scores["FD-DINOv2"] < 1e-9
    np.savez(tmp_path / "crops.npz", np.stack(crops[::-1]))
    assert run(*argv)["SSIM"] < 0.9
    fid.main([str(x) for x in (tmp_path / "folder", "--save-stats", tmp_path / "s.npz", *TINY, "--workers", 0)])
    image = np.stack([encoder.center_crop(encoder.open_image(tmp_path / "folder" / f"{i}.png"), 256) for i in range(5)])
    mean = TinyNetwork()(torch.from_numpy(image).permute(0, 3, 1, 2))[0].mean(0)  # 256 px, without another set
    np.testing.assert_allclose(np.load(tmp_path / "s.npz")["mu"], mean.double(), rtol=1e-4, atol=1e-6)


def test_fd_dinov2(tmp_path, monkeypatch, small_dinov2):
    images = save_images(tmp_path / "a.npz", 3), save_images(tmp_path / "b.npz", 2, seed=1)
    monkeypatch.setattr(fid, "DINOv2", lambda weights: small_dinov2)
    scores = run(tmp_path / "a.npz", tmp_path / "b.npz", "--features", "dinov2")
    a, b = (moments(*small_dinov2(x)) for x in images)
    assert scores == {"FD-DINOv2": pytest.approx(fid.frechet_distance(*a, *b), rel=1e-4)}


def test_command_line_takes_full_precision(tmp_path, tiny):
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 starts PyTorch with TF32 on."""
    save_images(tmp_path / "a.npz", 2)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    run(tmp_path / "a.npz", tmp_path / "a.npz", *TINY)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_copied_alone_in_flat_memory(tmp_path):
    """npz against npz without the other files; 4,000 images, 37 MB more than 1,000, raise the peak by less than 15."""
    shutil.copy(ROOT / "fid.py", tmp_path)
    for count in (10, 1000, 4000):
        np.savez(tmp_path / f"{count}.npz", np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))
    code = """
import resource, torch, fid
torch.set_num_threads(1)
fid.load_inception = lambda *_: lambda images: 3 * (images.float().mean((2, 3)),)
fid.main(["10.npz", "10.npz", "--device", "cpu"])
for count in (1000, 4000):
    fid.main([f"{count}.npz", "--save-stats", f"{count}-stats.npz", "--device", "cpu"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # MiB on Linux
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    *scores, small, large = result.stdout.splitlines()
    assert [line.split()[0] for line in scores] == ["FID", "sFID", "IS", "precision", "recall"]
    assert float(large) - float(small) < 15, f"peaks of {small} and {large} MiB"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of inputs that can't be used, beside good.npz."""
    world = tmp_path_factory.mktemp("world")
    images = save_images(world / "good.npz", 4, size=16).permute(0, 2, 3, 1).numpy()
    (world / "text.npz").write_text("no zip")
    np.savez(world / "wide.npz", images.repeat(2, 2))
    with fid.zipfile.ZipFile(world / "good.npz") as whole, fid.zipfile.ZipFile(world / "cut.npz", "w") as cut:
        cut.writestr("arr_0.npy", whole.read("arr_0.npy")[:-10])
    eye = np.eye(128)
    np.savez(world / "stats.npz", mu=eye[0], sigma=eye, features="dinov2")
    np.savez(world / "nan.npz", mu=eye[0], sigma=np.nan * eye, features="dinov2")
    np.savez(world / "words.npz", mu=np.array(["a"]), sigma=eye, features="dinov2")
    for name in ("a", "b", "c", "d"):
        make_images(world / "broken" / name, 1, seed=ord(name))
    for name in ("b", "d"):
        path = world / "broken" / name / "0000.png"
        path.write_bytes(path.read_bytes()[:60])
    return world


@pytest.mark.parametrize("arguments, said", (  # further rows: tests/test_bad_input.py
    ("good.npz text.npz", "text.npz is missing, or neither a folder of images nor a whole npz"),
    ("cut.npz good.npz", "cut.npz: arr_0 is uint8 (4, 16, 16, 3) in 3062 bytes: give whole"),
    ("stats.npz good.npz", "stats.npz holds no statistics (mu, sigma) of inception"),
    ("nan.npz good.npz --features dinov2", "nan.npz: sigma must be finite"),
    ("words.npz good.npz --features dinov2", "words.npz cannot be read as statistics (ValueError)"),
    ("stats.npz stats.npz --paired --features dinov2", "not 0 and 0"),
    ("good.npz wide.npz --size 16", "16 x 16 and 16 x 32: make them one size"),
    ("good.npz good.npz --save-stats stats.npz", "stats.npz exists: move it away"),
    ("good.npz good.npz --size small", "--size: invalid positive value: 'small'"),
))
def test_refusals(world, monkeypatch, capsys, arguments, said):
    """One line, exit code 2, before any network is made."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(fid, "load_inception", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(fid, "DINOv2", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="2"):
        fid.main(["--device", "cpu", *arguments.split()])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and ": error: " in error


@pytest.mark.parametrize("workers", (0, 1))
def test_all_unreadable_files_are_named(world, capfd, workers, tiny):
    with pytest.raises(SystemExit, match="2"):
        fid.main([str(world / "broken"), *TINY, "--batch", "1", "--workers", str(workers), "--size", "16",
                  "--save-stats", str(world / "new.npz")])
    lines = [line for line in capfd.readouterr().err.splitlines() if "cannot read" in line]
    assert [name for line, name in zip(lines, "bd", strict=True) if f"broken/{name}/0000.png" in line] == ["b", "d"]
    assert not (world / "new.npz").exists()


def test_a_folder_of_broken_images_is_refused_in_one_line(tmp_path, capfd, tiny):
    """By a process of the loader, whose traceback does not show."""
    for path in make_images(tmp_path / "broken", 2).iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SystemExit, match="2"):
        fid.main([str(tmp_path / "broken"), *TINY, "--workers", "1", "--save-stats", str(tmp_path / "new.npz")])
    (line,) = [line for line in capfd.readouterr().err.splitlines()
               if line.strip() and "%|" not in line and "cannot read " not in line]
    assert "error: 100 images in a row could not be read" in line


@pytest.mark.parametrize("key, bad", (("mu", np.zeros(2047)), ("sigma_s", np.eye(2)), ("mu_s", np.zeros((2023, 1)))))
def test_load_statistics_refuses_other_shapes(tmp_path, key, bad):
    eye = np.eye(2048, dtype=np.int8)
    good = dict(mu=eye[0], sigma=eye, mu_s=eye[0, :2023], sigma_s=eye[:2023, :2023])
    np.savez(tmp_path / "stats.npz", **good)
    assert fid.load_statistics(tmp_path / "stats.npz")["sigma_s"].shape == (2023, 2023)
    np.savez(tmp_path / "stats.npz", **good | {key: bad})
    with pytest.raises(ValueError, match=f"{key} must be"):
        fid.load_statistics(tmp_path / "stats.npz")
