"""Measure the speed of every hot path: print a Markdown table, and append JSON to runs/bench.jsonl.

    python tests/bench.py                         # the published sizes; on a CPU with one image at a time
    python tests/bench.py --only encode swiglu    # some parts
    python tests/bench.py --quick                 # small sizes, under two minutes on two CPU cores

Weights are random, which does not change the speed. Training steps are those of the scripts, compiled on CUDA, with
images in memory (the part `loader` measures reading files). Peak: the fastest of large matrix products in the same
precision. The share of peak counts the FLOPs of the models alone, from shapes: two for each multiply-add of the matrix
products, convolutions and attention of a forward pass (torch's FlopCounterMode). A training step counts as three
forward passes of trained networks, one of frozen ones, and two of frozen ones through which a gradient flows;
recomputation, AdamW, EMA, norms and losses are not counted. If a row does not fit into memory, it says so.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
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
    encoder="dinov2-b", size=256, latents=(768, 16, 16), decoder="ViT-XL", lpips=1, fid_images=16, fid_rows=10000,
    dits=["DiT-XL", "DiT-DH-S", "DiT-DH-B", "DiT-DH-L", "DiT-DH-XL"], models=("DiT-DH-XL", "DiT-DH-S"), files=500,
    tokens=256, swiglu=2048,
)
SETTINGS = {  # batches: micro-batch, and micro-batches in a step; on a GPU those of the recipes on 8 or 32 GPUs
    "cuda": PUBLISHED | dict(encoded=256, decoder_batch=(16, 4), dit_batch=(32, 4), micro_batches=(16, 32, 64),
                             swiglu_batch=32, saved_gb=17, sampled=64, steps=50, repeats=20),
    "cpu": PUBLISHED | dict(encoded=4, decoder_batch=(1, 1), dit_batch=(1, 1), micro_batches=(1, 2),
                            swiglu_batch=1, saved_gb=0.5, sampled=1, steps=2, repeats=2),
    "quick": dict(encoder="random-tiny", size=32, latents=(128, 4, 4), decoder="ViT-tiny", lpips=0, fid_images=2,
                  fid_rows=1000, dits=["DiT-DH-tiny"], models=("DiT-DH-tiny", "DiT-DH-tiny"), files=100, tokens=64,
                  swiglu=128, encoded=100, decoder_batch=(2, 1), dit_batch=(32, 1),
                  micro_batches=(1, 2), swiglu_batch=1, saved_gb=0.02, sampled=100, steps=5, repeats=20),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def fitting(run):
    """Decorator: return None if the memory of the GPU is too small, so that the next rows are measured."""

    @functools.wraps(run)
    def attempt(*arguments):
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return run(*arguments)

    return attempt


@fitting
def seconds(run, repeats, *inputs):
    """Wall time of run(*inputs), the mean of `repeats` calls after a first one."""
    run(*inputs)
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run(*inputs)
    synchronize()
    return (time.perf_counter() - began) / repeats


def enough_memory(model, bytes_per_parameter=20):
    """Whether the weights, the gradient, the EMA and AdamW's two moments fit into memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(0).total_memory if CUDA else total
    return bytes_per_parameter * sum(p.numel() for p in model.parameters()) < 0.8 * total


def reset_peak_memory():
    if CUDA:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):  # Linux: reset the peak of the resident set
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # return memory that earlier rows have freed
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """GiB allocated on the GPU, or resident in this process."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return None


def set_precision(precision):
    """Set the precision of matrix products as the scripts do -> the autocast context."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def matmul_peak(precision, n):
    """FLOP/s of the fastest of five n x n matrix products."""
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    set_precision(precision)
    return 2 * n**3 / min(seconds(torch.mm, 5, a, a) for _ in range(5))


@torch.no_grad()
def forward_flops(model, *inputs):
    # not every version of torch counts every attention kernel: use the plain one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*(x.to(DEVICE) for x in inputs))
    return counter.get_total_flops()


