"""The encoder's side: encoders by name, latent statistics, images, crops, the shapes data set, the training order."""

import functools
import os

import numpy as np
import pytest
import timm
import torch
from conftest import published_decoder, randomize
from PIL import Image, ImageChops
from torch import nn

import decoder as decoders
import dit as dits
import encoder as encoders

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
                                  **(encoders.ENCODERS.get(name, {}).get("vit", {}) | vit)).eval()
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
])
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
                            "text.safetensors": "text.safetensors"}.items():
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


def test_files_that_hold_no_statistics(tmp_path):
    """One line that names the file."""
    files = {"list.pt": [1, 2], "tensor.pt": torch.ones(2), "empty.pt": {}, "pickle.pt": nn.Linear(1, 1),
             "decoder.pt": published_decoder(decoders.Decoder(12, 3, 4, 128, 1, 4, 64))}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:-1000])
    (tmp_path / "folder.pt").mkdir()
    for name in [*files, "text.pt", "cut.pt", "folder.pt"]:
        with pytest.raises(ValueError) as error:
            encoders.load_stats(tmp_path / name, (12, 3, 3))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent.pt") as error:
        encoders.load_stats(tmp_path / "absent.pt", (12, 3, 3))
    assert "give" in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def write(path, size=(5, 4), color=(200, 30, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_labels_follow_the_first_level_folders(tmp_path):
    names = ["b/2.png", "b/1.JPEG", "b/deep/er/0.webp", "a/x/y.png", "c/z.bmp"]
    for name in [*names, "b/.hidden.png", "a/.cache/no.png", ".git/no.png", "b/._1.jpg"]:
        write(tmp_path / name)
    for name in ("synsets.txt", "a/readme.md", "b/paper.pdf", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    paths, labels, classes = encoders.find_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        "a/x/y.png", "b/1.JPEG", "b/2.png", "b/deep/er/0.webp", "c/z.bmp"
    ]
    assert labels == [0, 1, 1, 1, 2] and classes == ["a", "b", "c"]
    source = encoders.ImageFolder(tmp_path)
    assert len(source) == 5 and source.classes == classes
    image, label = source.open(3)
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 1)


def test_flat_folder_is_one_class(tmp_path, monkeypatch):
    for name in ("photos/2.png", "photos/10.png", "photos/.hidden.png", "photos/.thumbs/1.png"):
        write(tmp_path / name)
    paths, labels, classes = encoders.find_images(tmp_path / "photos")
    assert [os.path.basename(path) for path in paths] == ["10.png", "2.png"]
    assert labels == [0, 0] and classes == ["photos"]
    monkeypatch.chdir(tmp_path / "photos")
    assert encoders.find_images(".")[2] == ["photos"]


def test_train_and_val_inside_mean_train(tmp_path):
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / "train" / "b" / "1.png")
    assert encoders.find_images(tmp_path)[2] == ["train"]  # without val/ a folder like any other
    write(tmp_path / "val" / "2.png")
    paths, _, classes = encoders.find_images(tmp_path)
    assert classes == ["a", "b"] and [os.path.basename(path) for path in paths] == ["1.png", "1.png"]
    assert len(encoders.find_images(tmp_path / "val")[0]) == 1


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
        images = np.stack([np.asarray(encoders.Shapes(100, 32).draw(label + 10 * i)[0]).max(2) for i in range(10)])
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
    with pytest.raises(ValueError, match="low >= high|high <= 0"):
        encoders.Images(encoders.Shapes(10, 16), lambda image, rng: encoders.random_crop(image, 8, 16, rng))[0, 0]


def test_loader_processes_draw_the_same_images():
    images = encoders.Images(encoders.Shapes(20, 16), lambda image, rng: encoders.random_crop(image, 24, 16, rng))
    one, two = (
        list(encoders.make_loader(images, encoders.training_batches(20, 6, 3, range(2), 0), workers, "cpu"))
        for workers in (0, 2)
    )
    assert len(one) == 4 and one[0][0].shape == (3, 3, 16, 16) and one[0][0].dtype == torch.uint8
    assert one[0][1].shape == one[0][2].shape == one[0][3].shape == (3,)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    index, key = next(encoders.training_batches(20, 6, 3, range(2), 0))[1]
    assert one[0][2][1] == key and one[0][1][1] == index % 10
    assert ImageChops.difference(
        Image.fromarray(one[0][0][1].numpy().transpose(1, 2, 0)),
        encoders.random_crop(encoders.Shapes(20, 16).draw(index)[0], 24, 16, np.random.default_rng(key)),
    ).getbbox() is None


def test_what_data_names(tmp_path):
    shapes = encoders.image_source("shapes", 48)
    assert len(shapes) == 8000 and shapes.open(0)[0].size == (48, 48)
    write(tmp_path / "1.png")
    assert len(encoders.image_source(tmp_path, 48)) == 1
