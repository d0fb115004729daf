"""Stage 1: train the decoder, which maps the latents of a frozen encoder back to pixels.

    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/                      # ViT-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/ --preset imagenet512
    python train_decoder.py --data photos/ --init decoder.pt --gan 0 --lr 2e-5 --batch 32 --out runs/photos/decoder
    python train_decoder.py --preset demo                                                # no data, no GPU, minutes

Running the same command again resumes. Paper: arXiv 2510.11690, section 3 and its appendix. Files written to --out:
    decoder.pt      EMA weights and configuration, for sample.py and train_dit.py
    last.pt         full training state, for an exact resume
    log.csv         one row per logged interval
    preview-*.png   images above their reconstructions by the EMA weights
To evaluate: sample.py --reconstruct imagenet/val --out recon.npz, then fid.py imagenet/val recon.npz --paired.

In the source the method ends with train(); below it are the initial weights, the machinery of a run, the command line.
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
from encoder import (ENCODERS, Encoder, Images, check_latents, decoder_pixels, default_workers, image_source,
                     make_loader, pretrained, random_crop, random_key, training_batches)
from fid import LPIPS

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
SWITCH = dict(action="store_true")
RECIPE = {
    # flag          paper        demo           meaning, and where our default differs from the paper's
    "size":         (256,        32,            "image side in pixels, as decoded"),
    "resize":       (0,          0,             "shorter side before the crop; 0: 1.5 x --size, for shapes 1 x"),
    "encoder":      ("dinov2-b", "random-tiny", f"{', '.join(ENCODERS)}, or the name of a timm ViT"),
    "encoder_size": (0,          0,             "image side for the encoder; 0: --size; 256 at 512: upsampling"),
    "layers":       ([],         [],            "blocks to average (default: the last)", dict(type=int, nargs="+")),
    "model":        ("ViT-XL",   "ViT-tiny",    "size of the decoder", dict(choices=SIZES)),
    "tau":          (0.8,        0.05,          "strength of the noise on latents: sigma = |N(0, tau^2)| per image"),
    "lpips":        (1.0,        0.0,           "weight of the perceptual loss; 0: off"),
    "gan":          (0.75,       0.0,           "factor on the adaptive weight of the GAN loss; 0: off"),
    "disc_start":   (6.0,        1.0,           "epoch at which the discriminator starts to train"),
    "gan_start":    (8.0,        1.5,           "epoch at which the GAN loss starts to train the decoder"),
    "epochs":       (16.0,       4.0,           "length of training and of the cosine schedules"),
    "batch":        (512,        16,            "images per step, over all processes"),
    "lr":           (2e-4,       4e-3,          "learning rate of both AdamWs, without weight decay"),
    "lr_end":       (2e-5,       3e-5,          "learning rate at the end of the cosine"),
    "warmup":       (1.0,        0.2,           "epochs of linear warm-up, for each model from its start"),
    "betas":        ([0.9, 0.95], [0.9, 0.95],  "of both AdamWs; paper: 0.5 0.9", dict(type=float, nargs=2)),
    "ema":          (0.9978,     0.99,          "EMA decay of the weights"),
    "seed":         (0,          0,             "seed of the weights and of all random numbers"),
}
RUN = {  # a resumed run may change these, if the number of images and the classes stay the same
    "data":            (None,  "shapes", "folder of images; or `shapes`, drawn on the fly"),
    "encoder_weights": (None,  None,     "local file, instead of the download"),
    "init":            (None,  None,     "weights to start from, ours or published; ignored on resume"),
    "out":             (None,  None,     "folder for the files above (default: runs/<preset>/decoder)"),
    "micro_batch":     (16,    16,       "largest batch of one forward pass; 16 is for ViT-XL on 80 GB"),
    "checkpointing":   (False, False,    "activation checkpointing: less memory, slower", SWITCH),
    "precision":       ("tf32", "tf32",  "of matrix products", dict(choices=("tf32", "float32", "bf16"))),
    "compile":         ("auto", "auto",  "torch.compile; auto: on CUDA", dict(choices=("auto", "on", "off"))),
    "device":          (DEVICES[0], DEVICES[0], "device of this process", dict(choices=DEVICES)),
    "workers":         (default_workers(), 0, "loader processes for each GPU; the default depends on the cores"),
    "log_every":       (100,   100,      "steps between rows of log.csv"),
    "preview_every":   (2500,  500,      "steps between previews; 0: none"),
    "save_every":      (1000,  500,      "steps between checkpoints"),
    "vgg_weights":     (None,  None,     "VGG16 of LPIPS: local file, instead of the download"),
    "lpips_weights":   (None,  None,     "heads of LPIPS: local file, instead of the download"),
    "dino_weights":    (None,  None,     "DINO ViT-S/8 of the discriminator: local file, instead of the download"),
}
IMAGENET512 = dict(size=512, micro_batch=4)
MAY_DIFFER = ("epochs", "lr", "lr_end")  # of RECIPE, on resume

# --- Discriminator: five light heads on a frozen DINO ViT, as in StyleGAN-T (arXiv 2301.09515), section 3.2 ----------

# DINO ViT-S/8 (arXiv 2104.14294), with the tanh form of GELU as in the released code.
DINO = dict(model="vit_small_patch8_224.dino", act_layer="gelu_tanh")


class DiscriminatorHead(nn.Module):
    """Features (B, D, N) of one ViT block -> one logit per token (B, N)."""

    def __init__(self, D):
        super().__init__()

        def conv(out, kernel):
            return spectral_norm(nn.Conv1d(D, out, kernel, padding=kernel // 2, padding_mode="circular"))

        def block(kernel):  # StyleGAN-T's batch norm over groups of one image is an instance norm
            return nn.Sequential(conv(D, kernel), nn.InstanceNorm1d(D, eps=1e-6, affine=True), nn.LeakyReLU(0.2))

        self.embed, self.mix, self.logit = block(1), block(9), conv(1, 1)

    def forward(self, x):  # (B, D, N)
        x = self.embed(x)
        x = (self.mix(x) + x) / math.sqrt(2)
        return self.logit(x).squeeze(1)  # (B, N)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, 5 N), N = 784 patches: high for real images, low for generated ones.

    The first head reads the last block's output, the others those of blocks 2, 5, 8 and 11, counted from 0. Only
    `heads` is trained; gradients flow through the frozen ViT to the images.
    weights: a local file with timm's or DINO's key names (default: downloaded).
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
        with torch.autocast(x.device.type, enabled=False):  # heads and loss are not in bf16
            logits = [head(output.float().mT) for head, output in zip(self.heads, outputs, strict=True)]  # (B, N) each
        return torch.cat(logits, 1)  # (B, 5 N)


def diffaug(images, uniform):
    """Differentiable augmentation (arXiv 2006.10738) of images (B, 3, H, W) in [-1, 1], not clamped.

    uniform (B, 5): random numbers in [0, 1), one column for each transform, in this order:
      0, 1  translation right and down by whole pixels, up to an eighth of the side either way, filled with zeros
      2     brightness: + U(-0.5, 0.5)
      3     saturation: * U(0, 2) about each pixel's mean over the channels
      4     contrast:   * U(0.5, 1.5) about the image's mean
    """
    B, C, H, W = images.shape
    right, down, brightness, saturation, contrast = uniform.unbind(1)  # (B,) each

    def source(u, side):  # (B, side): the column (or row) that each one comes from; outside of [0, side): empty
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
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


# --- Losses ----------------------------------------------------------------------------------------------------------


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss. The generator's is -mean(D(fake)), without a hinge."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def quantize(images):
    """Clamp images to [-1, 1] and round them to 8 bits, as real images are. No gradient."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def adaptive_weight(g_rec, g_gan, hidden, pixel_std):
    """Weight w of the GAN loss (VQGAN, arXiv 2012.09841, equation 7), a scalar tensor in [0, 1e4] without gradient.

    w = ||G_rec|| / (||G_gan|| + 1e-6), where G is the gradient of a loss at the weight of the decoder's last layer, the
    linear map to pixels. In the plain form:

        (G_rec,) = torch.autograd.grad(reconstruction_loss, decoder.to_pixels.weight, retain_graph=True)
        (G_gan,) = torch.autograd.grad(generator_loss, decoder.to_pixels.weight, retain_graph=True)

    This function computes the same without two more backward passes. By the chain rule G = patchify(g * std)^T hidden,
    where g (B, 3, S, S) is the loss's gradient at the reconstruction, hidden (B, N, D) the input of the last layer, and
    std (1, 3, 1, 1) the scale of its output. Over several processes G is averaged, so all have the same w.
    """
    patch = g_rec.shape[-1] // math.isqrt(hidden.shape[1])  # S / H
    hidden = hidden.detach().float().flatten(0, 1)  # (B N, D)
    with torch.autocast(hidden.device.type, enabled=False):  # the products are not in bf16
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
    discriminator take images in [-1, 1]; None disables the term. augment (B, 5): random numbers for `diffaug`.
    hidden, pixel_std: for `adaptive_weight`, which is w.
    Returns (gradient (B, 3, S, S), {"l1", "lpips", "gan", "gan_weight"} scalars without gradient).
    """
    fake = fake.detach().requires_grad_()

    def gradient_of(loss):
        with torch.autocast(fake.device.type, enabled=False):  # backward runs outside autocast, as in the released code
            return torch.autograd.grad(loss, fake)[0]

    losses = dict(l1=(fake - real).abs().mean())
    reconstruction = losses["l1"]
    if lpips is not None:
        losses["lpips"] = lpips(2 * fake - 1, 2 * real - 1).mean()
        reconstruction = reconstruction + lpips_weight * losses["lpips"]
    gradient = gradient_of(reconstruction)
    if discriminator is not None:
        losses["gan"] = -discriminator(diffaug(2 * fake - 1, augment)).mean()
        gan_gradient = gradient_of(losses["gan"])
        losses["gan_weight"] = adaptive_weight(gradient, gan_gradient, hidden, pixel_std)
        gradient = gradient + gan_weight * losses["gan_weight"] * gan_gradient
    return gradient, {name: loss.detach() for name, loss in losses.items()}


# --- Schedule and random numbers -------------------------------------------------------------------------------------


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a model's own step, counted from 0: linear warm-up, then a cosine from lr to lr_end."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def step_randomness(keys, shape, tau, generator):
    """All random numbers of a step that are made on the device; the loader makes those of the crops.

    keys (B,): a seed for each image in each epoch (see `training_batches`). So the numbers depend neither on the batch
    nor on the number of processes, and a resumed run repeats them without saving a generator's state.
    Returns noise (B, C, H, W) for noise-augmented decoding (section 4), sigma * eps with eps ~ N(0, I) and, for each
    image, sigma = |N(0, tau^2)|; and uniform numbers (3, B, 5) for `diffaug` of the decoder's fakes, the
    discriminator's fakes and its real images.
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


