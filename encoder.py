"""Images to latents: data sets, crops, the loader, the frozen representation encoders, latent statistics.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Notation: B batch, C latent (token) channels, H x W latent grid, S image side in pixels.
Images are uint8 (B, 3, S, S) from the loader and float in [0, 1] for the encoder.

The last section is what the scripts of this project share; delete it where you copy this file alone. The file needs
torch, numpy, timm, Pillow and, for that section, tqdm.
"""

import argparse
import colorsys
import contextlib
import csv
import datetime
import functools
import math
import os
import re
import signal
import sys
import time
import urllib.request
from pathlib import Path
from traceback import extract_tb

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Image files and crops


def open_image(path):
    """Any image file -> upright 8-bit RGB: EXIF rotation applied, 16 bits scaled, transparency laid on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's centre crop, the standard of ImageNet generation: halve with a box filter while at least twice too large,
    bicubic to the size, crop (guided-diffusion, image_datasets.py)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, resize, size, rng):
    """Shorter side to `resize` (bicubic), then a random size x size window: the decoder's training images."""
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def center_crop_flip(image, size, rng):
    """Centre crop, mirrored for one image in two: the diffusion model's training images."""
    image = center_crop(image, size)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


# ---------------------------------------------------------------------------------------------------------------------
# Sources of images: a folder, or shapes drawn on the fly

SPLITS = {"train", "val", "valid", "validation", "test"}


def folders_in(root):
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


class ImageFolder:
    """A folder of images; open(i) gives (PIL image, label).

    Labels follow the first-level folders in sorted order, whatever lies deeper. A folder without folders is one class.
    Where its folders are all among train, val, valid, validation and test, its train/ is read. Files are those with an
    ending that Pillow reads, sorted within classes; hidden ones are left out.
    Attributes: root, the folder that is read; classes, their names; paths and labels, arrays of one item per image.
    Raises ValueError for a folder that is missing, without images, with an empty class, or with val/ but no train/.
    """

    def __init__(self, root):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"no folder {root}: give a folder of images")
        names = folders_in(root)
        if names and set(names) <= SPLITS:
            if "train" not in names:
                raise ValueError(f"{root} holds {names[0]}/ but no train/: give {root / names[0]}, or add train/")
            root = root / "train"
            names = folders_in(root)
        suffixes = tuple(Image.registered_extensions().keys() - {".pdf"})  # Pillow only writes PDF

        def images_in(parent, files):
            return [os.path.join(parent, name) for name in sorted(files)
                    if name.lower().endswith(suffixes) and not name.startswith(".")]

        loose = images_in(root, [path.name for path in root.iterdir() if path.is_file()])
        if names and loose:
            raise ValueError(f"{root} holds both class folders and images ({loose[0]}): move the images away")
        paths, labels = [], []
        for label, folder in enumerate([root / name for name in names] or [root]):
            before = len(paths)
            for parent, inside, files in os.walk(folder, followlinks=True):
                inside[:] = sorted(name for name in inside if not name.startswith("."))
                paths += images_in(parent, files)
            if len(paths) == before:
                raise ValueError(f"{folder} holds no images that Pillow reads: fill or remove it")
            labels += [label] * (len(paths) - before)
        self.root, self.classes = root, names or [root.resolve().name]
        self.paths = np.array([os.fsencode(path) for path in paths])  # an array: loader workers share its memory
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.paths)

    def open(self, index):
        return open_image(os.fsdecode(self.paths[index])), int(self.labels[index])


def polygon(corners, turn=0.0, inner=1.0):
    """Points (K, 2) on the unit circle, every second one pulled in to radius `inner`: polygons, stars, discs."""
    angles = 2 * np.pi * (np.arange(corners) / corners + turn) - np.pi / 2
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]


def heart():
    a = np.linspace(0, 2 * np.pi, 64)
    x, y = 16 * np.sin(a) ** 3, 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([x, -y - 2.5], 1) / 16


