"""train_decoder.py as it is run: main(argv) in this process and under torchrun, on tiny models with random weights."""

import csv
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_losses import save_tiny_dino

import decoder as decoders
import encoder as encoders
import fid
import sample
import train_decoder


def save_images(folder, count, seed=0, size=(56, 48)):
    """Smooth random PNG files, larger than what is trained on."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        coarse.resize(size, Image.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Ten images: with batches of 4, two and a half steps are an epoch."""
    return save_images(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files for --vgg-weights (the convolutions of VGG16 at their full size), --lpips-weights and --dino-weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vgg = {}
    for key, shape in json.loads((ROOT / "tests/golden/vgg16_state_shapes.json").read_text()).items():
        if key.startswith("features."):
            scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
            vgg[key] = scale * torch.randn(shape)
    torch.save(vgg, folder / "vgg.pt")
    channels = fid.LPIPS.layers.values()
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}, folder / "heads.pt")
    save_tiny_dino(folder / "dino.pt")
    names = dict(vgg_weights="vgg.pt", lpips_weights="heads.pt", dino_weights="dino.pt")
    return {flag: folder / name for flag, name in names.items()}


def flags(**values):
    """dict(log_every=1, compile=True, x=None) -> ["--log-every", "1", "--compile"]."""
    argv = []
    for key, value in values.items():
        if value is not None:
            argv += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


@pytest.fixture(scope="session")
def settings(photos):
    """L1 alone: the demo's models at 16 pixels on the photos, five steps of four images, the first to warm up."""
    return dict(preset="demo", data=photos, size=16, batch=4, micro_batch=4, epochs=2, warmup=0.4, lr=1e-3, lr_end=3e-5,
                ema=0.99, workers=0, device="cpu", log_every=1, preview_every=0, save_every=99)  # fmt: skip


@pytest.fixture(scope="session")
def full(settings, weights):
    """All three losses on: the discriminator trains from step 1, its loss reaches the decoder from step 2."""
    return settings | weights | dict(lpips=1, gan=0.75, disc_start=0.4, gan_start=0.8, tau=0.8)


def train(out, settings, **changes):
    """Run the script in this process; returns last.pt."""
    train_decoder.main(flags(**settings | changes, out=out))
    return torch.load(out / "last.pt", weights_only=True)


