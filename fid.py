"""Compare two sets of images by the numbers of the ADM evaluation suite.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz       # FID, sFID, Inception score, precision, recall
    python fid.py imagenet/val recon.npz --paired                   # rFID, PSNR, SSIM, LPIPS
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --features fd-dinov2
    python fid.py imagenet/val --save-stats val256.npz              # a reference for later runs
    torchrun --nproc_per_node=gpu fid.py REFERENCE SAMPLES --json scores.json

Each side is a folder of images (ADM's centre crop to --size), an npz of uint8 images (arr_0, N x H x W x 3), an npz of
statistics (mu, sigma, mu_s, sigma_s) or an npz with both, whose statistics FID and sFID then use. Published gFIDs have
the ADM release's VIRTUAL_*.npz as REFERENCE, published rFIDs the 50,000 ImageNet validation images.

Networks run in float32 without TF32; statistics and distances are float64. Neither the batch size nor the number of
processes matters, up to float rounding. Precision and recall differ from the TensorFlow suite's by about 0.002, because
that takes distances in float16. Letters: B batch, C channels, H x W pixels or grid, D feature dimension, N, M images.
"""

import argparse
import json
import math
import os
import sys
import time
import zipfile

import numpy as np
import timm
import timm.utils
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"


def load_weights(module, source, path, flag, prefix=""):
    """Fill the module from the file `path` (.pth, .safetensors), or from `source`, a URL or timm name, downloaded once.

    Raises ValueError, in one line that says what to fetch and which flag takes it.
    """
    url = source if source.startswith("https:") else f"model.safetensors of https://huggingface.co/timm/{source}"
    try:
        if path is not None:
            with open(path, "rb"):  # a missing file ends here; timm would also log it
                state = timm.models.load_state_dict(path, weights_only=True)
        elif source.startswith("https:"):
            state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        else:
            state = timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # the download clients and unpicklers raise many kinds
        problem = "cannot be downloaded" if path is None else f"cannot be read from {path}"
        raise ValueError(f"weights {problem} ({type(error).__name__}): fetch {url} and pass it with {flag}") from error
    try:
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise ValueError(f"{path or url} does not fit: {' '.join(str(error).split())[:150]}... Check {flag}") from error


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


def conv(inputs, outputs, kernel, stride=1, padding=0):
    layers = nn.Sequential()
    layers.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    layers.bn = nn.BatchNorm2d(outputs, eps=1e-3)
    layers.relu = nn.ReLU(inplace=True)
    return layers


class Mixed(nn.Module):
    """Chains of convolutions and a pooling branch, side by side, concatenated over channels in that order.

    chains: name -> [(channels, kernel), ...]; a step with two kernels applies both to the same input. pool: "avg" or
    "max" at stride 1 and a 1x1 convolution to pool_channels; "stride" halves the grid, here and in each chain's end.
    """

    def __init__(self, inputs, pool, pool_channels, **chains):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in chains.items():
            channels, steps = inputs, []
            for i, (outputs, *kernels) in enumerate(chain, 1):
                step = f"{name}_{i}" if len(chain) > 1 else name
                steps.append([step + letter for letter in ("ab" if len(kernels) > 1 else [""])])
                stride = 2 if pool == "stride" and i == len(chain) else 1
                for key, kernel in zip(steps[-1], kernels, strict=True):
                    self.add_module(key, conv(channels, outputs, kernel, stride, "same" if stride == 1 else 0))
                channels = outputs * len(kernels)
            self.chains.append(steps)
        if pool_channels:
            self.branch_pool = conv(inputs, pool_channels, 1)

    def forward(self, x):  # (B, C, H, W) -> (B, C', H', W')
        outputs = []
        for steps in self.chains:
            y = x
            for keys in steps:
                y = torch.cat([self.get_submodule(key)(y) for key in keys], 1)
            outputs.append(y)
        if self.pool == "stride":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def mixed_5(inputs, pool_channels):
    chains = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
    return Mixed(inputs, "avg", pool_channels, **chains)


def mixed_6(width):
    wide, tall = (1, 7), (7, 1)
    chain = [(width, 1), (width, wide), (192, tall)]
    double = [(width, 1), (width, tall), (width, wide), (width, tall), (192, wide)]
    return Mixed(768, "avg", 192, branch1x1=[(192, 1)], branch7x7=chain, branch7x7dbl=double)


