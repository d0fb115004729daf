"""Stage 2: train a diffusion transformer to draw the latents of a frozen encoder.

    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/                      # DiT-DH-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/ --preset imagenet512
    python train_dit.py --data photos/ --init runs/imagenet256/dit/dit.pt --epochs 20 --out runs/photos/dit
    python train_dit.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, sections 4 and 5. It writes to --out:
    dit.pt          EMA weights, configuration and latent statistics: what sample.py reads
    last.pt         everything that is needed to go on exactly where training stopped
    stat.pt         the latent statistics
    log.csv         one row for each logged interval, with the loss by bins of t, and one for each online FID
    preview-*.png   samples of the EMA weights from fixed noise, when there is a decoder
    dit-*.pt        dit.pt at the epochs of --keep-every: guides for AutoGuidance, points of a FID curve
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
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import decoder as decoders
import dit
import encoder as encoders
import fid

IMAGENET = dict(
    encoder="dinov2-b", size=256, model="DiT-DH-XL", epochs=80, batch=1024, micro_batch=32, lr=2e-4, lr_end=2e-5,
    warmup=0.0, decay_start=40.0, decay_end=800.0, clip=1.0, ema=0.9995, shift_base=4096.0, precision="tf32",
    stats_images=50000, preview_every=5.0, save_every=1.0, log_every=100,
)  # fmt: skip
PRESETS = {
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(size=512, epochs=400, micro_batch=8),
    "demo": IMAGENET | dict(
        data="shapes", encoder="random-tiny", size=32, model="DiT-DH-tiny", epochs=9, batch=32, micro_batch=32,
        lr=3e-3, lr_end=1e-4, warmup=0.4, decay_start=3.0, decay_end=9.0, ema=0.995, shift_base=512.0,
        precision="float32", stats_images=4000, preview_every=3.0, save_every=3.0, log_every=250,
    ),
}  # fmt: skip
PLAIN_DIT = dict(decay_start=math.inf, decay_end=math.inf, clip=0.0, ema=0.9999)  # the paper's without DDT head
T_BINS = 5  # the loss is logged for t in [0, 0.2), [0.2, 0.4), ...
# Arguments that may change between runs in one folder: they do not shape the result.
FREE = {"preset", "out", "data", "epochs", "preview_every", "keep_every", "save_every", "log_every", "micro_batch",
        "device", "workers", "compile", "checkpointing", "allow_narrow", "decoder", "encoder_weights", "fid_every",
        "fid_reference", "fid_num", "inception_weights"}  # fmt: skip


def parse_args(argv):
    pre = encoders.Arguments(add_help=False)
    pre.add_argument("--preset", default="imagenet256")
    pre.add_argument("--model")
    known, _ = pre.parse_known_args(argv)
    defaults = dict(PRESETS.get(known.preset, {}))
    if known.model and "DH" not in known.model and known.preset != "demo":
        defaults |= PLAIN_DIT

    parser = encoders.Arguments(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet256", help="the set of defaults; but for the demo, the paper's")
    add("--data", required="data" not in defaults, help="folder of images, with a folder for each class; or `shapes`")
    add("--out", help="folder for everything written (default runs/<preset>/dit)")
    add("--encoder", help=f"{', '.join(encoders.ENCODERS)}, or a timm ViT by its name")
    add("--encoder-weights", metavar="PATH", help="local file instead of timm's download")
    add("--decoder", metavar="PATH",
        help="for previews and online FID (default runs/<preset>/decoder/decoder.pt, if there)")  # fmt: skip
    add("--stats", metavar="PATH", help="latent statistics, ours or published; measured on the data where not given")
    add("--stats-images", type=int, help="images that the statistics are measured on")
    add("--init", metavar="PATH", help="start from these weights, ours or published (those with their --stats); the "
        "class table is new where the number of classes differs")  # fmt: skip
    add("--size", type=int, help="image size in pixels")
    add("--model", choices=dit.SIZES, help="size of the diffusion model")
    add("--qk-norm", action="store_true", help="RMSNorm on queries and keys; advised with bf16 (the paper: without)")
    add("--allow-narrow", action="store_true", help="train a model narrower than its tokens, against Theorem 1")
    add("--unconditional", action="store_true", help="train without labels")
    add("--epochs", type=float, help="length of training; the paper: 80 and 800 at 256 px, 400 at 512 px")
    add("--batch", type=int, help="images in a step, over all processes")
    add("--micro-batch", type=int, help="at most this many images in a forward of one process; for 80 GB GPUs")
    add("--lr", type=float, help="learning rate of AdamW (betas 0.9, 0.95, no weight decay)")
    add("--lr-end", type=float, help="learning rate at --decay-end and after")
    add("--warmup", type=float, help="epochs of linear warm-up from zero")
    add("--decay-start", type=float, help="epoch where the linear decay begins; inf: constant")
    add("--decay-end", type=float, help="epoch where the linear decay ends, also beyond --epochs")
    add("--clip", type=float, help="largest gradient norm; 0: no clipping")
    add("--ema", type=float, help="decay of the weights' moving average in each step")
    add("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    add("--shift-base", type=float, help="time shift a = sqrt(C H W / base), at least 1")
    add("--precision", choices=["float32", "tf32", "bf16"], help="of matrix products, the encoder's too, whose latents "
        "bf16 moves by 0.3%% (measured on random weights); tf32 is float32 on a CPU")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add("--preview-every", type=float, metavar="EPOCHS", help="interval of preview pictures; 0: none")
    add("--save-every", type=float, metavar="EPOCHS", help="interval of dit.pt and last.pt")
    add("--keep-every", type=float, default=0.0, metavar="EPOCHS", help="interval of dit-<epoch>.pt; 0: none")
    add("--fid-every", type=float, default=0.0, metavar="EPOCHS", help="interval of online FID, unguided; 0: none")
    add("--fid-reference", metavar="NPZ", help="its reference: ADM's VIRTUAL_*.npz, or of fid.py --save-stats")
    add("--fid-num", type=int, default=10000, help="its number of images; published numbers are of 50,000")
    add("--inception-weights", metavar="PATH", help="local file for it, instead of the download")
    add("--log-every", type=int, metavar="STEPS", help="interval of the log")
    add("--seed", type=int, default=0, help="of the initial weights and everything random")
    add("--workers", type=int, help="loader processes for each GPU (default: by cores, at most 12; 0 for `shapes`)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"runs/{args.preset}/dit")
    parser.check_out(args.out)
    above = ("size", "epochs", "batch", "micro_batch", "lr", "log_every", "save_every", "stats_images", "shift_base")
    least = ("warmup", "clip", "lr_end", "preview_every", "keep_every", "fid_every", "seed", "workers")
    parser.check_numbers(args, above, least)
    if not 0 <= args.ema < 1 or not 0 <= args.label_dropout < 1:
        parser.error(f"--ema {args.ema}, --label-dropout {args.label_dropout}: must be at least 0 and below 1")
    if not 0 <= args.decay_start <= args.decay_end:
        parser.error(f"--decay-start {args.decay_start} --decay-end {args.decay_end}: give 0 <= START <= END")
    default = f"runs/{args.preset}/decoder/decoder.pt"
    args.decoder = args.decoder or (default if os.path.exists(default) else None)
    if bool(args.fid_every) != bool(args.fid_reference):
        parser.error("--fid-every EPOCHS and --fid-reference NPZ need each other")
    if args.fid_every and (not args.decoder or args.fid_num < 2):
        parser.error(f"--fid-every needs a --decoder (there is no {default}), and --fid-num {args.fid_num} at least 2")
    return parser, args


def lr_at(epoch, args):
    """Learning rate: linear warm-up from zero, constant, then linear from lr to lr_end."""
    warm = min(1.0, epoch / args.warmup) if args.warmup else 1.0
    if epoch <= args.decay_start:
        return warm * args.lr
    done = min(1.0, (epoch - args.decay_start) / max(args.decay_end - args.decay_start, 1e-9))
    return warm * (args.lr + done * (args.lr_end - args.lr))


def draw(keys, shape, args, generator):
    """Everything random of a training step: times, noise, dropped labels; each image's from its own key.

    Returns t (B,), logit-normal (section 4), not yet shifted; noise (B, C, H, W); drop (B,), bool.
    """
    device = generator.device
    t, uniform = torch.empty(2, len(keys), 1, device=device)
    noise = torch.empty(len(keys), *shape, device=device)
    for i, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        noise[i].normal_(generator=generator)
        t[i].normal_(generator=generator)
        uniform[i].uniform_(generator=generator)
    return t[:, 0].sigmoid(), noise, uniform[:, 0] < args.label_dropout


def start_from(path, model, encoder):
    """Copy the weights of --init into the model; a class table of another size stays new. Returns their statistics."""
    trained, info = dit.load_dit(path)
    if info and info["encoder"]["name"] != encoder:  # published files don't say
        raise ValueError(f"--init {path} draws latents of {info['encoder']['name']}: choose --encoder to match")
    differ = [key for key in model.config if key != "num_classes" and model.config[key] != trained.config[key]]
    if differ:
        wanted = ", ".join(f"{key} {trained.config[key]} instead of {model.config[key]}" for key in differ)
        raise ValueError(f"--init {path} is another model: {wanted}; choose --model, --size, ... to match")
    state = trained.state_dict()
    if trained.num_classes != model.num_classes:
        del state["y_embedder.embedding_table.weight"]
    model.load_state_dict(state, strict=False)
    return info.get("stats")


def draw_samples(model, decoder, stats, shift, seed, indices, labels, steps=50):
    """Images (n, H, W, 3) uint8, unguided; starting noise i is a function of (seed, i)."""
    shape, device = stats["mean"].shape, stats["mean"].device
    noise = dit.sample_noise(seed, indices, shape).to(device)
    x = dit.sample(dit.guided(model, torch.tensor(labels, device=device)), noise, steps, shift)
    return decoders.to_uint8(decoder(dit.denormalize(x, stats)))


class Log:
    """One line on the terminal and one row in log.csv for each interval.

    loss, also by bins of t, and grad_norm (before clipping) are means over the interval's steps and over the ranks;
    what is not finite is left out of them. skipped and replaced count from the start of training.
    """

    def __init__(self, path, start, device, main_rank):
        self.device, self.main_rank = device, main_rank
        self.bins = [f"loss_t{i / T_BINS:.1f}" for i in range(T_BINS)]
        if main_rank:
            fields = ["step", "epoch", "loss", *self.bins, "lr", "grad_norm", "images_per_s", "memory_gb", "skipped",
                      "replaced", "fid"]  # fmt: skip
            self.csv = encoders.open_log(path, start, fields)
        self.reset(start)

    def reset(self, step):
        self.sums = torch.zeros(2, T_BINS, device=self.device)  # of losses and of images, for each bin of t
        self.norms, self.step, self.time = [], step, time.perf_counter()

    def add(self, losses, t):
        bins, finite = (t * T_BINS).long().clamp(max=T_BINS - 1), losses.isfinite()
        self.sums.index_add_(1, bins, torch.stack([losses.where(finite, 0), finite.type_as(losses)]))

    def interval(self, step, batch):
        """The numbers since the last row, and the seconds that a step took."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        losses, images = self.sums.tolist()
        by_t = {name: f"{a / n:.5f}" for name, a, n in zip(self.bins, losses, images, strict=True) if n}
        loss, norm = sum(losses) / (sum(images) or math.nan), sum(self.norms) / (len(self.norms) or math.nan)
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        self.reset(step)
        return dict(loss=f"{loss:.6f}", **by_t, grad_norm=f"{norm:.4f}", images_per_s=f"{batch / seconds:.4g}",
                    memory_gb=f"{encoders.peak_memory(self.device):.2f}"), seconds  # fmt: skip

    def write(self, bar, row, **more):
        if self.main_rank:
            bar.write(" ".join(f"{key} {value}" for key, value in (row | more).items() if key not in self.bins))
            self.csv.writerow(row)
            sys.stdout.flush()


