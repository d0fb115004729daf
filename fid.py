"""Compare two sets of images by the numbers of the ADM evaluation suite.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz       # FID, sFID, Inception score, precision, recall
    python fid.py imagenet/val recon.npz --paired                   # rFID, PSNR, SSIM, LPIPS
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --features dinov2
    python fid.py imagenet/val --save-stats val256.npz              # a reference for later runs

Each set is a folder of images (ADM's centre crop), an npz of uint8 images (arr_0, N x H x W x 3), an npz of statistics
(mu, sigma, mu_s, sigma_s) or an npz with both. FID and sFID use the file's statistics where it has them. A score whose
inputs are missing is left out. --paired compares the i-th images; those of two folders must bear the same names.

Published gFIDs have the ADM release's VIRTUAL_*.npz as REFERENCE, published rFIDs the 50,000 ImageNet validation
images. The Frechet distance of few images is biased: compare numbers of equally many. Networks run in float32 without
TF32; statistics and distances are float64. The batch size changes nothing but float rounding. Precision and recall
differ from the TensorFlow suite's by about 0.002, because it takes distances in float16.

Weights are fetched once, by timm and torch.hub, or come from local files. Folders need encoder.py beside this file.
Notation: B batch, C channels, H x W pixels or grid, D feature dimension, N, M images.
"""

import argparse
import contextlib
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"


def pretrained(model, weights, flag, **options):
    """timm's `model` with its pretrained weights: from the hub, fetched once, or from the local file `weights`.

    Every weight must be there. Raises ValueError, in one line that names the flag, where they can't be had.
    """
    overlay = dict(file=str(weights), custom_load=False) if weights else None
    try:
        if weights:
            open(weights, "rb").close()  # timm says less where it is missing
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # the hub's client and the readers of files raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:200]
        raise ValueError(f"cannot load {weights or 'the weights'} of {model} ({reason}): check the network, or give a "
                         f"local file with {flag}") from None


def load_weights(module, url, path, flag):
    """Fill the module from the .pth file at `path`, or, without one, from the URL, fetched once by torch.hub.

    It must hold the module's keys, no more and no fewer. Raises ValueError as pretrained() does.
    """
    try:
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:  # the network and the unpickler raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:200]
        raise ValueError(f"cannot load {path or url} ({reason}): check the network, or give a local file with "
                         f"{flag}") from None


# --- Inception (arXiv 1512.00567) as in TensorFlow's graph of 2015, and DINOv2 ---------------------------------------