def mixed_7(inputs, pool):
    fork = (384, (1, 3), (3, 1))
    double = [(448, 1), (384, 3), fork]
    return Mixed(inputs, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork], branch3x3dbl=double)


class InceptionV3(nn.Module):
    """The network of FID, sFID and the Inception score, by the key names of pt_inception-2015-12-05-6726825d.pth.

    forward(images uint8 (B, 3, H, W) of any size) -> float32 (pool (B, 2048), spatial (B, 2023), logits (B, 1008)):
    pool for FID, precision and recall; spatial, 7 channels on 17 x 17 flattened (h, w, c), for sFID; logits without
    their bias for the Inception score. Use it in eval mode, as load_inception gives it.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, "stride", 0, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        chain = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Mixed(768, "stride", 0, branch3x3=[(192, 1), (320, 3)], branch7x7x3=chain)
        self.Mixed_7b = mixed_7(1280, "avg")
        self.Mixed_7c = mixed_7(2048, "max")  # a slip of the 2015 graph that every published FID shares
        self.fc = nn.Linear(2048, 1008)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def forward(self, images):
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
    """InceptionV3 ready for use, with the published weights: from the file `weights`, or downloaded once."""
    model = InceptionV3()
    load_weights(model, INCEPTION, weights, "--inception-weights")
    return model.to(device).eval().requires_grad_(False)


class DINOv2(nn.Module):
    """The network of FD-DINOv2 (arXiv 2306.04675): ViT-L/14 without registers, its CLS token after the final norm.

    forward(images uint8 (B, 3, H, W) of any size) -> float32 (B, 1024). weights: a local file in timm's key names.
    """

    def __init__(self, weights=None, model="vit_large_patch14_dinov2.lvd142m"):
        super().__init__()
        self.vit = timm.create_model(model)  # for 518 px
        load_weights(self.vit, model, weights, "--encoder-weights")
        cls, grid = self.vit.pos_embed.detach().split([1, 37 * 37], 1)  # (1, 1, D), (1, 37 * 37, D)
        grid = grid.mT.unflatten(2, (37, 37))  # (1, D, 37, 37)
        # the original's resampling; timm's would scale by 16 / 37, antialiased
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # (1, D, 16, 16)
        self.vit.set_input_size((224, 224))
        self.vit.pos_embed = nn.Parameter(torch.cat([cls, grid.flatten(2).mT], 1))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def forward(self, images):
        x = images.float()
        for size in ((x.shape[2], 224), (224, 224)):  # width, then height, each to 8 bits, as Pillow resizes
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return self.vit.forward_features((x - self.mean) / self.std)[:, 0]


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
    """float64 (N, D), (M, D) -> float32 (N, M). What float64's cancellation leaves of equal features is set to 0."""
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
    vgg_weights (torchvision's or timm's VGG16), lpips_weights (vgg.pth of v0.1): local files; else downloaded once.
    """

    layers = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 and their channels

    def __init__(self, vgg_weights=None, lpips_weights=None):
        super().__init__()
        heads = [nn.Sequential(nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)) for c in self.layers.values()]
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(heads)})
        load_weights(self.heads, LPIPS_HEADS, lpips_weights, "--lpips-weights")
        with torch.device("meta"):  # the classifier, which is left out, takes no memory
            self.features = timm.create_model("vgg16.tv_in1k").features[:30]
        self.features.to_empty(device="cpu")
        load_weights(self.features, "vgg16.tv_in1k", vgg_weights, "--vgg-weights", prefix="features.")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def unit_features(self, x):
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)  # (B, C, H, W)

    def forward(self, a, b):
        features = zip(self.unit_features(a), self.unit_features(b), strict=True)
        terms = [
            head["model"]((fa - fb).square()) for head, (fa, fb) in zip(self.heads.values(), features, strict=True)
        ]
        return sum(term.mean((1, 2, 3)) for term in terms)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # the ADM suite's keys, for FID and for sFID


class Images(torch.utils.data.Dataset):
    """uint8 (H, W, 3) images: of a folder, cropped to size x size, or arr_0 of an npz, streamed without loading it."""

    def __init__(self, path, size):
        self.path, self.files, self.stream = path, None, None
        if os.path.isdir(path):
            from encoder import find_images

            self.files = find_images(path)[0]
            self.shape = (len(self.files), size, size, 3)
            return
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, dtype = header(member)
            self.offset = member.tell()
        if len(self.shape) != 4 or self.shape[3] != 3 or not min(self.shape[1:]) or dtype != np.uint8 or fortran:
            raise ValueError(f"arr_0 is {dtype} {self.shape}: images must be uint8 (N, H, W, 3)")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        try:
            if self.files:
                from encoder import center_crop, open_image

                return torch.from_numpy(np.array(center_crop(open_image(self.files[index]), self.shape[1])))
            if self.stream is None:  # opened in the loader's process
                self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")
            size = math.prod(self.shape[1:])
            self.stream.seek(self.offset + index * size)
            return torch.frombuffer(bytearray(self.stream.read(size)), dtype=torch.uint8).view(self.shape[1:])
        except Exception as error:  # every decoder raises its own
            name = self.files[index] if self.files else f"image {index} of {self.path}"
            raise ValueError(f"cannot read {name} ({error}): repair or remove it") from error


class Side:
    """REFERENCE or SAMPLES: its images, and its statistics as read from the file or, after finish(), measured."""

    def __init__(self, name, path, args):
        self.name, self.path, self.images, self.statistics, self.count = name, path, None, {}, None
        self.measured, self.kept, self.row = [], [], 0
        try:
            self.open(path, args)
        except ImportError:
            raise
        except Exception as error:  # zip and npy files fail in many ways
            raise ValueError(f"{name} {path}: {error}") from error

    def open(self, path, args):
        if os.path.isdir(path):
            self.images = Images(path, args.size)
        elif not zipfile.is_zipfile(path):
            raise ValueError("not there, or neither a folder of images nor a whole npz")
        else:
            with np.load(path) as npz:  # reads no array before it is asked for
                if "arr_0" in npz:
                    self.images = Images(path, args.size)
                if "mu" in npz and (str(npz["features"]) if "features" in npz else "inception") == args.features:
                    self.statistics = {key: npz[key] for keys in STATISTICS for key in keys if key in npz}
                    self.count = int(npz["count"]) if "count" in npz else None
                    if not all(x.dtype.kind in "fiu" and np.isfinite(x).all() for x in self.statistics.values()):
                        raise ValueError("holds statistics that are not finite numbers: measure them again")
                if self.images is None and not self.statistics:
                    raise ValueError(f"holds {npz.files[:5]}: give images (arr_0) or statistics of {args.features}")
        if self.images is not None:
            self.count = len(self.images)
            if self.count < 2:
                raise ValueError(f"holds {self.count} images: give at least 2")

    def batches(self, args):
        """This process's slice of the images in order: uint8 (B, 3, H, W) on the device."""
        self.row, stop = (self.count * rank // args.world_size for rank in (args.rank, args.rank + 1))
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.images, range(self.row, stop)),
            batch_size=args.batch,
            num_workers=args.workers if self.images.files else min(args.workers, 1),  # a stream has one reader
            pin_memory=args.device.startswith("cuda"),
        )
        with tqdm(total=self.count, desc=self.name, unit="image", leave=False, disable=args.rank > 0) as bar:
            for images in loader:
                yield images.to(args.device, non_blocking=True).permute(0, 3, 1, 2)
                bar.update(len(images) * args.world_size)

    def update(self, outputs, keep):
        """Take in the network's outputs for a batch: pooled and spatial for statistics, pooled and logits to keep."""
        if not self.measured:
            self.measured = [FeatureStatistics(x.shape[1], x.device) for x in outputs[:2]]
            self.kept = [x.new_zeros(self.count, x.shape[1]) for x in outputs[::2]] if keep else []
        for statistics, x in zip(self.measured, outputs[:2], strict=True):
            statistics.update(x)
        for kept, x in zip(self.kept, outputs[::2], strict=False):
            kept[self.row : self.row + len(x)] = x
        self.row += len(outputs[0])

    def finish(self):
        """Merge the processes. Each holds zeros in the rows of the others, so that a sum gathers what was kept."""
        for x in self.kept if dist.is_initialized() else []:
            dist.all_reduce(x)
        for statistics in self.measured:
            statistics.all_reduce()
        if not self.statistics:
            for (mu, sigma), x in zip(STATISTICS, self.measured, strict=False):
                self.statistics |= {mu: x.mean.cpu().numpy(), sigma: x.cov.cpu().numpy()}


