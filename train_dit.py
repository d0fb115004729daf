"""Stage 2: train a diffusion transformer on the latents of a frozen encoder.

    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/                      # DiT-DH-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/ --preset imagenet512
    python train_dit.py --data photos/ --init runs/imagenet256/dit/dit.pt --batch 64 --epochs 320 --out runs/photos/dit
    python train_dit.py --preset demo                                                # no data, no GPU, minutes

Running the same command again resumes. Paper: arXiv 2510.11690, sections 4 and 5. Files written to --out:
    dit.pt          EMA weights, configuration, class names and latent statistics, for sample.py
    last.pt         full training state, for an exact resume
    stat.pt         latent statistics
    log.csv         one row per logged interval, with the loss by bins of the shifted t
    preview-*.png   samples of the EMA weights from fixed noise, if there is a decoder
    dit-*.pt        copies of dit.pt at the steps of --keep-every: guides for AutoGuidance, points of an FID curve

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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from decoder import image_grid, load_decoder, to_uint8
from dit import (SIZES, DiT, denormalize, flow_matching_loss, guided, load_dit, load_stats, normalize, sample,
                 sample_noise, shift_strength, time_shift)
from encoder import (ENCODERS, Encoder, Images, center_crop_flip, check_latents, decoder_pixels, default_workers,
                     image_source, latent_statistics, make_loader, random_key, training_batches)

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
SWITCH = dict(action="store_true")
RECIPE = {
    # flag           paper        demo           meaning, and where our default differs from the paper's
    "size":          (256,         32,            "image side in pixels"),
    "encoder":       ("dinov2-b",  "random-tiny", f"{', '.join(ENCODERS)}, or the name of a timm ViT"),
    "layers":        ([],          [],            "blocks to average (default: the last)", dict(type=int, nargs="+")),
    "model":         ("DiT-DH-XL", "DiT-DH-tiny", "model size; DH: with the wide DDT head", dict(choices=SIZES)),
    "qk_norm":       (False,       False,         "RMSNorm on q and k, for bf16 training; not in the paper", SWITCH),
    "unconditional": (False,       False,         "train without labels", SWITCH),
    "shift_base":    (4096.0,      512.0,         "base of the time shift sqrt(C H W / base); --init keeps its own"),
    "epochs":        (80.0,        11.0,          "length of training; the paper also trains 800 at 256 px"),
    "batch":         (1024,        32,            "images per step, over all processes"),
    "lr":            (2e-4,        3e-3,          "learning rate of AdamW, betas (0.9, 0.95), no weight decay"),
    "lr_end":        (2e-5,        1e-4,          "learning rate from --decay-end on"),
    "warmup":        (0.0,         0.4,           "epochs of linear warm-up"),
    "decay_start":   (40.0,        4.0,           "epoch at which --lr starts to decay linearly; plain DiT: never"),
    "decay_end":     (800.0,       0.0,           "epoch at which the decay ends; 0: at the end of training"),
    "clip":          (1.0,         1.0,           "largest gradient norm; 0: no clipping, as for the plain DiT"),
    "ema":           (0.9995,      0.995,         "EMA decay of the weights; plain DiT: 0.9999"),
    "label_dropout": (0.1,         0.1,           "probability of replacing a label by the null class"),
    "seed":          (0,           0,             "seed of the weights and of all random numbers"),
}
RUN = {  # a resumed run may change these, if the number of images and the classes stay the same
    "data":            (None,  "shapes", "folder with one folder per class; or `shapes`, drawn on the fly"),
    "encoder_weights": (None,  None,     "local file, instead of the download"),
    "init":            (None,  None,     "weights to start from (published: with --stats); ignored on resume"),
    "stats":           (None,  None,     "latent statistics (default: those of --init, or measured)"),
    "stats_images":    (50000, 4000,     "images to measure the statistics on"),
    "out":             (None,  None,     "folder for the files above (default: runs/<preset>/dit)"),
    "decoder":         (None,  None,     "for previews (default: that of runs/<preset>, if it fits)"),
    "micro_batch":     (32,    32,       "largest batch of one forward pass; 32 is for DiT-DH-XL on 80 GB"),
    "checkpointing":   (False, False,    "activation checkpointing: less memory, slower", SWITCH),
    "precision":       ("tf32", "tf32",  "of matrix products", dict(choices=("tf32", "float32", "bf16"))),
    "compile":         ("auto", "auto",  "torch.compile; auto: on CUDA", dict(choices=("auto", "on", "off"))),
    "device":          (DEVICES[0], DEVICES[0], "device of this process", dict(choices=DEVICES)),
    "workers":         (default_workers(), 0, "loader processes for each GPU; the default depends on the cores"),
    "log_every":       (100,   100,      "steps between rows of log.csv"),
    "preview_every":   (5000,  500,      "steps between previews; 0: none"),
    "save_every":      (1000,  500,      "steps between checkpoints"),
    "keep_every":      (0,     0,        "steps between copies dit-<step>.pt that are kept; 0: none"),
}
IMAGENET512 = dict(size=512, epochs=400.0, micro_batch=8)
PLAIN_DIT = dict(decay_start=math.inf, clip=0.0, ema=0.9999)  # the paper's recipe for the plain DiT
MAY_DIFFER = ("epochs", "lr", "lr_end")  # of RECIPE, on resume

# --- Parts of the method ---------------------------------------------------------------------------------------------


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a step, counted from 0: linear warm-up, constant, then linear from lr to lr_end."""
    warmup = min(1.0, (step + 1) / max(1, args.warmup * steps_per_epoch))
    epoch, end = step / steps_per_epoch, args.decay_end or args.epochs
    if epoch <= args.decay_start:
        return warmup * args.lr
    progress = min(1.0, (epoch - args.decay_start) / max(end - args.decay_start, 1e-9))
    return warmup * (args.lr + progress * (args.lr_end - args.lr))


