"""encoder.py: encoders by name, their weights, latent statistics, image files and folders, shapes, the loader."""

import functools
import multiprocessing.reduction
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import make_images, published_decoder, randomize
from PIL import Image, ImageChops
from safetensors.torch import save_file
from torch import nn

import encoder as encoders
from decoder import Decoder
from dit import load_stats
from encoder import ENCODERS, Encoder, ImageFolder, Images, latent_statistics, random_crop

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
VITS = {  # name -> side of the grid for 256 px; each differs from the others
    "dinov2-b": 16,  # patch 14: gets 224 px; registers
    "dinov3-s": 16, "dinov3-b": 16, "dinov3-l": 16,  # timm's other ViT, with RoPE, without a position table
    "siglip2-b": 16, "siglip2-l": 16, "siglip2-so400m": 16,  # no prefix tokens; a pooling layer to remove
    "mae-b": 16,  # eps 1e-12; positions resampled without antialias
    "vit_base_patch16_siglip_224.webli": 16,  # the first SigLIP, at 224 px
    "vit_small_patch8_224.dino": 32,
    "vit_small_patch32_224": 8,
    "vit_small_patch14_dinov2": 16,  # its position table has a row for CLS
    "vit_medium_patch16_gap_256.sw_in12k_ft_in1k": 16,  # average-pooled: `norm` is an Identity
    "deit3_small_patch16_224.fb_in22k_ft_in1k": 16,
    "vit_base_patch16_clip_224.openai": 16,  # a norm before the blocks, other pixel statistics
    "eva02_tiny_patch14_224.mim_in22k": 16,
}
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)
RESIZED = dict(mode="bicubic", align_corners=False)


def options_of(name):
    """The options of a small model; those in which the published weights differ from timm's model included."""
    options = dict(SMALL)
    if "siglip" in name:
        options["act_layer"] = "gelu_tanh"
    if name == "mae-b":
        options["norm_layer"] = functools.partial(nn.LayerNorm, eps=1e-12)
    if "gap" in name:  # the eps of the model's norm must stay
        options["norm_layer"] = functools.partial(nn.LayerNorm, eps=0.3)
    return options


def timm_weights(path, name, **options):
    """Save random weights of a timm model, also for norms and positions."""
    torch.manual_seed(0)
    model = timm.create_model(ENCODERS.get(name, name), **options)
    torch.save(randomize(model, std=0.5).state_dict(), path)
    return path


def timm_tokens(name, path, size, images):
    """The tokens from timm's own model with weight 1 and bias 0 in the last norm, for normalised images."""
    state = {key: value for key, value in torch.load(path).items() if not key.startswith(("norm.", "fc_norm."))}
    model = timm.create_model(ENCODERS.get(name, name), img_size=size, **options_of(name)).eval()
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
        assert encoder.record == dict(name=name, image_size=size, layers=[],
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


def test_encoder_is_frozen_and_seeded():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder, again = Encoder("random-tiny", 32), Encoder("random-tiny", 64)
    assert torch.equal(before, torch.get_rng_state()), "building an encoder leaves the global generator alone"
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, again.vit.blocks[0].attn.qkv.weight)
    assert not encoder.training and not encoder.vit.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    z = encoder(images)
    assert z.shape == (2, 128, 4, 4) and not z.requires_grad
    torch.testing.assert_close(z.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoder(images.detach()[:1]), z[:1])
    with pytest.raises(ValueError, match=r"torch.uint8 \(2, 3, 32, 32\): give float \(B, 3, S, S\) in .0, 1."):
        encoder((images.detach() * 255).byte())
    with pytest.raises(ValueError, match="give float .B, 3, S, S."):
        encoder(images.detach()[..., :16])


def test_latents_of_several_layers():
    """The mean of the layers' outputs after the last norm. Golden files test DINOv3."""
    images, whole = torch.rand(2, 3, 32, 32), Encoder("random-tiny", 32)
    assert torch.equal(Encoder("random-tiny", 32, layers=[2])(images), whole(images))
    x = whole.vit.patch_embed((images - whole.mean) / whole.std)
    first = whole.vit.blocks[0](whole.vit.norm_pre(whole.vit._pos_embed(x)))
    first = F.layer_norm(first, (128,), eps=1e-6).mT.unflatten(2, (4, 4))
    both = Encoder("random-tiny", 32, layers=(2, 0))
    torch.testing.assert_close(both(images), (first + whole(images)) / 2)
    assert both.record == dict(name="random-tiny", image_size=32, layers=[0, 2], **HALF)
    for layers, words in {(3,): "3", (0, -1): "0 -1", (1, 99, 0): "1 99 0"}.items():
        with pytest.raises(ValueError, match=f"^layers {words}: encoder random-tiny has the blocks 0 to 2$"):
            Encoder("random-tiny", 32, layers=layers)