def empty(build):
    """The model on the device, without initialisation: enough to count FLOPs, and quick to build."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device=DEVICE)


def make_dit(name, latents):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model narrower than its tokens is as fast
        return dit.DiT(*latents[:2], 1000, **dit.SIZES[name])


def make_decoder(s):
    return decoder.Decoder(*s["latents"][:2], s["size"] // s["latents"][1], **decoder.SIZES[s["decoder"]])


def dit_flops(name, latents):
    model = empty(lambda: make_dit(name, latents))
    return forward_flops(model, torch.zeros(1, *latents), torch.zeros(1), torch.zeros(1, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# The scripts with random weights and images in memory instead of downloads and files


def random_weights(module, *_):
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)


def not_pretrained(model, weights, flag, **options):
    return timm.create_model(model, **options)


def ready_batches(dataset, batches, workers, device):
    size = dataset.source.size
    for items in batches:
        n = len(items)
        pixels = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
        yield pixels.pin_memory() if CUDA else pixels, torch.arange(n) % 10, torch.arange(n)


@contextlib.contextmanager
def offline():
    """Patch the scripts: no downloads, no image files, no checkpoints."""
    with contextlib.ExitStack() as stack:
        for place, name, new in (
            (encoder, "pretrained", not_pretrained),
            (fid, "pretrained", not_pretrained),
            (fid, "load_url", random_weights),
            (train_decoder, "pretrained", not_pretrained),
            (train_decoder, "make_loader", ready_batches),
            (train_dit, "make_loader", ready_batches),
            (train_decoder, "save_checkpoint", lambda files: None),
            (train_dit, "save_checkpoint", lambda files: None),
        ):
            stack.enter_context(mock.patch.object(place, name, new))
        yield


@fitting
def step_seconds(script, s, precision, micro_batch, accumulate, steps, *flags):
    """Seconds for each step of a training script, from its log: the mean over the second half of 2 * `steps` steps."""
    batch = micro_batch * accumulate
    flags = ["--data", "shapes", "--encoder", s["encoder"], "--size", s["size"], "--precision", precision, "--batch",
             batch, "--micro-batch", micro_batch, "--log-every", steps, "--epochs", 2 * steps * batch / 8000,
             "--preview-every", 0, "--warmup", 0, *flags]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            script.main([*map(str, flags), "--out", out])
        with open(Path(out) / "log.csv") as file:
            return batch / float(list(csv.DictReader(file))[-1]["images_per_s"])


def decoder_row(s, precision, batch, gan):
    """A step of stage 1. FLOPs of the decoder's GAN loss: T + H, forward and backward to the pixels; those of the
    discriminator's step: another reconstruction, T for a real and a fake image, training of H on both."""
    images = torch.zeros(2, 1, 3, s["size"], s["size"])
    D = forward_flops(empty(lambda: make_decoder(s)), torch.zeros(1, *s["latents"]))
    flops = 3 * D + forward_flops(encoder.Encoder(s["encoder"], s["size"]).to(DEVICE), images[0])
    if s["lpips"]:
        flops += 3 * forward_flops(fid.LPIPS().to(DEVICE), *images) / 2  # of one image
    if gan:
        discriminator = train_decoder.Discriminator().to(DEVICE)
        T = forward_flops(discriminator.vit, torch.zeros(1, 3, 224, 224))
        H = forward_flops(discriminator, images[0]) - T
        flops += 2 * (T + H) + D + 2 * (T + 3 * H)
        del discriminator
    losses = "L1" + ", LPIPS" * bool(s["lpips"]) + ", GAN" * gan
    taken = step_seconds(train_decoder, s, precision, *batch, s["repeats"] if CUDA or not gan else 1,
                         "--model", s["decoder"], "--lpips", s["lpips"], "--gan", 0.75 * gan, "--disc-start", 0,
                         "--gan-start", 0)
    count = batch[0] * batch[1]
    return f"decoder step, {s['decoder']}, {losses}, micro-batch {batch[0]} x {batch[1]}", count, taken, count * flops


