"""Stage 1's discriminator, augmentation, losses and schedule against golden values, closed forms and autograd."""

import contextlib
import functools
import math
import re
import types

import pytest
import timm
import torch
from conftest import (TINY_DINO, adaptive_weight_step, assert_close, assert_identical, golden, randomize, read_golden,
                      save_tiny_dino)

import train_decoder
from decoder import Decoder, unpatchify
from train_decoder import (Discriminator, adaptive_weight, compile_blocks, decoder_losses, diffaug, hinge_loss, lr_at,
                           quantize)


@pytest.fixture
def discriminator(tmp_path):
    return Discriminator(save_tiny_dino(tmp_path / "dino.pt"))


def uniform(*shape, seed=0, low=0.0, high=1.0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * (high - low) + low


# ---------------------------------------------------------------------------------------------------------------------
# Discriminator

HEADS = {  # from the published module names and torch's old spectral_norm to ours and torch's parametrisation
    r"^(\d+)\.0\.": r"\1.embed.", r"^(\d+)\.1\.fn\.": r"\1.mix.", r"^(\d+)\.2\.": r"\1.logit.",
    r"weight_orig$": "parametrizations.weight.original", r"weight_([uv])$": r"parametrizations.weight.0._\1",
}


@golden("discriminator")
@torch.no_grad()
def test_golden_discriminator(file, tmp_path, monkeypatch):
    arrays, config, states = read_golden(file)
    torch.save(states["vit"], tmp_path / "dino.pt")
    for key in ("img_size", "patch_size", "embed_dim", "num_heads", "depth"):
        monkeypatch.setitem(train_decoder.DINO, key, config[key])
    model = Discriminator(tmp_path / "dino.pt").eval()
    state = states["heads"]
    for old, new in HEADS.items():
        state = {re.sub(old, new, key): value for key, value in state.items()}
    model.heads.load_state_dict(state)
    assert_close(model(arrays["images"]), arrays["logits"])


def test_backbone_frozen(discriminator):
    before = {key: value.clone() for key, value in discriminator.vit.state_dict().items()}
    trainable = [name for name, parameter in discriminator.named_parameters() if parameter.requires_grad]
    assert trainable and all(name.startswith("heads.") for name in trainable)
    assert len(trainable) == 5 * 2 * (3 + 2), "a head: weight and bias of three convolutions and two norms"
    images = uniform(2, 3, 32, 32)
    features = [discriminator.vit.train(mode).forward_features(images) for mode in (True, False)]
    assert torch.equal(*features), "training mode changes nothing: there is no dropout"
    optimizer = torch.optim.SGD([p for p in discriminator.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    discriminator(uniform(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert_identical(discriminator.vit.state_dict(), before)


def test_gradient_reaches_every_pixel(discriminator):
    """From every head, through one pass of the backbone and the resize, here to a larger size."""
    images, calls = uniform(2, 3, 24, 24, low=-1).requires_grad_(), []
    for block in discriminator.vit.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    logits = discriminator(images)
    assert len(calls) == len(discriminator.vit.blocks) and logits.shape == (2, 5 * 16)
    for head in logits.unflatten(1, (5, 16)).unbind(1):
        (gradient,) = torch.autograd.grad(head.square().sum(), images, retain_graph=True)
        assert gradient.isfinite().all() and (gradient != 0).all()


def test_spectral_norm_bounds_every_convolution(discriminator):
    """After many power iterations the largest singular value of every convolution, as a matrix, is 1."""
    with torch.no_grad():
        for convolution in [part for head in discriminator.heads for part in (head.embed[0], head.mix[0], head.logit)]:
            convolution.parametrizations.weight.original.mul_(7)
            for _ in range(500):
                convolution.weight  # noqa: B018 (in training mode each access is one iteration)
            assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


def test_downloaded_weights_are_timm_s_with_another_gelu(monkeypatch):
    for key in TINY_DINO.keys() & train_decoder.DINO.keys():
        monkeypatch.delitem(train_decoder.DINO, key)
    options = {"model_name" if key == "model" else key: value for key, value in train_decoder.DINO.items()}
    assert options == dict(model_name="vit_small_patch8_224.dino", act_layer="gelu_tanh")
    state, asked = timm.create_model(**options).state_dict(), []
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf",
                        lambda repository, *_, **__: asked.append(repository) or dict(state))
    vit = Discriminator().vit
    assert asked == ["timm/vit_small_patch8_224.dino"] and vit.blocks[0].attn.num_heads == 6 and len(vit.blocks) == 12
    assert {type(block.mlp.act).__name__ for block in vit.blocks} == {"GELUTanh"}
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())


def test_a_file_without_one_of_the_weights_is_refused_in_one_line(tmp_path, caplog):
    state = torch.load(save_tiny_dino(tmp_path / "dino.pt"))
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError) as error:
        Discriminator(tmp_path / "short.pt")
    assert all(part in str(error.value) for part in (str(tmp_path / "short.pt"), "norm.bias", "--dino-weights"))
    assert "\n" not in str(error.value) and not caplog.records


# ---------------------------------------------------------------------------------------------------------------------
# DiffAug


def diffaug_one(image, augment):
    """The definition for an image (3, H, W), pixel by pixel."""
    C, H, W = image.shape
    reach = [int(side / 8 + 0.5) for side in (W, H)]
    right, down = (math.floor(u * (2 * r + 1)) - r for u, r in zip(augment[:2].tolist(), reach, strict=True))
    moved = torch.zeros_like(image)
    for y in range(H):
        for x in range(W):
            if 0 <= y - down < H and 0 <= x - right < W:
                moved[:, y, x] = image[:, y - down, x - right]
    brightness, saturation, contrast = augment[2:].tolist()
    moved = moved + (brightness - 0.5)
    for y in range(H):
        for x in range(W):
            grey = moved[:, y, x].sum() / C
            moved[:, y, x] = grey + (moved[:, y, x] - grey) * 2 * saturation
    mean = moved.sum() / moved.numel()
    return mean + (moved - mean) * (0.5 + contrast)


def shifted(images, offset, dim):
    """Moved by `offset` pixels, filled with zeros."""
    out = images.roll(offset, dim)
    around = range(offset) if offset >= 0 else range(out.shape[dim] + offset, out.shape[dim])
    return out.index_fill(dim, torch.tensor(list(around), dtype=torch.long), 0)


# Random numbers for which diffaug changes nothing: offset 0, + 0, * 1, * 1
STILL = torch.full((5,), 0.5)


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (30, 7)])
def test_diffaug_equals_its_definition(size):
    images, augment = uniform(6, 3, *size, low=-1), uniform(6, 5, seed=1)
    expected = torch.stack([diffaug_one(*pair) for pair in zip(images, augment, strict=True)])
    torch.testing.assert_close(diffaug(images, augment), expected)


