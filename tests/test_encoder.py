"""The encoder's side: encoders by name, latent statistics, images, crops, the shapes data set, the training order."""

import functools
import os
import re
import time

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import make_images, published_decoder, randomize
from PIL import Image, ImageChops
from torch import nn

import encoder as encoders
from decoder import Decoder, to_uint8
from dit import DiT, denormalize, guided, normalize, sample, sample_noise, shift_for
from encoder import ENCODERS, Encoder, ImageFolder, Images, latent_statistics, load_stats

# ---------------------------------------------------------------------------------------------------------------------
# Encoders

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
VITS = {  # name -> side of the grid for 256 px; each has something of its own
    "dinov2-b": 16,  # patch 14: sees 224 px; registers
    "dinov3-s": 16,  # timm's other ViT, with RoPE, without a table of positions
    "dinov3-b": 16,
    "dinov3-l": 16,
    "siglip2-b": 16,  # no prefix tokens; a pooling layer that is not used
    "siglip2-l": 16,
    "siglip2-so400m": 16,
    "mae-b": 16,  # eps 1e-12; positions resampled without antialias
    "vit_base_patch16_siglip_224.webli": 16,  # the first SigLIP, at 224 px
    "vit_small_patch8_224.dino": 32,
    "vit_small_patch32_224": 8,
    "vit_small_patch14_dinov2": 16,  # positions have a row for CLS
    "vit_medium_patch16_gap_256.sw_in12k_ft_in1k": 16,  # average-pooled: its norm is an Identity
    "deit3_small_patch16_224.fb_in22k_ft_in1k": 16,
    "vit_base_patch16_clip_224.openai": 16,  # a norm in front, and pixels of its own
    "eva02_tiny_patch14_224.mim_in22k": 16,
}
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)
RESIZED = dict(mode="bicubic", align_corners=False)


def options_of(name):
    """A small model's shape, and what its published weights were trained with where timm has something else."""
    options = dict(SMALL)
    if "siglip" in name:
        options["act_layer"] = "gelu_tanh"
    if name == "mae-b":
        options["norm_layer"] = functools.partial(nn.LayerNorm, eps=1e-12)
    if "gap" in name:  # an eps that is read from the model, wherever timm keeps its norm
        options["norm_layer"] = functools.partial(nn.LayerNorm, eps=0.3)
    return options


def timm_weights(path, name, **options):
    """Random weights of a timm model in a file, norms and positions too."""
    torch.manual_seed(0)
    model = timm.create_model(ENCODERS.get(name, name), num_classes=0, **options)
    torch.save(randomize(model, std=0.5).state_dict(), path)
    return path


