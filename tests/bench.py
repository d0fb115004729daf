"""How fast is it here? Every hot path, as a Markdown table; the numbers are appended to runs/bench.jsonl too.

    python tests/bench.py                       # the published sizes; on a CPU with one image at a time
    python tests/bench.py --quick               # small sizes, under two minutes on two CPU cores
    python tests/bench.py --only dit sample     # some parts

Weights are random, which are as fast as trained ones; training steps are those of the real scripts, compiled on CUDA,
with images that lie ready in memory (the part `loader` measures how fast files arrive). Peak: the fastest of large
matrix products in the same precision. Its share counts the model's FLOPs alone, from shapes: two for each multiply-add
of the matrix products, convolutions and attention of a forward (torch's FlopCounterMode); a training step takes three
forwards of what trains, one of what is frozen, two of what is frozen and passes a gradient on, and none for
recomputation, AdamW, EMA, norms or the loss.
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decoder
import dit
import encoder
import fid
import train_decoder
import train_dit

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PUBLISHED = dict(
    encoder="dinov2-b", size=256, decoder="ViT-XL", lpips=1, fid_images=16, fid_rows=10000, files=500,
    dits=["DiT-XL", "DiT-DH-S", "DiT-DH-B", "DiT-DH-L", "DiT-DH-XL"], sampled=("DiT-DH-XL", "DiT-DH-S"),
)  # fmt: skip
SETTINGS = {  # batches: micro-batch, and micro-batches in a step; the GPU's are the recipe's, as one of 8 or 32 GPUs
    "cuda": PUBLISHED | dict(encoded=256, decoder_batch=(16, 4), dit_batch=(32, 4), drawn=64, steps=50, measured=20),
    "cpu": PUBLISHED | dict(encoded=4, decoder_batch=(1, 1), dit_batch=(1, 1), drawn=1, steps=2, measured=2),
    "quick": dict(
        encoder="random-tiny", size=32, decoder="ViT-tiny", lpips=0, fid_images=2, fid_rows=1000, files=100,
        dits=["DiT-DH-tiny"], sampled=("DiT-DH-tiny", "DiT-DH-tiny"), encoded=100, decoder_batch=(2, 1),
        dit_batch=(32, 1), drawn=100, steps=5, measured=20,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds(run, repeats=1):
    """Wall time of a call, the mean of `repeats`, after one that warms up."""
    run()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - began) / repeats


def enough_memory(model, bytes_per_parameter=20):
    """Whether its weights, gradient, moving average and AdamW's two moments find room."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(0).total_memory if CUDA else total
    return bytes_per_parameter * sum(p.numel() for p in model.parameters()) < 0.8 * total


def reset_peak_memory():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):  # Linux: the peak of the resident set begins anew
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # gives back what earlier rows have freed
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """GiB allocated on the GPU, or resident in this process."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return None


def set_precision(precision):
    """tf32 sets the matrix products as the scripts do; returns the autocast context."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def matmul_peak(precision, n):
    """FLOP/s of the fastest of five n x n matrix products."""
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    set_precision(precision)
    return 2 * n**3 / min(seconds(lambda: a @ a, 5) for _ in range(5))


@torch.no_grad()
def forward_flops(model, *inputs):
    # by its definition: not every version of torch counts every attention kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*(x.to(DEVICE) for x in inputs))
    return counter.get_total_flops()


