"""From checkpoints to images: sample, or reconstruct, into a PNG grid or an npz for fid.py.

    python sample.py --classes 207 360 --per-class 8 --out samples.png                # inputs from runs/imagenet256/
    python sample.py --dit dit.pt --decoder decoder.pt --guide weak.pt --scale 1.42   # AutoGuidance
    python sample.py --scale 2 --interval 0.1 0.9                                     # classifier-free guidance
    python sample.py --preset demo --trajectory --out trajectory.png                  # from noise to image
    torchrun --nproc_per_node=gpu sample.py --num-samples 50000 --out samples.npz     # for FID: class-balanced labels
    torchrun --nproc_per_node=gpu sample.py --reconstruct imagenet/val --out recon.npz
    python sample.py --reconstruct photo.jpg --out recon.png                          # original beside reconstruction

Paper: arXiv 2510.11690. Sample i is the same image for any batch size and any number of GPUs, up to float rounding.
The published checkpoints (nyu-visionx/RAE-collections) go through the same flags; a bare diffusion model needs --stats.
"""

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
from dit import denormalize, guided, load_dit, sample, sample_noise, shift_for
from encoder import (ON_OFF, RUN_FLAGS, Encoder, amount, center_crop, compile_blocks, count, evaluation_batches,
                     fill_up, image_source, load_stats, make_parser, natural, one_line_refusals, open_image,
                     pixel_statistics, set_up)

SAMPLES = "samples.png"
FLAGS = [
    # flag             type      256 px  512 px  demo    meaning
    ("--dit",           str,      None,   None,   None,   "diffusion model (default: runs/<preset>/dit/dit.pt)"),
    ("--decoder",       str,      None,   None,   None,   "decoder (default: runs/<preset>/decoder/decoder.pt)"),
    ("--stats",         str,      None,   None,   None,   "latent statistics of a published diffusion model"),
    ("--encoder",       str,      "dinov2-b", "dinov2-b", "random-tiny", "encoder, for files that do not name it"),
    ("--encoder-weights", str,    None,   None,   None,   "for --reconstruct: local file, instead of the download"),
    ("--classes",       [str],    None,   None,   None,   "classes by number or name (default: the first ten)"),
    ("--per-class",     count,    None,   None,   None,   "images of each class (default: 4; demo: 10; trajectory: 1)"),
    # not --num: torchrun takes that for an abbreviation of flags of its own
    ("--num-samples",   count,    None,   None,   None,   "draw this many images instead, all classes in turn"),
    ("--unconditional", bool,     False,  False,  False,  "draw without a class"),
    ("--scale",         amount,   1.0,    1.0,    2.0,    "guidance scale; 1: none; the paper's --guide: 1.42, 1.5"),
    ("--guide",         str,      None,   None,   None,   "weaker diffusion model: AutoGuidance instead of CFG"),
    ("--interval",      [amount, amount], [0, 1], [0, 1], [0, 1], "lowest and highest time t that is guided"),
    ("--steps",         count,    50,     50,     25,     "Euler steps"),
    ("--trajectory",    bool,     False,  False,  False,  "eight estimates of each clean image, from t = 1 to 0"),
    ("--reconstruct",   str,      None,   None,   None,   "photo or folder to encode and decode, instead of sampling"),
    ("--out",           str,      SAMPLES, SAMPLES, SAMPLES, ".png: a grid; .npz: uint8 (n, S, S, 3), for fid.py"),
    ("--overwrite",     bool,     False,  False,  False,  "replace an npz that exists"),
    ("--batch",         count,    32,     8,      100,    "images at a time in each process"),
    ("--seed",          natural,  0,      0,      0,      "seed of the starting noise"),
    ("--compile",       ON_OFF,   None,   None,   None,   "torch.compile (default: on CUDA from --num-samples 1000)"),
]
FLAGS += [row for row in RUN_FLAGS if row[0] in ("--precision", "--workers", "--device")]


