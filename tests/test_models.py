"""The models: sizes, checkpointing, initialisation, the decoder's output, flow matching, sampling, checkpoints."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import published_decoder, published_dit, randomize
from torch import nn

import decoder as decoders
import dit as dits
from decoder import Decoder, from_published, image_grid, load_decoder, patchify, to_uint8, unpatchify
from dit import (DiT, config_from_state, denormalize, flow_matching_loss, guided, load_dit, normalize,
                 sample, sample_noise, shift_strength, time_shift)

TINY = dict(latent_dim=12, grid=3)
HEAD = TINY | dict(num_classes=5) | dits.SIZES["DiT-DH-tiny"] | dict(depth=2, head_depth=3)
PLAIN = {key: value for key, value in HEAD.items() if "head_" not in key}
PIXELS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(batch=2, seed=1):
    return randn(batch, 12, 3, 3, seed=seed)


def tiny_decoder(seed=0):
    return randomize(Decoder(**TINY, **decoders.SIZES["ViT-tiny"] | dict(patch=4, depth=2, mlp=100) | PIXELS), seed)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and shapes


def millions(model):
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


DITS = {"DiT-S": 33.6, "DiT-B": 131.7, "DiT-L": 459.7, "DiT-XL": 677.0, "DiT-DH-S": 196.4, "DiT-DH-B": 294.1,
        "DiT-DH-L": 621.5, "DiT-DH-XL": 838.4}


@pytest.mark.parametrize("name", DITS)
@pytest.mark.filterwarnings("ignore:.*Theorem 1")
def test_diffusion_model_sizes(name):
    """Parameter counts of the paper's table; config_from_state recognises each size in a published state dict."""
    with torch.device("meta"):
        model = DiT(768, 16, 1000, **dits.SIZES[name])
    assert millions(model) == DITS[name]
    config = config_from_state(model.state_dict() | {"pos_embed": model.pos_embed})
    assert model.config | config == model.config
    assert config.keys() >= {"width", "depth", "heads", "grid", "num_classes", "latent_dim"}


@pytest.mark.parametrize("name, count", {"ViT-B": 86.2, "ViT-L": 303.9, "ViT-XL": 415.1}.items())
def test_decoder_sizes(name, count):
    with torch.device("meta"):
        model = Decoder(**decoders.SIZES[name])
        assert millions(model) == count and model.image_size == 256
        config, state = from_published(published_decoder(model))
        assert config == {key: value for key, value in model.config.items() if key not in ("mean", "std")}
        model.load_state_dict(state, assign=True)
        config, _ = from_published(published_decoder(Decoder(grid=16, patch=32, depth=1)))
    assert (config["grid"], config["patch"]) == (16, 32)  # decoder upsampling


def test_a_model_narrower_than_its_tokens_warns():
    for name, latent_dim, width in (("DiT-S", 768, 384), ("DiT-B", 1024, 768), ("DiT-DH-XL", 2049, 2048)):
        with torch.device("meta"), pytest.warns(UserWarning, match="Theorem 1") as warned:
            DiT(latent_dim, **dits.SIZES[name])
        assert f"width {width} " in str(warned[0].message) and f"{latent_dim}-wide" in str(warned[0].message)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        DiT(768, **dits.SIZES["DiT-DH-S"])  # the wide head maps x_t to v
        DiT(768, **dits.SIZES["DiT-B"])  # as wide as the tokens is enough


@pytest.mark.parametrize("shape", [(2, 12, 4, 9), (2, 12, 9, 4), (2, 8, 6, 6), (2, 12, 36), (12, 6, 6), (2, 12, 3, 3)])
def test_latents_of_another_shape_are_refused(shape):
    """4 x 9 latents have as many tokens as 6 x 6 ones, and would get the wrong positions."""
    x, t, y = torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[0], dtype=torch.long)
    for model, given in [(DiT(12, 6, 3, 16, 1, 2), (x, t, y)), (Decoder(12, 6, 2, 16, 1, 2, 16), (x,))]:
        model(torch.zeros(2, 12, 6, 6), *(value[:1].expand(2) for value in given[1:]))
        with pytest.raises(ValueError) as error:
            model(*given)
        assert str(shape) in str(error.value) and "(12, 6, 6)" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing, precision