def make_network(args, size):
    """The network of --features: uint8 (B, 3, H, W) -> (features,), or InceptionV3's three outputs."""
    if args.features == "inception":
        return load_inception(args.inception_weights, args.device)
    if args.features == "fd-dinov2":
        model = DINOv2(args.encoder_weights).to(args.device)
        return lambda images: (model(images),)
    from encoder import Encoder

    model = Encoder(args.features, size, args.encoder_weights).to(args.device)
    return lambda images: (model(images.float() / 255).mean((2, 3)),)


def check(args, sides):
    """Refuse what can be told before any work."""
    taken = [os.path.realpath(side.path) for side in sides]
    for flag, path in (("--save-stats", args.save_stats), ("--json", args.json)):
        if path and os.path.realpath(path) in taken:
            raise ValueError(f"{flag} {path} is an input or the other output: change the path")
        taken.append(path and os.path.realpath(path))
        if path and (os.path.isdir(path) or not os.access(os.path.join(os.path.dirname(path), "."), os.W_OK)):
            raise ValueError(f"{flag} {path} is not a file in an existing folder: make the folder or change the path")
        if path and os.path.exists(path) and not args.overwrite:
            raise ValueError(f"{flag} {path} exists: pass --overwrite to replace it, or change the path")
    if len(sides) == 1 and (args.paired or args.json or not args.save_stats):
        raise ValueError("SAMPLES is missing: give it, or REFERENCE with --save-stats alone")
    if args.save_stats and sides[0].statistics:
        raise ValueError(f"--save-stats: REFERENCE {args.reference} holds {args.features} statistics already")
    for side in sides:
        if args.paired and not side.images:
            raise ValueError(f"--paired compares images, but {side.name} {side.path} holds statistics alone")
    shapes = [side.images.shape for side in sides if side.images]
    found = " and ".join(f"{n} images of {h} x {w}" for n, h, w, _ in shapes)
    if args.paired and (shapes[0] != shapes[1] or min(shapes[0][1:3]) < 16):
        raise ValueError(f"--paired needs equal counts and sizes of at least 16 pixels, not {found}")
    if args.features not in ("inception", "fd-dinov2") and len({side for shape in shapes for side in shape[1:3]}) > 1:
        raise ValueError(f"--features {args.features} needs square images of one size, not {found}")