def test_models_for_other_latents_are_refused():
    """The names of the encoders, the sets of layers and the shapes must agree."""
    timms, tiny, shape = dict(name=ENCODERS["dinov2-b"], layers=[1, 3]), dict(name="random-tiny"), (768, 16, 16)
    model = mock.Mock(latent_shape=shape)
    for info, record in [({}, timms), (dict(encoder=timms), dict(name="dinov2-b", layers=[3, 1, 3])),
                         (dict(encoder=tiny | dict(layers=[], image_size=9)), tiny)]:
        encoders.check_latents("x.pt", info, model, record, list(shape))
        with pytest.raises(ValueError, match=r"shape \(768, 16, 16\), not of .*, shape \(768, 8, 8\): give another"):
            encoders.check_latents("x.pt", info, model, record, (768, 8, 8))
    for encoder, record, *texts in [
        (timms, timms | dict(layers=[1]), "dinov2-b, layer 1 3, shape", "dinov2-b, layer 1, shape"),
        (dict(name="dinov2-b"), dict(name="mae-b"), "dinov2-b, layer the last", "mae-b, layer the last"),
        (dict(name=ENCODERS["random-tiny"]), tiny, ENCODERS["random-tiny"], "random-tiny"),  # other weights than timm's
    ]:
        with pytest.raises(ValueError, match="^x.pt is for latents of {}.*, not of {}.*--size".format(*texts)):
            encoders.check_latents("x.pt", dict(encoder=encoder), model, record, shape)


def test_pixels_of_the_decoders():
    """Those of the encoder, except for DINOv3, by any name: its published decoders have no scale."""
    plain, approx = dict(mean=[0.0] * 3, std=[1.0] * 3), pytest.approx
    for name, pixels in {"dinov2-b": IMAGENET, "siglip2-b": HALF, "random-tiny": HALF, "dinov3-l": plain,
                         "vit_huge_plus_patch16_dinov3.lvd1689m": plain, "vit_small_patch8_224.dino": IMAGENET}.items():
        assert encoders.decoder_pixels(name) == dict(mean=approx(pixels["mean"]), std=approx(pixels["std"]))
    assert encoders.pixel_statistics("dinov3-l")["std"] == approx(IMAGENET["std"])


def test_larger_images_are_reduced(tmp_path):
    """Decoder upsampling: to the image size, with antialias, in [0, 1]; patch 14 then to 14/16 of it, without."""
    encoder = Encoder("random-tiny", 32)
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., 28:36] = 1  # bicubic overshoots at edges; images stay in [0, 1]
    reduced = F.interpolate(stripes, (32, 32), antialias=True, **RESIZED)
    assert reduced.max() > 1.01
    assert torch.equal(encoder(stripes), encoder(reduced.clamp(0, 1)))
    encoder = Encoder("dinov2-s", 64, timm_weights(tmp_path / "vit.pt", "dinov2-s", **SMALL), **SMALL)
    large = torch.rand(1, 3, 128, 128)
    small = F.interpolate(large, (64, 64), antialias=True, **RESIZED).clamp(0, 1)
    assert encoder.input_size == 56 and torch.equal(encoder(large), encoder(small))
    assert torch.equal(encoder(small), encoder(F.interpolate(small, (56, 56), **RESIZED)))


@pytest.mark.parametrize("name, size, more, reason", [
    ("dinov2-x", 256, {}, "dinov2-b"), ("vit_small_patch14_dinov4", 256, {}, "unknown encoder"),
    ("vit_tiny_patch16_224.nothing", 256, {}, "timm ViT"), ("resnet18", 256, {}, "ResNet"), ("", 256, {}, "unknown"),
    ("random-tiny", 30, {}, "multiple of 8"), ("dinov2-s", 250, {}, "multiple of 16"),
    ("dinov2-s", 224 + 14, {}, "multiple of 16"), ("mae-b", 0, {}, "multiple of 16"),
    ("vit_small_patch32_224", 240, {}, "multiple of 32"), ("dinov3-l", 256, dict(layers=[24]), "blocks 0 to 23"),
    ("random-tiny", 256, dict(weights="dino.pt"), "no weights to load from dino.pt: choose their encoder"),
])
def test_bad_encoders_are_refused_before_any_download(name, size, more, reason, monkeypatch):
    monkeypatch.setattr(encoders, "pretrained", lambda *_, **__: pytest.fail("loads weights"))
    with pytest.raises(ValueError, match=reason) as error:
        Encoder(name, size, **more)
    message = str(error.value)
    assert "\n" not in message and name in message and (size == 256 or f"image size {size} " in message)


