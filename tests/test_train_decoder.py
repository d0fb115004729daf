"""train_decoder.py through its main(), in one process and in two, on tiny models with random weights."""

import functools
import math
import os
import signal
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (ROOT, assert_close, assert_identical, finish, make_images, published_decoder, read, rows,
                      save_tiny_dino, start_ranks)
from kill_check import at_step
from PIL import Image
from safetensors.torch import save_file
from test_sample import diffusers

import decoder as decoders
import encoder as encoders
import train_decoder
from decoder import SIZES, Decoder, load_decoder
from encoder import Encoder, ImageFolder, center_crop, random_key
from fid import LPIPS

TINY = dict(width=128, depth=3, heads=4, mlp=512)  # replaces the demo's decoder, which may change


def smooth(images):
    """Replaces `quantize`, whose steps amplify rounding errors; tests/test_adversarial.py tests `quantize` itself."""
    return 0.9 * images.clamp(-1, 1)


@pytest.fixture(scope="module", autouse=True)
def parts():
    """The discriminator's fakes are not rounded to 8 bits; LPIPS, which is frozen, is loaded once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "ViT-tiny", TINY)
        patch.setattr(train_decoder, "quantize", smooth)
        patch.setattr(train_decoder, "LPIPS", functools.cache(LPIPS))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten images, larger than the crops; in batches of 4 an epoch has 2.5 steps."""
    return make_images(tmp_path_factory.mktemp("data") / "photos", 10, size=(56, 48))


@pytest.fixture(scope="module")
def settings(photos):
    """L1 alone: the demo's models at 16 pixels on the photos, five steps of four images, two of them warm-up."""
    return dict(preset="demo", data=photos, size=16, resize=24, batch=4, micro_batch=4, epochs=2, warmup=0.8, lr=1e-3,
                lr_end=3e-5, ema=0.25, workers=0, device="cpu", log_every=1, preview_every=0, save_every=99)


@pytest.fixture(scope="module")
def adversarial(settings, tmp_path_factory):
    """With the discriminator, which is trained from step 1 on; its loss trains the decoder from step 2 on."""
    dino = save_tiny_dino(tmp_path_factory.mktemp("dino") / "dino.pt")
    return settings | dict(gan=0.75, disc_start=0.4, gan_start=0.8, tau=0.8, dino_weights=dino)


@pytest.fixture(scope="module")
def full(adversarial, lpips_weights):
    """All three losses."""
    return adversarial | dict(lpips=1, vgg_weights=lpips_weights[0], lpips_weights=lpips_weights[1])


def flags(**values):
    """dict(log_every=1, checkpointing=True, layers=[0, 2]) -> --log-every 1 --checkpointing --layers 0 2."""
    argv = []
    for key, value in values.items():
        value = value if isinstance(value, list) else [] if value is True else [value]
        argv += [f"--{key.replace('_', '-')}", *map(str, value)]
    return argv


def train(out, settings, **changes):
    """Run the script in this process; returns last.pt."""
    train_decoder.main(flags(**settings | changes, out=out))
    return read(out / "last.pt")