# --- Training --------------------------------------------------------------------------------------------------------


def train(args):
    """Train, or resume, until the last step or a signal. Returns the number of the signal, 0 at the last step."""
    rank, world_size, device, autocast = set_up(args)
    source = image_source(args.data, args.size)

    # The batch: an equal part for each process, in micro-batches whose gradients are accumulated.
    local_batch, remainder = divmod(args.batch, world_size)
    if remainder or not local_batch:
        raise ValueError(f"--batch {args.batch} is not divisible by {world_size} processes")
    accumulate = math.ceil(local_batch / args.micro_batch)
    micro_batch = math.ceil(local_batch / accumulate)  # the last one may be smaller
    steps_per_epoch = len(source) / args.batch
    total = max(1, round(args.epochs * steps_per_epoch))
    disc_start, gan_start = (round(epoch * steps_per_epoch) for epoch in (args.disc_start, args.gan_start))

    # An earlier run in this folder: resume it.
    settings = {name: value for name, value in vars(args).items() if name in RECIPE and name not in MAY_DIFFER}
    settings |= dict(kind="train_decoder", images=len(source), classes=source.classes)
    saved = load_last(args.out, "decoder.pt", settings)
    start = saved["step"] if saved else 0
    if start >= total:
        say(f"finished: {args.out}/decoder.pt has all {start} steps; raise --epochs to train longer")
        return 0

    # The frozen encoder, and the decoder with its EMA.
    say(f"{source.summary()}\nloading the encoder {args.encoder}")
    encoder = Encoder(args.encoder, args.encoder_size, args.encoder_weights, args.layers).to(device)
    if args.size % encoder.grid:
        raise ValueError(f"--size {args.size} is not a multiple of the encoder's grid, {encoder.grid}")
    torch.manual_seed(args.seed)
    model = initial_decoder(args, encoder, saved).to(device).train()
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    adamw = dict(lr=args.lr, betas=tuple(args.betas), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)

    # The perceptual loss and the discriminator, of which only the heads are trained.
    lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(device) if args.lpips else None
    torch.manual_seed(args.seed)  # the heads start the same with and without LPIPS
    discriminator = Discriminator(args.dino_weights).to(device) if args.gan else None
    disc_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), **adamw) if args.gan else None
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        if discriminator:
            discriminator.heads.load_state_dict(saved["discriminator"])
            disc_optimizer.load_state_dict(saved["disc_optimizer"])
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":  # before DDP; the EMA is not compiled
        compile_blocks(encoder.vit, model, *([discriminator.vit] if discriminator else []))
    ddp = wrap_ddp(model, world_size)
    ddp_disc = wrap_ddp(discriminator, world_size) if discriminator else None
    images = Images(source, functools.partial(random_crop, resize=args.resize, size=args.size))
    columns = ["step", "epoch", "l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm", "disc_norm",
               "lr", "disc_lr", "images_per_s", "memory_gb"]
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.csv", columns, saved["log_bytes"] if saved else 0, start, rank)
    saved = None  # last.pt is memory-mapped: release it

    def save(step):
        result = dict(kind="decoder", config=model.config, model=ema.state_dict(), encoder=encoder.record,
                      tau=args.tau, epoch=step / steps_per_epoch)
        last = dict(settings=settings, step=step, config=model.config, model=model.state_dict(), ema=ema.state_dict(),
                    optimizer=optimizer.state_dict(), log_bytes=log.file.tell())
        if discriminator:
            last |= dict(discriminator=discriminator.heads.state_dict(), disc_optimizer=disc_optimizer.state_dict())
        save_checkpoint({args.out / "decoder.pt": result, args.out / "last.pt": last})

    def preview(step):
        chosen = np.random.default_rng(args.seed).permutation(len(source))[:8].tolist()  # always the same eight
        originals = torch.stack([images[index, random_key(args.seed, index)][0] for index in chosen])  # (8, 3, S, S)
        with torch.no_grad(), autocast:
            decoded = to_uint8(ema(encoder(originals.to(device).float() / 255))).cpu()  # (8, S, S, 3)
        pictures = torch.cat([originals.permute(0, 2, 3, 1), decoded])
        image_grid(pictures, len(originals)).save(args.out / f"preview-{step}.png")

    say(f"{args.model}, patch {model.patch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"batch {args.batch} = {world_size} processes x {accumulate} x {micro_batch}; {total} steps, "
        f"{steps_per_epoch:.4g} per epoch; from step {start}")
    if discriminator:
        say(f"discriminator from step {disc_start}, its loss from step {gan_start}" + (
            ": few images; a discriminator overfits on them, --gan 0 is safer" if gan_start < 1000 else ""))
    parts = training_batches(len(source), args.batch, micro_batch, range(start, total), args.seed, rank, world_size)
    batches = iter(make_loader(images, parts, args.workers, device))
    generator = torch.Generator(device)
    signals = catch_signals(rank)
    for step in tqdm(range(start, total), "training", total, initial=start, disable=rank > 0, dynamic_ncols=True):
        train_disc = discriminator is not None and step >= disc_start
        use_gan = discriminator is not None and step >= gan_start
        disc_inputs = []  # for the discriminator's step, so that nothing is encoded twice
        rates = dict(lr=lr_at(step, args, steps_per_epoch))

        # The decoder's step: L1, LPIPS and the discriminator, in eval mode, which keeps its spectral norms fixed.
        optimizer.param_groups[0]["lr"] = rates["lr"]
        if discriminator:
            discriminator.eval()
        for micro in range(accumulate):
            ddp.require_backward_grad_sync = micro == accumulate - 1  # all-reduce gradients in the last backward only
            pixels, _, keys = next(batches)  # (B, 3, S, S) uint8, ..., (B,)
            real = pixels.to(device, non_blocking=True).float() / 255  # (B, 3, S, S) in [0, 1]
            noise, augment = step_randomness(keys, encoder.latent_shape, args.tau, generator)  # (B, C, H, W), (3, B, 5)
            with autocast:
                z = encoder(real)  # (B, C, H, W)
                fake, hidden = ddp(z + noise, return_hidden=True)  # (B, 3, S, S), (B, N, D)
                gradient, losses = decoder_losses(
                    fake, real, lpips, args.lpips, discriminator if use_gan else None, args.gan, augment[0], hidden,
                    model.std)
            fake.backward(gradient * len(real) / local_batch)  # from the gradient at the images to the weights
            log.add(len(real), **losses)
            if train_disc:
                disc_inputs.append((real, z, augment[1], augment[2]))
        norm = get_total_norm([p.grad for p in model.parameters()])  # no clipping
        log.add(grad_norm=norm)
        number = torch.full_like(norm, max(signals, default=0))
        if world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)  # a signal to one process stops all
        norm, number = torch.stack([norm, number]).tolist()  # the host waits for the device
        if math.isfinite(norm):
            optimizer.step()
            update_ema(ema, model, decay=min(args.ema, step / (step + 9)))  # shorter at first, to forget the start
        else:
            say(f"step {step}: skipped, its gradient is not finite")
        optimizer.zero_grad(set_to_none=world_size == 1)  # DDP's gradients are views of its buckets: zero in place

        # The discriminator's step: its fakes are decoded again by the updated decoder, without noise, in 8 bits.
        if train_disc:
            # The decoder's schedule, counted from disc_start: when training ends it is still above lr_end.
            rates["disc_lr"] = disc_optimizer.param_groups[0]["lr"] = lr_at(step - disc_start, args, steps_per_epoch)
            discriminator.train()
            for micro, (real, z, augment_fake, augment_real) in enumerate(disc_inputs):
                ddp_disc.require_backward_grad_sync = micro == accumulate - 1
                with autocast:
                    with torch.no_grad():
                        fake = quantize(2 * model(z) - 1)  # (B, 3, S, S) in [-1, 1]
                    pair = torch.cat([diffaug(2 * real - 1, augment_real), diffaug(fake, augment_fake)])
                    real_logits, fake_logits = ddp_disc(pair).chunk(2)  # (B, 5 N) each
                disc = hinge_loss(real_logits, fake_logits)
                (disc * len(real) / local_batch).backward()
                log.add(len(real), disc=disc, real=real_logits.mean(), fake=fake_logits.mean())
            disc_norm = get_total_norm([p.grad for p in discriminator.heads.parameters()])
            log.add(disc_norm=disc_norm)
            if disc_norm.isfinite():
                disc_optimizer.step()
            else:
                say(f"step {step}: the discriminator's step is skipped, its gradient is not finite")
            disc_optimizer.zero_grad(set_to_none=world_size == 1)

        done = step + 1
        end = done == total or number > 0
        if due(done, args.log_every) or end:
            log.write(done, total, done / steps_per_epoch, args.batch, **rates)
        if rank == 0 and args.preview_every and (due(done, args.preview_every) or done == total):
            preview(done)
        if rank == 0 and (due(done, args.save_every) or end):
            save(done)  # after the preview, which a resumed run would not repeat
        if end:
            break
    if done < total:
        say(f"stopped and saved at step {done}; running the same command again resumes")
    if unreadable := int(images.unreadable.sum()):
        print(f"rank {rank}: {unreadable} images could not be read, see above; others replaced them", flush=True)
    return int(number) if done < total else 0


