"""From checkpoints to images: sample, or reconstruct, into a PNG grid or an npz for fid.py.

    python sample.py --published --classes 207 360 387 --out samples.png              # the authors' weights, 5.8 GB
    python sample.py --classes 207 360 --per-class 8 --out samples.png                # those of runs/imagenet256/
    python sample.py --dit dit.pt --decoder decoder.pt --guide weak.pt --scale 1.42   # AutoGuidance
    python sample.py --scale 2 --interval 0.1 0.9                                     # classifier-free guidance
    python sample.py --preset demo --trajectory --out trajectory.png                  # from noise to image
    torchrun --nproc_per_node=gpu sample.py --num-samples 50000 --out samples.npz     # for FID: class-balanced labels
    torchrun --nproc_per_node=gpu sample.py --reconstruct imagenet/val --out recon.npz
    python sample.py --reconstruct photo.jpg --out recon.png                          # original next to reconstruction

Paper: arXiv 2510.11690. Sample i is the same image for any batch size and any number of GPUs, up to float rounding.
Flags for checkpoints take a file, or hf:OWNER/REPO/PATH on the Hugging Face hub.
"""

import argparse
import datetime
import math
import os
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from decoder import image_grid, load_decoder, to_uint8
from dit import denormalize, guided, load_dit, load_stats, sample, sample_noise, shift_strength
from encoder import (Encoder, center_crop, check_latents, decoder_pixels, default_workers, evaluation_batches,
                     image_source, open_image)

# --- Sampling --------------------------------------------------------------------------------------------------------


def load_models(args):
    """Read the checkpoints and check that they fit -> (diffusion model, guide or None, decoder, info).

    info: the rest of the diffusion model's file; "stats" and "shift" are always in it.
    """
    model, info = load_dit(args.dit)
    shape, record = model.latent_shape, info.get("encoder", dict(name=args.encoder, layers=args.layers))
    if args.stats:
        info["stats"] = load_stats(args.stats, shape)
    if "stats" not in info:
        raise ValueError(f"{args.dit} has no latent statistics: give them with --stats stat.pt")
    info.setdefault("shift", shift_strength(shape))
    decoder, decoder_info = load_decoder(args.decoder, decoder_pixels(record["name"]), grid=shape[1])
    check_latents(f"--decoder {args.decoder}", decoder_info, decoder, record, shape)
    guide = None
    if args.guide:
        if args.scale == 1:
            raise ValueError(f"--guide {args.guide} needs a --scale: the paper has 1.42, at 512 px 1.5")
        guide, guide_info = load_dit(args.guide)
        check_latents(f"--guide {args.guide}", guide_info, guide, record, shape)
        if guide.num_classes != model.num_classes:
            raise ValueError(f"--guide {args.guide} has {guide.num_classes} classes, --dit {args.dit} has "
                             f"{model.num_classes}: give another guide")
    elif args.scale != 1 and (args.unconditional or not model.num_classes or info.get("label_dropout") == 0):
        raise ValueError(f"--scale {args.scale:g}: classifier-free guidance needs classes, and a model trained with "
                         "label dropout; give --scale 1, or a weaker model with --guide")
    return model, guide, decoder, info


def choose_labels(args, model, names):
    """The class of every sample, in order; the null class for unconditional samples. names: of the classes."""
    if args.classes and not model.num_classes:
        raise ValueError(f"--classes {' '.join(args.classes)}: {args.dit} has no classes, remove the flag")
    if args.unconditional or not model.num_classes:
        count = args.num_samples or args.per_class
        say(f"{count} samples without a class")
        return [model.null_class] * count
    if args.num_samples:  # shuffled: with labels in turn the splits of the Inception score would be balanced, too
        order = np.random.default_rng((args.seed, args.num_samples)).permutation(args.num_samples)
        say(f"{args.num_samples} samples of {model.num_classes} classes, balanced and shuffled")
        return (order % model.num_classes).tolist()
    numbers = {str(i): i for i in range(model.num_classes)} | {name: i for i, name in enumerate(names)}
    for name in args.classes:
        if name not in numbers:
            known = ", ".join([f"0 to {model.num_classes - 1}", *names[:5]])
            raise ValueError(f"--classes {name}: {args.dit} knows {known}")
    chosen = [numbers[name] for name in args.classes] or list(range(min(10, model.num_classes)))
    say(f"{args.per_class} samples of each class: " + ", ".join(" ".join([str(i), *names[i : i + 1]]) for i in chosen))
    return [i for i in chosen for _ in range(args.per_class)]