def step_randomness(keys, labels, shape, null_class, label_dropout, generator):
    """All random numbers of a step that are made on the device; the loader makes those of the flips.

    keys (B,): a seed for each image in each epoch (see `training_batches`). So the numbers depend neither on the batch
    nor on the number of processes, and a resumed run repeats them without saving a generator's state.
    Returns t (B,) in (0, 1), logit-normal (section 4), not yet shifted; noise (B, C, H, W); labels (B,), each replaced
    by the null class with probability `label_dropout`, for classifier-free guidance.
    """
    B, device = len(keys), generator.device
    normal, uniform = torch.empty(B, 1, device=device), torch.empty(B, 1, device=device)
    noise = torch.empty(B, *shape, device=device)
    for i, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        noise[i].normal_(generator=generator)
        normal[i].normal_(generator=generator)
        uniform[i].uniform_(generator=generator)
    t = normal[:, 0].sigmoid()  # logit-normal(0, 1)
    return t, noise, labels.where(uniform[:, 0] >= label_dropout, null_class)


def measure_statistics(args, encoder, images, micro_batch, rank, world_size, device):
    """Latent statistics of --stats-images images, chosen by the seed; each rank encodes its part of them."""
    order = np.random.default_rng(args.seed).permutation(len(images))[: args.stats_images]
    if len(order) < 8:
        raise ValueError(f"{len(order)} images are too few for latent statistics: give at least 8, or --stats stat.pt")
    items = [(int(i), random_key(args.seed, int(i))) for i in order[rank::world_size]]
    batches = [items[i : i + micro_batch] for i in range(0, len(items), micro_batch)]
    bar = tqdm(batches, "latent statistics", disable=rank > 0)  # advances as the loader takes batches
    return latent_statistics(encoder, make_loader(images, bar, args.workers, device), device)


LOSS_BY_TIME = [f"loss_t{i / 5:.1f}" for i in range(5)]