@pytest.mark.parametrize("column", range(5))
def test_diffaug_column_alone_covers_its_range(column):
    """A column from 0 to just below 1, with STILL's others: one transform, from end to end of its range."""
    images = uniform(1, 3, 32, 24, low=-1)
    assert torch.allclose(diffaug(images, STILL[None]), images, atol=1e-6)
    augment = STILL.repeat(257, 1)
    augment[:, column] = torch.linspace(0, 1, 257).clamp(max=1 - 2**-24)
    out = diffaug(images.expand(257, -1, -1, -1), augment)
    if column < 2:
        dim, reach = 3 - column, (3, 4)[column]  # an eighth of 24 columns, of 32 rows
        offsets = []
        for image in out:
            (moved,) = [offset for offset in range(-reach, reach + 1)
                        if torch.allclose(shifted(images, offset, dim), image[None], atol=1e-6)]
            offsets.append(moved)
        assert offsets == sorted(offsets) and set(offsets) == set(range(-reach, reach + 1))
        counts = [offsets.count(offset) for offset in range(-reach, reach + 1)]
        assert max(counts) - min(counts) <= 2  # uniform
        return
    low, high = ((-0.5, 0.5), (0, 2), (0.5, 1.5))[column - 2]
    amount = torch.linspace(low, high, 257).view(-1, 1, 1, 1)
    centre = {2: 0, 3: images.mean(1, keepdim=True), 4: images.mean()}[column]
    expected = images + amount if column == 2 else centre + (images - centre) * amount
    torch.testing.assert_close(out, expected)


def test_diffaug_is_differentiable():
    images = uniform(2, 3, 8, 6, low=-1, dtype=torch.float64).requires_grad_()
    augment = uniform(2, 5, seed=2)
    assert torch.autograd.gradcheck(lambda x: diffaug(x, augment), images)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_hinge_loss_closed_form():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, -0.5, 0.0, 2.0]])
    expected = 0.5 * ((0 + 0.5 + 2 + 0) / 4 + (0 + 0.5 + 1 + 3) / 4)
    assert hinge_loss(real, fake).item() == pytest.approx(expected)


def norm(*gradients):
    return math.sqrt(sum(value**2 for gradient in gradients for value in gradient.flatten().tolist()))


STD = torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)


def last_layer_gradient(g, hidden):
    """The gradient at the weight of a linear map to pixels, by autograd; g is the gradient at the images."""
    layer = torch.nn.Linear(hidden.shape[2], 3 * 4 * 4)
    images = unpatchify(layer(hidden), 4) * STD
    return torch.autograd.grad(images, layer.weight, g)[0]


