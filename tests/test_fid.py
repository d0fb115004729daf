"""fid.py: golden values, closed forms, comparisons with scipy, and the command line."""

import copy
import errno
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, golden, make_images, read, read_golden
from PIL import Image
from scipy.spatial.distance import cdist

import encoder
import fid


@pytest.fixture(scope="module")
def inception(inception_weights):
    return fid.InceptionV3(inception_weights)


@pytest.fixture(scope="module")
def lpips(lpips_weights):
    return fid.LPIPS(*lpips_weights)


def save_images(path, count, size=32, seed=0):
    """An npz of smooth random images, each with a brightness of its own; returns them, uint8 (B, 3, H, W)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)) // 2 + rng.integers(0, 128, (count, 1, 1, 1))
    images = coarse.repeat(size // 4, 1).repeat(size // 4, 2).astype(np.uint8)
    np.savez(path, images)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def run(*argv):
    """Run the command line -> its metrics."""
    metrics, original = {}, fid.run
    with mock.patch.object(fid, "run", lambda args: metrics.update(original(args)) or metrics):
        fid.main([*map(str, argv), "--device", "cpu", "--workers", "0"])
    return metrics


def moments(features):
    """Mean and covariance (ddof 1) of features (N, D)."""
    x = np.asarray(features, np.float64)
    return x.mean(0), np.cov(x.T)


def precision_recall_by_cdist(reference, samples, k=3):
    """With scipy's distances, from differences in float64."""

    def fraction(manifold, points):
        radii = np.sort(cdist(manifold, manifold), 1)[:, k]
        return (cdist(manifold, points) <= radii[:, None]).any(0).mean()

    return fraction(reference, samples), fraction(samples, reference)


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
        measured = fid.FeatureStatistics()
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
    assert (fid.psnr(a, a) == 100).all()  # so that means stay finite
    near = 94 * torch.ones(len(a), dtype=torch.float64)  # dB
    torch.testing.assert_close(fid.psnr(a.double(), a.double() + 10**-4.7), near, rtol=1e-6, atol=0)


@golden("lpips")
def test_golden_lpips(file, lpips):
    arrays, *_ = read_golden(file)
    assert_close(lpips(arrays["a"], arrays["b"]), arrays["lpips"])


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
    tensors = [torch.from_numpy(x).float().requires_grad_() for x in (mu1, sigma, mu2, 4 * sigma)]
    arrays = [x.detach().double().numpy() for x in tensors]
    assert fid.frechet_distance(*tensors) == fid.frechet_distance(*arrays)  # both in float64


def test_frechet_of_singular_covariances():
    """60 and 50 images in 600 dimensions: the trace of the root is the nuclear norm of a 60 x 50 matrix."""
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
    for bad in ((np.zeros(3), eye, np.zeros(4), np.eye(4)), (np.zeros(3), eye, np.zeros(3), np.eye(4)),
                (np.zeros(1), eye, np.zeros(3), eye), (0, eye, 0, eye)):
        with pytest.raises(ValueError, match="shapes"):
            fid.frechet_distance(*bad)
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(np.zeros(3), eye, np.array([0, np.nan, 0]), eye)


@pytest.mark.parametrize("batch", (1, 7, 200))
def test_feature_statistics_do_not_cancel(batch):
    """A mean of 1e5 and a spread of 1, for which a sum of squares in float32 would lose all digits."""
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double() + 1e5
    measured = fid.FeatureStatistics()
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
    expected = precision_recall_by_cdist(reference, samples)
    assert 0.05 < min(expected) and max(expected) < 0.95 and expected[0] != expected[1]
    for block in (1, 7, 64, 1000):
        ours = fid.precision_recall(torch.from_numpy(reference), torch.from_numpy(samples), block=block)
        assert ours == pytest.approx(expected, abs=1e-12)


def test_precision_recall_of_duplicates():
    """Five equal images have radius 0: only equal images are inside."""
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
    # splits of 20 and 10, of equal weight: 5 classes in the first, 1 in the second
    logits = 1e4 * torch.eye(10)[torch.tensor([0, 1, 2, 3, 4] * 4 + [7] * 10)]
    assert fid.inception_score(logits, split_size=20) == pytest.approx((5 + 1) / 2)
    # splits of 5,000 by default: here two classes in turn, then one image alone
    assert fid.inception_score(1e4 * torch.eye(2)[torch.arange(5001) % 2]) == pytest.approx((2 + 1) / 2)


