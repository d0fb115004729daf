"""Images to latents: data sets, crops, the loader, the frozen representation encoders, latent statistics; and what the
scripts share: command line, device, the folder of a training run.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Letters: B batch, C latent (token) channels, H x W latent grid. Images are uint8 (B, 3, S, S) from the loader and float
in [0, 1] for the encoder. This file needs torch, numpy, timm and Pillow only.
"""

import argparse
import colorsys
import csv
import difflib
import fcntl
import functools
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import timm
import timm.utils
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Image files and crops


def find_images(root):
    """All images below a folder -> (paths sorted within classes, labels, class names).

    Labels follow the first-level folders in sorted order, whatever lies deeper; a folder without class folders is one
    class. A folder with train/ and val/ inside means its train/. Files are what Pillow reads, hidden ones left out.
    Raises ValueError for a folder that is missing, without images, or with an empty class.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give a folder of images")
    if (root / "train").is_dir() and (root / "val").is_dir():
        root = root / "train"
    suffixes = tuple(Image.registered_extensions().keys() - {".pdf"})  # which Pillow only writes

    def is_image(name):
        return name.lower().endswith(suffixes) and not name.startswith(".")

    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = sorted(path.name for path in root.iterdir() if path.is_file() and is_image(path.name))
    if folders and loose:
        raise ValueError(f"{root} holds both class folders and images ({loose[0]}): move the images away")
    paths, labels = [], []
    for label, folder in enumerate(folders or [root]):
        before = len(paths)
        for parent, inside, files in os.walk(folder, followlinks=True):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            paths += [os.path.join(parent, name) for name in sorted(files) if is_image(name)]
        if len(paths) == before:
            fix = "fill or remove it" if folders else "give a folder of images"
            raise ValueError(f"{folder} holds no images that Pillow reads: {fix}")
        labels += [label] * (len(paths) - before)
    return paths, labels, [folder.name for folder in folders] or [root.resolve().name]


def open_image(path):
    """Any image file -> upright 8-bit RGB: EXIF rotation applied, 16 bits scaled, transparency laid on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip instead of scale
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


class ImageFolder:
    """A folder of images as `find_images` reads it; open(i) gives (PIL image, label)."""

    def __init__(self, root):
        paths, labels, self.classes = find_images(root)
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
}  # fmt: skip


class Shapes:
    """An endless toy data set without files: image i of `seed` is one bright shape on a dark gradient.

    Class, hue, place, size, rotation and background are a function of (seed, i) alone.
    """

    classes = list(SHAPES)

    def __init__(self, count, size, seed=0):
        self.count, self.size, self.seed, self.drawn = count, size, seed, {}

    def __len__(self):
        return self.count

    def open(self, index):
        if index not in self.drawn:  # once: drawing takes longer than all that follows
            self.drawn[index] = self.draw(index)
        return self.drawn[index]

    def draw(self, index):
        rng = np.random.default_rng((self.seed, index))
        label = index % len(self.classes)
        size, fine = self.size, 4 * self.size  # drawn four times as fine, then averaged
        radius, turn = rng.uniform(0.32, 0.42), rng.uniform(-0.2, 0.2)
        center = 0.5 + rng.uniform(-0.05, 0.05, 2)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mask = Image.new("L", (fine, fine))
        for outline, value in zip(SHAPES[self.classes[label]], (255, 0), strict=True):
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


