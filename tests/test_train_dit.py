"""train_dit.py through its real main(), in small, against closed forms, second ways to compute the same, and itself."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, published_dit
from PIL import Image

import decoder
import dit
import encoder
import fid
import sample
import train_dit

# One epoch of `shapes` at this batch is 1,000 steps. No decoder is found, so no previews are drawn.
TINY = ["--preset", "demo", "--batch", "8", "--micro-batch", "8", "--size", "32", "--lr", "3e-3", "--lr-end", "3e-4",
        "--warmup", "0", "--decay-start", "9", "--decay-end", "14", "--ema", "0.995", "--shift-base", "512",
        "--precision", "float32", "--stats-images", "16", "--log-every", "1", "--device", "cpu"]  # fmt: skip
MODEL = dit.SIZES["DiT-DH-tiny"]
RECORD = encoder.Encoder("random-tiny", 32).record
SHAPE = (RECORD["latent_dim"], RECORD["grid"], RECORD["grid"])
CLASSES = len(encoder.SHAPES)
SHIFT = max(1.0, math.sqrt(math.prod(SHAPE) / 512))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(out, *flags, steps=None):
    """Run main() and return last.pt."""
    length = [] if steps is None else ["--epochs", str(steps / 1000)]
    train_dit.main([*TINY, "--out", str(out), *length, *map(str, flags)])
    return read(out / "last.pt")


def read(path):
    return torch.load(path, weights_only=True)


def rows(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def flat(value, prefix=""):
    """A nested dictionary of tensors as {path: value}."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{prefix}/{name}").items()}


