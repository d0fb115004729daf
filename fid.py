"""Compare two sets of images with the metrics of the ADM evaluation suite.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz       # FID, sFID, Inception score, precision, recall
    python fid.py imagenet/val recon.npz --paired                   # rFID, PSNR, SSIM, LPIPS
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --features dinov2
    python fid.py imagenet/val --save-stats val256.npz              # a reference for later runs

Each set is a folder of images (ADM's centre crop), an npz of uint8 images (arr_0, N x H x W x 3), an npz of statistics
(mu, sigma, mu_s, sigma_s), or an npz with both, whose statistics are then used for FID and sFID. Metrics that need
missing data are not computed. --paired compares image i with image i; in two folders the names must be the same.

The reference of published gFIDs is the ADM release's VIRTUAL_*.npz, that of published rFIDs the 50,000 ImageNet
validation images. The Frechet distance is biased for few images: compare values of equal numbers of images. Networks
run in float32 without TF32, statistics and distances in float64. The batch size only changes float rounding. Precision
and recall differ from the TensorFlow suite's by about 0.002, because that computes distances in float16.

Weights are downloaded once, by timm and torch.hub, or read from local files. Folders need encoder.py next to this file.
Notation: B batch, C channels, H x W pixels or grid, D feature dimension, N, M images.
"""

import argparse
import contextlib
import math
import os
import sys
import zipfile

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
    """timm's `model` with all its pretrained weights: downloaded once, or read from the local file `weights`.

    Raises ValueError, naming `flag`, if they cannot be loaded.
    """
    overlay = dict(file=str(weights), custom_load=False) if weights else None
    try:
        if weights:
            open(weights, "rb").close()  # timm's message for a missing file is less clear
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # the hub's client and the file formats raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:200]
        raise ValueError(f"cannot load {weights or 'the weights'} of {model} ({reason}): check the network, or give a "
                         f"local file with {flag}") from None


def load_url(module, url, path, flag):
    """Load the module's weights from the .pth file `path`, or, without one, from the URL, downloaded once by torch.hub.

    Raises ValueError, naming `flag`, if they cannot be loaded or do not fit.
    """
    try:
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:  # the network and damaged files raise many types
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


def exclude_padding(norm, inputs):
    """Forward pre-hook in a pooling branch: rescale timm's 3 x 3 averages, which include the padding, to exclude it.

    It runs after the branch's 1 x 1 convolution, on fewer channels. The two commute, since that has no bias.
    """
    (x,) = inputs
    inside = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)  # (1, 1, H, W): 4/9 in corners, 6/9 on edges
    return x / inside


class InceptionV3(timm.models.InceptionV3):
    """The network of FID, sFID and the Inception score: timm's with other pools in its pooling branches. Frozen.

    forward(images uint8 (B, 3, H, W) of any size) -> float32 (pool (B, 2048), spatial (B, 2023), logits (B, 1008)):
    pool for FID, precision and recall; spatial, 7 channels on 17 x 17 flattened (h, w, c), for sFID; logits without
    their bias for the Inception score. weights: path of pytorch-fid's pt_inception-2015-12-05-6726825d.pth (default:
    downloaded). Raises ValueError for images that are not uint8, and if the weights cannot be loaded.
    """

    def __init__(self, weights=None):
        super().__init__(num_classes=1008)
        load_url(self, INCEPTION, weights, "--inception-weights")
        for name, block in self.named_children():
            if hasattr(block, "branch_pool") and name != "Mixed_7c":
                block.branch_pool.bn.register_forward_pre_hook(exclude_padding)
        self.eval().requires_grad_(False)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: give uint8 from 0 to 255")
        x = (resize_tensorflow1(images.float(), 299) - 128) / 128  # (B, 3, 299, 299)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # convolutions on a CPU are faster in this format
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023), from branch1x1, which comes first
        x = self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))  # (B, 2048, 8, 8)
        # Mixed_7c has a max pool: an error of the 2015 graph that all published FIDs share
        branch = self.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))  # (B, 192, 8, 8)
        x = torch.cat([self.Mixed_7c(x)[:, :-192], branch], 1)  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))  # (B, 2048)
        return pool, spatial, pool @ self.fc.weight.T