def resize_tensorflow1(x, size):
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: output i reads at i * H / size."""
    for dim in (3, 2):
        length = x.shape[dim]
        position = torch.arange(size, device=x.device).float() * (length / size)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def leave_out_padding(norm, inputs):
    """Forward pre-hook in a pooling branch: turn timm's average over 3 x 3, padding included, into one without it.

    The hook follows the branch's 1 x 1 convolution, where the channels are few. The two commute: it has no bias.
    """
    (x,) = inputs
    inside = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)  # (1, 1, H, W): 4/9 in corners, 6/9 on edges
    return x / inside


class InceptionV3(timm.models.InceptionV3):
    """The network of FID, sFID and the Inception score: timm's with other pools in its pooling branches. Frozen.

    forward(images uint8 (B, 3, H, W) of any size) -> float32 (pool (B, 2048), spatial (B, 2023), logits (B, 1008)):
    pool for FID, precision and recall; spatial, 7 channels on 17 x 17 flattened (h, w, c), for sFID; logits without
    their bias for the Inception score. weights: path of pytorch-fid's pt_inception-2015-12-05-6726825d.pth; None:
    fetched once. Raises ValueError for images that aren't uint8 and for weights that can't be had.
    """

    def __init__(self, weights=None):
        super().__init__(num_classes=1008)
        load_weights(self, INCEPTION, weights, "--inception-weights")
        for name, block in self.named_children():
            if hasattr(block, "branch_pool") and name != "Mixed_7c":
                block.branch_pool.bn.register_forward_pre_hook(leave_out_padding)
        self.eval().requires_grad_(False)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: give uint8 from 0 to 255")
        x = (resize_tensorflow1(images.float(), 299) - 128) / 128  # (B, 3, 299, 299)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # a CPU's convolutions are faster in this order
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023), from branch1x1, which comes first
        x = self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))  # (B, 2048, 8, 8)
        # Mixed_7c pools by maximum: a slip of the 2015 graph that every published FID shares
        branch = self.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))  # (B, 192, 8, 8)
        x = torch.cat([self.Mixed_7c(x)[:, :-192], branch], 1)  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))  # (B, 2048)
        return pool, spatial, pool @ self.fc.weight.T


class DINOv2(nn.Module):
    """The network of FD-DINOv2 (arXiv 2306.04675): ViT-L/14 without registers, its CLS token after the final norm.

    forward(images uint8 (B, 3, H, W) of any size) -> (float32 (B, 1024),). Frozen.
    weights: path of timm's or the authors' file; None: fetched once. Raises ValueError where they can't be had.
    """

    def __init__(self, weights=None, model="vit_large_patch14_dinov2.lvd142m"):
        super().__init__()
        self.vit = pretrained(model, weights, "--dinov2-weights")  # for 518 px
        cls, grid = self.vit.pos_embed.detach().split([1, 37 * 37], 1)  # (1, 1, D), (1, 37 * 37, D)
        grid = grid.mT.unflatten(2, (37, 37))  # (1, D, 37, 37)
        # the original's resampling; timm's would scale by 16 / 37, antialiased
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # (1, D, 16, 16)
        self.vit.set_input_size((224, 224))
        self.vit.pos_embed = nn.Parameter(torch.cat([cls, grid.flatten(2).mT], 1))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        x = images.float()
        for size in ((x.shape[2], 224), (224, 224)):  # width, then height, each to 8 bits, as Pillow resizes
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return (self.vit.forward_features((x - self.mean) / self.std)[:, 0],)


# --- Distances between sets of features ------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean (D,) and covariance (D, D; ddof 1) of features, accumulated in float64 over batches (B, D) of any size.

    The scatter is kept about the running mean (Chan et al. 1979), so that nothing cancels.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def update(self, features):
        x = features.double()  # (B, D)
        mean, total = x.mean(0), self.count + len(x)
        delta, x = mean - self.mean, x - mean
        self.scatter += x.T @ x + delta.outer(delta) * (self.count * len(x) / total)  # (D, D)
        self.mean += delta * (len(x) / total)  # (D,)
        self.count = total

    @property
    def cov(self):
        return self.scatter / (self.count - 1)


def covariance_root(sigma):
    """L (D, r) with L L^T = sigma (D, D); eigenvalues that are zero up to rounding are left out."""
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (arXiv 1706.08500, eq. 6) -> float, never negative.

    mu (D,), sigma (D, D): arrays or tensors; computed in float64 by scipy. With sigma_i = L_i L_i^T the root's trace
    is the sum of the singular values of L1^T L2: real, symmetric in the sets, and stable for singular covariances,
    where matrix square roots are not. Raises ValueError for shapes that don't match and values that aren't finite.
    """
    arrays = [x.detach().cpu().double() if torch.is_tensor(x) else x for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = arrays = [np.asarray(x, np.float64) for x in arrays]
    shapes = [x.shape for x in arrays]
    if shapes != 2 * [(mu1.size,), (mu1.size, mu1.size)]:
        raise ValueError(f"statistics that don't match: mu1, sigma1, mu2, sigma2 have the shapes {shapes}")
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError("the statistics hold values that are not finite")
    root = scipy.linalg.svdvals(covariance_root(sigma1).T @ covariance_root(sigma2)).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root), 0.0)