@pytest.fixture
def hub(monkeypatch):
    """A mock of the hub's client in timm."""
    download = mock.Mock(side_effect=OSError("no network. More of it\nand more"))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return download


def test_weights_are_downloaded_from_the_hub(hub, tmp_path):
    def requested():
        (call,) = hub.call_args_list
        hub.reset_mock()
        return call.kwargs["repo_id"], call.kwargs["filename"]

    for name in {*ENCODERS, "vit_small_patch8_224.dino"} - {"random-tiny"}:
        model = ENCODERS.get(name, name)
        with pytest.raises(ValueError) as error:
            Encoder(name, 512, **SMALL)
        assert str(error.value) == (f"cannot load the weights of {model} (OSError: no network): check the network, or "
                                    "give a local file with --encoder-weights")
        assert requested() == (f"timm/{model}", "model.safetensors")
    weights, file = timm_weights(tmp_path / "vit.pt", "dinov3-s", **SMALL), str(tmp_path / "model.safetensors")
    save_file(torch.load(weights), file)
    hub.configure_mock(side_effect=None, return_value=file)
    images = torch.rand(1, 3, 64, 64)
    downloaded = Encoder("dinov3-s", 64, **SMALL)(images)
    assert requested() == (f"timm/{ENCODERS['dinov3-s']}", "model.safetensors")
    for local in (weights, file):
        assert torch.equal(downloaded, Encoder("dinov3-s", 64, local, **SMALL)(images)) and not hub.called


def test_the_hub_s_cache_and_offline_mode_are_used():
    """With the real client: an error at once without the file, then the file in the cache."""
    began = time.time()
    with pytest.raises(ValueError, match=r"^cannot load the weights of vit_small_patch14_reg4_dinov2.lvd142m \(Local"):
        Encoder("dinov2-s", 64, **SMALL)
    assert time.time() - began < 5
    folder, revision = Path(os.environ["HF_HOME"], "hub", f"models--timm--{ENCODERS['dinov2-s']}"), "0" * 40
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    weights = timm_weights(folder / "vit.pt", "dinov2-s", **SMALL)
    save_file(torch.load(weights), folder / "snapshots" / revision / "model.safetensors")
    images = torch.rand(1, 3, 64, 64)
    try:
        assert torch.equal(Encoder("dinov2-s", 64, **SMALL)(images), Encoder("dinov2-s", 64, weights, **SMALL)(images))
    finally:
        shutil.rmtree(folder)