def write(path, save):
    """Through a temporary file, so that what stands at the path is never half written."""
    with open(f"{path}.tmp", "wb") as file:
        save(file)
    os.replace(f"{path}.tmp", path)


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
@torch.no_grad()
def run(args):
    named = (("REFERENCE", args.reference), ("SAMPLES", args.samples))
    sides = [Side(name, path, args) for name, path in named if path]
    reference, samples = sides[0], sides[-1]
    check(args, sides)
    os.environ.setdefault("WORLD_SIZE", "1")  # torchrun sets it; timm would take a SLURM allocation for a launch
    timm.utils.init_distributed_device(args)  # sets device, rank, world_size and distributed

    suite = args.features == "inception" and not args.paired and len(sides) == 2
    neighbours = suite and all(side.images and side.count > 3 for side in sides)
    todo = [side for side in sides if side.images and (not side.statistics or neighbours or suite and side is samples)]
    if todo:
        if min(side.count for side in todo) < args.world_size:
            raise ValueError(f"{args.world_size} processes are more than there are images: start fewer")
        height, width = todo[0].images.shape[1:3]
        network = make_network(args, height)
        probe = network(torch.zeros(1, 3, height, width, dtype=torch.uint8, device=args.device))
        dims = [x.shape[1] for x in probe[:2]]
    else:
        dims = [reference.statistics[mu].size for mu, _ in STATISTICS if mu in reference.statistics]
    warnings = []
    for side in sides:
        for dim, keys in zip(dims, STATISTICS, strict=False):
            shapes = [side.statistics[key].shape for key in keys if key in side.statistics]
            if shapes and shapes != [(dim,), (dim, dim)]:
                raise ValueError(f"{keys} of {side.name} {side.path} are {shapes}: {args.features} has D = {dim}")
        counted = side.count and not (side.images and side.statistics)  # those statistics may be of more images
        if counted and side.count < dims[0]:
            warnings.append(f"{side.count} images in {side.name}, fewer than the {dims[0]} feature dimensions")

    pairs = {"PSNR": psnr, "SSIM": ssim} if args.paired else {}
    if args.paired and not args.no_lpips:
        lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(args.device)
        pairs["LPIPS"] = lambda a, b: lpips(2 * a - 1, 2 * b - 1)
    sums = torch.zeros(len(pairs), dtype=torch.float64, device=args.device)
    if args.paired:
        for batch in zip(*(side.batches(args) for side in sides), strict=True):
            for side, images in zip(sides, batch, strict=True):
                if side in todo:
                    side.update(network(images), keep=False)
            a, b = (images / 255 for images in batch)
            sums += torch.stack([distance(a, b).double().sum() for distance in pairs.values()])
    else:
        for side in todo:
            for images in side.batches(args):
                side.update(network(images), keep=suite)
    for side in sides:
        side.finish()
    if args.distributed:
        dist.all_reduce(sums)
        dist.destroy_process_group()
    if args.rank > 0:
        return

    for warning in warnings:
        print(f"warning: {warning}: the Frechet distance is biased", file=sys.stderr)
    if args.save_stats:
        extra = dict(features=args.features, count=reference.count)
        write(args.save_stats, lambda file: np.savez(file, **reference.statistics, **extra))
        print(f"wrote {args.features} statistics of {reference.count} images to {args.save_stats}")
    if len(sides) == 1:
        return
    scores = {}
    first = "FD" if args.features != "inception" else "rFID" if args.paired else "FID"
    for name, keys in zip((first, "sFID") if suite else (first,), STATISTICS, strict=False):
        known = all(key in side.statistics for side in sides for key in keys)
        scores[name] = frechet_distance(*(side.statistics[key] for side in sides for key in keys)) if known else None
    if suite:
        scores["IS"] = inception_score(samples.kept[1]) if samples.kept else None
        both = precision_recall(reference.kept[0], samples.kept[0]) if neighbours else (None, None)
        scores["precision"], scores["recall"] = both
    scores |= dict(zip(pairs, (sums / samples.count).tolist() if pairs else [], strict=True))
    for name, score in scores.items():
        needs = {"sFID": "mu_s, sigma_s or images", "IS": "images in SAMPLES"}.get(name, "4 images on each side")
        print(f"{name:<10}" + (f"- (needs {needs})" if score is None else f"{score:.4f}"))
    if args.json:
        finite = {name: score if score is not None and math.isfinite(score) else None for name, score in scores.items()}
        inputs = {key: getattr(args, key) for key in ("reference", "samples", "features")}
        text = json.dumps(finite | inputs | {f"{side.name}_count": side.count for side in sides}, indent=1)
        write(args.json, lambda file: file.write(text.encode()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wait = 10 * (os.environ.get("RANK", "0") != "0")  # rank 0 says it, and torchrun then ends the others
    parser.error = lambda message: time.sleep(wait) or parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder of images or npz of images and/or statistics")
    add("samples", metavar="SAMPLES", nargs="?", help="likewise; may be left out with --save-stats")
    add("--paired", action="store_true", help="image i belongs to image i: rFID, PSNR, SSIM, LPIPS (default: unpaired)")
    add("--features", default="inception", help="inception, fd-dinov2 or an encoder's name (default: %(default)s)")
    add("--size", type=int, default=256, help="pixels to which a folder's images are cropped (default: %(default)s)")
    add("--batch", type=int, default=64, help="images per process and forward (default: %(default)s)")
    add("--workers", type=int, default=4, help="decoding processes per input and process (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="torchrun takes one GPU each (default: %(default)s)")
    add("--inception-weights", metavar="PATH", help="local pt_inception-2015-12-05-6726825d.pth (default: download)")
    add("--encoder-weights", metavar="PATH", help="weights for --features, in timm's key names (default: download)")
    add("--vgg-weights", metavar="PATH", help="local VGG16 of torchvision or timm, for LPIPS (default: download)")
    add("--lpips-weights", metavar="PATH", help="local vgg.pth of LPIPS v0.1 (default: download)")
    add("--no-lpips", action="store_true", help="leave LPIPS and its weights out of --paired (default: included)")
    add("--save-stats", metavar="OUT.npz", help="write REFERENCE's statistics, usable as an input (default: don't)")
    add("--json", metavar="OUT.json", help="write the scores in full precision (default: don't)")
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse)")
    args = parser.parse_args(argv)
    for name, least in (("size", 1), ("batch", 1), ("workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: give at least {least}")
    if args.device == "cuda" != device:
        parser.error("--device cuda: PyTorch finds no GPU here, use --device cpu")
    try:
        run(args)
    except ModuleNotFoundError as error:
        parser.error(f"{error}: folders of images and encoders need encoder.py beside this file")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        parser.error(str(error.__cause__ or error).strip())  # how its process has died
    except ValueError as error:  # whose last line it is where a loader's process has put its traceback before
        parser.error(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))


if __name__ == "__main__":
    main()
