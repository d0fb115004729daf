"""Images to latents: the frozen representation encoders, the latent statistics, and the images themselves.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Notation: B batch, C latent (token) channels, H x W latent grid, N = H W tokens, S image side in pixels.
The loader yields images as uint8 (B, 3, S, S); the encoder takes them as float in [0, 1].
Needs torch, numpy, timm and Pillow.
"""

import collections
import colorsys
import functools
import os
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

# --- The frozen encoders ---------------------------------------------------------------------------------------------

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
    "random-tiny": "vit_tiny_patch16_224",  # 128; for the demo, with random weights from a fixed seed
}
OPTIONS = {  # text in timm's name -> options of the model
    # The published decoders were trained on Hugging Face's encoders. These options remove timm's differences.
    "siglip": dict(act_layer="gelu_tanh"),  # timm has the exact GELU
    "_224.mae": dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-12)),  # timm has 1e-6
}
RANDOM_TINY = dict(patch_size=8, embed_dim=128, depth=3, num_heads=4, class_token=False, global_pool="", num_classes=0)


def timm_name(name):
    """timm's name of an encoder; `name` is from ENCODERS or timm's own. Raises ValueError if timm has no such model."""
    if not timm.models.is_model_pretrained(ENCODERS.get(name, name)):
        raise ValueError(f"unknown encoder {name}: give one of {', '.join(ENCODERS)}, or the name of a timm ViT")
    return ENCODERS.get(name, name)


def pixel_statistics(name):
    """{"mean", "std"}, three values each: the encoder normalises the channels of images in [0, 1] with them."""
    config = timm.get_pretrained_cfg(timm_name(name))
    return dict(mean=list(config.mean), std=list(config.std))


def decoder_pixels(name):
    """{"mean", "std"}, three values each: shift and scale of the output of the encoder's decoder.

    They are the encoder's own (section 3), except for DINOv3: its published decoders (arXiv 2605.18324) have no scale.
    """
    return dict(mean=[0.0] * 3, std=[1.0] * 3) if "dinov3" in timm_name(name) else pixel_statistics(name)


def check_latents(file, info, model, record, shape):
    """Raise ValueError if a model is not for latents of `shape` (C, H, W) of the encoder described by `record`.

    file: where the model comes from, for the message; info: the rest of that file, whose "encoder" is compared by name
    and layers. A file that does not name its encoder may be for any.
    """
    names = {model: name for name, model in ENCODERS.items() if name != "random-tiny"}  # timm's names -> ours
    texts = []
    for r, size in ((info.get("encoder", record), model.latent_shape), (record, shape)):
        layers = [str(layer) for layer in sorted(set(r.get("layers", [])))] or ["the last"]
        texts.append(f"{names.get(r['name'], r['name'])}, layer {' '.join(layers)}, shape {tuple(size)}")
    if texts[0] != texts[1]:
        raise ValueError(f"{file} is for latents of {texts[0]}, not of {texts[1]}: give another file, or choose the "
                         "--encoder, --layers and --size that it is for")


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


