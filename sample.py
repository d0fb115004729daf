"""From checkpoints to images: sample, or reconstruct, into a PNG grid or an npz for fid.py.

    python sample.py --published --classes 207 360 387 --out samples.png              # the authors' weights, 5.8 GB
    python sample.py --classes 207 360 --per-class 8 --out samples.png                # of runs/imagenet256/
    python sample.py --dit dit.pt --decoder decoder.pt --guide weak.pt --scale 1.42   # AutoGuidance
    python sample.py --scale 2 --interval 0.1 0.9                                     # classifier-free guidance
    python sample.py --preset demo --trajectory --out trajectory.png                  # from noise to image
    torchrun --nproc_per_node=gpu sample.py --num-samples 50000 --out samples.npz     # for FID: class-balanced labels
    torchrun --nproc_per_node=gpu sample.py --reconstruct imagenet/val --out recon.npz
    python sample.py --reconstruct photo.jpg --out recon.png                          # original beside reconstruction

Paper: arXiv 2510.11690. Sample i is the same image for any batch size and any number of GPUs, up to float rounding.
Each flag that takes a checkpoint takes a file, or hf:OWNER/REPO/PATH on the Hugging Face hub. A bare diffusion model
needs its --stats.
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
from encoder import (Encoder, center_crop, decoder_pixels, default_workers, evaluation_batches, fill_up, image_source,
                     latents_of, open_image)

PRESETS = {  # what differs from the defaults
    "imagenet256": {},
    "imagenet512": dict(batch=8),
    "demo": dict(encoder="random-tiny", scale=1.5, steps=25, batch=100),
}
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


def parse_args(argv):
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], usage="%(prog)s [--flag VALUE ...]",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet256", help="set of defaults; those of imagenet256 are shown here")
    add("--published", action="store_true", help="the authors' models with their AutoGuidance, 5.8 GB, fetched once")
    add("--dit", metavar="FILE", help="diffusion model (default: runs/<preset>/dit/dit.pt)")
    add("--decoder", metavar="FILE", help="decoder (default: runs/<preset>/decoder/decoder.pt)")
    add("--stats", metavar="FILE", help="latent statistics, for a bare diffusion model")
    add("--encoder", default="dinov2-b", help="encoder, for files that do not name it (default: %(default)s)")
    add("--layers", type=int, nargs="+", default=[], help="the encoder's layers, for files that do not name them")
    add("--encoder-weights", metavar="FILE", help="for --reconstruct: local file, instead of the download")
    add("--classes", nargs="+", default=[], help="classes by name or number (default: the first ten)")
    add("--per-class", type=int, help="images of each class (default: 4; demo: 10; with --trajectory: 1)")
    # not --num: torchrun takes that for an abbreviation of flags of its own
    add("--num-samples", type=int, default=0, help="draw so many images instead, all classes equally often, shuffled")
    add("--unconditional", action="store_true", help="draw without a class")
    add("--scale", type=float, default=1.0, help="guidance scale, 1: none; the paper's with --guide: 1.42, at 512 px "
        "1.5 (default: %(default)s; demo: 1.5)")
    add("--guide", metavar="FILE", help="weaker diffusion model: AutoGuidance instead of classifier-free guidance")
    add("--interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="guide only while LOW <= t <= HIGH; t is the shifted time, 1 is noise")
    add("--steps", type=int, default=50, help="Euler steps (default: %(default)s; demo: 25)")
    add("--trajectory", action="store_true", help="eight estimates of each clean image, from t = 1 to 0")
    add("--reconstruct", metavar="PATH", help="photo or folder to encode and decode, instead of sampling")
    add("--out", type=Path, default=Path("samples.png"), help=".png: a grid; .npz: uint8 (n, S, S, 3), for fid.py "
        "(default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an npz that exists")
    add("--batch", type=int, default=32, help="images at a time in each process (default: %(default)s; 512 px: 8)")
    add("--seed", type=int, default=0, help="seed of the starting noise and of the order of labels (default: 0)")
    add("--precision", choices=("tf32", "float32", "bf16"), default="tf32", help="of matrix products; on a CPU tf32 is "
        "float32 (default: %(default)s)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto, the default: on CUDA "
        "from 1,000 samples on")
    add("--device", choices=devices, default=devices[0], help="device of this process (default: %(default)s)")
    add("--workers", type=int, default=default_workers(), help="loader processes for each GPU (default: by the cores)")
    args = parser.parse_args(argv)
    if args.published and args.preset == "demo":
        parser.error("--published: the authors have no demo, leave --preset out or give imagenet512")
    parser.set_defaults(**PRESETS[args.preset] | (PUBLISHED[args.preset] if args.published else {}))
    args = parser.parse_args(argv)
    if args.published and args.scale == 1 and args.guide == PUBLISHED[args.preset]["guide"]:
        args.guide = None
    check_values(parser, args, {"per_class", "steps", "batch"})
    if args.classes and (args.num_samples or args.unconditional):
        parser.error("--classes goes neither with --num-samples, which draws all classes, nor with --unconditional")
    if args.per_class and args.num_samples:
        parser.error("--per-class does not go with --num-samples, which draws all classes equally often")
    args.per_class = args.per_class or (1 if args.trajectory else 10 if args.preset == "demo" else 4)
    args.dit = args.dit or Path("runs", args.preset, "dit", "dit.pt")
    args.decoder = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        parser.error(f"--interval {args.interval[0]:g} {args.interval[1]:g}: give 0 <= LOW <= HIGH <= 1")
    if args.trajectory and (args.steps < 8 or args.reconstruct):
        parser.error(f"--trajectory needs sampling in at least 8 steps, not --steps {args.steps} or --reconstruct")
    if args.out.suffix not in (".png", ".npz") or args.out.is_dir() or args.out.parent.is_file():
        parser.error(f"--out {args.out}: give a .png or an .npz, in a folder")
    if args.out.suffix == ".npz" and args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists: give --overwrite to replace it, or another name")
    if args.reconstruct and not os.path.exists(args.reconstruct) and args.reconstruct != "shapes":
        parser.error(f"--reconstruct {args.reconstruct} is not there: give a photo, a folder, or `shapes`")
    if args.reconstruct and os.path.isfile(args.reconstruct):
        if args.out.suffix != ".png" or args.out.exists() and os.path.samefile(args.reconstruct, args.out):
            parser.error(f"--out {args.out}: give a .png, and not the photo itself")
    return parser, args


# --- Checks, processes, compilation: as in the trainers, word for word -----------------------------------------------


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


# --- Generation ------------------------------------------------------------------------------------------------------


def load_models(args):
    """The models of the sampler, checked against each other -> (dit, guide or None, stats, shift, decoder, names)."""
    model, info = load_dit(args.dit)
    if not args.stats and "stats" not in info:
        raise ValueError(f"{args.dit} is a bare diffusion model: give its latent statistics with --stats stat.pt")
    stats = load_stats(args.stats, model.latent_shape) if args.stats else info["stats"]
    drawn = info.get("encoder", dict(name=args.encoder, layers=args.layers))
    decoder, record = load_decoder_of(args, drawn, grid=model.latent_shape[1])
    if (decoder.latent_shape, latents_of(record)) != (model.latent_shape, latents_of(drawn)):
        raise ValueError(f"{args.decoder} decodes {decoder.latent_shape} of {latents_of(record)}, {args.dit} draws "
                         f"{model.latent_shape} of {latents_of(drawn)}: give a matching pair, or the right --encoder")
    guide = None
    if args.guide:
        if args.scale == 1:
            raise ValueError(f"--guide {args.guide} needs a --scale: the paper has 1.42 at 256 px and 1.5 at 512 px")
        guide, weak = load_dit(args.guide)
        differ = [key for key in ("latent_dim", "grid", "num_classes") if guide.config[key] != model.config[key]]
        if latents_of(weak.get("encoder", drawn)) != latents_of(drawn):
            differ.append("encoder")
        if differ:
            raise ValueError(f"--guide {args.guide} differs in {', '.join(differ)} from {args.dit}: choose another")
    elif args.scale != 1 and (args.unconditional or not model.num_classes or info.get("label_dropout") == 0):
        raise ValueError(f"--scale {args.scale:g}: no classifier-free guidance without classes, or for a model trained "
                         "without label dropout; give --scale 1, or a weaker model by --guide")
    shift = info.get("shift", shift_strength(model.latent_shape))
    return model, guide, stats, shift, decoder, info.get("classes", [])


def load_decoder_of(args, record, grid):
    """The decoder, and its encoder's record, or `record` where the file has none."""
    decoder, info = load_decoder(args.decoder, decoder_pixels(record["name"]), grid)
    return decoder, info.get("encoder", record)