DISC = polygon(64)
SHAPES = {  # name -> (outline, hole or None), in units of the radius, y downwards
    "circle": (DISC, None),
    "ring": (DISC, 0.55 * DISC),
    "crescent": (DISC, 0.85 * DISC + [0, -0.5]),
    "square": (polygon(4, 1 / 8), None),
    "triangle": (polygon(3), None),
    "star": (polygon(10, inner=0.42), None),
    "cross": (np.array([(-3, -9), (3, -9), (3, -3), (9, -3), (9, 3), (3, 3), (3, 9), (-3, 9), (-3, 3), (-9, 3),
                        (-9, -3), (-3, -3)]) / 9, None),
    "heart": (heart(), None),
    "arrow": (np.array([(0, -1), (0.85, 0), (0.33, 0), (0.33, 1), (-0.33, 1), (-0.33, 0), (-0.85, 0)]), None),
    "hourglass": (np.array([(-0.8, -0.95), (0.8, -0.95), (0.12, 0), (0.8, 0.95), (-0.8, 0.95), (-0.12, 0)]), None),
}


@functools.cache  # drawing takes longer than all that follows
def draw_shape(index, size, seed):
    """Image `index` of the shapes -> (PIL image, label): one bright shape on a dark gradient."""
    rng = np.random.default_rng((seed, index))
    label = index % len(SHAPES)
    fine = 4 * size  # drawn four times as fine, then averaged
    radius, turn = rng.uniform(0.32, 0.42), rng.uniform(-0.2, 0.2)
    center = 0.5 + rng.uniform(-0.05, 0.05, 2)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    mask = Image.new("L", (fine, fine))
    for outline, value in zip(list(SHAPES.values())[label], (255, 0), strict=True):
        if outline is not None:
            points = (center + radius * outline @ rotation) * fine
            ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=value)
    mask = np.asarray(mask.resize((size, size), Image.BOX))[..., None] / 255  # (S, S, 1)

    color = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.65, 1), rng.uniform(0.8, 1)))
    dark = rng.uniform(5, 75, (2, 3))
    direction = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    ramp = np.clip(x * np.cos(direction) + y * np.sin(direction) + 0.5, 0, 1)[..., None]
    background = dark[0] + ramp * (dark[1] - dark[0])
    return Image.fromarray((background + mask * (color - background)).round().astype(np.uint8)), label