def empty(build):
    """The model on the device with whatever the memory holds: enough to count, and quick to make."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device=DEVICE)


def make_dit(name, latents):
    return dit.DiT(*latents[:2], 1000, **dit.SIZES[name], allow_narrow=True)  # a narrow one is as fast as it would be


def make_decoder(s, latents):
    return decoder.Decoder(*latents[:2], s["size"] // latents[1], **decoder.SIZES[s["decoder"]])


def dit_flops(name, latents):
    model = empty(lambda: make_dit(name, latents))
    return forward_flops(model, torch.zeros(1, *latents), torch.zeros(1), torch.zeros(1, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# Random weights and ready images in the place of downloads and files


def random_weights(module, *_, **__):
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)


def ready_batches(dataset, batches, workers, device):
    size = dataset.source.size
    for items in batches:
        n = len(items)
        pixels = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
        yield pixels.pin_memory() if CUDA else pixels, torch.arange(n) % 10, torch.arange(n), torch.zeros(n)


@contextlib.contextmanager
def offline():
    """The scripts' own code, but for what they would download, read and save."""
    with contextlib.ExitStack() as stack:
        for place, name, new in (
            (encoder, "load_vit", lambda network, *_: network),
            (encoder, "make_loader", ready_batches),
            (fid, "load_weights", random_weights),
            (train_decoder, "load_dino", lambda *_: timm.create_model(train_decoder.DINO, act_layer="gelu_tanh")),
            (encoder, "save", lambda files: None),
        ):
            stack.enter_context(mock.patch.object(place, name, new))
        yield


def training_speed(script, argv, s, batch, steps):
    """Seconds for each step of a training script, over its second interval of so many steps, from its log."""
    micro, accumulate = batch
    total = micro * accumulate
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            script.main([
                "--data", "shapes", "--encoder", s["encoder"], "--size", str(s["size"]), "--out", out,
                "--batch", str(total), "--micro-batch", str(micro), "--log-every", str(steps),
                "--epochs", str(2 * steps * total / 8000), "--preview-every", "0", "--warmup", "0", *argv,
            ])  # fmt: skip
        with open(Path(out) / "log.csv") as file:
            return total / float(list(csv.DictReader(file))[-1]["images_per_s"])


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each yields (what, images, seconds, FLOPs or None)


def encode(s, precision, latents):
    model = encoder.Encoder(s["encoder"], s["size"]).to(DEVICE)
    images = torch.rand(s["encoded"], 3, s["size"], s["size"], device=DEVICE)
    flops = len(images) * forward_flops(model, images[:1])
    if CUDA:
        encoder.compile_blocks(model.vit)
    with set_precision(precision):
        yield f"encode, {s['encoder']}", len(images), seconds(lambda: model(images), s["measured"]), flops


def decoder_step(s, precision, latents):
    images = torch.zeros(2, 1, 3, s["size"], s["size"])
    D = forward_flops(empty(lambda: make_decoder(s, latents)), torch.zeros(1, *latents))
    E = forward_flops(encoder.Encoder(s["encoder"], s["size"]).to(DEVICE), images[0])
    V = forward_flops(fid.LPIPS().to(DEVICE), *images) / 2 if s["lpips"] else 0  # of one image
    discriminator = train_decoder.Discriminator().to(DEVICE)
    T = forward_flops(discriminator.vit, torch.zeros(1, 3, 224, 224))
    H = forward_flops(discriminator, images[0]) - T
    del discriminator
    count = s["decoder_batch"][0] * s["decoder_batch"][1]
    for gan in (0, 0.75):
        # The generator's term: T + H forward and back to the pixels. The discriminator's: a fresh reconstruction, T
        # for a real and a fake image, H trained on both.
        flops = E + 3 * D + 3 * V + bool(gan) * (2 * (T + H) + D + 2 * (T + 3 * H))
        argv = ["--model", s["decoder"], "--precision", precision, "--gan", str(gan), "--lpips", str(s["lpips"]),
                "--disc-start", "0", "--gan-start", "0"]  # fmt: skip
        steps = s["measured"] if not gan or CUDA else 1
        step = training_speed(train_decoder, argv, s, s["decoder_batch"], steps)
        loss = ("L1, LPIPS" if s["lpips"] else "L1") + (", GAN" if gan else "")
        yield f"decoder step, {s['decoder']}, {loss}", count, step, count * flops