def image_source(data, size):
    """What --data names: `shapes`, 8,000 of them, or a folder."""
    return Shapes(8000, size) if data == "shapes" else ImageFolder(data)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def random_key(*numbers):
    """Hash (seed, epoch, position, ...) to 63 bits, which seed everything drawn for one image at one step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Images(torch.utils.data.Dataset):
    """Items (index, key) -> (uint8 image (3, S, S), label, key, number of broken files replaced).

    transform(image, rng) -> PIL image draws from a generator seeded by the key. A file that cannot be read is named on
    stderr and replaced by another, chosen from the same generator, with its own label: so batches keep their shape.
    strict: it is an error instead, for evaluation.
    """

    def __init__(self, source, transform, strict=False):
        self.source, self.transform, self.strict = source, transform, strict

    def __len__(self):
        return len(self.source)

    def __getitem__(self, item):
        index, key = item
        rng = np.random.default_rng(key)
        for replaced in range(100):
            try:
                image, label = self.source.open(index)
                image = np.asarray(self.transform(image, rng))
                return torch.from_numpy(image.transpose(2, 0, 1).copy()), label, key, replaced
            except Exception as error:  # Pillow raises nearly any kind for a damaged file
                if not hasattr(self.source, "paths"):
                    raise
                path = os.fsdecode(self.source.paths[index])
                if self.strict:
                    raise ValueError(f"cannot read {path} ({error}): repair or remove it") from None
                print(f"unreadable image replaced by another: {path} ({error})", file=sys.stderr, flush=True)
                index = int(rng.integers(len(self.source)))
        raise ValueError(f"100 images in a row could not be read, the last one {path}: check the data folder")


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_batches(count, batch, micro_batch, steps, seed, rank=0, world_size=1):
    """Micro-batches [(index, key), ...] of one rank, over the steps of the range `steps`.

    The images are one endless stream, epoch after epoch, each in an order of its own; step s takes the `batch` images
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


def outlive_signals(_):
    """Loader workers leave Ctrl-C and SIGTERM to their trainer, whose last step needs them. Its own SIGTERM, by which
    Python stops them where the trainer fails, ends them at once."""

    def await_trainer():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=await_trainer, daemon=True).start()


