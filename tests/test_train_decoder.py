"""train_decoder.py as it is run: main(argv) in this process and in two, on tiny models with random weights."""

import copy
import functools
import math
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (ROOT, assert_close, assert_identical, finish, make_images, published_decoder, read, rows,
                      save_tiny_dino, start_ranks)
from PIL import Image

import decoder as decoders
import encoder as encoders
import train_decoder
from decoder import SIZES, Decoder, load_decoder
from encoder import Encoder, ImageFolder, Shapes, center_crop, random_key
from fid import LPIPS


def smooth(images):
    """In place of `quantize`, whose steps a rounding error may cross; tests/test_adversarial.py tests it alone."""
    return 0.9 * images.clamp(-1, 1)


@pytest.fixture(scope="module", autouse=True)
def parts():
    """The discriminator's fakes are not rounded to 8 bits; LPIPS, which is frozen, is read once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_decoder, "quantize", smooth)
        patch.setattr(train_decoder, "LPIPS", functools.cache(LPIPS))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten images, larger than what is trained on: with batches of 4, two and a half steps are an epoch."""
    return make_images(tmp_path_factory.mktemp("data") / "photos", 10, size=(56, 48))


@pytest.fixture(scope="module")
def settings(photos):
    """L1 alone: the demo's models at 16 pixels on the photos, five steps of four images, the first two to warm up."""
    return dict(preset="demo", data=photos, size=16, resize=24, batch=4, micro_batch=4, epochs=2, warmup=0.8, lr=1e-3,
                lr_end=3e-5, ema=0.25, workers=0, device="cpu", log_every=1, preview_every=0, save_every=99)


@pytest.fixture(scope="module")
def adversarial(settings, tmp_path_factory):
    """With the discriminator: it trains from step 1 on, its loss reaches the decoder from step 2 on."""
    dino = save_tiny_dino(tmp_path_factory.mktemp("dino") / "dino.pt")
    return settings | dict(gan=0.75, disc_start=0.4, gan_start=0.8, tau=0.8, dino_weights=dino)


@pytest.fixture(scope="module")
def full(adversarial, lpips_weights):
    """All three losses."""
    return adversarial | dict(lpips=1, vgg_weights=lpips_weights[0], lpips_weights=lpips_weights[1])


def flags(**values):
    """dict(log_every=1, compile=True, x=None) -> ["--log-every", "1", "--compile"]."""
    argv = []
    for key, value in values.items():
        if value is not None:
            argv += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


def train(out, settings, **changes):
    """Run the script in this process; returns last.pt."""
    train_decoder.main(flags(**settings | changes, out=out))
    return read(out / "last.pt")


def refused(capsys, out, settings, **changes):
    """Run the script, which has to refuse in one line -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(out, settings, **changes)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1, message
    return message


def numbers(out):
    """log.csv as dictionaries of numbers; what is empty is left out."""
    return [{key: float(value) for key, value in row.items() if value} for row in rows(out)]


def relative(a, b, start):
    """How far two models' states are apart, as a share of what moved the second from `start`.

    Without the biases whose gradient is zero but for rounding, which AdamW blows up: those of keys in an attention, and
    of convolutions before a norm.
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


@pytest.fixture(scope="module")
def initial(full):
    """The weights before the first step, of a decoder from a grid of 2 x 2 to 16 pixels: the seed makes them."""
    torch.manual_seed(0)
    heads = train_decoder.Discriminator(full["dino_weights"]).heads
    torch.manual_seed(0)
    decoder = Decoder(128, 2, 8, **SIZES["ViT-tiny"])
    return dict(model=decoder.state_dict(), ema=decoder.state_dict(), discriminator=heads.state_dict())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, full):
    """The full recipe, five steps, in one process: (folder, last.pt)."""
    out = tmp_path_factory.mktemp("full") / "run"
    return out, train(out, full, preview_every=1)