# --- Initial weights -------------------------------------------------------------------------------------------------


def initial_decoder(args, encoder, saved):
    """The decoder before its first step: as in last.pt, from --init, or new.

    Raises ValueError if --init is another model, or is for other latents.
    """
    C, grid, _ = encoder.latent_shape
    config = dict(latent_dim=C, grid=grid, patch=args.size // grid, **SIZES[args.model])
    pixels = decoder_pixels(args.encoder)
    if saved or not args.init:
        return Decoder(**saved["config"] if saved else config | pixels)
    model, info = load_decoder(args.init, pixels, grid)
    check_latents(f"--init {args.init}", info, model, encoder.record, encoder.latent_shape)
    differ = [f"{key} {model.config[key]} instead of {value}" for key, value in config.items()
              if model.config[key] != value]
    if differ:
        raise ValueError(f"--init {args.init} is another model: {', '.join(differ)}; choose --model and --size")
    return model.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# The run: parser, processes, compilation, signals, resuming, saving, the log. The same in both trainers, word for word.

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP


def parse_flags(argv, description, table, imagenet512, overrides=lambda args: {}):
    """Parse argv by a table {flag: (the paper's default, the demo's, help, options of add_argument)} -> (parser, args).

    --preset selects the defaults; imagenet512 has those that differ at 512 px, overrides(args) those that depend on
    other flags. Without options, a flag has the type of its default. Values that would pass silently are refused: empty
    text, NaN, negative numbers, 0 for a count, a probability of 1.
    """
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    presets.add_argument("--preset", choices=("imagenet256", "imagenet512", "demo"), default="imagenet256",
                         help="the defaults: the paper's for ImageNet, or a small demo's (default: imagenet256)")
    preset = presets.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [--flag VALUE ...]", parents=[presets],
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (paper, demo, text, *options) in table.items():
        default = demo if preset == "demo" else imagenet512.get(name, paper) if preset == "imagenet512" else paper
        options = options[0] if options else dict(type=str if paper is None else type(paper))
        shown = "" if default is None or default is False or default == [] else " (default: %(default)s)"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text + shown, **options)
    parser.set_defaults(**overrides(parser.parse_args(argv)))
    args = parser.parse_args(argv)
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else [values]:
            count = name in ("epochs", "batch", "micro_batch", "steps") and not 0 < value < math.inf
            share = name in ("ema", "label_dropout") and value >= 1
            if value == "" or count or share or isinstance(value, (int, float)) and not value >= 0:
                parser.error(f"--{name.replace('_', '-')} {value!r} is empty or out of range: give another value")
    return parser, args


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
    if world_size > 1:  # NCCL's default limit of ten minutes is too short if rank 0 saves for longer
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=device if device.type == "cuda" else None)
    return rank, world_size, device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def say(text):
    """Print on rank 0, without breaking the progress bar. Characters that the terminal does not know are replaced."""
    if os.environ.get("RANK", "0") == "0":
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def compile_blocks(*models):
    """Compile block by block: it compiles quickly, and DDP can all-reduce gradients while backward runs."""
    torch._dynamo.config.optimize_ddp = False  # it would split blocks at the boundaries of DDP's buckets
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)  # a graph for each shape is faster than one for all


