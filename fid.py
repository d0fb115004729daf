"""Compare two sets of images by the numbers of the ADM evaluation suite.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz       # FID, sFID, Inception score, precision, recall
    python fid.py imagenet/val recon.npz --paired                   # rFID, PSNR, SSIM, LPIPS
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --features dinov2
    python fid.py imagenet/val --save-stats val256.npz              # a reference for later runs

Each set is a folder of images (ADM's centre crop), an npz of uint8 images (arr_0, N x H x W x 3), an npz of statistics
(mu, sigma, mu_s, sigma_s) or an npz with both, whose statistics FID and sFID then use. A score whose inputs are missing
is left out. Published gFIDs have the ADM release's VIRTUAL_*.npz as REFERENCE, published rFIDs the 50,000 ImageNet
validation images. The Frechet distance of few images is biased: compare numbers of equally many.

Networks run in float32 without TF32; statistics and distances are float64. The batch size changes nothing but float
rounding. Precision and recall differ from the TensorFlow suite's by about 0.002, because it takes distances in float16.
Folders need encoder.py beside this file. The rest works alone.

Notation: B batch, C channels, H x W pixels or grid, D feature dimension, N, M images.
"""

import argparse
import functools
import itertools
import math
import os
import urllib.request
import zipfile

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
TIMM = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/timm/{}/resolve/main/model.safetensors"


def download(url):
    """Path of the file at a URL, downloaded once to torch's hub folder (TORCH_HOME). Raises OSError at once offline."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", "_".join(url.split("/")[3:]))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        urllib.request.urlopen(url, timeout=10).close()  # torch.hub would wait for ever for a host that is silent
        torch.hub.download_url_to_file(url, path)
    return path


def load_weights(module, url, path, flag, prefix=""):
    """Fill the module from the file `path` (.pth, .safetensors), or from the URL, downloaded once, where path is None.

    The file needs every key of the module, each behind `prefix`; other keys are ignored. Raises ValueError, one line
    that names the file to fetch and the flag that takes it.
    """
    try:
        file = download(url) if path is None else path
        open(file, "rb").close()  # a missing file ends here; timm would also log it
        state = timm.models.load_state_dict(file, weights_only=True)
        module.load_state_dict({key: state[prefix + key] for key in module.state_dict()})
    except Exception as error:  # download clients and unpicklers raise many kinds
        problem = f"cannot load {path or 'weights'} ({type(error).__name__})"
        raise ValueError(f"{problem}: fetch {url} and pass it with {flag}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Inception (arXiv 1512.00567) as in TensorFlow's graph of 2015, and DINOv2


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


def recompute_pool_branch(block, inputs, output, pool):
    """Forward hook of timm's blocks: recompute the pooling branch, their last channels, with another pool."""
    pooled = block.branch_pool(pool(inputs[0], 3, 1, 1))
    return torch.cat([output[:, : -pooled.shape[1]], pooled], 1)


class InceptionV3(timm.models.InceptionV3):
    """The network of FID, sFID and the Inception score, by the key names of pt_inception-2015-12-05-6726825d.pth.

    TensorFlow's graph of 2015 is timm's network with other pools in the pooling branches and 1008 classes.
    forward(images uint8 (B, 3, H, W) of any size) -> float32 (pool (B, 2048), spatial (B, 2023), logits (B, 1008)):
    pool for FID, precision and recall; spatial, 7 channels on 17 x 17 flattened (h, w, c), for sFID; logits without
    their bias for the Inception score. Raises ValueError for images that aren't uint8. Use it in eval mode, as
    load_inception gives it.
    """

    def __init__(self):
        super().__init__(num_classes=1008)
        for name, block in self.named_children():
            pool = functools.partial(F.avg_pool2d, count_include_pad=False)  # timm's counts the padding
            if name == "Mixed_7c":
                pool = F.max_pool2d  # a slip of the 2015 graph that every published FID shares
            if hasattr(block, "branch_pool"):
                block.register_forward_hook(functools.partial(recompute_pool_branch, pool=pool))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: give uint8 from 0 to 255")
        x = (resize_tensorflow1(images.float(), 299) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023), from branch1x1, which comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))  # (B, 2048)
        return pool, spatial, pool @ self.fc.weight.T