def stop_after(patch, step):
    """Send this process a SIGTERM when the progress bar reaches `step`: training stops with the next step."""

    class Bar(encoders.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(encoders, "tqdm", Bar)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe

RECIPE = dict(
    encoder="dinov2-b", size=256, encoder_size=256, resize=384, model="ViT-XL", tau=0.8, lpips=1.0, gan=0.75,
    disc_start=6.0, gan_start=8.0, epochs=16, batch=512, lr=2e-4, lr_end=2e-5, beta1=0.9, beta2=0.95, warmup=1.0,
    ema=0.9978, precision="tf32", seed=0, init=None, encoder_weights=None, lpips_weights=None, vgg_weights=None,
    dino_weights=None, compile=None, checkpointing=False, workers=None, preview_every=None, save_every=None,
    log_every=None, device="cpu")


@pytest.mark.parametrize("preset, differs", {
    "imagenet256": dict(micro_batch=16),
    "imagenet512": dict(size=512, encoder_size=512, resize=768, micro_batch=4),
}.items())
def test_every_default_equals_the_recipe(preset, differs, tmp_path):
    _, args = train_decoder.parse_args(["--preset", preset, "--data", str(tmp_path), "--device", "cpu"])
    expected = RECIPE | differs | dict(preset=preset, data=str(tmp_path), out=Path(f"runs/{preset}/decoder"))
    assert vars(args) == expected
    if preset == "imagenet256":
        plain = train_decoder.parse_args(["--data", str(tmp_path), "--device", "cpu"])[1]
        assert vars(plain) == vars(args)


def test_sizes_of_the_recipe():
    table = {"ViT-B": (768, 12, 12, 3072), "ViT-L": (1024, 24, 16, 4096), "ViT-XL": (1152, 28, 16, 4096)}
    assert {name: tuple(SIZES[name].values()) for name in table} == table


def test_demo_starts_the_discriminator_within_its_epochs():
    _, args = train_decoder.parse_args(["--preset", "demo", "--gan", "0.75"])
    assert args.disc_start < args.gan_start < args.epochs and args.resize == args.size == 32


def plain_recipe(settings, start, steps):
    """The recipe again, written as simply as possible: losses on one graph, torch's plain AdamW, one batch.

    Returns the decoder's, its average's and the heads' state after each step, and the norms of both gradients.
    """
    encoder = Encoder("random-tiny", 16)
    lpips = train_decoder.LPIPS(settings["vgg_weights"], settings["lpips_weights"])
    discriminator = train_decoder.Discriminator(settings["dino_weights"])
    discriminator.heads.load_state_dict(start["discriminator"])
    decoder = Decoder(128, 2, 8, **SIZES["ViT-tiny"], mean=[0.5] * 3, std=[0.5] * 3)
    decoder.load_state_dict(start["model"])
    average, norms = {}, {}
    adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0, foreach=False)
    optimizer, disc_optimizer = adamw(decoder.parameters()), adamw(discriminator.heads.parameters())
    rates = types.SimpleNamespace(lr=1e-3, lr_end=3e-5, warmup=0.8, epochs=2)
    source = ImageFolder(settings["data"])
    order = [i for epoch in range(3) for i in encoders.epoch_order(10, 0, epoch)]
    states = []
    for step in range(steps):
        positions = range(4 * step, 4 * step + 4)
        keys = [random_key(0, *divmod(position, 10)) for position in positions]
        crops = [encoders.random_crop(source.open(order[position])[0], 24, 16, np.random.default_rng(key))
                 for position, key in zip(positions, keys, strict=True)]
        real = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2) / 255
        noise, uniforms = train_decoder.draw(torch.tensor(keys), (128, 2, 2), 0.8, torch.Generator())
        z = encoder(real)

        fake = decoder(z + noise)
        loss = (fake - real).abs().mean() + lpips(2 * fake - 1, 2 * real - 1).mean()
        if step >= 2:
            gan = -discriminator.eval()(train_decoder.diffaug(2 * fake - 1, uniforms[0])).mean()
            last = decoder.to_pixels.weight
            (g_rec,), (g_gan,) = (torch.autograd.grad(part, last, retain_graph=True) for part in (loss, gan))
            loss = loss + 0.75 * g_rec.norm() / (g_gan.norm() + 1e-6) * gan
        optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step, rates, 2.5)
        decoder.zero_grad()
        loss.backward()
        norms["grad_norm"] = torch.cat([p.grad.flatten() for p in decoder.parameters()]).norm().item()
        optimizer.step()
        decay = min(0.25, step / (9 + step))
        for key, value in decoder.state_dict().items():
            average[key] = decay * average.get(key, 0) + (1 - decay) * value

        if step >= 1:
            with torch.no_grad():
                clean = 0.9 * (2 * decoder(z) - 1).clamp(-1, 1)
            discriminator.train()
            # both kinds in one batch, since each forward is one power iteration of the spectral norm
            augmented = [train_decoder.diffaug(x, u) for x, u in ((2 * real - 1, uniforms[2]), (clean, uniforms[1]))]
            on_real, on_fake = discriminator(torch.cat(augmented)).chunk(2)
            disc_optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step - 1, rates, 2.5)
            discriminator.heads.zero_grad()
            (0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())).backward()
            norms["disc_norm"] = torch.cat([p.grad.flatten() for p in discriminator.heads.parameters()]).norm().item()
            disc_optimizer.step()
        heads = {key: value.clone() for key, value in discriminator.heads.state_dict().items()}
        states.append(dict(model={key: value.clone() for key, value in decoder.state_dict().items()},
                           ema=dict(average), discriminator=heads, norms=dict(norms)))
    return states