def refused(capsys, out, settings, **changes):
    """Run the script, which must end with one error line after its usage -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(out, settings, **changes)
    _, line = capsys.readouterr().err.splitlines()
    return line


def numbers(out):
    """log.csv as dictionaries of numbers, without empty cells."""
    return [{key: float(value) for key, value in row.items() if value} for row in rows(out)]


def relative(a, b, start):
    """Distance of the weights a and b, relative to the distance that training moved b from `start`.

    Without the biases whose gradient is zero up to rounding, which AdamW amplifies: those of keys in attention and of
    convolutions before a norm.
    """
    apart = moved = 0.0
    for key in b:
        if key.endswith(("embed.0.bias", "mix.0.bias")):
            continue
        keep = torch.ones_like(b[key])
        if key.endswith("qkv.bias"):
            keep.view(3, -1)[1] = 0
        apart += ((a[key] - b[key]) * keep).double().square().sum()
        moved += ((b[key] - start[key]) * keep).double().square().sum()
    return math.sqrt(apart / moved)


def initial_weights(settings):
    """The weights before the first step, made from the seed; the decoder maps a grid of 2 x 2 to 16 pixels."""
    torch.manual_seed(0)
    heads = train_decoder.Discriminator(settings["dino_weights"]).heads
    torch.manual_seed(0)
    decoder = Decoder(128, 2, 8, **TINY)
    return dict(model=decoder.state_dict(), ema=decoder.state_dict(), discriminator=heads.state_dict())


@pytest.fixture(scope="module")
def initial(full):
    return initial_weights(full)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, full):
    """The full recipe, five steps in one process -> (folder, last.pt)."""
    out = tmp_path_factory.mktemp("full") / "run"
    return out, train(out, full, preview_every=3)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe

RECIPE = dict(
    encoder="dinov2-b", size=256, encoder_size=256, layers=[], resize=384, model="ViT-XL", tau=0.8, lpips=1.0, gan=0.75,
    disc_start=6.0, gan_start=8.0, epochs=16, batch=512, lr=2e-4, lr_end=2e-5, betas=[0.9, 0.95], warmup=1.0,
    ema=0.9978, precision="tf32", seed=0, init=None, encoder_weights=None, lpips_weights=None, vgg_weights=None,
    dino_weights=None, compile="auto", checkpointing=False, preview_every=2500, save_every=1000, log_every=100,
    device="cpu")


@pytest.mark.parametrize("preset, differs", {
    "imagenet256": dict(micro_batch=16),
    "imagenet512": dict(size=512, encoder_size=512, resize=768, micro_batch=4),
}.items())
def test_every_default_equals_the_recipe(preset, differs, tmp_path):
    for flag in [["--preset", preset], []][: 1 + (preset == "imagenet256")]:
        _, args = train_decoder.parse_args([*flag, "--data", str(tmp_path), "--device", "cpu"])
        given = dict(preset=preset, data=str(tmp_path), out=Path(f"runs/{preset}/decoder"), workers=args.workers)
        assert vars(args) == RECIPE | differs | given


def test_sizes_of_the_recipe():
    table = {"ViT-S": (384, 12, 6, 1536), "ViT-B": (768, 12, 12, 3072), "ViT-L": (1024, 24, 16, 4096),
             "ViT-XL": (1152, 28, 16, 4096)}
    assert {name: tuple(SIZES[name].values()) for name in table} == table


def test_settings_that_are_refused(adversarial, tmp_path, capsys):
    for changes, said in [
            (dict(gan_start=0.3), "--gan-start 0.3 is before --disc-start 0.4"),
            (dict(resize=15), "--resize 15 is below --size 16"),
            (dict(lpips=1, size=15), "--size 15 is too small for the perceptual loss"),
            (dict(encoder_size=24, size=32, resize=32), "--size 32 is not a multiple of the encoder's grid, 3")]:
        assert f"error: {said}" in refused(capsys, tmp_path / "run", adversarial, **changes)
    args = train_decoder.parse_args(["--preset", "demo"])[1]
    assert args.disc_start < args.gan_start < args.epochs and args.resize == args.size == 32
    assert not (tmp_path / "run").exists()


def plain_recipe(settings, start, steps):
    """The recipe written as simply as possible: all losses on one graph, torch's plain AdamW, one batch.

    Returns the final weights of decoder, EMA and discriminator's heads, and for each step the norms of both gradients.
    """
    encoder = Encoder("random-tiny", 16)
    lpips = train_decoder.LPIPS(settings["vgg_weights"], settings["lpips_weights"])
    discriminator = train_decoder.Discriminator(settings["dino_weights"])
    heads = discriminator.heads
    heads.load_state_dict(start["discriminator"])
    decoder = Decoder(128, 2, 8, **TINY, mean=[0.5] * 3, std=[0.5] * 3)
    decoder.load_state_dict(start["model"])
    ema, norms = {}, []
    adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0, foreach=False)
    optimizer, disc_optimizer = adamw(decoder.parameters()), adamw(heads.parameters())
    rates = types.SimpleNamespace(lr=1e-3, lr_end=3e-5, warmup=0.8, epochs=2)
    source = ImageFolder(settings["data"])
    order = [i for epoch in range(3) for i in encoders.epoch_order(10, 0, epoch)]
    for step in range(steps):
        positions = range(4 * step, 4 * step + 4)
        keys = [random_key(0, *divmod(position, 10)) for position in positions]
        crops = [encoders.random_crop(source.open(order[position])[0], 24, 16, np.random.default_rng(key))
                 for position, key in zip(positions, keys, strict=True)]
        real = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2) / 255
        noise, uniform = train_decoder.step_randomness(torch.tensor(keys), (128, 2, 2), 0.8, torch.Generator())
        z = encoder(real)

        fake = decoder(z + noise)
        loss = (fake - real).abs().mean() + lpips(2 * fake - 1, 2 * real - 1).mean()
        if step >= 2:
            gan = -discriminator.eval()(train_decoder.diffaug(2 * fake - 1, uniform[0])).mean()
            last = decoder.to_pixels.weight
            (g_rec,), (g_gan,) = (torch.autograd.grad(part, last, retain_graph=True) for part in (loss, gan))
            loss = loss + 0.75 * g_rec.norm() / (g_gan.norm() + 1e-6) * gan
        optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step, rates, 2.5)
        decoder.zero_grad()
        loss.backward()
        norms.append(dict(grad_norm=torch.cat([p.grad.flatten() for p in decoder.parameters()]).norm().item()))
        optimizer.step()
        decay = min(0.25, step / (9 + step))
        for key, value in decoder.state_dict().items():
            ema[key] = decay * ema.get(key, 0) + (1 - decay) * value

        if step >= 1:
            with torch.no_grad():
                clean = 0.9 * (2 * decoder(z) - 1).clamp(-1, 1)
            discriminator.train()
            # Real and fake images in one batch: each forward pass is one power iteration of the spectral norm.
            augmented = [train_decoder.diffaug(x, u) for x, u in ((2 * real - 1, uniform[2]), (clean, uniform[1]))]
            on_real, on_fake = discriminator(torch.cat(augmented)).chunk(2)
            disc_optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step - 1, rates, 2.5)
            heads.zero_grad()
            (0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())).backward()
            norms[-1]["disc_norm"] = torch.cat([p.grad.flatten() for p in heads.parameters()]).norm().item()
            disc_optimizer.step()
    return dict(model=decoder.state_dict(), ema=ema, discriminator=heads.state_dict()), norms


def assert_same_weights(a, b, start, bound=1e-3):
    for part in ("model", "ema", "discriminator"):
        assert relative(a[part], b[part], start[part]) < bound, part


@pytest.fixture
def float64(monkeypatch):
    """All in float64: in float32 the inputs of VGG16's ReLUs change sign by rounding, and with them the gradient."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(train_decoder, "LPIPS", LPIPS)  # not the cached one, which is in float32
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_full_recipe_equals_it_written_plainly(full, float64, tmp_path):
    """Five steps: L1 + LPIPS alone, then the discriminator is trained, then its loss trains the decoder."""
    last, start = train(tmp_path / "run", full), initial_weights(full)
    assert last["step"] == 5 and {value.dtype for value in last["model"].values()} == {torch.float64}
    plain, norms = plain_recipe(full, start, 5)
    assert_same_weights(last, plain, start, 1e-9)
    for row, expected in zip(numbers(tmp_path / "run"), norms, strict=True):
        assert {name: row[name] for name in row if "norm" in name} == pytest.approx(expected, rel=1e-5)