def parse_args(argv):
    parser = make_parser(__doc__, FLAGS, argv)
    args = parser.parse_args(argv)
    args.dit = args.dit or Path("runs", args.preset, "dit", "dit.pt")
    args.decoder = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    if args.compile is None:
        args.compile = args.device == "cuda" and (args.num_samples or 0) >= 1000
    if not args.interval[0] <= args.interval[1] <= 1:
        parser.error(f"--interval {args.interval[0]:g} {args.interval[1]:g}: give LOW <= HIGH <= 1")
    if args.num_samples and (args.classes or args.per_class):
        parser.error("--num-samples draws all classes in turn: leave --classes and --per-class out")
    if args.trajectory and (args.steps < 8 or args.reconstruct):
        parser.error(f"--trajectory needs sampling in at least 8 steps, not --steps {args.steps} or --reconstruct")
    if args.out.suffix not in (".png", ".npz") or args.out.is_dir():
        parser.error(f"--out {args.out}: give a .png or an .npz")
    if args.out.suffix == ".npz" and args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists: give --overwrite to replace it, or another name")
    if args.reconstruct and not os.path.exists(args.reconstruct) and args.reconstruct != "shapes":
        parser.error(f"--reconstruct {args.reconstruct} is not there: give a photo, a folder, or `shapes`")
    if args.reconstruct and os.path.isfile(args.reconstruct):
        if args.out.suffix != ".png" or args.out.exists() and os.path.samefile(args.reconstruct, args.out):
            parser.error(f"--out {args.out}: give another .png for the photo and its reconstruction")
    per_class = 10 if args.preset == "demo" else 4
    args.per_class = args.per_class or (1 if args.trajectory else per_class)
    return parser, args


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def load_models(args):
    """The models of the sampler, checked against each other -> (dit, guide or None, stats, shift, decoder, names)."""
    model, info = load_dit(args.dit)
    if not args.stats and "stats" not in info:
        raise ValueError(f"{args.dit} is a bare diffusion model: give its latent statistics with --stats stat.pt")
    stats = load_stats(args.stats, model.latent_shape) if args.stats else info["stats"]
    encoder = info.get("encoder", {"name": args.encoder})["name"]
    decoder, record = decoder_and_encoder(args, encoder)
    if decoder.latent_shape != model.latent_shape or record["name"] != encoder:
        raise ValueError(f"{args.decoder} decodes latents {decoder.latent_shape} of {record['name']}, {args.dit} draws "
                         f"{model.latent_shape} of {encoder}: give a matching pair, or the right --encoder")
    guide = None
    if args.guide:
        if args.scale == 1:
            raise ValueError(f"--guide {args.guide} needs a --scale: the paper has 1.42 at 256 px and 1.5 at 512 px")
        guide, weak = load_dit(args.guide)
        differ = [key for key in ("latent_dim", "grid", "num_classes") if guide.config[key] != model.config[key]]
        if weak.get("encoder", {"name": encoder})["name"] != encoder:
            differ.append("encoder")
        if differ:
            raise ValueError(f"--guide {args.guide} differs in {', '.join(differ)} from {args.dit}: choose another")
    elif args.scale != 1 and (args.unconditional or not model.num_classes or info.get("label_dropout") == 0):
        raise ValueError(f"--scale {args.scale:g}: no classifier-free guidance without classes, or for a model trained "
                         "without label dropout; give --scale 1, or a weaker model by --guide")
    return model, guide, stats, info.get("shift", shift_for(model.latent_shape)), decoder, info.get("classes", [])


def decoder_and_encoder(args, encoder=None):
    """The decoder, and the record of its encoder; a published one belongs to `encoder`, or else to --encoder."""
    name = encoder or args.encoder
    decoder, info = load_decoder(args.decoder, pixel_statistics(name))
    return decoder, info.get("encoder", dict(name=name, image_size=decoder.config["grid"] * 16))


def labels_of(args, model, names):
    """The class of every sample in order; the null class where there is none."""
    classes = args.classes or [str(i) for i in range(min(10, model.num_classes))]  # numbers or names
    if args.unconditional or not model.num_classes:
        return [model.null_class] * (args.num_samples or max(1, len(classes)) * args.per_class)
    if args.num_samples:
        return [i % model.num_classes for i in range(args.num_samples)]
    numbers = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(model.num_classes)}
    for name in classes:
        if name not in numbers:
            known = ", ".join([f"0 to {model.num_classes - 1}", *names[:5]])
            raise ValueError(f"--classes {name}: {args.dit} knows {known}")
    return [numbers[name] for name in classes for _ in range(args.per_class)]