def load_inception(weights=None, device="cpu"):
    """InceptionV3 with the published weights, frozen, in eval mode. Raises ValueError where they can't be had.

    weights: path of pt_inception-2015-12-05-6726825d.pth, pytorch-fid's port; None: downloaded once.
    """
    model = InceptionV3()
    load_weights(model, INCEPTION, weights, "--inception-weights")
    return model.to(device).eval().requires_grad_(False)


class DINOv2(nn.Module):
    """The network of FD-DINOv2 (arXiv 2306.04675): ViT-L/14 without registers, its CLS token after the final norm.

    forward(images uint8 (B, 3, H, W) of any size) -> (float32 (B, 1024),). Frozen, in eval mode.
    weights: path of a file in timm's key names; None: downloaded once. Raises ValueError where they can't be had.
    """

    def __init__(self, weights=None, model="vit_large_patch14_dinov2.lvd142m"):
        super().__init__()
        self.vit = timm.create_model(model)  # for 518 px
        load_weights(self.vit, TIMM.format(model), weights, "--dinov2-weights")
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


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features


class FeatureStatistics:
    """Mean (D,) and covariance (D, D; ddof 1) of features, accumulated in float64 over batches (B, D) of any size.

    The scatter is kept about the running mean (Chan et al. 1979), so that nothing cancels. all_reduce(), called once
    at the end, merges the ranks of the process group, if there is one.
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        x = features.double()  # (B, D)
        mean, total = x.mean(0), self.count + len(x)
        delta, x = mean - self.mean, x - mean
        self.scatter += x.T @ x + delta.outer(delta) * (self.count * len(x) / total)
        self.mean += delta * (len(x) / total)
        self.count = total

    def all_reduce(self):
        if not dist.is_initialized():
            return
        total, mean = self.mean.new_tensor(self.count), self.mean * self.count
        dist.all_reduce(total)
        dist.all_reduce(mean)
        mean /= total
        self.scatter += (self.mean - mean).outer(self.mean - mean) * self.count
        dist.all_reduce(self.scatter)
        self.count, self.mean = int(total), mean

    @property
    def cov(self):
        return self.scatter / (self.count - 1)


def covariance_root(sigma):
    """L (D, r) with L L^T = sigma (D, D); eigenvalues that are zero up to rounding are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (arXiv 1706.08500, eq. 6) -> float, never negative.

    mu (D,), sigma (D, D): arrays or tensors; computed in float64 on the CPU. With sigma_i = L_i L_i^T the root's trace
    is the sum of the singular values of L1^T L2: real, symmetric in the sets, and stable for singular covariances,
    where matrix square roots are not. Raises ValueError for shapes that don't match and values that aren't finite.
    """
    arrays = [torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = arrays
    shapes = [tuple(x.shape) for x in arrays]
    if mu1.ndim != 1 or shapes != 2 * [(len(mu1),), (len(mu1), len(mu1))]:
        raise ValueError(f"statistics that don't match: mu1, sigma1, mu2, sigma2 have the shapes {shapes}")
    if not all(x.isfinite().all() for x in arrays):
        raise ValueError("the statistics hold values that are not finite")
    root = torch.linalg.svdvals(covariance_root(sigma1).T @ covariance_root(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item())


def squared_distances(a, b):
    """float64 (N, D), (M, D) -> float32 (N, M). Equal features get 0, not what float64's cancellation leaves."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = torch.addmm(norms, a, b.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * norms, 0).float()