def rows(out):
    """log.csv as dictionaries of numbers; what is empty is left out."""
    with open(out / "log.csv") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def tensors(content, name=""):
    """Every tensor of a nested checkpoint by its path."""
    if torch.is_tensor(content):
        return {name: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {key: value for part, inner in items for key, value in tensors(inner, f"{name}.{part}").items()}


def assert_identical(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 40
    for key in a:
        assert torch.equal(a[key], b[key]), key


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


@pytest.fixture(scope="session")
def initial(tmp_path_factory, full):
    """The weights before the first step: a run of one step, whose learning rate is zero."""
    return train(tmp_path_factory.mktemp("initial") / "run", full, epochs=0.4, lpips=0)


@pytest.fixture(scope="session")
def one_process(tmp_path_factory, full):
    """The full recipe, five steps, in one process: (folder, last.pt)."""
    out = tmp_path_factory.mktemp("full") / "run"
    return out, train(out, full, preview_every=1)


def stop_after(monkeypatch, step):
    """Send this process a SIGTERM when the progress bar reaches `step`: training stops with the next step."""

    class Bar(train_decoder.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_decoder, "tqdm", Bar)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe

RECIPE = dict(
    encoder="dinov2-b", size=256, encoder_size=256, resize=384, model="ViT-XL", tau=0.8, lpips=1.0, gan=0.75,
    disc_start=6.0, gan_start=8.0, epochs=16, batch=512, lr=2e-4, lr_end=2e-5, beta1=0.9, beta2=0.95, warmup=1.0,
    ema=0.9978, precision="tf32", seed=0, encoder_weights=None, lpips_weights=None, vgg_weights=None,
    dino_weights=None, compile=None, checkpointing=False, workers=None, preview_every=1.0, save_every=1.0,
    log_every=100, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("preset, differs", {
    "imagenet256": dict(micro_batch=16),
    "imagenet512": dict(size=512, encoder_size=512, resize=768, micro_batch=4),
}.items())  # fmt: skip
def test_every_default_equals_the_recipe(preset, differs, tmp_path):
    _, args = train_decoder.parse_args(["--preset", preset, "--data", str(tmp_path), "--device", "cpu"])
    expected = RECIPE | differs | dict(preset=preset, data=str(tmp_path), out=ROOT.__class__(f"runs/{preset}/decoder"))
    assert vars(args) == expected
    if preset == "imagenet256":
        plain = train_decoder.parse_args(["--data", str(tmp_path), "--device", "cpu"])[1]
        assert vars(plain) == vars(args)


def test_sizes_of_the_recipe():
    table = {"ViT-B": (768, 12, 12, 3072), "ViT-L": (1024, 24, 16, 4096), "ViT-XL": (1152, 28, 16, 4096)}
    assert {name: tuple(decoders.SIZES[name].values()) for name in table} == table


def plain_recipe(settings, start, steps):
    """The recipe again, written as simply as possible: losses on one graph, torch's plain AdamW, one batch.

    Returns the decoder's, its average's and the heads' state after each step.
    """
    encoder = encoders.Encoder("random-tiny", 16)
    lpips = fid.LPIPS(settings["vgg_weights"], settings["lpips_weights"])
    discriminator = train_decoder.Discriminator(settings["dino_weights"])
    discriminator.heads.load_state_dict(start["discriminator"])
    decoder = decoders.Decoder(128, 2, 8, **decoders.SIZES["ViT-tiny"], mean=[0.5] * 3, std=[0.5] * 3)
    decoder.load_state_dict(start["model"])
    average = {key: value.clone() for key, value in decoder.state_dict().items()}
    adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0, foreach=False)
    optimizer, disc_optimizer = adamw(decoder.parameters()), adamw(discriminator.heads.parameters())
    source = encoders.ImageFolder(settings["data"])
    order = [i for epoch in range(3) for i in encoders.epoch_order(10, 0, epoch)]
    states = []
    for step in range(steps):
        positions = range(4 * step, 4 * step + 4)
        keys = [encoders.random_key(0, *divmod(position, 10)) for position in positions]
        crops = [
            encoders.random_crop(source.open(order[position])[0], 24, 16, np.random.default_rng(key))
            for position, key in zip(positions, keys, strict=True)
        ]
        real = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2) / 255
        noise, uniforms = train_decoder.draw(torch.tensor(keys), (128, 2, 2), 0.8, torch.Generator())
        z = encoder(real)

        fake = decoder(z + noise)
        loss = (fake - real).abs().mean() + lpips(2 * fake - 1, 2 * real - 1).mean()
        if step >= 2:
            gan = -discriminator.eval()(train_decoder.diffaug(2 * fake - 1, uniforms[0])).mean()
            (g_rec,), (g_gan,) = (torch.autograd.grad(part, fake, retain_graph=True) for part in (loss, gan))
            loss = loss + 0.75 * g_rec.norm() / (g_gan.norm() + 1e-6) * gan
        optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step, 1e-3, 3e-5, 1, 5)
        decoder.zero_grad()
        loss.backward()
        optimizer.step()
        for key, value in decoder.state_dict().items():
            average[key] = 0.99 * average[key] + 0.01 * value

        if step >= 1:
            with torch.no_grad():
                clean = ((decoder(z).clamp(0, 1) * 255).round() / 127.5) - 1
            discriminator.train()
            # both kinds in one batch, since each forward is one power iteration of the spectral norm
            augmented = [train_decoder.diffaug(x, u) for x, u in ((2 * real - 1, uniforms[2]), (clean, uniforms[1]))]
            on_real, on_fake = discriminator(torch.cat(augmented)).chunk(2)
            disc_optimizer.param_groups[0]["lr"] = train_decoder.lr_at(step - 1, 1e-3, 3e-5, 1, 5)
            discriminator.heads.zero_grad()
            (0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())).backward()
            disc_optimizer.step()
        heads = {key: value.clone() for key, value in discriminator.heads.state_dict().items()}
        states.append(({key: value.clone() for key, value in decoder.state_dict().items()}, dict(average), heads))
    return states