class Encoder(nn.Module):
    """A frozen vision transformer: images (B, 3, S, S) in [0, 1] -> latents (B, C, H, W), not normalised (section 3).

    name: one of ENCODERS, or the name of any timm vision transformer. image_size: the side S in pixels that the grid is
    made for; models with patch 14 get images of 14/16 of it, so that the grid is S / 16. weights: a local file with
    timm's or the authors' key names (default: downloaded). layers: blocks, counted from 0, whose normed outputs are
    averaged, for DINOv3 plus the last one's mean over the tokens (arXiv 2605.18324); empty: the last block alone.
    options: more arguments of the timm model. Prefix tokens (CLS, registers) are dropped.
    Attributes: latent_shape (C, H, W); mean and std (1, 3, 1, 1) of the pixels; record, its description in checkpoints.
    Raises ValueError for unknown names, for sizes and layers that do not fit, and if the weights cannot be loaded.
    """

    def __init__(self, name="dinov2-b", image_size=256, weights=None, layers=(), **options):
        super().__init__()
        model = timm_name(name)
        for part, more in OPTIONS.items():
            options = more | options if part in model else options
        if name == "random-tiny":
            options = RANDOM_TINY | options
        with torch.device("meta"):  # a model without values, to check the arguments before any download
            vit = timm.create_model(model, **options)
        if not isinstance(vit, (timm.models.VisionTransformer, timm.models.Eva)):
            raise ValueError(f"encoder {name} is a {type(vit).__name__}: choose a vision transformer")
        patch, depth = vit.patch_embed.feat_ratio(), len(vit.blocks)
        multiple = 16 if patch == 14 else patch
        if image_size < 1 or image_size % multiple:
            raise ValueError(f"image size {image_size} does not fit encoder {name}: use a multiple of {multiple}")
        if not set(layers) <= set(range(depth)):
            raise ValueError(f"layers {' '.join(map(str, layers))}: encoder {name} has the blocks 0 to {depth - 1}")
        if name != "random-tiny":
            self.vit = pretrained(model, weights, "--encoder-weights", **options)
        elif weights:
            raise ValueError(f"encoder {name} has no weights to load from {weights}: choose their encoder")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.vit = timm.create_model(model, **options)

        self.image_size, self.grid = image_size, image_size // multiple
        self.input_size = self.grid * patch
        positions, native = self.vit.pos_embed, self.vit.patch_embed.grid_size
        self.vit.set_input_size(self.input_size)  # resamples the positions, bicubic with antialias
        if model.endswith(".mae"):  # Hugging Face resamples those of MAE without antialias
            grid = (self.grid, self.grid)
            positions = timm.layers.resample_abs_pos_embed(positions, grid, native, antialias=False)
            self.vit.pos_embed = nn.Parameter(positions)
        self.latent_shape = (self.vit.embed_dim, self.grid, self.grid)
        self.layers, self.adds_token_mean = sorted(set(layers)), "dinov3" in model
        self.record = dict(name=name, image_size=image_size, layers=self.layers, **pixel_statistics(name))
        remove_affine(self.vit)
        self.register_buffer("mean", torch.tensor(self.record["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.record["std"]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        if not images.is_floating_point() or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give float (B, 3, S, S) in [0, 1]")
        if images.shape[-1] > self.image_size:  # decoder upsampling: reduced with antialias, as in stage 2's crops
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        if images.shape[-1] != self.input_size:  # without antialias, as in the released code
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")
        x = (images - self.mean) / self.std
        if self.layers:
            outputs = self.vit.forward_intermediates(x, indices=self.layers, norm=True, output_fmt="NLC",
                                                     intermediates_only=True)  # (B, N, C) of each layer
            tokens = torch.stack(outputs).float().mean(0)  # (B, N, C)
            if self.adds_token_mean:
                tokens = tokens + outputs[-1].float().mean(1, keepdim=True)
        else:
            tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :].float()  # (B, N, C)
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B, C, H, W)


def remove_affine(vit):
    """Remove weight and bias of a timm ViT's final norm (section 3), and everything after the norm, such as pooling.

    timm calls it `norm`, or `fc_norm` in models that pool their tokens first; some models have neither.
    """
    norms = [norm for norm in (vit.norm, vit.fc_norm) if not isinstance(norm, nn.Identity)]
    norm = norms[0] if norms else nn.LayerNorm(vit.embed_dim, eps=1e-6)
    norm.weight = norm.bias = None
    vit.norm, vit.fc_norm, vit.attn_pool = norm, nn.Identity(), None


# --- Latent statistics -----------------------------------------------------------------------------------------------