def precision_recall(reference, samples, k=3, block=1024):
    """Improved precision and recall (arXiv 1904.06991, eq. 2) -> two floats in [0, 1].

    reference (N, D), samples (M, D): features. Precision is the share of samples no further from some reference feature
    than its k-th neighbour, itself excluded; recall the reverse. Distances are exact to float32; `block` rows of them
    are held at a time and don't change the result. Raises ValueError for k features or fewer.
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
    """exp(E KL(p(y|x) || p(y))) (arXiv 1606.03498), mean over splits of the logits (N, classes) in order -> float.

    A last, short split counts like the others, as in the ADM suite.
    """
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * log_p - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


# ---------------------------------------------------------------------------------------------------------------------
# Distances between pairs of images


def psnr(a, b):
    """Images (B, 3, H, W) in [0, 1], twice -> (B,) dB, float64; infinite where they are equal."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()


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
    vgg_weights (torchvision's or timm's VGG16), lpips_weights (vgg.pth of v0.1): paths; None: downloaded once. Raises
    ValueError where they can't be had.
    """

    layers = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 and their channels

    def __init__(self, vgg_weights=None, lpips_weights=None):
        super().__init__()
        heads = [nn.Sequential(nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)) for c in self.layers.values()]
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(heads)})
        load_weights(self.heads, LPIPS_HEADS, lpips_weights, "--lpips-weights")
        with torch.device("meta"):  # the classifier is left out and takes no memory
            self.features = timm.create_model("vgg16").features[:30]
        self.features.to_empty(device="cpu")
        load_weights(self.features, TIMM.format("vgg16.tv_in1k"), vgg_weights, "--vgg-weights", prefix="features.")
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


# ---------------------------------------------------------------------------------------------------------------------
# Command line

STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # the ADM suite's keys, for FID and for sFID


def load_statistics(path, features="inception"):
    """Read an npz of statistics, ADM's or of --save-stats -> {"mu": (D,), "sigma": (D, D)}, float64 arrays.

    mu_s and sigma_s, for sFID, are there where the file has them. A file that names no features holds Inception's: D is
    2048, and 2023 for sFID. Raises ValueError for another file, other features, other shapes, values not finite.
    """
    fix = "give an npz of fid.py FOLDER --save-stats"
    try:
        with np.load(path) as npz:  # reads an array when it is asked for
            found = str(npz.get("features", "inception"))
            statistics = {key: npz[key].astype(np.float64) for pair in STATISTICS for key in pair if key in npz}
    except Exception as error:  # zip and npy files fail in many ways
        raise ValueError(f"{path} cannot be read as statistics ({type(error).__name__}): {fix}") from error
    if found != features or not {"mu", "sigma"} <= statistics.keys():
        raise ValueError(f"{path} holds no statistics (mu, sigma) of {features}: {fix}")
    D, S = (2048, 2023) if features == "inception" else 2 * (statistics["mu"].size,)
    shapes = {"mu": (D,), "sigma": (D, D), "mu_s": (S,), "sigma_s": (S, S)}
    for key, x in statistics.items():
        if x.shape != shapes[key] or not np.isfinite(x).all():
            raise ValueError(f"{path}: {key} must be finite numbers of shape {shapes[key]}: {fix}")
    return statistics


class Side:
    """REFERENCE or SAMPLES: `count` images of `size` (H, W), and statistics, as the file has them or as measured."""

    def __init__(self, path, features):
        self.path, self.folder, self.count, self.size = path, None, 0, None
        self.statistics, self.pool, self.logits = {}, [], []  # pool and logits of each batch, where a score needs them
        if os.path.isdir(path):
            from encoder import ImageFolder

            self.folder = ImageFolder(path)
            self.count = len(self.folder)
            return
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is missing, or neither a folder of images nor a whole npz")
        with zipfile.ZipFile(path) as archive:
            keys = archive.namelist()
            if "arr_0.npy" in keys:
                self.read_header(archive)
        if "arr_0.npy" not in keys or "mu.npy" in keys and features == "inception":
            self.statistics = load_statistics(path, features)

    def read_header(self, archive):
        with archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            self.start = member.tell()
        held = archive.getinfo("arr_0.npy").file_size - self.start
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or math.prod(shape) != held:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape} in {held} bytes: give whole uint8 (N, H, W, 3)")
        self.count, self.size = shape[0], shape[1:3]

    def batches(self, args):
        """Yield the images in order, uint8 (B, 3, H, W). An npz is read batch by batch: 50,000 images are 10 GB."""
        if self.folder:
            from encoder import evaluation_batches

            indices, side = range(self.count), self.size[0]
            yield from evaluation_batches(self.folder, indices, side, args.batch, args.workers, args.device)
            return
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.read(self.start)
            for i in range(0, self.count, args.batch):
                shape = (min(args.batch, self.count - i), *self.size, 3)
                images = torch.frombuffer(bytearray(member.read(math.prod(shape))), dtype=torch.uint8)
                yield images.view(shape).permute(0, 3, 1, 2)

    def measure(self, network, args, keep):
        """Yield the images, uint8 (B, 3, H, W) on the device, and measure their statistics on the way."""
        measured = []
        total = math.ceil(self.count / args.batch)
        for images in tqdm(self.batches(args), self.path, total, unit="batch", leave=False):
            images = images.to(args.device)
            outputs = network(images)
            measured = measured or [FeatureStatistics(x.shape[1], x.device) for x in outputs[:2]]
            for statistics, x in zip(measured, outputs[:2], strict=True):
                statistics.update(x)
            if keep:
                self.pool.append(outputs[0])
                self.logits.append(outputs[2])
            yield images
        if not self.statistics:
            for (mu, sigma), x in zip(STATISTICS, measured, strict=False):
                self.statistics |= {mu: x.mean.cpu().numpy(), sigma: x.cov.cpu().numpy()}


def check(args, sides):
    """Settle the size of folders and refuse, before any work, what can't be compared or written: ValueError."""
    if len(sides) == 1 and (args.paired or not args.save_stats):
        raise ValueError("SAMPLES is missing: give it, or --save-stats OUT.npz alone")
    if args.save_stats and os.path.exists(args.save_stats):
        raise ValueError(f"{args.save_stats} exists: move it away or change the path")
    if args.save_stats and not os.path.isdir(os.path.dirname(args.save_stats) or "."):
        raise ValueError(f"{args.save_stats} is in no existing folder: make the folder or change the path")
    counts = " and ".join(str(side.count) for side in sides)
    if any(side.count < 2 and not side.statistics for side in sides):
        raise ValueError(f"{counts} images: give at least 2 on each side")
    if args.paired and (sides[0].count != sides[1].count or not sides[0].count):
        raise ValueError(f"--paired needs as many images on both sides, not {counts}")
    sizes = {side.size for side in sides if side.size}
    edge = args.size or (min(sizes)[0] if sizes else 256)
    for side in sides:
        if side.folder:
            side.size = (edge, edge)
            sizes.add(side.size)
    shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
    if len(sizes) > 1:
        raise ValueError(f"images of {shown}: make them one size")
    if args.paired and min(map(min, sizes)) < 16 and not args.no_lpips:
        raise ValueError(f"images of {shown} are too small for LPIPS: give --no-lpips")


