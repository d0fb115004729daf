"""train_dit.py through its main(), with tiny models, against definitions, closed forms and other runs of itself."""

import functools
import math
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from conftest import assert_identical, finish, make_images, published_dit, read, rows, start_ranks, wait_for
from PIL import Image
from safetensors.torch import save_file
from test_sample import diffusers

import decoder
import dit
import encoder
import train_dit

# One epoch of `shapes` at this batch is 1,000 steps. There is no decoder, so there are no previews.
TINY = ["--preset", "demo", "--batch", "8", "--micro-batch", "8", "--size", "32", "--lr", "3e-3", "--lr-end", "3e-4",
        "--warmup", "0", "--decay-start", "9", "--decay-end", "14", "--ema", "0.995", "--shift-base", "512",
        "--precision", "float32", "--stats-images", "16", "--log-every", "1", "--device", "cpu"]
MODEL = dit.SIZES["DiT-DH-tiny"]
ENCODER = encoder.Encoder("random-tiny", 32)
RECORD, SHAPE = ENCODER.record, ENCODER.latent_shape
CLASSES = len(encoder.SHAPES)
SHIFT = max(1.0, math.sqrt(math.prod(SHAPE) / 512))
TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(autouse=True, scope="module")
def elsewhere(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


def train(out, *flags, steps=None):
    """Run main() and return last.pt."""
    length = [] if steps is None else ["--epochs", str(steps / 1000)]
    train_dit.main([*TINY, "--out", str(out), *length, *map(str, flags)])
    return read(out / "last.pt")


def refused(capsys, *flags):
    """The last line of the script's output; its exit code must be 2."""
    with pytest.raises(SystemExit, match="2"):
        train_dit.main([*TINY, "--epochs", "0.001", *map(str, flags)])
    return capsys.readouterr().err.strip().splitlines()[-1]


def distance(a, b):
    """Largest difference between two state dicts, divided by the learning rate: a step of Adam is about 1."""
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a) / 3e-3