def squared_distances(a, b):
    """float64 (N, D), (M, D) -> float32 (N, M). Equal features get 0, not what float64's cancellation leaves."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = torch.addmm(norms, a, b.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * norms, 0).float()


def precision_recall(reference, samples, k=3, block=1024):
    """Improved precision and recall (arXiv 1904.06991, eq. 2) -> two floats in [0, 1].

    reference (N, D), samples (M, D): features. Precision is the share of samples no further from some reference feature
    than its k-th neighbour, itself excluded; recall the reverse. Distances are exact to float32, `block` rows of them
    at a time. Raises ValueError for k features or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} features, not {len(reference)} and {len(samples)}")
    reference, samples = reference.double(), samples.double()

    def radii(x):  # the nearest of all, at 0, is the feature itself
        return torch.cat([squared_distances(rows, x).kthvalue(k + 1).values for rows in x.split(block)])

    reference_radii, sample_radii = radii(reference), radii(samples)  # (N,), (M,)
    inside = torch.zeros_like(sample_radii, dtype=torch.bool)
    covered = 0
    for rows, row_radii in zip(reference.split(block), reference_radii.split(block), strict=True):
        squares = squared_distances(rows, samples)  # (block, M)
        inside |= (squares <= row_radii[:, None]).any(0)
        covered += (squares <= sample_radii).any(1).sum().item()
    return inside.double().mean().item(), covered / len(reference)


def inception_score(logits, split_size=5000):
    """exp(E KL(p(y|x) || p(y))) (arXiv 1606.03498), mean over splits of the logits (N, classes) in order -> float."""
    scores = []  # a last, short split counts like the others, as in the ADM suite
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * log_p - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


# --- Distances between pairs of images -------------------------------------------------------------------------------


def psnr(a, b):
    """Images (B, 3, H, W) in [0, 1], twice -> (B,) dB, float64. At most 100, so that equal images keep means finite."""
    return (-10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()).clamp(max=100)


def ssim(a, b):
    """Images (B, C, H, W) in [0, 1] with sides above 5, twice -> (B,), float64 (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; k1 0.01, k2 0.03; reflected borders; mean over the full map.
    """
    a, b = a.double(), b.double()
    window = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]

    def blur(x):  # eleven shifted sums along each side: faster in float64 than a convolution
        h, w = x.shape[2:]
        x = F.pad(x, (5, 5, 5, 5), mode="reflect") / sum(window) ** 2
        x = sum(weight * x[..., i : i + w] for i, weight in enumerate(window))
        return sum(weight * x[..., i : i + h, :] for i, weight in enumerate(window))

    mean_a, mean_b = blur(a), blur(b)  # (B, C, H, W)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (luminance * (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)).mean((1, 2, 3))


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924), VGG16, v0.1. The weights are frozen.

    forward(a, b): images (B, 3, H, W) in [-1, 1] with sides of 16 or more -> (B,), differentiable in both.
    vgg_weights: path of VGG16, torchvision's or timm's, with its classifier; lpips_weights: path of v0.1's vgg.pth;
    None: fetched once. Raises ValueError where they can't be had.
    """

    layers = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 and their channels

    def __init__(self, vgg_weights=None, lpips_weights=None):
        super().__init__()
        heads = [nn.Sequential(nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)) for c in self.layers.values()]
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(heads)})
        load_weights(self.heads, LPIPS_HEADS, lpips_weights, "--lpips-weights")
        self.features = pretrained("vgg16.tv_in1k", vgg_weights, "--vgg-weights").features[:30]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def unit_features(self, x):
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                y = x.float()  # training may run the layers in bf16, but not what follows
                yield y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-10)  # (B, C, H, W)

    def forward(self, a, b):
        distance = 0
        for head, fa, fb in zip(self.heads.values(), self.unit_features(a), self.unit_features(b), strict=True):
            with torch.autocast(fa.device.type, enabled=False):
                distance = distance + head["model"]((fa - fb).square()).mean((1, 2, 3))
        return distance  # (B,)


# --- Command line ----------------------------------------------------------------------------------------------------

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # the ADM suite's keys: two for FID, two for sFID


@contextlib.contextmanager
def reading(path):
    """Turn what zipfile and numpy raise for a file that is no whole npz into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # a wrong checksum, a cut member, a pickle: each raises another kind
        raise ValueError(f"{path} is neither a folder nor a whole npz ({type(error).__name__}: {error})") from None