def assert_same_weights(last, model, ema, heads, initial):
    for a, b, start in ((last["model"], model, "model"), (last["ema"], ema, "ema")):
        assert relative(a, b, initial[start]) < 1e-3
    assert relative(last["discriminator"], heads, initial["discriminator"]) < 1e-3


def test_full_recipe_equals_it_written_plainly(one_process, full, initial):
    """Five steps: L1 + LPIPS alone, then with the discriminator training, then with its loss on the decoder."""
    _, last = one_process
    assert last["step"] == 5 and last["skipped"] == 0
    assert_same_weights(last, *plain_recipe(full, initial, 5)[-1], initial)


def test_log_of_the_full_recipe(one_process):
    """All losses finite, each from its start on; both learning rates by the closed form."""
    log = rows(one_process[0])
    assert [(row["step"], row["epoch"]) for row in log] == [(1, 0.4), (2, 0.8), (3, 1.2), (4, 1.6), (5, 2.0)]
    assert all(math.isfinite(value) for row in log for value in row.values())
    cosine = [3e-5 + (1e-3 - 3e-5) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [row["lr"] for row in log] == pytest.approx([0, *cosine], rel=1e-3)
    assert [row["lr_disc"] for row in log] == pytest.approx([0, 0, *cosine[:3]], rel=1e-3)
    for step, row in enumerate(log):
        assert {"l1", "lpips"} <= row.keys()
        assert all((name in row) == (step >= 1) for name in ("disc", "real", "fake"))
        assert all((name in row) == (step >= 2) for name in ("gan", "gan_weight"))


def test_previews_show_originals_above_reconstructions(one_process, photos):
    out, last = one_process
    assert sorted(path.name for path in out.glob("*.png")) == [f"preview-{e}.png" for e in ("0.80", "1.60", "2.00")]
    picture = np.asarray(Image.open(out / "preview-2.00.png"))
    assert picture.shape == (16 + 2 + 16, 8 * 18 - 2, 3)
    source, decoder = encoders.ImageFolder(photos), decoders.load_decoder(out / "decoder.pt")[0]
    for column, i in enumerate(np.random.default_rng(0).permutation(10)[:8]):
        image = np.array(encoders.center_crop(source.open(i)[0], 16))
        left = 18 * column
        assert np.array_equal(picture[:16, left : left + 16], image)
        z = encoders.Encoder("random-tiny", 16)(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        decoded = decoders.to_uint8(decoder(z))[0].numpy()
        assert np.abs(picture[18:, left : left + 16].astype(int) - decoded).max() <= 1


def test_checkpoints_hold_what_is_needed(one_process):
    out, last = one_process
    decoder, info = decoders.load_decoder(out / "decoder.pt")
    assert all(torch.equal(value, last["ema"][key]) for key, value in decoder.state_dict().items())
    assert info["encoder"]["name"] == "random-tiny" and info["encoder"]["mean"] == [0.5] * 3
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, accumulation, precision, compilation


def torchrun(script, argv, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(launch, env=env, capture_output=True, text=True, timeout=170, **options)


def test_two_processes_end_with_the_weights_of_one(one_process, full, initial, tmp_path):
    """The full recipe through torchrun, half the batch each: every forward that trains must go through DDP."""
    run = torchrun(ROOT / "train_decoder.py", flags(**full | dict(out=tmp_path / "two", preview_every=1)))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("2 processes x 1 x 2") == 1  # one of them speaks
    one, two = one_process[1], torch.load(tmp_path / "two/last.pt", weights_only=True)
    assert two["step"] == 5
    assert_same_weights(two, one["model"], one["ema"], one["discriminator"], initial)
    for a, b in zip(rows(tmp_path / "two"), rows(one_process[0]), strict=True):
        for name in ("l1", "lpips", "gan", "gan_weight", "disc", "real", "fake", "grad_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2, abs=1e-4), (name, a, b)


STOPPED = """
import os, signal, sys
import train_decoder

class Bar(train_decoder.tqdm):
    steps = 0
    def update(self, n=1):
        super().update(n)
        self.steps += 1
        if self.steps == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

train_decoder.tqdm = Bar
train_decoder.main()
"""


def test_a_signal_to_one_process_stops_all_and_accumulation_equals_the_batch(settings, initial, tmp_path, monkeypatch):
    """Rank 1 alone is told to stop in step 3. Micro-batches of one image, twice in each process, with a broken file."""
    data = shutil.copytree(settings["data"], tmp_path / "data")
    (data / "0.png").write_bytes(b"not an image")
    (tmp_path / "stopped.py").write_text(STOPPED)
    changed = settings | dict(data=data, micro_batch=1, epochs=4, gan=0.75, disc_start=9, gan_start=9)
    changed |= dict(dino_weights=save_tiny_dino(tmp_path / "dino.pt"))
    run = torchrun(tmp_path / "stopped.py", flags(**changed, out=tmp_path / "two"))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("stopped and saved at step 3") == 1 and "2 processes x 2 x 1" in run.stdout
    two = torch.load(tmp_path / "two/last.pt", weights_only=True)
    assert two["step"] == 3 and two["replaced"] == 1  # each image comes once in an epoch of 2.5 steps
    stop_after(monkeypatch, 2)
    one = train(tmp_path / "one", changed, micro_batch=4)
    assert one["step"] == 3 and one["replaced"] == 1
    assert relative(two["model"], one["model"], initial["model"]) < 1e-3
    assert relative(two["ema"], one["ema"], initial["model"]) < 1e-3
    monkeypatch.undo()
    again = train(tmp_path / "two", changed)  # in one process now
    assert again["step"] == 10 and again["replaced"] == 4 == rows(tmp_path / "two")[-1]["replaced"]


def test_accumulation_equals_the_whole_batch(settings, tmp_path):
    settings = settings | dict(batch=5, micro_batch=5)
    start = train(tmp_path / "start", settings, lr=1e-30, lr_end=0)["model"]
    whole = train(tmp_path / "whole", settings)
    for size in (1, 2):  # by twos: 2, 2, 1
        parts = train(tmp_path / f"parts{size}", settings, micro_batch=size)
        assert relative(parts["model"], whole["model"], start) < 1e-3
        assert relative(parts["ema"], whole["ema"], start) < 1e-3


def test_checkpointing_changes_nothing(settings, tmp_path, monkeypatch):
    calls = []
    real = decoders.checkpoint
    monkeypatch.setattr(decoders, "checkpoint", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    plain = train(tmp_path / "plain", settings)
    assert not calls
    again = train(tmp_path / "again", settings, checkpointing=True)
    assert len(calls) == 5 * 3  # steps, blocks
    assert_identical(again["model"], plain["model"])


def test_bf16_is_of_encoder_and_decoder_alone_and_each_image_is_encoded_once(full, tmp_path, monkeypatch):
    seen = {}

    def spy(module):
        forward = module.forward

        def watched(self, *inputs):
            low = torch.is_autocast_enabled("cpu")
            output = forward(self, *inputs)
            seen.setdefault(module.__name__, []).append((len(inputs[0]), low, output.requires_grad))
            assert all(x.dtype == torch.float32 for x in (*inputs, output))
            return output

        monkeypatch.setattr(module, "forward", watched)

    for module in (encoders.Encoder, decoders.Decoder, fid.LPIPS, train_decoder.Discriminator):
        spy(module)
    last = train(tmp_path / "run", full, precision="bf16", epochs=1.2, micro_batch=2)
    assert last["step"] == 3 and last["skipped"] == 0
    assert seen["Encoder"] == 6 * [(2, True, False)]  # three steps of two micro-batches
    assert seen["LPIPS"] == 6 * [(2, False, True)]
    decoded, judged = (2, True, True), (2, False, True)
    fresh, trained = (2, True, False), (4, False, True)  # the discriminator's fakes; reals and fakes in one forward
    assert seen["Decoder"] == [decoded] * 2 + ([decoded] * 2 + [fresh] * 2) * 2
    assert seen["Discriminator"] == [trained] * 2 + [judged] * 2 + [trained] * 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on the CPU")
@torch._inductor.config.patch(compile_threads=1)  # a pool would take longer to start
def test_compiled_step_equals_eager_step(settings, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient."""
    gradients = []
    for flag in ("compile", "no_compile"):
        last = train(tmp_path / flag, settings | {flag: True}, epochs=0.4)
        gradients.append(torch.cat([state["exp_avg"].flatten() for state in last["optimizer"]["state"].values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_traced_full_recipe_equals_eager(one_process, full, initial, tmp_path, monkeypatch):
    """As --compile runs it, with the discriminator, but for the generated code."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **how: compiled.append(self) or compile_module(self, backend="aot_eager", fullgraph=True, **how),
    )
    last = train(tmp_path / "run", full, compile=True)
    assert len(compiled) == 3 + 3 + 12  # the blocks of encoder, decoder and DINO
    one = one_process[1]
    assert_same_weights(last, one["model"], one["ema"], one["discriminator"], initial)


# ---------------------------------------------------------------------------------------------------------------------
# Refusing, saving, logging


def test_offline_one_message_names_all_that_is_missing(monkeypatch, capsys, photos, tmp_path):
    """And it comes before the images are listed."""

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(encoders, "image_source", lambda *_: pytest.fail("the images were listed"))
    with pytest.raises(SystemExit, match="2"):
        train_decoder.main(flags(data=photos, out=tmp_path / "run", device="cpu"))
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and not (tmp_path / "run").exists()
    for flag, file in {
        "--encoder-weights": "https://huggingface.co/timm/vit_base_patch14_reg4_dinov2.lvd142m",
        "--lpips-weights": fid.LPIPS_HEADS, "--vgg-weights": "https://huggingface.co/timm/vgg16.tv_in1k",
        "--dino-weights": "https://huggingface.co/timm/vit_small_patch8_224.dino",
    }.items():  # fmt: skip
        assert file in message and flag in message.split(file)[1].split("; ")[0], message


def test_checkpoints_come_at_intervals_both_files_together(settings, tmp_path, monkeypatch):
    saved, save = [], encoders.save
    monkeypatch.setattr(encoders, "save", lambda files: saved.append(files) or save(files))
    train(tmp_path / "run", settings, save_every=0.8)
    assert [last["step"] for _, last in map(dict.values, saved)] == [2, 4, 5]
    assert [[path.name for path in files] for files in saved] == 3 * [["decoder.pt", "last.pt"]]


def test_a_row_of_the_log_averages_its_steps(settings, tmp_path):
    train(tmp_path / "each", settings)
    train(tmp_path / "two", settings, log_every=2)
    each, two = rows(tmp_path / "each"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == [2, 4, 5]
    assert two[1]["l1"] == pytest.approx((each[2]["l1"] + each[3]["l1"]) / 2, abs=2e-5)
    assert two[2]["l1"] == each[4]["l1"]


# ---------------------------------------------------------------------------------------------------------------------
# What training draws


def test_noise_level_is_half_normal():
    """sigma = tau |n|: mean tau sqrt(2 / pi), root mean square tau, median 0.6745 tau; noise / sigma is N(0, 1)."""
    keys = torch.tensor([encoders.random_key(0, 0, i) for i in range(4000)])
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


def test_demo_with_all_losses_switched_on_by_flags(weights, tmp_path):
    train(tmp_path / "run", weights, preset="demo", batch=4, epochs=0.006, lpips=1, gan=0.75, disc_start=0.001,
          gan_start=0.002, warmup=0, log_every=1, device="cpu")  # fmt: skip
    log = rows(tmp_path / "run")
    assert len(log) == 12 and all(math.isfinite(value) for row in log for value in row.values())
    assert log[-1]["skipped"] == 0 and {"lpips", "gan", "disc"} <= log[-1].keys()
    assert log[-1]["l1"] < log[0]["l1"] and log[-1]["lpips"] < log[0]["lpips"]


def test_demo_starts_the_discriminator_within_its_epochs():
    _, args = train_decoder.parse_args(["--preset", "demo", "--gan", "0.75"])
    assert args.disc_start < args.gan_start < args.epochs and args.resize == args.size == 32


def test_gan_without_the_perceptual_loss(full, tmp_path):
    train(tmp_path / "run", full | dict(lpips=0, vgg_weights=None, lpips_weights=None))
    log = rows(tmp_path / "run")
    assert "lpips" not in log[-1] and "gan" in log[-1] and log[-1]["skipped"] == 0


def test_a_folder_of_odd_images(settings, tmp_path):
    """Grey, 16-bit, CMYK, RGBA, palette, rotated by EXIF, tiny, long; and files that are broken, which are replaced."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    rgb = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    rgb.convert("L").save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "print.jpg")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.gif")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.resize((3, 5)).save(folder / "tiny.webp")
    rgb.resize((300, 9)).save(folder / "long.bmp")
    whole = (folder / "turned.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    last = train(tmp_path / "run", settings, data=folder, preview_every=1)  # twice each of the ten
    assert last["step"] == 5 and last["replaced"] == 4 == rows(tmp_path / "run")[-1]["replaced"]
    assert len(list((tmp_path / "run").glob("preview-*.png"))) == 3


def paired(folder, npz, batch, out):
    fid.main(flags(paired=True, features="random-tiny", no_lpips=True, size=64, batch=batch, workers=0, device="cpu",
                   json=out, overwrite=True) + [str(folder), str(npz)])  # fmt: skip
    return json.loads(out.read_text())


def test_decoder_upsampling_and_its_evaluation(settings, photos, tmp_path):
    """A 32-pixel encoder, a decoder to 64; then sample.py --reconstruct and fid.py --paired, every image once."""
    last = train(tmp_path / "run", settings, size=64, encoder_size=32)
    decoder, info = decoders.load_decoder(tmp_path / "run/decoder.pt")
    assert (decoder.config["grid"], decoder.config["patch"], info["encoder"]["image_size"]) == (4, 16, 32)
    assert decoder(torch.zeros(1, 128, 4, 4)).shape == (1, 3, 64, 64) and last["args"]["resize"] == 96

    encoder, source, expected = encoders.Encoder("random-tiny", 32), encoders.ImageFolder(photos), []
    for i in range(10):
        image = np.array(encoders.center_crop(source.open(i)[0], 64))
        decoded = decoders.to_uint8(decoder(encoder(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)))[0].numpy()
        expected.append(-10 * math.log10(np.mean((image / 255 - decoded / 255) ** 2)))
    scores = []
    for batch in (3, 10):
        npz = tmp_path / f"recon{batch}.npz"
        sample.main(flags(preset="demo", decoder=tmp_path / "run/decoder.pt", reconstruct=photos, out=npz, batch=batch,
                          workers=0, device="cpu"))  # fmt: skip
        assert np.load(npz)["arr_0"].shape == (10, 64, 64, 3)
        scores += [paired(photos, npz, size, tmp_path / "scores.json")["PSNR"] for size in (4, 64)]
    assert scores == pytest.approx(4 * [np.mean(expected)], abs=2e-3)


def test_one_step_at_the_size_of_the_paper(weights, photos, tmp_path):
    """C = 768 from DINOv2-B, ViT-B, 256 pixels, all three losses on."""
    shapes = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m").state_dict()
    torch.save({key: 0.02 * torch.randn(x.shape).half() for key, x in shapes.items()}, tmp_path / "encoder.pt")
    out = tmp_path / "run"
    last = train(out, weights, encoder_weights=tmp_path / "encoder.pt", data=photos, model="ViT-B", epochs=0.1, batch=1,
                 micro_batch=1, disc_start=0, gan_start=0, warmup=0, workers=0, device="cpu", log_every=1,
                 preview_every=0)  # fmt: skip
    log = rows(out)
    assert len(log) == 1 == last["step"] and log[0]["skipped"] == 0
    assert all(math.isfinite(log[0][name]) for name in ("l1", "lpips", "gan", "gan_weight", "disc"))
    assert round(sum(value.numel() for value in last["model"].values()) / 1e6, 1) == 86.2
    decoder, info = decoders.load_decoder(out / "decoder.pt")
    assert (decoder.config["latent_dim"], decoder.config["grid"], decoder.config["patch"]) == (768, 16, 16)
    assert info["encoder"]["name"] == "dinov2-b"
    shutil.rmtree(out)  # 2 GB
    (tmp_path / "encoder.pt").unlink()