def test_adaptive_weight_definition_and_bounds():
    g_rec, g_gan = uniform(2, 3, 12, 12, low=-1), uniform(2, 3, 12, 12, seed=1, low=-1) * 0.01
    hidden = uniform(2, 9, 8, seed=2, low=-1)
    rec, gan = norm(last_layer_gradient(g_rec, hidden)), norm(last_layer_gradient(g_gan, hidden))
    weight = adaptive_weight(g_rec, g_gan, hidden, STD)
    assert weight.shape == () and weight.item() == pytest.approx(rec / (gan + 1e-6), rel=1e-5)
    small = adaptive_weight(g_rec * 1e-5, g_gan * 1e-5, hidden, STD)  # so small that the 1e-6 has an effect
    assert small.item() == pytest.approx(1e-5 * rec / (1e-5 * gan + 1e-6), rel=1e-5)
    near, above, far = (adaptive_weight(g_rec * (w * 1e-6 / rec), 0 * g_gan, hidden, STD) for w in (9990, 10010, 1e9))
    assert near.item() == pytest.approx(9990, rel=1e-5) and above.item() == far.item() == 1e4, "the bound, exactly"
    assert adaptive_weight(torch.zeros_like(g_rec), g_gan, hidden, STD).item() == 0
    assert not adaptive_weight(g_rec, g_gan, hidden.requires_grad_(), STD).requires_grad


def test_adaptive_weight_is_computed_in_float32():
    """Under autocast too, with hidden states of the decoder in bfloat16."""
    g_rec, g_gan, hidden = (uniform(2, *shape, seed=i, low=-1) for i, shape in enumerate([(3, 12, 12)] * 2 + [(9, 8)]))
    hidden = hidden.bfloat16()
    expected = adaptive_weight(g_rec, g_gan, hidden.float(), STD)
    with torch.autocast("cpu", torch.bfloat16):
        weight = adaptive_weight(g_rec, g_gan, hidden, STD)
    assert weight.dtype == torch.float32 and weight.item() == pytest.approx(expected.item(), rel=1e-6)


@golden("adaptive_weight")
def test_golden_adaptive_weight(file, graphs):
    """With the decoder and losses as in the trainer, eager and traced; for two processes see test_train_decoder.py."""
    for prepare in (lambda model: model, lambda model: compile_blocks(model) or model):
        ours, recorded = adaptive_weight_step(file, prepare=prepare)
        assert {"weight", "rec_norm", "gan_norm"} < ours.keys() == recorded.keys()
        for name in ours:
            assert_close(ours[name], recorded[name], 1e-5)
    assert graphs


def perceptual(a, b):
    """Replaces LPIPS: nonlinear, of each pixel and its neighbour."""
    a, b = (torch.tanh(x + 0.3 * x.roll(1, 3)) for x in (a, b))
    return (a - b).square().mean((1, 2, 3))


def test_decoder_losses_equal_plain_autograd(discriminator):
    """The gradients of L1 + l LPIPS + g w GAN by autograd, with w from two more backward passes to the last layer's
    weight, equal ours, from the gradient at the pixels and one backward pass."""
    discriminator.eval()
    real, z, augment = uniform(2, 3, 32, 32), uniform(2, 8, 4, 4, seed=1, low=-1), uniform(2, 5, seed=2)
    model = randomize(Decoder(8, 4, 8, width=32, depth=1, heads=2, mlp=64)).requires_grad_()

    fake, hidden = model(z, return_hidden=True)
    gradient, losses = decoder_losses(fake, real, perceptual, 0.3, discriminator, 0.6, augment, hidden, model.std)
    assert not gradient.requires_grad and not any(loss.requires_grad for loss in losses.values())
    fake.backward(gradient)
    assert all(parameter.grad is None for parameter in discriminator.parameters())

    out = model(z)
    l1, lpips = (out - real).abs().mean(), perceptual(2 * out - 1, 2 * real - 1).mean()
    gan = -discriminator(diffaug(2 * out - 1, augment)).mean()
    last = functools.partial(torch.autograd.grad, inputs=model.to_pixels.weight, retain_graph=True)
    w = norm(*last(l1 + 0.3 * lpips)) / (norm(*last(gan)) + 1e-6)
    assert 1e-3 < w < 1e4
    for name, expected in dict(l1=l1.item(), lpips=lpips.item(), gan=gan.item(), gan_weight=w).items():
        assert losses.pop(name).item() == pytest.approx(expected, rel=1e-5), name
    assert not losses
    expected = torch.autograd.grad(l1 + 0.3 * lpips + 0.6 * w * gan, list(model.parameters()))
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-6 * reference.abs().max().item())