def generate(args, device, autocast):
    """Draw samples; with --trajectory eight images of each."""
    model, guide, stats, shift, decoder, names = load_models(args)
    labels = labels_of(args, model, names)
    model, decoder, guide = model.to(device), decoder.to(device), guide.to(device) if guide else None
    stats = {key: value.to(device) for key, value in stats.items()}
    if args.compile:
        compile_blocks(decoder, model, *([guide] if guide else []))
    shown = set(np.linspace(0, args.steps - 1, 8).round().astype(int).tolist()) if args.trajectory else {args.steps - 1}

    def pictures(indices):
        for first in range(0, len(indices), args.batch):
            part = indices[first : first + args.batch]
            size = args.batch if args.compile else len(part)
            y = fill_up(torch.tensor([labels[i] for i in part], device=device), size)  # (B,)
            noise = fill_up(sample_noise(args.seed, part, stats["mean"].shape).to(device), size)  # (B, C, H, W)
            latents = []  # the estimates x_t - t v at the steps that are shown; the last one is the sample

            def watch(step, estimate, latents=latents):
                if step in shown:
                    latents.append(estimate)

            with autocast:
                sample(guided(model, y, args.scale, guide, args.interval), noise, args.steps, shift, watch)
                frames = [to_uint8(decoder(denormalize(x, stats)))[: len(part)] for x in latents]  # (b, S, S, 3) each
            yield torch.stack(frames, 1).flatten(0, 1).cpu().numpy()  # (b len(shown), S, S, 3)

    columns = 8 if args.trajectory or args.num_samples else args.per_class
    write_images(args, device, len(labels), len(shown), columns, decoder.image_size, pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def reconstruct(args, device, autocast):
    """Encode and decode a folder's images, or one photo beside itself."""
    decoder, record = decoder_and_encoder(args)
    encoder = Encoder(record["name"], record["image_size"], args.encoder_weights).to(device)
    if encoder.latent_shape != decoder.latent_shape:
        raise ValueError(f"{args.decoder} decodes latents {decoder.latent_shape}, not {encoder.latent_shape}, those of "
                         f"{record['name']}: give the right --encoder")
    decoder, side = decoder.to(device), decoder.image_size
    if args.compile:
        compile_blocks(encoder.vit, decoder)

    def decoded(pixels):  # (B, 3, S, S) uint8 -> (B, S, S, 3) uint8
        with autocast:
            z = encoder(pixels.to(device, non_blocking=True).float() / 255)  # (B, C, H, W)
            return to_uint8(decoder(z)).cpu().numpy()

    def photo(indices):
        if not indices:  # another rank has it
            return
        try:
            image = np.array(center_crop(open_image(args.reconstruct), side))  # (S, S, 3)
        except Exception as error:  # Pillow raises nearly any kind for a damaged file
            raise ValueError(f"--reconstruct {args.reconstruct} is no picture, or damaged ({error})") from None
        yield np.stack([image, decoded(torch.from_numpy(image).permute(2, 0, 1)[None])[0]])

    def folder(indices):
        for pixels in evaluation_batches(source, indices, side, args.batch, args.workers, device):
            yield decoded(pixels)

    if os.path.isfile(args.reconstruct):
        write_images(args, device, 1, 2, 2, side, photo)
    else:
        source = image_source(args.reconstruct, side)
        write_images(args, device, len(source), 1, 8, side, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_images(args, device, items, per_item, columns, side, pictures):
    """Write --out: `per_item` images of each of the `items`, uint8 (side, side, 3); a PNG grid has so many columns.

    pictures(indices) yields uint8 (n, side, side, 3), the images of the items with these indices, in order. Each rank
    writes its share into one temporary npy; rank 0 makes --out of it.
    """
    shape = (items * per_item, side, side, 3)
    if args.out.suffix == ".png" and shape[0] > 10000:
        raise ValueError(f"{shape[0]} images are too many for one picture: give --out an .npz")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    raw, temporary = Path(f"{args.out}.tmp.npy"), Path(f"{args.out}.tmp")
    mine = range(items * args.rank // args.world_size, items * (args.rank + 1) // args.world_size)

    def wait():
        if args.world_size > 1:
            dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)

    try:
        if args.rank == 0:
            np.lib.format.open_memmap(raw, "w+", np.uint8, shape)
        wait()
        with open(raw, "r+b") as file, torch.no_grad():
            file.seek((mine.start - items) * per_item * side * side * 3, os.SEEK_END)
            with tqdm(total=len(mine) * per_item, unit="image", disable=args.rank > 0) as bar:
                for images in pictures(mine):
                    file.write(images.tobytes())
                    bar.update(len(images))
            file.flush()
            os.fsync(file.fileno())  # then other nodes see it
        wait()
        if args.rank == 0:
            if args.out.suffix == ".npz":
                with zipfile.ZipFile(temporary, "w") as archive:
                    archive.write(raw, "arr_0.npy")
            else:
                image_grid(np.load(raw), columns).save(temporary, "png")
            os.replace(temporary, args.out)
            print(f"{shape[0]} images in {args.out}")
        wait()
    finally:  # an interrupted run leaves no temporary file
        if args.rank == 0:
            raw.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)


def main(argv=None):
    parser, args = parse_args(argv)
    with one_line_refusals(parser):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that write_images cleans up
        device, autocast = set_up(args)
        (reconstruct if args.reconstruct else generate)(args, device, autocast)


if __name__ == "__main__":
    main()