def test_lpips_is_differentiable_and_frozen(lpips):
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
    lpips = copy.deepcopy(lpips)
    lpips.features[28].bias -= 1e6  # the last ReLU gives 0 everywhere: features of norm 0
    assert lpips(a, b).isfinite().all()


def test_inception_takes_uint8_and_computes_in_full_precision(inception):
    with pytest.raises(ValueError, match="float32: give uint8"):
        inception(torch.rand(1, 3, 32, 32))
    seen = []

    def record(_, inputs):
        seen.append((torch.backends.cudnn.allow_tf32, inputs[0].is_contiguous(memory_format=torch.channels_last)))

    torch.backends.cudnn.allow_tf32 = True  # torch's default
    with inception.Conv2d_2a_3x3.register_forward_pre_hook(record):
        inception(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert seen == [(False, True)] and not any(x.requires_grad for x in inception.parameters())


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory):
    """The network of FD-DINOv2 with ViT-S instead of ViT-L; two channels of the positions are x and y."""
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
    # the input is Pillow's resized image, normalised, up to one of 255 levels
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
# Weights


@pytest.mark.parametrize("build, message", (
    (lambda paths: fid.InceptionV3(), "load https://github.com/.*-6726825d.pth .URLError.* --inception-weights$"),
    (lambda paths: fid.InceptionV3("nowhere.pth"), "load nowhere.pth .FileNotFound.* --inception-weights$"),
    (lambda paths: fid.InceptionV3(paths[1]), "heads.pth .RuntimeError.*Missing key.* --inception-weights$"),
    (lambda paths: fid.LPIPS(), "load https://github.com/.*/v0.1/vgg.pth .URLError.* --lpips-weights$"),
    (lambda paths: fid.LPIPS(None, paths[0]), "vgg16.pth .RuntimeError.*Missing key.* --lpips-weights$"),
    (lambda paths: fid.LPIPS(None, paths[1]), "the weights of vgg16.tv_in1k .LocalEntryNotFound.* --vgg-weights$"),
    (lambda paths: fid.DINOv2(paths[1], "vit_tiny_patch16_224"), "heads.pth of vit_tiny.*key.* --dinov2-weights$"),
))
def test_weights_that_cannot_be_loaded_are_an_error_of_one_line(build, message, lpips_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before
    with pytest.raises(ValueError, match=message) as error:
        build(lpips_weights)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_downloads_and_the_modules_that_load_them(monkeypatch, inception_weights, lpips_weights):
    requests, files = [], [*lpips_weights, inception_weights]  # the last is downloaded first

    def download(where, **options):
        requests.append((where, options))
        return read(files.pop())

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    inception, lpips = fid.InceptionV3().state_dict(), fid.LPIPS().state_dict()
    how = dict(map_location="cpu", weights_only=True)
    assert requests[:2] == [(fid.INCEPTION, how), (fid.LPIPS_HEADS, how)] and requests[2][0] == "timm/vgg16.tv_in1k"
    assert all(torch.equal(inception[key], value) for key, value in read(inception_weights).items())
    heads = {f"heads.{key}": value for key, value in read(lpips_weights[1]).items()}
    features = {key: value for key, value in read(lpips_weights[0]).items() if key.startswith("features")}
    assert len(features) == 26 and all(torch.equal(lpips[key], value) for key, value in (heads | features).items())
    with mock.patch.object(fid.timm, "create_model", side_effect=KeyError) as create, pytest.raises(ValueError):
        fid.DINOv2()
    model = "vit_large_patch14_dinov2.lvd142m"
    assert create.mock_calls == [mock.call(model, pretrained=True, pretrained_cfg_overlay=None)]


# ---------------------------------------------------------------------------------------------------------------------
# The command line

DINOV2 = ("--features", "dinov2")


class Colours(torch.nn.Module):
    """A quick network: the mean colours of 4 x 4 parts, (B, 48), as the three outputs of Inception."""

    def __init__(self, weights):
        super().__init__()
        Colours.weights = weights

    def forward(self, images):
        return 3 * (F.adaptive_avg_pool2d(images / 255, 4).flatten(1),)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fid, "InceptionV3", Colours)
    monkeypatch.setattr(fid, "DINOv2", type("Once", (Colours,), dict(forward=lambda *x: Colours.forward(*x)[:1])))


def colours(images):
    return Colours(None)(images)[0]