def latent_statistics(encoder, loader, device):
    """Mean and variance of each latent element over the images of all ranks' loaders.

    Returns {"mean", "var"}, each (C, H, W) float32. They are accumulated in float64, so neither the batch size nor the
    number of ranks matters. The diffusion model works on (z - mean) / sqrt(var + 1e-5).
    """
    sums = torch.zeros(3, *encoder.latent_shape, dtype=torch.float64, device=device)  # of 1, z and z^2
    for images, *_ in loader:
        z = encoder(images.to(device, non_blocking=True).float() / 255).double()  # (B, C, H, W)
        sums += torch.stack([torch.ones_like(z), z, z.square()]).sum(1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    mean, square = sums[1:] / sums[0]
    return {"mean": mean.float(), "var": (square - mean.square()).clamp(min=0).float()}


# --- Image files and crops -------------------------------------------------------------------------------------------


def open_image(path):
    """Read an image file -> upright 8-bit RGB: EXIF rotation applied, 16 bits scaled, transparency on white.

    Raises ValueError for values of unknown range (floats, 32-bit integers), and if one side is more than 50 times the
    other: crops would enlarge such a strip to gigabytes.
    """
    with Image.open(path) as file:
        if max(file.size) > 50 * min(file.size):
            raise ValueError(f"{file.width} x {file.height} pixels: one side is more than 50 times the other")
        if file.mode == "F" or file.mode == "I" and file.format not in ("PNG", "PPM"):  # these two have 16 bits
            raise ValueError(f"mode {file.mode}: the range of its values is unknown, save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip it
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's centre crop, the standard for ImageNet generation: halve with a box filter while at least twice too large,
    resize bicubic, crop (guided-diffusion, image_datasets.py)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, resize, size, rng):
    """Resize the shorter side to `resize` (bicubic), then crop a random size x size window: stage 1's images."""
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def center_crop_flip(image, size, rng, flip=0.5):
    """Centre crop, mirrored with probability `flip`: stage 2's images, and with flip 0 those of an evaluation."""
    image = center_crop(image, size)
    return ImageOps.mirror(image) if rng.random() < flip else image


# --- Sources of images: a folder, or shapes drawn on the fly ---------------------------------------------------------

SPLITS = {"train", "val", "valid", "validation", "test"}
NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}  # Pillow lists but cannot read


