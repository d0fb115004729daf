"""Stage 2: train a diffusion transformer to draw the latents of a frozen encoder.

    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/                      # DiT-DH-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/ --preset imagenet512
    python train_dit.py --data photos/ --init runs/imagenet256/dit/dit.pt --batch 64 --epochs 320 --out runs/photos/dit
    python train_dit.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, sections 4 and 5. It writes to --out:
    dit.pt          EMA weights, configuration, class names and latent statistics: what sample.py reads
    last.pt         everything that is needed to go on exactly where training stopped
    stat.pt         the latent statistics
    log.csv         one row for each logged interval, with the loss by bins of the shifted t
    preview-*.png   samples of the EMA weights from fixed noise, when there is a decoder
    dit-*.pt        dit.pt at the steps of --keep-every: guides for AutoGuidance, points of a FID curve
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
from encoder import (ENCODERS, Encoder, Images, center_crop_flip, decoder_pixels, default_workers, image_source,
                     latent_statistics, latents_of, make_loader, random_key, training_batches)

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
RECIPE = [
    # flag              paper        demo           meaning, and where the paper differs
    ("--size",          256,         32,            "image side in pixels"),
    ("--encoder",       "dinov2-b",  "random-tiny", f"{', '.join(ENCODERS)}, or a timm ViT by its name"),
    ("--layers",        [int],       [int],         "encoder blocks, from 0, whose mean is the latent; none: the last"),
    ("--model",         "DiT-DH-XL", "DiT-DH-tiny", "size of the model; DH: with the wide DDT head", *SIZES),
    ("--qk-norm",       False,       False,         "RMSNorm on q and k, for bf16 training; the paper: without"),
    ("--unconditional", False,       False,         "train without labels"),
    ("--shift-base",    4096.0,      512.0,         "base of the time shift sqrt(C H W / base); --init keeps its own"),
    ("--epochs",        80.0,        11.0,          "length of training; the paper: also 800 at 256 px"),
    ("--batch",         1024,        32,            "images in a step, over all processes"),
    ("--lr",            2e-4,        3e-3,          "learning rate of AdamW, betas (0.9, 0.95), no weight decay"),
    ("--lr-end",        2e-5,        1e-4,          "learning rate from --decay-end on"),
    ("--warmup",        0.0,         0.4,           "epochs of linear warm-up"),
    ("--decay-start",   40.0,        4.0,           "epoch where --lr begins to fall linearly; plain DiT: never"),
    ("--decay-end",     800.0,       0.0,           "epoch where the fall ends; 0: with the training"),
    ("--clip",          1.0,         1.0,           "largest gradient norm; 0: no clipping, as for the plain DiT"),
    ("--ema",           0.9995,      0.995,         "decay of the weights' average; plain DiT: 0.9999"),
    ("--label-dropout", 0.1,         0.1,           "share of labels replaced by the null class"),
    ("--seed",          0,           0,             "seed of the weights and of everything that is drawn"),
]
RUN = [  # a resumed run may change these, as long as its images are as many and of the same classes
    ("--data",          None,        "shapes",      "folder with a folder for each class; or `shapes`"),
    ("--encoder-weights", None,      None,          "local file, instead of the download"),
    ("--init",          None,        None,          "weights to start from (published: + --stats); ignored on resume"),
    ("--stats",         None,        None,          "latent statistics (default: of --init, or measured)"),
    ("--stats-images",  50000,       4000,          "images on which the statistics are measured"),
    ("--out",           None,        None,          "folder for what is written (default: runs/<preset>/dit)"),
    ("--decoder",       None,        None,          "for previews (default: that of runs/<preset>, if it fits)"),
    ("--micro-batch",   32,          32,            "most images in one forward, for DiT-DH-XL on 80 GB"),
    ("--checkpointing", False,       False,         "recompute activations in backward: less memory, slower"),
    ("--precision",     "tf32",      "tf32",        "of matrix products; on a CPU tf32 is float32", "tf32", "float32",
                                                    "bf16"),
    ("--compile",       "auto",      "auto",        "torch.compile; auto: on CUDA", "auto", "on", "off"),
    ("--device",        DEVICES[0],  DEVICES[0],    "device of this process", *DEVICES),
    ("--workers",       default_workers(), 0,       "loader processes for each GPU; by default by the cores"),
    ("--log-every",     100,         100,           "steps between rows of log.csv"),
    ("--preview-every", 5000,        500,           "steps between previews; 0: none"),
    ("--save-every",    1000,        500,           "steps between checkpoints"),
    ("--keep-every",    0,           0,             "steps between copies dit-<step>.pt that stay; 0: none"),
]
IMAGENET512 = {"--size": 512, "--epochs": 400.0, "--micro-batch": 8}
PLAIN_DIT = dict(decay_start=math.inf, clip=0.0, ema=0.9999)  # the paper's recipe for the plain DiT
MAY_DIFFER = {"--epochs", "--lr", "--lr-end"}  # rows of RECIPE that a resumed run may change too


def parse_args(argv):
    parser = make_parser(__doc__, RECIPE + RUN, IMAGENET512, argv)
    args = parser.parse_args(argv)
    if "DH" not in args.model and args.preset != "demo":
        parser.set_defaults(**PLAIN_DIT)
        args = parser.parse_args(argv)
    check_values(parser, args, {"size", "batch", "micro_batch", "epochs", "lr", "shift_base", "stats_images",
                                "log_every", "save_every"})
    args.out = Path(args.out or Path("runs", args.preset, "dit"))
    if args.data is None:
        parser.error("--data is missing: give a folder of images, or `shapes`")
    if 0 < args.decay_end < args.decay_start < math.inf:
        parser.error(f"--decay-start {args.decay_start:g} comes after --decay-end {args.decay_end:g}")
    return parser, args


# --- Schedule and draws ----------------------------------------------------------------------------------------------


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a step, counted from 0: linear warm-up, constant, then linear from lr to lr_end."""
    warm = min(1.0, (step + 1) / max(1, args.warmup * steps_per_epoch))
    epoch, end = step / steps_per_epoch, args.decay_end or args.epochs
    if epoch <= args.decay_start:
        return warm * args.lr
    decayed = min(1.0, (epoch - args.decay_start) / max(end - args.decay_start, 1e-9))
    return warm * (args.lr + decayed * (args.lr_end - args.lr))