class Shapes:
    """A toy data set without files. Image i is a function of (seed, i): class, hue, place, rotation, background."""

    root, classes = "shapes", list(SHAPES)

    def __init__(self, count, size, seed=0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def open(self, index):
        return draw_shape(index, self.size, self.seed)


def image_source(data, size):
    """What --data names: `shapes`, 8,000 of them, or a folder."""
    return Shapes(8000, size) if data == "shapes" else ImageFolder(data)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def random_key(*numbers):
    """Hash (seed, epoch, position, ...) to 63 bits. They seed everything that is drawn for one image at one step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Images(torch.utils.data.Dataset):
    """Items (index, key) -> (uint8 image (3, S, S), label, key).

    transform(image, rng=...) -> PIL image draws from a generator seeded by the key. A file that cannot be read is named
    once on stderr and marked in `unreadable`, a bool for each image that all loader processes share. In its place
    stands another image, chosen by the same generator, with its own label: so batches keep their shape.
    Raises ValueError after 100 unreadable files in a row.
    """

    def __init__(self, source, transform):
        self.source, self.transform = source, transform
        self.unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, item):
        index, key = item
        rng = np.random.default_rng(key)
        for _ in range(100):
            try:
                image, label = self.source.open(index)
                image = np.asarray(self.transform(image, rng=rng))
                return torch.from_numpy(image.transpose(2, 0, 1).copy()), label, key
            except Exception as error:  # Pillow raises nearly any kind for a damaged file
                path = os.fsdecode(self.source.paths[index])
                if not self.unreadable[index]:
                    self.unreadable[index] = True
                    print(f"cannot read {path} ({error})", file=sys.stderr, flush=True)
            index = int(rng.integers(len(self.source)))
        raise ValueError(f"100 images in a row could not be read, the last one {path}: check the data folder")


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_batches(count, batch, micro_batch, steps, seed, rank=0, world_size=1):
    """Micro-batches [(index, key), ...] of one rank, over the steps of the range `steps`.

    The images are one endless stream, epoch after epoch, each in an order of its own. Step s takes the `batch` images
    from position s * batch on, and rank r its r-th part of them. So what a step sees depends on neither the number of
    processes nor the micro-batch, no image is skipped at the end of an epoch, and a run resumes at any step.
    """
    local = batch // world_size
    for step in steps:
        first = step * batch + rank * local
        for start in range(first, first + local, micro_batch):
            items = []
            for position in range(start, min(start + micro_batch, first + local)):
                epoch, place = divmod(position, count)
                items.append((int(epoch_order(count, seed, epoch)[place]), random_key(seed, epoch, place)))
            yield items


def default_workers():
    """Loader processes for one GPU: its share of the usable cores, minus one, at most 12; none on Windows."""
    if not hasattr(os, "fork"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    return max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def make_loader(images, batches, workers, device):
    """The DataLoader of `Images`. workers None: by the cores; none for `shapes`, which are kept once they are drawn."""
    if workers is None:
        workers = 0 if isinstance(images.source, Shapes) else default_workers()
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,  # the workers share the list of files
        # Ctrl-C and torchrun's SIGTERM go to a process group; the trainer's last step still needs its workers.
        worker_init_fn=lambda _: os.setpgid(0, 0),
    )


def evaluation_batches(source, indices, size, batch, workers, device):
    """The images `indices` of a source in order, centre-cropped, in batches uint8 (B, 3, size, size).

    Raises ValueError, at the end, where images could not be read; each is named on stderr.
    """
    images = Images(source, lambda image, rng: center_crop(image, size))
    parts = [[(i, i) for i in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    for pixels, *_ in make_loader(images, parts, workers, device):
        yield pixels
    if broken := int(images.unreadable.sum()):
        raise ValueError(f"{broken} images in {source.root} cannot be read, see above: repair or remove them")


# ---------------------------------------------------------------------------------------------------------------------
# The frozen encoders

ENCODERS = {  # name -> timm model. Channels C, published rFID-50k of ViT-XL decoders without noise
    "dinov2-s": "vit_small_patch14_reg4_dinov2.lvd142m",  # 384, 0.52
    "dinov2-b": "vit_base_patch14_reg4_dinov2.lvd142m",  # 768, 0.49
    "dinov2-l": "vit_large_patch14_reg4_dinov2.lvd142m",  # 1024, 0.52
    "dinov3-s": "vit_small_patch16_dinov3.lvd1689m",  # 384
    "dinov3-b": "vit_base_patch16_dinov3.lvd1689m",  # 768
    "dinov3-l": "vit_large_patch16_dinov3.lvd1689m",  # 1024
    "siglip2-b": "vit_base_patch16_siglip_256.v2_webli",  # 768, 0.53
    "siglip2-l": "vit_large_patch16_siglip_256.v2_webli",  # 1024
    "siglip2-so400m": "vit_so400m_patch16_siglip_256.v2_webli",  # 1152
    "mae-b": "vit_base_patch16_224.mae",  # 768, 0.16
    "random-tiny": "vit_tiny_patch16_224",  # 128; the demo's, with random weights from a fixed seed
}


def timm_name(name):
    """A name of ENCODERS or timm's own name of a model -> timm's name. Raises ValueError where timm has none."""
    model = ENCODERS.get(name, name)
    with contextlib.suppress(RuntimeError):  # a tag, behind the dot, that timm does not know
        if timm.get_pretrained_cfg(model):
            return model
    raise ValueError(f"unknown encoder {name}: give one of {', '.join(ENCODERS)}, or a timm ViT by its name")


def pixel_statistics(name):
    """{"mean", "std"}: three values each, by which the encoder normalises the channels of images in [0, 1]."""
    row = timm.get_pretrained_cfg(timm_name(name))
    return dict(mean=list(row.mean), std=list(row.std))


class Encoder(nn.Module):
    """A frozen vision transformer: images (B, 3, S, S) in [0, 1] -> latents (B, C, H, W), un-normalised (section 3).

    name: one of ENCODERS, or any timm vision transformer by its timm name. image_size: the side in pixels that the
    encoder is built for; models with patch 14 see 14/16 of it, so that the grid is image_size / 16. weights: a local
    file in timm's or the authors' key names; without it they are downloaded. options: more arguments of timm's model.
    The final norm has no affine, and prefix tokens (CLS, registers) are dropped.
    Attributes: latent_shape (C, H, W); mean and std (1, 3, 1, 1) of its pixels; record, what a checkpoint keeps of it.
    Raises ValueError, in one line, for unknown names, sizes that don't fit and weights that are out of reach.
    """

    def __init__(self, name="dinov2-b", image_size=256, weights=None, **options):
        super().__init__()
        model = timm_name(name)
        # The published decoders were trained on Hugging Face's encoders, from which timm's differ: SigLIP has the tanh
        # form of GELU there; MAE has eps 1e-12 in its norms and resizes its positions without antialias.
        if "siglip" in model:
            options = dict(act_layer="gelu_tanh") | options
        if model.endswith(".mae"):
            options = dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-12)) | options
        if name == "random-tiny":
            tiny = dict(patch_size=8, embed_dim=128, depth=3, num_heads=4, class_token=False, global_pool="")
            options = tiny | options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the weights of random-tiny
            self.vit = timm.create_model(model, num_classes=0, **options)
        if not isinstance(self.vit, (timm.models.VisionTransformer, timm.models.Eva)):
            raise ValueError(f"encoder {name} is a {type(self.vit).__name__}: choose a vision transformer")
        patch = self.vit.patch_embed.feat_ratio()
        multiple = 16 if patch == 14 else patch
        if image_size < 1 or image_size % multiple:
            raise ValueError(f"image size {image_size} does not fit encoder {name}: use a multiple of {multiple}")
        if name != "random-tiny":
            load_vit(self.vit, model, weights)
        elif weights is not None:
            raise ValueError(f"encoder {name} takes no --encoder-weights {weights}: choose the --encoder they are of")

        pixels = pixel_statistics(name)
        self.record = dict(name=name, image_size=image_size, **pixels)
        self.image_size, self.grid = image_size, image_size // multiple
        self.input_size = self.grid * patch
        self.latent_shape = (self.vit.embed_dim, self.grid, self.grid)
        self.resize_positions(antialias=not model.endswith(".mae"))
        # The final norm loses its affine (section 3) and is the last thing that runs. timm has it as `norm`, or as
        # `fc_norm` in models that pool their tokens first.
        norms = [norm for norm in (self.vit.norm, self.vit.fc_norm) if hasattr(norm, "eps")]
        norm = norms[0] if norms else nn.LayerNorm(self.vit.embed_dim, eps=1e-6)
        norm.weight = norm.bias = None
        self.vit.norm, self.vit.fc_norm, self.vit.attn_pool = norm, nn.Identity(), None
        self.register_buffer("mean", torch.tensor(pixels["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(pixels["std"]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def resize_positions(self, antialias):
        """Set the input size, and resample the position embedding to our grid, bicubic."""
        positions, native = self.vit.pos_embed, self.vit.patch_embed.grid_size
        self.vit.set_input_size(self.input_size)  # timm resamples with antialias
        if not antialias and native != (self.grid, self.grid):
            prefix = positions.shape[1] - native[0] * native[1]
            patches = positions[:, prefix:].unflatten(1, native).permute(0, 3, 1, 2)  # (1, C, h, w)
            patches = F.interpolate(patches, (self.grid, self.grid), mode="bicubic").flatten(2).mT  # (1, N, C)
            self.vit.pos_embed = nn.Parameter(torch.cat([positions[:, :prefix], patches], 1))

    @torch.no_grad()
    def forward(self, images):
        if not images.is_floating_point() or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give float (B, 3, S, S) in [0, 1]")
        if images.shape[-1] > self.image_size:  # decoder upsampling: reduce antialiased, as stage 2's centre crops are
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        if images.shape[-1] != self.input_size:  # the released code resizes so, without antialias
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")
        tokens = self.vit.forward_features((images - self.mean) / self.std)  # (B, prefix + N, C)
        tokens = tokens[:, self.vit.num_prefix_tokens :].float()  # (B, N, C)
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B, C, H, W)


def download(url):
    """Path of the file at a URL, downloaded once to torch's hub folder (TORCH_HOME). Raises OSError at once offline."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", "_".join(url.split("/")[3:]))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        urllib.request.urlopen(url, timeout=10).close()  # torch.hub would wait for ever for a host that is silent
        torch.hub.download_url_to_file(url, path)
    return path


def reason(error):
    """The first sentence of an exception, on one line, for a refusal."""
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:200]