def train(parser, args):
    """The whole run. Returns why it had to stop, or None; the same on every rank."""
    recorded = {key: value for key, value in vars(args).items() if key not in FREE}
    device, autocast = encoders.set_up(args)
    main_rank = args.rank == 0
    say = functools.partial(print, flush=True) if main_rank else (lambda _: None)

    def over_ranks(*values):
        """Sums over the ranks, read by the host: on these, all ranks agree."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        if args.distributed:
            dist.all_reduce(sums)
        return sums.tolist()

    # What the run is made of. Bad input ends here, in one line, before any long work.
    try:
        local_batch, rest = divmod(args.batch, args.world_size)
        if rest or not local_batch:
            raise ValueError(f"--batch {args.batch} does not divide over {args.world_size} processes")
        accumulate = -(-local_batch // args.micro_batch)
        micro_batch = -(-local_batch // accumulate)  # the last one may be smaller
        source = encoders.image_source(args.data, args.size)
        num_classes = 0 if args.unconditional else len(source.classes)
        recorded |= dict(images=len(source), classes=num_classes)
        last = encoders.read_last(args.out, recorded, "train_dit", "dit.pt")
        start = last["step"] if last else 0
        if over_ranks(start) != [start * args.world_size]:
            raise ValueError(f"{args.out}/last.pt is not the same for all processes: --out must be on a shared disk")
        steps_per_epoch = len(source) / args.batch
        total = max(1, round(args.epochs * steps_per_epoch))
        if start >= total:
            say(f"finished: {args.out}/dit.pt has its {start / steps_per_epoch:g} epochs; a larger --epochs goes on")
            return
        encoder = encoders.Encoder(args.encoder, args.size, args.encoder_weights).to(device)
        shape = (encoder.latent_dim, encoder.grid, encoder.grid)
        shift = dit.shift_for(shape, args.shift_base)
        stats = last["stats"] if last else encoders.load_stats(args.stats, shape) if args.stats else None
        torch.manual_seed(args.seed)
        model = dit.DiT(encoder.latent_dim, encoder.grid, num_classes, **dit.SIZES[args.model], qk_norm=args.qk_norm,
                        allow_narrow=args.allow_narrow)  # fmt: skip
        if args.init and not last:
            theirs = start_from(args.init, model, args.encoder)
            stats = stats or theirs  # not those of the new images: the weights know latents normalised by these
            if not stats:
                raise ValueError(f"--init {args.init} is a bare diffusion model: give its statistics with --stats")
        decoder = None
        if args.decoder and (args.preview_every or args.fid_every):
            decoder, info = decoders.load_decoder(args.decoder, {key: encoder.record[key] for key in ("mean", "std")})
            found = info["encoder"]["name"] if info else args.encoder
            if (found, decoder.config["latent_dim"], decoder.config["grid"]) != (args.encoder, *shape[:2]):
                raise ValueError(f"--decoder {args.decoder} decodes other latents than those of {args.encoder} at "
                                 f"{args.size} px; to train without it: --preview-every 0")  # fmt: skip
            decoder = decoder.to(device) if main_rank or args.fid_every else None  # the previews are rank 0's
        if args.fid_every:
            side = argparse.Namespace(features="inception", size=args.size)
            reference = fid.Side("--fid-reference", args.fid_reference, side).statistics
            if [np.shape(reference.get(key)) for key in ("mu", "sigma")] != [(2048,), (2048, 2048)]:
                raise ValueError(f"--fid-reference {args.fid_reference} holds no statistics of Inception: make some by "
                                 "fid.py FOLDER --save-stats")  # fmt: skip
            inception = fid.load_inception(args.inception_weights, device)
        args.lock = encoders.claim(args.out) if main_rank else None
    except (ValueError, OSError) as error:
        parser.error(str(error))  # without destroy_process_group, which may wait for the other ranks

    # The loader, and the latent statistics: the same transform for both.
    images = encoders.Images(source, lambda image, rng: encoders.center_crop_flip(image, args.size, rng))
    compiled = args.compile or args.compile is None and device.type == "cuda"
    if compiled:
        encoders.compile_blocks(encoder.vit)
    if stats is None:
        say(f"measuring the latent statistics on {min(args.stats_images, len(source))} images")
        order = np.random.default_rng(args.seed).permutation(len(source))[: args.stats_images]
        chosen = [(int(i), encoders.random_key(args.seed, int(i))) for i in order[args.rank :: args.world_size]]
        chosen = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
        with autocast:
            loader = encoders.make_loader(
                images, tqdm(chosen, "statistics", disable=not main_rank), args.workers, device
            )
            stats = encoders.latent_statistics(encoder, loader, device, args.distributed)
    stats = {key: value.to(device) for key, value in stats.items()}
    batches = encoders.training_batches(
        len(source), args.batch, micro_batch, range(start, total), args.seed, args.rank, args.world_size
    )
    loader = iter(encoders.make_loader(images, batches, args.workers, device))

    # Model, moving average, optimiser.
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = ModelEmaV3(model, decay=args.ema, exclude_buffers=True).requires_grad_(False)  # not compiled, in eval mode
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    skipped = replaced = 0
    if last:
        try:
            model.load_state_dict(last["model"])
            ema.module.load_state_dict(last["ema"])
            optimizer.load_state_dict(last["optimizer"])
            skipped, replaced = last["skipped"], last["replaced"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return f"{args.out}/last.pt is damaged or of another version ({reason}): put back a copy"
        del last
    if compiled:
        encoders.compile_blocks(model)
    wrapped = model
    if args.distributed:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    say(
        f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(source)} images, "
        f"{num_classes} classes; time shift {shift:.2f}; batch {args.batch} = {args.world_size} processes x "
        f"{accumulate} x {micro_batch}; steps {start} to {total}"
    )

    def due(step, epochs):
        """Which interval of so many epochs ends with this step: 1, 2, ...; 0: none does."""
        count = round(step / (epochs * steps_per_epoch)) if epochs else 0
        return count if step == round(count * epochs * steps_per_epoch) else 0

    def checkpoint(step):
        """last.pt, to go on, and dit.pt, to sample from."""
        result = dict(kind="dit", config=model.config, model=ema.module.state_dict(), stats=stats, shift=shift,
                      encoder=encoder.record, label_dropout=args.label_dropout,
                      epoch=step / steps_per_epoch)  # fmt: skip
        last = dict(kind="train_dit", args=recorded, step=step, model=model.state_dict(), stats=stats,
                    ema=ema.module.state_dict(), optimizer=optimizer.state_dict(), skipped=skipped,
                    replaced=replaced)  # fmt: skip
        files = {args.out / "stat.pt": stats, args.out / "dit.pt": result}
        if kept := due(step, args.keep_every):
            files[args.out / f"dit-{kept * args.keep_every:g}.pt"] = result
        if main_rank:
            encoders.save(files | {args.out / "last.pt": last})

    def online_fid():
        """FID of the EMA weights, unguided, class-balanced; all ranks draw. None if one of them was told to stop."""
        statistics = fid.FeatureStatistics(2048, device)
        share = range(args.rank, args.fid_num, args.world_size)
        parts = range(0, -(-args.fid_num // args.world_size), micro_batch)
        for i in tqdm(parts, "FID", leave=False, disable=not main_rank):
            if over_ranks(bool(stopping)) != [0]:
                return None
            if indices := share[i : i + micro_batch]:
                labels = [i % max(num_classes, 1) for i in indices]
                drawn = draw_samples(ema.module, decoder, stats, shift, args.seed, indices, labels)  # (B, H, W, 3)
                statistics.update(inception(drawn.permute(0, 3, 1, 2))[0])
        statistics.all_reduce()
        return fid.frechet_distance(statistics.mean, statistics.cov, reference["mu"], reference["sigma"])

    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    generator = torch.Generator(device)
    log = Log(args.out / "log.csv", start, device, main_rank)
    bar = tqdm(total=total, initial=start, unit="step", disable=not main_rank, dynamic_ncols=True)
    bad_in_a_row = 0
    for done in range(start + 1, total + 1):
        lr = lr_at((done - 1) / steps_per_epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        broken = 0
        for micro in range(accumulate):
            pixels, labels, keys, unreadable = next(loader)  # (B, 3, S, S) uint8, (B,), (B,), (B,)
            broken += unreadable.sum()
            pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            t, noise, drop = draw(keys, shape, args, generator)
            t = dit.time_shift(t, shift)
            labels = torch.where(drop | (num_classes == 0), model.null_class, labels)
            sync = micro == accumulate - 1 or not args.distributed  # the ranks' gradients meet at the last micro-batch
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                with autocast:
                    x = dit.normalize(encoder(pixels.float() / 255), stats)  # (B, C, H, W)
                    losses = dit.flow_matching_loss(wrapped, x, labels, t, noise)  # (B,)
                (losses.sum() / local_batch).backward()
            log.add(losses.detach(), t)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)  # of all ranks' gradient

        # One wait for the GPU in each step. A step whose gradient is not finite never reaches weights or average.
        norm, broken, stop = over_ranks(norm / args.world_size, broken, bool(stopping))
        replaced += int(broken)
        if math.isfinite(norm):
            optimizer.step()
            ema.update(model)
            log.norms.append(norm)
            bad_in_a_row = 0
        else:
            skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
        optimizer.zero_grad(set_to_none=True)

        bar.update()
        now = dict(step=done, epoch=f"{done / steps_per_epoch:.4f}")
        end = done == total or stop or bad_in_a_row == 20
        if done % args.log_every == 0 or end:
            row, seconds = log.interval(done, args.batch)
            row |= dict(lr=f"{lr:.4e}", skipped=skipped, replaced=replaced)
            log.write(bar, now | row, left=datetime.timedelta(seconds=int((total - done) * seconds)))
        if due(done, args.save_every) or due(done, args.keep_every) or end:
            checkpoint(done)
        if bad_in_a_row == 20:
            return (f"stopped at step {done}: the gradient was not finite 20 times in a row; {args.out}/last.pt holds "
                    "the weights from before. Try --precision tf32, --qk-norm or a smaller --lr")  # fmt: skip
        if stop:
            say(f"stopped and saved at step {done}; the same command resumes")
            return
        began = time.perf_counter()
        if decoder and main_rank and args.preview_every and (due(done, args.preview_every) or done == total):
            labels = [i * num_classes // 16 for i in range(16)]
            pictures = draw_samples(ema.module, decoder, stats, shift, args.seed, range(16), labels)
            decoders.image_grid(pictures.cpu(), 8).save(args.out / f"preview-{done / steps_per_epoch:.2f}.png")
        if args.fid_every and (due(done, args.fid_every) or done == total):
            if (score := online_fid()) is not None:
                log.write(bar, now | dict(fid=f"{score:.4f}"))
        log.time += time.perf_counter() - began  # the log's speed is that of training
    bar.close()


def main(argv=None):
    parser, args = parse_args(argv)
    problem = encoders.guard(train, parser, args)
    if args.distributed:  # only here, where all ranks agree: one that fails alone must not wait for the others
        dist.destroy_process_group()
    if problem:
        sys.exit(problem if args.rank == 0 else 1)


if __name__ == "__main__":
    main()