def labels_of(args, model, names):
    """The class of every sample in order; the null class where there is none. Says what is drawn."""
    if args.classes and not model.num_classes:
        raise ValueError(f"--classes {' '.join(args.classes)}: {args.dit} has no classes, leave the flag out")
    if args.unconditional or not model.num_classes:
        count = args.num_samples or args.per_class
        say(f"drawing {count} samples without a class")
        return [model.null_class] * count
    if args.num_samples:  # shuffled: splits that are balanced too would raise the Inception score
        order = np.random.default_rng((args.seed, args.num_samples)).permutation(args.num_samples)
        say(f"drawing {args.num_samples} samples of {model.num_classes} classes in equal shares, shuffled")
        return (order % model.num_classes).tolist()
    numbers = {str(i): i for i in range(model.num_classes)} | {name: i for i, name in enumerate(names)}
    known = ", ".join([f"0 to {model.num_classes - 1}", *names[:5]])
    for name in args.classes:
        if name not in numbers:
            raise ValueError(f"--classes {name}: {args.dit} knows {known}")
    chosen = [numbers[name] for name in args.classes] or list(range(min(10, model.num_classes)))
    say(f"drawing {args.per_class} of each class: " + ", ".join(" ".join([str(i), *names[i : i + 1]]) for i in chosen))
    return [i for i in chosen for _ in range(args.per_class)]


