"""The models: sizes, checkpoints ours and published, encoders by name, latent statistics, what each file imports."""

import ast
import functools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, published_decoder, published_dit, randomize
from torch import nn

import decoder as decoders
import dit as dits
import encoder as encoders

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def millions(model):
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


DITS = {"DiT-S": 33.6, "DiT-B": 131.7, "DiT-L": 459.7, "DiT-XL": 677.0, "DiT-DH-S": 196.4, "DiT-DH-B": 294.1,
        "DiT-DH-L": 621.5, "DiT-DH-XL": 838.4}  # fmt: skip


@pytest.mark.parametrize("name", DITS)
def test_diffusion_model_sizes(name):
    """Parameter counts of the paper's table, and the size that a published file of each is recognised as."""
    with torch.device("meta"):
        model = dits.DiT(768, 16, 1000, **dits.SIZES[name], allow_narrow=True)
    assert millions(model) == DITS[name]
    state = model.state_dict() | {"pos_embed": model.pos_embed}
    assert model.config | dits.config_from_state(state) == model.config
    assert set(dits.config_from_state(state)) >= {"width", "depth", "heads", "grid", "num_classes", "latent_dim"}


@pytest.mark.parametrize("name, count", {"ViT-B": 86.2, "ViT-L": 303.9, "ViT-XL": 415.1}.items())
def test_decoder_sizes(name, count):
    with torch.device("meta"):
        model = decoders.Decoder(**decoders.SIZES[name])
        assert millions(model) == count and model.image_size == 256
        config, state = decoders.from_published(published_decoder(model))
        assert config == {key: model.config[key] for key in config} and config.keys() == model.config.keys() - {
            "mean", "std"
        }  # fmt: skip
        model.load_state_dict(state, assign=True)
        config, _ = decoders.from_published(published_decoder(decoders.Decoder(grid=16, patch=32, depth=1)))
    assert (config["grid"], config["patch"]) == (16, 32)  # decoder upsampling