def test_checkpoints_with_the_authors_key_names(tmp_path):
    """DINOv2: a mask token, another name for registers, a position for CLS. DINOv3: other names, a bias of 0."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = torch.load(timm_weights(tmp_path / "dinov2.pt", "dinov2-s", **SMALL))
    original = {key: value for key, value in ours.items() if key not in ("reg_token", "cls_token", "pos_embed")}
    original |= {"register_tokens": ours["reg_token"], "mask_token": torch.zeros(1, 32),
                 "cls_token": ours["cls_token"] - 0.25,
                 "pos_embed": torch.cat([torch.full((1, 1, 32), 0.25), ours["pos_embed"]], 1)}
    torch.save({"model": original}, tmp_path / "dinov2.pth")
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


def test_local_weights_that_cannot_be_loaded_are_an_error_of_one_line(hub, tmp_path):
    timm_weights(tmp_path / "other.pt", "dinov2-s", depth=2, embed_dim=48)
    timm_weights(tmp_path / "short.pt", "dinov2-s", depth=1)
    timm_weights(tmp_path / "more.pt", "dinov2-s", depth=3)
    state = torch.load(timm_weights(tmp_path / "whole.pt", "dinov2-s", depth=2))
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "normless.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("text")
    for name, reason in {"absent.pt": "absent.pt", "other.pt": "size mismatch", "more.pt": "Unexpected key", "": "Is a",
                         "short.pt": "Missing key", "normless.pt": "Missing key", "list.pt": "(", "text.pt": "(",
                         "pickle.pt": "weights_only", "text.safetensors": "("}.items():
        with pytest.raises(ValueError) as error:
            Encoder("dinov2-s", weights=tmp_path / name, depth=2)
        message = str(error.value)
        assert message.startswith(f"cannot load {tmp_path / name} of {ENCODERS['dinov2-s']} (") and reason in message
        assert message.endswith("): check the network, or give a local file with --encoder-weights")
        assert "\n" not in message and len(message) < 500 and not hub.called


class Tokens(nn.Module):
    """A mock encoder: a fixed map of the pixels, with means far from zero, the same for any batch."""

    latent_shape = (6, 2, 2)

    def forward(self, images):
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
    assert_statistics(latent_statistics(Tokens(), parts(photos, size), "cpu"), photos)


def test_latent_statistics_of_two_ranks(photos, monkeypatch):
    """With unequal shares and batches. The first pass records the sums of each rank, the second adds them."""
    sums, ranks = [], [parts(photos[:5], 2), parts(photos[5:], 3)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sums.append(tensor.clone()))
    for rank in ranks:
        latent_statistics(Tokens(), rank, "cpu")
    assert len(sums) == 2
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sums[0] + sums[1]))
    for rank in ranks:
        assert_statistics(latent_statistics(Tokens(), rank, "cpu"), photos)


def test_statistics_files(tmp_path):
    """Files without statistics of the shape are refused in one line with the path and the reason."""
    good = torch.rand(12, 3, 3, dtype=torch.float64) + 1
    for mean in (None, good):
        torch.save({"mean": mean, "var": 2 * good}, tmp_path / "stat.pt")
        stats = load_stats(tmp_path / "stat.pt", (12, 3, 3))
        assert torch.equal(stats["mean"], torch.zeros(12, 3, 3) if mean is None else mean.float())
        assert torch.equal(stats["var"], 2 * good.float()) and stats["mean"].dtype == torch.float32
    bad = good.clone()
    bad[3, 1, 1] = -1e-9
    unread, none, wrong = "cannot read {} (", "{} contains no latent statistics: give a stat.pt", ", are not finite, "
    files = {"list.pt": ([1, 2], unread), "tensor.pt": (torch.ones(2), unread), "pickle.pt": (nn.Linear(1, 1), unread),
             "empty.pt": ({}, none), "decoder.pt": (published_decoder(Decoder(12, 3, 4, 128, 1, 4, 64)), none),
             "negative.pt": (dict(mean=None, var=bad), wrong), "nan.pt": (dict(mean=bad.sqrt(), var=good), wrong),
             "inf.pt": (dict(mean=None, var=1 / (bad * 0).abs()), "var of shape (12, 3, 3)" + wrong),
             "small.pt": (dict(mean=None, var=good[:4]), "mean of shape (4, 3, 3)" + wrong),
             "mean.pt": (dict(mean=good[:1], var=good), "mean of shape (1, 3, 3)" + wrong)}
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:-1000])
    files |= dict.fromkeys(("text.pt", "cut.pt", ""), (None, unread)) | {"absent.pt": (None, unread + "FileNotFound")}
    for name, (_, reason) in files.items():
        with pytest.raises(ValueError) as error:
            load_stats(tmp_path / name, (12, 3, 3))
        message, path = str(error.value), str(tmp_path / name)
        assert reason.format(path) in message and path in message and "\n" not in message
        assert ": give " in message and (wrong not in message or "model's shape (12, 3, 3): give others" in message)


def write(path, size=(5, 4), color=(200, 30, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def relative(source):
    return [os.path.relpath(os.fsdecode(path), source.root) for path in source.paths]


def test_labels_follow_the_first_level_folders(tmp_path):
    for name in ("b/2.png", "b/1.JPEG", "b/deep/er/0.webp", "a/x/y.png", "c/z.bmp", "b/.hidden.png", "a/.cache/no.png",
                 ".git/no.png", "b/._1.jpg"):
        write(tmp_path / name)
    for name in ("synsets.txt", "a/readme.md", "b/paper.pdf", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    source = ImageFolder(tmp_path)
    assert relative(source) == ["a/x/y.png", "b/1.JPEG", "b/2.png", "b/deep/er/0.webp", "c/z.bmp"]
    assert source.labels.tolist() == [0, 1, 1, 1, 2] and source.classes == ["a", "b", "c"] and len(source) == 5
    image, label = source.open(3)
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 1)


@pytest.mark.parametrize("folders, used, classes", [
    (["2.png", "10.png", ".hidden.png", ".thumbs/1.png"], ["10.png", "2.png"], ["photos"]),  # flat: one class
    (["train/1.png", "val/1.png", "car/1.png"], ["car/1.png", "train/1.png", "val/1.png"], ["car", "train", "val"]),
    *((["train/a/1.png", "train/b/1.png", *(f"{other}/2.png" for other in others)], ["a/1.png", "b/1.png"], ["a", "b"])
      for others in (["val"], ["test"], ["validation"], ["valid", "test"], [".cache"], [])),
])
def test_flat_folders_and_splits(folders, used, classes, tmp_path, monkeypatch):
    for name in folders:
        write(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path / "photos")
    for root in (tmp_path / "photos", "."):
        source = ImageFolder(root)
        assert relative(source) == used and source.classes == classes
        assert source.root == Path(root, "train" if classes == ["a", "b"] else "")


def test_folders_without_training_images_are_refused(tmp_path):
    for name in ("splits/val/1.png", "splits/test/1.png", "mixed/a/1.png", "mixed/b.jpg", "hole/a/1.png"):
        write(tmp_path / name)
    for name in ("hole/b", "empty", "text"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text" / "notes.txt").write_text("no image")
    for name, reason in {
        "splits": "splits has test/ but no train/: give {}/splits/test, or add train/",
        "mixed": "mixed contains class folders and the image b.jpg: move the images away",
        "hole": "hole/b contains no images that Pillow reads: fill or remove it",
        "empty": "empty contains no images that Pillow reads: fill or remove it",
        "text": "text contains no images that Pillow reads: fill or remove it",
        "absent": "No such file or directory: '{}/absent'",
        "hole/a/1.png": "Not a directory: '{}/hole/a/1.png'",
    }.items():
        with pytest.raises(OSError if reason.endswith("'") else ValueError, match=reason.format(tmp_path) + "$"):
            ImageFolder(tmp_path / name)


def test_each_real_folder_is_read_once(tmp_path):
    """Links are followed, except those to folders that are read anyway and to folders above the root."""
    data, far = tmp_path / "up" / "data", tmp_path / "far"
    for path in (data / "cat/1.png", data / "cat/deep/2.png", data / "dog/3.png", far / "shared/4.png",
                 far / "shared/inside/5.png", far / "birds/6.png", far / "other/7.png", tmp_path / "up/val/8.png"):
        write(path)
    for link, target in {"cat/latest": data, "cat/up": data.parent, "cat/top": tmp_path, "cat/self": data / "cat",
                         "cat/deep/dog": data / "dog", "cat/shared": far / "shared", "dog/shared": far / "shared",
                         "bird": far / "birds", "dog/birds": far / "birds"}.items():
        (data / link).symlink_to(target)
    (far / "shared" / "back").symlink_to(far)  # above a linked folder: read, except for what was read before
    (far / "shared" / "inside" / "root").symlink_to("/")
    source = ImageFolder(data)
    assert source.classes == ["bird", "cat", "dog"] and source.labels.tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert relative(source) == ["bird/6.png", "cat/1.png", "cat/deep/2.png", "cat/shared/4.png",
                                "cat/shared/back/other/7.png", "cat/shared/inside/5.png", "dog/3.png"]


@pytest.mark.parametrize("unreadable", ["", "a", "b/deep", "b/link"])
def test_a_folder_without_read_permission_is_an_error(unreadable, tmp_path, monkeypatch):
    """The error comes from a mock, as the user root may read all folders."""
    for name in ("data/a/1.png", "data/b/deep/2.png", "far/3.png"):
        write(tmp_path / name)
    (tmp_path / "data" / "b" / "link").symlink_to(tmp_path / "far")
    path = str(tmp_path / "data" / unreadable)

    def scandir(folder, works=os.scandir):
        if os.fspath(folder) == path:
            raise PermissionError(13, "Permission denied", path)
        return works(folder)

    assert len(ImageFolder(tmp_path / "data")) == 3
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError) as error:
        ImageFolder(tmp_path / "data")
    assert error.value.filename == path


def test_summary_of_classes_and_skipped_files(tmp_path):
    assert encoders.Shapes(8, 8).summary() == "shapes: 8 images, drawn on the fly, 10 classes"
    data = tmp_path / "data"
    for path in (data / "b/1.png", data / "a/x/2.jpg", *(data / c / "3.png" for c in "cdef")):
        write(path)
    for name in (*(f"a/{i}.heic" for i in range(20)), "b/paper.pdf", "a/x/LICENSE", "b/4.heic", "list.txt", "a/.a.txt"):
        (data / name).write_text("")
    source = ImageFolder(data)
    assert source.summary().startswith(f"{data}: 6 images, 6 classes (a, b, c, d, e, ...); skipped files: .heic 21, ")
    assert source.skipped == {".heic": 21, ".pdf": 1, "without extension": 1, ".txt": 1}
    shapes = encoders.image_source("shapes", 48)
    assert len(shapes) == 8000 and shapes.open(0)[0].size == (48, 48) and len(encoders.image_source(data, 48)) == 6


def test_names_that_are_not_utf_8(tmp_path):
    """The images are read; say(), which prints the summary, replaces what cannot be encoded."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write(root / os.fsdecode(b"caf\xe9") / "1.png")
    (root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"2.\xe9")).write_text("")
    source = ImageFolder(root)
    assert source.open(0)[1] == 0 and [os.fsencode(name) for name in source.classes] == [b"caf\xe9"]
    for folder in (source, ImageFolder(root / os.fsdecode(b"caf\xe9"))):
        summary = folder.summary().encode(errors="replace")
        assert summary.endswith(b": 1 images, 1 classes (caf?); skipped files: .? 1")