def generate(args, rank, world_size, device, autocast):
    """Draw samples; with --trajectory eight images of each."""
    model, guide, stats, shift, decoder, names = load_models(args)
    labels = labels_of(args, model, names)
    model, decoder, guide = model.to(device), decoder.to(device), guide.to(device) if guide else None
    stats = {key: value.to(device) for key, value in stats.items()}
    compiled = args.compile == "on" or args.compile == "auto" and device.type == "cuda" and args.num_samples >= 1000
    if compiled:
        compile_blocks(decoder, model, *([guide] if guide else []))
    shown = set(np.linspace(0, args.steps - 1, 8).round().astype(int).tolist()) if args.trajectory else {args.steps - 1}

    def pictures():  # of this rank's batches: uint8 (b len(shown), S, S, 3)
        for first in range(rank * args.batch, len(labels), world_size * args.batch):
            part = range(first, min(first + args.batch, len(labels)))
            size = args.batch if compiled else len(part)
            y = fill_up(torch.tensor([labels[i] for i in part], device=device), size)  # (B,)
            noise = fill_up(sample_noise(args.seed, part, stats["mean"].shape).to(device), size)  # (B, C, H, W)
            latents = []  # the estimates x_t - t v at the steps that are shown; the last one is the sample

            def watch(step, estimate, latents=latents):
                if step in shown:
                    latents.append(estimate)

            with autocast:
                # watch() sees each estimate, the finished sample too
                sample(guided(model, y, args.scale, guide, args.interval), noise, args.steps, shift, watch)
                frames = [to_uint8(decoder(denormalize(x, stats)))[: len(part)] for x in latents]  # (b, S, S, 3) each
            yield torch.stack(frames, 1).flatten(0, 1)

    shape = (len(labels) * len(shown), decoder.image_size, decoder.image_size, 3)
    columns = 8 if args.trajectory or args.num_samples else args.per_class
    write_images(args, rank, world_size, device, shape, args.batch * len(shown), columns, pictures())


# --- Reconstruction --------------------------------------------------------------------------------------------------