def dit_row(s, precision, name, batch):
    """A step of stage 2."""
    flops = forward_flops(encoder.Encoder(s["encoder"], s["size"]).to(DEVICE), torch.zeros(1, 3, s["size"], s["size"]))
    flops += 3 * dit_flops(name, s["latents"])
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"mean": None, "var": torch.ones(s["latents"])}, f"{folder}/stat.pt")
        taken = step_seconds(train_dit, s, precision, *batch, s["repeats"], "--model", name,
                             "--stats", f"{folder}/stat.pt")
    count = batch[0] * batch[1]
    return f"DiT step, {name}, with encoder, micro-batch {batch[0]} x {batch[1]}", count, taken, count * flops


# ---------------------------------------------------------------------------------------------------------------------
# The parts. Each yields rows (what, images, seconds, FLOPs), of which all but `what` may be None


def encode(s, precision):
    model = encoder.Encoder(s["encoder"], s["size"]).to(DEVICE)
    images = torch.rand(s["encoded"], 3, s["size"], s["size"], device=DEVICE)
    flops = len(images) * forward_flops(model, images[:1])
    if CUDA:
        train_dit.compile_blocks(model.vit)
    yield f"encode, {s['encoder']}", len(images), seconds(model, s["repeats"], images), flops


def decoder_steps(s, precision):
    for gan in (False, True):
        yield decoder_row(s, precision, s["decoder_batch"], gan)


def dit_steps(s, precision):
    for name in s["dits"]:
        with torch.device("meta"):
            fits = enough_memory(make_dit(name, s["latents"]))
        too_large = f"DiT step, {name}: too large", None, None, None
        yield dit_row(s, precision, name, s["dit_batch"]) if fits else too_large


def micro_batches(s, precision):
    """The recipes' models, one micro-batch a step."""
    for n in s["micro_batches"]:
        yield decoder_row(s, precision, (n, 1), bool(s["lpips"]))
        yield dit_row(s, precision, s["dits"][-1], (n, 1))


def forward_and_backward(run, leaves, *inputs):
    torch.autograd.grad(run(*inputs).sum(), leaves)