def load_statistics(path, features="inception"):
    """Read an npz of statistics, ADM's or of --save-stats -> {"mu": (D,), "sigma": (D, D)}, float64 arrays.

    mu_s and sigma_s, for sFID, are there where the file has them. A file that names no features holds Inception's.
    Raises ValueError for another file, other features, other shapes, values not finite.
    """
    with reading(path), np.load(path) as npz:
        keys, found = list(npz), str(npz.get("features", "inception"))
        statistics = {key: npz[key].astype(np.float64) for key in STATISTICS if key in keys}
    fix = f"give an npz of images (arr_0), or of fid.py FOLDER --save-stats OUT.npz --features {features}"
    if missing := {"mu", "sigma"} - statistics.keys():
        raise ValueError(f"{path} holds {', '.join(keys) or 'nothing'}, but no {' and '.join(sorted(missing))}: {fix}")
    if found != features:
        raise ValueError(f"{path} holds statistics of {found}, not of {features}: {fix}")
    D, S = (2048, 2023) if features == "inception" else 2 * (statistics["mu"].size,)
    shapes = {"mu": (D,), "sigma": (D, D), "mu_s": (S,), "sigma_s": (S, S)}
    for key, x in statistics.items():
        if x.shape != shapes[key] or not np.isfinite(x).all():
            raise ValueError(f"{path}: {key} must be finite numbers of shape {shapes[key]}: {fix}")
    return statistics


def save_statistics(path, statistics, features):
    """Write an npz beside `path`, then move it there, so that what is at `path` is always whole."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            np.savez(file, **statistics, features=features)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class ImageSet:
    """REFERENCE or SAMPLES: `count` images of `size` (H, W), in a folder or an npz, and their statistics."""

    def __init__(self, path, features):
        self.path, self.folder, self.count, self.size = path, None, 0, None
        self.given, self.pool, self.logits = {}, [], []  # given: the statistics in the file
        self.measured = [FeatureStatistics(), FeatureStatistics()]  # for FID, for sFID
        if os.path.isdir(path):
            from encoder import ImageFolder
            self.folder = ImageFolder(path)
            self.count = len(self.folder)
            return
        with reading(path), zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in keys:
                with archive.open("arr_0.npy") as member:
                    np.lib.format.read_magic(member)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                    self.start = member.tell()
                held = archive.getinfo("arr_0.npy").file_size - self.start
        if "arr_0" not in keys or "mu" in keys and features == "inception":
            self.given = load_statistics(path, features)
        if "arr_0" in keys:
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not 0 < math.prod(shape) == held:
                raise ValueError(f"{path}: arr_0 is {'Fortran-ordered ' * fortran}{dtype} {shape} in {held} bytes: "
                                 "give whole, C-ordered uint8 (N, H, W, 3)")
            self.count, self.size = shape[0], shape[1:3]

    def __str__(self):
        size = " x ".join(map(str, self.size or ()))
        if self.folder:
            return f"{self.folder.summary()}; cropped to {size}"
        held = ["statistics"] * bool(self.given) + [f"{self.count} images of {size}"] * bool(self.count)
        return f"{self.path}: {' and '.join(held)}"

    def batches(self, args):
        """Yield the images in order, uint8 (B, 3, H, W). An npz is read batch by batch: 50,000 images are 10 GB."""
        if self.folder:
            from encoder import default_workers, evaluation_batches
            order, total = range(self.count), math.ceil(self.count / args.batch)
            workers = default_workers() if args.workers is None else args.workers
            images = evaluation_batches(self.folder, order, self.size[0], args.batch, workers, args.device)
            yield from tqdm(images, self.path, total, leave=False, unit="batch")
            return
        with reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.read(self.start)
            for first in tqdm(range(0, self.count, args.batch), self.path, leave=False, unit="batch"):
                shape = (min(args.batch, self.count - first), *self.size, 3)
                images = torch.frombuffer(bytearray(member.read(math.prod(shape))), dtype=torch.uint8)
                yield images.view(shape).permute(0, 3, 1, 2)

    def measure(self, outputs, keep=False):
        """Take in a network's outputs for a batch, each (B, D). Keep pool and logits for scores that need them all."""
        for statistics, x in zip(self.measured, outputs, strict=False):  # DINOv2 has one output, Inception three
            statistics.update(x)
        if keep:
            self.pool.append(outputs[0])
            self.logits.append(outputs[2])

    def statistics(self):
        """{"mu": (D,), "sigma": (D, D), ...}, float64 arrays: the file's own where it has them, else the images'."""
        moments = [y.cpu().numpy() for x in self.measured if x.count for y in (x.mean, x.cov)]
        return self.given or dict(zip(STATISTICS, moments, strict=False))