def reconstruct(args, rank, world_size, device, autocast):
    """Encode and decode a folder's images, or one photo beside itself."""
    unnamed = dict(name=args.encoder, layers=args.layers)
    decoder, record = load_decoder_of(args, unnamed, grid=32 if args.preset == "imagenet512" else 16)
    say(f"loading the encoder {record['name']}")
    encoder = Encoder(record["name"], record.get("image_size", decoder.config["grid"] * 16), args.encoder_weights,
                      record.get("layers", [])).to(device)
    if encoder.latent_shape != decoder.latent_shape:
        raise ValueError(f"{args.decoder} decodes latents {decoder.latent_shape}, not {encoder.latent_shape}, those of "
                         f"{record['name']}: give the right --encoder")
    decoder, side = decoder.to(device), decoder.image_size
    if args.compile == "on":
        compile_blocks(encoder.vit, decoder)

    @torch.no_grad()
    def decoded(pixels):  # (B, 3, S, S) uint8 -> (B, S, S, 3) uint8
        with autocast:
            return to_uint8(decoder(encoder(pixels.to(device, non_blocking=True).float() / 255)))

    if os.path.isfile(args.reconstruct):
        try:
            image = np.array(center_crop(open_image(args.reconstruct), side))  # (S, S, 3)
        except Exception as error:  # Pillow raises nearly any kind for a damaged file
            raise ValueError(f"--reconstruct {args.reconstruct} is no picture, or damaged ({error})") from None
        image = torch.from_numpy(image)[None].to(device)
        pairs = iter([torch.cat([image, decoded(image.permute(0, 3, 1, 2))])])
        return write_images(args, rank, world_size, device, (2, side, side, 3), 2, 2, pairs)
    source = image_source(args.reconstruct, side)
    say(source.summary())
    firsts = range(rank * args.batch, len(source), world_size * args.batch)
    indices = [i for first in firsts for i in range(first, min(first + args.batch, len(source)))]
    batches = evaluation_batches(source, indices, side, args.batch, args.workers, device)
    shape = (len(source), side, side, 3)
    write_images(args, rank, world_size, device, shape, args.batch, 8, (decoded(pixels) for pixels in batches))


# --- Files -----------------------------------------------------------------------------------------------------------


def write_images(args, rank, world_size, device, shape, size, columns, batches):
    """Write --out, images uint8 of `shape` (n, S, S, 3). columns: of the PNG grid.

    batches: this rank's images, uint8 (b, S, S, 3) on the device. Of all batches of `size` in order, rank r yields
    those with the numbers r, r + world_size, ...; rank 0 receives them and writes them as they come.
    """
    if args.out.suffix == ".png" and shape[0] > 10000:
        raise ValueError(f"{shape[0]} images are too many for one picture: give --out an .npz")

    def received():  # on rank 0: numpy (b, S, S, 3), in order
        left = shape[0]
        for _ in range(math.ceil(shape[0] / size / world_size)):
            images = next(batches, torch.empty(0, *shape[1:], dtype=torch.uint8, device=device))
            parts = [images]
            if world_size > 1:
                images = torch.cat([images, images.new_zeros(size - len(images), *shape[1:])]).contiguous()
                parts = [torch.empty_like(images) for _ in range(world_size)] if rank == 0 else None
                dist.gather(images, parts)
            for part in parts or []:
                part = part[:left].cpu().numpy()
                left -= len(part)
                bar.update(len(part))
                yield part
        for _ in batches:  # raises where images could not be read
            continue

    temporary = Path(f"{args.out}.tmp")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(total=shape[0], unit="image", disable=rank > 0) as bar:
            if rank > 0:
                list(received())
            elif args.out.suffix == ".npz":
                member = zipfile.ZipInfo("arr_0.npy")  # without the time: the same images give the same file
                with zipfile.ZipFile(temporary, "w") as archive, archive.open(member, "w", force_zip64=True) as file:
                    header = dict(descr="|u1", fortran_order=False, shape=shape)
                    np.lib.format.write_array_header_1_0(file, header)
                    for images in received():
                        file.write(images.tobytes())
            else:
                image_grid(np.concatenate(list(received())), columns).save(temporary, "png")
        if world_size > 1:  # every rank is through with its images
            dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
        if rank == 0:
            os.replace(temporary, args.out)
    finally:  # an interrupted run leaves no temporary file
        if rank == 0:
            temporary.unlink(missing_ok=True)
    say(f"{shape[0]} images in {args.out}")


def main(argv=None):
    parser, args = parse_args(argv)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that write_images cleans up
    try:
        (reconstruct if args.reconstruct else generate)(args, *set_up(args))
    except ValueError as error:  # bad input; a loader's process puts its traceback before the message
        parser.error(str(error).rpartition("\nValueError: ")[2].strip())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