def compare_pairs(batches, lpips=None):
    """Pairs of batches, uint8 (B, 3, H, W) -> {"PSNR", "SSIM" and, where given, "LPIPS": mean over all images}."""
    distances = {"PSNR": psnr, "SSIM": ssim}
    if lpips is not None:
        distances["LPIPS"] = lambda a, b: lpips(2 * a - 1, 2 * b - 1)
    values = {name: [] for name in distances}
    for a, b in batches:
        for name, distance in distances.items():
            values[name].append(distance(a / 255, b / 255).double())  # (B,)
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()}


def compare_sets(args, reference, samples):
    """Two measured sides -> {name: score}: Frechet distances, IS, precision and recall whose inputs are there."""
    names = ("FD-DINOv2",) if args.features == "dinov2" else ("rFID",) if args.paired else ("FID", "sFID")
    scores = {}
    for name, keys in zip(names, STATISTICS, strict=False):
        moments = [side.statistics.get(key) for side in (reference, samples) for key in keys]
        if all(x is not None for x in moments):
            scores[name] = frechet_distance(*moments)
    if samples.logits:
        scores["IS"] = inception_score(torch.cat(samples.logits))
    if reference.pool and samples.pool and min(reference.count, samples.count) > 3:
        pools = torch.cat(reference.pool), torch.cat(samples.pool)  # (N, 2048), (M, 2048)
        scores["precision"], scores["recall"] = precision_recall(*pools)
    return scores