def saved(path, image, **options):
    image.save(path, **options)
    return encoders.open_image(path)


def test_every_mode_becomes_rgb(tmp_path):
    equal = np.testing.assert_array_equal
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    color = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_90), Image.new("L", (16, 16), 40)))
    grey_rgb = np.asarray(grey)[..., None].repeat(3, 2)
    equal(saved(tmp_path / "grey.png", grey), grey_rgb)
    equal(saved(tmp_path / "rgb.png", color), color)
    equal(saved(tmp_path / "bit.png", grey.convert("1")), np.asarray(grey.convert("1").convert("RGB")))
    equal(saved(tmp_path / "cmyk.tif", color.convert("CMYK")), color)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE)
    equal(saved(tmp_path / "palette.png", palette), palette.convert("RGB"))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # as in the PNG standard
    equal(saved(tmp_path / "16.png", sixteen), grey_rgb)
    equal(saved(tmp_path / "16.tif", sixteen), grey_rgb)
    (tmp_path / "16.pgm").write_bytes(b"P5\n16 16\n65535\n" + np.asarray(sixteen).astype(">u2").tobytes())
    (tmp_path / "12.pgm").write_bytes(b"P5\n2 1\n4095\n" + np.array([0, 4095], ">u2").tobytes())
    equal(encoders.open_image(tmp_path / "16.pgm"), grey_rgb)
    equal(encoders.open_image(tmp_path / "12.pgm"), [[[0] * 3, [255] * 3]])


