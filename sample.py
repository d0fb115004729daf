"""From checkpoints to images: sample, or reconstruct, into a PNG grid, an npz for fid.py, or a folder of PNG files.

    python sample.py --classes 207 360 --per-class 8 --out samples.png                # inputs from runs/imagenet256/
    python sample.py --dit dit.pt --decoder decoder.pt --guide weak.pt --scale 1.42   # AutoGuidance
    python sample.py --scale 2 --interval 0.1 0.9                                     # classifier-free guidance
    torchrun --nproc_per_node=gpu sample.py --num-samples 50000 --out samples.npz     # for FID: class-balanced labels
    torchrun --nproc_per_node=gpu sample.py --reconstruct imagenet/val --out recon.npz
    python sample.py --reconstruct photo.jpg --out recon.png                          # original beside reconstruction

Paper: arXiv 2510.11690. Sample i is the same image for any batch size and any number of GPUs, up to float rounding.
The published checkpoints (nyu-visionx/RAE-collections) go through the same flags; a bare diffusion model needs --stats.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import decoder as decoders
import dit as dits
import encoder as encoders

IMAGENET = dict(classes=[207, 360, 387, 974, 88, 979, 417, 279], per_class=4, steps=50, scale=1.0, batch=32)
PRESETS = {
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(batch=8),
    "demo": IMAGENET | dict(classes=list(range(10)), per_class=10, steps=25, scale=2.0, batch=100),
}


def parse_args(argv):
    pre = encoders.Arguments(add_help=False)
    pre.add_argument("--preset", default="imagenet256")
    defaults = PRESETS.get(pre.parse_known_args(argv)[0].preset, {})

    parser = encoders.Arguments(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet256", help="the set of defaults")
    add("--dit", metavar="PATH", help="diffusion model, ours or published (default runs/<preset>/dit/dit.pt)")
    add("--decoder", metavar="PATH", help="decoder, ours or published (default runs/<preset>/decoder/decoder.pt)")
    add("--stats", metavar="PATH", help="latent statistics of a published diffusion model")
    add("--encoder", choices=encoders.ENCODERS, default="dinov2-b", help="that of published checkpoints; ours know it")
    add("--encoder-weights", metavar="PATH", help="local file instead of timm's download, for --reconstruct")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--classes", type=int, nargs="+", help="class numbers to draw")
    add("--per-class", type=int, help="images of each class")
    # not --num: torchrun takes that for an abbreviation of flags of its own
    either("--num-samples", type=int, metavar="N", help="draw this many images instead, all classes in turn")
    add("--unconditional", action="store_true", help="draw without a class")
    add("--scale", type=float, help="guidance scale; 1: none; the paper's AutoGuidance: 1.42 at 256 px, 1.5 at 512 px")
    add("--guide", metavar="PATH", help="a weaker diffusion model: AutoGuidance instead of classifier-free guidance")
    add("--interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times t that are guided")
    add("--steps", type=int, help="steps of the sampler")
    add("--heun", action="store_true", help="Heun's method, two model evaluations for each step; default Euler")
    add("--reconstruct", metavar="PATH", help="encode and decode a photo, or a folder of images, instead of sampling")
    add("--out", default="samples.png", help=".png: a grid; .npz: uint8 (n, H, W, 3); else a folder of PNG files")
    add("--overwrite", action="store_true", help="replace an npz or a folder that was made with other settings")
    add("--seed", type=int, default=0, help="of the starting noise")
    add("--batch", type=int, help="images at a time in each process")
    add("--precision", choices=["float32", "tf32", "bf16"], default="tf32", help="bf16 is reported to cost FID")
    add("--compile", action="store_true", help="torch.compile: pays for thousands of images on a GPU")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="loader processes, for --reconstruct")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.dit = args.dit or f"runs/{args.preset}/dit/dit.pt"
    args.decoder = args.decoder or f"runs/{args.preset}/decoder/decoder.pt"
    args.out = Path(args.out)
    parser.check_numbers(args, above=("per_class", "num_samples", "steps", "batch"), least=("seed", "workers", "scale"))
    low, high = args.interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--interval {low:g} {high:g}: give 0 <= LOW <= HIGH <= 1")
    ending, photo = args.out.suffix.lower(), args.reconstruct and os.path.isfile(args.reconstruct)
    if ending in Image.registered_extensions().keys() - {".png"} | {".npy", ".pt"} or photo and ending != ".png":
        parser.error(f"--out {args.out}: give a .png" + ("" if photo else ", an .npz, or a folder for PNG files"))
    if photo and args.out.exists() and os.path.samefile(args.reconstruct, args.out):
        parser.error(f"--out {args.out} is the photo itself: choose another")
    parser.check_out(args.out, folder=ending not in (".png", ".npz"))
    return parser, args


def load_models(args):
    """The sampler's two or three models, checked against each other -> (dit, guide or None, stats, shift, decoder)."""
    model, info = dits.load_dit(args.dit)
    shape = (model.config["latent_dim"], model.config["grid"], model.config["grid"])
    if not args.stats and "stats" not in info:
        raise ValueError(f"{args.dit} is a bare diffusion model: give its latent statistics with --stats stat.pt")
    stats = encoders.load_stats(args.stats, shape) if args.stats else info["stats"]
    decoder, record = load_decoder(args, info.get("encoder"))
    found = (decoder.config["latent_dim"], decoder.config["grid"], decoder.config["grid"])
    if found != shape:
        raise ValueError(f"{args.decoder} decodes latents of shape {found}, but {args.dit} draws {shape}")
    name = info.get("encoder", dict(name=args.encoder))["name"]
    if record["name"] != name:
        raise ValueError(f"{args.decoder} belongs to encoder {record['name']}, but {args.dit} to {name}"
                         + ("" if "encoder" in info else ", as --encoder says"))  # fmt: skip
    guide = None
    if args.guide:
        if args.scale == 1:
            raise ValueError(f"--guide {args.guide} needs a --scale: the paper has 1.42 at 256 px and 1.5 at 512 px")
        guide, theirs = dits.load_dit(args.guide)
        ours = {key: model.config[key] for key in ("latent_dim", "grid", "num_classes")} | {"encoder": name}
        theirs = guide.config | {"encoder": theirs.get("encoder", {}).get("name", name)}
        differ = ", ".join(f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if theirs[key] != ours[key])
        if differ:
            raise ValueError(f"--guide {args.guide} does not fit {args.dit}: {differ}")
    elif args.scale != 1 and (args.unconditional or not model.num_classes or info.get("label_dropout") == 0):
        raise ValueError(f"--scale {args.scale:g}: no classifier-free guidance without classes, or for a model trained "
                         "without label dropout; give --scale 1, or a weaker model by --guide")  # fmt: skip
    return model, guide, stats, info.get("shift", dits.shift_for(shape)), decoder