def test_models_too_narrow_for_their_tokens_are_refused():
    for name, latent_dim, fit in [
        ("DiT-S", 768, "DiT-B, DiT-L, DiT-XL, DiT-DH-S, DiT-DH-B, DiT-DH-L, DiT-DH-XL"),
        ("DiT-B", 1024, "DiT-L, DiT-XL, DiT-DH-S, DiT-DH-B, DiT-DH-L, DiT-DH-XL"),
        ("DiT-DH-XL", 2049, "a width of at least 2049"),
    ]:
        with torch.device("meta"), pytest.raises(ValueError, match="Theorem 1") as error:
            dits.DiT(latent_dim, **dits.SIZES[name])
        message = str(error.value)
        assert f"use {fit}, or insist with --allow-narrow" in message and f"{latent_dim}-wide" in message
    with torch.device("meta"):
        dits.DiT(768, **dits.SIZES["DiT-DH-S"])  # the wide head reads x_t and writes v
        dits.DiT(768, **dits.SIZES["DiT-B"])  # as wide as the tokens is enough
        dits.DiT(768, **dits.SIZES["DiT-S"], allow_narrow=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

TINY = dict(latent_dim=12, grid=3)
HEAD = TINY | dict(num_classes=5) | dits.SIZES["DiT-DH-tiny"] | dict(depth=2, head_depth=3)
PLAIN = {key: value for key, value in HEAD.items() if "head_" not in key}


def latents(batch=2, seed=1):
    return torch.randn(batch, 12, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny_decoder():
    return randomize(decoders.Decoder(**TINY, patch=4, width=128, depth=2, heads=4, mlp=100,
                                      mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))  # fmt: skip


@pytest.mark.parametrize("wrap", [None, "ema", "model"])
def test_published_decoder_round_trip(tiny_decoder, tmp_path, wrap):
    state = published_decoder(tiny_decoder)
    torch.save({wrap: state, "step": 3} if wrap else state, tmp_path / "model.pt")
    model, info = decoders.load_decoder(tmp_path / "model.pt", dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    assert model.config == tiny_decoder.config and info == {} and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(latents()), tiny_decoder(latents()))
    default, _ = decoders.load_decoder(tmp_path / "model.pt")  # pixels as ImageNet's
    assert default.config["mean"] == [0.485, 0.456, 0.406]


def test_our_decoder_round_trip(tiny_decoder, tmp_path):
    record = dict(name="dinov2-b", image_size=256, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    file = dict(kind="decoder", config=tiny_decoder.config, model=tiny_decoder.state_dict(), encoder=record, epoch=1.0)
    torch.save(file, tmp_path / "decoder.pt")
    model, info = decoders.load_decoder(
        tmp_path / "decoder.pt", dict(mean=(9, 9, 9), std=(9, 9, 9))
    )  # it knows its own
    assert info["encoder"] == record and torch.equal(model(latents()), tiny_decoder(latents()))


@pytest.mark.parametrize("config, wrap", [
    (PLAIN, None), (HEAD, None), (PLAIN | dict(qk_norm=True), "model"), (HEAD | dict(qk_norm=True), "ema"),
], ids=["DiT", "DiT-DH", "DiT qk", "DiT-DH qk"])  # fmt: skip
def test_published_diffusion_model_round_trip(tmp_path, config, wrap):
    model = randomize(dits.DiT(**config))
    other = published_dit(randomize(dits.DiT(**config), seed=1))
    file = published_dit(model)
    if wrap:
        file = {"model": other, "opt": {"lr": 1.0}, wrap: file}  # the EMA weights are taken where there are some
    torch.save(file, tmp_path / "stage2.pt")
    loaded, info = dits.load_dit(tmp_path / "stage2.pt")
    assert loaded.config == model.config and info == {} and not loaded.training
    x, t, y = latents(), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_our_diffusion_model_round_trip(tmp_path):
    model = randomize(dits.DiT(16, 3, 5, 8, 1, 2, allow_narrow=True))  # of no size in the table, narrow too
    stats = {"mean": torch.zeros(16, 3, 3), "var": torch.ones(16, 3, 3)}
    file = dict(kind="dit", config=model.config, model=model.state_dict(), stats=stats, shift=2.0, label_dropout=0.1,
                encoder=dict(name="dinov2-b"), epoch=1.0)  # fmt: skip
    torch.save(file, tmp_path / "dit.pt")
    loaded, info = dits.load_dit(tmp_path / "dit.pt")
    assert info.keys() == {"stats", "shift", "label_dropout", "encoder", "epoch"} and info["shift"] == 2
    x, t, y = torch.randn(2, 16, 3, 3), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_files_that_are_neither_ours_nor_published(tiny_decoder, tmp_path):
    """One line that names the file and what was found in it, from both loaders and from load_stats."""
    decoder, model = published_decoder(tiny_decoder), published_dit(randomize(dits.DiT(**HEAD)))
    stats = {"mean": None, "var": torch.ones(12, 3, 3)}
    files = {  # name -> content, what the message says of it
        "stat.pt": (stats, "'mean', 'var'"), "list.pt": ([1, 2], "list"), "tensor.pt": (torch.ones(2), "Tensor"),
        "empty.pt": ({}, "[]"), "last.pt": (dict(kind="train_dit", model=model), "train_dit"),
        "nested.pt": ({"ema": {"a.weight": torch.ones(1)}}, ""), "pickle.pt": (nn.Linear(1, 1), "UnpicklingError"),
        "decoder.pt": (decoder, "decoder_pos_embed"), "dit.pt": (model, "t_embedder.W"),
    }  # fmt: skip
    damaged = {}  # name -> the loader that should have read it
    for kind, name, content, found in [
        ("decoder", "hole.pt", {k: v for k, v in decoder.items() if k != "decoder_norm.bias"}, "decoder_norm.bias"),
        ("decoder", "wide.pt", decoder | {"decoder_embed.weight": torch.ones(100, 12)}, "width 100"),
        ("decoder", "shape.pt", decoder | {"decoder_norm.bias": torch.ones(2)}, "norm.bias"),
        ("decoder", "ours.pt", dict(kind="decoder", config={"depths": 1}, model={}, encoder={}), "depths"),
        ("decoder", "bare.pt", dict(kind="decoder", model={}), "config"),
        ("dit", "hole_dit.pt", {k: v for k, v in model.items() if k != "t_embedder.W"}, "t_embedder.W"),
        ("dit", "wide_dit.pt", model | {"y_embedder.embedding_table.weight": torch.ones(6, 100)}, "widths 100"),
        ("dit", "ours_dit.pt", dict(kind="dit", config={"depths": 1}, model={}), "depths"),
    ]:
        files[name], damaged[name] = (content, found), kind
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:-1000])
    (tmp_path / "folder.pt").mkdir()
    files |= {"text.pt": (None, "Error"), "cut.pt": (None, "Error"), "folder.pt": (None, "Error")}
    loaders = {"decoder": decoders.load_decoder, "dit": dits.load_dit,
               "stat": lambda path: encoders.load_stats(path, (12, 3, 3))}  # fmt: skip
    for kind, load in loaders.items():
        load(tmp_path / f"{kind}.pt")
        for name, (_, found) in files.items():
            if name == f"{kind}.pt":
                continue
            with pytest.raises(ValueError) as error:
                load(tmp_path / name)
            message = str(error.value)
            assert str(tmp_path / name) in message and "\n" not in message and len(message) < 600, message
            if load != loaders[damaged.get(name, kind)]:
                continue
            assert found in message, message
        with pytest.raises(FileNotFoundError, match="absent.pt") as error:
            load(tmp_path / "absent.pt")
        assert "give" in str(error.value) and "\n" not in str(error.value)


def test_statistics_files(tmp_path):
    var = torch.rand(4, 2, 2, dtype=torch.float64) + 1
    torch.save({"mean": None, "var": var}, tmp_path / "none.pt")
    stats = encoders.load_stats(tmp_path / "none.pt", (4, 2, 2))
    assert stats["mean"].shape == (4, 2, 2) and not stats["mean"].any()
    assert torch.equal(stats["var"], var.float()) and stats["mean"].dtype == stats["var"].dtype == torch.float32
    torch.save({"mean": var, "var": 2 * var}, tmp_path / "both.pt")
    stats = encoders.load_stats(tmp_path / "both.pt", (4, 2, 2))
    assert torch.equal(stats["mean"], var.float()) and torch.equal(stats["var"], 2 * var.float())
    torch.save({"mean": var[:1], "var": var}, tmp_path / "mean.pt")
    for name, shape, found in [("both.pt", (4, 4, 4), (4, 2, 2)), ("mean.pt", (4, 2, 2), (1, 2, 2))]:
        with pytest.raises(ValueError) as error:
            encoders.load_stats(tmp_path / name, shape)
        assert str(shape) in str(error.value) and str(found) in str(error.value) and name in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
VITS = {  # name -> side of the grid for 256 px; each has something of its own
    "dinov2-b": 16,  # patch 14: sees 224 px; registers
    "siglip2-b": 16,  # no prefix tokens; a pooling layer that is not used
    "vit_small_patch8_224.dino": 32,
    "vit_small_patch32_224": 8,
    "vit_small_patch14_dinov2": 16,  # positions have a row for CLS
    "vit_medium_patch16_gap_256.sw_in12k_ft_in1k": 16,  # average-pooled: its norm is an Identity
    "deit3_small_patch16_224.fb_in22k_ft_in1k": 16,
    "vit_base_patch16_clip_224.openai": 16,  # a norm in front, and pixels of its own
    "eva02_tiny_patch14_224.mim_in22k": 16,  # timm's other ViT, with RoPE
}


def timm_weights(path, name, **vit):
    """Random weights of a timm model in a file, norms and positions too."""
    torch.manual_seed(0)
    row = encoders.ENCODERS.get(name, dict(model=name))
    model = timm.create_model(row["model"], num_classes=0, **(row.get("vit", {}) | vit))
    torch.save(randomize(model, std=0.5).state_dict(), path)
    return row["model"]


@pytest.mark.parametrize("name", VITS)
def test_any_vit_by_its_name(name, tmp_path):
    """Against timm's own: positions resampled as it loads the file, tokens after the last block, norm written out."""
    vit, eps = SMALL | (dict(reg_tokens=4) if name == "dinov2-b" else {}), 1e-6
    if "gap" in name:
        eps = 0.3  # the last norm's own, wherever timm keeps it
        vit |= dict(norm_layer=functools.partial(nn.LayerNorm, eps=eps))
    model_name = timm_weights(tmp_path / "vit.pt", name, **vit)
    encoder = encoders.Encoder(name, 256, tmp_path / "vit.pt", **vit)
    side = VITS[name]
    assert (encoder.latent_dim, encoder.grid, encoder.name) == (32, side, name)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    z = encoder(images)
    assert z.shape == (2, 32, side, side) and z.dtype == torch.float32

    size = 224 if "patch14" in model_name else 256
    reference = timm.create_model(model_name, pretrained=True, num_classes=0, img_size=size,
                                  pretrained_cfg_overlay=dict(file=str(tmp_path / "vit.pt"), custom_load=False),
                                  **(encoders.ENCODERS.get(name, {}).get("vit", {}) | vit)).eval()  # fmt: skip
    tokens = []
    reference.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    pixels = (
        encoders.IMAGENET if name == "dinov2-b" else encoders.HALF if "siglip" in name else reference.pretrained_cfg
    )
    if size != 256:
        images = nn.functional.interpolate(images, (size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(pixels[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        reference.forward_features((images - mean) / std)
    tokens = tokens[0][:, -(side**2) :]
    expected = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, correction=0) + eps).sqrt()
    for row, column in [(0, 0), (0, side - 1), (side - 1, 0), (side // 2, 1)]:
        torch.testing.assert_close(z[:, :, row, column], expected[:, row * side + column], rtol=1e-3, atol=1e-4)


def test_encoder_is_frozen_and_seeded():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder, again = encoders.Encoder("random-tiny", 32), encoders.Encoder("random-tiny", 64)
    assert torch.equal(before, torch.get_rng_state()), "building an encoder draws nothing from the global generator"
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, again.vit.blocks[0].attn.qkv.weight)
    assert not encoder.train().training and not encoder.vit.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    z = encoder(images)
    assert z.shape == (2, 128, 4, 4) and not z.requires_grad
    torch.testing.assert_close(z.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    assert encoder.record == dict(
        name="random-tiny", image_size=32, latent_dim=128, grid=4, mean=[0.5] * 3, std=[0.5] * 3
    )
    torch.testing.assert_close(encoder(images.detach()[:1]), z[:1])


@pytest.mark.parametrize("name, size, reason", [
    ("dinov2-x", 256, "dinov2-b"), ("vit_small_patch14_dinov3", 256, "vit_small_patch14_dinov2"),
    ("vit_tiny_patch16_224.nothing", 256, "unknown"), ("resnet18", 256, "ResNet"), ("random-tiny", 30, "multiple of 8"),
    ("dinov2-s", 250, "multiple of 16"), ("dinov2-s", 224 + 14, "multiple of 16"), ("mae-b", 0, "multiple of 16"),
    ("vit_small_patch32_224", 240, "multiple of 32"),
])  # fmt: skip
def test_encoders_that_cannot_be_are_refused_before_any_download(name, size, reason, monkeypatch):
    monkeypatch.setattr(encoders, "load_vit", lambda *_: pytest.fail("weights were asked for"))
    with pytest.raises(ValueError, match=reason) as error:
        encoders.Encoder(name, size, **({"depth": 1} if "vit" in name or "-" in name else {}))
    message = str(error.value)
    assert "\n" not in message and name in message and (size == 256 or f"image size {size} " in message)


def test_weights_out_of_reach_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing cached; conftest: offline
    hub = "https://huggingface.co/timm/vit_small_patch14_reg4_dinov2.lvd142m "
    timm_weights(tmp_path / "other.pt", "dinov2-s", depth=1, embed_dim=48)
    timm_weights(tmp_path / "short.pt", "dinov2-s", depth=1)
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    for weights, reason in {None: "cannot download", "absent.pt": "absent.pt", "other.pt": "cls_token",
                            "short.pt": "blocks.1.norm1.weight", "list.pt": "list.pt", "text.pt": "text.pt",
                            "text.safetensors": "text.safetensors"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=reason) as error:
            encoders.Encoder("dinov2-s", weights=weights and tmp_path / weights, depth=2)
        message = str(error.value)
        assert hub in message and "--encoder-weights" in message and "\n" not in message, message


def test_weights_from_safetensors_and_wrapped_files(tmp_path):
    timm_weights(tmp_path / "vit.pt", "mae-b", **SMALL)
    state = torch.load(tmp_path / "vit.pt")
    torch.save({"model": state | {"head.weight": torch.ones(3)}}, tmp_path / "wrapped.pth")
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "vit.safetensors")
    images = torch.rand(1, 3, 64, 64)
    expected = encoders.Encoder("mae-b", 64, tmp_path / "vit.pt", **SMALL)(images)
    for name in ("wrapped.pth", "vit.safetensors"):
        assert torch.equal(encoders.Encoder("mae-b", 64, str(tmp_path / name), **SMALL)(images), expected)


def test_512_px_end_to_end(tmp_path):
    """Native: 448 px in, a 32 x 32 grid, patch 16. Decoder upsampling: the 256-px encoder and patch 32."""
    timm_weights(tmp_path / "vit.pt", "dinov2-s", **SMALL)
    images = torch.rand(1, 3, 512, 512)
    for size, grid, patch, shift in [(512, 32, 16, (32 * 32 * 32 / 4096) ** 0.5), (256, 16, 32, 2**0.5)]:
        encoder = encoders.Encoder("dinov2-s", size, tmp_path / "vit.pt", **SMALL)
        assert encoder.input_size == size * 14 // 16
        stats = encoders.latent_statistics(encoder, [((images * 255).byte(), 0)], "cpu")
        z = encoder(images)
        assert z.shape == stats["mean"].shape[:0] + (1, 32, grid, grid) and stats["var"].shape == (32, grid, grid)
        model = dits.DiT(32, grid, 3, width=32, depth=1, heads=2, head_width=48, head_depth=1, head_heads=2).eval()
        assert dits.shift_for(z.shape[1:]) == pytest.approx(shift)
        noise = dits.sample_noise(0, [7], z.shape[1:])
        x = dits.sample(dits.guided(model, torch.tensor([1]), 2.0), noise, steps=2, shift=shift)
        decoder = decoders.Decoder(32, grid, patch, width=32, depth=1, heads=2, mlp=32).eval()
        with torch.no_grad():
            pictures = decoders.to_uint8(decoder(dits.denormalize(x, stats)))
        assert pictures.shape == (1, 512, 512, 3) and pictures.dtype == torch.uint8
        assert decoder(z).shape == (1, 3, 512, 512)
    assert dits.shift_for((768, 16, 16)) == pytest.approx(6.93, abs=0.005)
    assert dits.shift_for((768, 32, 32)) == pytest.approx(13.86, abs=0.005)
    assert dits.shift_for((8, 4, 4)) == 1


def test_the_weak_model_is_asked_only_where_it_counts():
    asked = []

    def model(x, t, y):
        asked.append(("model", len(x), y.tolist()))
        return x

    def weak(x, t, y):
        asked.append(("weak", len(x), y.tolist()))
        return 0 * x

    model.null_class = 9
    x, y = torch.ones(2, 1, 1, 1), torch.tensor([3, 4])
    for scale, guide, t, expected in [
        (1.0, weak, 0.5, [("model", 2, [3, 4])]),
        (1.0, None, 0.5, [("model", 2, [3, 4])]),
        (2.0, weak, 0.5, [("model", 2, [3, 4]), ("weak", 2, [3, 4])]),  # no doubled batch
        (2.0, None, 0.5, [("model", 2, [3, 4]), ("model", 2, [9, 9])]),
        (2.0, weak, 0.9, [("model", 2, [3, 4])]),
        (2.0, weak, 0.75, [("model", 2, [3, 4]), ("weak", 2, [3, 4])]),  # the interval is closed
    ]:
        asked.clear()
        v = dits.guided(model, y, scale, guide, interval=(0.25, 0.75))(x, torch.tensor(t))
        assert asked == expected
        assert v.flatten().tolist() == ([2, 2] if len(expected) == 2 and guide else [1, 1])


def test_pixels_are_clamped_and_rounded():
    pixels = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 7.0]).expand(1, 3, 2, 8)
    assert decoders.to_uint8(pixels)[0, 1, :, 2].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics


class Tokens(nn.Module):
    """Stands in for an encoder: a fixed map of the pixels, with means far from zero, and exact for any batch."""

    latent_dim, grid = 6, 2

    def forward(self, images):
        first = images[:, :, ::2, ::2]  # (B, 3, 2, 2)
        return torch.cat([100 + first, first.square() - 3], 1)


def parts(images, size):
    return [(images[i : i + size], torch.zeros(1)) for i in range(0, len(images), size)]


@pytest.fixture(scope="module")
def photos():
    return torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def expected_statistics(photos):
    z = np.concatenate([Tokens()(photo[None].float() / 255).numpy() for photo in photos]).astype(np.float64)
    return torch.from_numpy(z.mean(0)).float(), torch.from_numpy(z.var(0)).float()


@pytest.mark.parametrize("size", [1, 4, 7, 23])
def test_latent_statistics_are_exact(photos, size):
    stats = encoders.latent_statistics(Tokens(), parts(photos, size), "cpu")
    mean, var = expected_statistics(photos)
    torch.testing.assert_close(stats["mean"], mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(stats["var"], var, rtol=1e-6, atol=0)


def test_latent_statistics_of_two_ranks(photos, monkeypatch):
    """Ranks of unequal share and batch: the first pass collects what each gives to the others, the second adds it."""
    given = []
    ranks = [parts(photos[:5], 2), parts(photos[5:], 3)]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: given.append(tensor.clone()))
    for rank in ranks:
        encoders.latent_statistics(Tokens(), rank, "cpu", distributed=True)
    calls = len(given) // 2
    sums = iter([a + b for a, b in zip(given[:calls], given[calls:], strict=True)] * 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(next(sums)))
    mean, var = expected_statistics(photos)
    for rank in ranks:
        stats = encoders.latent_statistics(Tokens(), rank, "cpu", distributed=True)
        torch.testing.assert_close(stats["mean"], mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(stats["var"], var, rtol=1e-6, atol=0)


def test_normalised_latents_have_unit_variance(photos):
    stats = encoders.latent_statistics(Tokens(), parts(photos, 5), "cpu")
    z = Tokens()(photos.float() / 255)
    x = dits.normalize(z, stats)
    torch.testing.assert_close(x.mean(0), torch.zeros(6, 2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(x, (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt())
    torch.testing.assert_close(dits.denormalize(x, stats), z)


# ---------------------------------------------------------------------------------------------------------------------
# The rooms

ROOMS = {
    "encoder": set(), "decoder": set(), "dit": set(), "fid": {"encoder"}, "sample": {"encoder", "decoder", "dit"},
    "train_decoder": {"encoder", "decoder", "fid"}, "train_dit": {"encoder", "decoder", "dit", "fid"},
}  # fmt: skip
PACKAGES = {"torch", "numpy", "timm", "PIL", "scipy", "tqdm"}  # requirements.txt


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ROOMS)
def test_who_may_enter_which_room(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = set(imports(tree)) - set(sys.stdlib_module_names)
    assert found - PACKAGES <= ROOMS[name]
    if name == "fid":  # inside its command line only
        assert "encoder" not in set(imports(ast.Module([n for n in tree.body if "Import" in type(n).__name__], [])))
    assert {path.stem for path in ROOT.glob("*.py")} == set(ROOMS)


def test_files_work_when_copied_out_alone(tmp_path):
    """encoder.py, decoder.py, dit.py, fid.py, each from an otherwise empty folder."""
    code = ["import sys", "paths = sys.path[1:]"]
    for name, use in {
        "encoder": "encoder.Encoder('random-tiny', 32).grid",
        "decoder": "decoder.Decoder(8, 2, 2, 32, 1, 2, 32).image_size",
        "dit": "dit.DiT(8, 4, 3, 32, 1, 2).config['grid']",
        "fid": "4",
    }.items():
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        code += [f"sys.path = [{str(tmp_path / name)!r}, *paths]", f"import {name}", f"print({use})",
                 f"del sys.modules[{name!r}]"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, env=environment, capture_output=True,
                         text=True, timeout=120)  # fmt: skip
    assert run.stdout.split() == ["4"] * 4, run.stderr[-2000:]


def test_compiled_blocks_keep_a_graph_for_each_shape():
    """A smaller batch in between leaves no dynamic graph that would serve the usual one from then on."""
    graphs, runs = [], []
    torch._dynamo.reset()  # other tests' graphs

    def backend(module, inputs):
        graphs.append(module)
        number = len(graphs)
        return lambda *values: runs.append(number) or module(*values)

    model = dits.DiT(16, 2, 4, width=16, depth=2, heads=2)
    with pytest.MonkeyPatch.context() as patch:
        compile_module = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
        encoders.compile_blocks(model)
    for batch in (4, 3, 4):
        model(torch.randn(batch, 16, 2, 2), torch.rand(batch), torch.zeros(batch).long())
    assert runs == [1, 1, 2, 2, 1, 1]  # two blocks each