def rank_batches(count, batch, rank, world_size):
    """Split the indices 0 to count - 1 into batches for all ranks -> this rank's, [range, ...].

    All ranks have the same number of batches, of the same size, so the last indices may exceed count - 1.
    """
    rounds = math.ceil(count / (batch * world_size))
    size = math.ceil(count / (rounds * world_size))
    return [range(first, first + size) for first in range(rank * size, rounds * world_size * size, world_size * size)]


def generate(args, rank, world_size, device, autocast):
    """Sample images; with --trajectory eight estimates of each clean image, from t = 1 to t = 0."""
    model, guide, decoder, info = load_models(args)
    labels = choose_labels(args, model, info.get("classes", []))
    model, decoder, guide = model.to(device), decoder.to(device), guide.to(device) if guide else None
    stats = {key: value.to(device) for key, value in info["stats"].items()}
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda" and args.num_samples >= 1000:
        compile_blocks(decoder, model, *([guide] if guide else []))
    shown = np.linspace(0, args.steps - 1, 8).round().astype(int).tolist() if args.trajectory else [args.steps - 1]

    def batches():  # uint8 (b len(shown), S, S, 3)
        for indices in rank_batches(len(labels), args.batch, rank, world_size):
            y = torch.tensor([labels[i % len(labels)] for i in indices], device=device)  # (b,)
            noise = sample_noise(args.seed, indices, model.latent_shape).to(device)  # (b, C, H, W)
            estimates = []  # x_t - t v at each step, of which the last is the sample
            with autocast:
                sample(guided(model, y, args.scale, guide, args.interval), noise, args.steps, info["shift"], estimates)
                frames = [to_uint8(decoder(denormalize(estimates[i], stats))) for i in shown]  # (b, S, S, 3) each
            yield torch.stack(frames, 1).flatten(0, 1)

    columns = 8 if args.trajectory or args.num_samples else args.per_class
    write_images(args, batches(), len(labels) * len(shown), columns, rank, world_size, device)


# --- Reconstruction --------------------------------------------------------------------------------------------------


def reconstruct(args, rank, world_size, device, autocast):
    """Encode and decode the images of a folder, or one photo, next to the original."""
    grid = 32 if args.preset == "imagenet512" else 16  # of a file that does not store it
    decoder, info = load_decoder(args.decoder, decoder_pixels(args.encoder), grid)
    record = info.get("encoder", dict(name=args.encoder, layers=args.layers))
    say(f"loading the encoder {record['name']}")
    encoder = Encoder(record["name"], record.get("image_size", decoder.config["grid"] * 16), args.encoder_weights,
                      record.get("layers", [])).to(device)
    check_latents(f"--decoder {args.decoder}", info, decoder, encoder.record, encoder.latent_shape)
    decoder, side = decoder.to(device), decoder.image_size
    if args.compile == "on":
        compile_blocks(encoder.vit, decoder)

    @torch.no_grad()
    def decoded(pixels):  # (B, 3, S, S) uint8 -> (B, S, S, 3) uint8
        with autocast:
            return to_uint8(decoder(encoder(pixels.to(device, non_blocking=True).float() / 255)))

    if os.path.isfile(args.reconstruct):
        image = torch.from_numpy(np.array(center_crop(open_image(args.reconstruct), side)))[None].to(device)
        pair = torch.cat([image, decoded(image.permute(0, 3, 1, 2))])  # (2, S, S, 3)
        return write_images(args, [pair], 2, 2, rank, world_size, device)
    source = image_source(args.reconstruct, side)
    say(source.summary())
    parts = rank_batches(len(source), args.batch, rank, world_size)
    indices = [min(i, len(source) - 1) for part in parts for i in part]
    batches = evaluation_batches(source, indices, side, len(parts[0]), args.workers, device)
    write_images(args, (decoded(pixels) for pixels in batches), len(source), 8, rank, world_size, device)