def test_values_of_unknown_range_are_refused(tmp_path):
    """Pillow's conversion would clip them silently."""
    values = np.array([[0, 257, 2570], [25700, 40092, 70000]])
    floats, longs = (Image.fromarray(values.astype(kind)) for kind in (np.float32, np.int32))
    floats.save(tmp_path / "F.tif")
    longs.save(tmp_path / "I.tif")
    longs.point(lambda value: value * 0 + 3).save(tmp_path / "I2.tif", compression="tiff_lzw")  # within 8 bits
    floats.save(tmp_path / "F.spider", "SPIDER")
    (tmp_path / "F.pfm").write_bytes(b"Pf\n3 2\n-1.0\n" + values.astype("<f4").tobytes())
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"^mode {path.name[0]}: the range of its values is unknown, save it"):
            encoders.open_image(path)


def test_strips_are_refused_before_they_are_decoded(tmp_path, monkeypatch, capfd):
    """Crops would enlarge these files of 99 bytes to gigabytes."""
    sizes = {"5000x1.png": (5000, 1), "1x51.gif": (1, 51), "2x102.bmp": (2, 102), "40x2001.jpg": (40, 2001)}
    for name, size in sizes.items():
        Image.new("L", size).save(tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
            patch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
            encoders.open_image(tmp_path / name)
        assert str(error.value) == f"{size[0]} x {size[1]} pixels: one side is more than 50 times the other"
    for size in ((50, 1), (40, 2000)):
        assert saved(tmp_path / "long.png", Image.new("L", size)).size == size
    images = Images(ImageFolder(tmp_path), functools.partial(random_crop, resize=8, size=8))
    assert all(images[index, index][0].shape == (3, 8, 8) for index in range(5))
    assert capfd.readouterr().err.count(" pixels: one side is more than 50 times the other)\n") == 4


def test_transparency_is_on_white(tmp_path):
    alpha, ink = np.tile(np.array([0, 51, 255], np.uint8), (2, 1)), np.full((2, 3), 100, np.uint8)
    expected = np.array([255, 100 * 0.2 + 255 * 0.8, 100]).round()
    rgba = Image.fromarray(np.stack([ink, ink, ink, alpha], 2))
    for name, image in {"rgba.png": rgba, "la.png": Image.fromarray(np.stack([ink, alpha], 2))}.items():
        result = np.asarray(saved(tmp_path / name, image)).astype(float)
        np.testing.assert_allclose(result, np.broadcast_to(expected[:, None], (2, 3, 3)), atol=1, err_msg=name)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    result = np.asarray(saved(tmp_path / "p.png", palette, transparency=0))
    np.testing.assert_array_equal(result, [[[255, 255, 255], [200, 100, 50]]])
    key = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    result = np.asarray(saved(tmp_path / "key.png", key, transparency=(9, 9, 9)))
    np.testing.assert_array_equal(result, [[[255, 255, 255], [1, 2, 3]]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    stored = upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the stored image, by its tag
    if orientation in undo:
        stored = upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(saved(tmp_path / "photo.png", stored, exif=exif), upright)


@pytest.mark.parametrize("size", [(37, 101), (101, 37), (24, 24), (9, 200), (200, 200)])
def test_random_crop_is_a_window_of_the_resized_image(size):
    image = Image.effect_noise(size, 90).convert("RGB")
    scale = 24 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    assert min(resized.size) == 24
    offsets = {resized.crop((left, top, left + 16, top + 16)).tobytes(): (left, top)
               for left in range(resized.width - 15) for top in range(resized.height - 15)}
    sampled = [offsets[random_crop(image, 24, 16, np.random.default_rng(i)).tobytes()] for i in range(400)]
    for axis, side in enumerate(resized.size):
        found = {offset[axis] for offset in sampled}
        if side < 40:
            assert found == set(range(side - 15)), "every offset occurs"
        else:
            assert min(found) < 10 and max(found) > side - 26


def test_crops_of_the_diffusion_model():
    image = Image.effect_noise((40, 70), 90).convert("RGB")
    plain = encoders.center_crop(image, 16)
    crops = [encoders.center_crop_flip(image, 16, np.random.default_rng(i)).tobytes() for i in range(200)]
    mirrored = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(crops) == {plain.tobytes(), mirrored}
    assert 70 < crops.count(mirrored) < 130
    assert {encoders.center_crop_flip(image, 16, np.random.default_rng(i), flip=0).tobytes() for i in range(50)} == {
        plain.tobytes()}


def test_shapes_are_a_function_of_seed_and_index():
    first, again, other = encoders.Shapes(40, 32), encoders.Shapes(30, 32), encoders.Shapes(40, 32, seed=1)
    again.open(25)  # the order of opening does not matter
    for i in range(30):
        (a, label), (b, _), (c, _) = first.open(i), again.open(i), other.open(i)
        assert a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()
        assert (a.mode, a.size, label) == ("RGB", (32, 32), i % len(first.classes))
    assert len({first.open(i)[0].tobytes() for i in range(40)}) == len(first) == 40 and len(first.classes) == 10


def test_shapes_are_bright_on_dark_and_differ_in_form():
    masks = []
    for label in range(10):
        images = np.stack([np.asarray(encoders.Shapes(100, 32).open(label + 10 * i)[0]).max(2) for i in range(10)])
        masks.append((images > 120).mean(0))
        assert (images[:, :2, :2] <= 76).all() and (images > 150).any((1, 2)).all()
    assert min(np.abs(a - b).mean() for i, a in enumerate(masks) for b in masks[:i]) > 0.02


def batches(steps, batch=6, micro_batch=3, seed=0, world_size=1, count=20):
    """The items of each step, over all ranks and micro-batches in order."""
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
    """A batch may be larger than the data set, and training can resume at any step."""
    stream = [item for items in batches(range(20)).values() for item in items]  # 120 = 6 epochs of 20
    orders = [[index for index, _ in stream[i : i + 20]] for i in range(0, 120, 20)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6, "each epoch has another order"
    assert len({key for _, key in stream}) == 120, "and each image another key"
    assert all(0 <= key < 2**63 for _, key in stream)
    large = batches(range(2), batch=50, micro_batch=10)
    assert [item for items in large.values() for item in items] == stream[:100]
    whole = batches(range(12))
    for start in (1, 3, 4, 11):
        assert batches(range(start, 12)) == {step: whole[step] for step in range(start, 12)}
    assert batches(range(12), seed=1) != whole


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (1, 6), (2, 3), (3, 2), (2, 2), (6, 1), (1, 4)])
def test_a_step_depends_neither_on_processes_nor_on_the_micro_batch(world_size, micro_batch):
    assert batches(range(8), micro_batch=micro_batch, world_size=world_size) == batches(range(8))


def test_errors_of_a_transform_are_raised_as_they_are(tmp_path, capfd):
    for source in (encoders.Shapes(10, 16), ImageFolder(make_images(tmp_path, 2))):
        images = Images(source, functools.partial(random_crop, resize=8, size=16))
        with pytest.raises(ValueError, match="^high <= 0$"):
            images[0, 0]
        assert not images.unreadable.any() and not capfd.readouterr().err


def test_loader_processes_yield_the_same_images():
    images = Images(encoders.Shapes(20, 16), functools.partial(random_crop, resize=24, size=16))
    parts = list(encoders.training_batches(20, 6, 3, range(2), 0))
    one, two = (list(encoders.make_loader(images, parts, workers, "cpu")) for workers in (0, 2))
    assert len(one) == 4 and one[0][0].shape == (3, 3, 16, 16) and one[0][0].dtype == torch.uint8
    assert one[0][1].shape == one[0][2].shape == (3,)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    index, key = parts[0][1]
    assert one[0][2][1] == key and one[0][1][1] == index % 10
    again = random_crop(encoders.Shapes(20, 16).open(index)[0], 24, 16, np.random.default_rng(key))
    assert ImageChops.difference(Image.fromarray(one[0][0][1].numpy().transpose(1, 2, 0)), again).getbbox() is None


def test_loader_processes_need_no_fork(tmp_path, monkeypatch):
    """Sources and transforms can be sent to a spawned process; it marks unreadable files for all processes."""
    folder = ImageFolder(make_images(tmp_path, 4, (16, 16)))
    (tmp_path / "0001.png").write_text("text")
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", spawn)
    with pytest.raises(ValueError, match="^1 images in .* cannot be read, see above"):
        list(encoders.evaluation_batches(folder, range(4), 8, 2, 1, "cpu"))
    for transform in (functools.partial(random_crop, resize=12, size=8),
                      functools.partial(encoders.center_crop_flip, size=8)):
        for source in (folder, encoders.Shapes(4, 8)):
            images = Images(source, transform)
            same = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(images))
            assert torch.equal(same[2, 6][0], images[2, 6][0])


def test_number_of_loader_processes(monkeypatch):
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
    for workers, device in ((0, "cpu"), (2, "cpu"), (0, "cuda"), (2, "cuda:1")):
        loader = encoders.make_loader(Images(encoders.Shapes(4, 8), crop), [[(0, 0)]], workers, device)
        assert (loader.num_workers, loader.pin_memory) == (workers, "cuda" in device)
        assert loader.multiprocessing_context is None, "Python's default"


def crop(image, rng):
    return encoders.center_crop(image, 8)


BROKEN = {1: "truncated", 2: "text", 5: "empty", 7: "vanished"}


@pytest.fixture
def damaged(tmp_path):
    """Twelve images in classes a and b, with their index as colour; four of them broken."""
    paths = [tmp_path / "ab"[i // 6] / f"{i:02}.png" for i in range(12)]
    for i, path in enumerate(paths):
        write(path, color=(20 * i, 0, 0))
    source = ImageFolder(tmp_path)
    Image.effect_noise((40, 40), 90).save(paths[1])
    os.truncate(paths[1], 700)
    paths[2].write_text("not an image")
    paths[5].write_bytes(b"")
    paths[7].unlink()
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_once_and_replaced(workers, damaged, tmp_path, capfd):
    """Over five epochs and all loader processes.

    The replacement, with its own label, is a function of the key; if it is broken too, the next number replaces it.
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_names_all_unreadable_images(workers, damaged, capfd):
    """The error comes at the end; the other images are in order."""
    seen = []
    with pytest.raises(ValueError, match=f"^{len(BROKEN)} images in .* cannot be read, see above: repair or remove"):
        for pixels in encoders.evaluation_batches(damaged, range(12), 4, 1, workers, "cpu"):
            seen.append(pixels[0, 0])
    assert all((seen[i] == 20 * i).all() for i in range(12) if i not in BROKEN) and len(seen) == 12
    assert capfd.readouterr().err.count("cannot read ") == len(BROKEN)


def test_a_hundred_unreadable_images_in_a_row_are_an_error(tmp_path, capfd):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("not an image")
    images, opened = Images(ImageFolder(tmp_path), crop), []
    images.source.open = lambda index, open=images.source.open: opened.append(index) or open(index)
    with pytest.raises(ValueError) as error:
        images[0, 5]
    assert len(opened) == 100 and set(opened) == {0, 1, 2}
    assert str(error.value) == (f"100 images in a row could not be read, the last one {tmp_path}/{opened[-1]}.png: "
                                "check the data folder")
    assert capfd.readouterr().err.count("cannot read ") == 3