def quick_distance(mu1, sigma1, mu2, sigma2):
    """Replaces the Frechet distance, which takes 4 seconds in 2048 dimensions, in tests of its inputs."""
    return float(((mu1 - mu2) ** 2).sum() + (sigma1 * sigma2).sum())


def test_inception_suite(tmp_path, inception, monkeypatch, capsys):
    """All five metrics, from the features of the same pass, against numpy and scipy."""
    a = save_images(tmp_path / "a.npz", 6)
    b = torch.cat([a[:2], a[:2] // 2, a[:1] // 3])  # fewer different images than in a: recall is below precision
    np.savez(tmp_path / "b.npz", b.permute(0, 2, 3, 1))
    seen = []

    class Recorded(Colours):
        def forward(self, images):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            seen.append((images.clone(), *inception(images)))
            return seen[-1][1:]

    monkeypatch.setattr(fid, "InceptionV3", Recorded)
    monkeypatch.setattr(fid, "frechet_distance", quick_distance)
    monkeypatch.chdir(tmp_path)
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 starts PyTorch
    torch.backends.cudnn.allow_tf32 = True
    scores = run("a.npz", "b.npz", "--inception-weights", "w.pth", "--batch", 4)
    printed, log = capsys.readouterr()
    assert log.startswith("a.npz: 6 images of 32 x 32\nb.npz: 5 images of 32 x 32\nloading inception\n")
    assert Colours.weights == "w.pth"
    assert [len(batch[0]) for batch in seen] == [4, 2, 4, 1]
    images, *outputs = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(images, torch.cat([a, b]))
    (pool_a, pool_b), (spatial_a, spatial_b), (_, logits) = (np.split(x.double().numpy(), [6]) for x in outputs)
    assert scores["FID"] == pytest.approx(quick_distance(*moments(pool_a), *moments(pool_b)), rel=1e-5)
    assert scores["sFID"] == pytest.approx(quick_distance(*moments(spatial_a), *moments(spatial_b)), rel=1e-5)
    p = scipy.special.softmax(logits, 1)
    assert scores["IS"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-5)
    expected = precision_recall_by_cdist(pool_a, pool_b)
    assert (scores["precision"], scores["recall"]) == pytest.approx(expected) and expected[0] != expected[1]
    assert printed == "".join(f"{name:<10}{value:.4f}\n" for name, value in scores.items())


def test_statistics_in_a_file_are_used(tmp_path, quick, monkeypatch, capsys):
    """For FID and sFID; the other metrics need images, which the references of the ADM release also have."""
    monkeypatch.setattr(fid, "frechet_distance", quick_distance)
    monkeypatch.chdir(tmp_path)
    images, eye = save_images("c.npz", 3), np.eye(2048, dtype=np.int8)
    for name, scale, more in (("a", 1, {}), ("b", 4, dict(arr_0=images.permute(0, 2, 3, 1)))):
        mu, sigma = np.full(2048, scale), scale * eye
        np.savez(f"{name}.npz", mu=mu, sigma=sigma, mu_s=mu[:2023], sigma_s=sigma[:2023, :2023], **more)
    np.savez("fid.npz", mu=eye[0], sigma=eye)
    expected = {"FID": (9 + 4) * 2048, "sFID": (9 + 4) * 2023}
    scores = run("a.npz", "b.npz")
    assert scores.pop("IS") > 1 and scores == expected
    assert capsys.readouterr().err.startswith("a.npz: statistics\nb.npz: 3 images of 32 x 32\nloading inc")
    assert run("b.npz", "fid.npz").keys() == {"FID"}  # without mu_s
    assert run("c.npz", "c.npz").keys() == {"FID", "sFID", "IS"}  # precision and recall need more than three images
    assert run("b.npz", "c.npz", *DINOV2)["FD-DINOv2"] < 1  # other features are computed from the images
    monkeypatch.setattr(fid, "InceptionV3", lambda *_: pytest.fail("nothing to measure"))
    assert run("a.npz", "a.npz") == {"FID": 2048, "sFID": 2023}


def test_saved_statistics_as_a_reference(tmp_path, quick):
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    features = [colours(save_images(path, 150 - 10 * i, seed=i)) for i, path in enumerate(paths)]
    direct = run(*paths, *DINOV2)
    expected = fid.frechet_distance(*moments(features[0]), *moments(features[1]))
    assert direct == {"FD-DINOv2": pytest.approx(expected, rel=1e-5)} and expected > 1e-4
    assert run(paths[0], "--save-stats", tmp_path / "stats.npz", *DINOV2) == {}
    assert np.load(tmp_path / "stats.npz")["sigma"].shape == (48, 48)
    assert run(tmp_path / "stats.npz", paths[1], *DINOV2) == pytest.approx(direct, rel=1e-9)
    run(paths[0], paths[1], "--save-stats", tmp_path / "inception.npz")
    saved = np.load(tmp_path / "inception.npz")
    assert saved["features"] == "inception" and saved["mu_s"].shape == (48,)
    np.testing.assert_allclose(saved["sigma_s"], moments(features[0])[1], rtol=1e-4, atol=1e-7)


def test_a_full_disk_leaves_no_incomplete_statistics(tmp_path, quick, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    save_images(tmp_path / "a.npz", 4)
    argv = tmp_path / "a.npz", "--save-stats", tmp_path / "s.npz"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(np, "savez", full)
        run(*argv)
    assert not (tmp_path / "s.npz").exists()
    run(*argv)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "s.npz"]


def test_paired_does_not_depend_on_batches(tmp_path, lpips_weights, lpips, quick, monkeypatch, capsys):
    a, other = save_images(tmp_path / "a.npz", 7), save_images(tmp_path / "b.npz", 7, seed=1)
    b = (0.7 * a + 0.3 * other).byte()
    np.savez_compressed(tmp_path / "b.npz", b.permute(0, 2, 3, 1))
    argv, (vgg, heads) = (tmp_path / "a.npz", tmp_path / "b.npz", "--paired"), lpips_weights
    scores = run(*argv, "--vgg-weights", vgg, "--lpips-weights", heads)
    mse = ((a / 255.0 - b / 255.0) ** 2).mean((1, 2, 3)).numpy()
    expected = {"PSNR": (10 * np.log10(1 / mse)).mean(), "SSIM": fid.ssim(a / 255, b / 255).mean().item()}
    sets = {"LPIPS": lpips(a / 127.5 - 1, b / 127.5 - 1).mean().item(),
            "rFID": fid.frechet_distance(*moments(colours(a)), *moments(colours(b)))}
    assert scores == pytest.approx(expected | sets, rel=1e-5)
    monkeypatch.setattr(fid, "LPIPS", lambda *paths: lpips if paths == (None, None) else pytest.fail("wrong files"))
    assert run(*argv, "--batch", 3) == pytest.approx(scores, rel=1e-5)
    assert "b.npz: 7 images of 32 x 32\nloading inception\n" in capsys.readouterr().err
    scores = run(*argv, "--no-lpips", *DINOV2)
    assert scores.pop("FD-DINOv2") > 1e-4 and scores == pytest.approx(expected, rel=1e-5)
    run(*argv, "--no-lpips", *DINOV2, "--dinov2-weights", "d.pth")
    assert Colours.weights == "d.pth" and capsys.readouterr().err.count("loading dinov2\n") == 2


def test_folder_is_cropped_as_adm_does(tmp_path, quick, capsys):
    """A folder of several sizes is equal to an npz of its crops, in order, of the npz's size or --size."""
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    crops = []
    for i in range(5):
        image = Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3)).astype(np.uint8))
        image.save(tmp_path / "folder" / f"{i}.png")
        crops.append(np.array(encoder.center_crop(image, 32)))
    (tmp_path / "folder" / "5.heic").touch()
    np.savez(tmp_path / "crops.npz", np.stack(crops))
    argv = (tmp_path / "folder", tmp_path / "crops.npz", "--paired", "--no-lpips", "--batch", 2)
    for more in ((), ("--size", 32), ("--workers", 1)):
        scores = run(*argv, *more)
        assert scores == {"rFID": pytest.approx(0, abs=1e-9), "PSNR": 100, "SSIM": pytest.approx(1)}
        line, *_ = capsys.readouterr().err.splitlines()
        assert line.startswith(encoder.ImageFolder(tmp_path / "folder").summary() + "; cropped to ")
        assert ".heic 1" in line and line.endswith("32 x 32")
    np.savez(tmp_path / "crops.npz", np.stack(crops[::-1]))
    assert run(*argv)["SSIM"] < 0.9
    run(tmp_path / "folder", "--save-stats", tmp_path / "s.npz")
    image = np.stack([encoder.center_crop(encoder.open_image(tmp_path / "folder" / f"{i}.png"), 256) for i in range(5)])
    mean = colours(torch.from_numpy(image).permute(0, 3, 1, 2)).mean(0)  # 256 px, without another set
    np.testing.assert_allclose(np.load(tmp_path / "s.npz")["mu"], mean.double(), rtol=1e-4, atol=1e-6)


