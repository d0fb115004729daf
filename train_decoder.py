"""Stage 1: train the decoder, which turns the latents of a frozen encoder back into pixels.

    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/                      # ViT-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/ --preset imagenet512
    python train_decoder.py --data photos/ --init decoder.pt --gan 0 --lr 2e-5 --batch 32 --out runs/photos/decoder
    python train_decoder.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, section 3 and its appendix. It writes to --out:
    decoder.pt      EMA weights and configuration: what sample.py and train_dit.py read
    last.pt         everything that is needed to go on exactly where training stopped
    log.csv         one row for each logged interval
    preview-*.png   images above their reconstructions by the EMA weights
To evaluate: sample.py --reconstruct imagenet/val --out recon.npz, then fid.py imagenet/val recon.npz --paired.
"""

import argparse
import copy
import datetime
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from decoder import SIZES, Decoder, image_grid, load_decoder, patchify, to_uint8
from encoder import (ENCODERS, Encoder, Images, decoder_pixels, default_workers, image_source, latents_of, make_loader,
                     pretrained, random_crop, random_key, training_batches)
from fid import LPIPS

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
RECIPE = [
    # flag              paper        demo           meaning, and where the paper differs
    ("--size",          256,         32,            "image side in pixels, as decoded"),
    ("--resize",        0,           0,             "shorter side before the crop; 0: 1.5 x --size (shapes: 1 x)"),
    ("--encoder",       "dinov2-b",  "random-tiny", f"{', '.join(ENCODERS)}, or a timm ViT by its name"),
    ("--encoder-size",  0,           0,             "side that the encoder sees; 256 at --size 512: upsampling"),
    ("--layers",        [int],       [int],         "encoder blocks, from 0, whose mean is the latent; none: the last"),
    ("--model",         "ViT-XL",    "ViT-tiny",    "size of the decoder", *SIZES),
    ("--tau",           0.8,         0.05,          "strength of the latents' noise, sigma = |N(0, tau^2)| per image"),
    ("--lpips",         1.0,         0.0,           "weight of the perceptual loss; 0: off"),
    ("--gan",           0.75,        0.0,           "factor on the adaptive weight of the GAN loss; 0: off"),
    ("--disc-start",    6.0,         1.0,           "epoch from which the discriminator trains"),
    ("--gan-start",     8.0,         1.5,           "epoch from which its loss trains the decoder"),
    ("--epochs",        16.0,        4.0,           "length of training and of the cosine schedules"),
    ("--batch",         512,         16,            "images in a step, over all processes"),
    ("--lr",            2e-4,        4e-3,          "learning rate of both AdamWs, without weight decay"),
    ("--lr-end",        2e-5,        3e-5,          "learning rate at the end of the cosine"),
    ("--warmup",        1.0,         0.2,           "epochs of linear warm-up, of each model from its start"),
    ("--betas",         [0.9, 0.95], [0.9, 0.95],   "betas of both AdamWs; the paper: 0.5 0.9"),
    ("--ema",           0.9978,      0.99,          "decay of the weights' moving average"),
    ("--seed",          0,           0,             "seed of the weights and of everything that is drawn"),
]
RUN = [  # a resumed run may change these, as long as its images are as many and of the same classes
    ("--data",          None,        "shapes",      "folder of images; or `shapes`, drawn on the fly"),
    ("--encoder-weights", None,      None,          "local file, instead of the download"),
    ("--init",          None,        None,          "weights to start from, ours or published; ignored on resume"),
    ("--out",           None,        None,          "folder for what is written (default: runs/<preset>/decoder)"),
    ("--micro-batch",   16,          16,            "most images in one forward, for ViT-XL on 80 GB"),
    ("--checkpointing", False,       False,         "recompute activations in backward: less memory, slower"),
    ("--precision",     "tf32",      "tf32",        "of matrix products; on a CPU tf32 is float32", "tf32", "float32",
                                                    "bf16"),
    ("--compile",       "auto",      "auto",        "torch.compile; auto: on CUDA", "auto", "on", "off"),
    ("--device",        DEVICES[0],  DEVICES[0],    "device of this process", *DEVICES),
    ("--workers",       default_workers(), 0,       "loader processes for each GPU; by default by the cores"),
    ("--log-every",     100,         100,           "steps between rows of log.csv"),
    ("--preview-every", 2500,        500,           "steps between previews; 0: none"),
    ("--save-every",    1000,        500,           "steps between checkpoints"),
    ("--vgg-weights",   None,        None,          "VGG16 of LPIPS: local file, instead of the download"),
    ("--lpips-weights", None,        None,          "heads of LPIPS: local file, instead of the download"),
    ("--dino-weights",  None,        None,          "the discriminator's DINO ViT-S/8: local file"),
]
IMAGENET512 = {"--size": 512, "--micro-batch": 4}
MAY_DIFFER = {"--epochs", "--lr", "--lr-end"}  # rows of RECIPE that a resumed run may change too


