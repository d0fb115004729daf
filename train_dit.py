"""Stage 2: train a diffusion transformer to draw the latents of a frozen encoder.

    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/                      # DiT-DH-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/ --preset imagenet512
    python train_dit.py --data photos/ --init runs/imagenet256/dit/dit.pt --epochs 20 --out runs/photos/dit
    python train_dit.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, sections 4 and 5. It writes to --out:
    dit.pt          EMA weights, configuration and latent statistics: what sample.py reads
    last.pt         everything that is needed to go on exactly where training stopped
    stat.pt         the latent statistics
    log.csv         one row for each logged interval, with the loss by bins of t
    preview-*.png   samples of the EMA weights from fixed noise, when there is a decoder
"""

import argparse
import contextlib
import csv
import datetime
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3, init_distributed_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import decoder as decoders
import dit
import encoder as encoders

IMAGENET = dict(
    encoder="dinov2-b", size=256, model="DiT-DH-XL", epochs=80, batch=1024, micro_batch=32, lr=2e-4, lr_end=2e-5,
    warmup=0.0, decay_start=40.0, decay_end=800.0, clip=1.0, ema=0.9995, shift_base=4096.0, precision="tf32",
    stats_images=50000, preview_every=5.0, save_every=1.0, log_every=100,
)  # fmt: skip
PRESETS = {
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(size=512, epochs=400, micro_batch=8),
    "demo": IMAGENET | dict(
        data="shapes", encoder="random-tiny", size=32, model="DiT-DH-tiny", epochs=14, batch=64, micro_batch=64,
        lr=3e-3, lr_end=3e-4, warmup=1.0, decay_start=9.0, decay_end=14.0, ema=0.995, shift_base=512.0,
        precision="float32", stats_images=4000, preview_every=4.0, save_every=4.0, log_every=50,
    ),
}  # fmt: skip
PLAIN_DIT = dict(decay_start=math.inf, decay_end=math.inf, clip=0.0, ema=0.9999)  # the paper's, for models without head
T_BINS = 5  # the loss is logged for t in [0, 0.2), [0.2, 0.4), ...
# Arguments that may change between runs in one folder: they do not shape the result.
FREE = {"out", "data", "epochs", "preview_every", "keep_every", "save_every", "log_every", "micro_batch", "device",
        "workers", "compile", "checkpointing", "decoder", "encoder_weights", "fid_every", "fid_reference", "fid_num",
        "inception_weights"}  # fmt: skip