def dit_step(s, precision, latents):
    E = forward_flops(encoder.Encoder(s["encoder"], s["size"]).to(DEVICE), torch.zeros(1, 3, s["size"], s["size"]))
    count = s["dit_batch"][0] * s["dit_batch"][1]
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stat.pt"
        torch.save({"mean": None, "var": torch.ones(latents)}, stats)
        for name in s["dits"]:
            with torch.device("meta"):
                fits = enough_memory(make_dit(name, latents))
            if not fits:
                print(f"left out, too large for the memory: {name}", file=sys.stderr)
                continue
            flops = count * (E + 3 * dit_flops(name, latents))
            argv = ["--model", name, "--precision", precision, "--stats", str(stats), "--allow-narrow"]
            yield (
                f"DiT step, {name}, with encoder",
                count,
                training_speed(train_dit, argv, s, s["dit_batch"], s["measured"]),
                flops,
            )


@torch.no_grad()
def sampling(s, precision, latents):
    names = dict(zip(("strong", "weak"), s["sampled"], strict=True))
    flops = {key: dit_flops(name, latents) for key, name in names.items()}
    models = {key: make_dit(name, latents).to(DEVICE).eval() for key, name in names.items()}
    strong, weak = models["strong"], models["weak"]
    for model in models.values():
        random_weights(model)  # adaLN-zero's zeros would leave nothing to guide
    pixels = make_decoder(s, latents).to(DEVICE).eval()
    D = forward_flops(pixels, torch.zeros(1, *latents))
    if CUDA:
        encoder.compile_blocks(strong, weak, pixels)
    n, steps = s["drawn"], s["steps"]
    noise = torch.randn(n, *latents, device=DEVICE)
    y = torch.arange(n, device=DEVICE) % 1000
    inside = sum(0.1 <= t <= 0.9 for t in dit.time_shift(torch.linspace(1, 0, steps + 1), dit.shift_for(latents))[:-1])
    for what, velocity, total in (
        ("unguided", dit.guided(strong, y), steps * flops["strong"]),
        ("CFG", dit.guided(strong, y, 2.0), steps * 2 * flops["strong"]),
        ("CFG for t in [0.1, 0.9]", dit.guided(strong, y, 2.0, None, (0.1, 0.9)), (steps + inside) * flops["strong"]),
        (f"AutoGuidance by {names['weak']}", dit.guided(strong, y, 1.42, weak), steps * sum(flops.values())),
        (f"the guide alone, {names['weak']}", dit.guided(weak, y), steps * flops["weak"]),
    ):
        with set_precision(precision):
            taken = seconds(lambda: pixels(dit.sample(velocity, noise, steps, dit.shift_for(latents))))  # noqa: B023
        yield f"sample, {names['strong']}, {steps} steps, {what}", n, taken, n * (float(total) + D)