def draw(keys, labels, shape, null_class, label_dropout, generator):
    """What a step draws on the device: times, noise, dropped labels. The loader draws the flips.

    Each image has a seed of its own in each epoch, its key (see `training_batches`). So what is drawn depends on
    neither the batch nor the processes, and a resumed run draws the same numbers without any state of a generator.
    Returns t (B,) in (0, 1), logit-normal (section 4) and not yet shifted; noise (B, C, H, W); and the labels (B,), of
    which the share `label_dropout` is the null class, for classifier-free guidance.
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


LOSS_BY_TIME = [f"loss_t{i / 5:.1f}" for i in range(5)]


def by_time(losses, t):
    """The losses (B,) once for each fifth of [0, 1], NaN for images whose t (B,) lies outside it: the log skips NaN."""
    fifth = (5 * t).long().clamp(max=4)
    return {name: losses.where(fifth == i, math.nan) for i, name in enumerate(LOSS_BY_TIME)}


# --- What a run starts from: weights, statistics, the decoder for previews -------------------------------------------


def load_initial(args, model, encoder):
    """Copy the weights of --init into the model -> what their file says besides: {"stats", "shift", ...}.

    Where the counts of classes differ, the class table stays new, but for the null class, its last row.
    Raises ValueError for weights of another model or of other latents, and without latent statistics.
    """
    trained, info = load_dit(args.init)
    theirs, ours = latents_of(info.get("encoder", encoder.record)), latents_of(encoder.record)
    if theirs != ours:
        raise ValueError(f"--init {args.init} is for latents of {theirs}, not of {ours}: choose --encoder and --layers")
    differ = [f"{key} {value} instead of {model.config[key]}" for key, value in trained.config.items()
              if value != model.config[key] and key != "num_classes"]
    if differ:
        raise ValueError(f"--init {args.init} is another model: {', '.join(differ)}; choose --model, --size, ...")
    if "stats" not in info and not args.stats:
        raise ValueError(f"--init {args.init} has no latent statistics with it: give them with --stats")
    state, table = trained.state_dict(), "y_embedder.embedding_table.weight"
    if trained.num_classes != model.num_classes:
        state[table] = torch.cat([model.state_dict()[table][:-1], state[table][-1:]])
    model.load_state_dict(state)
    return info


def measure_statistics(args, encoder, images, micro_batch, rank, world_size, device):
    """Latent statistics over --stats-images images, chosen by the seed; each rank takes its share."""
    order = np.random.default_rng(args.seed).permutation(len(images))[: args.stats_images]
    if len(order) < 8:
        raise ValueError(f"{len(order)} images are too few for latent statistics: give at least 8, or --stats stat.pt")
    chosen = [(int(i), random_key(args.seed, int(i))) for i in order[rank::world_size]]
    chosen = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
    bar = tqdm(chosen, "latent statistics", disable=rank > 0)  # the loader takes its batches from the bar
    return latent_statistics(encoder, make_loader(images, bar, args.workers, device), device)


def preview_decoder(args, encoder):
    """The decoder for previews: --decoder, else that of runs/<preset>/ where it fits; None without either of them.

    Raises ValueError for a --decoder of other latents.
    """
    path = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    if not args.preview_every or not args.decoder and not path.exists():
        return None
    decoder, info = load_decoder(path, decoder_pixels(args.encoder), encoder.grid)
    theirs, ours = latents_of(info.get("encoder", encoder.record)), latents_of(encoder.record)
    if (theirs, decoder.latent_shape) == (ours, encoder.latent_shape):
        return decoder.to(encoder.mean.device)
    if args.decoder:
        raise ValueError(f"{path} decodes {decoder.latent_shape} of {theirs}, this run draws {encoder.latent_shape} of "
                         f"{ours}: give another --decoder, or --preview-every 0")


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

    # Where an earlier run stopped.
    settings = {flag: vars(args)[flag.strip("-").replace("-", "_")] for flag, *_ in RECIPE if flag not in MAY_DIFFER}
    settings |= dict(kind="train_dit", images=len(source), classes=source.classes)
    last = load_last(args.out, "dit.pt", settings)
    start = last["step"] if last else 0
    if start >= total:
        return say(f"finished: {args.out}/dit.pt has its {start} steps; a larger --epochs goes on")

    # The frozen encoder, the decoder for previews, and the model that learns to draw the latents.
    say(f"{source.summary()}\nloading the encoder {args.encoder}")
    encoder = Encoder(args.encoder, args.size, args.encoder_weights, args.layers).to(device)
    shape = encoder.latent_shape  # (C, H, W)
    decoder = preview_decoder(args, encoder) if rank == 0 else None
    num_classes = 0 if args.unconditional else len(source.classes)
    label_dropout = 1.0 if args.unconditional else args.label_dropout
    torch.manual_seed(args.seed)
    model = DiT(shape[0], encoder.grid, num_classes, **SIZES[args.model], qk_norm=args.qk_norm)
    initial = load_initial(args, model, encoder) if args.init and not last else {}
    shift = last["shift"] if last else initial.get("shift", shift_strength(shape, args.shift_base))
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":
        compile_blocks(encoder.vit, model)  # before DDP; the average stays eager

    # The latent statistics: of the run that goes on, else of --stats, else of --init, else measured.
    images = Images(source, functools.partial(center_crop_flip, size=args.size))
    if last:
        stats = last["stats"]
    elif args.stats:
        stats = load_stats(args.stats, shape)
    elif args.init:
        stats = initial["stats"]
    else:
        with autocast:
            stats = measure_statistics(args, encoder, images, micro_batch, rank, world_size, device)
    stats = {key: value.to(device) for key, value in stats.items()}

    columns = ["step", "epoch", "loss", *LOSS_BY_TIME, "grad_norm", "lr", "images_per_s", "memory_gb"]
    log = Log(args.out, columns, last["log_bytes"] if last else 0, start, rank)
    if last:
        model.load_state_dict(last["model"])
        ema.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        last = None  # last.pt is memory-mapped: release it
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    ddp.broadcast_buffers = False  # they are equal on all ranks; as an argument it is deprecated

    def checkpoint(done):
        result = dict(kind="dit", config=model.config, model=ema.state_dict(), stats=stats, shift=shift,
                      encoder=encoder.record, label_dropout=label_dropout, epoch=done / steps_per_epoch,
                      classes=source.classes if num_classes else [])
        files = {args.out / "stat.pt": stats, args.out / "dit.pt": result}
        if args.keep_every and done % args.keep_every == 0:
            files[args.out / f"dit-{done}.pt"] = result
        last = dict(settings=settings, step=done, model=model.state_dict(), ema=ema.state_dict(), stats=stats,
                    optimizer=optimizer.state_dict(), shift=shift, log_bytes=log.file.tell())
        save_checkpoint(files | {args.out / "last.pt": last})  # last.pt is moved last: the others are never older

    def preview(done):
        labels = torch.arange(16, device=device) * num_classes // 16
        noise = sample_noise(args.seed, range(16), shape).to(device)
        x = sample(guided(ema, labels), noise, shift=shift)  # (16, C, H, W)
        images = to_uint8(decoder(denormalize(x, stats))).cpu()  # (16, S, S, 3)
        image_grid(images, 8).save(args.out / f"preview-{done}.png")

    say(f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; time shift {shift:.2f}; "
        f"batch {args.batch} = {world_size} processes x {accumulate} x {micro_batch}; {total} steps, "
        f"{steps_per_epoch:.4g} an epoch; from step {start}" + "; --init is not read again" * bool(args.init and start)
        + ("" if decoder else "; no previews"))
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
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, args, steps_per_epoch)
        for micro in range(accumulate):
            ddp.require_backward_grad_sync = micro == accumulate - 1  # ranks exchange gradients in the last
            pixels, labels, keys = next(batches)  # (B, 3, S, S) uint8, (B,), (B,)
            pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            t, noise, labels = draw(keys, labels, shape, model.null_class, label_dropout, generator)
            t = time_shift(t, shift)  # section 4: t' = a t / (1 + (a - 1) t)
            with autocast:
                x = normalize(encoder(pixels.float() / 255), stats)  # (B, C, H, W)
                # x_t = (1 - t) x + t noise; the loss is |v(x_t, t, labels) - (noise - x)|^2, averaged over each image
                losses = flow_matching_loss(ddp, x, labels, t, noise)  # (B,)
            (losses.sum() / local_batch).backward()  # DDP averages over ranks: the gradient of the batch's mean
            log.add(loss=losses, **by_time(losses, t))
        norm = clip_grad_norm_(model.parameters(), args.clip or math.inf)  # inf only measures
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

        done = step + 1
        end = done == total or stop > 0
        if done % args.log_every == 0 or end:
            say(log.line(done, total, done / steps_per_epoch, args.batch, lr=lr))
        if decoder and (done % args.preview_every == 0 or done == total):
            preview(done)
        keep = args.keep_every and done % args.keep_every == 0
        if rank == 0 and (done % args.save_every == 0 or keep or end):
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