def assert_same_weights(a, b, start):
    for part in ("model", "ema", "discriminator"):
        assert relative(a[part], b[part], start[part]) < 1e-3, part


def test_full_recipe_equals_it_written_plainly(one_process, full, initial):
    """Five steps: L1 + LPIPS alone, then with the discriminator training, then with its loss on the decoder."""
    out, last = one_process
    assert last["step"] == 5 and last["skipped"] == 0
    states = plain_recipe(full, initial, 5)
    assert_same_weights(last, states[-1], initial)
    for row, state in zip(numbers(out), states, strict=True):
        assert {name: row[name] for name in state["norms"]} == pytest.approx(state["norms"], rel=1e-3)


def test_log_of_the_full_recipe(one_process):
    """All losses finite, each from its start on; both learning rates by the closed form, above 0 from the first on."""
    log = numbers(one_process[0])
    assert [(row["step"], row["epoch"]) for row in log] == [(1, 0.4), (2, 0.8), (3, 1.2), (4, 1.6), (5, 2.0)]
    assert all(math.isfinite(value) for row in log for value in row.values())
    cosine = [3e-5 + (1e-3 - 3e-5) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [row["lr"] for row in log] == pytest.approx([5e-4, 1e-3, *cosine], rel=1e-3)
    assert [row["disc_lr"] for row in log[1:]] == pytest.approx([5e-4, 1e-3, *cosine[:2]], rel=1e-3)
    for step, row in enumerate(log):
        assert {"l1", "lpips", "grad_norm", "images_per_s", "skipped"} <= row.keys() and "memory_gb" not in row
        assert all((name in row) == (step >= 1) for name in ("disc", "real", "fake", "disc_norm", "disc_lr"))
        assert all((name in row) == (step >= 2) for name in ("gan", "gan_weight"))


def test_previews_show_originals_above_reconstructions(one_process, photos):
    out, _ = one_process
    assert sorted(path.name for path in out.glob("*.png")) == [f"preview-{e}.png" for e in ("0.80", "2.00")]
    picture = np.asarray(Image.open(out / "preview-2.00.png"))
    assert picture.shape == (16 + 2 + 16, 8 * 18 - 2, 3)
    source, decoder = ImageFolder(photos), load_decoder(out / "decoder.pt")[0]
    for column, i in enumerate(np.random.default_rng(0).permutation(10)[:8]):
        image = np.array(encoders.random_crop(source.open(i)[0], 24, 16, np.random.default_rng(i)))
        left = 18 * column
        assert np.array_equal(picture[:16, left : left + 16], image)
        z = Encoder("random-tiny", 16)(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        decoded = decoders.to_uint8(decoder(z))[0].numpy()
        assert np.abs(picture[18:, left : left + 16].astype(int) - decoded).max() <= 1


def test_checkpoints_hold_what_is_needed(one_process):
    out, last = one_process
    decoder, info = load_decoder(out / "decoder.pt")
    assert all(torch.equal(value, last["ema"][key]) for key, value in decoder.state_dict().items())
    assert info["encoder"]["name"] == "random-tiny" and info["encoder"]["mean"] == [0.5] * 3
    assert (info["tau"], info["epoch"]) == (0.8, 2.0)
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, accumulation, precision, compilation

TWO = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import torch.distributed as dist
import conftest, encoder, train_decoder

rank, out = int(os.environ["RANK"]), Path({out!r})
train_decoder.DINO.update(conftest.TINY_DINO)
form = dist.init_process_group  # one group for all that follows
dist.init_process_group = lambda *how, **more: dist.is_initialized() or form(*how, **more)
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None

dist.init_process_group("gloo")
golden = dict()
for file in sorted((conftest.ROOT / "tests/golden").glob("adaptive_weight*.npz")):
    ddp = lambda model: encoder.distribute(model, torch.device("cpu"))
    golden[file.name] = conftest.adaptive_weight_step(file, rank, 2, ddp)
torch.save(golden, out / f"golden-{{rank}}.pt")

train_decoder.quantize = lambda images: 0.9 * images.clamp(-1, 1)
train_decoder.main({whole!r})

class Bar(encoder.tqdm):
    steps = 0
    def update(self, n=1):
        super().update(n)
        self.steps += 1
        if self.steps == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

encoder.tqdm = Bar
train_decoder.main({parts!r})
leave()
"""


@pytest.fixture(scope="module")
def two_processes(full, settings, tmp_path_factory):
    """Two processes do all that the tests below look at -> (folder, what each of them printed)."""
    out = tmp_path_factory.mktemp("two")
    script = out / "two.py"
    whole = flags(**full, out=out / "whole")
    parts = flags(**settings | dict(micro_batch=1, epochs=4), out=out / "parts")
    script.write_text(TWO.format(root=str(ROOT), out=str(out), whole=whole, parts=parts))
    return out, finish(*start_ranks(script))


def test_golden_adaptive_weight_over_two_processes(two_processes):
    """Each has half of the images; both have the weight and the gradients of one process with all."""
    one, two = (read(two_processes[0] / f"golden-{rank}.pt") for rank in (0, 1))
    assert one
    for name, (ours, recorded) in one.items():
        for key in recorded:
            assert_close(ours[key], recorded[key], 1e-5)
            assert torch.equal(ours[key], two[name][0][key]), key


def test_two_processes_end_with_the_weights_of_one(one_process, two_processes, initial):
    """The full recipe, half the batch each: every forward that trains must go through DDP."""
    out, printed = two_processes
    assert [words.count("2 processes x 1 x 2") for words in printed] == [1, 0]  # rank 0 speaks
    two = read(out / "whole/last.pt")
    assert two["step"] == 5
    assert_same_weights(two, one_process[1], initial)
    for a, b in zip(numbers(out / "whole"), numbers(one_process[0]), strict=True):
        for name in ("l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm", "disc_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2, abs=1e-4), (name, a, b)


def test_a_signal_to_one_process_stops_all_and_accumulation_equals_the_batch(
        two_processes, settings, initial, tmp_path, monkeypatch):
    """Rank 1 alone is told to stop in step 3. Micro-batches of one image, twice in each process."""
    out, printed = two_processes
    assert printed[0].count("stopped and saved at step 3") == 1 and "2 processes x 2 x 1" in printed[0]
    two = read(out / "parts/last.pt")
    stop_after(monkeypatch, 2)
    one = train(tmp_path / "one", settings, epochs=4)
    assert one["step"] == two["step"] == 3
    for part in ("model", "ema"):
        assert relative(two[part], one[part], initial[part]) < 1e-3
    for a, b in zip(numbers(out / "parts"), numbers(tmp_path / "one"), strict=True):
        assert a["l1"] == pytest.approx(b["l1"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_accumulation_equals_the_whole_batch(adversarial, initial, tmp_path, monkeypatch):
    """Of five images by ones and by twos: 2, 2, 1. The adversarial loss, whose weight is each micro-batch's, is off;
    the discriminator trains without the power iteration that is part of each of its forwards."""
    nn_train = torch.nn.Module.train
    monkeypatch.setattr(train_decoder.Discriminator, "train", lambda self, mode=True: nn_train(self, False))
    settings = adversarial | dict(batch=5, micro_batch=5, epochs=1.5, gan_start=9)
    whole = train(tmp_path / "whole", settings)
    assert whole["step"] == 3
    for size in (1, 2):
        parts = train(tmp_path / f"parts{size}", settings, micro_batch=size)
        assert_same_weights(parts, whole, initial)


def test_checkpointing_changes_nothing(settings, tmp_path, monkeypatch):
    calls = []
    real = decoders.checkpoint
    monkeypatch.setattr(decoders, "checkpoint", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    plain = train(tmp_path / "plain", settings)
    assert not calls
    again = train(tmp_path / "again", settings, checkpointing=True)
    assert len(calls) == 5 * 3  # steps, blocks
    assert_identical(again["model"], plain["model"])


def test_bf16_is_of_the_networks_alone_and_each_image_is_encoded_once(full, tmp_path, monkeypatch):
    """All four run under autocast; what they return, the discriminator's heads and its loss are float32."""
    seen = {}

    def watch(owner, method="forward"):
        works = getattr(owner, method)

        def watched(self, *inputs, **options):
            output = works(self, *inputs, **options)
            first = output[0] if isinstance(output, tuple) else output
            seen.setdefault(owner.__name__, []).append(
                (len(inputs[0]), torch.is_autocast_enabled("cpu"), first.requires_grad))
            assert first.dtype == inputs[0].dtype == torch.float32, owner
            return output

        monkeypatch.setattr(owner, method, watched)

    networks = (Encoder, Decoder, train_decoder.Discriminator)
    for network in (*networks, train_decoder.DiscriminatorHead):
        watch(network)
    products = {}
    for name, product in (("linear", F.linear), ("conv2d", F.conv2d)):  # the matrix products inside
        def watched(x, *rest, name=name, product=product):
            products.setdefault(name, set()).add(str(product(x, *rest).dtype))
            return product(x, *rest)
        monkeypatch.setattr(F, name, watched)

    def hinge(*logits):
        assert not torch.is_autocast_enabled("cpu") and all(x.dtype == torch.float32 for x in logits)
        return hinge_loss(*logits)

    hinge_loss = train_decoder.hinge_loss
    monkeypatch.setattr(train_decoder, "hinge_loss", hinge)
    in_lpips = []
    watched_lpips = train_decoder.LPIPS(full["vgg_weights"], full["lpips_weights"])
    hook = watched_lpips.features[0].register_forward_hook(lambda layer, _, output: in_lpips.append(output.dtype))
    last = train(tmp_path / "run", full, precision="bf16", epochs=1.2, micro_batch=2)
    hook.remove()
    assert last["step"] == 3 and last["skipped"] == 0
    assert products["linear"] == {"torch.bfloat16"} and set(in_lpips) == {torch.bfloat16}
    assert seen["Encoder"] == [(8, True, False)] + 6 * [(2, True, False)]  # previews; 3 steps of 2 micro-batches
    assert len(in_lpips) == 6 * 2
    decoded, judged = (2, True, True), (2, True, True)
    fresh, trained = (2, True, False), (4, True, True)  # the discriminator's fakes; reals and fakes in one forward
    assert seen["Decoder"] == [decoded] * 2 + ([decoded] * 2 + [fresh] * 2) * 2
    assert seen["Discriminator"] == [trained] * 2 + [judged] * 2 + [trained] * 2
    assert {autocast for _, autocast, _ in seen["DiscriminatorHead"]} == {False}


def test_lpips_under_autocast(lpips_weights):
    """The convolutions of VGG16 alone run in bfloat16: norms, differences and heads are float32."""
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
    """As --compile runs it, with the discriminator, but for the generated code."""
    compiled, compile_module = [], torch.nn.Module.compile
    how = dict(backend=lambda graph, inputs: graph, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **more: compiled.append(self) or compile_module(self, **how, **more))
    last = train(tmp_path / "run", full, compile=True)
    assert len(compiled) == 3 + 3 + 12  # the blocks of encoder, decoder and DINO
    assert_same_weights(last, one_process[1], initial)


# ---------------------------------------------------------------------------------------------------------------------
# The moving average, --init, the start line


def test_after_the_first_update_the_average_is_the_weights(settings, initial, tmp_path):
    last = train(tmp_path / "run", settings, epochs=0.4, ema=0.9978)
    assert_identical(last["ema"], last["model"])
    assert not torch.equal(last["model"]["embed.weight"], initial["model"]["embed.weight"])


def test_average_of_a_short_run_is_as_good_as_its_weights(tmp_path):
    """100 steps of the demo with the paper's decay, under which the initial weights would keep a share of 81 %."""
    last = train(tmp_path / "run", dict(preset="demo", batch=4, epochs=0.05, warmup=0.005, ema=0.9978, device="cpu"))
    assert last["step"] == 100
    source, encoder = Shapes(8000, 32), Encoder("random-tiny", 32)
    images = np.stack([np.array(source.open(i)[0]) for i in range(7000, 7032)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    l1 = {}
    for part in ("model", "ema"):
        model = Decoder(128, 4, 8, **SIZES["ViT-tiny"], mean=[0.5] * 3, std=[0.5] * 3)
        model.load_state_dict(last[part])
        with torch.no_grad():
            l1[part] = (model(encoder(images)) - images).abs().mean().item()
    print(l1)
    assert l1["model"] < 0.1 and l1["ema"] < 1.1 * l1["model"], l1


@pytest.fixture(scope="module", params=["ours", "published"])
def given(one_process, request, tmp_path_factory):
    """A decoder in a file for --init."""
    path = tmp_path_factory.mktemp("given") / "decoder.pt"
    content = read(one_process[0] / "decoder.pt")
    if request.param == "published":
        content = published_decoder(load_decoder(one_process[0] / "decoder.pt")[0])
    torch.save(content, path)
    return path


def test_init_starts_from_the_weights_of_a_file(given, one_process, settings, tmp_path):
    last = train(tmp_path / "run", settings, init=given, epochs=0.4, lr=1e-30, lr_end=0)
    for part in ("model", "ema"):
        for key, value in one_process[1]["ema"].items():
            torch.testing.assert_close(last[part][key], value, rtol=0, atol=1e-20)


def test_a_resumed_run_needs_the_file_of_init_no_more(one_process, settings, tmp_path):
    path = tmp_path / "init.pt"
    path.write_bytes((one_process[0] / "decoder.pt").read_bytes())
    whole = train(tmp_path / "whole", settings, init=path)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert train(tmp_path / "parts", settings, init=path)["step"] == 3
    path.unlink()
    parts = train(tmp_path / "parts", settings, init=path)
    assert_identical({**parts, "args": 0}, {**whole, "args": 0})


@pytest.mark.parametrize("changes, said", [
    (dict(size=32, resize=32), "is another model: grid 2 instead of 4; choose --model, --size, ... to match"),
    (dict(size=32, resize=32, encoder_size=16), "patch 8 instead of 16"),
    (dict(model="ViT-deep"), "depth 3 instead of 1"),
])
def test_init_refuses_another_decoder(changes, said, given, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "ViT-deep", SIZES["ViT-tiny"] | dict(depth=1))
    monkeypatch.setattr(train_decoder, "RECIPE", [
        row if row[0] != "--model" else (row[0], tuple(SIZES), *row[2:]) for row in train_decoder.RECIPE])
    message = refused(capsys, tmp_path / "run", settings, init=given, **changes)
    assert f"--init {given}" in message and said in message
    assert not (tmp_path / "run").exists()


def test_init_refuses_the_decoder_of_another_encoder_and_what_is_none(one_process, settings, tmp_path, capsys):
    content = read(one_process[0] / "decoder.pt")
    content["encoder"]["name"] = "mae-b"
    torch.save(content, tmp_path / "other.pt")
    message = refused(capsys, tmp_path / "run", settings, init=tmp_path / "other.pt")
    assert f"--init {tmp_path}/other.pt is for latents of mae-b: choose --encoder to match" in message
    assert "No such file" in refused(capsys, tmp_path / "run", settings, init=tmp_path / "absent.pt")
    assert "as a decoder" in refused(capsys, tmp_path / "run", settings, init=one_process[0] / "log.csv")


@pytest.mark.parametrize("gan_start, warns", [(399.6, True), (400, False), (None, False)])  # of 2.5 steps an epoch
def test_start_line_warns_of_a_discriminator_that_starts_early(gan_start, warns, adversarial, tmp_path, capsys):
    changes = dict(gan=0) if gan_start is None else dict(gan_start=gan_start)
    train(tmp_path / "run", adversarial, epochs=0.4, **changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("discriminator")]
    if gan_start is None:
        assert not lines
        return
    few = ": few images; a discriminator overfits on them, --gan 0 is safer" if warns else ""
    assert lines == [f"discriminator from step 1, its loss from step {round(2.5 * gan_start)}{few}"]


# ---------------------------------------------------------------------------------------------------------------------
# Steps whose gradient is not finite


def make_bad(patch, part, steps):
    """Make the gradient of `part` not finite at these steps; the discriminator trains from the first step on."""
    name, calls = dict(decoder="draw", discriminator="quantize")[part], []
    works = getattr(train_decoder, name)

    def fails(*inputs):
        calls.append(1)
        result = works(*inputs)
        if len(calls) - 1 not in steps:
            return result
        return (result[0] * math.nan, result[1]) if part == "decoder" else result * math.nan

    patch.setattr(train_decoder, name, fails)


def of_decoder(last):
    return dict(model=last["model"], ema=last["ema"], moments=last["optimizer"]["state"])


def of_discriminator(last):
    """What is learned; the vectors of the spectral norms move with every forward."""
    heads = {key: value for key, value in last["discriminator"].items() if not key.endswith(("._u", "._v"))}
    return dict(heads=heads, moments=last["disc_optimizer"]["state"])


@pytest.mark.parametrize("part", ["decoder", "discriminator"])
def test_a_bad_gradient_of_one_model_leaves_the_other_alone(part, adversarial, tmp_path, monkeypatch):
    make_bad(monkeypatch, part, {3})
    saved = {}
    save = train_decoder.save_checkpoint

    def keep(files):
        save(files)
        content = files[tmp_path / "run/last.pt"]
        saved[content["step"]] = copy.deepcopy(content)

    monkeypatch.setattr(train_decoder, "save_checkpoint", keep)
    train(tmp_path / "run", adversarial, save_every=0.4, disc_start=0, gan_start=0)
    assert [saved[step]["skipped"] for step in range(1, 6)] == [0, 0, 0, 1, 1]
    mine, other = (of_decoder, of_discriminator) if part == "decoder" else (of_discriminator, of_decoder)
    assert_identical(mine(saved[4]), mine(saved[3]))
    for state, before, after in ((other, 3, 4), (other, 4, 5), (mine, 2, 3), (mine, 4, 5)):
        with pytest.raises(AssertionError, match="differs"):
            assert_identical(state(saved[before]), state(saved[after]))
    log = numbers(tmp_path / "run")
    assert [row["skipped"] for row in log] == [0, 0, 0, 1, 1]
    assert ("l1" in log[3], "disc" in log[3]) == (part != "decoder", part != "discriminator")
    assert all(math.isfinite(value) for row in log for value in row.values())
    assert "gan" in log[-1] and "lpips" not in log[-1]


def test_twenty_bad_gradients_in_a_row_end_the_run(settings, initial, tmp_path, monkeypatch, capsys):
    """A good one in between starts the count again."""
    make_bad(monkeypatch, "decoder", {step for step in range(99) if step != 2})
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", settings, epochs=99, lr=1e-30, lr_end=0)
    message = end.value.code  # Python prints it and exits with 1
    assert message.startswith("stopped at step 23: the gradient was not finite 20 times in a row; ")
    assert "\n" not in message and f"{tmp_path}/run/last.pt" in message
    last = read(tmp_path / "run/last.pt")
    assert (last["step"], last["skipped"], last["optimizer"]["state"][0]["step"]) == (23, 22, 1)
    for part in ("model", "ema"):
        for key, value in last[part].items():
            torch.testing.assert_close(value, initial[part][key], rtol=0, atol=1e-20)


# ---------------------------------------------------------------------------------------------------------------------
# Saving, logging


def test_checkpoints_come_at_intervals_both_files_together(settings, tmp_path, monkeypatch):
    saved, save = [], train_decoder.save_checkpoint
    monkeypatch.setattr(train_decoder, "save_checkpoint", lambda files: saved.append(files) or save(files))
    train(tmp_path / "run", settings, save_every=0.8)
    assert [last["step"] for _, last in map(dict.values, saved)] == [2, 4, 5]
    assert [[path.name for path in files] for files in saved] == 3 * [["decoder.pt", "last.pt"]]


def test_a_row_of_the_log_averages_its_steps(settings, tmp_path):
    train(tmp_path / "each", settings)
    train(tmp_path / "two", settings, log_every=2)
    each, two = numbers(tmp_path / "each"), numbers(tmp_path / "two")
    assert [row["step"] for row in two] == [2, 4, 5]
    assert two[1]["l1"] == pytest.approx((each[2]["l1"] + each[3]["l1"]) / 2, abs=2e-5)
    assert two[2]["l1"] == each[4]["l1"]


# ---------------------------------------------------------------------------------------------------------------------
# What training draws


def test_noise_level_is_half_normal():
    """sigma = tau |n|: mean tau sqrt(2 / pi), root mean square tau, median 0.6745 tau; noise / sigma is N(0, 1)."""
    keys = torch.tensor([random_key(0, 0, i) for i in range(4000)])
    noise, uniforms = train_decoder.draw(keys, (32, 4, 4), 0.8, torch.Generator())
    sigma = noise.square().mean((1, 2, 3)).sqrt()  # (4000,), each to 3 %
    assert sigma.mean().item() == pytest.approx(0.8 * math.sqrt(2 / math.pi), rel=0.03)
    assert sigma.square().mean().sqrt().item() == pytest.approx(0.8, rel=0.03)
    assert sigma.median().item() == pytest.approx(0.6745 * 0.8, rel=0.05)
    assert (sigma > 1.6).float().mean().item() == pytest.approx(0.0455, abs=0.01)  # beyond two standard deviations
    unit = noise / sigma[:, None, None, None]
    assert unit.mean().item() == pytest.approx(0, abs=0.01)
    assert unit.pow(4).mean().item() == pytest.approx(3, abs=0.05)
    assert uniforms.shape == (3, 4000, 5) and 0 <= uniforms.min() and uniforms.max() < 1
    assert (uniforms.mean(1) - 0.5).abs().max() < 0.02
    correlation = torch.corrcoef(torch.cat([*uniforms.unbind(0), sigma[:, None], noise[:, :2, 0, 0]], 1).T)
    assert (correlation - torch.eye(18)).abs().max() < 0.08
    assert train_decoder.draw(keys[:2], (2, 2, 2), 0.0, torch.Generator())[0].abs().max() == 0


def test_draws_of_an_image_do_not_depend_on_its_batch():
    keys = torch.tensor([5, 6, 7])
    noise, uniforms = train_decoder.draw(keys, (3, 2, 2), 0.8, torch.Generator())
    for i in range(3):
        alone = train_decoder.draw(keys[i : i + 1], (3, 2, 2), 0.8, torch.Generator().manual_seed(i))
        assert torch.equal(alone[0][0], noise[i]) and torch.equal(alone[1][:, 0], uniforms[:, i])


# ---------------------------------------------------------------------------------------------------------------------
# Ways to use it


def test_demo_with_all_losses_switched_on_by_flags(full, tmp_path):
    weights = {key: full[key] for key in full if key.endswith("_weights")}
    train(tmp_path / "run", weights, preset="demo", batch=4, epochs=0.002, lpips=1, gan=0.75, disc_start=0.0005,
          gan_start=0.001, warmup=0, log_every=1, device="cpu")
    log = numbers(tmp_path / "run")
    assert len(log) == 4 and all(math.isfinite(value) for row in log for value in row.values())
    assert log[-1]["skipped"] == 0 and {"lpips", "gan", "disc"} <= log[-1].keys()
    assert log[-1]["l1"] < log[0]["l1"] and log[-1]["lpips"] < log[0]["lpips"]


def test_decoder_upsampling(settings, tmp_path, monkeypatch):
    """A 16-pixel encoder and a decoder to 64: the encoder sees the larger image reduced as stage 2's ADM crop does."""
    seen, given = [], []
    see, encode = timm.models.VisionTransformer.forward_features, Encoder.forward
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features",
                        lambda self, x: seen.append(x / 2 + 0.5) or see(self, x))
    monkeypatch.setattr(Encoder, "forward", lambda self, images: given.append(images) or encode(self, images))
    last = train(tmp_path / "run", settings, data="shapes", size=64, resize=64, encoder_size=16, epochs=1 / 2000)
    decoder, info = load_decoder(tmp_path / "run/decoder.pt")
    assert (decoder.config["grid"], decoder.config["patch"], info["encoder"]["image_size"]) == (2, 32, 16)
    assert decoder(torch.zeros(1, 128, 2, 2)).shape == (1, 3, 64, 64) and last["args"]["resize"] == 64
    assert [len(images) for images in given] == [8, 4]  # previews and one step
    for larger, reduced in zip(torch.cat(given), torch.cat(seen), strict=True):
        assert larger.shape == (3, 64, 64)
        image = Image.fromarray((larger.permute(1, 2, 0) * 255).round().byte().numpy())
        crop = torch.from_numpy(np.array(center_crop(image, 16))).permute(2, 0, 1) / 255
        assert (reduced - crop).abs().max() < 0.15 and (reduced - crop).abs().mean() < 0.012  # twice that if not smooth


def test_one_step_at_the_width_of_the_paper(adversarial, photos, tmp_path, monkeypatch):
    """C = 768 from DINOv2-B, ViT-B, 256 pixels, with the discriminator; both ViTs cut to one block."""
    monkeypatch.setitem(SIZES, "ViT-B", SIZES["ViT-B"] | dict(depth=1))
    monkeypatch.setattr(train_decoder, "Encoder", functools.partial(Encoder, depth=1))
    vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", depth=1, num_classes=0)
    torch.save({key: value.half() for key, value in vit.state_dict().items()}, tmp_path / "encoder.pt")
    out = tmp_path / "run"
    train_decoder.main(flags(
        encoder_weights=tmp_path / "encoder.pt", dino_weights=adversarial["dino_weights"], lpips=0, data=photos,
        model="ViT-B", epochs=0.1, batch=1, micro_batch=1, disc_start=0, gan_start=0, warmup=0, workers=0,
        device="cpu", log_every=1, preview_every=0, out=out))
    (row,), last = numbers(out), read(out / "last.pt")
    assert last["step"] == 1 and last["skipped"] == 0
    assert all(math.isfinite(row[name]) for name in ("l1", "gan", "gan_weight", "disc"))
    assert all(state["exp_avg"].abs().max() > 0 for state in last["optimizer"]["state"].values())
    decoder, info = load_decoder(out / "decoder.pt")
    assert [decoder.config[key] for key in ("latent_dim", "grid", "patch", "width")] == [768, 16, 16, 768]
    assert sum(value.numel() for value in last["model"].values()) == 8_271_360  # 86.2 M with all twelve blocks
    assert info["encoder"]["name"] == "dinov2-b"