def load_vit(vit, model, weights=None):
    """Fill timm's vision transformer with its pretrained weights: from the file `weights`, or downloaded once."""
    config = vit.pretrained_cfg  # timm's own download asks for 45 seconds before it says that there is no network
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{hub}/{config['hf_hub_id']}/resolve/main/model.safetensors" if config.get("hf_hub_id") else config["url"]
    family = timm.models.eva if isinstance(vit, timm.models.Eva) else timm.models.vision_transformer
    try:
        path = weights or download(url)
        open(path, "rb").close()  # a missing file ends here; timm would also log it
        keys = timm.models.load_checkpoint(vit, path, strict=False, filter_fn=family.checkpoint_filter_fn,
                                           weights_only=True)
        missing = [key for key in keys.missing_keys if not key.startswith(("norm.", "fc_norm.", "attn_pool."))]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    except Exception as error:  # the download and the readers of files raise many kinds
        raise ValueError(f"cannot load {weights or 'weights'} for {model} ({reason(error)}): fetch {url} and pass it "
                         "with --encoder-weights PATH") from None


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics


def fill_up(batch, size):
    """(B, ...) -> (size, ...): the last item again where B < size, so that a compiled model meets one shape only."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


def latent_statistics(encoder, loader, device):
    """Mean and variance of each latent element over the images of the loaders of all ranks.

    Returns {"mean", "var"}, each (C, H, W) float32; accumulated in float64, so that neither the batch size nor the
    number of ranks matters. The diffusion model sees (z - mean) / sqrt(var + 1e-5).
    """
    sums = torch.zeros(3, *encoder.latent_shape, dtype=torch.float64, device=device)  # of 1, z and z^2
    size = 0
    for images, *_ in loader:
        count, size = len(images), max(size, len(images))
        images = fill_up(images.to(device, non_blocking=True).float() / 255, size)
        z = encoder(images)[:count].double()  # (B, C, H, W)
        sums += torch.stack([torch.ones_like(z), z, z.square()]).sum(1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    mean, square = sums[1:] / sums[0]
    return {"mean": mean.float(), "var": (square - mean.square()).clamp(min=0).float()}


def load_stats(path, shape):
    """Read a stat.pt, ours or published: {"mean": None or (C, H, W), "var": (C, H, W)}; None means 0.

    Raises ValueError, in one line, where there is none, or one of another shape than `shape` (C, H, W).
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        var = file["var"].float()
        mean = torch.zeros_like(var) if file["mean"] is None else file["mean"].float()
        if mean.shape != tuple(shape) or var.shape != tuple(shape):
            raise ValueError(f"shape {tuple(var.shape)}, the model needs {tuple(shape)}")
    except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
        raise ValueError(f"--stats {path} holds no latent statistics for this model ({reason(error)}): give a stat.pt, "
                         "ours or published") from None
    return {"mean": mean, "var": var}