class DINOv2(nn.Module):
    """The network of FD-DINOv2 (arXiv 2306.04675): ViT-L/14 without registers, CLS token after the final norm. Frozen.

    forward(images uint8 (B, 3, H, W) of any size) -> (float32 (B, 1024),).
    weights: path of timm's or the authors' file (default: downloaded).
    """

    def __init__(self, weights=None, model="vit_large_patch14_dinov2.lvd142m"):
        super().__init__()
        self.vit = pretrained(model, weights, "--dinov2-weights")  # for 518 px
        cls, grid = self.vit.pos_embed.detach().split([1, 37 * 37], 1)  # (1, 1, D), (1, 37 * 37, D)
        grid = grid.mT.unflatten(2, (37, 37))  # (1, D, 37, 37)
        # resampled as in the original code; timm would scale by 16 / 37, with antialias
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # (1, D, 16, 16)
        self.vit.set_input_size((224, 224))
        self.vit.pos_embed = nn.Parameter(torch.cat([cls, grid.flatten(2).mT], 1))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        x = images.float()
        for size in ((x.shape[2], 224), (224, 224)):  # width, then height, both rounded to 8 bits, as in Pillow
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return (self.vit.forward_features((x - self.mean) / self.std)[:, 0],)


# --- Distances between sets of features ------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean (D,) and covariance (D, D; ddof 1) of features, accumulated in float64 over batches (B, D) of any size.

    Deviations are taken from the running mean (Chan et al. 1979), so that no large sums cancel.
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
    """L (D, r) with L L^T = sigma (D, D); r is the number of eigenvalues that are not zero up to rounding."""
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (arXiv 1706.08500, eq. 6) -> float, never negative.

    mu (D,), sigma (D, D): arrays or tensors. With sigma_i = L_i L_i^T the trace of the root is the sum of the singular
    values of L1^T L2: real, symmetric in the two sets, and stable for singular covariances, unlike matrix square roots.
    Raises ValueError for shapes that do not match and values that are not finite.
    """
    arrays = [x.detach().cpu().double() if torch.is_tensor(x) else x for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = arrays = [np.asarray(x, np.float64) for x in arrays]
    shapes = [x.shape for x in arrays]
    if shapes != 2 * [(mu1.size,), (mu1.size, mu1.size)]:
        raise ValueError(f"mu1, sigma1, mu2, sigma2 have shapes that do not match: {shapes}")
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError("the statistics have values that are not finite")
    root = scipy.linalg.svdvals(covariance_root(sigma1).T @ covariance_root(sigma2)).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root), 0.0)


def squared_distances(a, b):
    """float64 (N, D), (M, D) -> float32 (N, M). The distance of equal features is 0, without rounding errors."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = torch.addmm(norms, a, b.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * norms, 0).float()