def load_decoder(args, encoder=None):
    """The decoder, and the record of its encoder. A published one belongs to `encoder`, or else to --encoder."""
    if not encoder:
        encoder = encoders.ENCODERS[args.encoder]["pixels"] | {"name": args.encoder}
    decoder, info = decoders.load_decoder(args.decoder, {key: encoder[key] for key in ("mean", "std")})
    return decoder, info.get("encoder", encoder | {"image_size": decoder.config["grid"] * 16})


def labels_of(args, model):
    """The class of every sample in order, the null class for none."""
    if args.unconditional or not model.num_classes:
        return [model.null_class] * (args.num_samples or len(args.classes) * args.per_class)
    if args.num_samples:
        return [i % model.num_classes for i in range(args.num_samples)]
    wrong = [c for c in args.classes if not 0 <= c < model.num_classes]
    if wrong:
        raise ValueError(f"--classes {wrong[0]}: {args.dit} knows the classes 0 to {model.num_classes - 1}")
    return [c for c in args.classes for _ in range(args.per_class)]


class Output:
    """Where images go by the ending of the path: images[i] = uint8 (H, W, 3) and flush() on any rank, then close().

    Of a folder only the missing files are asked for. An npz, or a PNG grid, is made at the end from a file of raw bytes
    beside it, which all ranks write to, so it must be on a disk that all nodes share.
    """

    def __init__(self, path, shape, settings, overwrite, columns):
        self.path, self.shape, self.columns = path, shape, columns
        self.settings = json.dumps(settings, sort_keys=True)
        self.kind = path.suffix.lower() if path.suffix.lower() in (".png", ".npz") else "folder"
        self.note, self.raw = path / ".settings.json", path.with_name(path.name + ".tmp.raw")
        found = None  # the settings of what is there
        if self.kind == "folder" and path.exists() and any(path.iterdir()):
            if not self.note.exists():
                raise ValueError(f"{path} is a folder with other content: choose another --out")
            found = self.note.read_text()
        elif self.kind == ".npz" and path.exists():
            try:
                with np.load(path) as file:
                    found = file["settings"].tobytes().decode()
            except Exception:
                found = "none"
        self.same = found == self.settings
        if found and not self.same and not overwrite:
            raise ValueError(f"{path} was made with other settings: choose another --out or give --overwrite")
        self.finished = self.kind == ".npz" and self.same

    def open(self, rank):
        """Start writing; call it on every rank, the main rank first. Returns the indices that are missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.kind != "folder":
            self.file = open(self.raw, "r+b" if rank else "wb", buffering=0)
            return range(self.shape[0])
        self.path.mkdir(exist_ok=True)
        if rank == 0 and not self.same:
            for old in self.path.glob("[0-9]" * 6 + ".png"):
                old.unlink()
            self.note.write_text(self.settings)
        there = {file.name for file in self.path.iterdir()}
        return [i for i in range(self.shape[0]) if f"{i:06}.png" not in there]

    def __setitem__(self, i, image):
        if self.kind == "folder":
            temporary = self.path / f".{i:06}.tmp"
            Image.fromarray(image).save(temporary, "png")
            os.replace(temporary, self.path / f"{i:06}.png")
        else:
            os.pwrite(self.file.fileno(), image.tobytes(), i * image.nbytes)

    def flush(self):
        """On every rank, before they meet: then other nodes see what was written here."""
        if self.kind != "folder":
            os.fsync(self.file.fileno())
            self.file.close()

    def close(self):
        """Finish on the main rank, after all ranks have written."""
        if self.kind == "folder":
            return
        images = np.memmap(self.raw, np.uint8, "r", shape=self.shape)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            if self.kind == ".npz":
                np.savez(file, arr_0=images, settings=np.frombuffer(self.settings.encode(), np.uint8))
            else:
                decoders.image_grid(images, self.columns).save(file, "png")
        os.replace(temporary, self.path)
        self.raw.unlink()


def main(argv=None):
    parser, args = parse_args(argv)
    device, autocast = encoders.set_up(args)
    names = ["reconstruct", "decoder", "encoder", "encoder_weights", "precision"] if args.reconstruct else [
        "dit", "decoder", "encoder", "stats", "guide", "scale", "interval", "steps", "heun", "unconditional",
        "num_samples", "classes", "per_class", "seed", "precision"]  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    settings |= {f"{key} of": os.path.getmtime(path) for key, path in settings.items() if os.path.isfile(str(path))}
    try:
        if args.reconstruct:
            if args.reconstruct != "shapes" and not os.path.exists(args.reconstruct):
                raise ValueError(f"--reconstruct {args.reconstruct}: not there; give a photo, a folder, or `shapes`")
            decoder, record = load_decoder(args)
            encoder = encoders.Encoder(record["name"], record["image_size"], args.encoder_weights)
            if (encoder.latent_dim, encoder.grid) != (decoder.config["latent_dim"], decoder.config["grid"]):
                raise ValueError(f"{args.decoder} does not decode {encoder.latent_dim}-wide tokens on a grid of "
                                 f"{encoder.grid} x {encoder.grid}, those of {record['name']}")  # fmt: skip
            if os.path.isfile(args.reconstruct):
                return reconstruct_photo(args, encoder.to(device), decoder.to(device), device)
            source = encoders.image_source(args.reconstruct, decoder.image_size)
            count, columns = len(source), 8
        else:
            model, guide, stats, shift, decoder = load_models(args)
            labels = labels_of(args, model)
            count, columns = len(labels), 8 if args.num_samples else args.per_class
        if args.out.suffix.lower() == ".png" and count > 10000:
            raise ValueError(f"{count} images are too many for one picture: give --out an .npz or a folder")
        shape = (count, decoder.image_size, decoder.image_size, 3)
        output = Output(args.out, shape, settings | {"images": count}, args.overwrite, columns)
        if output.finished:
            if args.rank == 0:
                print(f"finished: {args.out} has these {count} images already")
            return
        found = [output.open(0) if args.rank == 0 else None]  # the main rank creates what the others open
        if args.distributed:
            dist.broadcast_object_list(found, device=device)
        missing = found[0]  # as the main rank sees it: a node may have an older listing of a folder
        if args.rank > 0:
            output.open(args.rank)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    mine = missing[args.rank :: args.world_size]
    parts = [mine[i : i + args.batch] for i in range(0, len(mine), args.batch)]
    decoder = decoder.to(device)
    if args.reconstruct:
        images = encoders.Images(source, lambda image, _: encoders.center_crop(image, decoder.image_size), strict=True)
        loader = iter(encoders.make_loader(images, [[(i, i) for i in p] for p in parts], args.workers, device))
        encoder = encoder.to(device)
    else:
        model, guide = model.to(device), guide.to(device) if guide else None
        stats = {key: value.to(device) for key, value in stats.items()}
        if args.compile:
            encoders.compile_blocks(decoder, *([model, guide] if guide else [model]))
    with torch.no_grad(), autocast, tqdm(total=len(mine), unit="image", disable=args.rank > 0) as bar:
        for part in parts:
            if args.reconstruct:
                try:
                    pixels, *_ = next(loader)  # (B, 3, S, S) uint8
                except (RuntimeError, ValueError) as error:  # an unreadable image, or a dead process of the loader
                    bar.leave = False
                    bar.close()
                    output.raw.unlink(missing_ok=True)
                    reason = str(error.__cause__ or error).strip()  # a process that lives puts its traceback in front
                    parser.error(reason.splitlines()[-1].removeprefix("ValueError: "))
                z = encoder(pixels.to(device, non_blocking=True).float() / 255)
            else:
                y = torch.tensor([labels[i] for i in part], device=device)
                noise = dits.sample_noise(args.seed, part, stats["mean"].shape).to(device)
                velocity = dits.guided(model, y, args.scale, guide, args.interval)
                z = dits.denormalize(dits.sample(velocity, noise, args.steps, shift, args.heun), stats)
            for i, image in zip(part, decoders.to_uint8(decoder(z)).cpu().numpy(), strict=True):
                output[i] = image
            bar.update(len(part))
    output.flush()
    if args.distributed:
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if args.rank == 0:
        output.close()
        print(f"{count} images in {args.out}")
    if args.distributed:
        dist.destroy_process_group()


def reconstruct_photo(args, encoder, decoder, device):
    """One photo, centre-cropped, beside its reconstruction."""
    try:
        photo = np.asarray(encoders.center_crop(encoders.open_image(args.reconstruct), decoder.image_size))
    except Exception as error:  # Pillow raises nearly any kind for a damaged file
        raise ValueError(f"--reconstruct {args.reconstruct}: not a picture, or a damaged one ({error})") from None
    pixels = torch.from_numpy(photo.transpose(2, 0, 1).copy()).to(device)[None].float() / 255  # (1, 3, S, S)
    decoded = decoders.to_uint8(decoder(encoder(pixels)))[0].cpu().numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    decoders.image_grid(np.stack([photo, decoded]), 2).save(args.out)
    print(f"original and reconstruction in {args.out}")


if __name__ == "__main__":
    main()