def test_log_of_the_full_recipe(one_process):
    """All losses are finite and logged from their start on; both learning rates equal the closed form."""
    log = numbers(one_process[0])
    assert [(row["step"], row["epoch"]) for row in log] == [(1, 0.4), (2, 0.8), (3, 1.2), (4, 1.6), (5, 2.0)]
    assert all(math.isfinite(value) for row in log for value in row.values())
    cosine = [3e-5 + (1e-3 - 3e-5) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [row["lr"] for row in log] == pytest.approx([5e-4, 1e-3, *cosine], rel=1e-3)
    assert [row["disc_lr"] for row in log[1:]] == pytest.approx([5e-4, 1e-3, *cosine[:2]], rel=1e-3)
    for step, row in enumerate(log):
        assert {"l1", "lpips", "grad_norm", "images_per_s"} <= row.keys() and row["memory_gb"] == 0
        assert all((name in row) == (step >= 1) for name in ("disc", "real", "fake", "disc_norm", "disc_lr"))
        assert all((name in row) == (step >= 2) for name in ("gan", "gan_weight"))


def test_previews_show_originals_above_reconstructions(one_process, photos):
    out, _ = one_process
    assert sorted(path.name for path in out.glob("*.png")) == ["preview-3.png", "preview-5.png"]
    picture = np.asarray(Image.open(out / "preview-5.png"))
    assert picture.shape == (16 + 2 + 16, 8 * 18 - 2, 3)
    source, decoder = ImageFolder(photos), load_decoder(out / "decoder.pt")[0]
    for column, i in enumerate(np.random.default_rng(0).permutation(10)[:8]):
        image = np.array(encoders.random_crop(source.open(i)[0], 24, 16, np.random.default_rng(random_key(0, int(i)))))
        left = 18 * column
        assert np.array_equal(picture[:16, left : left + 16], image)
        z = Encoder("random-tiny", 16)(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        decoded = decoders.to_uint8(decoder(z))[0].numpy()
        assert np.abs(picture[18:, left : left + 16].astype(int) - decoded).max() <= 1


def test_contents_of_the_checkpoints(one_process):
    out, last = one_process
    decoder, info = load_decoder(out / "decoder.pt")
    assert all(torch.equal(value, last["ema"][key]) for key, value in decoder.state_dict().items())
    assert (info["encoder"]["name"], info["encoder"]["mean"]) == ("random-tiny", [0.5] * 3)
    assert (info["tau"], info["epoch"]) == (0.8, 2.0)
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, accumulation, precision, compilation

TWO = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import pytest, torch
import torch.distributed as dist
import conftest, kill_check, train_decoder

rank, out = int(os.environ["RANK"]), Path({out!r})
train_decoder.DINO.update(conftest.TINY_DINO)
init = dist.init_process_group  # one process group for all parts below
dist.init_process_group = lambda *how, **more: dist.is_initialized() or init(*how, **more)
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None

dist.init_process_group("gloo")
golden = {{file.name: conftest.adaptive_weight_step(file, rank, 2, torch.nn.parallel.DistributedDataParallel)
          for file in (conftest.ROOT / "tests/golden").glob("adaptive_weight*.npz")}}
torch.save(golden, out / f"golden-{{rank}}.pt")

train_decoder.quantize = lambda images: 0.9 * images.clamp(-1, 1)
train_decoder.SIZES["ViT-tiny"] = {tiny!r}
train_decoder.main({whole!r})
for step, numbers in (2, {{1: signal.SIGTERM}}), (3, {{0: signal.SIGINT, 1: signal.SIGTERM}}):  # of each rank
    kill_check.at_step(pytest.MonkeyPatch(), step, lambda: rank in numbers and os.kill(os.getpid(), numbers[rank]))
    with pytest.raises(SystemExit, match="143"):
        train_decoder.main({parts!r})
    dist.barrier()  # until rank 0 has saved
destroy()
"""


@pytest.fixture(scope="module")
def two_processes(full, settings, tmp_path_factory):
    """Two processes run everything that the tests below need -> (folder, the output of each process)."""
    out = tmp_path_factory.mktemp("two")
    script = out / "two.py"
    whole = flags(**full, out=out / "whole")
    parts = flags(**settings | dict(micro_batch=1, epochs=4), out=out / "parts")
    script.write_text(TWO.format(root=str(ROOT), out=str(out), tiny=TINY, whole=whole, parts=parts))
    return out, finish(*start_ranks(script))


def test_golden_adaptive_weight_over_two_processes(two_processes):
    """Each has half of the images; both compute the weight and the gradients of one process with all images."""
    one, two = (read(two_processes[0] / f"golden-{rank}.pt") for rank in (0, 1))
    assert one
    for name, (ours, recorded) in one.items():
        for key in recorded:
            assert_close(ours[key], recorded[key], 1e-5)
            assert torch.equal(ours[key], two[name][0][key]), key


def test_two_processes_end_with_the_weights_of_one(one_process, two_processes, initial):
    """The full recipe, half the batch each: every forward pass with gradients must go through DDP."""
    out, printed = two_processes
    assert [words.count("2 processes x 1 x 2") for words in printed] == [1, 0]  # rank 0 prints
    two = read(out / "whole/last.pt")
    assert two["step"] == 5
    assert_same_weights(two, one_process[1], initial)
    for a, b in zip(numbers(out / "whole"), numbers(one_process[0]), strict=True):
        for name in ("l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm", "disc_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2, abs=1e-4), (name, a, b)


def test_a_signal_to_one_process_stops_all_and_accumulation_equals_the_batch(
        two_processes, settings, initial, tmp_path, monkeypatch):
    """In step 3 rank 1 alone gets a SIGTERM; the resumed run ends in step 4, with a signal to each rank, of which the
    larger number counts. Each process has two micro-batches of one image."""
    out, printed = two_processes
    assert [printed[0].count(f"stopped and saved at step {step};") for step in (3, 4)] == [1, 1]
    assert "2 processes x 2 x 1" in printed[0] and "stopped and saved" not in printed[1]
    two = read(out / "parts/last.pt")
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path / "one", settings, epochs=4)
    one = read(tmp_path / "one/last.pt")
    assert one["step"] == two["step"] == 4
    for part in ("model", "ema"):
        assert relative(two[part], one[part], initial[part]) < 1e-3
    for a, b in zip(numbers(out / "parts"), numbers(tmp_path / "one"), strict=True):
        assert a["l1"] == pytest.approx(b["l1"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_accumulation_equals_the_whole_batch(adversarial, initial, tmp_path, monkeypatch):
    """Five images in micro-batches of 1, and of 2, 2, 1. The GAN loss, whose weight depends on the micro-batch, is off;
    so are the discriminator's power iterations, one in each forward pass."""
    nn_train = torch.nn.Module.train
    monkeypatch.setattr(train_decoder.Discriminator, "train", lambda self, mode=True: nn_train(self, False))
    settings = adversarial | dict(batch=5, micro_batch=5, epochs=1.5, gan_start=9)
    whole = train(tmp_path / "whole", settings)
    assert whole["step"] == 3
    for size in (1, 2):
        parts = train(tmp_path / f"parts{size}", settings, micro_batch=size)
        assert_same_weights(parts, whole, initial)
        for a, b in zip(numbers(tmp_path / f"parts{size}"), numbers(tmp_path / "whole"), strict=True):
            for name in ("l1", "disc", "real", "fake"):  # means over images, not over micro-batches
                assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4, abs=1e-5), name


def test_checkpointing_changes_nothing(settings, tmp_path, monkeypatch):
    calls, original = [], decoders.checkpoint
    monkeypatch.setattr(decoders, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    plain = train(tmp_path / "plain", settings)
    assert not calls
    again = train(tmp_path / "again", settings, checkpointing=True)
    assert len(calls) == 5 * TINY["depth"]  # steps, blocks
    assert_identical(again["model"], plain["model"])


def test_bf16_is_for_the_networks_alone_and_each_image_is_encoded_once(full, tmp_path, monkeypatch):
    """The networks run under autocast; their outputs, the discriminator's heads and its loss are float32."""
    seen, products, in_lpips = {}, {}, []
    for network in (Encoder, Decoder, train_decoder.Discriminator, train_decoder.DiscriminatorHead):
        def forward(self, *inputs, network=network, original=network.forward, **options):
            output = original(self, *inputs, **options)
            first = output[0] if isinstance(output, tuple) else output
            seen.setdefault(network.__name__, []).append(
                (len(inputs[0]), torch.is_autocast_enabled("cpu"), first.requires_grad))
            assert first.dtype == inputs[0].dtype == torch.float32, network
            return output
        monkeypatch.setattr(network, "forward", forward)
    for name, original in (("linear", F.linear), ("conv2d", F.conv2d)):  # the matrix products in the networks
        def product(x, *rest, name=name, original=original):
            output = original(x, *rest)
            products.setdefault(name, set()).add(str(output.dtype))
            return output
        monkeypatch.setattr(F, name, product)

    def hinge(*logits, original=train_decoder.hinge_loss):
        assert not torch.is_autocast_enabled("cpu") and all(x.dtype == torch.float32 for x in logits)
        return original(*logits)

    monkeypatch.setattr(train_decoder, "hinge_loss", hinge)
    lpips = train_decoder.LPIPS(full["vgg_weights"], full["lpips_weights"])
    hook = lpips.features[0].register_forward_hook(lambda layer, _, output: in_lpips.append(output.dtype))
    last = train(tmp_path / "run", full, precision="bf16", epochs=1.2, micro_batch=2)
    hook.remove()
    assert last["step"] == 3
    assert products["linear"] == {"torch.bfloat16"} and set(in_lpips) == {torch.bfloat16}
    assert seen["Encoder"] == 6 * [(2, True, False)]  # 3 steps of 2 micro-batches
    assert len(in_lpips) == 6 * 2
    step = [(2, True, True)] * 2  # of the decoder: it and the discriminator
    fakes, pairs = [(2, True, False)] * 2, [(4, True, True)] * 2  # of the discriminator: real and fake images together
    assert seen["Decoder"] == step + step + fakes + step + fakes
    assert seen["Discriminator"] == pairs + step + pairs
    assert {autocast for _, autocast, _ in seen["DiscriminatorHead"]} == {False}


def test_lpips_under_autocast(lpips_weights):
    """Only the convolutions of VGG16 run in bfloat16; norms, differences and heads are float32."""
    lpips = train_decoder.LPIPS(*lpips_weights)
    a = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a + 0.05 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    features, hooks = {i: [] for i in LPIPS.layers}, []
    for i in LPIPS.layers:
        hook = lpips.features[i].register_forward_hook(lambda _, __, output, i=i: features[i].append(output.clone()))
        hooks.append(hook)
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(a, b)
    for hook in hooks:
        hook.remove()
    expected = 0
    for (i, (fa, fb)), heads in zip(features.items(), read(lpips_weights[1]).values(), strict=True):
        assert fa.dtype == torch.bfloat16, i
        fa, fb = (x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10) for x in (fa, fb))
        expected = expected + ((fa - fb).square() * heads.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=0)


def test_traced_full_recipe_equals_eager(one_process, full, initial, tmp_path, monkeypatch):
    """All that --compile does, with the discriminator, except generating code."""
    compiled, compile_module = [], torch.nn.Module.compile
    how = dict(backend=lambda graph, inputs: graph, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **more: compiled.append(self) or compile_module(self, **how, **more))
    last = train(tmp_path / "run", full, compile="on")
    assert len(compiled) == 3 + TINY["depth"] + 12  # the blocks of encoder, decoder and DINO
    assert_same_weights(last, one_process[1], initial)


# ---------------------------------------------------------------------------------------------------------------------
# --init, layers, downloads, the warning at the start


@pytest.fixture(scope="module", params=["ours", "published", "diffusers"])
def given(one_process, request, tmp_path_factory):
    """A decoder in a file for --init."""
    path = one_process[0] / "decoder.pt"
    decoder, folder = load_decoder(path)[0], tmp_path_factory.mktemp("given")
    if request.param == "published":
        path = folder / "decoder.pt"
        torch.save(published_decoder(decoder), path)
    elif request.param == "diffusers":
        path = folder / "decoder.safetensors"
        save_file(diffusers(decoder, dict.fromkeys(("mean", "var"), torch.ones(128, 2, 2))), path)
    return path


def test_init_starts_from_the_weights_of_a_file(given, one_process, settings, tmp_path):
    """A resumed run does not read the file again."""
    for epochs, init in ((0.4, given), (0.8, tmp_path / "gone.pt")):
        last = train(tmp_path / "run", settings, init=init, epochs=epochs, lr=1e-30, lr_end=0)
        for part in ("model", "ema"):
            torch.testing.assert_close(last[part], one_process[1]["ema"], rtol=0, atol=1e-20)


def test_init_that_does_not_fit_is_refused(one_process, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "ViT-deep", TINY | dict(depth=9))
    content, path = read(one_process[0] / "decoder.pt"), tmp_path / "decoder.pt"
    ours, latents = "random-tiny, layer the last, shape (128, 2, 2)", "is for latents of {}, not of {}: give another"
    for record, changes, said in [
            (dict(name="mae-b"), {}, latents.format(ours.replace("random-tiny", "mae-b"), ours)),
            (dict(layers=[0, 2]), {}, latents.format(ours.replace("the last", "0 2"), ours)),
            ({}, dict(layers=[1, 0]), latents.format(ours, ours.replace("the last", "0 1"))),
            ({}, dict(size=32, resize=32), latents.format(ours, ours.replace("2, 2", "4, 4"))),
            ({}, dict(model="ViT-deep"), "is another model: depth 3 instead of 9; choose --model and --size"),
            ({}, dict(size=32, resize=32, encoder_size=16), "is another model: patch 8 instead of 16; choose")]:
        torch.save(content | dict(encoder=content["encoder"] | record), path)
        assert f"--init {path} {said}" in refused(capsys, tmp_path / "run", settings, init=path, **changes)
    for name, said in (("absent.pt", "cannot read {} (FileNotFoundError"), ("log.csv", "cannot read {} ("),
                       ("last.pt", "{} is not a decoder: give a decoder.pt of train_decoder.py")):
        file = one_process[0] / name
        assert said.format(file) in refused(capsys, tmp_path / "run", settings, init=file)
    assert not (tmp_path / "run").exists()


def test_layers_are_recorded_and_make_the_latents(settings, tmp_path, monkeypatch):
    """A decoder for DINOv3 neither scales nor shifts its output, new or from a published file."""
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, z, **how: seen.append((self, z)) or forward(self, z, **how))
    train(tmp_path / "run", settings, layers=[2, 0], tau=0, epochs=0.4)
    assert load_decoder(tmp_path / "run/decoder.pt")[1]["encoder"]["layers"] == [0, 2]
    items = next(iter(encoders.training_batches(10, 4, 4, range(1), 0)))
    images = encoders.Images(ImageFolder(settings["data"]), functools.partial(encoders.random_crop, resize=24, size=16))
    pixels = torch.stack([images[item][0] for item in items]) / 255
    assert_close(seen[0][1], Encoder("random-tiny", 16, layers=[0, 2])(pixels))

    torch.save(published_decoder(Decoder(384, 2, 8, **TINY)), tmp_path / "bare.pt")
    grid = types.SimpleNamespace(latent_shape=(384, 2, 2), record=dict(name="dinov3-s"))
    args = types.SimpleNamespace(size=16, model="ViT-tiny", encoder="dinov3-s", init=None)
    for args.init in (None, tmp_path / "bare.pt"):
        config = train_decoder.initial_decoder(args, grid, None).config
        assert (config["mean"], config["std"]) == ([0.0] * 3, [1.0] * 3)