def precision_recall(reference, samples, k=3, block=1024):
    """Improved precision and recall (arXiv 1904.06991, eq. 2) -> two floats in [0, 1].

    reference (N, D), samples (M, D): features. Precision is the fraction of samples that are as close to some reference
    feature as its k-th neighbour, itself excluded; recall the reverse. Distances are exact to float32 and computed for
    `block` rows at a time. Raises ValueError for k features or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} features, not {len(reference)} and {len(samples)}")
    reference, samples = reference.double(), samples.double()

    def radii(x):  # the nearest feature, at distance 0, is the feature itself
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
    scores = []  # a short last split has the same weight, as in the ADM suite
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * log_p - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


# --- Distances between pairs of images -------------------------------------------------------------------------------


def psnr(a, b):
    """Two batches of images (B, 3, H, W) in [0, 1] -> (B,) dB, float64. At most 100, so that means stay finite."""
    return (-10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()).clamp(max=100)


def ssim(a, b):
    """Two batches of images (B, C, H, W) in [0, 1] with sides above 5 -> (B,), float64 (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5; k1 0.01, k2 0.03; reflected borders; mean over the full map.
    """
    a, b = a.double(), b.double()
    window = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]

    def blur(x):  # eleven shifted sums along each side: in float64 faster than a convolution
        h, w = x.shape[2:]
        x = F.pad(x, (5, 5, 5, 5), mode="reflect") / sum(window) ** 2
        x = sum(weight * x[..., i : i + w] for i, weight in enumerate(window))
        return sum(weight * x[..., i : i + h, :] for i, weight in enumerate(window))

    mean_a, mean_b = blur(a), blur(b)  # (B, C, H, W)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (luminance * (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)).mean((1, 2, 3))


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924), VGG16, v0.1. Frozen.

    forward(a, b): images (B, 3, H, W) in [-1, 1] with sides of 16 or more -> (B,), differentiable in both.
    vgg_weights: path of torchvision's or timm's VGG16, with its classifier; lpips_weights: path of v0.1's vgg.pth
    (default: downloaded).
    """

    layers = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 and their channels

    def __init__(self, vgg_weights=None, lpips_weights=None):
        super().__init__()
        heads = [nn.Sequential(nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)) for c in self.layers.values()]
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(heads)})
        load_url(self.heads, LPIPS_HEADS, lpips_weights, "--lpips-weights")
        self.features = pretrained("vgg16.tv_in1k", vgg_weights, "--vgg-weights").features[:30]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def unit_features(self, x):
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                y = x.float()  # under autocast only the layers run in bf16
                yield y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-10)  # (B, C, H, W)

    def forward(self, a, b):
        distance = 0
        for head, fa, fb in zip(self.heads.values(), self.unit_features(a), self.unit_features(b), strict=True):
            with torch.autocast(fa.device.type, enabled=False):
                distance = distance + head["model"]((fa - fb).square()).mean((1, 2, 3))
        return distance  # (B,)


# --- Command line ----------------------------------------------------------------------------------------------------

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # the ADM suite's keys: two for FID, two for sFID


class ImageSet:
    """REFERENCE or SAMPLES: `count` images of `size` (H, W) in a folder or an npz, and their statistics.

    Raises ValueError for a file that is no npz, for arrays other than uint8 images, and for statistics of another
    network than `features`.
    """

    def __init__(self, path, features):
        self.path, self.folder, self.count, self.size, self.saved = path, None, 0, None, {}
        self.measured, self.pool, self.logits = [FeatureStatistics(), FeatureStatistics()], [], []  # for FID, for sFID
        if os.path.isdir(path):
            from encoder import ImageFolder

            self.folder = ImageFolder(path)
            self.count = len(self.folder)
            return
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is neither a folder nor an npz")
        with np.load(path) as npz:
            network = str(npz["features"]) if "features" in npz else "inception"
            if network == features:
                self.saved = {key: npz[key].astype(np.float64) for key in STATISTICS if key in npz}
            if "arr_0" not in npz and not {"mu", "sigma"} <= self.saved.keys():
                raise ValueError(f"{path} contains {', '.join(npz)} of {network}: give an npz of images (arr_0), or of "
                                 f"fid.py FOLDER --save-stats OUT.npz --features {features}")
            if "arr_0" not in npz:
                return
        with self.array() as (shape, fortran, dtype, _):
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"{path}: arr_0 is {dtype} {shape}{', Fortran-ordered' if fortran else ''}: give "
                                 "C-ordered uint8 (N, H, W, 3)")
            self.count, self.size = shape[0], shape[1:3]

    @contextlib.contextmanager
    def array(self):
        """The images in the npz: (shape, whether Fortran-ordered, dtype, file to read the values from)."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            yield *np.lib.format.read_array_header_1_0(file), file

    def __str__(self):
        images = f"{self.count} images of {self.size[0]} x {self.size[1]}" if self.size else "statistics"
        return f"{self.folder.summary()}; cropped to {images}" if self.folder else f"{self.path}: {images}"

    def batches(self, args):
        """Yield the images in order, uint8 (B, 3, H, W). An npz is read batch by batch: 50,000 images are 10 GB."""
        if self.folder:
            from encoder import default_workers, evaluation_batches

            workers = default_workers() if args.workers is None else args.workers
            images = evaluation_batches(self.folder, range(self.count), self.size[0], args.batch, workers, args.device)
            yield from tqdm(images, self.path, math.ceil(self.count / args.batch), leave=False, unit="batch")
            return
        with self.array() as (*_, file):
            for first in tqdm(range(0, self.count, args.batch), self.path, leave=False, unit="batch"):
                shape = (min(args.batch, self.count - first), *self.size, 3)
                images = torch.frombuffer(bytearray(file.read(math.prod(shape))), dtype=torch.uint8)
                yield images.view(shape).permute(0, 3, 1, 2)

    def update(self, outputs, keep=False):
        """Add a network's outputs for a batch, (B, D) each. keep: also pool and logits, for metrics over all images."""
        for statistics, x in zip(self.measured, outputs, strict=False):  # DINOv2 has one output, Inception three
            statistics.update(x)
        if keep:
            self.pool.append(outputs[0])
            self.logits.append(outputs[2])

    def statistics(self):
        """{"mu": (D,), "sigma": (D, D), ...}, float64 arrays: those of the file, or else the measured ones."""
        moments = [y.cpu().numpy() for x in self.measured if x.count for y in (x.mean, x.cov)]
        return self.saved or dict(zip(STATISTICS, moments, strict=False))