def timm_tokens(name, path, size, images):
    """timm's own model, its last norm's weight 1 and bias 0: the tokens of normalised images of its size."""
    state = {key: value for key, value in torch.load(path).items() if not key.startswith(("norm.", "fc_norm."))}
    model = timm.create_model(ENCODERS.get(name, name), num_classes=0, img_size=size, **options_of(name)).eval()
    family = timm.models.eva if isinstance(model, timm.models.Eva) else timm.models.vision_transformer
    resample = dict(antialias=False) if name == "mae-b" else {}
    missing, unexpected = model.load_state_dict(family.checkpoint_filter_fn(state, model, **resample), strict=False)
    assert {key.split(".")[0] for key in missing} <= {"norm", "fc_norm"} and not unexpected
    with torch.no_grad():
        tokens = model.forward_features(images)
        return model.fc_norm(tokens)[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("name", VITS)
def test_any_vit_by_its_name(name, tmp_path):
    """At 256 and 512 px against timm's own forward_features: grid, prefix tokens, positions, pixels, last norm."""
    shape = {key: value for key, value in options_of(name).items() if key in SMALL or "gap" in name}
    weights = timm_weights(tmp_path / "vit.pt", name, **shape)
    model = ENCODERS.get(name, name)
    pixels = timm.create_model(model, **SMALL).pretrained_cfg
    if name in ENCODERS:
        pixels = HALF if "siglip" in name else IMAGENET
    mean, std = (torch.tensor(pixels[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for size in (256, 512):
        encoder, side = Encoder(name, size, weights, **shape), VITS[name] * size // 256
        assert (encoder.latent_shape, encoder.image_size) == ((32, side, side), size)
        assert encoder.record == dict(name=name, image_size=size,
                                      mean=pytest.approx(pixels["mean"]), std=pytest.approx(pixels["std"]))
        images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        z = encoder(images)
        assert z.shape == (1, 32, side, side) and z.dtype == torch.float32 and not z.requires_grad
        if "patch14" in model:
            images = F.interpolate(images, (size * 14 // 16,) * 2, **RESIZED)
        expected = timm_tokens(name, weights, images.shape[-1], (images - mean) / std)
        for row, column in [(0, 0), (0, side - 1), (side - 1, 0), (side // 2, 1)]:
            torch.testing.assert_close(z[:, :, row, column], expected[:, row * side + column], rtol=1e-3, atol=1e-4)

    if name == "mae-b":  # too small to see in the tokens
        assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-12}
    if hasattr(encoder.vit.blocks[0].mlp, "act") and "eva" not in name:
        x = torch.linspace(-3, 3, 50)
        tanh = "siglip" in name
        torch.testing.assert_close(encoder.vit.blocks[0].mlp.act(x), F.gelu(x, approximate="tanh" if tanh else "none"),
                                   rtol=0, atol=1e-6)


def test_every_name_is_a_model_of_timm_and_fits_its_sizes(monkeypatch):
    monkeypatch.setattr(encoders, "load_vit", lambda *_: None)
    for name, model in ENCODERS.items():
        assert timm.is_model(model.split(".")[0]) and timm.get_pretrained_cfg(model) is not None
        for size in (256, 512):
            options = {} if name == "random-tiny" else SMALL
            assert Encoder(name, size, **options).grid == size // (8 if name == "random-tiny" else 16)


def test_checkpoints_in_their_authors_key_names(tmp_path):
    """DINOv2's have a mask token, registers under another name and a position for CLS; DINOv3's a bias that is 0."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = torch.load(timm_weights(tmp_path / "dinov2.pt", "dinov2-s", **SMALL))
    original = {key: value for key, value in ours.items() if key not in ("reg_token", "cls_token", "pos_embed")}
    original |= {"register_tokens": ours["reg_token"], "mask_token": torch.zeros(1, 32),
                 "cls_token": ours["cls_token"] - 0.25,
                 "pos_embed": torch.cat([torch.full((1, 1, 32), 0.25), ours["pos_embed"]], 1)}
    torch.save(original, tmp_path / "dinov2.pth")

    ours = torch.load(timm_weights(tmp_path / "dinov3.pt", "dinov3-s", **SMALL))
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    original = {re.sub("|".join(names), lambda name: names[name[0]], key): value for key, value in ours.items()}
    original |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    original |= {f"blocks.{i}.attn.qkv.{kind}": torch.zeros(96) for i in range(2) for kind in ("bias", "bias_mask")}
    assert "storage_tokens" in original and "blocks.1.ls2.gamma" in original
    torch.save(original, tmp_path / "dinov3.pth")
    for name in ("dinov2", "dinov3"):
        converted, plain = (Encoder(f"{name}-s", 64, tmp_path / f"{name}.{end}", **SMALL) for end in ("pth", "pt"))
        torch.testing.assert_close(converted(images), plain(images), rtol=1e-5, atol=1e-5)


def test_encoder_is_frozen_and_seeded():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder, again = Encoder("random-tiny", 32), Encoder("random-tiny", 64)
    assert torch.equal(before, torch.get_rng_state()), "building an encoder draws nothing from the global generator"
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, again.vit.blocks[0].attn.qkv.weight)
    assert not encoder.training and not encoder.vit.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    z = encoder(images)
    assert z.shape == (2, 128, 4, 4) and not z.requires_grad
    torch.testing.assert_close(z.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    assert encoder.record == dict(name="random-tiny", image_size=32, **HALF)
    torch.testing.assert_close(encoder(images.detach()[:1]), z[:1])
    with pytest.raises(ValueError, match=r"torch.uint8 \(2, 3, 32, 32\): give float \(B, 3, S, S\) in .0, 1."):
        encoder((images.detach() * 255).byte())
    with pytest.raises(ValueError, match="give float .B, 3, S, S."):
        encoder(images.detach()[..., :16])


def test_larger_images_are_reduced_as_crops_are():
    """Decoder upsampling: both stages see nearly the same latents, though one reduces tensors and one crops files."""
    encoder = Encoder("random-tiny", 32)
    rng = np.random.default_rng(0)
    photo, coarse = (Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)) for side in (128, 8))
    photo = Image.blend(coarse.resize((128, 128), Image.BICUBIC), photo, 0.3)

    def tensor(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, S, S)

    large, crop = tensor(photo), encoder(tensor(encoders.center_crop(photo, 32)))
    z, aliased = encoder(large), encoder(F.interpolate(large, (32, 32), **RESIZED).clamp(0, 1))
    assert z.shape == (1, 128, 4, 4)
    assert 20 * (z - crop).square().mean() < (aliased - crop).square().mean()
    reduced = tensor(photo.resize((32, 32), Image.BICUBIC))  # Pillow reduces with antialias, in 8 bits
    torch.testing.assert_close(z, encoder(reduced), rtol=0, atol=0.05)
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., 28:36] = 1  # bicubic overshoots at edges; images stay in [0, 1]
    reduced = F.interpolate(stripes, (32, 32), antialias=True, **RESIZED)
    assert reduced.max() > 1.01
    assert torch.equal(encoder(stripes), encoder(reduced.clamp(0, 1)))


def test_patch_14_sees_larger_images_reduced_twice(tmp_path):
    """First to the image size with antialias, then to 14/16 of it without."""
    encoder = Encoder("dinov2-s", 64, timm_weights(tmp_path / "vit.pt", "dinov2-s", **SMALL), **SMALL)
    large = torch.rand(1, 3, 128, 128)
    small = F.interpolate(large, (64, 64), antialias=True, **RESIZED).clamp(0, 1)
    assert encoder.input_size == 56 and torch.equal(encoder(large), encoder(small))
    assert torch.equal(encoder(small), encoder(F.interpolate(small, (56, 56), **RESIZED)))


@pytest.mark.parametrize("name, size, reason", [
    ("dinov2-x", 256, "dinov2-b"), ("vit_small_patch14_dinov4", 256, "unknown encoder"),
    ("vit_tiny_patch16_224.nothing", 256, "timm ViT"), ("resnet18", 256, "ResNet"),
    ("random-tiny", 30, "multiple of 8"), ("dinov2-s", 250, "multiple of 16"), ("dinov2-s", 224 + 14, "multiple of 16"),
    ("mae-b", 0, "multiple of 16"), ("vit_small_patch32_224", 240, "multiple of 32"),
])
def test_encoders_that_cannot_be_are_refused_before_any_download(name, size, reason, monkeypatch):
    monkeypatch.setattr(encoders, "load_vit", lambda *_: pytest.fail("weights were asked for"))
    with pytest.raises(ValueError, match=reason) as error:
        Encoder(name, size, **({"depth": 1} if "vit" in name or "-" in name else {}))
    message = str(error.value)
    assert "\n" not in message and name in message and (size == 256 or f"image size {size} " in message)


def test_random_tiny_takes_no_weights(tmp_path):
    with pytest.raises(ValueError, match="random-tiny takes no --encoder-weights dino.pt: choose the --encoder"):
        Encoder("random-tiny", 32, "dino.pt")


URLS = {
    "dinov2-s": "https://huggingface.co/timm/vit_small_patch14_reg4_dinov2.lvd142m/resolve/main/model.safetensors",
    "dinov3-l": "https://huggingface.co/timm/vit_large_patch16_dinov3.lvd1689m/resolve/main/model.safetensors",
}


@pytest.mark.parametrize("name", URLS)
def test_offline_the_message_names_the_url_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    began = time.time()
    with pytest.raises(ValueError) as error:
        Encoder(name, 256, **SMALL)
    assert time.time() - began < 3
    message = str(error.value)
    assert "\n" not in message and f"cannot load weights for {ENCODERS[name]} (URLError: " in message
    assert message.endswith(f": fetch {URLS[name]} and pass it with --encoder-weights PATH")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_silent_host_is_not_waited_for(monkeypatch):
    """It is asked with a time limit before torch, which has none, downloads."""
    limits = []

    def silent(url, timeout):
        limits.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(encoders.urllib.request, "urlopen", silent)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("torch would wait for ever"))
    with pytest.raises(ValueError, match="TimeoutError: timed out"):
        Encoder("dinov2-s", 256, **SMALL)
    assert limits == [10]


def test_a_mirror_of_the_hub_is_asked_instead(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(ValueError, match="fetch https://mirror.example/timm/vit_small_patch14_reg4_dinov2.lvd142m/"):
        Encoder("dinov2-s", 256, **SMALL)


def test_a_file_that_was_downloaded_before_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(encoders.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    weights = timm_weights(tmp_path / "vit.pt", "dinov3-s", **SMALL)
    name = "timm_vit_small_patch16_dinov3.lvd1689m_resolve_main_model.safetensors"
    pytest.importorskip("safetensors.torch").save_file(torch.load(weights), folder / name)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(Encoder("dinov3-s", 64, **SMALL)(images), Encoder("dinov3-s", 64, weights, **SMALL)(images))


def test_a_download_is_kept(tmp_path, monkeypatch):
    """Through a file:// URL, for which no network is needed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "weights.pth").write_bytes(b"content")
    url = (tmp_path / "weights.pth").as_uri()
    path = encoders.download(url)
    (tmp_path / "weights.pth").unlink()
    assert path == encoders.download(url)
    assert os.path.dirname(path) == str(tmp_path / "home" / "hub" / "checkpoints")
    with open(path, "rb") as file:
        assert file.read() == b"content"


def test_weights_that_cannot_be_used_say_what_to_fetch(tmp_path):
    timm_weights(tmp_path / "other.pt", "dinov2-s", depth=1, embed_dim=48)
    timm_weights(tmp_path / "short.pt", "dinov2-s", depth=1)
    torch.save([1], tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    for weights, reason in {"absent.pt": "absent.pt", "other.pt": "cls_token",
                            "short.pt": "blocks.1.norm1.weight is missing", "list.pt": "list.pt", "text.pt": "text.pt",
                            "pickle.pt": "(?i)weights.only", "text.safetensors": "text.safetensors"}.items():
        with pytest.raises(ValueError, match=reason) as error:
            Encoder("dinov2-s", weights=tmp_path / weights, depth=2)
        message = str(error.value)
        assert message.startswith(f"cannot load {tmp_path / weights} for {ENCODERS['dinov2-s']} (")
        assert message.endswith(f": fetch {URLS['dinov2-s']} and pass it with --encoder-weights PATH")
        assert "\n" not in message


def test_weights_from_safetensors_and_wrapped_files(tmp_path):
    state = torch.load(timm_weights(tmp_path / "vit.pt", "mae-b", **SMALL))
    torch.save({"model": state | {"head.weight": torch.ones(3)}}, tmp_path / "wrapped.pth")
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "vit.safetensors")
    images = torch.rand(1, 3, 64, 64)
    expected = Encoder("mae-b", 64, tmp_path / "vit.pt", **SMALL)(images)
    for name in ("wrapped.pth", "vit.safetensors"):
        assert torch.equal(Encoder("mae-b", 64, str(tmp_path / name), **SMALL)(images), expected)


def test_512_px_end_to_end(tmp_path):
    """Native: 448 px in, a 32 x 32 grid, patch 16. Decoder upsampling: the 256-px encoder and patch 32."""
    weights = timm_weights(tmp_path / "vit.pt", "dinov2-s", **SMALL)
    images = torch.rand(1, 3, 512, 512)
    for size, grid, patch, shift in [(512, 32, 16, (32 * 32 * 32 / 4096) ** 0.5), (256, 16, 32, 2**0.5)]:
        encoder = Encoder("dinov2-s", size, weights, **SMALL)
        assert encoder.input_size == size * 14 // 16
        stats = latent_statistics(encoder, [((images * 255).byte(), 0)], "cpu")
        z = encoder(images)
        assert z.shape == (1, 32, grid, grid) and stats["mean"].shape == stats["var"].shape == (32, grid, grid)
        model = DiT(32, grid, 3, width=32, depth=1, heads=2, head_width=48, head_depth=1, head_heads=2).eval()
        assert shift_for(z.shape[1:]) == pytest.approx(shift)
        noise = sample_noise(0, [7], z.shape[1:])
        x = sample(guided(model, torch.tensor([1]), 2.0), noise, steps=2, shift=shift)
        decoder = Decoder(32, grid, patch, width=32, depth=1, heads=2, mlp=32).eval()
        with torch.no_grad():
            pictures = to_uint8(decoder(denormalize(x, stats)))
        assert pictures.shape == (1, 512, 512, 3) and pictures.dtype == torch.uint8


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics


class Tokens(nn.Module):
    """Stands in for an encoder: a fixed map of the pixels, with means far from zero, and exact for any batch."""

    latent_shape = (6, 2, 2)

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        first = images[:, :, ::2, ::2]  # (B, 3, 2, 2)
        return torch.cat([100 + first, first.square() - 3], 1)


def parts(images, size):
    return [(images[i : i + size], torch.zeros(1)) for i in range(0, len(images), size)]


@pytest.fixture(scope="module")
def photos():
    return torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def assert_statistics(stats, photos):
    z = np.concatenate([Tokens()(photo[None].float() / 255).numpy() for photo in photos]).astype(np.float64)
    mean, var = torch.from_numpy(z.mean(0)).float(), torch.from_numpy(z.var(0)).float()
    torch.testing.assert_close(stats["mean"], mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(stats["var"], var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 4, 7, 23])
def test_latent_statistics_are_exact(size, photos):
    """And the encoder meets one batch size only, for the graphs of torch.compile: the last batch is filled up."""
    encoder = Tokens()
    assert_statistics(latent_statistics(encoder, parts(photos, size), "cpu"), photos)
    assert set(encoder.sizes) == {size}


def test_fill_up_repeats_the_last_item():
    batch = torch.arange(6).view(3, 2)
    assert encoders.fill_up(batch, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert encoders.fill_up(batch[:, 0], 3).tolist() == [0, 2, 4]


def test_latent_statistics_of_two_ranks(photos, monkeypatch):
    """Ranks of unequal share and batch: the first pass collects what each gives to the others, the second adds it."""
    given, ranks = [], [parts(photos[:5], 2), parts(photos[5:], 3)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: given.append(tensor.clone()))
    for rank in ranks:
        latent_statistics(Tokens(), rank, "cpu")
    assert len(given) == 2
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sum(given)))
    for rank in ranks:
        assert_statistics(latent_statistics(Tokens(), rank, "cpu"), photos)


def test_normalised_latents_have_unit_variance(photos):
    stats = latent_statistics(Tokens(), parts(photos, 5), "cpu")
    z = Tokens()(photos.float() / 255)
    x = normalize(z, stats)
    torch.testing.assert_close(x.mean(0), torch.zeros(6, 2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(x, (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt())
    torch.testing.assert_close(denormalize(x, stats), z)


def test_statistics_files(tmp_path):
    var = torch.rand(4, 2, 2, dtype=torch.float64) + 1
    torch.save({"mean": None, "var": var}, tmp_path / "none.pt")
    stats = load_stats(tmp_path / "none.pt", (4, 2, 2))
    assert stats["mean"].shape == (4, 2, 2) and not stats["mean"].any()
    assert torch.equal(stats["var"], var.float()) and stats["mean"].dtype == stats["var"].dtype == torch.float32
    torch.save({"mean": var, "var": 2 * var}, tmp_path / "both.pt")
    stats = load_stats(tmp_path / "both.pt", (4, 2, 2))
    assert torch.equal(stats["mean"], var.float()) and torch.equal(stats["var"], 2 * var.float())


def test_files_that_hold_no_statistics(tmp_path):
    """One line that names the file, the reason and what to give instead."""
    var = torch.ones(12, 3, 3)
    files = {"list.pt": [1, 2], "tensor.pt": torch.ones(2), "empty.pt": {}, "pickle.pt": nn.Linear(1, 1),
             "decoder.pt": published_decoder(Decoder(12, 3, 4, 128, 1, 4, 64)),
             "small.pt": dict(mean=None, var=var[:4]), "mean.pt": dict(mean=var[:1], var=var)}
    reasons = {"small.pt": "shape (4, 3, 3), the model needs (12, 3, 3)", "absent.pt": "No such file"}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:-1000])
    (tmp_path / "folder.pt").mkdir()
    for name in [*files, "text.pt", "cut.pt", "folder.pt", "absent.pt"]:
        with pytest.raises(ValueError) as error:
            load_stats(tmp_path / name, (12, 3, 3))
        message = str(error.value)
        assert message.startswith(f"--stats {tmp_path / name} holds no latent statistics") and "\n" not in message
        assert reasons.get(name, "") in message and message.endswith("give a stat.pt, ours or published")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def write(path, size=(5, 4), color=(200, 30, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def relative(source):
    return [os.path.relpath(os.fsdecode(path), source.root) for path in source.paths]


def test_labels_follow_the_first_level_folders(tmp_path):
    names = ["b/2.png", "b/1.JPEG", "b/deep/er/0.webp", "a/x/y.png", "c/z.bmp"]
    for name in [*names, "b/.hidden.png", "a/.cache/no.png", ".git/no.png", "b/._1.jpg"]:
        write(tmp_path / name)
    for name in ("synsets.txt", "a/readme.md", "b/paper.pdf", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    source = ImageFolder(tmp_path)
    assert relative(source) == ["a/x/y.png", "b/1.JPEG", "b/2.png", "b/deep/er/0.webp", "c/z.bmp"]
    assert source.labels.tolist() == [0, 1, 1, 1, 2] and source.classes == ["a", "b", "c"] and len(source) == 5
    image, label = source.open(3)
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 1)


def test_flat_folder_is_one_class(tmp_path, monkeypatch):
    for name in ("photos/2.png", "photos/10.png", "photos/.hidden.png", "photos/.thumbs/1.png"):
        write(tmp_path / name)
    source = ImageFolder(tmp_path / "photos")
    assert relative(source) == ["10.png", "2.png"] and source.labels.tolist() == [0, 0] and source.classes == ["photos"]
    monkeypatch.chdir(tmp_path / "photos")
    assert ImageFolder(".").classes == ["photos"]


@pytest.mark.parametrize("others", [["val"], ["test"], ["validation"], ["valid", "test"], [".cache"], []])
def test_train_beside_other_splits_is_read_alone(others, tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", *(f"{other}/2.png" for other in others)):
        write(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.root == tmp_path / "train" and source.classes == ["a", "b"] and source.labels.tolist() == [0, 1]
    assert relative(source) == ["a/1.png", "b/1.png"] and len(source) == 2


def test_train_beside_a_class_is_a_class(tmp_path):
    for name in ("train/1.png", "val/1.png", "car/1.png"):
        write(tmp_path / name)
    assert ImageFolder(tmp_path).classes == ["car", "train", "val"]


def test_folders_without_training_images_are_refused(tmp_path):
    write(tmp_path / "splits" / "val" / "1.png")
    write(tmp_path / "splits" / "test" / "1.png")
    assert len(ImageFolder(tmp_path / "splits" / "val")) == 1
    write(tmp_path / "mixed" / "a" / "1.png")
    write(tmp_path / "mixed" / "b.jpg")
    write(tmp_path / "hole" / "a" / "1.png")
    for name in ("hole/b", "empty", "text"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text" / "notes.txt").write_text("no image")
    for name, reason in {
        "splits": "splits holds test/ but no train/: give {}/splits/test, or add train/",
        "mixed": r"mixed holds both class folders and images \({}/mixed/b.jpg\): move the images away",
        "hole": "hole/b holds no images that Pillow reads: fill or remove it",
        "empty": "empty holds no images that Pillow reads: fill or remove it",
        "text": "text holds no images that Pillow reads: fill or remove it",
        "absent": "no folder {}/absent: give a folder of images",
        "hole/a/1.png": "no folder {}/hole/a/1.png: give a folder of images",
    }.items():
        with pytest.raises(ValueError, match=reason.format(tmp_path) + "$"):
            ImageFolder(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Files of every kind


def saved(path, image, **options):
    image.save(path, **options)
    return encoders.open_image(path)


def test_every_mode_becomes_rgb(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    color = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_90), Image.new("L", (16, 16), 40)))
    grey_rgb = np.asarray(grey)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(saved(tmp_path / "grey.png", grey), grey_rgb)
    np.testing.assert_array_equal(saved(tmp_path / "rgb.png", color), color)
    np.testing.assert_array_equal(
        saved(tmp_path / "bit.png", grey.convert("1")), np.asarray(grey.convert("1").convert("RGB"))
    )
    np.testing.assert_array_equal(saved(tmp_path / "cmyk.tif", color.convert("CMYK")), color)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(saved(tmp_path / "palette.png", palette), palette.convert("RGB"))

    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # PNG's own way from 8 to 16 bits
    np.testing.assert_array_equal(saved(tmp_path / "16.png", sixteen), grey_rgb)
    np.testing.assert_array_equal(saved(tmp_path / "16.tif", sixteen), grey_rgb)
    assert np.asarray(saved(tmp_path / "16.png", Image.fromarray(np.full((2, 2), 65535, np.uint16)))).min() == 255


def test_transparency_lies_on_white(tmp_path):
    alpha = np.tile(np.array([0, 51, 255], np.uint8), (2, 1))
    ink = np.full((2, 3), 100, np.uint8)
    expected = np.array([255, 100 * 0.2 + 255 * 0.8, 100]).round()
    rgba = Image.fromarray(np.stack([ink, ink, ink, alpha], 2))
    for name, image in {"rgba.png": rgba, "la.png": Image.fromarray(np.stack([ink, alpha], 2))}.items():
        result = np.asarray(saved(tmp_path / name, image)).astype(float)
        assert result.shape == (2, 3, 3)
        np.testing.assert_allclose(result, np.broadcast_to(expected[:, None], (2, 3, 3)), atol=1, err_msg=name)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    result = np.asarray(saved(tmp_path / "p.png", palette, transparency=0))
    np.testing.assert_array_equal(result, [[[255, 255, 255], [200, 100, 50]]])
    key = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    np.testing.assert_array_equal(
        saved(tmp_path / "key.png", key, transparency=(9, 9, 9)), [[[255, 255, 255], [1, 2, 3]]]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8))
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # the stored image, by its tag
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(saved(tmp_path / "photo.png", stored, exif=exif), upright)


# ---------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize("size", [(37, 101), (101, 37), (24, 24), (9, 200), (200, 200)])
def test_random_crop_is_a_window_of_the_resized_image(size):
    image = Image.effect_noise(size, 90).convert("RGB")
    scale = 24 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    assert min(resized.size) == 24
    places = {
        (left, top): resized.crop((left, top, left + 16, top + 16)).tobytes()
        for left in range(resized.width - 15)
        for top in range(resized.height - 15)
    }
    place = {content: key for key, content in places.items()}
    drawn = [place[encoders.random_crop(image, 24, 16, np.random.default_rng(i)).tobytes()] for i in range(400)]
    for axis, side in enumerate(resized.size):
        found = {key[axis] for key in drawn}
        if side < 40:
            assert found == set(range(side - 15)), "every offset is drawn, both ends too"
        else:
            assert min(found) < 10 and max(found) > side - 26


def test_crops_of_the_diffusion_model(tmp_path):
    image = Image.effect_noise((40, 70), 90).convert("RGB")
    plain = encoders.center_crop(image, 16)
    drawn = [encoders.center_crop_flip(image, 16, np.random.default_rng(i)).tobytes() for i in range(200)]
    mirrored = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(drawn) == {plain.tobytes(), mirrored}
    assert 70 < drawn.count(mirrored) < 130


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def test_shapes_are_a_function_of_seed_and_index():
    first, again, other = encoders.Shapes(40, 32), encoders.Shapes(30, 32), encoders.Shapes(40, 32, seed=1)
    again.open(25)  # the order of opening does not matter
    for i in range(30):
        (a, label), (b, _), (c, _) = first.open(i), again.open(i), other.open(i)
        assert a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()
        assert (a.mode, a.size, label) == ("RGB", (32, 32), i % len(first.classes))
    assert len({first.open(i)[0].tobytes() for i in range(40)}) == 40
    assert len(first) == 40 and len(first.classes) == 10


def test_shapes_are_bright_on_dark_and_differ_in_form():
    masks = []
    for label in range(10):
        images = np.stack([np.asarray(encoders.Shapes(100, 32).open(label + 10 * i)[0]).max(2) for i in range(10)])
        masks.append((images > 120).mean(0))
        assert (images[:, :2, :2] <= 76).all() and (images > 150).any((1, 2)).all()
    distances = [np.abs(a - b).mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert min(distances) > 0.02


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def batches(steps, batch=6, micro_batch=3, seed=0, world_size=1, count=20):
    """What each step sees, all ranks and micro-batches in order."""
    local = batch // world_size
    per_step = {step: [] for step in steps}
    for rank in range(world_size):
        parts = list(encoders.training_batches(count, batch, micro_batch, steps, seed, rank, world_size))
        assert all(len(part) <= micro_batch for part in parts)
        items = [item for part in parts for item in part]
        assert len(items) == local * len(steps)
        for i, step in enumerate(steps):
            per_step[step] += items[i * local : (i + 1) * local]
    return per_step


def test_every_image_once_in_an_epoch():
    stream = [item for items in batches(range(20)).values() for item in items]  # 120 = 6 epochs of 20
    epochs = [stream[i : i + 20] for i in range(0, 120, 20)]
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6, "each epoch has its own order"
    assert len({key for _, key in stream}) == 120, "and each image its own key in each"
    assert all(0 <= key < 2**63 for _, key in stream)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (1, 6), (2, 3), (3, 2), (2, 2), (6, 1), (1, 4)])
def test_a_step_depends_on_neither_processes_nor_micro_batch(world_size, micro_batch):
    assert batches(range(8), micro_batch=micro_batch, world_size=world_size) == batches(range(8))


def test_training_goes_on_at_any_step():
    whole = batches(range(12))
    for start in (1, 3, 4, 11):
        assert batches(range(start, 12)) == {step: whole[step] for step in range(start, 12)}
    assert batches(range(12), seed=1) != whole


def test_a_batch_may_be_larger_than_the_data_set():
    stream = [item for items in batches(range(25)).values() for item in items]
    large = batches(range(3), batch=50, micro_batch=10)
    assert [item for items in large.values() for item in items] == stream[:150]


def test_a_mistake_in_a_transform_of_shapes_is_not_hidden():
    with pytest.raises(AttributeError) as error:  # Shapes has no files to name
        Images(encoders.Shapes(10, 16), lambda image, rng: encoders.random_crop(image, 8, 16, rng))[0, 0]
    assert isinstance(error.value.__context__, ValueError)


def test_loader_processes_draw_the_same_images():
    images = Images(encoders.Shapes(20, 16), lambda image, rng: encoders.random_crop(image, 24, 16, rng))
    one, two = (
        list(encoders.make_loader(images, encoders.training_batches(20, 6, 3, range(2), 0), workers, "cpu"))
        for workers in (0, 2)
    )
    assert len(one) == 4 and one[0][0].shape == (3, 3, 16, 16) and one[0][0].dtype == torch.uint8
    assert one[0][1].shape == one[0][2].shape == (3,)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    index, key = next(encoders.training_batches(20, 6, 3, range(2), 0))[1]
    assert one[0][2][1] == key and one[0][1][1] == index % 10
    assert ImageChops.difference(
        Image.fromarray(one[0][0][1].numpy().transpose(1, 2, 0)),
        encoders.random_crop(encoders.Shapes(20, 16).open(index)[0], 24, 16, np.random.default_rng(key)),
    ).getbbox() is None


def test_loader_processes_by_the_cores(monkeypatch):
    """All cores but one, at most 12, divided over the node's processes."""
    for cores, processes, expected in [
        (8, None, 7), (8, "1", 7), (8, "2", 3), (8, "8", 1), (1, None, 1), (64, None, 12), (64, "8", 7), (96, "4", 12),
    ]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: range(cores), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert encoders.default_workers() == expected, (cores, processes)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert encoders.default_workers() == 7
    monkeypatch.delattr(os, "fork")  # Windows
    assert encoders.default_workers() == 0


def test_shapes_need_no_loader_processes_and_folders_do(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "default_workers", lambda: 5)
    shapes, folder = encoders.Shapes(4, 8), ImageFolder(make_images(tmp_path, 2, (8, 8)))
    for source, workers, expected in [(shapes, None, 0), (folder, None, 5), (shapes, 2, 2), (folder, 0, 0)]:
        loader = encoders.make_loader(Images(source, lambda image, rng: image), [[(0, 0)]], workers, "cpu")
        assert loader.num_workers == expected and not loader.pin_memory
    assert encoders.make_loader(Images(shapes, None), [], 0, "cuda").pin_memory


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be read


def break_image(path, how):
    if how == "truncated":
        Image.effect_noise((40, 40), 90).save(path)
        path.write_bytes(path.read_bytes()[:700])
    elif how == "vanished":
        path.unlink()
    else:
        path.write_bytes(dict(empty=b"", text=b"not an image")[how])


def crop(image, rng):
    return encoders.center_crop(image, 8)


BROKEN = {1: "truncated", 2: "text", 5: "empty", 7: "vanished"}


@pytest.fixture
def damaged(tmp_path):
    """Twelve images in classes a, b, each of a colour that tells its index in the order of the folder; four broken."""
    for i in range(12):
        write(tmp_path / "ab"[i // 6] / f"{i:02}.png", color=(20 * i, 0, 0))
    source = ImageFolder(tmp_path)
    for i, how in BROKEN.items():
        break_image(tmp_path / "ab"[i // 6] / f"{i:02}.png", how)
    return source


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_files_are_named_once_and_replaced(workers, damaged, tmp_path, capfd):
    """Over five epochs and all loader processes. Every image of every batch is predicted, from its key.

    What stands in comes with its own label; the key of the place draws it, and again where it is broken itself.
    """
    images = Images(damaged, crop)
    batches = list(encoders.training_batches(12, 6, 3, range(10), 0))
    replaced = 0
    for items, (pixels, labels, keys) in zip(batches, encoders.make_loader(images, batches, workers, "cpu"),
                                             strict=True):
        assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.uint8
        for i, (index, key) in enumerate(items):
            rng = np.random.default_rng(key)
            replaced += index in BROKEN
            while index in BROKEN:
                index = int(rng.integers(12))
            assert (pixels[i, 0] == 20 * index).all() and labels[i] == index // 6 and keys[i] == key
    assert replaced == 4 * 5
    assert images.unreadable.nonzero().flatten().tolist() == list(BROKEN)
    named = capfd.readouterr().err.splitlines()
    files = [os.fsdecode(damaged.paths[index]) for index in BROKEN]
    assert sorted(re.fullmatch(r"cannot read (.*?) \(.+\)", line)[1] for line in named) == files


def test_any_other_image_may_stand_in_for_an_unreadable_one(damaged):
    images = Images(damaged, crop)
    drawn = set()
    for key in range(150):
        image, label, _ = images[1, key]
        assert torch.equal(image, images[1, key][0]), "the same key, the same replacement"
        drawn.add(int(image[0, 0, 0]) // 20)
    assert drawn == set(range(12)) - BROKEN.keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_names_all_unreadable_images(workers, damaged, capfd):
    """At its end; what can be read is right and in order."""
    seen = []
    with pytest.raises(ValueError, match=f"^{len(BROKEN)} images in .* cannot be read, see above: repair or remove"):
        for pixels in encoders.evaluation_batches(damaged, range(12), 4, 1, workers, "cpu"):
            seen.append(pixels[0, 0])
    assert all((seen[i] == 20 * i).all() for i in range(12) if i not in BROKEN) and len(seen) == 12
    assert capfd.readouterr().err.count("cannot read ") == len(BROKEN)


def test_a_hundred_unreadable_images_in_a_row_are_an_error(tmp_path, capfd):
    for i in range(3):
        write(tmp_path / f"{i}.png")
        break_image(tmp_path / f"{i}.png", "text")
    images = Images(ImageFolder(tmp_path), crop)
    opened = []
    images.source.open = lambda index, open=images.source.open: opened.append(index) or open(index)
    with pytest.raises(ValueError) as error:
        images[0, 5]
    assert len(opened) == 100 and set(opened) == {0, 1, 2}
    assert str(error.value) == (f"100 images in a row could not be read, the last one {tmp_path}/{opened[-1]}.png: "
                                "check the data folder")
    assert capfd.readouterr().err.count("cannot read ") == 3


def test_what_data_names(tmp_path):
    shapes = encoders.image_source("shapes", 48)
    assert len(shapes) == 8000 and shapes.open(0)[0].size == (48, 48)
    write(tmp_path / "1.png")
    assert len(encoders.image_source(tmp_path, 48)) == 1