def make_loader(dataset, batches, workers, device):
    """workers None: by the cores of this process, at most 12; none for `shapes`, which are kept once they are drawn."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
        workers = max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
        workers = workers if hasattr(dataset.source, "paths") else 0
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=4 if workers else None, worker_init_fn=outlive_signals,
        multiprocessing_context="fork" if workers else None,  # the workers share the list of files, and get lambdas
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The frozen encoders

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

# name -> timm model, pixel statistics, and what the Hugging Face encoders, which the published decoders were trained
# on, do otherwise than timm: MAE's positions are resized without antialias and its LayerNorms have eps 1e-12; SigLIP2
# has tanh-GELU.
ENCODERS = {
    "dinov2-s": dict(model="vit_small_patch14_reg4_dinov2.lvd142m", pixels=IMAGENET),
    "dinov2-b": dict(model="vit_base_patch14_reg4_dinov2.lvd142m", pixels=IMAGENET),
    "dinov2-l": dict(model="vit_large_patch14_reg4_dinov2.lvd142m", pixels=IMAGENET),
    "siglip2-b": dict(model="vit_base_patch16_siglip_256.v2_webli", pixels=HALF, vit=dict(act_layer="gelu_tanh")),
    "mae-b": dict(model="vit_base_patch16_224.mae", pixels=IMAGENET, antialias=False,
                  vit=dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-12))),
    # The demo's encoder: a small ViT whose weights are random, from a fixed seed. It has learned nothing.
    "random-tiny": dict(
        model="vit_tiny_patch16_224", pixels=HALF,
        vit=dict(patch_size=8, embed_dim=128, depth=3, num_heads=4, class_token=False, global_pool=""),
    ),
}  # fmt: skip


class Encoder(nn.Module):
    """A frozen vision transformer: images (B, 3, S, S) in [0, 1] -> latents (B, C, H, W), un-normalised.

    name: one of ENCODERS, or any timm vision transformer by its timm name. image_size: the images' side in pixels;
    models with patch 14 see images of 14/16 of it, so that the grid is image_size / 16. weights: a local file in timm's
    key names; without it timm downloads them. vit: further arguments for timm's model.
    The final norm has no affine, and prefix tokens (CLS, registers) are dropped (section 3).
    Attributes: latent_dim C, grid H = W, mean and std (1, 3, 1, 1) of its pixels.
    Raises ValueError, in one line, for unknown names, sizes that don't fit and weights that are out of reach.
    """

    def __init__(self, name="dinov2-b", image_size=256, weights=None, **vit):
        super().__init__()
        row = ENCODERS.get(name, dict(model=name))
        vit = row.get("vit", {}) | vit
        if not timm.is_model_pretrained(row["model"]) and (weights is None or name not in timm.list_models()):
            near = nearest(name, [*ENCODERS, *timm.list_models("*vit*", pretrained=True)])
            raise ValueError(f"unknown encoder {name}: one of {', '.join(ENCODERS)}, or a timm ViT by its name{near}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the weights of random-tiny; the others get theirs once all is known to fit
            self.vit = timm.create_model(row["model"], num_classes=0, **vit)
        if not isinstance(self.vit, (timm.models.VisionTransformer, timm.models.Eva)):
            raise ValueError(f"encoder {name} is a {type(self.vit).__name__}: choose a vision transformer")
        patch = self.vit.patch_embed.feat_ratio()
        multiple = 16 if patch == 14 else patch
        if image_size < 1 or image_size % multiple:
            raise ValueError(f"image size {image_size} does not fit encoder {name}: use a multiple of {multiple}")
        if name == "random-tiny" and weights is not None:
            raise ValueError(f"encoder {name} takes no --encoder-weights {weights}: choose the --encoder they are of")
        if name != "random-tiny":
            self.vit = load_vit(self.vit, row["model"], weights, vit)

        self.name, self.image_size, self.latent_dim = name, image_size, self.vit.embed_dim
        self.grid = image_size // multiple
        self.input_size = self.grid * patch
        self.resize_positions(antialias=row.get("antialias", True))
        # The last norm, without affine; timm calls it fc_norm in models that pool their tokens before it.
        norms = [norm for norm in (self.vit.norm, self.vit.fc_norm) if hasattr(norm, "eps")]
        norm = norms[0] if norms else nn.LayerNorm(self.latent_dim, eps=1e-6)
        norm.weight = norm.bias = None
        self.vit.norm, self.vit.fc_norm, self.vit.attn_pool = norm, nn.Identity(), None  # and nothing after it
        pixels = row.get("pixels") or {key: self.vit.pretrained_cfg[key] for key in ("mean", "std")}
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

    def train(self, mode=True):
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @property
    def record(self):
        """What a checkpoint keeps of its encoder: plain values."""
        return dict(name=self.name, image_size=self.image_size, latent_dim=self.latent_dim, grid=self.grid,
                    mean=self.mean.flatten().tolist(), std=self.std.flatten().tolist())  # fmt: skip

    @torch.no_grad()
    def forward(self, images):
        size = (self.input_size, self.input_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        tokens = self.vit.forward_features((images - self.mean) / self.std)  # (B, prefix + N, C)
        tokens = tokens[:, self.vit.num_prefix_tokens :].float()  # (B, N, C)
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B, C, H, W)


def load_vit(network, model, weights, vit):
    """timm's vision transformer with its pretrained weights: from the hub, or from a local file into `network`."""
    hub = f"https://huggingface.co/{network.pretrained_cfg.get('hf_hub_id')}"
    fix = f"fetch model.safetensors of {hub} and pass it with --encoder-weights PATH"
    if weights is None:
        try:
            return timm.create_model(model, pretrained=True, num_classes=0, **vit)
        except Exception as error:  # the hub's client raises many kinds
            raise ValueError(f"cannot download the weights of {model} ({type(error).__name__}): {fix}") from None
    if not os.path.isfile(weights):
        raise ValueError(f"no encoder weights at {weights}: {fix}")
    try:
        state = timm.models.load_state_dict(weights, weights_only=True)
        for key, value in network.state_dict().items():
            if key.startswith(("norm.", "fc_norm.", "attn_pool.")):
                continue
            if state[key].shape != value.shape or not state[key].isfinite().all():
                raise KeyError(key)
    except KeyError as error:
        reason = f"{error} is missing, of another shape or not finite"
        raise ValueError(f"{weights} does not fit {model}, {reason}: {fix}") from None
    except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
        raise ValueError(f"{weights} is not a file of encoder weights ({type(error).__name__}): {fix}") from None
    network.load_state_dict(state, strict=False)  # a head or a pooling layer in the file has no use here
    return network


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics


