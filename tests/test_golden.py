"""The models reproduce the reference implementation's outputs in tests/golden, to 1e-5 of the largest value."""

import numpy as np
import timm
import torch
from conftest import assert_close, golden, read_golden
from PIL import Image
from safetensors.torch import save_file

from decoder import SIZES, Decoder, from_published, load_decoder
from dit import DiT, denormalize, guided, load_stats, sample, time_shift
from encoder import ENCODERS, Encoder, center_crop


def dit_from_golden(config, state):
    width, depth, heads = (
        value if isinstance(value, list) else [value, 0]
        for value in (config["hidden_size"], config["depth"], config["num_heads"])
    )
    model = DiT(
        latent_dim=config["in_channels"], grid=config["input_size"], num_classes=config["num_classes"],
        width=width[0], depth=depth[0], heads=heads[0], head_width=width[1], head_depth=depth[1], head_heads=heads[1],
        qk_norm=config.get("use_qknorm", False),
    )
    buffers = {key: state.pop(key) for key in list(state) if key == "pos_embed" or "feat_rope" in key}
    torch.testing.assert_close(model.pos_embed, buffers["pos_embed"])
    model.load_state_dict(state)
    return model.eval()


@golden("dit")
@torch.no_grad()
def test_golden_dit(file):
    arrays, config, states = read_golden(file)
    model = dit_from_golden(config, states["state"])
    assert_close(model(arrays["x"], arrays["t"], arrays["y"]), arrays["v"])


@golden("dit_dh")
@torch.no_grad()
def test_golden_dit_dh(file):
    arrays, config, states = read_golden(file)
    model = dit_from_golden(config, states["state"])
    assert_close(model(arrays["x"], arrays["t"], arrays["y"]), arrays["v"])
    interval = arrays["cfg_interval"].tolist()
    for x, t, y, v in zip(arrays["x"], arrays["t"], arrays["y"], arrays["v_cfg"], strict=True):
        velocity = guided(model, y[None], arrays["cfg_scale"].item(), interval=interval)
        assert_close(velocity(x[None], t), v[None])


@golden("euler")
def test_golden_euler(file):
    arrays, config, states = read_golden(file)
    model = dit_from_golden(config["model"], states["state"])
    weak = dit_from_golden(config["weak"], states["weak_state"])
    noise, y, scale = arrays["noise"], arrays["y"], arrays["scale"].item()
    settings = dict(steps=arrays["steps"].item(), shift=arrays["shift"].item())
    grid = time_shift(torch.linspace(1, 0, settings["steps"] + 1), settings["shift"])
    torch.testing.assert_close(grid, arrays["grid"])
    assert_close(sample(guided(model, y), noise, **settings), arrays["x"])
    assert_close(sample(guided(model, y, scale), noise, **settings), arrays["x_cfg"])
    assert_close(sample(guided(model, y, scale, weak), noise, **settings), arrays["x_autoguidance"])


def encoder_from_golden(config, state, image_size, path):
    """The encoder from a file for --encoder-weights, in which the weights that the encoder drops are 2."""
    name = dict(dinov2="dinov2-b", dinov3="dinov3-l", mae="mae-b", siglip2="siglip2-b")[config["family"]]
    shape = {key: config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    shape |= dict(img_size=config["native_img_size"])
    if config["family"] != "dinov3":  # timm's other ViT always has its four registers
        shape["reg_tokens"] = config["reg_tokens"]
    whole = timm.create_model(ENCODERS[name], **shape).state_dict()
    dropped = {key: torch.full_like(whole[key], 2) for key in whole if key.startswith(("norm.", "attn_pool."))}
    torch.save(state | dropped, path)
    encoder = Encoder(name, image_size, path, config.get("layers", ()), **shape)
    assert encoder.input_size == config["img_size"]
    assert encoder.vit.num_prefix_tokens == config["reg_tokens"] + ("cls_token" in state)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(config["pixel_mean"]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor(config["pixel_std"]))
    return encoder


@golden("encoder")
def test_golden_encoder(file, tmp_path):
    arrays, config, states = read_golden(file)
    encoder = encoder_from_golden(config, states["state"], arrays["images"].shape[-1], tmp_path / "vit.pth")
    assert_close(encoder(arrays["images"]), arrays["latents"])


@golden("encoder_layers")
def test_golden_encoder_layers(file, tmp_path):
    """Order and repetitions of `layers` do not matter; the latents differ from those of the last block alone."""
    arrays, config, states = read_golden(file)
    size = arrays["images"].shape[-1]
    for layers in (config["layers"], config["layers"][::-1] * 2):
        encoder = encoder_from_golden(config | dict(layers=layers), states["state"], size, tmp_path / "vit.pth")
        assert encoder.record["layers"] == sorted(config["layers"])
        assert_close(encoder(arrays["images"]), arrays["latents"])
    last = encoder_from_golden(config | dict(layers=()), states["state"], size, tmp_path / "vit.pth")
    assert (last(arrays["images"]) - arrays["latents"]).abs().max() > 0.05 * arrays["latents"].abs().max()


@golden("center_crop")
def test_golden_center_crop(file):
    arrays, _, _ = read_golden(file)
    for i in range(len(arrays) // 2):
        crop = arrays[f"crop_{i}"].numpy()
        ours = center_crop(Image.fromarray(arrays[f"image_{i}"].numpy()), len(crop))
        np.testing.assert_array_equal(np.asarray(ours), crop)


@golden("decoder")
@torch.no_grad()
def test_golden_decoder(file):
    arrays, config, states = read_golden(file)
    arguments, state = from_published(states["state"])
    expected = {key: config[key] for key in ("latent_dim", "grid", "patch", "depth", "heads", "mlp")}
    assert arguments | {"heads": config["heads"]} == expected | {"width": config["hidden"]}
    model = Decoder(**expected, width=config["hidden"], mean=config["pixel_mean"], std=config["pixel_std"])
    model.load_state_dict(state)
    torch.testing.assert_close(model.positions, states["state"]["decoder_pos_embed"])
    z = denormalize(arrays["z"], {"mean": arrays["latent_mean"], "var": arrays["latent_var"]})
    assert_close(model(z), arrays["image"])


@golden("decoder_diffusers")
@torch.no_grad()
def test_golden_decoder_diffusers(file, tmp_path, monkeypatch):
    """load_decoder with the grid given, and load_stats, from both kinds of file."""
    arrays, config, states = read_golden(file)
    state, (_, C, grid, _) = states["state"], arrays["latents"].shape
    heads = config["decoder_num_attention_heads"]  # no tensor gives their number: the table of sizes does
    monkeypatch.setitem(SIZES, "golden", dict(width=config["decoder_hidden_size"], heads=heads))
    torch.save(state, tmp_path / "model.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        model, info = load_decoder(tmp_path / name, dict(mean=[9.0] * 3, std=[9.0] * 3), grid=grid)  # in the file
        assert info == {} and (model.latent_shape, model.patch) == ((C, grid, grid), config["patch_size"])
        assert len(model.blocks) == config["decoder_num_hidden_layers"]
        assert model.blocks[0].heads == heads
        assert_close(model(arrays["latents"]), arrays["image"])
        stats = load_stats(tmp_path / name, (C, grid, grid))
        assert torch.equal(stats["mean"], state["_latents_mean"])
        var = state["_latents_std"].double().square() - 1e-5
        torch.testing.assert_close(stats["var"].double(), var, rtol=1e-6, atol=0)
