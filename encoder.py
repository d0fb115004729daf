"""Images to latents: the frozen representation encoders, latent statistics, then the images themselves.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Notation: B batch, C latent (token) channels, H x W latent grid, N = H W tokens, S image side in pixels.
Images are uint8 (B, 3, S, S) from the loader and float in [0, 1] for the encoder.
This file needs torch, numpy, timm and Pillow only.
"""

import collections
import colorsys
import contextlib
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


def decoder_pixels(name):
    """{"mean", "std"} by which the encoder's decoder scales what it puts out, three values each.

    They are the encoder's own (section 3). DINOv3's published decoders (arXiv 2605.18324) put out [0, 1] as it is.
    """
    return dict(mean=[0.0] * 3, std=[1.0] * 3) if "dinov3" in timm_name(name) else pixel_statistics(name)


def latents_of(record):
    """Name and layers of an encoder's record as one text. Two files that give the same text hold the same latents."""
    layers = " ".join(map(str, sorted(set(record.get("layers", [])))))
    short = {model: name for name, model in ENCODERS.items() if name != "random-tiny"}  # timm's name, to ours
    name = short.get(record["name"], record["name"])
    return name + (f", layers {layers}" if layers else "")


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


class Encoder(nn.Module):
    """A frozen vision transformer: images (B, 3, S, S) in [0, 1] -> latents (B, C, H, W), un-normalised (section 3).

    name: one of ENCODERS, or any timm vision transformer by its timm name. image_size: the side in pixels that the
    encoder is built for; models with patch 14 see 14/16 of it, so that the grid is image_size / 16. weights: a local
    file in timm's or the authors' key names; without it they are fetched. layers: numbers of blocks, from 0, whose
    outputs are averaged, for DINOv3 plus the last one's mean over the tokens (arXiv 2605.18324); none: the last alone.
    options: more arguments of timm's model. The final norm has no affine; prefix tokens (CLS, registers) are dropped.
    Attributes: latent_shape (C, H, W); mean and std (1, 3, 1, 1) of its pixels; record, what a checkpoint keeps of it.
    Raises ValueError, in one line, for unknown names, sizes and layers that don't fit, weights that can't be had.
    """

    def __init__(self, name="dinov2-b", image_size=256, weights=None, layers=(), **options):
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
            options = tiny | dict(num_classes=0) | options
        with torch.device("meta"):  # without values: what doesn't fit is refused before anything is fetched
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
        elif weights is not None:
            raise ValueError(f"encoder {name} takes no --encoder-weights {weights}: choose the --encoder they are of")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.vit = timm.create_model(model, **options)

        self.layers, self.adds_patch_mean = sorted(set(layers)), "dinov3" in model
        self.record = dict(name=name, image_size=image_size, layers=self.layers, **pixel_statistics(name))
        self.image_size, self.grid = image_size, image_size // multiple
        self.input_size = self.grid * patch
        self.latent_shape = (self.vit.embed_dim, self.grid, self.grid)
        self.resize_positions(antialias=not model.endswith(".mae"))
        # The final norm loses its affine (section 3) and is the last thing that runs. timm calls it `norm`, or
        # `fc_norm` where the model pools its tokens first; both may be missing.
        norm = next((n for n in (self.vit.norm, self.vit.fc_norm) if not isinstance(n, nn.Identity)),
                    nn.LayerNorm(self.vit.embed_dim, eps=1e-6))
        norm.weight = norm.bias = None
        self.vit.norm, self.vit.fc_norm, self.vit.attn_pool = norm, nn.Identity(), None
        self.register_buffer("mean", torch.tensor(self.record["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.record["std"]).view(1, 3, 1, 1))
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
        x = (images - self.mean) / self.std
        if self.layers:
            outputs = self.vit.forward_intermediates(x, indices=self.layers, norm=True, output_fmt="NLC",
                                                     intermediates_only=True)  # (B, N, C) of each layer
            tokens = torch.stack(outputs).float().mean(0)  # (B, N, C)
            if self.adds_patch_mean:  # the follow-up's code does so for DINOv3 alone
                tokens = tokens + outputs[-1].float().mean(1, keepdim=True)
        else:
            tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :].float()  # (B, N, C)
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B, C, H, W)


# --- Latent statistics -----------------------------------------------------------------------------------------------


def fill_up(batch, size):
    """(B, ...) -> (size, ...): the last item again where B < size, so that a compiled model meets one shape only."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


def latent_statistics(encoder, loader, device):
    """Mean and variance of each latent element over the images of all ranks' loaders.

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


# --- Image files and crops -------------------------------------------------------------------------------------------


def open_image(path):
    """Any image file -> upright 8-bit RGB: EXIF rotation applied, 16 bits scaled, transparency laid on white.

    Raises ValueError for numbers whose range the file doesn't tell (floats, 32-bit integers), and where one side is
    more than 50 times the other: crops would enlarge such a strip to gigabytes.
    """
    with Image.open(path) as file:
        if max(file.size) > 50 * min(file.size):
            raise ValueError(f"{file.width} x {file.height} pixels: one side is more than 50 times the other")
        if file.mode == "F" or file.mode == "I" and file.format not in ("PNG", "PPM"):  # theirs are 16 bits wide
            raise ValueError(f"mode {file.mode}: the range of its numbers is not known, save it in 8 or 16 bits")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip it
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
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


# --- Sources of images: a folder, or shapes drawn on the fly ---------------------------------------------------------

SPLITS = {"train", "val", "valid", "validation", "test"}


def refuse_folder(error):
    raise ValueError(f"cannot read the folder {error.filename} ({error.strerror}): make it readable")


def folders_in(root):
    """The names of the folders in a folder, sorted, without hidden ones."""
    _, names, _ = next(os.walk(root, onerror=refuse_folder))
    return sorted(name for name in names if not name.startswith("."))


class ImageFolder:
    """A folder of images; open(i) gives (PIL image, label).

    Labels follow the first-level folders in sorted order, whatever lies deeper. A folder without folders is one class.
    Where its folders are all among train, val, valid, validation and test, its train/ is read. Files are those with an
    ending that Pillow reads, sorted within classes; hidden ones are left out. Links are followed, but below the classes
    each folder is read once, and links to folders above it are not followed: they would never end.
    Attributes: root, the folder that is read; classes, their names; paths and labels, arrays of one item per image;
    left_out, skipped files counted by ending.
    Raises ValueError for a folder that is missing or unreadable, without images, with an empty class, with a name that
    is not UTF-8, or with val/ but no train/.
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
        self.root, self.classes = root, names or [root.resolve().name]
        for name in self.classes:
            if os.fsencode(name).decode(errors="replace") != name:
                raise ValueError(f"the name of the folder {os.fsencode(name)} is not UTF-8: rename it")
        self.left_out = collections.Counter()
        unreadable = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}  # though registered
        endings = tuple(Image.registered_extensions().keys() - unreadable)

        def images_in(parent, files):
            files = [name for name in sorted(files) if not name.startswith(".")]
            images = [name for name in files if name.lower().endswith(endings)]
            self.left_out.update(Path(name).suffix or "without ending" for name in set(files) - set(images))
            return [os.path.join(parent, name) for name in images]

        loose = images_in(root, [path.name for path in root.iterdir() if path.is_file()]) if names else []
        if loose:
            raise ValueError(f"{root} holds both class folders and images ({loose[0]}): move the images away")
        folders = [root / name for name in names] or [root]
        entered = {os.path.realpath(folder) for folder in [root, *root.resolve().parents, *folders]}
        paths, labels = [], []
        for label, folder in enumerate(folders):
            before = len(paths)
            for parent, inside, files in os.walk(folder, followlinks=True, onerror=refuse_folder):
                inside[:] = [name for name in sorted(inside) if not name.startswith(".")
                             and os.path.realpath(os.path.join(parent, name)) not in entered]
                entered.update(os.path.realpath(os.path.join(parent, name)) for name in inside)
                paths += images_in(parent, files)
            if len(paths) == before:
                raise ValueError(f"{folder} holds no images that Pillow reads: fill or remove it")
            labels += [label] * (len(paths) - before)
        self.paths = np.array([os.fsencode(path) for path in paths])  # an array takes a third of a list's memory
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.paths)

    def open(self, index):
        return open_image(os.fsdecode(self.paths[index])), int(self.labels[index])

    def summary(self):
        """One line: how many images are used, how many classes, and what is left out."""
        classes = ", ".join(self.classes[:5] + ["..."] * (len(self.classes) > 5))
        left_out = ", ".join(f"{ending} {count}" for ending, count in self.left_out.most_common())
        line = f"{self.root}: {len(self)} images, classes: {len(self.classes)} ({classes})"
        line += f"; left out: {left_out}" if left_out else ""
        return line.encode(errors="replace").decode()  # a path need not be UTF-8


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

    def summary(self):
        return f"shapes: {self.count} images, drawn on the fly, classes: {len(self.classes)}"


def image_source(data, size):
    """What --data names: `shapes`, 8,000 of them, or a folder."""
    return Shapes(8000, size) if data == "shapes" else ImageFolder(data)


# --- The loader ------------------------------------------------------------------------------------------------------


def random_key(*numbers):
    """Hash (seed, epoch, place in the epoch) to 63 bits, which seed all that is drawn for an image at a step."""
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


def leave_process_group(worker):
    """Ctrl-C and torchrun's SIGTERM go to a process group. Loader processes leave it: the last step needs them."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def make_loader(images, batches, workers, device):
    """The DataLoader of `Images` with so many processes; it yields (uint8 (B, 3, S, S), labels (B,), keys (B,))."""
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=4 if workers else None, worker_init_fn=leave_process_group)


def crop_for_evaluation(image, size, rng):
    return center_crop(image, size)  # nothing is drawn


def evaluation_batches(source, indices, size, batch, workers, device):
    """The images `indices` of a source in order, centre-cropped, in batches uint8 (B, 3, size, size).

    Raises ValueError, at the end, where images could not be read; each is named on stderr.
    """
    images = Images(source, functools.partial(crop_for_evaluation, size=size))
    parts = [[(i, i) for i in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    for pixels, *_ in make_loader(images, parts, workers, device):
        yield pixels
    if broken := int(images.unreadable.sum()):
        raise ValueError(f"{broken} images in {source.root} cannot be read, see above: repair or remove them")