# =====================================================================================================================
# What the scripts of this project share, to the end of the file: flags, processes, checkpoints, the log, signals.
# Delete this section where you copy this file alone.
# =====================================================================================================================


def number(kind, holds, words):
    """An argparse type: an int or a float for which `holds`, described in words."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {words}")

    return parse


natural = number(int, lambda n: 0 <= n < 2**63, "an integer of at least 0 and below 2**63")
count = number(int, lambda n: n >= 1, "an integer of at least 1")
amount = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
share = number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")

# A row for each flag: its type, its default in each preset, its meaning. A tuple lists the choices, a list is the types
# of several values, bool is a switch.
PRESETS = ("imagenet256", "imagenet512", "demo")
ENCODER_HELP = f"{', '.join(ENCODERS)}, or a timm ViT"
PRECISION = ("float32", "tf32", "bf16")
ON_OFF = argparse.BooleanOptionalAction  # --compile and --no-compile
RUN_FLAGS = [
    # flag             type      256 px  512 px  demo    meaning
    ("--out",           str,      None,   None,   None,   "folder for what is written (default: in runs/<preset>/)"),
    ("--device",        ("cuda", "cpu"), None, None, None, "device (default: cuda where there is one)"),
    ("--workers",       natural,  None,   None,   None,   "loader processes for each GPU (default: by the cores)"),
    ("--precision",     PRECISION, "tf32", "tf32", "tf32", "precision of matrix products; on a CPU tf32 is float32"),
    ("--compile",       ON_OFF,   None,   None,   None,   "torch.compile (default: on CUDA)"),
    ("--checkpointing", bool,     False,  False,  False,  "recompute activations in backward: less memory, slower"),
    ("--log-every",     count,    None,   None,   None,   "steps between rows of log.csv (default: 100, or 20 rows)"),
    ("--save-every",    positive, None,   None,   None,   "epochs between checkpoints (default: 1, >= 500 steps)"),
    ("--seed",          natural,  0,      0,      0,      "seed of the weights and of everything that is drawn"),
]
# Arguments of the trainers that may change when a run goes on in its folder.
MAY_CHANGE = {"preset", "out", "data", "device", "workers", "compile", "checkpointing", "log_every", "save_every",
              "preview_every", "epochs", "micro_batch", "encoder_weights", "vgg_weights", "lpips_weights",
              "dino_weights", "allow_narrow", "decoder", "keep_every", "fid_every", "fid_reference",
              "fid_num", "inception_weights", "rank", "world_size"}
GIVE_UP_AFTER = 20  # steps in a row whose gradient is not finite


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line and whose help shows the defaults of the preset."""

    def error(self, message):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # rank 0 says it, and torchrun then ends the others
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "":  # as from a variable that the shell does not know
                self.error(f"--{name.replace('_', '-')} is empty: give a value or leave the flag out")
        if "data" in args and args.data is None:
            self.error("--data is missing: give a folder of images, or `shapes`")
        args.out = args.out and Path(args.out)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: PyTorch finds no GPU here, use --device cpu")
        return args