def test_downloads_of_weights(settings, one_process, tmp_path, monkeypatch):
    """timm and torch.hub load the frozen networks, the hub --init; each is requested once."""
    requested, create = [], timm.create_model

    def create_model(model, pretrained=False, pretrained_cfg_overlay=None, **options):
        if pretrained:
            requested.append((model, pretrained_cfg_overlay))
        return create(model, **options)

    def fetch(url, **how):
        requested.append((url, how["weights_only"]))
        return {f"lin{i}.model.1.weight": torch.zeros(1, c, 1, 1) for i, c in enumerate(LPIPS.layers.values())}

    def download(*name):
        requested.append(name)
        return str(one_process[0] / "decoder.pt")

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with mock.patch("huggingface_hub.hf_hub_download", download):
        last = train(tmp_path / "run", settings, init="hf:owner/weights/a/model.pt", epochs=0.4, lr=1e-30, lr_end=0,
                     gan=1, disc_start=0, gan_start=0, lpips=1)
    assert sorted(requested, key=str) == [
        ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth", True),
        ("owner/weights", "a/model.pt"), ("vgg16.tv_in1k", None), ("vit_small_patch8_224.dino", None)]
    assert_close(last["model"]["embed.weight"], one_process[1]["ema"]["embed.weight"])


def test_warning_of_an_early_discriminator(adversarial, tmp_path, capsys):
    few = ": few images; a discriminator overfits on them, --gan 0 is safer"
    for gan_start, step, warning in [(399.6, 999, few), (400, 1000, "")]:  # an epoch has 2.5 steps
        train(tmp_path / str(step), adversarial, epochs=0.4, gan_start=gan_start)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("discriminator")]
        assert lines == [f"discriminator from step 1, its loss from step {step}{warning}"]
    train(tmp_path / "none", adversarial, epochs=0.4, gan=0)
    assert "discriminator" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Saving, logging