def make_alive(path, num_classes=CLASSES, **config):
    """Save a dit.pt with random weights; a new model has zeros, with which many parts have no effect."""
    torch.manual_seed(1)
    model = dit.DiT(*SHAPE[:2], num_classes, **dit.SIZES["DiT-DH-tiny"] | config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.y_embedder.embedding_table.weight.data.normal_(std=2)
    stats = {"mean": torch.full(SHAPE, 0.1), "var": torch.full(SHAPE, 1.5)}
    torch.save(dict(kind="dit", config=model.config, model=model.state_dict(), stats=stats, shift=3.0, encoder=RECORD,
                    label_dropout=0.1, epoch=1.0), path)
    return path


def make_stats(path, shape=SHAPE):
    torch.save({"mean": None, "var": torch.full(shape, 2.0)}, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three steps of batch 8 in one process -> (folder, last.pt)."""
    out = tmp_path_factory.mktemp("base")
    return out, train(out, "--keep-every", 1, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images in two classes."""
    return make_images(tmp_path_factory.mktemp("images"), 20, classes=["a", "b"])


@pytest.fixture(scope="module")
def decoder_path(tmp_path_factory):
    """A decoder of the demo's latents, with random weights large enough to use the whole range of pixels."""
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
    """The models and EMAs that main() builds: [(model, ema), ...]."""
    seen, deepcopy = [], train_dit.copy.deepcopy

    def spy(value, *memo):
        result = deepcopy(value, *memo)
        if isinstance(value, dit.DiT):
            seen.append((value, result))
        return result

    monkeypatch.setattr(train_dit.copy, "deepcopy", spy)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


RECIPE = dict(
    encoder="dinov2-b", size=256, layers=[], model="DiT-DH-XL", epochs=80, batch=1024, lr=2e-4, lr_end=2e-5, warmup=0,
    decay_start=40, decay_end=800, clip=1, ema=0.9995, label_dropout=0.1, shift_base=4096, precision="tf32",
    stats_images=50000, qk_norm=False, unconditional=False, checkpointing=False, seed=0, stats=None, init=None,
    compile="auto", keep_every=0, save_every=1000, log_every=100, preview_every=5000, decoder=None,
    encoder_weights=None, preset="imagenet256", data="x", out=Path("runs/imagenet256/dit"))
IMAGENET512 = dict(size=512, epochs=400, preset="imagenet512", out=Path("runs/imagenet512/dit"))
PLAIN = dict(clip=0, ema=0.9999, decay_start=math.inf)


@pytest.mark.parametrize("flags, differs", [
    ([], {}),
    (["--preset", "imagenet256"], {}),
    (["--preset", "imagenet512"], IMAGENET512),
    (["--model", "DiT-XL"], PLAIN | dict(model="DiT-XL")),
    (["--preset=imagenet512", "--model=DiT-B", "--ema=0.5"], IMAGENET512 | PLAIN | dict(model="DiT-B", ema=0.5)),
])
def test_defaults_are_the_recipe(flags, differs):
    _, args = train_dit.parse_args(["--data", "x", *flags])
    machine = dict(workers=args.workers, device=args.device, micro_batch=args.micro_batch)
    assert vars(args) == RECIPE | differs | machine
    # For 80 GB: weights, gradients, two moments and the EMA; activations take 1.10 GB for an image of 256 px.
    assert 5 * 4 * 0.8384 + 1.10 * (args.size / 256) ** 2 * args.micro_batch < 70


def test_learning_rate():
    def lr_at(epoch, *flags, steps=100):  # in an epoch
        args = train_dit.parse_args(["--data", "x", *flags])[1]
        return train_dit.lr_at(round(epoch * steps), args, steps)

    for epoch, lr in [(0, 2e-4), (40, 2e-4), (80, 1.90526e-4), (420, 1.1e-4), (800, 2e-5), (900, 2e-5)]:
        assert lr_at(epoch) == lr_at(epoch, steps=1251) == pytest.approx(lr, rel=1e-5)
    # Linear warm-up over 5 epochs of 100 steps: the first step has 1/500 of the rate, the 500th all of it.
    for step, part in [(0, 1 / 500), (1, 2 / 500), (249, 0.5), (499, 1), (500, 1), (3000, 1)]:
        assert lr_at(step / 100, "--warmup", "5") == pytest.approx(part * 2e-4)
    assert lr_at(0, "--warmup", "0") == 2e-4
    # Warm-up and decay are multiplied if they overlap.
    both = ["--warmup", "5", "--decay-start", "0", "--decay-end", "10", "--lr-end", "0"]
    assert lr_at(2.49, *both) == pytest.approx(2e-4 * 0.5 * (1 - 0.249))
    for end in ([], ["--decay-end", "0"], ["--decay-end", "inf"]):  # that of a plain DiT never decays
        assert [lr_at(epoch, "--model", "DiT-XL", *end) for epoch in (0, 79, 999)] == [2e-4] * 3
    assert lr_at(0, "--model", "DiT-XL", "--warmup", "5") == pytest.approx(2e-4 / 500)


@pytest.mark.parametrize("epochs", [18, 100])
def test_the_demo_decays_until_its_end(epochs):
    _, args = train_dit.parse_args(["--preset", "demo", "--epochs", str(epochs), "--warmup", "0"])
    assert args.decay_end == 0, "as in last.pt, so a resumed run may be longer"
    assert args.decay_start < epochs
    for share, lr in [(0, args.lr), (0.5, (args.lr + args.lr_end) / 2), (1, args.lr_end)]:
        epoch = args.decay_start + share * (epochs - args.decay_start)
        assert train_dit.lr_at(round(epoch * 1000), args, 1000) == pytest.approx(lr, rel=1e-3)


def test_bad_values_are_refused_in_one_line(tmp_path, capsys):
    for flags, said in [
            ("--decay-start 5 --decay-end 4", "--decay-end 4 is before --decay-start 5"),
            ("--stats-images 7", "7 images are too few for latent statistics: give at least 8, or --stats stat.pt")]:
        assert f"error: {said}" in refused(capsys, *flags.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learning_rate_of_the_steps(tmp_path):
    train(tmp_path / "out", "--decay-start", 0.001, "--decay-end", 0.005, "--warmup", 0.002, steps=4)
    lr = [1.5e-3, 3e-3, 3e-3 - 2.7e-3 / 4, 3e-3 - 2.7e-3 / 2]
    assert [float(row["lr"]) for row in rows(tmp_path / "out")] == pytest.approx(lr, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers of a step, the loss, the latent statistics


def encoded(index, *numbers, layers=()):
    """An image of `shapes` by its definition -> (latents, label, key, the seed of all its random numbers)."""
    key = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    image, label = encoder.Shapes(8000, 32).open(index)
    pixels = torch.from_numpy(np.asarray(image).copy())
    if np.random.default_rng(key).random() < 0.5:
        pixels = pixels.flip(1)
    return encoder.Encoder("random-tiny", 32, layers=layers)(pixels.permute(2, 0, 1)[None] / 255)[0], label, key


def by_hand(index, place, stats):
    """An image of the first step by the definitions -> (latents x, noise, unshifted t, label is dropped, label)."""
    z, label, key = encoded(index, 0, 0, place)
    generator = torch.Generator().manual_seed(key)
    noise = torch.randn(SHAPE, generator=generator)
    t = torch.randn(1, generator=generator).sigmoid().item()
    drop = torch.rand(1, generator=generator).item() < 0.1
    return (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt(), noise, t, drop, label


def test_bins_of_time():
    bins = train_dit.losses_by_time(torch.arange(7.0), torch.tensor([0, 0.19, 0.2, 0.5, 0.79, 0.8, 1.0]))
    assert {name: value[value.isfinite()].tolist() for name, value in bins.items()} == {
        "loss_t0.0": [0, 1], "loss_t0.2": [2], "loss_t0.4": [3], "loss_t0.6": [4], "loss_t0.8": [5, 6]}


def test_first_step_from_the_definitions(tmp_path, monkeypatch):
    """The model's inputs: x_t, t, labels with dropout. A new model returns v = 0, so its loss is (eps - x)^2."""
    seen = []
    forward = dit.DiT.forward
    monkeypatch.setattr(dit.DiT, "forward", lambda self, *xty: seen.append(xty) or forward(self, *xty))
    train(tmp_path / "out", "--batch", 32, "--micro-batch", 32, steps=1)
    x_t, t, labels = (value.detach() for value in seen[0])
    losses, dropped = [], 0
    for place, index in enumerate(np.random.default_rng((0, 0)).permutation(8000)[:32]):
        x, noise, time, drop, label = by_hand(index, place, read(tmp_path / "out" / "stat.pt"))
        time = SHIFT * time / (1 + (SHIFT - 1) * time)
        assert t[place].item() == pytest.approx(time, rel=1e-5)
        assert labels[place].item() == (CLASSES if drop else label)
        torch.testing.assert_close(x_t[place], (1 - time) * x + time * noise, rtol=1e-4, atol=1e-4)
        losses.append((noise - x).square().mean().item())
        dropped += drop
    assert 0 < dropped < 12
    (row,) = rows(tmp_path / "out")
    assert float(row["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    for i in range(5):
        inside = [loss for loss, time in zip(losses, t, strict=True) if i <= time * 5 < i + 1]
        logged = row[f"loss_t{i / 5:.1f}"]
        assert (not inside and logged == "") or float(logged) == pytest.approx(np.mean(inside), rel=1e-4)


def test_random_numbers_depend_on_neither_batch_nor_rank():
    whole = next(encoder.training_batches(100, 8, 8, range(5, 6), 0))
    parts = [list(encoder.training_batches(100, 8, micro, range(5, 6), 0, rank, 2)) for rank, micro in ((0, 1), (1, 3))]
    assert [item for batches in parts for batch in batches for item in batch] == whole
    generator = torch.Generator()
    keys = torch.tensor([key for _, key in whole])
    labels = torch.arange(8)
    at_once = train_dit.step_randomness(keys, labels, SHAPE, CLASSES, 0.5, generator)
    assert (at_once[2] == CLASSES).any()
    for i in range(8):
        alone = train_dit.step_randomness(keys[i : i + 1], labels[i : i + 1], SHAPE, CLASSES, 0.5, generator)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(at_once, alone, strict=True))
    keys, labels = torch.arange(4000), torch.arange(4000) % 5
    t, noise, given = train_dit.step_randomness(keys, labels, (2, 1, 1), 5, 0.1, generator)
    assert t.logit().mean().abs() < 0.06 and (t.logit().std() - 1).abs() < 0.04
    assert noise.mean().abs() < 0.04 and (noise.std() - 1).abs() < 0.03
    dropped = given == 5
    assert 0.08 < dropped.float().mean() < 0.12 and torch.equal(given[~dropped], labels[~dropped])
    assert (train_dit.step_randomness(keys, labels, (2, 1, 1), 5, 1.0, generator)[2] == 5).all()
    assert torch.equal(train_dit.step_randomness(keys, labels, (2, 1, 1), 5, 0.0, generator)[2], labels)


@pytest.mark.parametrize("layers", [[], [0, 2]])
def test_statistics_of_the_latents(layers, tmp_path, decoder_path):
    """Equal their definition, over --stats-images images, centre-cropped and flipped. --layers are in the record and
    used for the latents and the previews."""
    torch.save(read(decoder_path) | dict(encoder=RECORD | dict(layers=layers)), tmp_path / "decoder.pt")
    flags = ["--layers", *layers[::-1]] if layers else []
    last = train(tmp_path / "out", *flags, "--decoder", tmp_path / "decoder.pt", steps=1)
    chosen = np.random.default_rng(0).permutation(8000)[:16]
    latents = torch.stack([encoded(index, 0, int(index), layers=layers)[0] for index in chosen]).double()
    stats, result = (read(tmp_path / "out" / name) for name in ("stat.pt", "dit.pt"))
    torch.testing.assert_close(stats["mean"].double(), latents.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["var"].double(), latents.var(0, correction=0), rtol=1e-3, atol=1e-5)
    assert_identical(stats, last["stats"])
    assert_identical(stats, result["stats"])
    assert result["encoder"] == RECORD | dict(layers=layers)
    assert (tmp_path / "out" / "preview-1.png").exists()


def test_given_statistics_are_used_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dit, "measure_statistics", None)
    last = train(tmp_path / "out", "--stats", make_stats(tmp_path / "stat.pt"), steps=1)
    assert (last["stats"]["var"] == 2).all() and (last["stats"]["mean"] == 0).all()
    for key, value in (("var", math.nan), ("var", math.inf), ("var", -1e-3), ("mean", math.nan), ("mean", math.inf)):
        stats = {"mean": torch.zeros(SHAPE), "var": torch.ones(SHAPE)}
        stats[key][0, 0, 0] = value
        torch.save(stats, tmp_path / "bad.pt")
        line = refused(capsys, "--stats", tmp_path / "bad.pt", "--out", tmp_path / "bad")
        assert f"{tmp_path}/bad.pt: the latent statistics, " in line and "are not finite, negative, or not of" in line


def test_unconditional_training_uses_the_null_class_alone(tmp_path, decoder_path, monkeypatch):
    seen = set()
    forward = dit.DiT.forward
    monkeypatch.setattr(dit.DiT, "forward", lambda self, x, t, y: seen.update(y.tolist()) or forward(self, x, t, y))
    train(tmp_path / "out", "--unconditional", "--decoder", decoder_path, steps=1)
    result = read(tmp_path / "out" / "dit.pt")
    assert seen == {0} and result["config"]["num_classes"] == 0
    assert result["label_dropout"] == 1 and result["classes"] == []
    assert (tmp_path / "out" / "preview-1.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The same steps, computed in other ways


@pytest.mark.parametrize("flags", [["--micro-batch", "2"], ["--micro-batch", "3"], ["--checkpointing"]], ids=str)
def test_accumulation_and_checkpointing_equal_the_whole_batch(flags, base, tmp_path, built):
    out, whole = base
    assert distance(train(tmp_path / "out", *flags, steps=3)["model"], whole["model"]) < 0.02
    assert built[0][0].checkpointing == ("--checkpointing" in flags)
    for name in ("loss", "loss_t0.4"):  # means over all images of the step
        ours, theirs = ([float(row[name] or 0) for row in rows(path)] for path in (tmp_path / "out", out))
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each step: Adam, which comes next, amplifies small differences."""
    seen, clip = [], train_dit.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, largest)

    monkeypatch.setattr(train_dit, "clip_grad_norm_", spy)
    return seen


def test_accumulated_gradient(tmp_path, gradients):
    """Micro-batches of 4 x 2, and of 3 + 3 + 2, against the batch of 8."""
    alive = make_alive(tmp_path / "init.pt")
    for micro in (8, 2, 3):
        train(tmp_path / str(micro), "--micro-batch", micro, "--init", alive, steps=1)
    whole, *others = gradients
    for other in others:
        assert (whole - other).norm() < 1e-5 * whole.norm()


def test_compiled_step_and_ema(tmp_path, built, gradients, graphs, monkeypatch):
    """A compiled step equals an eager one, and the EMA does not use the weights that are trained."""
    monkeypatch.setitem(dit.SIZES, "DiT-DH-tiny", dict(width=128, depth=2, heads=2))  # tracing takes long
    alive = make_alive(tmp_path / "init.pt")
    train(tmp_path / "compiled", "--compile", "on", "--init", alive, steps=1)
    assert len(graphs) == 2, "one for the blocks of the encoder, one for those of the model"
    train(tmp_path / "eager", "--init", alive, steps=1)
    assert len(graphs) == 2
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    losses = [float(rows(tmp_path / name)[0]["loss"]) for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    for model, ema in built:
        inputs = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), torch.tensor([1, CLASSES])
        with torch.no_grad():
            before, live = ema(*inputs), model(*inputs)
            for parameter in model.parameters():
                parameter += 0.1
            assert torch.equal(ema(*inputs), before)
            assert not torch.equal(model(*inputs), live)
        assert not any(parameter.requires_grad for parameter in ema.parameters())
        assert model.training and not ema.training


def test_optimiser_and_clipping(base, tmp_path):
    _, last = base
    (group,) = last["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.95), 0, 1e-8)
    torch.manual_seed(0)
    new = dit.DiT(*SHAPE[:2], CLASSES, **MODEL).state_dict()
    clipped = train(tmp_path / "clipped", "--clip", 1e-12, steps=1)  # far below Adam's eps, so no weight changes
    assert distance(clipped["model"], new) < 1e-3
    free = train(tmp_path / "free", "--clip", 0, steps=1)
    assert distance(free["model"], new) == pytest.approx(1, rel=0.01)
    assert rows(tmp_path / "free")[0]["grad_norm"] == rows(tmp_path / "clipped")[0]["grad_norm"]


def test_bf16_stays_near_float32(tmp_path, gradients, monkeypatch):
    """Under autocast the head's residual stream and the input of RMSNorm's mean square are float32."""
    streams, norms = [], []
    forward, rms_norm = dit.Block.forward, torch.nn.RMSNorm.forward
    monkeypatch.setattr(dit.Block, "forward", lambda self, x, *more: streams.append(x.dtype) or forward(self, x, *more))
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norms.append(x.dtype) or rms_norm(self, x))
    alive = make_alive(tmp_path / "init.pt", qk_norm=True)
    for precision in ("float32", "bf16"):
        last = train(tmp_path / precision, "--precision", precision, "--qk-norm", "--init", alive, steps=1)
        assert all(value.dtype == torch.float32 for value in [*last["model"].values(), *last["ema"].values()])
    full, low = (float(rows(tmp_path / precision)[0]["loss"]) for precision in ("float32", "bf16"))
    assert low == pytest.approx(full, rel=5e-3) and low != full
    assert set(streams) == set(norms) == {torch.float32}
    assert len(streams) == 2 * (MODEL["depth"] + MODEL["head_depth"])
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_two_processes_equal_one_and_stop_together(tmp_path):
    """Two gloo processes, of which only the second gets a SIGTERM: both stop after the same step and exit with 143, and
    last.pt is as after these steps of one process with the whole batch."""
    two = tmp_path / "two"
    ranks = start_ranks("train_dit.py", *TINY, "--out", two, "--micro-batch", 2, "--epochs", 0.3)
    wait_for(lambda: (two / "log.csv").exists() and len(rows(two)) >= 4, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    printed = finish(*ranks, code=128 + signal.SIGTERM)
    last = read(two / "last.pt")
    assert 4 <= last["step"] < 300
    assert f"stopped and saved at step {last['step']}; running the same command again resumes" in printed[0]
    assert "2 processes x 2 x 2" in printed[0] and "stopped" not in printed[1]

    one = train(tmp_path / "one", steps=last["step"])
    assert distance(one["model"], last["model"]) < 0.1
    assert distance(one["ema"], last["ema"]) < 0.1
    for a, b in zip(rows(tmp_path / "one"), rows(two), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# EMA


def test_ema_is_the_formula(base, tmp_path):
    """ema = d ema + (1 - d) model with d = n / (9 + n) at step n = 0, 1, ..., at most --ema; dit.pt has the EMA."""
    capped = train(tmp_path / "out", "--keep-every", 1, "--ema", 0.05, steps=3)
    for out, last, decay in [(*base, 2 / 11), (tmp_path / "out", capped, 0.05)]:
        first, second, third = (read(out / f"dit-{i}.pt")["model"] for i in (1, 2, 3))
        for key, weight in last["model"].items():
            expected = decay * second[key] + (1 - decay) * weight
            torch.testing.assert_close(third[key], expected, rtol=1e-5, atol=1e-7)
        assert_identical(read(out / "dit.pt")["model"], last["ema"])
        assert distance(third, last["model"]) > 1e-3
    one = train(tmp_path / "one", steps=1)
    assert_identical(one["ema"], one["model"])  # the initial weights have no part in it
    assert_identical(first, one["model"])


def test_ema_of_a_short_run_is_no_worse_than_its_weights(tmp_path):
    """After 100 steps of the demo with a smaller batch."""
    flags = "--preset demo --batch 8 --micro-batch 8 --stats-images 100 --device cpu --epochs 0.1".split()
    train_dit.main([*flags, "--out", str(tmp_path / "out")])
    last = read(tmp_path / "out" / "last.pt")
    images = torch.stack([torch.from_numpy(np.array(encoder.Shapes(8000, 32).open(i)[0])) for i in range(7900, 8000)])
    x = dit.normalize(encoder.Encoder("random-tiny", 32)(images.permute(0, 3, 1, 2) / 255), last["stats"])
    labels = torch.arange(7900, 8000) % CLASSES
    t, noise, _ = train_dit.step_randomness(torch.arange(len(x)), labels, SHAPE, CLASSES, 0.1, torch.Generator())
    t = dit.time_shift(t, last["shift"])
    model = dit.DiT(*SHAPE[:2], CLASSES, **MODEL)
    losses = {}
    with torch.no_grad():
        for name in ("model", "ema"):
            model.load_state_dict(last[name])
            losses[name] = dit.flow_matching_loss(model, x, labels, t, noise).mean().item()
    print(losses)
    assert losses["model"] < 1.7, "a new model has 2"
    assert losses["ema"] < 1.1 * losses["model"]


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_log(base):
    table = rows(base[0])
    assert list(table[0]) == ["step", "epoch", "loss", "loss_t0.0", "loss_t0.2", "loss_t0.4", "loss_t0.6", "loss_t0.8",
                              "grad_norm", "lr", "images_per_s", "memory_gb"]
    assert [(row["step"], row["epoch"]) for row in table] == [("1", "0.0010"), ("2", "0.0020"), ("3", "0.0030")]
    assert all(float(row["images_per_s"]) > 0 and row["memory_gb"] == "0" and row["lr"] == "0.003" for row in table)


def test_intervals_and_steps_are_rounded(folder, tmp_path, decoder_path, monkeypatch):
    """With 20 images in batches of 8 an epoch has 2.5 steps, and 3.05 epochs have 7.6: 8. Nothing else is rounded."""
    saved, save = [], train_dit.save_checkpoint
    monkeypatch.setattr(train_dit, "save_checkpoint", lambda files: saved.append(files) or save(files))
    monkeypatch.setattr(train_dit, "sample", lambda velocity, noise, shift: noise)  # sampling takes long
    flags = ["--data", folder, "--workers", 0, "--stats", make_stats(tmp_path / "stat.pt"), "--epochs", 3.05]
    out = tmp_path / "out"
    train(out, *flags, "--save-every", 3, "--keep-every", 4, "--preview-every", 5, "--log-every", 3, "--decoder",
          decoder_path)
    assert [list(files.values())[-1]["step"] for files in saved] == [3, 4, 6, 8]
    assert [[path.name for path in files] for files in saved] == [
        ["stat.pt", "dit.pt", *kept, "last.pt"] for kept in ([], ["dit-4.pt"], [], ["dit-8.pt"])]
    assert {path.name for path in out.glob("*.png")} == {"preview-5.png", "preview-8.png"}
    assert [row["step"] for row in rows(out)] == ["3", "6", "8"]
    assert [read(out / f"dit-{step}.pt")["epoch"] for step in (4, 8)] == pytest.approx([1.6, 3.2])
    assert read(out / "dit.pt")["classes"] == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


STILL = ["--lr", 1e-9, "--lr-end", 0]  # the weights stay as they are
OURS = f"random-tiny, layer the last, shape {SHAPE}"
OTHER_LATENTS = [(dict(name="mae-b"), OURS.replace("random-tiny", "mae-b")),
                 (dict(layers=[0, 2]), OURS.replace("the last", "0 2"))]


def test_init_takes_weights_statistics_and_time_shift(tmp_path, built):
    """From our files. From published ones the weights; the statistics are given, the time shift is computed."""
    source = read(make_alive(tmp_path / "ours.pt"))
    torch.save({"ema": published_dit(dit.load_dit(tmp_path / "ours.pt")[0])}, tmp_path / "published.pt")
    stats = make_stats(tmp_path / "stat.pt")
    ours = train(tmp_path / "ours", "--init", tmp_path / "ours.pt", *STILL, steps=1)
    published = train(tmp_path / "published", "--init", tmp_path / "published.pt", "--stats", stats, *STILL, steps=1)
    for last, name in ((ours, "ours"), (published, "published")):
        torch.testing.assert_close(last["model"], source["model"], rtol=0, atol=1e-8)
        expected = source["stats"] if name == "ours" else dit.load_stats(stats, SHAPE)
        assert_identical(last["stats"], expected)
        assert last["shift"] == read(tmp_path / name / "dit.pt")["shift"] == (3.0 if name == "ours" else SHIFT)
    given = train(tmp_path / "given", "--init", tmp_path / "ours.pt", "--stats", stats, *STILL, steps=1)
    assert_identical(given["stats"], dit.load_stats(stats, SHAPE))  # --stats has priority

    (tmp_path / "ours.pt").unlink()
    resumed = train(tmp_path / "ours", *STILL, steps=2)  # a resumed run needs neither the file nor the flag
    assert resumed["step"] == 2 and resumed["shift"] == 3.0
    assert_identical(resumed["stats"], source["stats"])


def test_init_with_another_number_of_classes_keeps_the_null_class(folder, tmp_path):
    source = read(make_alive(tmp_path / "ours.pt"))
    flags = ["--data", folder, "--workers", 0, "--batch", 20, "--epochs", 1]
    state = train(tmp_path / "out", *flags, "--init", tmp_path / "ours.pt", *STILL)["model"]
    table = state.pop(TABLE)
    torch.testing.assert_close(state, {key: source["model"][key] for key in state}, rtol=0, atol=1e-8)
    torch.manual_seed(0)
    new = dit.DiT(*SHAPE[:2], 2, **MODEL).state_dict()[TABLE]
    expected = torch.cat([new[:2], source["model"][TABLE][-1:]])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-8)
    assert read(tmp_path / "out" / "dit.pt")["config"]["num_classes"] == 2


def test_init_that_does_not_fit_is_refused(tmp_path, capsys):
    def line(path, *flags):
        said = refused(capsys, "--init", path, *flags, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return said

    make_alive(tmp_path / "ours.pt")
    torch.save(published_dit(dit.load_dit(tmp_path / "ours.pt")[0]), tmp_path / "bare.pt")
    path = tmp_path / "bare.pt"
    assert f"--init {path} has no latent statistics: give them with --stats" in line(path)
    path = make_alive(tmp_path / "deep.pt", depth=9)
    assert f"--init {path} is another model: depth 9 instead of 2; choose --model and --qk-norm" in line(path)
    assert "is another model: qk_norm False instead of True" in line(tmp_path / "ours.pt", "--qk-norm")
    for record, latents in OTHER_LATENTS:
        torch.save(read(tmp_path / "ours.pt") | dict(encoder=RECORD | record), tmp_path / "other.pt")
        assert f"is for latents of {latents}, not of {OURS}: give another file, or" in line(tmp_path / "other.pt")
    assert f"not of {OURS.replace('the last', '0 1')}: give" in line(tmp_path / "ours.pt", "--layers", 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Previews, files on the hub


def test_previews_are_samples_of_the_ema(tmp_path, decoder_path, capsys, monkeypatch):
    out = tmp_path / "out"
    train(out, "--decoder", decoder_path, "--init", make_alive(tmp_path / "init.pt"), steps=3)
    assert "no previews" not in capsys.readouterr().out
    assert {path.name for path in out.glob("*.png")} == {"preview-3.png"}
    model, info = dit.load_dit(out / "dit.pt")
    network, _ = decoder.load_decoder(decoder_path)
    labels = [i * CLASSES // 16 for i in range(4)]  # of 16
    noise = torch.stack([torch.from_numpy(np.random.default_rng((0, i)).standard_normal(SHAPE, dtype=np.float32))
                         for i in range(4)])
    z = dit.denormalize(dit.sample(dit.guided(model, torch.tensor(labels)), noise, 50, 3.0), info["stats"])
    expected = np.asarray(decoder.image_grid(decoder.to_uint8(network(z)), 4)).astype(int)
    with Image.open(out / "preview-3.png") as picture:
        assert picture.size == (8 * 32 + 7 * 2, 2 * 32 + 2)
        assert abs(np.asarray(picture)[:32, : 4 * 34 - 2].astype(int) - expected).max() <= 1

    train(tmp_path / "none", "--decoder", decoder_path, "--preview-every", 0, steps=1)
    assert "no previews\n" in capsys.readouterr().out and not list((tmp_path / "none").glob("*.png"))
    monkeypatch.chdir(tmp_path)
    (found := tmp_path / "runs" / "demo" / "decoder" / "decoder.pt").parent.mkdir(parents=True)  # used if it fits
    for record, _ in [({}, ""), *OTHER_LATENTS]:
        torch.save(read(decoder_path) | dict(encoder=RECORD | record), found)
        capsys.readouterr()
        train(tmp_path / f"found{len(record)}{record.get('name')}", steps=1)
        said = "no previews: --decoder runs/demo/decoder/decoder.pt is for latents of" in capsys.readouterr().out
        assert said == bool(record)


def test_decoders_of_other_latents_are_refused(tmp_path, decoder_path, capsys):
    C, grid, _ = SHAPE
    for record, _ in OTHER_LATENTS:
        torch.save(read(decoder_path) | dict(encoder=RECORD | record), tmp_path / f"{list(record)[0]}.pt")
    for name, config in (("wide", (C + 1, grid)), ("fine", (C, 2 * grid))):
        model = decoder.Decoder(*config, 8, 64, 1, 4, 128)
        torch.save(dict(kind="decoder", config=model.config, model=model.state_dict(), encoder=RECORD),
                   tmp_path / f"{name}.pt")
    for name, theirs in (*zip(("name", "layers"), (latents for _, latents in OTHER_LATENTS), strict=True),
                         ("wide", OURS.replace(str(SHAPE), str((C + 1, grid, grid)))),
                         ("fine", OURS.replace(str(SHAPE), str((C, 2 * grid, 2 * grid))))):
        line = refused(capsys, "--decoder", tmp_path / f"{name}.pt", "--out", tmp_path / "out")
        assert f"--decoder {tmp_path / name}.pt is for latents of {theirs}, not of {OURS}: give another file" in line
    assert not (tmp_path / "out").exists()
    train(tmp_path / "out", "--decoder", tmp_path / "name.pt", "--preview-every", 0, steps=1)  # not loaded


def test_files_on_the_hub_and_in_diffusers_layout(tmp_path, decoder_path, monkeypatch):
    """hf:OWNER/REPO/PATH is requested by that name. A file of diffusers has a decoder and the statistics."""
    stats = {"mean": torch.full(SHAPE, 0.5), "var": torch.full(SHAPE, 4.0)}
    save_file(diffusers(decoder.load_decoder(decoder_path)[0], stats), tmp_path / "diffusers.safetensors")
    files = {("o/weights", "a/b/dit.pt"): make_alive(tmp_path / "init.pt"),
             ("o/decoder", "diffusers.safetensors"): tmp_path / "diffusers.safetensors"}
    monkeypatch.setitem(decoder.SIZES, "like the file's", dict(width=64, heads=4))
    with mock.patch("huggingface_hub.hf_hub_download", lambda *name: str(files[name])):
        flags = ["--init", "hf:o/weights/a/b/dit.pt", "--decoder", "hf:o/decoder/diffusers.safetensors", *STILL]
        hub = train(tmp_path / "hub", *flags, "--stats", "hf:o/decoder/diffusers.safetensors", steps=1)
    torch.testing.assert_close(hub["stats"], stats)
    torch.testing.assert_close(hub["model"], read(tmp_path / "init.pt")["model"], rtol=0, atol=1e-8)
    train(tmp_path / "ours", "--init", tmp_path / "init.pt", "--decoder", decoder_path, "--stats",
          tmp_path / "diffusers.safetensors", *STILL, steps=1)
    pictures = [np.asarray(Image.open(tmp_path / name / "preview-1.png")) for name in ("hub", "ours")]
    assert np.array_equal(*pictures)


def test_the_small_size_that_the_paper_does_not_have():
    with torch.device("meta"):
        model = dit.DiT(**dit.SIZES["DiT-DH-Ti"])
    assert list(dit.SIZES["DiT-DH-Ti"].values()) == [192, 12, 3, 768, 2, 12]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(32.3e6, rel=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Full width


def test_one_step_at_full_width(tmp_path, monkeypatch):
    """C = 768, 256 tokens: DINOv2-B with random weights and DiT-DH-S, whose head is wide enough for Theorem 1, with one
    block each."""
    monkeypatch.setattr(train_dit, "Encoder", functools.partial(encoder.Encoder, depth=1))
    monkeypatch.setitem(dit.SIZES, "DiT-DH-S", dit.SIZES["DiT-DH-S"] | dict(depth=1, head_depth=1))
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", num_classes=0, depth=1)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    make_images(tmp_path / "data", 8, size=(300, 300))
    written = {}
    monkeypatch.setattr(train_dit, "save_checkpoint", written.update)  # 1.5 GB, not needed
    train_dit.main(["--data", str(tmp_path / "data"), "--encoder-weights", str(tmp_path / "vit.pt"), "--model",
                    "DiT-DH-S", "--batch", "1", "--micro-batch", "1", "--epochs", "0.125", "--workers", "0",
                    "--log-every", "1", "--out", str(tmp_path / "out"), "--device", "cpu"])
    (row,) = rows(tmp_path / "out")
    assert 0 < float(row["loss"]) < 10 and float(row["lr"]) == 2e-4
    result, last = (written[tmp_path / "out" / name] for name in ("dit.pt", "last.pt"))
    assert result["stats"]["mean"].shape == (768, 16, 16) and round(result["shift"], 2) == 6.93
    assert result["model"]["blocks.0.attn.qkv.weight"].shape == (3 * 384, 384)
    moved = last["model"]["final_layer.linear.weight"]
    assert moved.shape == (768, 2048) and moved.abs().max() == pytest.approx(2e-4, rel=0.01)  # Adam's first step