def check(args, sets):
    """Settle the size of folders and refuse, before any work, what can't be compared or written: ValueError."""
    if len(sets) == 1 and (args.paired or not args.save_stats):
        raise ValueError("SAMPLES is missing: give it, or --save-stats OUT.npz alone")
    if args.save_stats and (os.path.exists(args.save_stats) or not Path(args.save_stats).parent.is_dir()):
        raise ValueError(f"--save-stats {args.save_stats}: it exists, or its folder does not: choose another path")
    folders, sizes = [x for x in sets if x.folder], {x.size for x in sets if x.size}
    if args.size and not folders:
        raise ValueError(f"--size {args.size} is for folders, whose images are cropped to it: leave it out")
    edge = args.size or (min(sizes)[0] if sizes else 256)
    for folder in folders:
        folder.size = (edge, edge)
        sizes.add(folder.size)
    both = " and ".join(map(str, sets))
    if any(x.count < 2 and not x.given for x in sets):
        raise ValueError(f"{both}: give at least 2 images on each side")
    if len(sizes) > 1:
        raise ValueError(f"{both}: make them one size")
    if args.paired and (sets[0].count != sets[1].count or not sets[0].count):
        raise ValueError(f"--paired needs as many images on both sides, not {both}")
    if args.paired and min(min(sizes)) < (6 if args.no_lpips else 16):
        raise ValueError(f"{both}: SSIM needs sides of 6 pixels, LPIPS of 16 (or give --no-lpips)")
    if args.paired and len(folders) == 2:
        names = [[os.path.relpath(os.fsdecode(path), x.folder.root) for path in x.folder.paths] for x in folders]
        for a, b in zip(*names, strict=True):
            if os.path.splitext(a)[0] != os.path.splitext(b)[0]:
                raise ValueError(f"--paired would compare {a} of {args.reference} with {b} of {args.samples}: give "
                                 "the images the same names")