def gradients(model, *inputs):
    """The output, and the gradients at the parameters and the first input."""
    first, *others = inputs
    first = first.clone().requires_grad_()
    model.train().requires_grad_(True)
    out = model(first, *others)
    leaves = [first, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]


@pytest.mark.parametrize("kind", ["DiT", "DiT-DH", "decoder"])
def test_activation_checkpointing_recomputes_and_changes_no_gradient(kind):
    model = tiny_decoder() if kind == "decoder" else randomize(DiT(**(HEAD if kind == "DiT-DH" else PLAIN)))
    inputs = (latents(),) if kind == "decoder" else (latents(), torch.tensor([0.2, 0.9]), torch.tensor([3, 5]))
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, *inputs)
    assert len(calls) == len(model.blocks)
    model.checkpointing = True
    for ours, plain in zip(gradients(model, *inputs), expected, strict=True):
        assert torch.equal(ours, plain)
    assert len(calls) == 3 * len(model.blocks)
    model.eval()(*inputs).sum().backward()
    assert len(calls) == 4 * len(model.blocks), "only in training"


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, HEAD], ids=["DiT", "DiT-DH"])
def test_bfloat16_autocast_is_close_to_float32(config):
    model = randomize(DiT(**config, qk_norm=True))
    given = latents(), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    expected = model(*given)
    streams, blocks = [], model.blocks[-3:] if model.has_head else []  # of the head; the trunk's are bfloat16
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        v = model(*given).float()
        times = model.t_embedder(given[1])
    assert ((v - expected).norm() / expected.norm()).item() < 0.03
    assert torch.equal(times, model.t_embedder(given[1])), "times are embedded in float32"
    assert streams == [torch.float32] * len(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("config", [PLAIN, HEAD], ids=["DiT", "DiT-DH"])
def test_initialisation_of_the_diffusion_models(config):
    torch.manual_seed(0)
    model = DiT(**config)
    given = latents(), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    assert not model(*given).any(), "the model starts as v = 0"
    x = randn(2, 9, 96)
    assert torch.equal(model.blocks[0](x, randn(2, 1, 96), model.rope), x), "a block starts as the identity"
    mlp = model.t_embedder.mlp
    for weight in (mlp[0].weight, mlp[2].weight, model.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.t_embedder.W.std().item() == pytest.approx(1, rel=0.15)
    for embedder in [model.x_embedder] + ([model.s_embedder] if model.has_head else []):
        limit = math.sqrt(6 / (12 + len(embedder.proj.bias)))  # Xavier's
        assert 0.95 * limit < embedder.proj.weight.abs().max() <= limit and not embedder.proj.bias.any()
    qkv = model.blocks[0].attn.qkv
    limit = 1 / math.sqrt(96) if model.has_head else math.sqrt(6 / (96 + 3 * 96))  # torch's default, or Xavier's
    assert 0.95 * limit < qkv.weight.abs().max() <= limit
    assert bool(qkv.bias.any()) == model.has_head


def test_the_decoder_starts_from_torch_defaults():
    torch.manual_seed(0)
    model = Decoder(**TINY, patch=4, width=128, depth=2, heads=4, mlp=100)
    assert not model.cls.any()
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        limit = 1 / math.sqrt(layer.in_features)
        for value in (layer.weight, layer.bias):
            assert 0.9 * limit < value.abs().max() <= limit
    for norm in (model.norm, model.blocks[0].norm1):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The decoder's output and hidden states


def test_patchify_and_its_inverse():
    images = randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(unpatchify(patches, 4), images)
    wide = randn(2, 3, 4, 12)
    for token, column in [(0, 0), (2, 8)]:  # row by row; in a patch: row, column, channel
        expected = wide[:, :, :, column : column + 4].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(patchify(wide, 4)[:, token], expected)


def test_hidden_states_are_the_input_of_the_last_layer():
    model = tiny_decoder()
    images, h = model(latents(), return_hidden=True)
    assert torch.equal(images, model(latents())) and images.shape == (2, 3, 12, 12)
    assert torch.equal(unpatchify(model.to_pixels(h), 4) * model.std + model.mean, images)


def test_pixels_are_clamped_and_rounded():
    pixels = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 7.0]).expand(1, 3, 2, 8)
    assert to_uint8(pixels)[0, 1, :, 2].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_image_grid_is_filled_row_by_row():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 4, 6, 3)
    for gap in (0, 1, 2):
        picture = np.asarray(image_grid(images, 3, gap))
        expected = np.full((2 * 4 + gap, 3 * 6 + 2 * gap, 3), 255)
        for i in range(5):
            top, left = i // 3 * (4 + gap), i % 3 * (6 + gap)
            expected[top : top + 4, left : left + 6] = i
        np.testing.assert_array_equal(picture, expected)
        assert image_grid(images[:2], 8, gap).size == (12 + gap, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching


def test_normalised_latents():
    z = 3 * latents(100) + 7
    stats = {"mean": z.mean(0), "var": z.var(0, correction=0)}
    x = normalize(z, stats)
    torch.testing.assert_close(x.mean(0), torch.zeros(12, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(12, 3, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(denormalize(x, stats), z)
    point, two = {"mean": torch.ones(1, 1, 1), "var": torch.zeros(1, 1, 1)}, torch.full((1, 1, 1, 1), 2.0)
    assert normalize(two, point).item() == pytest.approx(1 / math.sqrt(1e-5))
    assert denormalize(two, point).item() == pytest.approx(1 + 2 * math.sqrt(1e-5), abs=1e-6)


def test_time_shift():
    assert shift_strength((768, 16, 16)) == pytest.approx(math.sqrt(48)) == pytest.approx(6.93, abs=0.005)
    assert shift_strength((768, 32, 32)) == pytest.approx(13.86, abs=0.005)
    assert shift_strength((8, 4, 4)) == 1 and shift_strength((8, 4, 4), base=32) == 2
    t = torch.linspace(0, 1, 1001)
    for a in (1.0, 2.0, shift_strength((384, 8, 8)), shift_strength((768, 16, 16))):  # the third: above 1
        shifted = time_shift(t, a)
        assert shifted[0] == 0 and shifted[-1] == 1 and (shifted <= 1).all()
        assert (shifted.diff() > 0).all() and (shifted >= t - 1e-6).all(), "towards noise"
        torch.testing.assert_close(time_shift(shifted, 1 / a), t, atol=1e-5, rtol=0)
    assert time_shift(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)


def test_flow_matching_loss():
    """0 for the exact velocity; for v = 0 the mean square of noise - x, for each image."""
    x, noise, y = latents(3), latents(3, seed=2), torch.tensor([4, 0, 2])
    t = torch.tensor([0.0, 0.3, 1.0])

    def exact(x_t, times, labels):
        assert torch.equal(times, t) and torch.equal(labels, y)
        torch.testing.assert_close(x_t[0], x[0])
        torch.testing.assert_close(x_t[1], 0.7 * x[1] + 0.3 * noise[1])
        torch.testing.assert_close(x_t[2], noise[2])
        return noise - x

    assert flow_matching_loss(exact, x, y, t, noise).tolist() == [0, 0, 0]
    losses = flow_matching_loss(lambda x_t, t, y: torch.zeros_like(x_t, dtype=torch.bfloat16), x, y, t, noise)
    torch.testing.assert_close(losses, ((noise - x) ** 2).flatten(1).mean(1))
    assert losses.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_the_weak_model_runs_only_with_guidance_and_inside_the_interval():
    calls = []

    def model(x, t, y):
        calls.append(("model", len(x), y.tolist()))
        return x

    def weak(x, t, y):
        calls.append(("weak", len(x), y.tolist()))
        return 0 * x

    model.null_class = 9
    x, y = torch.ones(2, 1, 1, 1), torch.tensor([3, 4])
    for scale, guide, t, expected in [
        (1.0, weak, 0.5, [("model", 2, [3, 4])]),
        (1.0, None, 0.5, [("model", 2, [3, 4])]),
        (2.0, weak, 0.5, [("model", 2, [3, 4]), ("weak", 2, [3, 4])]),  # no doubled batch
        (2.0, None, 0.5, [("model", 2, [3, 4]), ("model", 2, [9, 9])]),
        (2.0, weak, 0.9, [("model", 2, [3, 4])]),
        (2.0, weak, 0.1, [("model", 2, [3, 4])]),
        (2.0, weak, 0.8, [("model", 2, [3, 4]), ("weak", 2, [3, 4])]),  # the interval is closed, even if
        (2.0, weak, 0.35, [("model", 2, [3, 4]), ("weak", 2, [3, 4])]),  # its ends are not float32 numbers
    ]:
        calls.clear()
        v = guided(model, y, scale, guide, interval=(0.35, 0.8))(x, torch.tensor(t))
        assert calls == expected
        assert v.flatten().tolist() == ([2, 2] if len(expected) == 2 and guide else [1, 1])


def test_noise_of_a_sample_depends_on_seed_and_index_alone():
    noise = sample_noise(3, [5, 0, 7], (2, 4, 4))
    assert noise.shape == (3, 2, 4, 4) and noise.dtype == torch.float32
    assert torch.equal(sample_noise(3, [7], (2, 4, 4))[0], noise[2])
    for seed, index in [(4, 7), (4, 6), (7, 3)]:
        assert not torch.equal(sample_noise(seed, [index], (2, 4, 4))[0], noise[2])
    many = sample_noise(0, range(500), (4, 4, 4))
    assert many.mean().item() == pytest.approx(0, abs=0.02) and many.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (4, 1.0), (7, 6.93)])
def test_a_straight_path_is_integrated_exactly(steps, shift):
    """For data in one point z the velocity is (x_t - z) / t: every estimate is z, and Euler's method ends there."""
    z, noise = randn(1, 3, 2, 2, seed=5), randn(4, 3, 2, 2)
    estimates, times = [], []

    def velocity(x, t):
        assert t.shape == () and t.dtype == torch.float32 and t.device.type == "cpu"
        assert not torch.is_grad_enabled()
        times.append(t)
        torch.testing.assert_close(x, (1 - t) * z + t * noise, rtol=1e-4, atol=1e-5)
        return (x - z) / t

    x = sample(velocity, noise, steps, shift, estimates)
    assert len(estimates) == steps
    assert torch.equal(torch.stack(times), time_shift(torch.linspace(1, 0, steps + 1), shift)[:-1])
    for estimate in estimates:
        torch.testing.assert_close(estimate, z.expand_as(noise), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x, z.expand_as(noise), rtol=1e-4, atol=1e-5)


def test_estimates_change_nothing_and_end_with_the_sample():
    velocity, noise, estimates = guided(randomize(DiT(**HEAD)), torch.tensor([1, 2]), 1.5), latents(), []
    x = sample(velocity, noise, shift=3.0, estimates=estimates)
    assert torch.equal(x, sample(velocity, noise, shift=3.0))
    assert len(estimates) == 50 and torch.equal(estimates[-1], x), "50 is the paper's number of steps"
    torch.testing.assert_close(estimates[0], noise - velocity(noise, torch.tensor(1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def saved(path, state, other, prefix, wrap):
    """Save a state dict as it is, or under the key `wrap`; beside an EMA, the model's weights are `other`."""
    state, other = ({prefix + key: value for key, value in part.items()} for part in (state, other))
    torch.save(({"model": other} if wrap == "ema" else {}) | {"opt": {"lr": 1.0}, wrap: state} if wrap else state, path)
    return path


def assert_loaded(model, original, *given):
    assert model.config == original.config and torch.equal(model(*given), original(*given))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [None, "ema", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_published_files_load_with_any_prefix_and_the_ema_is_preferred(prefix, wrap, tmp_path):
    decoder, path = tiny_decoder(), tmp_path / "file.pt"
    state, other = published_decoder(decoder), published_decoder(tiny_decoder(seed=1))
    whole = {f"decoder.{key}": value for key, value in state.items()} | {"encoder.norm.weight": torch.ones(3)}
    for weights in (state, whole):
        model, info = load_decoder(saved(path, weights, other, prefix, wrap), PIXELS)
        assert_loaded(model, decoder, latents())
        assert info == {} and load_decoder(path)[0].config["mean"] == [0.485, 0.456, 0.406], "ImageNet's"
    for config in (PLAIN, HEAD, PLAIN | dict(qk_norm=True), HEAD | dict(qk_norm=True)):
        model, other = (randomize(DiT(**config), seed) for seed in (0, 1))
        loaded, info = load_dit(saved(path, published_dit(model), published_dit(other), prefix, wrap))
        assert_loaded(loaded, model, latents(), torch.tensor([0.2, 0.9]), torch.tensor([3, 5]))
        assert info == {}
    for model, load, kind in ((decoder, load_decoder, "decoder"), (randomize(DiT(**HEAD)), load_dit, "dit")):  # ours
        weights = {prefix + key: value for key, value in model.state_dict().items()}
        torch.save(dict(kind=kind, config=model.config, model=weights), path)
        loaded = load(path)[0].state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def our_decoder():
    """A decoder, the required part of its file, and the optional part."""
    model = tiny_decoder()
    encoder = dict(name="dinov2-b", image_size=256, layers=[3])
    return model, dict(kind="decoder", config=model.config, model=model.state_dict()), dict(
        encoder=encoder, tau=0.8, epoch=1.0)


def our_dit():
    """A diffusion model of no size in the table, the required part of its file, and the optional part."""
    model = randomize(DiT(16, 3, 5, 24, 1, 2))
    stats = {"mean": randn(16, 3, 3), "var": randn(16, 3, 3).exp()}
    return model, dict(kind="dit", config=model.config, model=model.state_dict()), dict(
        stats=stats, shift=2.0, label_dropout=0.1, encoder=dict(name="dinov2-b"), epoch=1.0, classes=list("abcde"))


def test_our_decoder_round_trip(tmp_path):
    decoder, file, optional = our_decoder()
    for content, expected in [(file | optional, optional), (file, {})]:
        torch.save(content, tmp_path / "decoder.pt")
        model, info = load_decoder(tmp_path / "decoder.pt", dict(mean=(9, 9, 9), std=(9, 9, 9)))  # the file has its own
        assert_loaded(model, decoder, latents())
        assert info == expected


def test_our_diffusion_model_round_trip(tmp_path):
    model, file, optional = our_dit()
    for content, expected in [(file | optional, optional), (file, {})]:
        torch.save(content, tmp_path / "dit.pt")
        loaded, info = load_dit(tmp_path / "dit.pt")
        assert info.keys() == expected.keys() and info.get("classes") == expected.get("classes")
        assert loaded.num_classes == loaded.null_class == 5
        assert_loaded(loaded, model, randn(2, 16, 3, 3), torch.tensor([0.2, 0.9]), torch.tensor([3, 5]))


def refusal(load, path):
    """The message of a loader for a file that it refuses: one line with the path."""
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500, message
    return message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3])
@pytest.mark.parametrize("load, make", [(load_decoder, our_decoder), (load_dit, our_dit)])
def test_weights_that_are_not_finite_or_not_floating_point_are_refused(load, make, value, tmp_path):
    _, file, _ = make()
    key = list(file["model"])[3]
    weight = file["model"][key].clone()
    weight.view(-1)[0] = value
    file["model"][key] = weight.long() if value == 3 else weight
    torch.save(file, tmp_path / "model.pt")
    assert f"{key} ({file['model'][key].dtype}) has values that are not finite" in refusal(load, tmp_path / "model.pt")


def test_statistics_and_time_shifts_that_cannot_be_right_are_refused(tmp_path):
    _, file, optional = our_dit()
    mean, var = optional["stats"].values()
    for stats in [dict(mean=mean, var=-var), dict(mean=mean * math.nan, var=var), dict(mean=mean, var=var * math.inf),
                  dict(mean=mean[:4], var=var), dict(mean=mean, var=var[None])]:
        torch.save(file | optional | dict(stats=stats), tmp_path / "dit.pt")
        assert "model's shape (16, 3, 3): give others with --stats" in refusal(load_dit, tmp_path / "dit.pt")
    for shift in (0.0, -1.0, math.inf, math.nan):
        torch.save(file | optional | dict(shift=shift), tmp_path / "dit.pt")
        assert f"the time shift {shift} is not positive and finite" in refusal(load_dit, tmp_path / "dit.pt")


def test_files_without_such_a_model_are_refused(tmp_path):
    """Files of other programs, files of the other kind of model, and damaged files."""
    decoder, model = published_decoder(tiny_decoder()), published_dit(randomize(DiT(**HEAD)))
    (_, ours, _), (_, our_model, _) = our_decoder(), our_dit()
    last = dict(settings={}, config=ours["config"], model=our_model["model"], ema=our_model["model"])
    unlike = {"stat.pt": {"mean": None, "var": torch.ones(12, 3, 3)}, "list.pt": [1, 2], "tensor.pt": torch.ones(2),
              "empty.pt": {}, "nested.pt": {"ema": {"a.weight": torch.ones(1)}}, "pickle.pt": nn.Linear(1, 1),
              "none.pt": None, "last.pt": last}
    for name, content in unlike.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("text")
    torch.save(decoder, tmp_path / "decoder.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:-1000])
    (tmp_path / "folder.pt").mkdir()
    for load, others in ((load_decoder, (model, our_model)), (load_dit, (decoder, ours))):
        for name in [*unlike, "text.pt", "cut.pt", "folder.pt", "absent.pt"]:
            message = refusal(load, tmp_path / name)
            assert "give a" in message and "trust" not in message, "no advice to run the code in a pickle"
        assert "FileNotFoundError" in message
        for content in (*others, last):
            torch.save(content, tmp_path / "file.pt")
            kind = "a decoder: give a decoder.pt" if load is load_decoder else "a diffusion model: give a dit.pt"
            assert f"file.pt is not {kind}" in refusal(load, tmp_path / "file.pt")
    for load, content, reason in [
        (load_decoder, decoder | {"decoder_embed.weight": torch.ones(100, 12)}, "file.pt has width 100: the known"),
        (load_dit, model | {"y_embedder.embedding_table.weight": torch.ones(6, 100)}, "widths 100 and 256: known are"),
        (load_decoder, {k: v for k, v in decoder.items() if k != "decoder_norm.bias"}, 'Missing key.*"norm.bias"'),
        (load_decoder, decoder | {"decoder_norm.bias": torch.ones(2)}, "size mismatch for norm.bias"),
        (load_decoder, ours | dict(config={"depths": 1}), "depths"),
        (load_decoder, ours | dict(model={}), 'Missing key.*"cls"'),
        (load_dit, {k: v for k, v in model.items() if k != "t_embedder.W"}, 'Missing key.*"t_embedder.W"'),
        (load_dit, our_model | dict(config={"depths": 1}), "depths"),
    ]:
        torch.save(content, tmp_path / "file.pt")
        error = ValueError if " known" in reason else TypeError if reason == "depths" else RuntimeError  # torch's own
        with pytest.raises(error, match=reason):
            load(tmp_path / "file.pt")