# --- Files -----------------------------------------------------------------------------------------------------------


def gather(batches, count, rank, world_size):
    """Yield `count` images of all ranks in order, on rank 0: arrays uint8 (b, S, S, 3). All ranks must iterate."""
    left = count
    with tqdm(total=count, unit="image", disable=rank > 0) as bar:
        for images in batches:
            parts = [images]
            if world_size > 1:
                images = images.contiguous()
                parts = [torch.empty_like(images) for _ in range(world_size)] if rank == 0 else []
                dist.gather(images, parts or None)
            for part in parts:
                part = part[:left].cpu().numpy()
                left -= len(part)
                bar.update(len(part))
                yield part


def write_images(args, batches, count, columns, rank, world_size, device):
    """Write --out: `count` images from the batches uint8 (b, S, S, 3) of all ranks. columns: of a PNG grid.

    An npz is written as the images come, a PNG at the end. Both are renamed when complete.
    """
    if args.out.suffix == ".png" and count > 10000:
        raise ValueError(f"{count} images are too many for one PNG: give --out an .npz")
    temporary, images = Path(f"{args.out}.tmp"), gather(batches, count, rank, world_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if rank > 0:
            list(images)
        elif args.out.suffix == ".npz":
            first = next(images)
            member = zipfile.ZipInfo("arr_0.npy")  # without the time: the same images give the same file
            with zipfile.ZipFile(temporary, "w") as archive, archive.open(member, "w", force_zip64=True) as file:
                header = dict(descr="|u1", fortran_order=False, shape=(count, *first.shape[1:]))
                np.lib.format.write_array_header_1_0(file, header)
                file.write(first.tobytes())
                for part in images:
                    file.write(part.tobytes())
        else:
            image_grid(np.concatenate(list(images)), columns).save(temporary, "png")
        if world_size > 1:  # until every rank has sent its images without an error
            dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
        if rank == 0:
            os.replace(temporary, args.out)
    finally:  # also after an interruption
        if rank == 0:
            temporary.unlink(missing_ok=True)
    say(f"{count} images in {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line. Four functions are the same, word for word, in the trainers.

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
SWITCH = dict(action="store_true")
FLAGS = {
    # flag             default      demo          meaning
    "published":       (False,      False,        "the authors' models and guide, 5.8 GB, downloaded once", SWITCH),
    "dit":             (None,       None,         "diffusion model (default: runs/<preset>/dit/dit.pt)"),
    "decoder":         (None,       None,         "decoder (default: runs/<preset>/decoder/decoder.pt)"),
    "stats":           (None,       None,         "latent statistics, for a published diffusion model"),
    "encoder":         ("dinov2-b", "random-tiny", "encoder, for files that do not name it"),
    "layers":          ([],         [],           "its layers, likewise", dict(type=int, nargs="+")),
    "encoder_weights": (None,       None,         "for --reconstruct: local file, instead of the download"),
    "classes":         ([],         [],           "names or numbers (default: the first ten)", dict(nargs="+")),
    "per_class":       (None,       None,         "images per class (default: 4; demo: 10)", dict(type=int)),
    # not --num: torchrun takes that for an abbreviation of its own flags
    "num_samples":     (0,          0,            "number of images of all classes, balanced and shuffled, instead"),
    "unconditional":   (False,      False,        "sample without a class", SWITCH),
    "scale":           (1.0,        1.5,          "guidance scale, 1: none; the paper has 1.42, at 512 px 1.5"),
    "guide":           (None,       None,         "weaker model, for AutoGuidance (default: classifier-free guidance)"),
    "interval":        ([0.0, 1.0], [0.0, 1.0],   "guide only for LOW <= t <= HIGH; t is the shifted time, 1 is noise",
                                                  dict(type=float, nargs=2, metavar=("LOW", "HIGH"))),
    "steps":           (50,         25,           "Euler steps"),
    "trajectory":      (False,      False,        "eight estimates of each clean image, from t = 1 to t = 0", SWITCH),
    "reconstruct":     (None,       None,         "photo or folder to encode and decode, instead of sampling"),
    "out":             ("samples.png", "samples.png", ".png: a grid; .npz: uint8 (n, S, S, 3), for fid.py"),
    "overwrite":       (False,      False,        "replace an npz that exists", SWITCH),
    "batch":           (32,         100,          "largest batch of one process"),
    "seed":            (0,          0,            "seed of the initial noise and of the order of labels"),
    "precision":       ("tf32",     "tf32",       "of matrix products", dict(choices=("tf32", "float32", "bf16"))),
    "compile":         ("auto",     "auto",       "auto: on CUDA, from 1,000 on", dict(choices=("auto", "on", "off"))),
    "device":          (DEVICES[0], DEVICES[0],   "device of this process", dict(choices=DEVICES)),
    "workers":         (default_workers(), 0,     "loader processes for each GPU; the default depends on the cores"),
}
IMAGENET512 = dict(batch=8)
AUTHORS = "hf:nyu-visionx/RAE-collections"
PUBLISHED = {
    "imagenet256": dict(
        dit=f"{AUTHORS}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt", scale=1.42,
        guide=f"{AUTHORS}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt",
        decoder=f"{AUTHORS}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        stats=f"{AUTHORS}/stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "imagenet512": dict(
        dit=f"{AUTHORS}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt", scale=1.5,
        guide=f"{AUTHORS}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt",
        decoder=f"{AUTHORS}/decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        stats=f"{AUTHORS}/stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
}


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


def parse_args(argv):
    parser, args = parse_flags(argv, __doc__, FLAGS, IMAGENET512, lambda args: (
        PUBLISHED.get(args.preset, {}) if args.published else {}))
    if args.published and args.preset == "demo":
        parser.error("--published: the authors have no demo, give --preset imagenet256 or imagenet512")
    if args.published and args.scale == 1 and args.guide == PUBLISHED[args.preset]["guide"]:
        args.guide = None
    args.out = Path(args.out)
    if args.classes and (args.num_samples or args.unconditional) or args.per_class and args.num_samples:
        parser.error("--classes and --per-class do not go with --num-samples, which samples all classes equally often, "
                     "nor --classes with --unconditional")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        parser.error(f"--interval {args.interval[0]:g} {args.interval[1]:g}: give 0 <= LOW <= HIGH <= 1")
    if args.trajectory and (args.steps < 8 or args.reconstruct):
        parser.error(f"--trajectory needs sampling in at least 8 steps, not --steps {args.steps} or --reconstruct")
    if args.out.suffix not in (".png", ".npz") or args.out.is_dir():
        parser.error(f"--out {args.out}: give a .png or an .npz")
    if args.out.suffix == ".npz" and args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists: give --overwrite to replace it, or another name")
    if args.reconstruct and os.path.isfile(args.reconstruct):
        if args.out.suffix != ".png" or args.out.exists() and os.path.samefile(args.reconstruct, args.out):
            parser.error(f"--out {args.out}: give a .png, and not the photo itself")
    args.per_class = args.per_class or (1 if args.trajectory else 10 if args.preset == "demo" else 4)
    args.dit = args.dit or Path("runs", args.preset, "dit", "dit.pt")
    args.decoder = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that write_images cleans up
    try:
        (reconstruct if args.reconstruct else generate)(args, *set_up(args))
    except (ValueError, OSError) as error:  # bad input ends in one line, in development mode (-X dev) in a traceback
        if sys.flags.dev_mode or isinstance(error, OSError) and error.filename is None:
            raise
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())  # a loader process sends a traceback before it
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