def parse_args(argv):
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--preset", default="imagenet256")
    pre.add_argument("--model")
    known, _ = pre.parse_known_args(argv)
    defaults = dict(PRESETS.get(known.preset, {}))
    if known.model and "DH" not in known.model:
        defaults |= PLAIN_DIT

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet256", help="the set of defaults")
    add("--data", required="data" not in defaults, help="folder of images, with a folder for each class; or `shapes`")
    add("--out", help="folder for everything written (default runs/<preset>/dit)")
    add("--encoder", help=f"{', '.join(encoders.ENCODERS)}, or a timm ViT by its name")
    add("--encoder-weights", metavar="PATH", help="local file instead of timm's download")
    add("--decoder", metavar="PATH", help="draw previews with it (default runs/<preset>/decoder/decoder.pt, if there)")
    add("--stats", metavar="PATH", help="latent statistics; measured on the data where not given")
    add("--stats-images", type=int, help="images that the statistics are measured on")
    add("--init", metavar="PATH", help="start from these weights, ours or published, with a new class table if needed")
    add("--size", type=int, help="image size in pixels")
    add("--model", choices=dit.SIZES, help="size of the diffusion model")
    add("--qk-norm", action="store_true", help="RMSNorm on queries and keys; advised with bf16 (the paper: without)")
    add("--allow-narrow", action="store_true", help="train a model narrower than its tokens, against Theorem 1")
    add("--unconditional", action="store_true", help="train without labels")
    add("--epochs", type=float, help="length of training; the paper: 80 and 800 at 256 px, 400 at 512 px")
    add("--batch", type=int, help="images in a step, over all processes")
    add("--micro-batch", type=int, help="at most this many images in a forward of one process")
    add("--lr", type=float, help="learning rate of AdamW (betas 0.9, 0.95, no weight decay)")
    add("--lr-end", type=float, help="learning rate at --decay-end and after")
    add("--warmup", type=float, help="epochs of linear warm-up from zero")
    add("--decay-start", type=float, help="epoch where the linear decay begins; inf: constant")
    add("--decay-end", type=float, help="epoch where the linear decay ends, also beyond --epochs")
    add("--clip", type=float, help="largest gradient norm; 0: no clipping")
    add("--ema", type=float, help="decay of the weights' moving average in each step")
    add("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    add("--shift-base", type=float, help="time shift a = sqrt(C H W / base), at least 1")
    add("--precision", choices=["float32", "tf32", "bf16"], help="of matrix products; tf32 is float32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add("--preview-every", type=float, metavar="EPOCHS", help="interval of preview pictures; 0: none")
    add("--save-every", type=float, metavar="EPOCHS", help="interval of dit.pt and last.pt")
    add("--keep-every", type=float, default=0.0, metavar="EPOCHS", help="interval of dit-<epoch>.pt; 0: none")
    add("--log-every", type=int, metavar="STEPS", help="interval of the log")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="loader processes for each GPU (default: by cores, at most 12; 0 for `shapes`)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"runs/{args.preset}/dit")
    if not args.decoder and os.path.exists(default := f"runs/{args.preset}/decoder/decoder.pt"):
        args.decoder = default
    for name in ("epochs", "batch", "micro_batch", "lr", "log_every", "save_every", "stats_images", "shift_base"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    for name in ("warmup", "clip", "lr_end", "preview_every", "keep_every", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if not 0 <= args.ema < 1 or not 0 <= args.label_dropout < 1:
        parser.error(f"--ema {args.ema}, --label-dropout {args.label_dropout}: must be at least 0 and below 1")
    if args.decay_end < args.decay_start:
        parser.error(f"--decay-end {args.decay_end}: must not be before --decay-start {args.decay_start}")
    return parser, args


def lr_at(epoch, args):
    """Learning rate: linear warm-up from zero, constant, then linear from lr to lr_end."""
    warm = min(1.0, epoch / args.warmup) if args.warmup else 1.0
    if epoch <= args.decay_start:
        return warm * args.lr
    done = min(1.0, (epoch - args.decay_start) / max(args.decay_end - args.decay_start, 1e-9))
    return warm * (args.lr + done * (args.lr_end - args.lr))


def save(content, path):
    """Write a checkpoint beside its place, then move it there: what is at `path` is always whole."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        Path(temporary).unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}); what was there before is untouched: make room, run again to resume")


def draw(keys, shape, args, generator):
    """Everything random of a training step: times, noise, dropped labels; each image's from its own key.

    Returns t (B,), logit-normal (section 4.3), not yet shifted; noise (B, C, H, W); drop (B,), bool.
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


def read_last(folder, recorded):
    """last.pt of a run to resume, or None. Refuses a folder that holds another run, naming what differs."""
    path = folder / "last.pt"
    if not path.exists():
        if (folder / "dit.pt").exists():
            raise ValueError(f"{folder} holds a dit.pt but no last.pt to resume from: choose another --out")
        return None
    try:
        last = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        theirs = last["args"]
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of this script ({type(error).__name__}): move it away") from None
    differ = [f"{key} {theirs.get(key)}, now {recorded.get(key)}" for key in sorted(recorded.keys() | theirs.keys())
              if theirs.get(key) != recorded.get(key)]  # fmt: skip
    if differ:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(differ)}): choose another --out")
    return last


def start_from(path, model):
    """Copy the weights of --init into the model; a class table of another size stays new."""
    trained, _ = dit.load_dit(path)
    differ = [key for key in model.config if key != "num_classes" and model.config[key] != trained.config[key]]
    if differ:
        wanted = ", ".join(f"{key} {trained.config[key]} instead of {model.config[key]}" for key in differ)
        raise ValueError(f"--init {path} is another model: {wanted}; choose --model, --encoder and --size to match")
    state = trained.state_dict()
    if trained.num_classes != model.num_classes:
        del state["y_embedder.embedding_table.weight"]
    model.load_state_dict(state, strict=False)


def draw_samples(model, decoder, stats, shift, seed, indices, labels, steps=50):
    """Images (n, H, W, 3) uint8 on the CPU, unguided; starting noise i is a function of (seed, i)."""
    shape, device = stats["mean"].shape, stats["mean"].device
    noise = dit.sample_noise(seed, indices, shape).to(device)
    labels = torch.as_tensor(labels, device=device)
    return decoders.to_uint8(
        decoder(dit.denormalize(dit.sample(dit.guided(model, labels), noise, steps, shift), stats))
    ).cpu()


class Log:
    """Averages since the last row over steps and ranks: one line on the terminal and one row in log.csv."""

    def __init__(self, path, start, device, main_rank):
        self.device, self.main_rank = device, main_rank
        if main_rank:
            rows = list(csv.DictReader(open(path))) if start and path.exists() else []
            rows = [row for row in rows if int(row["step"]) <= start]  # steps after the checkpoint are done again
            self.file = open(path, "w", newline="")
            fields = ["step", "epoch", "loss", *(f"loss_t{i / T_BINS:.1f}" for i in range(T_BINS)), "lr", "grad_norm",
                      "images_per_s", "memory_gb", "skipped", "replaced"]  # fmt: skip
            self.csv = csv.DictWriter(self.file, fields)
            self.csv.writeheader()
            self.csv.writerows(rows)
            self.file.flush()
        self.reset(start)

    def reset(self, step):
        self.sums = torch.zeros(2, T_BINS, device=self.device)  # of losses and of images, for each bin of t
        self.step, self.time = step, time.perf_counter()

    def add(self, losses, t):
        bins = (t * T_BINS).long().clamp(max=T_BINS - 1)
        self.sums.index_add_(1, bins, torch.stack([losses, torch.ones_like(losses)]))

    def write(self, bar, step, epoch, lr, norm, batch, skipped, replaced, total):
        counts = torch.tensor([float(replaced)], device=self.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
            torch.distributed.all_reduce(counts)
        losses, images = self.sums.tolist()
        loss = sum(losses) / sum(images)
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.main_rank:
            by_t = {
                f"loss_t{i / T_BINS:.1f}": f"{losses[i] / images[i]:.5f}" if images[i] else "" for i in range(T_BINS)
            }
            row = dict(step=step, epoch=f"{epoch:.4f}", loss=f"{loss:.6f}", **by_t, lr=f"{lr:.3e}",
                       grad_norm=f"{norm:.4f}", images_per_s=f"{batch / seconds:.1f}", memory_gb=f"{memory:.2f}",
                       skipped=skipped, replaced=int(counts))  # fmt: skip
            self.csv.writerow(row)
            self.file.flush()
            left = int((total - step) * seconds)
            bar.write(
                f"step {step}/{total} epoch {epoch:.2f} loss {loss:.4f} lr {lr:.2e} norm {norm:.3f} "
                f"{batch / seconds:.0f} images/s {memory:.1f} GB {datetime.timedelta(seconds=left)} left"
                + (f", {skipped} steps skipped" if skipped else "")
                + (f", {int(counts)} images replaced" if counts else "")
            )
        self.reset(step)


def main(argv=None):
    parser, args = parse_args(argv)
    recorded = {key: value for key, value in vars(args).items() if key not in FREE}
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = init_distributed_device(args)
    main_rank = args.rank == 0
    say = print if main_rank else (lambda _: None)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = args.precision != "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # What the run is made of. Bad input ends here, in one line, before any long work.
    try:
        local_batch, rest = divmod(args.batch, args.world_size)
        if rest:
            raise ValueError(f"--batch {args.batch} does not divide over {args.world_size} processes")
        micro_batch = max(size for size in range(1, args.micro_batch + 1) if local_batch % size == 0)
        source = encoders.image_source(args.data, args.size)
        encoder = encoders.Encoder(args.encoder, args.size, args.encoder_weights).to(device)
        shape = (encoder.latent_dim, encoder.grid, encoder.grid)
        shift = dit.shift_for(shape, args.shift_base)
        torch.manual_seed(args.seed)
        num_classes = 0 if args.unconditional else len(source.classes)
        model = dit.DiT(encoder.latent_dim, encoder.grid, num_classes, **dit.SIZES[args.model], qk_norm=args.qk_norm,
                        allow_narrow=args.allow_narrow)  # fmt: skip
        if args.init:
            start_from(args.init, model)
        decoder = None
        if args.decoder:
            decoder, _ = decoders.load_decoder(args.decoder, encoders.ENCODERS.get(args.encoder, {}).get("pixels"))
            if (decoder.config["latent_dim"], decoder.config["grid"]) != shape[:2]:
                raise ValueError(f"{args.decoder} decodes other latents than those of {args.encoder} at {args.size} px")
            decoder.to(device)
        recorded |= dict(images=len(source), classes=num_classes)
        last = read_last(args.out, recorded)
        stats = None
        if last or args.stats or (args.out / "stat.pt").exists():
            stats = last["stats"] if last else encoders.load_stats(args.stats or args.out / "stat.pt", shape)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    steps_per_epoch = len(source) / args.batch
    total = max(1, round(args.epochs * steps_per_epoch))
    start = last["step"] if last else 0
    if start >= total:
        print(f"finished: {args.out}/dit.pt has its {start / steps_per_epoch:g} epochs; --epochs goes on")
        return
    args.out.mkdir(parents=True, exist_ok=True)

    # The loader, and the latent statistics: the same transform for both.
    workers = args.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if args.data == "shapes" else max(1, min(12, cores - 1))
    images = encoders.Images(source, lambda image, rng: encoders.center_crop_flip(image, args.size, rng))
    if args.compile or args.compile is None and device.type == "cuda":
        for block in [*encoder.vit.blocks, *model.blocks]:  # block by block: quick to compile, overlaps with DDP
            block.compile()
    if stats is None:
        say(f"measuring the latent statistics on {min(args.stats_images, len(source))} images")
        order = np.random.default_rng(args.seed).permutation(len(source))[: args.stats_images]
        chosen = [(int(i), encoders.random_key(args.seed, int(i))) for i in order[args.rank :: args.world_size]]
        chosen = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
        with autocast:
            loader = encoders.make_loader(images, tqdm(chosen, "statistics", disable=not main_rank), workers, device)
            stats = encoders.latent_statistics(encoder, loader, device, args.distributed)
    stats = {key: value.to(device) for key, value in stats.items()}
    batches = encoders.training_batches(
        len(source), args.batch, micro_batch, range(start, total), args.seed, args.rank, args.world_size
    )
    loader = iter(encoders.make_loader(images, batches, workers, device))

    # Model, moving average, optimiser.
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = ModelEmaV3(model, decay=args.ema, exclude_buffers=True).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    skipped = replaced = 0
    if last:
        model.load_state_dict(last["model"])
        ema.module.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        skipped, replaced = last["skipped"], last["replaced"]
        del last
    wrapped = model
    if args.distributed:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    accumulate = local_batch // micro_batch
    say(
        f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(source)} images, "
        f"{num_classes} classes; time shift {shift:.2f}; batch {args.batch} = {args.world_size} processes x "
        f"{accumulate} x {micro_batch}; steps {start} to {total}"
    )

    def checkpoint(step):
        """Everything that is needed later: dit.pt to sample from, last.pt to go on."""
        epoch = step / steps_per_epoch
        result = dict(kind="dit", config=model.config, model=ema.module.state_dict(), stats=stats, shift=shift,
                      encoder=encoder.record, label_dropout=args.label_dropout, epoch=epoch)  # fmt: skip
        if main_rank:
            save(stats, args.out / "stat.pt")
            if keep and step % keep == 0:
                save(result, args.out / f"dit-{epoch:g}.pt")
            save(result, args.out / "dit.pt")
            save(dict(kind="train_dit", args=recorded, step=step, model=model.state_dict(), stats=stats,
                      ema=ema.module.state_dict(), optimizer=optimizer.state_dict(), skipped=skipped,
                      replaced=replaced), args.out / "last.pt")  # fmt: skip

    def every(epochs):
        return max(1, round(epochs * steps_per_epoch)) if epochs else 0

    save_every, keep, preview = every(args.save_every), every(args.keep_every), every(args.preview_every)
    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    generator = torch.Generator(device)
    log = Log(args.out / "log.csv", start, device, main_rank)
    bar = tqdm(total=total, initial=start, unit="step", disable=not main_rank, dynamic_ncols=True)
    bad_in_a_row = 0
    for step in range(start, total):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step / steps_per_epoch, args)
        for micro in range(accumulate):
            pixels, labels, keys, broken = next(loader)  # (B, 3, S, S) uint8, (B,), (B,), (B,)
            replaced += int(broken.sum())
            pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            t, noise, drop = draw(keys, shape, args, generator)
            t = dit.time_shift(t, shift)
            labels = torch.where(drop | (num_classes == 0), model.null_class, labels)
            sync = micro == accumulate - 1 or not args.distributed  # the ranks' gradients meet at the last micro-batch
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                with autocast:
                    x = dit.normalize(encoder(pixels.float() / 255), stats)  # (B, C, H, W)
                    losses = dit.flow_matching_loss(wrapped, x, labels, t, noise)  # (B,)
                (losses.mean() / accumulate).backward()
            log.add(losses.detach(), t)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)

        # One wait for the GPU in each step: is the gradient finite, and has any rank been told to stop?
        status = torch.stack([norm.float(), torch.tensor(float(bool(stopping)), device=device)])
        if args.distributed:
            torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX)
        norm, stop = status.tolist()
        bad_in_a_row = 0 if math.isfinite(norm) else bad_in_a_row + 1
        if bad_in_a_row:
            skipped += 1  # the weights and their average never see this step
        else:
            optimizer.step()
            ema.update(model)
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == total:
            lr = optimizer.param_groups[0]["lr"]
            log.write(bar, done, done / steps_per_epoch, lr, norm, args.batch, skipped, replaced, total)
        if preview and decoder and main_rank and (done % preview == 0 or done == total):
            labels = [i * num_classes // 16 for i in range(16)]
            with autocast:
                pictures = draw_samples(ema.module, decoder, stats, shift, args.seed, range(16), labels)
            decoders.image_grid(pictures, 8).save(args.out / f"preview-{done / steps_per_epoch:.2f}.png")
        if done % save_every == 0 or keep and done % keep == 0 or done == total or stop:
            checkpoint(done)
        if bad_in_a_row == 20:
            sys.exit(
                f"stopped at step {done}: the gradient was not finite 20 times in a row; {args.out}/last.pt is intact. "
                "Try --precision tf32, --qk-norm or a smaller --lr"
            )
        if stop:
            say(f"stopped and saved at step {done}; the same command resumes")
            break
    bar.close()
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
