"""Stage 1: train the decoder, which turns the latents of a frozen encoder back into pixels.

    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/                      # ViT-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/ --preset imagenet512
    python train_decoder.py --data photos/ --init model.pt --epochs 50                   # fine-tune on your own images
    python train_decoder.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, section 3 and its appendix. It writes to --out:
    decoder.pt      EMA weights and configuration: what sample.py and train_dit.py read
    last.pt         everything that is needed to go on exactly where training stopped
    log.csv         one row for each logged interval
    preview-*.png   images above their reconstructions by the EMA weights
To evaluate: sample.py --reconstruct imagenet/val --out recon.npz, then fid.py imagenet/val recon.npz --paired.
"""

import functools
import math
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn.utils import get_total_norm
from torch.nn.utils.parametrizations import spectral_norm

from decoder import SIZES, Decoder, image_grid, load_decoder, patchify, to_uint8
from encoder import (ENCODER_HELP, GIVE_UP_AFTER, RUN_FLAGS, Encoder, Images, Log, Plan, agree, amount, check_init,
                     compile_blocks, count, distribute, finish, image_source, make_ema, make_parser,
                     one_line_refusals, pixel_statistics, positive, random_crop, resume, save_checkpoint, set_up, share,
                     stop_by_signal, training_loader)
from fid import LPIPS, TIMM, load_weights

RECIPE = [
    # flag             type      256 px  512 px  demo    meaning, and what the paper has
    ("--data",          str,      None,   None,   "shapes", "folder of images; or `shapes`, drawn on the fly"),
    ("--size",          count,    256,    512,    32,     "image side in pixels, as decoded"),
    ("--resize",        count,    None,   None,   None,   "shorter side before the crop (default: 1.5 x --size)"),
    ("--encoder",       str,      "dinov2-b", "dinov2-b", "random-tiny", ENCODER_HELP),
    ("--encoder-size",  count,    None,   None,   None,   "encoder's image side; 256 with --size 512: upsampling"),
    ("--encoder-weights", str,    None,   None,   None,   "local file, instead of the download"),
    ("--model",         tuple(SIZES), "ViT-XL", "ViT-XL", "ViT-tiny", "size of the decoder"),
    ("--init",          str,      None,   None,   None,   "decoder.pt or published weights to start from"),
    ("--tau",           amount,   0.8,    0.8,    0.1,    "latents get noise of sigma = tau |n|, n ~ N(0, 1); 0: none"),
    ("--lpips",         amount,   1.0,    1.0,    0.0,    "weight of the perceptual loss; 0: off"),
    ("--gan",           amount,   0.75,   0.75,   0.0,    "weight of the GAN loss, times the adaptive weight; 0: off"),
    ("--disc-start",    amount,   6.0,    6.0,    1.0,    "epoch where the discriminator begins to train"),
    ("--gan-start",     amount,   8.0,    8.0,    1.5,    "epoch from which the GAN loss trains the decoder"),
    ("--epochs",        positive, 16.0,   16.0,   3.0,    "length of training and of the cosine schedules"),
    ("--batch",         count,    512,    512,    16,     "images in a step, over all processes"),
    ("--micro-batch",   count,    16,     4,      16,     "most images in one forward; for ViT-XL and 80 GB"),
    ("--lr",            positive, 2e-4,   2e-4,   2e-3,   "learning rate of both AdamWs, without weight decay"),
    ("--lr-end",        amount,   2e-5,   2e-5,   3e-5,   "learning rate at the end of the cosine"),
    ("--warmup",        amount,   1.0,    1.0,    0.2,    "epochs of linear warm-up, of each model from its start"),
    ("--beta1",         share,    0.9,    0.9,    0.9,    "AdamW's beta1; the paper: 0.5"),
    ("--beta2",         share,    0.95,   0.95,   0.95,   "AdamW's beta2; the paper: 0.9"),
    ("--ema",           share,    0.9978, 0.9978, 0.99,   "decay of the weights' moving average"),
    ("--preview-every", amount,   None,   None,   None,   "epochs between previews, or 0 (default: 1, >= 500 steps)"),
    ("--vgg-weights",   str,      None,   None,   None,   "VGG16 of LPIPS: local file, instead of the download"),
    ("--lpips-weights", str,      None,   None,   None,   "heads of LPIPS: local file, instead of the download"),
    ("--dino-weights",  str,      None,   None,   None,   "the discriminator's DINO ViT-S/8: local file"),
]