def losses_by_time(losses, t):
    """The losses (B,) for each fifth of t in [0, 1]: NaN for images with t (B,) outside it, which the log ignores."""
    fifth = (5 * t).long().clamp(max=4)
    return {name: losses.where(fifth == i, math.nan) for i, name in enumerate(LOSS_BY_TIME)}


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

    # An earlier run in this folder: resume it.
    settings = {name: value for name, value in vars(args).items() if name in RECIPE and name not in MAY_DIFFER}
    settings |= dict(kind="train_dit", images=len(source), classes=source.classes)
    saved = load_last(args.out, "dit.pt", settings)
    start = saved["step"] if saved else 0
    if start >= total:
        say(f"finished: {args.out}/dit.pt has all {start} steps; raise --epochs to train longer")
        return 0

    # The frozen encoder, the decoder for previews, and the model.
    say(f"{source.summary()}\nloading the encoder {args.encoder}")
    encoder = Encoder(args.encoder, args.size, args.encoder_weights, args.layers).to(device)
    decoder = preview_decoder(args, encoder) if rank == 0 else None
    num_classes = 0 if args.unconditional else len(source.classes)
    label_dropout = 1.0 if args.unconditional else args.label_dropout
    torch.manual_seed(args.seed)
    model = DiT(encoder.latent_shape[0], encoder.grid, num_classes, **SIZES[args.model], qk_norm=args.qk_norm)

    # Weights, time shift (section 4) and latent statistics: from last.pt, else from --init, else new.
    info = {} if saved or not args.init else load_initial(args, model, encoder)
    shift = (saved or info).get("shift", shift_strength(encoder.latent_shape, args.shift_base))
    stats = (saved or info).get("stats")
    if args.stats and not saved:
        stats = load_stats(args.stats, encoder.latent_shape)
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":
        compile_blocks(encoder.vit, model)  # before DDP; the EMA is not compiled
    ddp = wrap_ddp(model, world_size)
    images = Images(source, functools.partial(center_crop_flip, size=args.size))
    if stats is None:
        with autocast:
            stats = measure_statistics(args, encoder, images, micro_batch, rank, world_size, device)
    stats = {key: value.to(device) for key, value in stats.items()}
    columns = ["step", "epoch", "loss", *LOSS_BY_TIME, "grad_norm", "lr", "images_per_s", "memory_gb"]
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.csv", columns, saved["log_bytes"] if saved else 0, start, rank)
    saved = None  # last.pt is memory-mapped: release it

    def save(step):
        result = dict(kind="dit", config=model.config, model=ema.state_dict(), stats=stats, shift=shift,
                      encoder=encoder.record, label_dropout=label_dropout, epoch=step / steps_per_epoch,
                      classes=source.classes if num_classes else [])
        files = {args.out / "stat.pt": stats, args.out / "dit.pt": result}
        if due(step, args.keep_every):
            files[args.out / f"dit-{step}.pt"] = result
        last = dict(settings=settings, step=step, model=model.state_dict(), ema=ema.state_dict(), stats=stats,
                    optimizer=optimizer.state_dict(), shift=shift, log_bytes=log.file.tell())
        save_checkpoint(files | {args.out / "last.pt": last})  # last.pt is renamed last: the others are never older

    def preview(step):
        labels = torch.arange(16, device=device) * num_classes // 16
        noise = sample_noise(args.seed, range(16), encoder.latent_shape).to(device)
        x = sample(guided(ema, labels), noise, shift=shift)  # (16, C, H, W)
        pictures = to_uint8(decoder(denormalize(x, stats))).cpu()  # (16, S, S, 3)
        image_grid(pictures, 8).save(args.out / f"preview-{step}.png")

    say(f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; time shift {shift:.2f}; "
        f"batch {args.batch} = {world_size} processes x {accumulate} x {micro_batch}; {total} steps, "
        f"{steps_per_epoch:.4g} per epoch; from step {start}")
    parts = training_batches(len(source), args.batch, micro_batch, range(start, total), args.seed, rank, world_size)
    batches = iter(make_loader(images, parts, args.workers, device))
    generator = torch.Generator(device)
    signals = catch_signals(rank)
    for step in tqdm(range(start, total), "training", total, initial=start, disable=rank > 0, dynamic_ncols=True):
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, args, steps_per_epoch)
        for micro in range(accumulate):
            ddp.require_backward_grad_sync = micro == accumulate - 1  # all-reduce gradients in the last backward only
            pixels, labels, keys = next(batches)  # (B, 3, S, S) uint8, (B,), (B,)
            pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            t, noise, labels = step_randomness(keys, labels, encoder.latent_shape, model.null_class, label_dropout,
                                               generator)  # (B,), (B, C, H, W), (B,)
            t = time_shift(t, shift)  # section 4: t' = a t / (1 + (a - 1) t)
            with autocast:
                x = normalize(encoder(pixels.float() / 255), stats)  # (B, C, H, W)
                # x_t = (1 - t) x + t noise; the loss of an image is the mean of (v(x_t, t, label) - (noise - x))^2
                losses = flow_matching_loss(ddp, x, labels, t, noise)  # (B,)
            (losses.sum() / local_batch).backward()  # DDP averages over ranks: the gradient of the batch's mean
            log.add(loss=losses, **losses_by_time(losses, t))
        norm = clip_grad_norm_(model.parameters(), args.clip or math.inf)  # inf: only measured
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

        done = step + 1
        end = done == total or number > 0
        if due(done, args.log_every) or end:
            log.write(done, total, done / steps_per_epoch, args.batch, lr=lr)
        if decoder and (due(done, args.preview_every) or done == total):
            preview(done)
        if rank == 0 and (due(done, args.save_every) or due(done, args.keep_every) or end):
            save(done)  # after the preview, which a resumed run would not repeat
        if end:
            break
    if done < total:
        say(f"stopped and saved at step {done}; running the same command again resumes")
    if unreadable := int(images.unreadable.sum()):
        print(f"rank {rank}: {unreadable} images could not be read, see above; others replaced them", flush=True)
    return int(number) if done < total else 0