def make_parser(description, flags, argv):
    """A parser with a flag for each row of the table `flags`, and --preset, which picks the column of defaults."""
    pre = Parser(add_help=False)
    pre.add_argument("--preset", default=PRESETS[0])
    preset = pre.parse_known_args(argv)[0].preset
    parser = Parser(description=description.partition("\n\n")[0], usage="%(prog)s [--flag VALUE ...]")
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help="column of defaults; the first two are "
                        "the paper's (default: imagenet256)")
    for flag, kind, *defaults, meaning in flags:
        default = dict(zip(PRESETS, defaults, strict=True)).get(preset)
        shown = "" if default is None or kind is bool else f" (default: {default})"
        how = dict(type=kind)
        if isinstance(kind, tuple):
            how = dict(choices=kind)
        elif isinstance(kind, list):
            how = dict(type=kind[0], nargs=len(kind) if len(kind) > 1 else "+")
        elif kind is bool:
            how = dict(action="store_true")
        elif kind is ON_OFF:
            how = dict(action=kind)
        parser.add_argument(flag, default=default, help=(meaning + shown).replace("%", "%%"), **how)
    return parser


@contextlib.contextmanager
def one_line_refusals(parser):
    """The frame around a script's work: bad input ends it in one line.

    Bad input is a ValueError that one of our own files raises, in a process of the loader too. Everything else keeps
    its traceback.
    """
    message, handlers = None, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if dist.is_initialized():  # not after a failure: a rank that fails alone must not wait for the others
            dist.destroy_process_group()
    except ValueError as error:
        # A loader's process puts its traceback into the message.
        frames = [frame.filename for frame in extract_tb(error.__traceback__)]
        frames += re.findall(r'  File "(.+?)"', str(error))
        if Path(frames[-1]).resolve() not in {path.resolve() for path in Path(__file__).parent.glob("*.py")}:
            raise
        message = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if message:  # outside of the except clause, whose traceback keeps the loader's processes alive
        parser.error(message)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


def set_up(args):
    """Join torchrun's processes, where it started several, and set the precision -> (device, autocast).

    Sets args.rank, args.world_size and, where it was left open, args.compile.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    args.rank, args.world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    device = torch.device(args.device)
    if args.compile is None:
        args.compile = device.type == "cuda"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = args.precision != "float32"
    if args.world_size > 1:
        # NCCL's own limit of ten minutes would end a run whose rank 0 takes longer over a checkpoint or a preview.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=device if device.type == "cuda" else None)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compile_blocks(*models):
    """Compile block by block: that is quick, and gradients leave for the other ranks early."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at the bounds of DDP's buckets
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)  # a graph for each shape is faster than one for all


def distribute(model, device):
    """DDP around the model where there are several processes. Forwards that train go through it."""
    if not dist.is_initialized():
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # they are equal on all ranks; as an argument it is deprecated
    return ddp


def make_ema(model, decay):
    """timm's moving average of the weights, frozen and in eval mode. update(model, step) counts steps from 1.

    The decay at step n is min(decay, (n - 1) / (n + 8)), so that the first steps replace the initial weights. At a
    constant 0.9978 a run of 100 steps would keep 80 % of them.
    """
    ema = ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1, exclude_buffers=True)
    return ema.requires_grad_(False)