def check(args, sets):
    """Set the size of folders, and raise ValueError for sets that cannot be compared, before any work."""
    if len(sets) == 1 and (args.paired or not args.save_stats):
        raise ValueError("SAMPLES is missing: give it, or --save-stats OUT.npz alone")
    if args.save_stats:
        if os.path.exists(args.save_stats):
            raise ValueError(f"--save-stats {args.save_stats} exists: choose another path")
        open(f"{args.save_stats}.tmp", "wb").close()  # raises OSError now, not after the work
    folders = [x for x in sets if x.folder]
    if args.size and not folders:
        raise ValueError(f"--size {args.size} is for folders, whose images are cropped to it: remove it")
    side = args.size or next((x.size[0] for x in sets if x.size), 256)
    for folder in folders:
        folder.size = (side, side)
    text = " and ".join(map(str, sets))
    if any(x.count < 2 and not x.saved for x in sets) or len({x.size for x in sets if x.size}) > 1:
        raise ValueError(f"{text}: give at least 2 images in each set, of the same size in both")
    if args.paired and (sets[0].count != sets[1].count or not sets[0].count):
        raise ValueError(f"--paired needs the same number of images in both sets, not {text}")
    if args.paired and len(folders) == 2:
        names = [[os.path.relpath(os.fsdecode(path), x.folder.root) for path in x.folder.paths] for x in folders]
        for a, b in zip(*names, strict=True):
            if os.path.splitext(a)[0] != os.path.splitext(b)[0]:
                raise ValueError(f"--paired would compare {a} of {sets[0].path} with {b} of {sets[1].path}: give the "
                                 "images the same names")