def class_folders(root):
    """The names of the folders in a folder, sorted, hidden ones excluded."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class ImageFolder:
    """A folder of images; open(i) returns (PIL image, label).

    Labels follow the first-level folders in sorted order, whatever is below them. A folder without folders is one
    class. If all its folders are splits (train, val, test, ...), train/ is used. Files are those with an extension that
    Pillow reads, sorted within classes, hidden ones excluded. Links are followed, but no folder below the classes is
    read twice, and links to a folder above are not followed: they would never end.
    Attributes: root, the folder that is read; classes, their names; paths and labels, arrays with one item per image;
    skipped, the number of skipped files of each extension.
    Raises ValueError for splits without train, an empty class, and images next to classes, OSError for a folder that
    cannot be read.
    """

    def __init__(self, root):
        names, self.root = class_folders(root), Path(root)
        if names and set(names) <= SPLITS:
            if "train" not in names:
                raise ValueError(f"{root} has {names[0]}/ but no train/: give {self.root / names[0]}, or add train/")
            self.root = self.root / "train"
            names = class_folders(self.root)
        self.classes, self.skipped = names or [self.root.resolve().name], collections.Counter()
        extensions = tuple(Image.registered_extensions().keys() - NO_IMAGES)
        entered = {os.path.realpath(folder) for folder in [self.root, *self.root.resolve().parents]}
        paths, labels, errors = [], [], []
        for parent, folders, files in os.walk(self.root, followlinks=True, onerror=errors.append):
            top = Path(parent) == self.root
            label = names.index(Path(parent).relative_to(self.root).parts[0]) if not top else 0
            real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
            folders[:] = names if top else [n for n in real if not n.startswith(".") and real[n] not in entered]
            entered.update(real[name] for name in folders)
            for name in sorted(name for name in files if not name.startswith(".")):
                if not name.lower().endswith(extensions):
                    self.skipped[Path(name).suffix or "without extension"] += 1
                elif top and names:
                    raise ValueError(f"{parent} contains class folders and the image {name}: move the images away")
                else:
                    paths.append(os.fsencode(os.path.join(parent, name)))
                    labels.append(label)
        if errors:
            raise errors[0]
        self.paths, self.labels = np.array(paths), np.array(labels)  # arrays take a third of a list's memory
        if empty := sorted(set(range(len(self.classes))) - set(labels)):
            folder = self.root / self.classes[empty[0]] if names else self.root
            raise ValueError(f"{folder} contains no images that Pillow reads: fill or remove it")

    def __len__(self):
        return len(self.paths)

    def open(self, index):
        return open_image(os.fsdecode(self.paths[index])), int(self.labels[index])

    def summary(self):
        """One line: the number of images and classes, and the skipped files."""
        classes = ", ".join(self.classes[:5] + ["..."] * (len(self.classes) > 5))
        skipped = ", ".join(f"{extension} {count}" for extension, count in self.skipped.most_common())
        line = f"{self.root}: {len(self)} images, {len(self.classes)} classes ({classes})"
        return line + (f"; skipped files: {skipped}" if skipped else "")


def polygon(corners, turn=0.0, inner=1.0):
    """Points (K, 2) on the unit circle, every second one at radius `inner`: polygons, stars, discs."""
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


@functools.cache  # drawing takes longer than a training step of the demo
def draw_shape(index, size, seed):
    """Image `index` of the shapes -> (PIL image, label): one bright shape on a dark gradient."""
    rng = np.random.default_rng((seed, index))
    label = index % len(SHAPES)
    fine = 4 * size  # drawn at four times the size, then averaged
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
    """A toy data set without files. Image i is a function of (seed, i): class, hue, position, rotation, background."""

    root, classes = "shapes", list(SHAPES)

    def __init__(self, count, size, seed=0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def open(self, index):
        return draw_shape(index, self.size, self.seed)

    def summary(self):
        return f"shapes: {self.count} images, drawn on the fly, {len(self.classes)} classes"


def image_source(data, size):
    """The images that --data names: 8,000 `shapes`, or a folder."""
    return Shapes(8000, size) if data == "shapes" else ImageFolder(data)


# --- The loader ------------------------------------------------------------------------------------------------------


def random_key(*numbers):
    """Hash (seed, epoch, position in the epoch) to 63 bits: the seed of all random numbers of an image at a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Images(torch.utils.data.Dataset):
    """Items (index, key) -> (uint8 image (3, S, S), label, key).

    transform(image, rng=...) -> PIL image; its generator is seeded with the key. A file that cannot be read is named
    once on stderr and marked in `unreadable`, a bool for each image, shared by all loader processes. It is replaced by
    another image with its own label, chosen by the same generator, so that batches keep their shape.
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
                break
            except Exception as error:  # Pillow raises nearly any type for a damaged file
                path = os.fsdecode(self.source.paths[index])
                if not self.unreadable[index]:
                    self.unreadable[index] = True
                    print(f"cannot read {path} ({error})", file=sys.stderr, flush=True)
            index = int(rng.integers(len(self.source)))
        else:
            raise ValueError(f"100 images in a row could not be read, the last one {path}: check the data folder")
        image = np.asarray(self.transform(image, rng=rng))
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), label, key


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_batches(count, batch, micro_batch, steps, seed, rank=0, world_size=1):
    """Micro-batches [(index, key), ...] of one rank, for the steps of the range `steps`.

    The images are one endless stream, epoch after epoch, each epoch in another order. Step s takes the `batch` images
    from position s * batch, and rank r the r-th part of them. So the images of a step depend neither on the number of
    processes nor on the micro-batch, no image is skipped at the end of an epoch, and a run can resume at any step.
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


def leave_process_group(worker):
    """Ctrl-C and torchrun's SIGTERM go to a process group. Loader processes leave it: the last step needs them."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def make_loader(images, batches, workers, device):
    """The DataLoader of `Images`, with `workers` processes; yields (uint8 (B, 3, S, S), labels (B,), keys (B,))."""
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=4 if workers else None, worker_init_fn=leave_process_group)


def evaluation_batches(source, indices, size, batch, workers, device):
    """The images `indices` of a source in order, centre-cropped, in batches uint8 (B, 3, size, size).

    Raises ValueError at the end if images could not be read; each is named on stderr.
    """
    images = Images(source, functools.partial(center_crop_flip, size=size, flip=0))
    batches = [[(i, i) for i in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    for pixels, *_ in make_loader(images, batches, workers, device):
        yield pixels
    if unreadable := int(images.unreadable.sum()):
        raise ValueError(f"{unreadable} images in {source.root} cannot be read, see above: repair or remove them")