@torch.no_grad()
def run(args):
    """{name: score} of the command line; {} where it only saves statistics."""
    sides = [Side(path, args.features) for path in (args.reference, args.samples) if path]
    check(args, sides)
    network = lpips = None
    if args.paired and not args.no_lpips:
        lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(args.device)
    if any(side.count for side in sides):
        if args.features == "dinov2":
            network = DINOv2(args.dinov2_weights).to(args.device)
        else:
            network = load_inception(args.inception_weights, args.device)
    keep = args.features == "inception" and not args.paired and len(sides) == 2
    passes = [side.measure(network, args, keep) for side in sides if side.count]
    pairs = compare_pairs(zip(*passes, strict=True), lpips) if args.paired else {}
    for _ in itertools.chain(*passes):
        continue  # measure() does the work
    if args.save_stats:
        with open(args.save_stats, "wb") as file:
            np.savez(file, **sides[0].statistics, features=args.features)
    return compare_sets(args, *sides) | pairs if len(sides) == 2 else {}


def positive(text):
    """The type of a flag that takes a whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return int(text)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder of images, or npz of images and/or statistics")
    add("samples", metavar="SAMPLES", nargs="?", help="the other set, likewise; may be left out with --save-stats")
    add("--paired", action="store_true", help="compare image i with image i: rFID, PSNR, SSIM, LPIPS (default: sets)")
    add("--features", choices=["inception", "dinov2"], default="inception", help="dinov2: FD-DINOv2 "
        "in place of Inception's scores (default: %(default)s)")
    add("--size", type=positive, metavar="PIXELS", help="side of the square to which a folder's images are cropped "
        "(default: the size of the other set, else 256)")
    add("--batch", type=positive, default=64, help="images per forward pass (default: %(default)s)")
    add("--workers", type=int, help="processes that decode a folder (default: by the cores)")
    add("--device", choices=devices, default=devices[-1], help="device of the networks (default: %(default)s)")
    add("--inception-weights", metavar="PATH", help="local pt_inception-2015-12-05-6726825d.pth (default: download)")
    add("--dinov2-weights", metavar="PATH", help="local DINOv2 ViT-L/14, in timm's key names (default: download)")
    add("--vgg-weights", metavar="PATH", help="local VGG16 of torchvision or timm, for LPIPS (default: download)")
    add("--lpips-weights", metavar="PATH", help="local vgg.pth of LPIPS v0.1 (default: download)")
    add("--no-lpips", action="store_true", help="leave LPIPS and its weights out of --paired (default: included)")
    add("--save-stats", metavar="OUT.npz", help="write REFERENCE's statistics, usable as an input (default: don't)")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 asks for TF32
    torch.backends.cudnn.allow_tf32 = False
    try:
        scores = run(args)
    except (ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))  # of a loader's process, too
    for name, score in scores.items():
        print(f"{name:<10}{score:.4f}")


if __name__ == "__main__":
    main()