# --- Initial weights, and the decoder for previews -------------------------------------------------------------------


def load_initial(args, model, encoder):
    """Copy the weights of --init into the model -> the rest of its file: {"stats", "shift", ...}.

    If the numbers of classes differ, only the null class, the last row of the class table, is copied.
    Raises ValueError for another model or other latents, and without latent statistics.
    """
    trained, info = load_dit(args.init)
    check_latents(f"--init {args.init}", info, trained, encoder.record, encoder.latent_shape)
    differ = [f"{key} {value} instead of {model.config[key]}" for key, value in trained.config.items()
              if value != model.config[key] and key != "num_classes"]
    if differ:
        raise ValueError(f"--init {args.init} is another model: {', '.join(differ)}; choose --model and --qk-norm")
    if "stats" not in info and not args.stats:
        raise ValueError(f"--init {args.init} has no latent statistics: give them with --stats")
    state, table = trained.state_dict(), "y_embedder.embedding_table.weight"
    if trained.num_classes != model.num_classes:
        state[table] = torch.cat([model.state_dict()[table][:-1], state[table][-1:]])
    model.load_state_dict(state)
    return info


def preview_decoder(args, encoder):
    """--decoder, or else the decoder in runs/<preset>/, if it fits the latents; None for no previews.

    Raises ValueError if --decoder does not fit.
    """
    path = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    if not args.preview_every or not args.decoder and not path.exists():
        say("no previews")
        return None
    decoder, info = load_decoder(path, decoder_pixels(args.encoder), encoder.grid)
    try:
        check_latents(f"--decoder {path}", info, decoder, encoder.record, encoder.latent_shape)
    except ValueError as error:
        if args.decoder:
            raise
        say(f"no previews: {error}")
        return None
    return decoder.to(encoder.mean.device)


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
    parser, args = parse_flags(argv, __doc__, RECIPE | RUN, IMAGENET512, lambda args: (
        PLAIN_DIT if "DH" not in args.model and args.preset != "demo" else {}))
    args.out = Path(args.out or Path("runs", args.preset, "dit"))
    if args.data is None:
        parser.error("--data is missing: give a folder of images, or `shapes`")
    if 0 < args.decay_end < args.decay_start < math.inf:
        parser.error(f"--decay-end {args.decay_end:g} is before --decay-start {args.decay_start:g}")
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