def test_checkpoints_are_saved_at_intervals_both_files_together(settings, tmp_path, monkeypatch):
    saved, save = [], train_decoder.save_checkpoint
    monkeypatch.setattr(train_decoder, "save_checkpoint", lambda files: saved.append(files) or save(files))
    train(tmp_path / "run", settings, save_every=2, epochs=1.9)  # 4.75 steps, rounded to 5
    assert [last["step"] for _, last in map(dict.values, saved)] == [2, 4, 5]
    assert [[path.name for path in files] for files in saved] == 3 * [["decoder.pt", "last.pt"]]


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers of a step


def test_noise_level_is_half_normal():
    """sigma = tau |n|: mean tau sqrt(2 / pi), root mean square tau, median 0.6745 tau; noise / sigma is N(0, 1)."""
    keys = torch.tensor([random_key(0, 0, i) for i in range(4000)])
    noise, uniform = train_decoder.step_randomness(keys, (32, 4, 4), 0.8, torch.Generator())
    sigma = noise.square().mean((1, 2, 3)).sqrt()  # (4000,), each within 3 %
    assert sigma.mean().item() == pytest.approx(0.8 * math.sqrt(2 / math.pi), rel=0.03)
    assert sigma.square().mean().sqrt().item() == pytest.approx(0.8, rel=0.03)
    assert sigma.median().item() == pytest.approx(0.6745 * 0.8, rel=0.05)
    assert (sigma > 1.6).float().mean().item() == pytest.approx(0.0455, abs=0.01)  # beyond two standard deviations
    unit = noise / sigma[:, None, None, None]
    assert unit.mean().item() == pytest.approx(0, abs=0.01)
    assert unit.pow(4).mean().item() == pytest.approx(3, abs=0.05)
    assert uniform.shape == (3, 4000, 5) and 0 <= uniform.min() and uniform.max() < 1
    assert (uniform.mean(1) - 0.5).abs().max() < 0.02
    correlation = torch.corrcoef(torch.cat([*uniform.unbind(0), sigma[:, None], noise[:, :2, 0, 0]], 1).T)
    assert (correlation - torch.eye(18)).abs().max() < 0.08
    assert train_decoder.step_randomness(keys[:2], (2, 2, 2), 0.0, torch.Generator())[0].abs().max() == 0