def wrap_ddp(model, world_size):
    """The model in DistributedDataParallel, without broadcasting buffers; in one process the model itself."""
    if world_size == 1:
        return model
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # deprecated as an argument
    return ddp


def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, for each weight."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def due(step, every):
    """Whether a job that runs every `every` steps (0: never) runs after this step."""
    return every > 0 and step % every == 0


def catch_signals(rank):
    """The list of signals received from now on. They stop the run after its step, a second Ctrl-C stops it at once."""
    received = []

    def handler(number, frame):  # it may run at any time, so it touches no tensor
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n" if rank == 0 else b"")

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)
    return received


def load_last(out, result, settings):
    """last.pt in the folder `out`, or None for a new run.

    Raises ValueError for other settings, a `result` without last.pt, and processes that see different files.
    """
    path, saved = out / "last.pt", None
    if path.exists():  # mapped, 8 processes do not need 17 GB each; Windows cannot replace a mapped file
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        before = {name: row[0] for name, row in RECIPE.items()} | saved["settings"]  # an older last.pt may lack some
        differ = [f"{name} {str(before.get(name))[:60]}, now {str(settings.get(name))[:60]}"
                  for name in saved["settings"] | settings if before.get(name) != settings.get(name)]
        if differ:
            raise ValueError(f"{out} contains a run with other settings ({'; '.join(differ)}): choose another --out, "
                             f"and --init {out / result} to start from its weights")
    elif (out / result).exists() and not (out / "last.pt.tmp").exists():  # the latter: the first save was killed
        raise ValueError(f"{out} contains a {result} but no last.pt to resume from: choose another --out")
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, saved and saved["step"])
        if len(set(steps)) > 1:
            raise ValueError(f"the processes see different files at {path}: put --out on a disk that all nodes share")
    return saved