@torch.no_grad()
def run(args):
    """The command line -> {metric: value}; {} if it only saves statistics."""
    sets = [ImageSet(path, args.features) for path in (args.reference, args.samples) if path is not None]
    check(args, sets)
    print(*sets, f"loading {args.features}", sep="\n", file=sys.stderr)  # stdout is for the metrics
    network, lpips = None, None
    if any(x.count for x in sets):
        network = DINOv2(args.dinov2_weights) if args.features == "dinov2" else InceptionV3(args.inception_weights)
        network = network.to(args.device)
    if args.paired and not args.no_lpips:
        lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(args.device)

    metrics, pairs = {}, {"PSNR": [], "SSIM": [], "LPIPS": []}
    if args.paired:
        for a, b in zip(*(x.batches(args) for x in sets), strict=True):
            a, b = a.to(args.device), b.to(args.device)
            sets[0].update(network(a))
            sets[1].update(network(b))
            a, b = a / 255, b / 255
            pairs["PSNR"].append(psnr(a, b))
            pairs["SSIM"].append(ssim(a, b))
            if lpips:
                pairs["LPIPS"].append(lpips(2 * a - 1, 2 * b - 1))
    else:
        keep = args.features == "inception" and len(sets) == 2  # for IS, precision and recall
        for x in sets:
            for images in x.batches(args) if x.count else []:
                x.update(network(images.to(args.device)), keep)
    statistics = [x.statistics() for x in sets]
    if args.save_stats:
        with open(f"{args.save_stats}.tmp", "wb") as file:
            np.savez(file, **statistics[0], features=args.features)
        os.replace(f"{args.save_stats}.tmp", args.save_stats)
    if len(sets) == 2:
        (a, b), (reference, samples) = statistics, sets
        name = "FD-DINOv2" if args.features == "dinov2" else "rFID" if args.paired else "FID"
        metrics[name] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
        if name == "FID" and {"mu_s", "sigma_s"} <= a.keys() & b.keys():
            metrics["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
        if samples.logits:
            metrics["IS"] = inception_score(torch.cat(samples.logits))
        if reference.pool and samples.pool and min(reference.count, samples.count) > 3:
            pools = torch.cat(reference.pool), torch.cat(samples.pool)  # (N, 2048), (M, 2048)
            metrics["precision"], metrics["recall"] = precision_recall(*pools)
    return metrics | {name: torch.cat(values).double().mean().item() for name, values in pairs.items() if values}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s REFERENCE [SAMPLES] [--flag VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder of images, or npz of images and/or statistics")
    add("samples", metavar="SAMPLES", nargs="?", help="the other set, likewise; optional with --save-stats")
    add("--paired", action="store_true", help="compare image i with image i: rFID, PSNR, SSIM, LPIPS (default: sets)")
    add("--features", choices=["inception", "dinov2"], default="inception",
        help="dinov2: FD-DINOv2 instead of Inception's metrics (default: %(default)s)")
    add("--size", type=int, help="side in pixels to which folders are cropped (default: the other set's, or 256)")
    add("--batch", type=int, default=64, help="images per forward pass (default: %(default)s)")
    add("--workers", type=int, help="processes that decode a folder (default: depends on the cores)")
    add("--device", choices=devices, default=devices[-1], help="device of the networks (default: %(default)s)")
    add("--inception-weights", metavar="PATH", help="local pt_inception-2015-12-05-6726825d.pth (default: download)")
    add("--dinov2-weights", metavar="PATH", help="local DINOv2 ViT-L/14, timm's or the authors' (default: download)")
    add("--vgg-weights", metavar="PATH", help="local VGG16 of torchvision or timm, for LPIPS (default: download)")
    add("--lpips-weights", metavar="PATH", help="local vgg.pth of LPIPS v0.1 (default: download)")
    add("--no-lpips", action="store_true", help="--paired without LPIPS and its weights")
    add("--save-stats", metavar="OUT.npz", help="save REFERENCE's statistics, to use the file as a set")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.size is not None and args.size < 1:
        parser.error(f"--batch {args.batch} and --size {args.size} must be above 0")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment asks for TF32
    torch.backends.cudnn.allow_tf32 = False
    try:
        metrics = run(args)
    except (ValueError, OSError) as error:  # bad input ends in one line, in development mode (-X dev) in a traceback
        if sys.flags.dev_mode or isinstance(error, OSError) and error.filename is None:
            raise
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())  # a loader process sends a traceback before it
    for name, value in metrics.items():
        print(f"{name:<10}{value:.4f}")


if __name__ == "__main__":
    main()