def test_random_numbers_of_an_image_do_not_depend_on_its_batch():
    keys = torch.tensor([5, 6, 7])
    noise, uniform = train_decoder.step_randomness(keys, (3, 2, 2), 0.8, torch.Generator())
    for i in range(3):
        alone = train_decoder.step_randomness(keys[i : i + 1], (3, 2, 2), 0.8, torch.Generator().manual_seed(i))
        assert torch.equal(alone[0][0], noise[i]) and torch.equal(alone[1][:, 0], uniform[:, i])


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to use the script


def test_demo_with_all_losses_enabled_by_flags(full, tmp_path):
    weights = {key: full[key] for key in full if key.endswith("_weights")}
    train(tmp_path / "run", weights, preset="demo", batch=4, epochs=0.002, lpips=1, gan=0.75, disc_start=0.0005,
          gan_start=0.001, warmup=0, log_every=1, device="cpu")
    log = numbers(tmp_path / "run")
    assert len(log) == 4 and all(math.isfinite(value) for row in log for value in row.values())
    assert {"lpips", "gan", "disc"} <= log[-1].keys()
    assert log[-1]["l1"] < log[0]["l1"] and log[-1]["lpips"] < log[0]["lpips"]


def test_decoder_upsampling(settings, tmp_path, monkeypatch):
    """An encoder for 16 pixels, a decoder to 64: the encoder's input is reduced about as by stage 2's ADM crop."""
    seen, given = [], []
    see, encode = timm.models.VisionTransformer.forward_features, Encoder.forward
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features",
                        lambda self, x: seen.append(x / 2 + 0.5) or see(self, x))
    monkeypatch.setattr(Encoder, "forward", lambda self, images: given.append(images) or encode(self, images))
    last = train(tmp_path / "run", settings, data="shapes", size=64, resize=64, encoder_size=16, epochs=1 / 2000,
                 preview_every=1)
    decoder, info = load_decoder(tmp_path / "run/decoder.pt")
    assert (decoder.config["grid"], decoder.config["patch"], info["encoder"]["image_size"]) == (2, 32, 16)
    assert decoder(torch.zeros(1, 128, 2, 2)).shape == (1, 3, 64, 64) and last["settings"]["resize"] == 64
    assert [len(images) for images in given] == [4, 8]  # one step, previews
    for larger, reduced in zip(torch.cat(given), torch.cat(seen), strict=True):
        assert larger.shape == (3, 64, 64)
        image = Image.fromarray((larger.permute(1, 2, 0) * 255).round().byte().numpy())
        crop = torch.from_numpy(np.array(center_crop(image, 16))).permute(2, 0, 1) / 255
        assert (reduced - crop).abs().max() < 0.15 and (reduced - crop).abs().mean() < 0.012  # twice that if not smooth