def latent_statistics(encoder, loader, device, distributed=False):
    """Mean and variance of each latent element over the images of the loaders of all ranks.

    Returns {"mean", "var"}, each (C, H, W) float32; accumulated in float64, so that neither the batch size nor the
    number of ranks matters. The diffusion model sees (z - mean) / sqrt(var + 1e-5).
    """
    shape = (encoder.latent_dim, encoder.grid, encoder.grid)
    sums = torch.zeros(3, *shape, dtype=torch.float64, device=device)  # of 1, z and z^2
    for images, *_ in loader:
        z = encoder(images.to(device, non_blocking=True).float() / 255).double()  # (B, C, H, W)
        sums += torch.stack([torch.ones_like(z), z, z.square()]).sum(1)
    if distributed:
        torch.distributed.all_reduce(sums)
    mean, square = sums[1:] / sums[0]
    return {"mean": mean.float(), "var": (square - mean.square()).clamp(min=0).float()}


def load_stats(path, shape):
    """Read a stat.pt, ours or published: {"mean": None or (C, H, W), "var": (C, H, W)}; None means 0.

    Raises FileNotFoundError, and ValueError for another content or another shape than `shape` (C, H, W).
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no latent statistics at {path}: give the path of a stat.pt with --stats") from None
    except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
        raise ValueError(f"{path} is not a file of tensors ({type(error).__name__}): give a stat.pt") from None
    if not isinstance(file, dict) or "mean" not in file or not torch.is_tensor(file.get("var")):
        found = file.get("kind", list(file)[:3]) if isinstance(file, dict) else type(file).__name__
        raise ValueError(f"{path} holds no latent statistics, a mean and a var; found in it: {found}; give a stat.pt")
    var, mean = file["var"], torch.zeros_like(file["var"]) if file["mean"] is None else file["mean"]
    for value in (mean, var):
        if value.shape != tuple(shape):
            raise ValueError(f"{path} has statistics of shape {tuple(value.shape)}, the model needs {tuple(shape)}")
    if not mean.isfinite().all() or not (var.isfinite() & (var >= 0)).all():
        raise ValueError(f"{path} has statistics that are not finite, or a negative variance: measure them again")
    return {"mean": mean.float(), "var": var.float()}


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share: the command line


def nearest(name, names):
    """The end of a message about an unknown name: "; did you mean dinov2-s or dinov2-b?", or nothing."""
    near = difflib.get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows the defaults where there are any."""

    def error(self, message):
        time.sleep(10 * (os.environ.get("RANK", "0") != "0"))  # rank 0 says it, and torchrun then ends the others
        wrong = re.search("(?:invalid choice: |unrecognized arguments: )'?([^ '=]+)", message)
        names = re.findall(r"[\w-]+", message.partition("choose from")[2]) or list(self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message}{nearest(wrong[1], names) if wrong else ''}\n")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "":  # as of a variable that the shell does not know
                self.error(f"--{name.replace('_', '-')} '': is empty, give a value or leave the flag out")
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: PyTorch finds no GPU here, use --device cpu")
        return args

    def check_numbers(self, args, above=(), least=()):
        """Refuse arguments that are not above 0, or at least 0, or more than a generator or a schedule takes."""
        for name in (*above, *least):
            value = 1 if getattr(args, name) is None else getattr(args, name)
            if not 0 <= value < 2**63 or name in above and not value:
                bound = "above" if name in above else "of at least"
                self.error(f"--{name.replace('_', '-')} {value}: must be a number {bound} 0 and below 2^63")

    def check_out(self, path, folder=True):
        """Refuse an --out (Path) that cannot be made or written, before any work."""
        there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        if there.is_dir() != (folder or there != path) or not os.access(there, os.W_OK):
            self.error(f"--out {path}: {there} is not a {'folder' if folder else 'place'} to write to, choose another")

    def format_help(self):
        for action in self._actions:
            if action.default not in (None, argparse.SUPPRESS) and action.default is not False:
                action.help += " (default: %(default)s)"
        return super().format_help()


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share: device, compilation, errors