def test_gradients_are_computed_outside_autocast():
    """Parts of the networks, such as their heads, are float32; inside autocast their backward pass would be bf16."""
    real, fake, matrix = uniform(2, 3, 12, 12), uniform(2, 3, 12, 12, seed=1), uniform(12, 12, seed=2, low=-1)

    @torch.autocast("cpu", enabled=False)
    def network(a, b=0.0):
        return (torch.tanh(a @ matrix) - b).square().mean((1, 2, 3))

    augment, hidden = STILL.expand(2, 5), uniform(2, 9, 8, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        gradient, losses = decoder_losses(fake, real, network, 0.3, network, 0.6, augment, hidden, STD)
        fake.requires_grad_()
        rec = (fake - real).abs().mean() + 0.3 * network(2 * fake - 1, 2 * real - 1).mean()
        gan = -network(diffaug(2 * fake - 1, augment)).mean()
        inside = [torch.autograd.grad(loss, fake, retain_graph=True)[0] for loss in (rec, gan)]
    outside = [torch.autograd.grad(loss, fake)[0] for loss in (rec, gan)]
    assert torch.equal(gradient, outside[0] + 0.6 * losses["gan_weight"] * outside[1])
    assert not any(map(torch.equal, inside, outside))


def test_disabled_losses_are_left_out():
    fake, real = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1)
    gradient, losses = decoder_losses(fake, real)
    torch.testing.assert_close(gradient, (fake - real).sign() / real.numel())
    assert losses.keys() == {"l1"}
    assert decoder_losses(fake, real, perceptual)[1].keys() == {"l1", "lpips"}


def test_quantize_gives_the_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(quantize(levels), levels, rtol=0, atol=1e-7)
    torch.testing.assert_close(quantize(levels + 0.49 / 127.5)[:-1], levels[:-1], rtol=0, atol=1e-7)
    torch.testing.assert_close(quantize(levels - 0.49 / 127.5)[1:], levels[1:], rtol=0, atol=1e-7)
    assert quantize(torch.tensor([-3.0, -1.001, 1.001, 3.0])).tolist() == [-1, -1, 1, 1]


def test_the_host_never_waits_for_the_device(discriminator, monkeypatch):
    """On the meta device .item(), bool() and copies to the host raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which has no meta device
    images = torch.empty(2, 3, 16, 16, device="meta")
    augment, hidden, std = (torch.empty(*shape, device="meta") for shape in ((2, 5), (2, 4, 8), (1, 3, 1, 1)))
    discriminator = discriminator.to("meta")
    gradient, losses = decoder_losses(images, images, perceptual, 1.0, discriminator, 0.75, augment, hidden, std)
    assert gradient.shape == images.shape and losses["gan_weight"].shape == ()
    assert quantize(images).shape == images.shape and hinge_loss(images, images).shape == ()
    assert discriminator(images).shape == (2, 5 * 16)


def test_schedule_closed_form():
    """The recipe: 16 epochs, 1 of warm-up, 2e-4 to 2e-5; ImageNet at batch 512 has 1281167 / 512 steps per epoch."""
    epoch = 1281167 / 512
    args = types.SimpleNamespace(lr=2e-4, lr_end=2e-5, warmup=1.0, epochs=16.0)
    for step in range(0, round(17 * epoch), 97):
        if step < epoch:
            expected = 2e-4 * min(1, (step + 1) / epoch)
        else:  # half a period of a cosine over the 15 epochs after the warm-up
            angle = math.pi * (min(step, 16 * epoch) - epoch) / (15 * epoch)
            expected = (2e-4 + 2e-5) / 2 + (2e-4 - 2e-5) / 2 * math.cos(angle)
        assert lr_at(step, args, epoch) == pytest.approx(expected, rel=1e-12), step
    assert lr_at(round(10 * epoch), args, epoch) == pytest.approx(8.2e-5, abs=0.05e-5)  # the discriminator's


@pytest.mark.parametrize("step, warmup, epochs, expected", [
    (0, 0, 2, 1.0), (5, 0, 2, 0.55), (10, 0, 2, 0.1),  # no warm-up
    (0, 0.8, 0.8, 0.25), (3, 0.8, 0.8, 1.0), (4, 0.8, 0.8, 1.0), (9, 0.8, 0.8, 0.1),  # only warm-up
    (0, 0.1, 2, 1.0), (0, 4, 2, 0.05), (9, 4, 2, 0.5)])  # warm-up of half a step; longer than the run
def test_schedule_at_its_edges(step, warmup, epochs, expected):
    """With five steps per epoch."""
    args = types.SimpleNamespace(lr=1.0, lr_end=0.1, warmup=warmup, epochs=epochs)
    assert lr_at(step, args, 5) == pytest.approx(expected)