def assert_identical(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert same, f"{key} differs"


def distance(a, b):
    """Largest difference between two state dicts, in units of the learning rate: Adam moves a weight by about 1."""
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a) / 3e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three steps of batch 8 in one process; (folder, last.pt)."""
    out = tmp_path_factory.mktemp("base")
    return out, train(out, "--keep-every", "0.001", steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images in two classes."""
    root = tmp_path_factory.mktemp("images")
    shapes = encoder.Shapes(20, 32)
    for i in range(20):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        shapes.open(i)[0].save(root / "ab"[i % 2] / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def decoder_path(tmp_path_factory):
    """A decoder of the demo's latents with random weights, strong enough to fill the range of the pixels."""
    torch.manual_seed(0)
    C, grid, _ = SHAPE
    model = decoder.Decoder(C, grid, 32 // grid, 64, 1, 4, 128, RECORD["mean"], RECORD["std"])
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    path = tmp_path_factory.mktemp("decoder") / "decoder.pt"
    torch.save(dict(kind="decoder", config=model.config, model=model.state_dict(), encoder=RECORD), path)
    return str(path)


@pytest.fixture
def built(monkeypatch):
    """The models and averages that main() builds: [(model, ModelEmaV3), ...]."""
    seen = []

    class Ema(train_dit.ModelEmaV3):
        def __init__(self, model, **settings):
            super().__init__(model, **settings)
            seen.append((model, self))

    monkeypatch.setattr(train_dit, "ModelEmaV3", Ema)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


RECIPE = dict(
    encoder="dinov2-b", size=256, model="DiT-DH-XL", epochs=80, batch=1024, lr=2e-4, lr_end=2e-5, warmup=0,
    decay_start=40, decay_end=800, clip=1, ema=0.9995, label_dropout=0.1, shift_base=4096, precision="tf32",
    stats_images=50000, qk_norm=False, unconditional=False, allow_narrow=False, checkpointing=False, seed=0,
    stats=None, init=None, compile=None, keep_every=0, fid_every=0, fid_num=10000,
)  # fmt: skip


@pytest.mark.parametrize(
    "flags, differs",
    [
        ([], {}),
        (["--preset", "imagenet256"], {}),
        (["--preset", "imagenet512"], dict(size=512, epochs=400)),
        (["--model", "DiT-XL"], dict(model="DiT-XL", clip=0, ema=0.9999, decay_start=math.inf, decay_end=math.inf)),
        (["--preset=imagenet512", "--model=DiT-B", "--ema=0.5"],
         dict(size=512, epochs=400, model="DiT-B", clip=0, ema=0.5, decay_start=math.inf, decay_end=math.inf)),
    ],
)  # fmt: skip
def test_defaults_are_the_recipe(flags, differs):
    _, args = train_dit.parse_args(["--data", "x", *flags])
    resolved = {key: value for key, value in vars(args).items() if key in RECIPE}
    assert resolved == RECIPE | differs
    # An 80 GB GPU: weights, gradient, two moments, average, then what backward keeps, 1.10 GB for each 256-px image.
    assert 5 * 4 * 0.8384 + 1.10 * (args.size / 256) ** 2 * args.micro_batch < 70


def test_learning_rate():
    _, args = train_dit.parse_args(["--data", "x"])
    for epoch, lr in [(0, 2e-4), (40, 2e-4), (80, 1.90526e-4), (420, 1.1e-4), (800, 2e-5), (900, 2e-5)]:
        assert train_dit.lr_at(epoch, args) == pytest.approx(lr, rel=1e-5)
    _, args = train_dit.parse_args(["--data", "x", "--warmup", "5"])
    assert [train_dit.lr_at(epoch, args) for epoch in (0, 1, 5, 30)] == pytest.approx([0, 4e-5, 2e-4, 2e-4])
    _, args = train_dit.parse_args(["--data", "x", "--model", "DiT-XL"])
    assert train_dit.lr_at(0, args) == train_dit.lr_at(799, args) == 2e-4


def test_learning_rate_of_the_steps(tmp_path):
    train(tmp_path / "out", "--decay-start", 0.001, "--decay-end", 0.005, "--warmup", 0.002, steps=4)
    lr = [0, 1.5e-3, 3e-3 - 2.7e-3 / 4, 3e-3 - 2.7e-3 / 2]
    assert [float(row["lr"]) for row in rows(tmp_path / "out")] == pytest.approx(lr, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn, and the loss


def by_hand(index, place, out):
    """One image's part of the first step, from the definitions: latents x, noise, unshifted t, dropped, label."""
    key = int(np.random.SeedSequence((0, 0, place)).generate_state(1, np.uint64)[0]) >> 1
    image, label = encoder.Shapes(8000, 32).open(index)
    pixels = torch.from_numpy(np.asarray(image).copy())
    if np.random.default_rng(key).random() < 0.5:
        pixels = pixels.flip(1)
    stats = read(out / "stat.pt")
    z = encoder.Encoder("random-tiny", 32)(pixels.permute(2, 0, 1)[None] / 255)[0]
    generator = torch.Generator().manual_seed(key)
    noise = torch.randn(SHAPE, generator=generator)
    t = torch.randn(1, generator=generator).sigmoid().item()
    drop = torch.rand(1, generator=generator).item() < 0.1
    return (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt(), noise, t, drop, label


def test_logged_loss_of_the_first_step(base):
    """A new model says v = 0, so its loss is mean((eps - x)^2); here from the seeds alone, and by bins of t."""
    out, _ = base
    order = np.random.default_rng((0, 0)).permutation(8000)[:8]
    losses, times = [], []
    for place, index in enumerate(order):
        x, noise, t, *_ = by_hand(index, place, out)
        losses.append((noise - x).square().mean().item())
        times.append(SHIFT * t / (1 + (SHIFT - 1) * t))
    row = rows(out)[0]
    assert float(row["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    for i in range(5):
        inside = [loss for loss, t in zip(losses, times, strict=True) if i <= t * 5 < i + 1]
        logged = row[f"loss_t{i / 5:.1f}"]
        assert (not inside and logged == "") or float(logged) == pytest.approx(np.mean(inside), rel=1e-4)


def test_what_the_model_sees(tmp_path, monkeypatch):
    """x_t, t and labels of the first step, dropped ones included, from the definitions."""
    seen = []
    forward = dit.DiT.forward
    monkeypatch.setattr(dit.DiT, "forward", lambda self, *xty: seen.append(xty) or forward(self, *xty))
    train(tmp_path / "out", "--batch", 32, "--micro-batch", 32, steps=4)
    x_t, t, labels = (value.detach() for value in seen[0])
    order = np.random.default_rng((0, 0)).permutation(8000)[:32]
    dropped = 0
    for place, index in enumerate(order):
        x, noise, time_, drop, label = by_hand(index, place, tmp_path / "out")
        time_ = SHIFT * time_ / (1 + (SHIFT - 1) * time_)
        assert t[place].item() == pytest.approx(time_, rel=1e-5)
        assert labels[place].item() == (CLASSES if drop else label)
        torch.testing.assert_close(x_t[place], (1 - time_) * x + time_ * noise, rtol=1e-4, atol=1e-4)
        dropped += drop
    assert 0 < dropped < 12


def test_draws_depend_on_neither_batch_nor_rank():
    _, args = train_dit.parse_args(["--preset", "demo"])
    whole = next(encoder.training_batches(100, 8, 8, range(5, 6), 0))
    parts = [list(encoder.training_batches(100, 8, micro, range(5, 6), 0, rank, 2)) for rank, micro in ((0, 1), (1, 3))]
    assert [item for batches in parts for batch in batches for item in batch] == whole
    generator = torch.Generator()
    keys = torch.tensor([key for _, key in whole])
    at_once = train_dit.draw(keys, SHAPE, args, generator)
    for i in (7, 0, 3):
        alone = train_dit.draw(keys[i : i + 1], SHAPE, args, generator)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(at_once, alone, strict=True))
    t, noise, drop = train_dit.draw(torch.arange(4000), (2, 1, 1), args, generator)
    assert t.logit().mean().abs() < 0.06 and (t.logit().std() - 1).abs() < 0.04
    assert noise.mean().abs() < 0.04 and (noise.std() - 1).abs() < 0.03 and 0.08 < drop.float().mean() < 0.12


def test_statistics_of_the_latents(base):
    """Over the images of --stats-images, centre-cropped and flipped, as the definitions say."""
    out, last = base
    latents = []
    for index in np.random.default_rng(0).permutation(8000)[:16]:
        key = int(np.random.SeedSequence((0, int(index))).generate_state(1, np.uint64)[0]) >> 1
        image, _ = encoder.Shapes(8000, 32).open(index)
        pixels = torch.from_numpy(np.asarray(image).copy())
        pixels = pixels.flip(1) if np.random.default_rng(key).random() < 0.5 else pixels
        latents.append(encoder.Encoder("random-tiny", 32)(pixels.permute(2, 0, 1)[None] / 255)[0])
    latents, stats = torch.stack(latents).double(), read(out / "stat.pt")
    torch.testing.assert_close(stats["mean"].double(), latents.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["var"].double(), latents.var(0, correction=0), rtol=1e-3, atol=1e-5)
    assert_identical(stats, last["stats"])
    assert_identical(stats, read(out / "dit.pt")["stats"])


# ---------------------------------------------------------------------------------------------------------------------
# One step is the same step, however it is computed


@pytest.mark.parametrize("flags", [["--micro-batch", "2"], ["--micro-batch", "3"], ["--checkpointing"]], ids=str)
def test_accumulation_and_checkpointing_equal_the_whole_batch(flags, base, tmp_path, built):
    _, whole = base
    assert distance(train(tmp_path / "out", *flags, steps=3)["model"], whole["model"]) < 0.02
    assert built[0][0].checkpointing == ("--checkpointing" in flags)


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each step, before Adam, which turns small differences into large ones."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return seen


def test_accumulated_gradient(tmp_path, gradients):
    """4 x 2, and 3 + 3 + 2, against 8."""
    alive = make_alive(tmp_path / "init.pt")
    for micro in (8, 2, 3):
        train(tmp_path / str(micro), "--micro-batch", micro, "--init", alive, steps=1)
    whole, *others = gradients
    for other in others:
        assert (whole - other).norm() < 1e-5 * whole.norm()


def make_alive(path, **config):
    """A dit.pt whose every part matters: random weights instead of the zeros of a new model."""
    torch.manual_seed(1)
    model = dit.DiT(*SHAPE[:2], CLASSES, **dit.SIZES["DiT-DH-tiny"] | config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.y_embedder.embedding_table.weight.data.normal_(std=2)
    stats = {"mean": torch.zeros(SHAPE), "var": torch.ones(SHAPE)}
    torch.save(dict(kind="dit", config=model.config, model=model.state_dict(), stats=stats, shift=2.0, encoder=RECORD,
                    label_dropout=0.1, epoch=1.0), path)  # fmt: skip
    return path


def test_compiled_step_and_average(tmp_path, built, gradients, monkeypatch):
    """A compiled step equals an eager one, and the EMA neither runs the live weights nor moves with them."""
    monkeypatch.setitem(dit.SIZES, "DiT-DH-tiny", dict(width=128, depth=1, heads=2))  # compiling takes its time
    alive = make_alive(tmp_path / "init.pt")
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self) or original(self, **how))
    train(tmp_path / "compiled", "--compile", "--init", alive, steps=1)
    assert compiled[-1:] == [*built[0][0].blocks] and len(compiled) == 1 + 3  # with the encoder's
    train(tmp_path / "eager", "--init", alive, steps=1)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    losses = [float(rows(tmp_path / name)[0]["loss"]) for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    for model, ema in built:
        inputs = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), torch.tensor([1, CLASSES])
        with torch.no_grad():
            before, live = ema.module(*inputs), model(*inputs)
            for parameter in model.parameters():
                parameter += 0.1
            assert torch.equal(ema.module(*inputs), before)
            assert not torch.equal(model(*inputs), live) and not torch.equal(before, live)
        assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_average_is_the_formula(base):
    """w' = decay w + (1 - decay) w_live from the first step on, from the seeded initial weights; it is what dit.pt has,
    and dit-<epoch>.pt of each step."""
    out, last = base
    torch.manual_seed(0)
    expected = dit.DiT(*SHAPE[:2], CLASSES, **MODEL).state_dict()
    for epoch in ("0.001", "0.002", "0.003"):
        kept = read(out / f"dit-{epoch}.pt")
        assert kept["epoch"] == pytest.approx(float(epoch))
    live = train_dit.torch.load(out / "last.pt", weights_only=True)["model"]
    moved = read(out / "dit-0.003.pt")["model"]
    before = read(out / "dit-0.002.pt")["model"]
    for key in expected:
        torch.testing.assert_close(moved[key], 0.995 * before[key] + 0.005 * live[key], rtol=1e-5, atol=1e-7)
    first = read(out / "dit-0.001.pt")["model"]
    assert torch.equal(first["t_embedder.W"], expected["t_embedder.W"])
    shift = (first["final_layer.linear.weight"] - expected["final_layer.linear.weight"]).abs().max().item()
    assert shift == pytest.approx(0.005 * 3e-3, rel=0.01)  # Adam's first step is lr
    assert_identical(read(out / "dit.pt")["model"], last["ema"])


def test_optimiser_and_clipping(base, tmp_path):
    _, last = base
    (group,) = last["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.95), 0, 1e-8)
    torch.manual_seed(0)
    new = dit.DiT(*SHAPE[:2], CLASSES, **MODEL).state_dict()
    clipped = train(tmp_path / "clipped", "--clip", 1e-12, steps=1)  # so far below Adam's eps nothing moves
    assert distance(clipped["model"], new) < 1e-3
    free = train(tmp_path / "free", "--clip", 0, steps=1)
    assert distance(free["model"], new) == pytest.approx(1, rel=0.01)
    assert rows(tmp_path / "free")[0]["grad_norm"] == rows(tmp_path / "clipped")[0]["grad_norm"]


def test_bf16_stays_near_float32(base, tmp_path):
    out, _ = base
    last = train(tmp_path / "out", "--precision", "bf16", "--qk-norm", steps=1)
    ours, theirs = float(rows(tmp_path / "out")[0]["loss"]), float(rows(out)[0]["loss"])
    assert ours == pytest.approx(theirs, rel=5e-3) and ours != theirs
    assert all(value.dtype == torch.float32 for value in [*last["model"].values(), *last["ema"].values()])


def test_bf16_latents_stay_within_the_stated_error():
    vit = encoder.Encoder("random-tiny", 32)
    images = torch.stack([torch.from_numpy(np.array(encoder.Shapes(8, 32).open(i)[0])) for i in range(8)])
    images = images.permute(0, 3, 1, 2) / 255
    with torch.autocast("cpu", torch.bfloat16):
        low = vit(images)
    error = ((low - vit(images)).square().mean() / vit(images).square().mean()).sqrt().item()
    assert 0 < error < 0.0035 and low.dtype == torch.float32


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*flags, **environment):
    command = [sys.executable, str(ROOT / "train_dit.py"), *TINY, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(out, step, *processes):
    """Until log.csv has this step."""
    limit = time.time() + 150
    while time.time() < limit and not any(process.poll() for process in processes):
        if (out / "log.csv").exists() and len(rows(out)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError([process.kill() or process.communicate()[0][-3000:] for process in processes])


def test_two_processes_equal_one_and_stop_together(tmp_path):
    """Two gloo processes, of which only the second gets a SIGTERM: both save and exit with 0, having done what one
    process does with the whole batch."""
    port = free_port()
    ranks = [
        start("--out", tmp_path / "two", "--micro-batch", 2, "--epochs", 0.3, "--save-every", 1, RANK=str(rank),
              LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip
    wait_for(tmp_path / "two", 4, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    two = read(tmp_path / "two" / "last.pt")
    assert 4 <= two["step"] < 300
    assert f"stopped and saved at step {two['step']}; the same command resumes" in printed[0]
    assert "2 processes x 2 x 2" in printed[0] and "stopped" not in printed[1]

    one = train(tmp_path / "one", steps=two["step"])
    assert distance(one["model"], two["model"]) < 0.1
    assert distance(one["ema"], two["ema"]) < 0.01
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# What it writes


def make_stats(path, shape=SHAPE):
    torch.save({"mean": None, "var": torch.full(shape, 2.0)}, path)
    return path


def test_finished_run_says_so(base, capsys):
    out, last = base
    assert_identical(train(out, "--keep-every", 0.001, steps=3), last)
    assert capsys.readouterr().out == f"finished: {out}/dit.pt has its 0.003 epochs; a larger --epochs goes on\n"


def test_log(base):
    out, _ = base
    table = rows(out)
    assert list(table[0]) == [
        "step", "epoch", "loss", "loss_t0.0", "loss_t0.2", "loss_t0.4", "loss_t0.6", "loss_t0.8", "lr", "grad_norm",
        "images_per_s", "memory_gb", "skipped", "replaced", "fid",
    ]  # fmt: skip
    assert [(row["step"], row["epoch"]) for row in table] == [("1", "0.0010"), ("2", "0.0020"), ("3", "0.0030")]
    assert all(float(row["images_per_s"]) > 0 and 0.1 < float(row["memory_gb"]) < 20 for row in table)


def test_log_line_and_interval(tmp_path, capsys):
    train(tmp_path / "every", steps=4)
    every = rows(tmp_path / "every")
    capsys.readouterr()
    train(tmp_path / "fourth", "--log-every", 4, steps=4)
    (row,) = rows(tmp_path / "fourth")
    for name in ("loss", "grad_norm"):
        assert float(row[name]) == pytest.approx(np.mean([float(r[name]) for r in every]), abs=1e-4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert all(f" {word} " in line for word in ("epoch", "loss", "lr", "images_per_s", "memory_gb", "left"))


def test_keep_every_has_round_names_and_the_last_epoch(folder, tmp_path):
    """20 images in batches of 6 are 3.33 steps an epoch: the nearest step counts, and rounding does not add up."""
    flags = ["--data", folder, "--workers", 0, "--batch", 6, "--stats", make_stats(tmp_path / "stat.pt")]
    train(tmp_path / "out", *flags, "--epochs", 4, "--keep-every", 1)
    kept = {path.name: read(path)["epoch"] for path in (tmp_path / "out").glob("dit-*.pt")}
    steps = {"dit-1.pt": 3, "dit-2.pt": 7, "dit-3.pt": 10, "dit-4.pt": 13}
    assert kept == {name: pytest.approx(step * 6 / 20) for name, step in steps.items()}


def test_given_statistics_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "latent_statistics", None)
    last = train(tmp_path / "out", "--stats", make_stats(tmp_path / "stat.pt"), steps=1)
    assert (last["stats"]["var"] == 2).all() and (last["stats"]["mean"] == 0).all()


def test_unconditional(tmp_path, decoder_path, monkeypatch):
    seen = set()
    forward = dit.DiT.forward
    monkeypatch.setattr(dit.DiT, "forward", lambda self, x, t, y: seen.update(y.tolist()) or forward(self, x, t, y))
    train(tmp_path / "out", "--unconditional", "--decoder", decoder_path, steps=2)
    assert seen == {0} and read(tmp_path / "out" / "dit.pt")["config"]["num_classes"] == 0


def test_init(folder, tmp_path, built):
    """Our files and published ones; the class table is new where the counts differ."""
    source = read(make_alive(tmp_path / "ours.pt"))
    torch.save({"ema": published_dit(dit.load_dit(tmp_path / "ours.pt")[0])}, tmp_path / "published.pt")
    table = "y_embedder.embedding_table.weight"
    stats = make_stats(tmp_path / "stat.pt")
    for name, flags in (("ours.pt", ()), ("published.pt", ("--stats", stats))):
        out = tmp_path / name.split(".")[0]
        last = train(out, "--init", tmp_path / name, *flags, "--lr", 1e-9, "--lr-end", 0, steps=1)
        torch.testing.assert_close(built[-1][0].state_dict(), source["model"], rtol=0, atol=1e-8)
        torch.testing.assert_close(
            last["stats"], source["stats"] if name == "ours.pt" else encoder.load_stats(stats, SHAPE)
        )
    flags = ["--data", folder, "--workers", 0, "--epochs", 0.1]
    train(tmp_path / "two", *flags, "--init", tmp_path / "ours.pt", "--lr", 1e-9, "--lr-end", 0)
    state = built[-1][0].state_dict()
    assert state.pop(table).shape == (3, MODEL["width"]) and state.keys() == source["model"].keys() - {table}
    torch.testing.assert_close(state, {key: source["model"][key] for key in state}, rtol=0, atol=1e-8)

    os.remove(tmp_path / "ours.pt")  # which a resumed run needs no more
    assert train(tmp_path / "ours", "--init", tmp_path / "ours.pt", "--lr", 1e-9, "--lr-end", 0, steps=2)["step"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, guidance, FID


def draw(out, *flags):
    """sample.py's command line, to an npz."""
    sample.main(["--preset", "demo", "--steps", "3", "--out", str(out), "--device", "cpu", *map(str, flags)])
    with np.load(out) as file:
        return file["arr_0"].astype(int)


def test_guidance_through_the_command_line(tmp_path, decoder_path):
    make_alive(tmp_path / "dit.pt")
    torch.manual_seed(7)
    weak = read(tmp_path / "dit.pt")
    weak["model"] = {key: value + 0.05 * torch.randn_like(value) for key, value in weak["model"].items()}
    torch.save(weak, tmp_path / "weak.pt")
    flags = ["--dit", tmp_path / "dit.pt", "--decoder", decoder_path, "--num", 4]
    model, info = dit.load_dit(tmp_path / "dit.pt")
    network, _ = decoder.load_decoder(decoder_path)
    plain = train_dit.draw_samples(model, network, info["stats"], 2.0, 0, range(4), [0, 1, 2, 3], steps=3)
    plain = plain.numpy().astype(int)

    one = draw(tmp_path / "one.npz", *flags, "--scale", 1)
    np.testing.assert_array_equal(one, plain)
    almost = draw(tmp_path / "almost.npz", *flags, "--scale", 1.000001)  # here the formula is evaluated
    assert abs(almost - plain).max() <= 1
    self_guided = draw(tmp_path / "self.npz", *flags, "--scale", 1.5, "--guide", tmp_path / "dit.pt")
    assert abs(self_guided - plain).max() <= 1
    for name, extra in (("cfg", []), ("weak", ["--guide", tmp_path / "weak.pt"])):
        two = draw(tmp_path / f"{name}.npz", *flags, "--scale", 2, *extra)
        assert abs(two - plain).mean() > 1
        nowhere = draw(tmp_path / f"{name}0.npz", *flags, "--scale", 2, "--interval", 0.01, 0.02, *extra)
        np.testing.assert_array_equal(nowhere, plain)


def test_previews_show_the_average(tmp_path, decoder_path):
    train(tmp_path / "out", "--decoder", decoder_path, "--preview-every", 0.002, "--init",
          make_alive(tmp_path / "init.pt"), steps=3)  # fmt: skip
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"preview-0.00.png"}
    model, info = dit.load_dit(tmp_path / "out" / "dit.pt")
    network, _ = decoder.load_decoder(decoder_path)
    labels = [i * CLASSES // 16 for i in range(16)]
    noise = torch.stack([torch.from_numpy(np.random.default_rng((0, i)).standard_normal(SHAPE, dtype=np.float32))
                         for i in range(16)])  # fmt: skip
    z = dit.denormalize(dit.sample(dit.guided(model, torch.tensor(labels)), noise, 50, SHIFT), info["stats"])
    expected = np.asarray(decoder.image_grid(decoder.to_uint8(network(z)), 8)).astype(int)
    with Image.open(tmp_path / "out" / "preview-0.00.png") as picture:
        assert abs(np.asarray(picture).astype(int) - expected).max() <= 1
    train(tmp_path / "none", "--decoder", decoder_path, "--preview-every", 0, steps=1)
    assert not list((tmp_path / "none").glob("*.png"))


def test_online_fid(tmp_path, decoder_path):
    """The value in log.csv is that of sample.py's images of the same checkpoint."""
    shapes = json.loads((ROOT / "tests/golden/inception_state_shapes.json").read_text())
    state = {}
    for key, shape in shapes.items():  # the formula of tests/golden/README.md
        rs = np.random.RandomState(zlib.crc32(key.encode()))
        value = np.zeros(shape)
        if key.endswith(("running_var", "bn.weight")):
            value = 1 + 0.1 * rs.rand(*shape)
        elif key.endswith(("running_mean", "bias")):
            value = 0.1 * rs.standard_normal(shape)
        elif not key.endswith("num_batches_tracked"):
            value = rs.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    torch.save(state, tmp_path / "inception.pth")
    inception = fid.load_inception(tmp_path / "inception.pth")

    def features(images):
        return inception(torch.as_tensor(images).permute(0, 3, 1, 2))[0].double().numpy()

    real = features(np.stack([np.asarray(encoder.Shapes(4, 32).open(i)[0]) for i in range(4)]))
    np.savez(tmp_path / "reference.npz", mu=real.mean(0), sigma=np.cov(real.T), features="inception")
    train(tmp_path / "out", "--decoder", decoder_path, "--fid-every", 0.002, "--fid-reference",
          tmp_path / "reference.npz", "--fid-num", 3, "--inception-weights", tmp_path / "inception.pth",
          "--micro-batch", 2, "--init", make_alive(tmp_path / "init.pt"), steps=2)  # fmt: skip
    table = rows(tmp_path / "out")
    assert [row["step"] for row in table] == ["1", "2", "2"] and [bool(row["fid"]) for row in table] == [0, 0, 1]

    drawn = draw(tmp_path / "s.npz", "--dit", tmp_path / "out" / "dit.pt", "--decoder", decoder_path, "--num", 3,
                 "--scale", 1, "--steps", 50)  # fmt: skip
    drawn = features(drawn.astype(np.uint8))
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (real, drawn))  # low rank: the root's trace is |a b^T|_*
    expected = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum()
    expected -= 2 * np.linalg.norm(a @ b.T, "nuc")
    assert float(table[-1]["fid"]) == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Full width


def test_one_step_at_full_width(tmp_path, monkeypatch):
    """C = 768, 256 tokens: DINOv2-B with random weights and DiT-DH-S, whose head is wide enough for Theorem 1."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    (tmp_path / "data").mkdir()
    encoder.Shapes(1, 300).open(0)[0].save(tmp_path / "data" / "a.png")
    saved = {}
    monkeypatch.setattr(encoder, "save", saved.update)  # 4 GB that tell nothing
    train_dit.main(["--data", str(tmp_path / "data"), "--encoder-weights", str(tmp_path / "vit.pt"), "--model",
                    "DiT-DH-S", "--batch", "1", "--micro-batch", "1", "--stats-images", "1", "--epochs", "1",
                    "--workers", "0", "--log-every", "1", "--out", "out", "--device", "cpu"])  # fmt: skip
    (row,) = rows(tmp_path / "out")
    assert 0 < float(row["loss"]) < 10 and float(row["lr"]) == 2e-4
    result, last = (saved[train_dit.Path("out") / name] for name in ("dit.pt", "last.pt"))
    assert result["stats"]["mean"].shape == (768, 16, 16) and round(result["shift"], 2) == 6.93
    written = last["model"]["final_layer.linear.weight"]
    assert written.shape == (768, 2048) and written.abs().max() == pytest.approx(2e-4, rel=0.01)  # Adam's first step