def swiglu(s, precision):
    """The MLP of the DDT head, with 5461 hidden channels, and padded to a multiple of 8."""
    width, B, N = s["swiglu"], s["swiglu_batch"], s["tokens"]
    hidden = dit.SwiGLU(width).w3.in_features
    x = torch.randn(B, N, width, device=DEVICE, requires_grad=True)
    for padded in (hidden, -(-hidden // 8) * 8):
        model = dit.SwiGLU(width)
        model.w12, model.w3 = nn.Linear(width, 2 * padded), nn.Linear(padded, width)
        leaves = [x, *model.to(DEVICE).parameters()]
        if CUDA:
            model.compile(dynamic=False)
        what, flops = f"SwiGLU, {width} wide, {padded} hidden, {N} tokens", 6 * x.numel() * padded
        with torch.no_grad():
            yield f"{what}, forward", B, seconds(model, s["repeats"], x), flops
        taken = seconds(forward_and_backward, s["repeats"], model, leaves, x)
        yield f"{what}, forward and backward", B, taken, 3 * flops


@torch.no_grad()
def sampling(s, precision):
    (strong_name, weak_name), latents, steps, n = s["models"], s["latents"], s["steps"], s["sampled"]
    S, W = (dit_flops(name, latents) for name in s["models"])
    strong, weak = (make_dit(name, latents).to(DEVICE).eval() for name in s["models"])
    for model in (strong, weak):
        random_weights(model)  # not adaLN-zero's zeros, for which both velocities are 0
    pixels = make_decoder(s).to(DEVICE).eval()
    D = forward_flops(pixels, torch.zeros(1, *latents))
    noise = torch.randn(n, *latents, device=DEVICE)
    y, shift = torch.arange(n, device=DEVICE) % 1000, dit.shift_strength(latents)
    inside = sum(0.1 <= t <= 0.9 for t in dit.time_shift(torch.linspace(1, 0, steps + 1), shift)[:-1].tolist())

    def generate(velocity):
        pixels(dit.sample(velocity, noise, steps, shift))

    for kind in ("eager", "compiled") if CUDA else ("eager",):
        if kind == "compiled":
            train_dit.compile_blocks(strong, weak, pixels)
        for what, velocity, flops in (
            ("unguided", dit.guided(strong, y), steps * S),
            ("CFG", dit.guided(strong, y, 2.0), steps * 2 * S),
            ("CFG for t in [0.1, 0.9]", dit.guided(strong, y, 2.0, None, (0.1, 0.9)), (steps + inside) * S),
            (f"AutoGuidance by {weak_name}", dit.guided(strong, y, 1.42, weak), steps * (S + W)),
        ):
            what = f"sample, {strong_name}, {steps} steps, {what}, {kind}"
            yield what, n, seconds(generate, 1, velocity), n * (flops + D)


@torch.no_grad()
def evaluation(s, precision):
    """The parts of fid.py, always in float32."""
    n, rows = s["fid_images"], s["fid_rows"]
    images = torch.randint(256, (n, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    a, b, features = images / 255, images.flip(0) / 255, torch.randn(rows, 2048, device=DEVICE)
    inception, lpips = fid.InceptionV3().to(DEVICE), fid.LPIPS().to(DEVICE)
    statistics = fid.FeatureStatistics()
    yield "Inception, 256 px", n, seconds(inception, 1, images), n * forward_flops(inception, images[:1])
    yield "LPIPS, 256 px", n, seconds(lpips, 1, a, b), n * forward_flops(lpips, a[:1], b[:1])
    yield "SSIM, 256 px", n, seconds(fid.ssim, 1, a, b), None
    yield "mean and covariance, 2048 dimensions", rows, seconds(statistics.update, 1, features), None
    taken = seconds(fid.precision_recall, 1, features, features)
    yield f"precision and recall, {rows} against {rows}", rows, taken, None
    moments = statistics.mean, statistics.cov
    began = time.perf_counter()
    fid.frechet_distance(*moments, *moments)
    yield "Frechet distance, 2048 dimensions", None, time.perf_counter() - began, None


def saving(s, precision):
    """A file of the size of DiT-DH-XL's last.pt, on the disk of the current folder."""
    tensors = {str(i): torch.ones(2**20 + i, device=DEVICE) for i in range(int(s["saved_gb"] * 1e9 / 2**22))}
    for name, what in (("last.pt", "without CRC32, as last.pt"), ("dit.pt", "with CRC32, as dit.pt")):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            began = time.perf_counter()
            train_dit.save_checkpoint({Path(folder) / name: tensors})
            yield f"save {s['saved_gb']} GB, {what}", None, time.perf_counter() - began, None


def overlap_worker(rank, s, precision, port, queue):
    """One of two processes: seconds of a step without all-reduce, with it, and of the all-reduce alone."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank) if CUDA else DEVICE
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", rank=rank, world_size=2)
    model, B = make_dit(s["dits"][-1], s["latents"]).to(device), s["dit_batch"][0]
    if CUDA:
        train_dit.compile_blocks(model)
    ddp, x = DistributedDataParallel(model, gradient_as_bucket_view=True), torch.randn(B, *s["latents"], device=device)
    t, y = torch.rand(B, device=device), torch.arange(B, device=device)

    def step(synchronized):
        ddp.require_backward_grad_sync = synchronized
        with set_precision(precision):
            loss = dit.flow_matching_loss(ddp, x, y, t, torch.randn_like(x)).mean()
        loss.backward()

    gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
    times = [seconds(step, s["repeats"], synchronized) for synchronized in (False, True)]
    times.append(seconds(dist.all_reduce, s["repeats"], gradients))
    if rank == 0:
        queue.put(times)
    dist.destroy_process_group()


def overlap(s, precision):
    """The part of the gradients' all-reduce between two GPUs that overlaps with the backward pass."""
    what, B = f"DDP, {s['dits'][-1]}", s["dit_batch"][0]
    if torch.cuda.device_count() < 2:
        yield f"{what}: needs two GPUs", None, None, None
        return
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(overlap_worker, (s, precision, 20000 + os.getpid() % 20000, queue), nprocs=2)
    alone, together, reduce = queue.get()
    yield f"{what}, forward and backward on each of two GPUs", 2 * B, alone, None
    overlapped = f"{1 - (together - alone) / reduce:.0%} of it overlapped"
    yield f"{what}, the same with all-reduce, {overlapped}", 2 * B, together, None
    yield f"{what}, all-reduce alone", None, reduce, None


def loading(s, precision):
    """Generated 500 x 375 JPEG files through the loader, as stage 1 and stage 2 crop them."""
    rng = np.random.default_rng(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(s["files"]):
            (Path(folder) / str(i % 10)).mkdir(exist_ok=True)
            smooth = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((500, 375))
            grain = np.asarray(smooth) + rng.normal(0, 8, (375, 500, 3))  # as large a file as a photograph's
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i % 10}/{i}.jpg", quality=90)
        source, steps = encoder.ImageFolder(folder), range(4 * s["files"] // 20)
        for stage, transform in (("stage 1", lambda image, rng: encoder.random_crop(image, 384, 256, rng)),
                                 ("stage 2", lambda image, rng: encoder.center_crop_flip(image, 256, rng))):
            for workers in sorted({n for n in (0, 1, 2, 4, 8, 12, 16) if n < cores} | {cores}):
                batches = encoder.training_batches(len(source), 20, 20, steps, seed=0)
                loader = iter(encoder.make_loader(encoder.Images(source, transform), batches, workers, DEVICE))
                next(loader)  # the workers have started
                began = time.perf_counter()
                count = sum(len(batch[0]) for batch in loader)
                yield f"loader, {stage}, {workers} workers", count, time.perf_counter() - began, None


PARTS = {"encode": encode, "decoder": decoder_steps, "dit": dit_steps, "micro-batch": micro_batches,
         "swiglu": swiglu, "sample": sampling, "fid": evaluation, "save": saving, "all-reduce": overlap,
         "loader": loading}
ONCE = ("fid", "save", "loader")  # in one precision


def measure(part, s, precision, peak):
    """Yield the rows of a part, as dictionaries."""
    reset_peak_memory()
    with contextlib.nullcontext() if part in ("save", "loader") else offline(), set_precision(precision):
        for what, images, taken, flops in PARTS[part](s, precision):
            if images and taken is None:
                what += ": out of memory"
            yield dict(what=what, precision=precision, images=images, ms=taken and 1000 * taken,
                       images_per_s=images and taken and images / taken,
                       share_of_peak=flops and taken and flops / taken / peak, peak_gib=peak_memory())
            reset_peak_memory()


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
    peaks = {p: matmul_peak(p, 8192 if CUDA else 512 if args.quick else 1024) for p in {*precisions, "float32"}}
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    about = dict(device=name, torch=torch.__version__, timm=timm.__version__, date=time.strftime("%F"),
                 peak_tflops={p: peak / 1e12 for p, peak in peaks.items()}, quick=args.quick)
    peak = ", ".join(f"{p} {value:.3g}" for p, value in about["peak_tflops"].items())
    print(f"{name}, torch {about['torch']}, timm {about['timm']}, {about['date']}; measured matmul TFLOP/s: {peak}\n")
    print("| what | precision | images | ms | images/s | share of peak | peak GiB |\n|---|---|--:|--:|--:|--:|--:|")
    rows = []
    for part in args.only:
        for precision in ["float32"] if part in ONCE else precisions:
            for row in measure(part, s, precision, peaks[precision]):
                rows.append(row)
                cells = [x if isinstance(x, str | int) else "" if x is None else f"{x:.3g}" for x in row.values()]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    with open(args.json, "a") as file:
        print(json.dumps(about | dict(rows=rows)), file=file)


if __name__ == "__main__":
    main()
