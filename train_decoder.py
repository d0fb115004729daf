"""Stage 1: train the decoder, which turns the latents of a frozen encoder back into pixels.

    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/                      # ViT-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_decoder.py --data imagenet/ --preset imagenet512
    python train_decoder.py --data photos/ --model ViT-B --micro-batch 8                 # one GPU, your own images
    python train_decoder.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, section 3 and its appendix. It writes to --out:
    decoder.pt      EMA weights and configuration: what sample.py and train_dit.py read
    last.pt         everything that is needed to go on exactly where training stopped
    log.csv         one row for each logged interval
    preview-*.png   images above their reconstructions by the EMA weights
To evaluate: sample.py --reconstruct imagenet/val --out recon.npz, then fid.py imagenet/val recon.npz --paired.
"""

import argparse
import contextlib
import datetime
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import decoder as decoders
import encoder as encoders
import fid

IMAGENET = dict(
    encoder="dinov2-b", size=256, model="ViT-XL", epochs=16, batch=512, micro_batch=16, lr=2e-4, lr_end=2e-5,
    beta1=0.9, beta2=0.95, warmup=1.0, ema=0.9978, tau=0.8, lpips=1.0, gan=0.75, disc_start=6.0, gan_start=8.0,
    precision="tf32", preview_every=1.0, save_every=1.0, log_every=100,
)  # fmt: skip
PRESETS = {
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(size=512, micro_batch=4),
    "demo": IMAGENET | dict(
        data="shapes", encoder="random-tiny", size=32, model="ViT-tiny", epochs=3, batch=16, micro_batch=16, lr=2e-3,
        lr_end=3e-5, warmup=0.2, ema=0.99, tau=0.1, lpips=0.0, gan=0.0, disc_start=1.0, gan_start=1.5,
        precision="float32", preview_every=1.0, save_every=1.0, log_every=250,
    ),
}  # fmt: skip
# Arguments that may change between runs in one folder: they do not shape the result, or only how long it is worked on.
FREE = {"preset", "out", "data", "epochs", "preview_every", "save_every", "log_every", "micro_batch", "device",
        "workers", "compile", "checkpointing", "encoder_weights", "lpips_weights", "vgg_weights",
        "dino_weights"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator: five light heads that read a frozen DINO ViT. StyleGAN-T (arXiv 2301.09515), section 3.2

DINO = "vit_small_patch8_224.dino"  # timm's name of DINO ViT-S/8, arXiv 2104.14294


def load_dino(weights=None, num_heads=None):
    """DINO ViT-S/8 with the tanh form of GELU, which is how the authors' released code runs it.

    weights: a local file in timm's or DINO's own key names (.safetensors, .pth, ...); None takes timm's download or
    its cache. The file's shapes set width, depth, patch and image size, so any plain ViT with a class token serves.
    num_heads: of that file, whose shapes don't tell; None is one per 64 channels, at least two.
    Raises ValueError, in one line, for weights that are neither downloadable nor usable.
    """
    if weights is None:
        try:
            return timm.create_model(DINO, pretrained=True, num_classes=0, act_layer="gelu_tanh")
        except Exception as error:  # each version of the hub's client fails in its own way
            url = f"https://huggingface.co/timm/{DINO}/resolve/main/model.safetensors"
            problem = f"cannot download the discriminator's backbone ({type(error).__name__})"
            raise ValueError(f"{problem}: fetch {url} and pass it with --dino-weights PATH") from error
    try:
        with open(weights, "rb"):  # a missing file ends here; timm would also log it
            state = timm.models.load_state_dict(weights, weights_only=True)
        D, _, patch, _ = state["patch_embed.proj.weight"].shape
        size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch  # the position of the class token aside
        depth = sum(key.endswith("norm1.weight") for key in state)
        vit = timm.models.VisionTransformer(
            size, patch, num_classes=0, embed_dim=D, depth=depth, num_heads=num_heads or max(2, D // 64),
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / D, act_layer="gelu_tanh")  # fmt: skip
        vit.load_state_dict(state)
        return vit
    except Exception as error:  # unreadable, damaged, or not a ViT
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"--dino-weights {weights}: expected the tensors of timm's {DINO}; {reason}") from error


class DiscriminatorHead(nn.Module):
    """Features (B, D, N) of one ViT block to one logit per token, (B, N)."""

    def __init__(self, D):
        super().__init__()

        def conv(out, kernel):
            return spectral_norm(nn.Conv1d(D, out, kernel, padding=kernel // 2, padding_mode="circular"))

        def block(kernel):  # the batch-local norm with a virtual batch of 1 is an instance norm: batches don't mix
            return nn.Sequential(conv(D, kernel), nn.InstanceNorm1d(D, eps=1e-6, affine=True), nn.LeakyReLU(0.2))

        self.embed, self.mix, self.logit = block(1), block(9), conv(1, 1)

    def forward(self, x):  # (B, D, N)
        x = self.embed(x)
        x = (self.mix(x) + x) / math.sqrt(2)
        return self.logit(x).squeeze(1)  # (B, N)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, 5 N), N the ViT's patches (784): high for real, low for generated.

    The first head reads the last block's output, the others the outputs of the blocks in `hooks` (counted from 0).
    Only `heads` trains. The ViT is frozen and stays in eval mode, but gradients flow through it to the images.
    weights, num_heads: see load_dino. Raises ValueError where the ViT does not load or is too shallow for `hooks`.
    """

    def __init__(self, weights=None, num_heads=None, hooks=(2, 5, 8, 11)):
        super().__init__()
        self.vit = load_dino(weights, num_heads).requires_grad_(False).eval()
        depth = len(self.vit.blocks)
        if max(hooks) >= depth:
            raise ValueError(f"--dino-weights {weights}: {depth} blocks, the discriminator needs {max(hooks) + 1}")
        self.blocks = [depth - 1, *hooks]  # one per head; the last block serves two
        self.heads = nn.ModuleList(DiscriminatorHead(self.vit.embed_dim) for _ in self.blocks)
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images):  # (B, 3, H, W)
        x = F.interpolate(images, self.vit.patch_embed.img_size, mode="bilinear", align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std  # (B, 3, 224, 224)
        read = sorted(set(self.blocks))
        features = self.vit.forward_intermediates(x, read, output_fmt="NLC", intermediates_only=True)  # (B, N, D) each
        features = {i: feature.transpose(1, 2) for i, feature in zip(read, features, strict=True)}  # (B, D, N) each
        return torch.cat([head(features[i]) for head, i in zip(self.heads, self.blocks, strict=True)], 1)  # (B, 5 N)


def diffaug(images, draws):
    """Differentiable augmentation (arXiv 2006.10738) of images (B, 3, H, W) in [-1, 1], without clamping.

    draws: (B, 5) float32, uniform in [0, 1), made by the caller, who can so tie them to the image rather than to its
    place in a batch. Each column drives one transform; they apply in this order:
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
# Losses and schedule


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss. The generator's is -mean(D(fake)), without a hinge."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(g_rec, g_gan):
    """Weight w of the GAN term (VQGAN, arXiv 2012.09841, equation 7), a scalar tensor in [0, 1e4] without gradient.

    w = ||g_rec|| / (||g_gan|| + 1e-6), the norms of the gradients of the reconstruction loss (L1 + LPIPS) and of the
    generator loss with respect to the reconstructed pixels, (B, 3, H, W) each. Under torch.distributed these are the
    gradients of the mean over all ranks' losses, so that w is the same on every rank and for any number of ranks.
    """
    squares = torch.stack([g_rec.float().square().sum(), g_gan.float().square().sum()]).detach()
    world_size = 1
    if dist.is_initialized():
        dist.all_reduce(squares)
        world_size = dist.get_world_size()
    rec, gan = squares.sqrt() / world_size  # the mean over ranks scales each rank's gradients by 1 / world_size
    return (rec / (gan + 1e-6)).clamp(0, 1e4)


def quantize(images):
    """Images in [-1, 1], clamped and rounded to the 256 levels of 8 bits, as real images are. No gradient."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def lr_at(step, lr, lr_end, warmup, total):
    """Learning rate of a model's update `step` (from 0): linear from 0 to `lr` over `warmup` steps, then a cosine that
    reaches `lr_end` at step `total` and stays there. The discriminator counts from its own first update.
    """
    if step < warmup:
        return lr * step / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments, checkpoints, the log


def parse_args(argv):
    pre = encoders.Arguments(add_help=False)
    pre.add_argument("--preset", default="imagenet256")
    defaults = PRESETS.get(pre.parse_known_args(argv)[0].preset, {})

    parser = encoders.Arguments(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet256", help="the set of defaults")
    add("--data", required="data" not in defaults, help="folder of images; or `shapes`, drawn on the fly")
    add("--out", help="folder for everything written (default runs/<preset>/decoder)")
    add("--encoder", help=f"{', '.join(encoders.ENCODERS)}, or a timm ViT by its name")
    add("--encoder-weights", metavar="PATH", help="local file instead of timm's download")
    add("--encoder-size", type=int, metavar="PX",
        help="image size it is built for (default --size); 256 with --size 512: decoder upsampling")  # fmt: skip
    add("--size", type=int, help="image size in pixels, as decoded")
    add("--resize", type=int, metavar="PX",
        help="shorter side before the random crop (default 1.5 --size, as in the paper; `shapes`: --size)")  # fmt: skip
    add("--model", choices=decoders.SIZES, help="size of the decoder")
    add("--tau", type=float, help="noise on the latents: sigma = tau |n|, n ~ N(0, 1) for each image; 0: none")
    add("--lpips", type=float, help="weight of the perceptual loss; 0: off")
    add("--gan", type=float, help="weight of the adversarial loss, times the adaptive weight; 0: off")
    add("--disc-start", type=float, help="epoch where the discriminator begins to train")
    add("--gan-start", type=float, help="epoch where the decoder begins to see its loss")
    add("--lpips-weights", metavar="PATH", help="LPIPS heads, instead of the download")
    add("--vgg-weights", metavar="PATH", help="VGG16 for LPIPS, instead of timm's download")
    add("--dino-weights", metavar="PATH", help="DINO ViT-S/8 for the discriminator, instead of timm's download")
    add("--epochs", type=float, help="length of training and of the cosine schedules")
    add("--batch", type=int, help="images in a step, over all processes")
    add("--micro-batch", type=int, help="at most this many images in a forward of one process")
    add("--lr", type=float, help="learning rate of AdamW (no weight decay), for decoder and discriminator")
    add("--lr-end", type=float, help="learning rate at the end of the cosine")
    add("--beta1", type=float, help="AdamW; the paper: 0.5, the released code: 0.9")
    add("--beta2", type=float, help="AdamW; the paper: 0.9, the released code: 0.95")
    add("--warmup", type=float, help="epochs of linear warm-up from zero, of either model")
    add("--ema", type=float, help="decay of the weights' moving average in each step")
    add("--precision", choices=["float32", "tf32", "bf16"], help="of encoder and decoder; tf32 is float32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add("--preview-every", type=float, metavar="EPOCHS", help="interval of preview pictures; 0: none")
    add("--save-every", type=float, metavar="EPOCHS", help="interval of decoder.pt and last.pt")
    add("--log-every", type=int, metavar="STEPS", help="interval of the log")
    add("--seed", type=int, default=0, help="of the weights, the images' order and everything that is drawn")
    add("--workers", type=int, help="loader processes for each GPU (default: by cores, at most 12; 0 for `shapes`)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"runs/{args.preset}/decoder")
    parser.check_out(args.out)
    above = ["epochs", "batch", "micro_batch", "lr", "log_every", "save_every", "size", "encoder_size", "resize"]
    least = ["warmup", "lr_end", "tau", "lpips", "gan", "disc_start", "gan_start", "preview_every", "seed", "workers"]
    parser.check_numbers(args, above, least)
    for name in ("ema", "beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 0 and below 1")
    args.encoder_size = args.encoder_size or args.size
    args.resize = args.resize or (args.size if args.data == "shapes" else args.size * 3 // 2)
    if args.resize < args.size:
        parser.error(f"--resize {args.resize}: must not be below --size {args.size}")
    if args.lpips and args.size < 16:
        parser.error(f"--size {args.size}: the perceptual loss needs 16 pixels; or give --lpips 0")
    if args.gan_start < args.disc_start:
        parser.error(f"--gan-start {args.gan_start:g}: must not come before --disc-start {args.disc_start:g}")
    if args.data != "shapes" and not os.path.isdir(args.data):
        parser.error(f"--data {args.data}: no such folder; give a folder of images, or `shapes`")
    return parser, args


def load_frozen(args, device):
    """The encoder, and LPIPS and the discriminator or None where their weight is 0.

    Raises one ValueError for everything that cannot be loaded: it says what to fetch, and the flags that take it.
    """
    networks, problems = [], []
    for wanted, network, *arguments in (
        (True, encoders.Encoder, args.encoder, args.encoder_size, args.encoder_weights),
        (args.lpips, fid.LPIPS, args.vgg_weights, args.lpips_weights),
        (args.gan, Discriminator, args.dino_weights),
    ):
        torch.manual_seed(args.seed)  # for the discriminator's heads, which train
        try:
            networks.append(network(*arguments).to(device) if wanted else None)
        except ValueError as error:
            problems.append(str(error))
            if "--lpips-weights" in problems[-1] and not args.vgg_weights:
                problems.append("VGG16, model.safetensors of https://huggingface.co/timm/vgg16.tv_in1k: --vgg-weights")
    if problems:
        raise ValueError("; ".join(problems))
    return networks


class Log:
    """Averages since the last row over steps and ranks: one line on the terminal and one row in log.csv."""

    fields = ["step", "epoch", "l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "lr", "lr_disc", "grad_norm",
              "images_per_s", "memory_gb", "skipped", "replaced"]  # fmt: skip

    def __init__(self, path, start, main_rank):
        if main_rank:
            self.csv = encoders.open_log(path, start, self.fields)
        self.reset(start)

    def reset(self, step):
        self.values, self.step, self.time = {}, step, time.perf_counter()

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def write(self, bar, step, epoch, batch, **numbers):
        means = torch.stack([torch.stack(values).mean() for values in self.values.values()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        row = {name: f"{value:.5f}" for name, value in zip(self.values, means.tolist(), strict=True)}
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        numbers |= dict(images_per_s=batch / seconds, memory_gb=encoders.peak_memory(means.device))
        row |= {name: f"{value:.4g}" for name, value in numbers.items()}
        if not bar.disable:
            self.csv.writerow(dict(step=step, epoch=f"{epoch:.4f}") | row)
            words = " ".join(f"{name} {value}" for name, value in row.items())
            left = datetime.timedelta(seconds=int((bar.total - step) * seconds))
            bar.write(f"step {step}/{bar.total} epoch {epoch:.2f} {words} left {left}")
            sys.stdout.flush()
        self.reset(step)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def draw(keys, shape, tau, generator):
    """Everything random of a training step, each image's from its own key.

    Returns noise (B, C, H, W), sigma n of section 4's noise-augmented decoding, with sigma = tau |n'|, n' ~ N(0, 1) for
    each image; uniforms (3, B, 5) for DiffAug: of the decoder's fakes, the discriminator's fakes, its reals.
    """
    noise = torch.empty(len(keys), *shape, device=generator.device)
    sigma = torch.empty(len(keys), 1, 1, 1, device=generator.device)
    uniforms = torch.empty(len(keys), 3, 5, device=generator.device)
    for i, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        noise[i].normal_(generator=generator)
        sigma[i].normal_(generator=generator)
        uniforms[i].uniform_(generator=generator)
    return tau * sigma.abs() * noise, uniforms.transpose(0, 1)


def update(optimizer):
    """A step of AdamW, left out where a gradient is not finite. Returns the gradients' norm."""
    norm = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])
    # What a GradScaler tells fused optimisers: 1 leaves weights, moments and steps alone. Decided without a wait.
    optimizer.found_inf = 1 - norm.isfinite().float()
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train(args):
    """All of it. Returns None, or why there is nothing to train or training had to stop; the same on every rank."""
    recorded = {key: value for key, value in vars(args).items() if key not in FREE}
    device, autocast = encoders.set_up(args)
    main_rank = args.rank == 0
    say = functools.partial(print, flush=True) if main_rank else (lambda _: None)

    # What the run is made of. Bad input ends here, in one line, before any long work.
    problem = last = None
    try:
        local_batch, rest = divmod(args.batch, args.world_size)
        if rest or not local_batch:
            raise ValueError(f"--batch {args.batch} does not divide over {args.world_size} processes")
        accumulate = -(-local_batch // args.micro_batch)
        micro_batch = -(-local_batch // accumulate)  # the last one may be smaller
        encoder, lpips, discriminator = load_frozen(args, device)
        patch, rest = divmod(args.size, encoder.grid)
        if rest:
            raise ValueError(f"--size {args.size} is no multiple of the encoder's grid of {encoder.grid}")
        source = encoders.image_source(args.data, args.size)
        recorded |= dict(images=len(source))
        last = encoders.read_last(args.out, recorded, "train_decoder", "decoder.pt")
        args.lock = encoders.claim(args.out) if main_rank else None
    except (ValueError, OSError) as error:
        problem = str(error)
    start = last["step"] if last else 0
    found = [(problem, start)]
    if args.distributed:
        found *= args.world_size
        dist.all_gather_object(found, (problem, start))
    if problems := [problem for problem, _ in found if problem]:
        return problems[0]
    if len(set(found)) > 1:
        return f"the processes see different {args.out}/last.pt: put --out on a disk that all nodes share"
    steps_per_epoch = len(source) / args.batch
    total = max(1, round(args.epochs * steps_per_epoch))
    if start >= total:
        say(
            f"finished: {args.out}/decoder.pt has its {start / steps_per_epoch:g} epochs; a larger --epochs "
            "goes on, at the rates of its own, longer cosine"
        )
        return

    images = encoders.Images(source, lambda image, rng: encoders.random_crop(image, args.resize, args.size, rng))
    batches = encoders.training_batches(
        len(source), args.batch, micro_batch, range(start, total), args.seed, args.rank, args.world_size
    )
    loader = iter(encoders.make_loader(images, batches, args.workers, device))
    if args.preview_every and main_rank:
        centered = encoders.Images(source, lambda image, _: encoders.center_crop(image, args.size))
        shown = np.random.default_rng(args.seed).permutation(len(source))[:8].tolist()
        shown = torch.stack([centered[i, i][0] for i in shown])  # (8, 3, S, S) uint8
        with autocast:
            shown_z = encoder(shown.to(device).float() / 255)  # (8, C, H, W)

    # Models, moving average, optimisers.
    torch.manual_seed(args.seed)
    shape = (encoder.latent_dim, encoder.grid, encoder.grid)
    model = decoders.Decoder(encoder.latent_dim, encoder.grid, patch, **decoders.SIZES[args.model],
                             mean=encoder.record["mean"], std=encoder.record["std"]).to(device).train()  # fmt: skip
    model.checkpointing = args.checkpointing
    ema = ModelEmaV3(model, decay=args.ema, exclude_buffers=True).requires_grad_(False)  # eager, in eval mode
    adamw = dict(lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    if discriminator:
        disc_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), **adamw)
    skipped = replaced = 0
    if last:
        try:
            model.load_state_dict(last["model"])
            ema.module.load_state_dict(last["ema"])
            optimizer.load_state_dict(last["optimizer"])
            if discriminator:
                discriminator.heads.load_state_dict(last["discriminator"])
                disc_optimizer.load_state_dict(last["disc_optimizer"])
            skipped, replaced = last["skipped"], last["replaced"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return f"{args.out}/last.pt is damaged or of another version ({reason}): put back a copy"
        del last
    if args.compile or args.compile is None and device.type == "cuda":
        encoders.compile_blocks(encoder.vit, model, *([discriminator.vit] if discriminator else []))
    wrapped, wrapped_disc = model, discriminator
    if args.distributed:
        ddp = dict(device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                   gradient_as_bucket_view=True)  # fmt: skip
        wrapped = DistributedDataParallel(model, **ddp)
        wrapped_disc = DistributedDataParallel(discriminator, **ddp) if discriminator else None

    def sync(module, micro):
        """The ranks' gradients meet at the last micro-batch of a step."""
        return module.no_sync() if args.distributed and micro < accumulate - 1 else contextlib.nullcontext()

    def steps(epochs):
        return round(epochs * steps_per_epoch)

    disc_start, gan_start, warmup = steps(args.disc_start), steps(args.gan_start), args.warmup * steps_per_epoch
    save_every, preview_every = max(1, steps(args.save_every)), max(1, steps(args.preview_every))
    say(
        f"{args.model}, patch {patch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{len(source)} images; batch {args.batch} = {args.world_size} processes x {accumulate} x {micro_batch}; "
        f"steps {start} to {total}"
        + (f"; discriminator from step {disc_start}, its loss from step {gan_start}" if discriminator else "")
    )

    def checkpoint(step):
        last = dict(kind="train_decoder", args=recorded, step=step, model=model.state_dict(),
                    ema=ema.module.state_dict(), optimizer=optimizer.state_dict(), skipped=skipped,
                    replaced=replaced)  # fmt: skip
        if discriminator:
            last |= dict(discriminator=discriminator.heads.state_dict(), disc_optimizer=disc_optimizer.state_dict())
        result = dict(kind="decoder", config=model.config, model=ema.module.state_dict(), encoder=encoder.record,
                      tau=args.tau, epoch=step / steps_per_epoch)  # fmt: skip
        encoders.save({args.out / "decoder.pt": result, args.out / "last.pt": last})

    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    generator = torch.Generator(device)
    log = Log(args.out / "log.csv", start, main_rank)
    bar = tqdm(total=total, initial=start, unit="step", disable=not main_rank, dynamic_ncols=True)
    bad_in_a_row = 0
    for step in range(start, total):
        lr = lr_at(step, args.lr, args.lr_end, warmup, total)
        train_disc = discriminator is not None and step >= disc_start
        lr_disc = lr_at(step - disc_start, args.lr, args.lr_end, warmup, total) if train_disc else 0.0
        use_gan = discriminator is not None and step >= gan_start
        kept = []  # what the discriminator's step needs of each micro-batch, so that nothing is encoded twice
        broken = 0

        # The decoder: both losses' gradients at the pixels, then one backward.
        optimizer.param_groups[0]["lr"] = lr
        for micro in range(accumulate):
            pixels, _, keys, unreadable = next(loader)  # (B, 3, S, S) uint8, ..., (B,), (B,)
            broken += int(unreadable.sum())
            real = pixels.to(device, non_blocking=True).float() / 255  # (B, 3, S, S) in [0, 1]
            noise, uniforms = draw(keys, shape, args.tau, generator)
            with sync(wrapped, micro):
                with autocast:
                    z = encoder(real)  # (B, C, H, W)
                    fake = wrapped(z + noise)  # (B, 3, S, S)
                at = fake.detach().requires_grad_()
                l1 = (at - real).abs().mean()
                perceptual = lpips(2 * at - 1, 2 * real - 1).mean() if lpips else torch.zeros_like(l1)
                (gradient,) = torch.autograd.grad(l1 + args.lpips * perceptual, at)
                if use_gan:
                    gan = -discriminator.eval()(diffaug(2 * at - 1, uniforms[0])).mean()
                    (gan_gradient,) = torch.autograd.grad(gan, at)
                    weight = adaptive_weight(gradient, gan_gradient)
                    gradient = gradient + args.gan * weight * gan_gradient
                    log.add(gan=gan, gan_weight=weight)
                fake.backward(gradient * len(real) / local_batch)
            log.add(l1=l1, **({"lpips": perceptual} if lpips else {}))
            if train_disc:
                kept.append((real, z, uniforms))
        norm = update(optimizer)
        disc_norm = torch.zeros_like(norm)
        ema.update(model)

        # The discriminator: fresh reconstructions of the updated decoder, without noise, in 8 bits as the real images.
        if train_disc:
            disc_optimizer.param_groups[0]["lr"] = lr_disc
            discriminator.train()
            for micro, (real, z, uniforms) in enumerate(kept):
                with torch.no_grad(), autocast:
                    fake = quantize(2 * model(z) - 1)
                both = torch.cat([diffaug(2 * real - 1, uniforms[2]), diffaug(fake, uniforms[1])])
                with sync(wrapped_disc, micro):
                    real_logits, fake_logits = wrapped_disc(both).chunk(2)
                    disc = hinge_loss(real_logits, fake_logits)
                    (disc * len(real) / local_batch).backward()
                log.add(disc=disc, real=real_logits.mean(), fake=fake_logits.mean())
            disc_norm = update(disc_optimizer)

        # One wait for the GPU in each step, after which the ranks agree: on the gradients' norms (already the same on
        # all), on files that could not be read, on whether any rank has been told to stop.
        told = torch.tensor([broken, bool(stopping)], dtype=torch.float32, device=device)
        status = torch.cat([torch.stack([norm, disc_norm]), told])
        if args.distributed:
            dist.all_reduce(status)
        norm, disc_norm, broken, stop = status.tolist()
        replaced += int(broken)
        bad = not math.isfinite(norm + disc_norm)  # `update` has left such a step out
        skipped, bad_in_a_row = skipped + bad, (bad_in_a_row + 1) * bad

        done = step + 1
        epoch, end = done / steps_per_epoch, done == total or stop or bad_in_a_row == 20
        bar.update()
        if done % args.log_every == 0 or end:
            log.write(bar, done, epoch, args.batch, lr=lr, lr_disc=lr_disc, grad_norm=norm / args.world_size,
                      skipped=skipped, replaced=replaced)  # fmt: skip
        if main_rank and args.preview_every and (done % preview_every == 0 or done == total):
            with torch.no_grad(), autocast:
                decoded = decoders.to_uint8(ema.module(shown_z)).cpu()
            picture = torch.cat([shown.permute(0, 2, 3, 1), decoded])  # (16, S, S, 3)
            decoders.image_grid(picture, len(shown)).save(args.out / f"preview-{epoch:.2f}.png")
        if main_rank and (done % save_every == 0 or end):
            checkpoint(done)
        if bad_in_a_row == 20:
            return (f"stopped at step {done}: the gradient was not finite 20 times in a row; {args.out}/last.pt has "
                    "the weights from before. Try --precision tf32 or a smaller --lr")  # fmt: skip
        if stop:
            say(f"stopped and saved at step {done}; the same command resumes")
            break
    bar.close()


def main(argv=None):
    parser, args = parse_args(argv)
    problem = encoders.guard(train, args)
    if args.distributed:  # only here, where all ranks agree: one that fails alone must not wait for the others
        dist.destroy_process_group()
    if problem:
        parser.error(problem) if args.rank == 0 else sys.exit(2)


if __name__ == "__main__":
    main()