def parse_args(argv):
    parser = make_parser(__doc__, RECIPE + RUN, IMAGENET512, argv)
    args = parser.parse_args(argv)
    check_values(parser, args, {"size", "batch", "micro_batch", "epochs", "lr", "log_every", "save_every"})
    args.out = Path(args.out or Path("runs", args.preset, "decoder"))
    args.encoder_size = args.encoder_size or args.size
    args.resize = args.resize or (args.size if args.data == "shapes" else args.size * 3 // 2)
    if args.data is None:
        parser.error("--data is missing: give a folder of images, or `shapes`")
    if args.resize < args.size:
        parser.error(f"--resize {args.resize} is below --size {args.size}: give at least that")
    if args.lpips and args.size < 16:
        parser.error(f"--size {args.size} is too small for the perceptual loss: give at least 16, or --lpips 0")
    if args.gan and not args.disc_start <= args.gan_start < math.inf:
        parser.error(f"--gan-start {args.gan_start:g}: give at least --disc-start {args.disc_start:g}, or --gan 0")
    return parser, args


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator: five light heads that read a frozen DINO ViT. StyleGAN-T (arXiv 2301.09515), section 3.2

# DINO ViT-S/8 (arXiv 2104.14294) with the tanh form of GELU, as the released code runs it.
DINO = dict(model="vit_small_patch8_224.dino", act_layer="gelu_tanh")


class DiscriminatorHead(nn.Module):
    """Features (B, D, N) of one ViT block to one logit per token, (B, N)."""

    def __init__(self, D):
        super().__init__()

        def conv(out, kernel):
            return spectral_norm(nn.Conv1d(D, out, kernel, padding=kernel // 2, padding_mode="circular"))

        def block(kernel):  # StyleGAN-T's batch norm over groups of one image, that is an instance norm
            return nn.Sequential(conv(D, kernel), nn.InstanceNorm1d(D, eps=1e-6, affine=True), nn.LeakyReLU(0.2))

        self.embed, self.mix, self.logit = block(1), block(9), conv(1, 1)

    def forward(self, x):  # (B, D, N)
        x = self.embed(x)
        x = (self.mix(x) + x) / math.sqrt(2)
        return self.logit(x).squeeze(1)  # (B, N)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, 5 N), N the ViT's patches (784): high for real, low for generated.

    The first head reads the last block's output, the others those of blocks 2, 5, 8 and 11, counted from 0.
    Only `heads` trains. The ViT is frozen, but gradients flow through it to the images.
    weights: a local file, in timm's or DINO's own key names; None: fetched once. Raises ValueError where they can't be
    had.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.vit = pretrained(weights=weights, flag="--dino-weights", **DINO).requires_grad_(False)
        self.heads = nn.ModuleList(DiscriminatorHead(self.vit.embed_dim) for _ in range(5))
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def forward(self, images):  # (B, 3, H, W)
        x = F.interpolate(images, self.vit.patch_embed.img_size, mode="bilinear", align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std  # (B, 3, 224, 224)
        outputs = self.vit.forward_intermediates(x, [2, 5, 8, 11], output_fmt="NLC", intermediates_only=True)
        outputs = [outputs[-1], *outputs]  # (B, N, D) each; the last block serves two heads
        with torch.autocast(x.device.type, enabled=False):  # the heads and the loss stay in float32
            logits = [head(output.float().mT) for head, output in zip(self.heads, outputs, strict=True)]  # (B, N) each
        return torch.cat(logits, 1)  # (B, 5 N)


def diffaug(images, draws):
    """Differentiable augmentation (arXiv 2006.10738) of images (B, 3, H, W) in [-1, 1], without clamping.

    draws: (B, 5) float32, uniform in [0, 1), made by the caller, so that they depend on the image and not on its place
    in the batch. Each column drives one transform; they apply in this order:
      0, 1  translation right and down by whole pixels, uniform within an eighth of the side either way, zeros move in
      2     brightness: + U(-0.5, 0.5)
      3     saturation: * U(0, 2) about each pixel's mean over the channels
      4     contrast:   * U(0.5, 1.5) about the image's mean
    Nothing is read back to the host.
    """
    B, C, H, W = images.shape
    right, down, brightness, saturation, contrast = draws.unbind(1)  # (B,) each

    def source(u, side):  # (B, side): where each column (or row) comes from; outside of [0, side) it is empty
        reach = int(side / 8 + 0.5)
        offset = (u * (2 * reach + 1)).long() - reach
        return torch.arange(side, device=u.device) - offset[:, None]

    x, y = source(right, W)[:, None, :], source(down, H)[:, :, None]  # (B, 1, W), (B, H, 1)
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)  # (B, H, W)
    index = y.clamp(0, H - 1) * W + x.clamp(0, W - 1)
    images = images.flatten(2).gather(2, index.view(B, 1, H * W).expand(-1, C, -1)).view(B, C, H, W)
    images = images * inside[:, None]

    brightness, saturation, contrast = (u.view(B, 1, 1, 1) for u in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


# --- Losses ----------------------------------------------------------------------------------------------------------


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss. The generator's is -mean(D(fake)), without a hinge."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def quantize(images):
    """Images in [-1, 1], clamped and rounded to the 256 levels of 8 bits, as real images are. No gradient."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def adaptive_weight(g_rec, g_gan, hidden, pixel_std):
    """Weight w of the GAN term (VQGAN, arXiv 2012.09841, equation 7), a scalar tensor in [0, 1e4] without gradient.

    w = ||G_rec|| / (||G_gan|| + 1e-6), where G is a loss's gradient at the weight of the decoder's last layer, the
    linear map to pixels. The plain form:

        (G_rec,) = torch.autograd.grad(reconstruction_loss, decoder.to_pixels.weight, retain_graph=True)
        (G_gan,) = torch.autograd.grad(generator_loss, decoder.to_pixels.weight, retain_graph=True)

    The same numbers come without these two backwards. By the chain rule G = patchify(g std)^T hidden, with the loss's
    gradient g (B, 3, S, S) at the reconstruction, the layer's input `hidden` (B, N, D) and the pixel std (1, 3, 1, 1).
    Over several processes G is the mean of theirs, so that all have the w of all images of the micro-batch.
    """
    patch = g_rec.shape[-1] // math.isqrt(hidden.shape[1])  # S / H
    hidden = hidden.detach().float().flatten(0, 1)  # (B N, D)
    with torch.autocast(hidden.device.type, enabled=False):  # the product stays in float32
        G = torch.stack([patchify(g.float() * pixel_std, patch).flatten(0, 1).T @ hidden for g in (g_rec, g_gan)])
    if dist.is_initialized():
        dist.all_reduce(G)  # (2, p p 3, D)
        G /= dist.get_world_size()
    rec, gan = torch.linalg.vector_norm(G, dim=(1, 2))
    return (rec / (gan + 1e-6)).clamp(0, 1e4)


def decoder_losses(fake, real, lpips=None, lpips_weight=1.0, discriminator=None, gan_weight=0.75, augment=None,
                   hidden=None, pixel_std=None):
    """The decoder's losses, and the gradient of L1 + lpips_weight LPIPS + gan_weight w GAN at the reconstruction.

    fake: reconstructions (B, 3, S, S), nominally in [0, 1]; real: images (B, 3, S, S) in [0, 1]. lpips and
    discriminator take images in [-1, 1]; None leaves their term out. augment (B, 5): draws of `diffaug`.
    hidden, pixel_std: see `adaptive_weight`, which is w.
    Returns (gradient (B, 3, S, S), {"l1", "lpips", "gan", "gan_weight"} scalars without gradient).
    """
    fake = fake.detach().requires_grad_()
    losses = dict(l1=(fake - real).abs().mean())
    reconstruction = losses["l1"]
    if lpips is not None:
        losses["lpips"] = lpips(2 * fake - 1, 2 * real - 1).mean()
        reconstruction = reconstruction + lpips_weight * losses["lpips"]
    (gradient,) = torch.autograd.grad(reconstruction, fake)
    if discriminator is not None:
        losses["gan"] = -discriminator(diffaug(2 * fake - 1, augment)).mean()
        (gan_gradient,) = torch.autograd.grad(losses["gan"], fake)
        losses["gan_weight"] = adaptive_weight(gradient, gan_gradient, hidden, pixel_std)
        gradient = gradient + gan_weight * losses["gan_weight"] * gan_gradient
    return gradient, {name: loss.detach() for name, loss in losses.items()}


# --- Schedule and draws ----------------------------------------------------------------------------------------------


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a model's own step, counted from 0: linear warm-up, then a cosine from lr to lr_end."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def draw(keys, shape, tau, generator):
    """What a step draws on the device: the latents' noise and the augmentation. The loader draws the crops.

    Each image has a seed of its own in each epoch, its key (see `training_batches`). So what is drawn depends on
    neither the batch nor the processes, and a resumed run draws the same numbers without any state of a generator.
    Returns noise (B, C, H, W) of noise-augmented decoding (section 4): sigma eps, eps ~ N(0, I), sigma = |N(0, tau^2)|
    for each image; and draws of `diffaug` (3, B, 5) for the decoder's fakes, the discriminator's fakes and its reals.
    """
    noise = torch.empty(len(keys), *shape, device=generator.device)
    sigma = torch.empty(len(keys), 1, 1, 1, device=generator.device)
    augment = torch.empty(len(keys), 3, 5, device=generator.device)
    for i, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        noise[i].normal_(generator=generator)
        sigma[i].normal_(generator=generator)
        augment[i].uniform_(generator=generator)
    return tau * sigma.abs() * noise, augment.transpose(0, 1)


# --- What a run starts from ------------------------------------------------------------------------------------------


def initial_decoder(args, encoder, last):
    """The decoder before its first step: of last.pt's sizes, from --init, or new.

    Raises ValueError where --init is another model, or one for other latents.
    """
    C, grid, _ = encoder.latent_shape
    config = dict(latent_dim=C, grid=grid, patch=args.size // grid, **SIZES[args.model])
    pixels = decoder_pixels(args.encoder)
    if last or not args.init:
        return Decoder(**last["config"] if last else config | pixels)
    model, info = load_decoder(args.init, pixels, grid)
    theirs, ours = latents_of(info.get("encoder", encoder.record)), latents_of(encoder.record)
    if theirs != ours:
        raise ValueError(f"--init {args.init} is for latents of {theirs}, not of {ours}: choose --encoder and --layers")
    differ = [f"{key} {model.config[key]} instead of {value}" for key, value in config.items()
              if model.config[key] != value]
    if differ:
        raise ValueError(f"--init {args.init} is another model: {', '.join(differ)}; choose --model, --size, ...")
    return model.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# The run: flags, processes, checkpoints, the log. Both trainers have these functions, word for word, so that each is
# read in one file.


def make_parser(description, table, imagenet512, argv):
    """A parser with a flag for each row: (flag, default of the paper, of the demo, meaning, choices where limited).

    A flag's type is its default's. --preset picks the defaults; imagenet512 has those that differ at 512 px.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=("imagenet256", "imagenet512", "demo"), default="imagenet256",
                       help="the defaults: the paper's for ImageNet, or a small demo's (default: imagenet256)")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=description.partition("\n\n")[0], usage="%(prog)s [--flag VALUE ...]",
                                     parents=[first], allow_abbrev=False)
    for flag, paper, demo, meaning, *choices in table:
        default = demo if preset == "demo" else imagenet512.get(flag, paper) if preset == "imagenet512" else paper
        how = dict(type=str if default is None else type(default), choices=choices or None)
        if default is False:
            how = dict(action="store_true")
        elif isinstance(default, list):  # the values; [type] where there are none
            kind, default = (default[0], []) if isinstance(default[0], type) else (type(default[0]), default)
            how = dict(type=kind, nargs=len(default) or "+")
        shown = "" if default is None or default is False or default == [] else f" (default: {default})"
        parser.add_argument(flag, default=default, help=(meaning + shown).replace("%", "%%"), **how)
    return parser


def check_values(parser, args, above_zero):
    """Refuse empty texts and numbers out of range: negative or infinite ones, and 0 for the flags `above_zero`."""
    for name, value in vars(args).items():
        limit = {"ema": 1, "label_dropout": 1, "seed": 2**63}.get(name, math.inf)
        fits = not isinstance(value, (int, float)) or 0 <= value < limit or name.startswith("decay") and value > 0
        if value == "" or not fits or name in above_zero and value == 0:
            parser.error(f"--{name.replace('_', '-')} {value!r} is empty or out of range: give another value")


def set_up(args):
    """Join torchrun's processes and set the precision -> (rank, world size, device, autocast)."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # some clusters set the latter alone
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = args.precision != "float32"
    if world_size > 1:
        # NCCL's own limit of ten minutes would end a run in which rank 0 takes longer, over a checkpoint say.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=device if device.type == "cuda" else None)
    return rank, world_size, device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def say(words):
    """Print on rank 0, without breaking the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(words)
        sys.stdout.flush()


def compile_blocks(*models):
    """Compile block by block: that is quick, and in training gradients leave for the other ranks early."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at the bounds of DDP's buckets
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)  # a graph for each shape is faster than one for all


def load_last(out, result, settings):
    """last.pt of the folder `out`, or None for a new run. settings: what shapes the result and must be as it was.

    Raises ValueError where last.pt is damaged or of other settings, and where `result` exists without it.
    """
    path, last = out / "last.pt", None
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    if path.exists():
        try:
            # Mapped, 8 processes need not hold 17 GB each. Windows cannot replace a mapped file.
            last = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
            before = last["settings"]
        except Exception as error:  # what a damaged file raises differs between versions of torch
            raise ValueError(f"{path} is damaged or of another version ({type(error).__name__}): put back a copy, or "
                             f"move {out} away") from None
        differ = [f"{name} {str(before.get(name))[:60]}, now {str(settings.get(name))[:60]}"
                  for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
        if differ:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(differ)}): choose another --out, and "
                             f"--init {out / result} to go on from its weights")
    elif (out / result).exists() and not (out / "last.pt.tmp").exists():  # a killed first save leaves the latter
        raise ValueError(f"{out} holds a {result} but no last.pt to resume from: choose another --out")
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, last and last["step"])
        if len(set(steps)) > 1:
            raise ValueError(f"the processes see different files at {path}: put --out on a disk that all nodes share")
    return last


def save_checkpoint(files):
    """Write {path: content} beside their places, then move them there in order: what is at a path is always whole."""
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
    """Means over steps and ranks, as lines for the terminal and for log.csv, which rank 0 writes.

    add() sums on the device and leaves out what is not finite. A resumed run cuts log.csv to the bytes that it had at
    the checkpoint, so that no step stands in it twice. Images per second and the time left count previews and saves.
    """

    def __init__(self, out, columns, log_bytes, start, rank):
        self.columns, self.sums, self.step, self.time = columns, {}, start, time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        self.file = open(out / "log.csv" if rank == 0 else os.devnull, "ab")
        if rank == 0:
            self.file.seek(self.file.truncate(min(log_bytes, self.file.tell())))
        if not self.file.tell():
            self.file.write((",".join(columns) + "\n").encode())

    def add(self, images=1, **values):
        """values: means over `images` images, or tensors of one value for each image."""
        for name, value in values.items():
            value = value.detach().float().flatten()
            finite = value.isfinite()
            sums = torch.stack([value.where(finite, 0).sum(), finite.sum()]) * images
            self.sums[name] = self.sums.get(name, 0) + sums

    def line(self, step, total, epoch, batch, **numbers):
        sums = torch.stack(list(self.sums.values()))  # (names, 2)
        if dist.is_initialized():
            dist.all_reduce(sums)
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        numbers |= {name: value / n for name, (value, n) in zip(self.sums, sums.tolist(), strict=True) if n}
        numbers |= dict(images_per_s=batch / seconds, memory_gb=torch.cuda.max_memory_allocated() / 2**30)
        row = dict(step=step, epoch=f"{epoch:.4f}") | {name: f"{value:.6g}" for name, value in numbers.items()}
        self.file.write((",".join(str(row.get(name, "")) for name in self.columns) + "\n").encode())
        self.file.flush()
        self.sums, self.step, self.time = {}, step, time.perf_counter()
        row["left"] = datetime.timedelta(seconds=int((total - step) * seconds))
        return " ".join(f"{name} {value}" for name, value in row.items())


# --- Training --------------------------------------------------------------------------------------------------------


def train(args):
    rank, world_size, device, autocast = set_up(args)
    source = image_source(args.data, args.size)
    # The batch: a share for each process, in micro-batches whose gradients add up.
    local_batch, rest = divmod(args.batch, world_size)
    if rest or not local_batch:
        raise ValueError(f"--batch {args.batch} does not divide over {world_size} processes")
    accumulate = math.ceil(local_batch / args.micro_batch)
    micro_batch = math.ceil(local_batch / accumulate)  # the last one may be smaller
    steps_per_epoch = len(source) / args.batch
    total = max(1, round(args.epochs * steps_per_epoch))
    disc_start, gan_start = (round(epoch * steps_per_epoch) for epoch in (args.disc_start, args.gan_start))

    # Where an earlier run stopped.
    settings = {flag: vars(args)[flag.strip("-").replace("-", "_")] for flag, *_ in RECIPE if flag not in MAY_DIFFER}
    settings |= dict(kind="train_decoder", images=len(source), classes=source.classes)
    last = load_last(args.out, "decoder.pt", settings)
    start = last["step"] if last else 0
    if start >= total:
        return say(f"finished: {args.out}/decoder.pt has its {start} steps; a larger --epochs goes on, by its cosine")

    # The frozen encoder and the decoder.
    say(f"{source.summary()}\nloading {args.encoder}{', LPIPS' * bool(args.lpips)}{', DINO' * bool(args.gan)}")
    encoder = Encoder(args.encoder, args.encoder_size, args.encoder_weights, args.layers).to(device)
    if args.size % encoder.grid:
        raise ValueError(f"--size {args.size} is no multiple of the encoder's grid of {encoder.grid}")
    torch.manual_seed(args.seed)
    model = initial_decoder(args, encoder, last).to(device).train()
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    adamw = dict(lr=args.lr, betas=tuple(args.betas), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)

    # The perceptual loss and the discriminator: frozen networks, but for the discriminator's heads.
    lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(device) if args.lpips else None
    torch.manual_seed(args.seed)  # the heads start the same with and without LPIPS
    discriminator = Discriminator(args.dino_weights).to(device) if args.gan else None
    disc_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), **adamw) if args.gan else None
    if last:
        model.load_state_dict(last["model"])
        ema.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        if discriminator:
            discriminator.heads.load_state_dict(last["discriminator"])
            disc_optimizer.load_state_dict(last["disc_optimizer"])
    columns = ["step", "epoch", "l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm", "disc_norm",
               "lr", "disc_lr", "images_per_s", "memory_gb"]
    log = Log(args.out, columns, last["log_bytes"] if last else 0, start, rank)
    last = None  # last.pt is memory-mapped: release it
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":  # before DDP; the average stays eager
        compile_blocks(encoder.vit, model, *([discriminator.vit] if discriminator else []))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    ddp.broadcast_buffers = False  # they are equal on all ranks; as an argument it is deprecated
    ddp_disc = discriminator
    if discriminator and world_size > 1:
        ddp_disc = DistributedDataParallel(discriminator, gradient_as_bucket_view=True)
        ddp_disc.broadcast_buffers = False

    def checkpoint(done):
        result = dict(kind="decoder", config=model.config, model=ema.state_dict(), encoder=encoder.record,
                      tau=args.tau, epoch=done / steps_per_epoch)
        last = dict(settings=settings, step=done, config=model.config, model=model.state_dict(), ema=ema.state_dict(),
                    optimizer=optimizer.state_dict(), log_bytes=log.file.tell())
        if discriminator:
            last |= dict(discriminator=discriminator.heads.state_dict(), disc_optimizer=disc_optimizer.state_dict())
        save_checkpoint({args.out / "decoder.pt": result, args.out / "last.pt": last})

    images = Images(source, functools.partial(random_crop, resize=args.resize, size=args.size))

    def preview(done):
        chosen = np.random.default_rng(args.seed).permutation(len(source))[:8].tolist()  # always the same eight
        shown = torch.stack([images[index, random_key(args.seed, index)][0] for index in chosen])  # (8, 3, S, S) uint8
        with torch.no_grad(), autocast:
            decoded = to_uint8(ema(encoder(shown.to(device).float() / 255))).cpu()  # (8, S, S, 3)
        rows = torch.cat([shown.permute(0, 2, 3, 1), decoded])
        image_grid(rows, len(shown)).save(args.out / f"preview-{done}.png")

    say(f"{args.model}, patch {model.patch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"batch {args.batch} = {world_size} processes x {accumulate} x {micro_batch}; {total} steps, "
        f"{steps_per_epoch:.4g} an epoch; from step {start}" + "; --init is not read again" * bool(args.init and start))
    if discriminator:
        say(f"discriminator from step {disc_start}, its loss from step {gan_start}" + (
            ": few images; a discriminator overfits on them, --gan 0 is safer" if gan_start < 1000 else ""))
    parts = training_batches(len(source), args.batch, micro_batch, range(start, total), args.seed, rank, world_size)
    batches = iter(make_loader(images, parts, args.workers, device))
    generator = torch.Generator(device)
    signals = []

    def stop_after_step(number, frame):  # it may come at any time, so it touches no tensor
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n" if rank == 0 else b"")

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # nohup ignores SIGHUP
    handlers = {n: signal.signal(n, stop_after_step) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for step in tqdm(range(start, total), "training", total, initial=start, disable=rank > 0, dynamic_ncols=True):
        train_disc = discriminator is not None and step >= disc_start
        use_gan = discriminator is not None and step >= gan_start
        disc_inputs = []  # images, latents and draws for the discriminator's step, so that nothing is encoded twice
        rates = dict(lr=lr_at(step, args, steps_per_epoch))

        # The decoder learns from L1, LPIPS and the discriminator, which is in eval mode: its spectral norms stay.
        optimizer.param_groups[0]["lr"] = rates["lr"]
        if discriminator:
            discriminator.eval()
        for micro in range(accumulate):
            ddp.require_backward_grad_sync = micro == accumulate - 1  # ranks exchange gradients in the last
            pixels, _, keys = next(batches)  # (B, 3, S, S) uint8, ..., (B,)
            real = pixels.to(device, non_blocking=True).float() / 255  # (B, 3, S, S) in [0, 1]
            noise, augment = draw(keys, encoder.latent_shape, args.tau, generator)  # (B, C, H, W), (3, B, 5)
            with autocast:
                z = encoder(real)  # (B, C, H, W)
                fake, hidden = ddp(z + noise, return_hidden=True)  # (B, 3, S, S), (B, N, D)
                gradient, losses = decoder_losses(
                    fake, real, lpips, args.lpips, discriminator if use_gan else None, args.gan, augment[0], hidden,
                    model.std)
            # The gradient of the total loss at the image goes on through the decoder.
            fake.backward(gradient * len(real) / local_batch)
            log.add(len(real), **losses)
            if train_disc:
                disc_inputs.append((real, z, augment[1], augment[2]))
        norm = get_total_norm([p.grad for p in model.parameters()])  # nothing is clipped
        log.add(grad_norm=norm)
        stop = torch.full_like(norm, len(signals))
        if world_size > 1:
            dist.all_reduce(stop)
        norm, stop = torch.stack([norm, stop]).tolist()  # the host waits for the device
        if math.isfinite(norm):
            optimizer.step()
            decay = min(args.ema, step / (step + 9))  # short at first: the initial weights are forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        else:
            say(f"step {step}: the gradient is not finite; weights, moments and average stay as they are")
        optimizer.zero_grad(set_to_none=world_size == 1)  # DDP's are views of its buckets: zero in place

        # The discriminator learns from fresh reconstructions of the updated decoder: without noise, in 8 bits.
        if train_disc:
            # The decoder's schedule, counted from disc_start: at the end of training it is still above lr_end.
            rates["disc_lr"] = disc_optimizer.param_groups[0]["lr"] = lr_at(step - disc_start, args, steps_per_epoch)
            discriminator.train()
            for micro, (real, z, augment_fake, augment_real) in enumerate(disc_inputs):
                ddp_disc.require_backward_grad_sync = micro == accumulate - 1
                with autocast:
                    with torch.no_grad():
                        fake = quantize(2 * model(z) - 1)  # (B, 3, S, S) in [-1, 1]
                    both = torch.cat([diffaug(2 * real - 1, augment_real), diffaug(fake, augment_fake)])
                    real_logits, fake_logits = ddp_disc(both).chunk(2)  # (B, 5 N) each
                disc = hinge_loss(real_logits, fake_logits)
                (disc * len(real) / local_batch).backward()
                log.add(len(real), disc=disc, real=real_logits.mean(), fake=fake_logits.mean())
            disc_norm = get_total_norm([p.grad for p in discriminator.heads.parameters()])
            log.add(disc_norm=disc_norm)
            if disc_norm.isfinite():
                disc_optimizer.step()
            else:
                say(f"step {step}: the discriminator's gradient is not finite; it stays as it is")
            disc_optimizer.zero_grad(set_to_none=world_size == 1)

        done = step + 1
        end = done == total or stop > 0
        if done % args.log_every == 0 or end:
            say(log.line(done, total, done / steps_per_epoch, args.batch, **rates))
        if rank == 0 and args.preview_every and (done % args.preview_every == 0 or done == total):
            preview(done)
        if rank == 0 and (done % args.save_every == 0 or end):
            checkpoint(done)  # after the preview: a run that goes on from here would not draw it
        if end:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if done < total:
        say(f"stopped and saved at step {done}; the same command resumes")
    if unreadable := int(images.unreadable.sum()):
        print(f"rank {rank}: {unreadable} images could not be read, see above; others took their place", flush=True)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        train(args)
    except ValueError as error:  # bad input; a loader's process puts its traceback before the message
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