def test_two_folders_are_paired_by_name(tmp_path, quick, capsys):
    """Twelve images as a/0.png to a/11.png, as b/x/00.bmp to b/x/11.bmp, and as c/x/00.png to c/x/11.png."""
    for i in range(12):
        image = Image.open(make_images(tmp_path / "image", 1, seed=i) / "0000.png")
        for path in (f"a/{i}.png", f"b/x/{i:02}.bmp", f"c/x/{i:02}.png"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / path)
    argv = ("--paired", "--no-lpips", "--size", 32)
    assert run(tmp_path / "b", tmp_path / "c", *argv)["PSNR"] == 100
    lines = capsys.readouterr().err.splitlines()[:2]
    assert all("12 images, 1 classes (x); cropped to " in line and line.endswith("32 x 32") for line in lines)
    for a, b, first in (("a", "b/x", "0.png of {0}/a with 00.bmp of {0}/b/x"),
                        ("c/x", "b", "00.png of {0}/c/x with x/00.bmp of {0}/b")):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / a, tmp_path / b, *argv)
        assert f"compare {first.format(tmp_path)}: give the images the same names\n" in capsys.readouterr().err


def test_large_npz_without_the_other_files(tmp_path):
    """The peak of memory for 4,000 images, 37 MB more than 1,000, is higher by less than 15 MiB."""
    shutil.copy(ROOT / "fid.py", tmp_path)
    for count in (10, 1000, 4000):
        np.savez(tmp_path / f"{count}.npz", np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))
    code = """
import resource, torch, fid
torch.set_num_threads(1)
class Colours(torch.nn.Identity):
    forward = lambda self, images: 3 * (images.float().mean((2, 3)),)
fid.InceptionV3 = Colours
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
    """A folder of inputs that are refused, and good.npz."""
    world = tmp_path_factory.mktemp("world")
    images = save_images(world / "good.npz", 4, size=16).permute(0, 2, 3, 1).numpy()
    eye = np.eye(48)
    arrays = dict(wide=images.repeat(2, 2), void=images[:0], one=images[:1], grey=images[:, 0],
                  rgba=images.repeat(2, 3)[..., :4], fortran=np.asfortranarray(images))
    for name, more in {
        **{name: dict(arr_0=array) for name, array in arrays.items()}, "none": {}, "mu": dict(mu=eye[0]),
        "images": dict(images=images, labels=eye),
        "stats": dict(mu=eye[0], sigma=eye, features="dinov2"), "words": dict(mu=np.array(["a"]), sigma=eye),
        "nan": dict(mu=eye[0], sigma=np.nan * eye, features="dinov2"),
    }.items():
        np.savez(world / f"{name}.npz", **more)
    noise = np.random.default_rng(0).integers(0, 4, (4, 64, 64, 3), np.uint8)
    for name, save, at in (("crc", np.savez, 20000), ("zlib", np.savez_compressed, 100)):
        save(world / f"{name}.npz", noise)
        data = (world / f"{name}.npz").read_bytes()
        (world / f"{name}.npz").write_bytes(data[:at] + bytes(99) + data[at + 99 :])
    (world / "cut.npz").write_bytes((world / "good.npz").read_bytes()[:2000])
    for name, header in dict(short=b"", magic=b"text").items():
        with zipfile.ZipFile(world / "good.npz") as whole, zipfile.ZipFile(world / f"{name}.npz", "w") as file:
            file.writestr("arr_0.npy", header + whole.read("arr_0.npy")[:-10])
    for name in ("some/a", "some/b", "some/c", "some/d", "all"):
        path = make_images(world / name, 2, seed=ord(name[-1])) / "0000.png"
        if name[-1] in "bd":
            path.write_bytes(path.read_bytes()[:60])
    for path in (world / "all").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    return world


@pytest.mark.parametrize("arguments, text", (  # more rows are in tests/test_bad_input.py
    ("cut.npz good.npz", "cut.npz is neither a folder nor an npz"),
    ("magic.npz good.npz", "the magic string is not correct"),
    ("words.npz good.npz", "could not convert string to float"),
    ("void.npz good.npz", "void.npz: 0 images of 16 x 16 and good.npz: 4 images of 16 x 16: give at least 2"),
    ("rgba.npz good.npz", "rgba.npz: arr_0 is uint8 (4, 16, 16, 4): give C-ordered uint8 (N, H, W, 3)"),
    ("grey.npz good.npz", "grey.npz: arr_0 is uint8 (4, 16, 3): give"),
    ("good.npz one.npz", "one.npz: 1 images of 16 x 16: give at least 2 images in each set"),
    ("fortran.npz good.npz", "fortran.npz: arr_0 is uint8 (4, 16, 16, 3), Fortran-ordered: give C-ordered"),
    ("images.npz good.npz", "images.npz contains images, labels of inception: give an npz of images (arr_0), or"),
    ("none.npz good.npz", "none.npz contains  of inception: give"),
    ("mu.npz good.npz", "mu.npz contains mu of inception: give"),
    ("stats.npz good.npz", "stats.npz contains mu, sigma, features of dinov2: give"),
    ("nan.npz nan.npz --features dinov2", "the statistics have values that are not finite"),
    ("stats.npz stats.npz --paired --features dinov2", "sets, not stats.npz: statistics and stats.npz: statistics"),
    ("good.npz wide.npz", "wide.npz: 4 images of 16 x 32: give at least 2 images in each set, of the same size"),
    ("good.npz good.npz --save-stats stats.npz", "--save-stats stats.npz exists: choose another path"),
    ("good.npz --save-stats nowhere/s.npz", "nowhere/s.npz"),
    ("good.npz good.npz --size 16", "--size 16 is for folders"),
    ("good.npz good.npz --size 0", "--size 0 must be above 0"),
    ("good.npz good.npz --batch -1", "--batch -1 and"),
))
def test_refusals(world, monkeypatch, capsys, arguments, text):
    """One line below the usage, and exit code 2, before any network is built."""
    monkeypatch.chdir(world)
    for name in ("InceptionV3", "DINOv2", "LPIPS"):
        monkeypatch.setattr(fid, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="2"):
        fid.main(["--device", "cpu", *arguments.split()])
    usage, _, error = capsys.readouterr().err.rpartition(": error: ")
    assert text in error and error.count("\n") == 1 and "usage: " in usage


@pytest.mark.parametrize("name, error, text", (
    ("crc", zipfile.BadZipFile, "Bad CRC-32"), ("zlib", zlib.error, "Error -3"), ("short", RuntimeError, "is invalid"),
))
def test_damage_among_the_images_is_an_error(world, quick, name, error, text):
    with pytest.raises(error, match=text):
        run(world / f"{name}.npz", world / f"{name}.npz", "--paired", "--no-lpips", "--batch", 1)


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("name, text", (("some", "2 images in "), ("all", "100 images in a row could not be read")))
def test_unreadable_files_are_named(world, capfd, quick, workers, name, text):
    """The error is one line, without the traceback if it comes from a loader process."""
    with pytest.raises(SystemExit, match="2"):
        fid.main([str(world / name), "--batch", "1", "--workers", str(workers), "--size", "16",
                  "--save-stats", str(world / "new.npz")])
    *named, last = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "read" in line]
    assert f": error: {text}" in last and all("cannot read " in line for line in named)
    assert name == "all" or [path in line for line, path in zip(named, ("b/0000", "d/0000"), strict=True)] == [True] * 2
    assert not (world / "new.npz").exists()


@pytest.mark.parametrize("key, bad", (("mu", np.zeros(3)), ("sigma", np.eye(3)), ("sigma_s", np.eye(2)),
                                      ("mu_s", np.zeros((3, 1)))))
def test_statistics_of_other_shapes_are_refused(tmp_path, capsys, key, bad):
    good = dict(mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "good.npz", **good)
    np.savez(tmp_path / "bad.npz", **good | {key: bad})
    assert run(tmp_path / "good.npz", tmp_path / "good.npz") == pytest.approx({"FID": 0, "sFID": 0}, abs=1e-9)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "good.npz", tmp_path / "bad.npz")
    keys = ("mu_s", "sigma_s") if key.endswith("_s") else ("mu", "sigma")
    shapes = [arrays[name].shape for arrays in (good, good | {key: bad}) for name in keys]
    assert f"have shapes that do not match: {shapes}\n" in capsys.readouterr().err


def test_the_default_of_workers(tmp_path):
    folder = make_images(tmp_path / "a", 5)
    _, args = fid.parse_args([str(folder), "--save-stats", str(tmp_path / "x.npz"), "--batch", "3"])
    images = fid.ImageSet(str(folder), "inception")
    fid.check(args, [images])
    assert args.workers is None and [len(batch) for batch in images.batches(args)] == [3, 2]