def set_scores(args, reference, samples):
    """Two measured sets -> {name: score}: Frechet distances, IS, precision and recall whose inputs are there."""
    a, b = reference.statistics(), samples.statistics()
    name = "FD-DINOv2" if args.features == "dinov2" else "rFID" if args.paired else "FID"
    scores = {name: frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])}
    if name == "FID" and {"mu_s", "sigma_s"} <= a.keys() & b.keys():
        scores["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if samples.logits:
        scores["IS"] = inception_score(torch.cat(samples.logits))
    if reference.pool and samples.pool and min(reference.count, samples.count) > 3:
        pools = torch.cat(reference.pool), torch.cat(samples.pool)  # (N, 2048), (M, 2048)
        scores["precision"], scores["recall"] = precision_recall(*pools)
    return scores


@torch.no_grad()
def run(args):
    """The command line -> {name: score}; {} where it only saves statistics."""
    sets = [ImageSet(path, args.features) for path in (args.reference, args.samples) if path is not None]
    check(args, sets)
    print(*sets, sep="\n", file=sys.stderr)  # stdout is for the scores
    keep = args.features == "inception" and len(sets) == 2  # for IS, precision and recall
    with_images = [x for x in sets if x.count]
    network = lpips = None
    if args.paired and not args.no_lpips:
        print("loading LPIPS:", args.vgg_weights or "vgg16.tv_in1k (fetched once),",
              args.lpips_weights or "vgg.pth (fetched once)", file=sys.stderr)
        lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(args.device)
    if with_images and args.features == "dinov2":
        print("loading DINOv2:", args.dinov2_weights or "vit_large_patch14_dinov2 (fetched once)", file=sys.stderr)
        network = DINOv2(args.dinov2_weights).to(args.device)
    elif with_images:
        print("loading Inception:", args.inception_weights or f"{INCEPTION} (fetched once)", file=sys.stderr)
        network = InceptionV3(args.inception_weights).to(args.device)

    pairs = {"PSNR": [], "SSIM": [], "LPIPS": []}
    if args.paired:
        for a, b in zip(*(x.batches(args) for x in sets), strict=True):
            a, b = a.to(args.device), b.to(args.device)
            sets[0].measure(network(a))
            sets[1].measure(network(b))
            a, b = a / 255, b / 255
            pairs["PSNR"].append(psnr(a, b))
            pairs["SSIM"].append(ssim(a, b))
            if lpips:
                pairs["LPIPS"].append(lpips(2 * a - 1, 2 * b - 1))
    else:
        for x in with_images:
            for images in x.batches(args):
                x.measure(network(images.to(args.device)), keep)
    if args.save_stats:
        save_statistics(args.save_stats, sets[0].statistics(), args.features)
    scores = set_scores(args, *sets) if len(sets) == 2 else {}
    return scores | {name: torch.cat(values).double().mean().item() for name, values in pairs.items() if values}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder of images, or npz of images and/or statistics")
    add("samples", metavar="SAMPLES", nargs="?", help="the other set, likewise; may be left out with --save-stats")
    add("--paired", action="store_true", help="compare image i with image i: rFID, PSNR, SSIM, LPIPS (default: sets)")
    add("--features", choices=["inception", "dinov2"], default="inception",
        help="dinov2: FD-DINOv2 in place of Inception's scores (default: %(default)s)")
    add("--size", type=int, help="side in pixels to which folders are cropped (default: as the other set, else 256)")
    add("--batch", type=int, default=64, help="images per forward pass (default: %(default)s)")
    add("--workers", type=int, help="processes that decode a folder (default: by the cores)")
    add("--device", choices=devices, default=devices[-1], help="device of the networks (default: %(default)s)")
    add("--inception-weights", metavar="PATH", help="local pt_inception-2015-12-05-6726825d.pth (default: fetch it)")
    add("--dinov2-weights", metavar="PATH", help="local DINOv2 ViT-L/14, timm's or the authors' (default: fetch it)")
    add("--vgg-weights", metavar="PATH", help="local VGG16 of torchvision or timm, for LPIPS (default: fetch it)")
    add("--lpips-weights", metavar="PATH", help="local vgg.pth of LPIPS v0.1 (default: fetch it)")
    add("--no-lpips", action="store_true", help="leave LPIPS and its weights out of --paired (default: included)")
    add("--save-stats", metavar="OUT.npz", help="write REFERENCE's statistics, usable as an input (default: don't)")
    args = parser.parse_args(argv)
    for name, least in {"batch": 1, "size": 1, "workers": 0}.items():
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value}: give {least} or more")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 asks for TF32
    torch.backends.cudnn.allow_tf32 = False
    try:
        scores = run(args)
    except ValueError as error:  # a loader's process puts its traceback before the message
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())
    for name, score in scores.items():
        print(f"{name:<10}{score:.4f}")


if __name__ == "__main__":
    main()