@torch.no_grad()
def evaluation(s, precision, latents):
    """The parts of fid.py, always in float32."""
    set_precision(precision)
    n, rows = s["fid_images"], s["fid_rows"]
    images = torch.randint(256, (n, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    a, b = images / 255, images.flip(0) / 255
    features = torch.randn(rows, 2048, device=DEVICE)
    inception, lpips = fid.load_inception(device=DEVICE), fid.LPIPS().to(DEVICE)
    statistics = fid.FeatureStatistics(2048, DEVICE)
    flops = n * forward_flops(inception, images[:1])
    yield "Inception features, 256 px", n, seconds(lambda: inception(images)), flops
    yield "mean and covariance, 2048 dimensions", rows, seconds(lambda: statistics.update(features)), None
    what = f"precision and recall, {rows} against {rows}"
    yield what, rows, seconds(lambda: fid.precision_recall(features, features)), None
    yield "Inception score", rows, seconds(lambda: fid.inception_score(features[:, :1008])), None
    yield "PSNR, 256 px", n, seconds(lambda: fid.psnr(a, b)), None
    yield "SSIM, 256 px", n, seconds(lambda: fid.ssim(a, b)), None
    yield "LPIPS, 256 px", n, seconds(lambda: lpips(2 * a - 1, 2 * b - 1)), n * forward_flops(lpips, a[:1], b[:1])
    moments = statistics.mean, statistics.cov
    began = time.perf_counter()
    fid.frechet_distance(*moments, *moments)
    yield "Frechet distance, 2048 dimensions", None, time.perf_counter() - began, None


def loading(s, precision, latents):
    """Generated 500 x 375 JPEG files through the loader, as stage 1 and stage 2 crop them."""
    rng = np.random.default_rng(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(s["files"]):
            (Path(folder) / str(i % 10)).mkdir(exist_ok=True)
            smooth = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((500, 375))
            grain = np.asarray(smooth) + rng.normal(0, 8, (375, 500, 3))  # as many bytes as a photograph
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i % 10}/{i}.jpg", quality=90)
        source = encoder.ImageFolder(folder)
        for stage, transform in (
            ("stage 1", lambda image, rng: encoder.random_crop(image, 384, 256, rng)),
            ("stage 2", lambda image, rng: encoder.center_crop_flip(image, 256, rng)),
        ):
            for workers in sorted({n for n in (0, 1, 2, 4, 8, 12, 16) if n < cores} | {cores}):
                images, steps = encoder.Images(source, transform), range(4 * s["files"] // 20)
                batches = encoder.training_batches(len(source), 20, 20, steps, seed=0)
                loader = iter(encoder.make_loader(images, batches, workers, DEVICE))
                next(loader)  # the workers have started
                began = time.perf_counter()
                count = sum(len(batch[0]) for batch in loader)
                yield f"loader, {stage}, {workers} workers", count, time.perf_counter() - began, None


PARTS = {"encode": encode, "decoder": decoder_step, "dit": dit_step, "sample": sampling, "fid": evaluation,
         "loader": loading}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--quick", action="store_true", help="small sizes, under two minutes on two CPU cores")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts (default: all)")
    parser.add_argument("--json", default="runs/bench.jsonl", help="one line is appended (default: %(default)s)")
    args = parser.parse_args(argv)
    s = SETTINGS["quick" if args.quick else DEVICE.type]
    precisions = ["tf32", "bf16"] if CUDA else ["float32"]
    torch.manual_seed(0)
    with offline():
        record = encoder.Encoder(s["encoder"], s["size"]).record
    latents = (record["latent_dim"], record["grid"], record["grid"])
    peaks = {p: matmul_peak(p, 8192 if CUDA else 1024) for p in {*precisions, "float32"}}

    name = (
        torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})"
    )
    about = dict(hardware=name, torch=torch.__version__, timm=timm.__version__, date=time.strftime("%F"),
                 peak_tflops={p: peak / 1e12 for p, peak in peaks.items()}, quick=args.quick)  # fmt: skip
    peak = ", ".join(f"{p} {value:.3g}" for p, value in about["peak_tflops"].items())
    print(f"{name}, torch {about['torch']}, timm {about['timm']}, {about['date']}; measured matmul TFLOP/s: {peak}\n")
    print("| what | precision | images | ms | images/s | s for 1,000 images | share of peak | peak GiB |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    rows = []
    for part in args.only:
        for precision in precisions if part not in ("fid", "loader") else ["float32"]:
            reset_peak_memory()
            patched = offline() if part != "loader" else contextlib.nullcontext()
            with patched:
                for what, images, time_taken, flops in PARTS[part](s, precision, latents):
                    row = dict(what=what, precision=precision, images=images, ms=1000 * time_taken)
                    row["images_per_s"] = images and images / time_taken
                    row["s_per_1000"] = images and 1000 * time_taken / images
                    row["share_of_peak"] = flops and flops / time_taken / peaks[precision]
                    row["peak_gib"] = peak_memory()
                    rows.append(row)
                    shown = [x if isinstance(x, str | int) else "" if x is None else f"{x:.3g}" for x in row.values()]
                    print(f"| {' | '.join(map(str, shown))} |", flush=True)
                    reset_peak_memory()
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    with open(args.json, "a") as file:
        print(json.dumps(about | dict(rows=rows)), file=file)


if __name__ == "__main__":
    main()