def parse_args(argv):
    parser = make_parser(__doc__, RECIPE + RUN_FLAGS, argv)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs", args.preset, "decoder")
    args.encoder_size = args.encoder_size or args.size
    args.resize = args.resize or (args.size if args.data == "shapes" else args.size * 3 // 2)
    if args.resize < args.size:
        parser.error(f"--resize {args.resize} is below --size {args.size}: give at least that")
    if args.lpips and args.size < 16:
        parser.error(f"--size {args.size} is too small for the perceptual loss: give at least 16, or --lpips 0")
    if args.gan_start < args.disc_start:
        parser.error(f"--gan-start {args.gan_start:g} comes before --disc-start {args.disc_start:g}")
    return parser, args


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator: five light heads that read a frozen DINO ViT. StyleGAN-T (arXiv 2301.09515), section 3.2

# DINO ViT-S/8 (arXiv 2104.14294) with the tanh form of GELU, as the released code runs it.
DINO = dict(model_name="vit_small_patch8_224.dino", act_layer="gelu_tanh")


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
    weights: a local file, in timm's or DINO's own key names; None: downloaded once. Raises ValueError where they can't
    be had.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.vit = timm.create_model(**DINO, num_classes=0)
        load_weights(self.vit, TIMM.format(DINO["model_name"]), weights, "--dino-weights")
        self.vit.requires_grad_(False)
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


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss. The generator's is -mean(D(fake)), without a hinge."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def quantize(images):
    """Images in [-1, 1], clamped and rounded to the 256 levels of 8 bits, as real images are. No gradient."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def adaptive_weight(g_rec, g_gan, hidden, pixel_std):
    """Weight w of the GAN term (VQGAN, arXiv 2012.09841, equation 7), a scalar tensor in [0, 1e4] without gradient.

    w = ||G_rec|| / (||G_gan|| + 1e-6), where G is a loss's gradient at the weight of the decoder's last layer, the
    linear map to pixels. By the chain rule G = patchify(g std)^T hidden, with the loss's gradient g (B, 3, S, S) at the
    reconstruction, the layer's input `hidden` (B, N, D) and the pixel std (1, 3, 1, 1): no second backward is needed.
    Over several processes G is the mean of theirs, so that all have the w of all images of the micro-batch.
    """
    hidden = hidden.detach().float().flatten(0, 1)  # (B N, D)
    patch = math.isqrt(g_rec[0, 0].numel() * len(g_rec) // len(hidden))
    with torch.autocast(hidden.device.type, enabled=False):  # the product stays in float32
        G = torch.stack([patchify(g.float() * pixel_std, patch).flatten(0, 1).T @ hidden for g in (g_rec, g_gan)])
    if dist.is_initialized():  # (2, p p 3, D)
        dist.all_reduce(G)
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


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and draws


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a model's own step, counted from 0: linear warm-up, then a cosine from lr to lr_end."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def draw(keys, shape, tau, generator):
    """Everything random of a training step, each image's from its own key.

    So last.pt holds no state of a generator: step and seed say what is drawn.
    Returns noise (B, C, H, W) of noise-augmented decoding (section 4): sigma n, n ~ N(0, I), with sigma = |N(0, tau^2)|
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


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(args):
    device, autocast = set_up(args)
    say = functools.partial(print, flush=True) if args.rank == 0 else (lambda _: None)
    source = image_source(args.data, args.size)
    plan = Plan(args, len(source))
    last, recorded, start = resume(args, "train_decoder", "decoder.pt", images=len(source), classes=source.classes)
    if start >= plan.total:
        say(f"finished: {args.out}/decoder.pt has its {start / plan.steps_per_epoch:g} epochs; a larger --epochs "
            "goes on, at the rates of its own, longer cosine")
        return

    # The frozen networks, the decoder and the discriminator's heads.
    encoder = Encoder(args.encoder, args.encoder_size, args.encoder_weights).to(device)
    latent_dim, grid, _ = encoder.latent_shape
    if args.size % grid:
        raise ValueError(f"--size {args.size} is no multiple of the encoder's grid of {grid}")
    lpips = LPIPS(args.vgg_weights, args.lpips_weights).to(device) if args.lpips else None
    torch.manual_seed(args.seed)
    discriminator = Discriminator(args.dino_weights).to(device) if args.gan else None
    torch.manual_seed(args.seed)  # again: the decoder starts the same with and without a discriminator
    model = Decoder(latent_dim, grid, args.size // grid, **SIZES[args.model], **pixel_statistics(args.encoder))
    if args.init and not last:
        trained, info = load_decoder(args.init, pixel_statistics(args.encoder))
        check_init(args.init, info, args.encoder, trained.config, model.config, but=("mean", "std"))
        model.load_state_dict(trained.state_dict())
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = make_ema(model, args.ema)
    adamw = dict(lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    disc_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), **adamw) if discriminator else None
    skipped = bad_in_a_row = 0
    if last:
        model.load_state_dict(last["model"])
        ema.module.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        if discriminator:
            discriminator.heads.load_state_dict(last["discriminator"])
            disc_optimizer.load_state_dict(last["disc_optimizer"])
        skipped = last["skipped"]
        last = None  # last.pt is memory-mapped: release it
    if args.compile:  # before DDP; the average stays eager
        compile_blocks(encoder.vit, model, *([discriminator.vit] if discriminator else []))
    ddp = distribute(model, device)
    ddp_disc = distribute(discriminator, device) if discriminator else None

    images = Images(source, functools.partial(random_crop, resize=args.resize, size=args.size))
    batches, steps = training_loader(images, args, plan, start, device)
    if args.rank == 0:
        chosen = np.random.default_rng(args.seed).permutation(len(source))[:8].tolist()
        shown = torch.stack([images[i, i][0] for i in chosen])  # (8, 3, S, S) uint8
        with autocast:
            shown_z = encoder(shown.to(device).float() / 255)  # (8, C, H, W)
    disc_start, gan_start = (round(epoch * plan.steps_per_epoch) for epoch in (args.disc_start, args.gan_start))
    say(f"{source.root}: {len(source)} images, classes: {len(source.classes)}")
    say(f"{args.model}, patch {model.patch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{plan.words}; learning rate rises for {args.warmup * plan.steps_per_epoch:.0f} steps; from step {start}")
    if discriminator:
        warning = ": few images; a discriminator overfits on them, --gan 0 is safer" if gan_start < 1000 else ""
        say(f"discriminator from step {disc_start}, its loss from step {gan_start}{warning}")

    def checkpoint(done):
        last = dict(kind="train_decoder", args=recorded, step=done, model=model.state_dict(),
                    ema=ema.module.state_dict(), optimizer=optimizer.state_dict(), skipped=skipped)
        if discriminator:
            last |= dict(discriminator=discriminator.heads.state_dict(), disc_optimizer=disc_optimizer.state_dict())
        result = dict(kind="decoder", config=model.config, model=ema.module.state_dict(), encoder=encoder.record,
                      tau=args.tau, epoch=done / plan.steps_per_epoch)
        save_checkpoint({args.out / "decoder.pt": result, args.out / "last.pt": last})

    generator = torch.Generator(device)
    preview_every = plan.interval(args.preview_every, 1)
    columns = ["l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm", "disc_norm", "lr", "disc_lr"]
    log = Log(args, plan, columns, start, device)
    stopping = stop_by_signal(args.rank)
    for step in steps:
        train_disc = discriminator is not None and step >= disc_start
        use_gan = discriminator is not None and step >= gan_start
        disc_inputs = []  # images, latents and draws for the discriminator's step, so that nothing is encoded twice

        # The decoder learns from L1, LPIPS and a discriminator in eval mode, whose spectral norms then stand still.
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, args, plan.steps_per_epoch)
        if discriminator:
            discriminator.eval()
        for micro in range(plan.accumulate):
            ddp.require_backward_grad_sync = micro == plan.accumulate - 1  # ranks exchange gradients in the last
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
            fake.backward(gradient * len(real) / plan.local_batch)
            log.add(**losses)
            if train_disc:
                disc_inputs.append((real, z, augment[1], augment[2]))
        norm = get_total_norm([p.grad for p in model.parameters()])  # nothing is clipped
        log.add(grad_norm=norm)
        norm, loss, stop = agree(stopping, norm, losses["l1"])
        finite = math.isfinite(norm)
        if finite:  # else weights, moments and average stay as they are
            optimizer.step()
            ema.update(model, step + 1)
        optimizer.zero_grad(set_to_none=args.world_size == 1)  # DDP's are views of its buckets: zero in place

        # The discriminator learns from fresh reconstructions of the updated decoder: without noise, in 8 bits.
        if train_disc:
            # Its warm-up and its cosine, as long as the decoder's, begin where it does: training ends within them.
            disc_lr = disc_optimizer.param_groups[0]["lr"] = lr_at(step - disc_start, args, plan.steps_per_epoch)
            discriminator.train()
            for micro, (real, z, augment_fake, augment_real) in enumerate(disc_inputs):
                ddp_disc.require_backward_grad_sync = micro == plan.accumulate - 1
                with autocast:
                    with torch.no_grad():
                        fake = quantize(2 * model(z) - 1)  # (B, 3, S, S) in [-1, 1]
                    both = torch.cat([diffaug(2 * real - 1, augment_real), diffaug(fake, augment_fake)])
                    real_logits, fake_logits = ddp_disc(both).chunk(2)  # (B, 5 N) each
                disc = hinge_loss(real_logits, fake_logits)
                (disc * len(real) / plan.local_batch).backward()
                log.add(disc=disc, real=real_logits.mean(), fake=fake_logits.mean())
            disc_norm = get_total_norm([p.grad for p in discriminator.heads.parameters()])
            log.add(disc_norm=disc_norm)
            if disc_norm.isfinite():
                disc_optimizer.step()
            else:
                finite = False
            disc_optimizer.zero_grad(set_to_none=args.world_size == 1)

        done = step + 1
        skipped, bad_in_a_row = skipped + (not finite), 0 if finite else bad_in_a_row + 1
        end = done == plan.total or stop or bad_in_a_row == GIVE_UP_AFTER
        log.step(loss)
        if done % plan.log_every == 0 or end:
            log.row(done, lr=lr, skipped=skipped, **dict(disc_lr=disc_lr) if train_disc else {})
        if args.rank == 0 and preview_every and (plan.due(done, preview_every) or done == plan.total):
            with torch.no_grad(), autocast:
                decoded = to_uint8(ema.module(shown_z)).cpu()
            grid = image_grid(torch.cat([shown.permute(0, 2, 3, 1), decoded]), len(shown))
            grid.save(args.out / f"preview-{done / plan.steps_per_epoch:.2f}.png")
        if args.rank == 0 and (plan.due(done, plan.save_every) or end):
            checkpoint(done)  # after the preview: a run that goes on from here would not draw it
        if end:
            break
    finish(args, done, stop, bad_in_a_row)


def main(argv=None):
    parser, args = parse_args(argv)
    with one_line_refusals(parser):
        train(args)


if __name__ == "__main__":
    main()