def save_checkpoint(files):
    """Write {path: content} to temporary files, then rename them in this order: no file is ever half written."""
    for path, content in files.items():
        # A last.pt of 17 GB takes some 40 s with checksums and 10 s without; torch.load does not verify them.
        torch.serialization.set_crc32_options(path.name != "last.pt")
        with open(f"{path}.tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    torch.serialization.set_crc32_options(True)
    for path in files:
        os.replace(f"{path}.tmp", path)


class Log:
    """Means over ranks and the steps since the last row, printed and appended to log.csv.

    size: of log.csv in bytes at the checkpoint. A resumed run cuts it back to this, so that no step is logged twice.
    """

    def __init__(self, path, columns, size, step, rank):
        self.columns, self.sums, self.step, self.time = columns, {}, step, time.perf_counter()
        self.file = open(path if rank == 0 else os.devnull, "ab")
        if rank == 0:
            self.file.seek(self.file.truncate(min(size, self.file.tell())))
        if not self.file.tell():
            self.file.write((",".join(columns) + "\n").encode())

    def add(self, images=1, **values):
        """values: means over `images` images, or tensors with one value per image. Only finite ones count."""
        for name, value in values.items():
            value = value.detach().float().flatten()
            finite = value.isfinite()
            sums = torch.stack([value.where(finite, 0).sum(), finite.sum()]) * images
            self.sums[name] = self.sums.get(name, 0) + sums

    def write(self, step, total, epoch, batch, **numbers):
        sums = torch.stack(list(self.sums.values()))  # (names, 2)
        if dist.is_initialized():
            dist.all_reduce(sums)
        numbers |= {name: value / count for name, (value, count) in zip(self.sums, sums.tolist(), strict=True) if count}
        seconds = (time.perf_counter() - self.time) / (step - self.step)  # previews and checkpoints included
        numbers |= dict(images_per_s=batch / seconds, memory_gb=torch.cuda.max_memory_allocated() / 2**30)
        row = dict(step=step, epoch=f"{epoch:.4f}") | {name: f"{value:.6g}" for name, value in numbers.items()}
        self.file.write((",".join(str(row.get(name, "")) for name in self.columns) + "\n").encode())
        self.file.flush()
        left = datetime.timedelta(seconds=int((total - step) * seconds))
        say(" ".join(f"{name} {value}" for name, value in row.items()) + f" left {left}")
        self.sums, self.step, self.time = {}, step, time.perf_counter()


def parse_args(argv):
    parser, args = parse_flags(argv, __doc__, RECIPE | RUN, IMAGENET512)
    args.out = Path(args.out or Path("runs", args.preset, "decoder"))
    args.encoder_size = args.encoder_size or args.size
    args.resize = args.resize or (args.size if args.data == "shapes" else args.size * 3 // 2)
    if args.data is None:
        parser.error("--data is missing: give a folder of images, or `shapes`")
    if args.resize < args.size:
        parser.error(f"--resize {args.resize} is below --size {args.size}: give at least that")
    if args.lpips and args.size < 16:
        parser.error(f"--size {args.size} is too small for the perceptual loss: give at least 16, or --lpips 0")
    if args.gan and args.gan_start < args.disc_start:
        parser.error(f"--gan-start {args.gan_start:g} is before --disc-start {args.disc_start:g}")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        stopped_by = train(args)
    except (ValueError, OSError) as error:  # bad input ends in one line, in development mode (-X dev) in a traceback
        if sys.flags.dev_mode or isinstance(error, OSError) and error.filename is None:
            raise
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())  # a loader process sends a traceback before it
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    main()