def test_one_step_at_the_width_of_the_paper(adversarial, photos, tmp_path, monkeypatch):
    """C = 768 from DINOv2-B, ViT-B, 256 pixels, with the discriminator; both ViTs have one block."""
    monkeypatch.setitem(SIZES, "ViT-B", SIZES["ViT-B"] | dict(depth=1))
    monkeypatch.setattr(train_decoder, "Encoder", functools.partial(Encoder, depth=1))
    vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", depth=1, num_classes=0)
    torch.save({key: value.half() for key, value in vit.state_dict().items()}, tmp_path / "encoder.pt")
    out = tmp_path / "run"
    last = train(out, dict(
        encoder_weights=tmp_path / "encoder.pt", dino_weights=adversarial["dino_weights"], lpips=0, data=photos,
        model="ViT-B", epochs=0.1, batch=1, micro_batch=1, disc_start=0, gan_start=0, warmup=0, workers=0,
        device="cpu", log_every=1, preview_every=0))
    (row,) = numbers(out)
    assert last["step"] == 1 and all(math.isfinite(row[name]) for name in ("l1", "gan", "gan_weight", "disc"))
    assert all(state["exp_avg"].abs().max() > 0 for state in last["optimizer"]["state"].values())
    decoder, info = load_decoder(out / "decoder.pt")
    assert [decoder.config[key] for key in ("latent_dim", "grid", "patch", "width")] == [768, 16, 16, 768]
    assert sum(value.numel() for value in last["model"].values()) == 8_271_360  # 86.2 M with all twelve blocks
    assert info["encoder"]["name"] == "dinov2-b"