def set_up(args):
    """Join the process group and set the precision of matrix products -> device, autocast. Sets args.rank and so on."""
    os.environ.setdefault("WORLD_SIZE", "1")  # torchrun sets it; timm would take a SLURM allocation for a launch
    device = timm.utils.init_distributed_device(args)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = args.precision != "float32"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compile_blocks(*models):
    """Block by block: quick, and gradients leave for the other ranks early."""
    torch._dynamo.config.optimize_ddp = False  # which would cut each block at the bounds of DDP's buckets
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)  # else a smaller last batch leaves a slower graph that then serves all


def guard(train, *arguments):
    """train(...), after which the signal handlers are back; what its user can mend ends the process in one line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        loader = "DataLoader worker" in str(error) or "could not be read" in str(error)
        if not loader and not isinstance(error, (OSError, torch.OutOfMemoryError)):
            raise
        what = "the loader failed" if loader else "stopped"
        cause = (str(error.__cause__ or "") or str(error)).strip().splitlines()[-1].rstrip(".")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # outside of the except clause, whose traceback would keep the loader's processes alive
    sys.exit(f"{what}: {cause}. The same command resumes; where memory is short: a smaller --micro-batch, "
             "--checkpointing, fewer --workers")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What the trainers share: the folder of a run


def claim(folder):
    """Keep the folder to this run while it lives: two that save into one would break each other's checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another run is writing to {folder}: wait for its end, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    return lock


def save(files):
    """Write checkpoints {path: content} beside their places, then move them there: what is at a path is always whole,
    and the files of one save belong together. The last one moves last: resuming from it, the others are there."""
    try:
        for path, content in files.items():
            with open(f"{path}.tmp", "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        for name in files:
            Path(f"{name}.tmp").unlink(missing_ok=True)
        cause = error.__context__ or error  # of which torch reports what follows from it
        if "DataLoader" in str(cause):  # one of the loader's processes has died meanwhile
            raise cause from None
        sys.exit(f"cannot write {path} ({cause}); what was there before is untouched: make room, run again to resume")


def read_last(folder, recorded, kind, result):
    """last.pt of a run to resume, or None. Refuses a folder that holds another run, naming what differs.

    recorded: the arguments that shape the result; kind: the script; result: the name of its other file.
    """
    path = folder / "last.pt"
    if not path.exists():
        if (folder / result).exists() and not (folder / "last.pt.tmp").exists():  # killed in the first save
            raise ValueError(f"{folder} holds a {result} but no last.pt to resume from: choose another --out")
        return None
    try:
        last = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if last["kind"] != kind or "step" not in last:
            raise KeyError(kind)
        theirs = last["args"]
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of this script, or damaged ({type(error).__name__}): put back a "
                         "copy, or move the folder away") from None  # fmt: skip
    differ = [f"{key} {theirs.get(key)}, now {recorded.get(key)}" for key in sorted(recorded.keys() | theirs.keys())
              if theirs.get(key) != recorded.get(key)]  # fmt: skip
    if differ:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(differ)}): choose another --out")
    return last


def open_log(path, start, fields):
    """A writer of log.csv, without the rows of steps after `start`, which are done again."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if start and path.exists() else []
    file = open(f"{path}.tmp", "w", newline="", buffering=1)  # each line goes to the disk at once
    log = csv.DictWriter(file, fields)
    log.writeheader()
    log.writerows(row for row in rows if int(row["step"]) <= start)
    os.replace(f"{path}.tmp", path)
    return log


def peak_memory(device):
    """GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