def agree(stopping, *values):
    """Scalar tensors as floats, and whether any rank has been told to stop: a step's one wait for the GPU."""
    stop = torch.full_like(values[0], bool(stopping))
    if dist.is_initialized():
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
    *values, stop = torch.stack([*values, stop]).tolist()
    return *values, bool(stop)


# ---------------------------------------------------------------------------------------------------------------------
# A training run: its steps, its folder, its log, its end


class Plan:
    """How the batch splits over processes and micro-batches, and how many steps the epochs are.

    Raises ValueError for a batch that does not divide over the processes.
    """

    def __init__(self, args, images):
        self.local_batch, rest = divmod(args.batch, args.world_size)
        if rest or not self.local_batch:
            raise ValueError(f"--batch {args.batch} does not divide over {args.world_size} processes")
        self.accumulate = math.ceil(self.local_batch / args.micro_batch)
        self.micro_batch = math.ceil(self.local_batch / self.accumulate)  # the last one may be smaller
        self.steps_per_epoch = images / args.batch
        self.total = max(1, round(args.epochs * self.steps_per_epoch))
        self.log_every = args.log_every or max(1, min(100, self.total // 20))
        self.save_every = self.interval(args.save_every, 1)
        self.words = (f"batch {args.batch} = {args.world_size} processes x {self.accumulate} x {self.micro_batch}; "
                      f"{self.total} steps, {self.steps_per_epoch:.4g} an epoch")

    def interval(self, epochs, default):
        """`epochs` if given, else the default, but at least 500 steps."""
        return max(default, 500 / self.steps_per_epoch) if epochs is None else epochs

    def due(self, done, epochs):
        """Whether an interval of so many epochs ends when `done` steps are done; 0: never."""
        steps = epochs * self.steps_per_epoch
        return steps > 0 and done == round(round(done / steps) * steps)


def resume(args, kind, result, **data):
    """Find where a run goes on -> (last.pt of the folder --out or None, the record for its next last.pt, first step).

    kind: the script; result: the name of its other checkpoint; data: what identifies the images.
    Raises ValueError for a folder that holds another run, naming what differs, and for a damaged last.pt.
    """
    recorded = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE} | data
    path, last, start = args.out / "last.pt", None, 0
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file: choose a folder")
    if path.exists():
        try:
            mmap = os.name != "nt"  # 8 processes need not hold 17 GB each; Windows moves no file over a mapped one
            last = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            start, before = last["step"], last["args"]
            if last["kind"] != kind:
                raise KeyError(kind)
        except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
            raise ValueError(f"{path} is damaged, or no checkpoint of {kind}.py ({type(error).__name__}): put back a "
                             "copy, or move the folder away") from None
        differ = [f"{key} {str(before.get(key))[:60]}, now {str(recorded.get(key))[:60]}"
                  for key in sorted(before.keys() | recorded.keys()) if before.get(key) != recorded.get(key)]
        if differ:
            raise ValueError(f"{args.out} holds a run with other settings ({'; '.join(differ)}): choose another --out, "
                             f"and --init {args.out / result} to go on from its weights")
    elif (args.out / result).exists() and not (args.out / "last.pt.tmp").exists():  # left by a killed first save
        raise ValueError(f"{args.out} holds a {result} but no last.pt to resume from: choose another --out")
    if dist.is_initialized():
        starts = [None] * args.world_size
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise ValueError(f"the processes see different files at {path}: put --out on a disk that all nodes share")
    return last, recorded, start


def check_init(path, info, encoder, config, wanted, but):
    """Raise ValueError where the weights of --init are of another encoder or model; it may differ in the keys `but`."""
    if "encoder" in info and info["encoder"]["name"] != encoder:  # published files don't say
        raise ValueError(f"--init {path} is for latents of {info['encoder']['name']}: choose --encoder to match")
    differ = [f"{key} {config[key]} instead of {value}" for key, value in wanted.items()
              if key not in but and config[key] != value]
    if differ:
        raise ValueError(f"--init {path} is another model: {', '.join(differ)}; choose --model, --size, ... to match")


def training_loader(images, args, plan, start, device):
    """An iterator over this rank's micro-batches from step `start` on, and the steps that are left."""
    steps = range(start, plan.total)
    batches = training_batches(len(images), args.batch, plan.micro_batch, steps, args.seed, args.rank, args.world_size)
    return iter(make_loader(images, batches, args.workers, device)), steps


def save_checkpoint(files):
    """Write {path: content} beside their places, then move them there: what is at a path is always whole.

    last.pt comes last in `files` and moves last: who resumes from it finds the other files of the same step.
    """
    for path, content in files.items():
        # A last.pt of 17 GB takes some 40 s with torch's checksums and 10 s without; torch.load does not look at them.
        torch.serialization.set_crc32_options(path.name != "last.pt")
        with open(f"{path}.tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    torch.serialization.set_crc32_options(True)
    for path in files:
        os.replace(f"{path}.tmp", path)


class Log:
    """log.csv, the lines on the terminal and the progress bar, of rank 0.

    add() takes tensors and keeps their sums on the device. row() writes their means since the last row, over steps and
    ranks; what is not finite is left out of them. Images per second and the time left count previews and saves. Rows of
    steps after `start`, which are done again, are dropped.
    """

    def __init__(self, args, plan, columns, start, device):
        self.batch, self.plan, self.device, self.main_rank = args.batch, plan, device, args.rank == 0
        self.bar = tqdm(total=plan.total, initial=start, unit="step", disable=not self.main_rank, dynamic_ncols=True)
        self.new_interval(start)
        if self.main_rank:
            path = args.out / "log.csv"
            args.out.mkdir(parents=True, exist_ok=True)
            rows = list(csv.DictReader(path.read_text().splitlines())) if start and path.exists() else []
            columns = ["step", "epoch", *columns, "images_per_s", "memory_gb", "skipped"]
            with open(f"{path}.tmp", "w", newline="") as file:
                table = csv.DictWriter(file, columns)
                table.writeheader()
                table.writerows(row for row in rows if int(row["step"]) <= start)
            os.replace(f"{path}.tmp", path)
            self.csv = csv.DictWriter(open(path, "a", newline="", buffering=1), columns)  # line by line to the disk

    def new_interval(self, step):
        self.sums, self.first, self.time = {}, step, time.perf_counter()

    def add(self, **values):
        for name, value in values.items():
            value = value.detach().float().flatten()
            finite = value.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value.where(finite, 0).sum(), finite.sum()])

    def step(self, loss):
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()

    def row(self, step, **numbers):
        sums = torch.stack(list(self.sums.values()))  # (names, 2)
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = {name: total / n for name, (total, n) in zip(self.sums, sums.tolist(), strict=True) if n}
        seconds = (time.perf_counter() - self.time) / (step - self.first)
        numbers = means | numbers | dict(images_per_s=self.batch / seconds)
        if self.device.type == "cuda":
            numbers |= dict(memory_gb=torch.cuda.max_memory_allocated() / 2**30)
        self.write(step, datetime.timedelta(seconds=int((self.plan.total - step) * seconds)), **numbers)
        self.new_interval(step)

    def write(self, step, left="", **numbers):
        if self.main_rank:
            row = dict(step=step, epoch=f"{step / self.plan.steps_per_epoch:.4f}")
            row |= {name: f"{value:.6g}" for name, value in numbers.items()}
            self.csv.writerow(row)
            if left:
                row["left"] = left
            self.bar.write(" ".join(f"{name} {value}" for name, value in row.items()))
            sys.stdout.flush()


def stop_by_signal(rank):
    """A list that is filled when Ctrl-C or SIGTERM comes: the run ends after its step, with a checkpoint. A second
    Ctrl-C ends it at once."""
    stopping = []

    def stop(number, _):
        if not stopping and rank == 0:
            os.write(2, b"\nstopping after this step; a second Ctrl-C stops at once, without a checkpoint\n")
        stopping.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopping


def finish(args, done, stop, bad_in_a_row):
    """The last words of a training loop. Exits with 1 where it gave up because the gradient stayed not finite."""
    if bad_in_a_row == GIVE_UP_AFTER:
        words = (f"stopped at step {done}: the gradient was not finite {GIVE_UP_AFTER} times in a row; "
                 f"{args.out}/last.pt has the weights from before. Try another --precision or a smaller --lr")
        sys.exit(words if args.rank == 0 else 1)
    if stop and args.rank == 0:
        print(f"stopped and saved at step {done}; the same command resumes", flush=True)
