"""The models reproduce what the reference implementation recorded (tests/golden), to 1e-5 of the largest value."""

import numpy as np
import torch
from conftest import assert_close, golden, read_golden
from PIL import Image

from decoder import Decoder, from_published
from dit import DiT, denormalize, guided, sample, time_shift
from encoder import Encoder, center_crop


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


@golden("encoder")
def test_golden_encoder(file, tmp_path):
    arrays, config, states = read_golden(file)
    torch.save(states["state"], tmp_path / "vit.pth")
    name = {"dinov2": "dinov2-b", "mae": "mae-b", "siglip2": "siglip2-b"}[config["family"]]
    model = Encoder(
        name, image_size=arrays["images"].shape[-1], weights=tmp_path / "vit.pth", img_size=config["native_img_size"],
        patch_size=config["patch_size"], embed_dim=config["embed_dim"], depth=config["depth"],
        num_heads=config["num_heads"], reg_tokens=config["reg_tokens"],
    )
    assert model.input_size == config["img_size"]
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(config["pixel_mean"]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor(config["pixel_std"]))
    assert_close(model(arrays["images"]), arrays["latents"])


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
