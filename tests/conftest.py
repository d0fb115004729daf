"""Shared by all tests: golden files, small models and images, the scripts in a process or several; no network."""

import atexit
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

# A test that asks for a download fails at once instead of waiting, and finds nothing downloaded before. The hub's
# client reads its variables when it is imported.
os.environ.update(dict.fromkeys(("HF_HOME", "TORCH_HOME"), tempfile.mkdtemp(prefix="torch-home-")),
                  HF_HUB_OFFLINE="1", https_proxy="http://127.0.0.1:9")

import numpy as np
import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
atexit.register(shutil.rmtree, os.environ["HF_HOME"], True)
torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other would cost more


def golden(kind):
    """Parametrise a test over every tests/golden/<kind>.npz and <kind>.<anything>.npz."""
    files = sorted((ROOT / "tests" / "golden").glob(f"{kind}.npz")) + sorted(
        (ROOT / "tests" / "golden").glob(f"{kind}.*.npz")
    )
    assert files, f"no golden file of kind {kind}"
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


def read_golden(file):
    """(arrays as tensors, config, {prefix: state dict}) of a golden file."""
    arrays, config, states = {}, {}, {}
    with np.load(file) as data:
        for key in data:
            if key == "config":
                config = json.loads(data[key].tobytes())
            elif "/" in key:
                prefix, name = key.split("/", 1)
                states.setdefault(prefix, {})[name] = torch.from_numpy(data[key])
            else:
                arrays[key] = torch.from_numpy(data[key])
    return arrays, config, states


def assert_close(ours, recorded, tolerance=1e-5):
    """Largest error below `tolerance` of the largest recorded value."""
    error = ((ours - recorded).abs().max() / recorded.abs().max()).item()
    assert error < tolerance, f"differs by {error:.1e} of the maximum"


def published_decoder(model):
    """The state dict of a Decoder in the key names of the published files: the inverse of decoder.from_published."""
    state = {"trainable_cls_token": model.cls, "decoder_pos_embed": model.positions}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "proj": "attention.output.dense",
             "fc1": "intermediate.dense", "fc2": "output.dense"}
    for kind in ("weight", "bias"):
        for theirs, module in {"embed": model.embed, "norm": model.norm, "pred": model.to_pixels}.items():
            state[f"decoder_{theirs}.{kind}"] = getattr(module, kind)
        for i, block in enumerate(model.blocks):
            for part, value in zip(("query", "key", "value"), getattr(block.qkv, kind).chunk(3), strict=True):
                state[f"decoder_layers.{i}.attention.attention.{part}.{kind}"] = value
            for name, theirs in names.items():
                state[f"decoder_layers.{i}.{theirs}.{kind}"] = getattr(getattr(block, name), kind)
    return {key: value.detach().clone() for key, value in state.items()}


def published_dit(model):
    """The state dict of a DiT as the published files have it, with the tables that they keep."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state | {"pos_embed": model.pos_embed.clone(), "feat_rope.freqs_cos": model.rope[0].clone()}


def randomize(model, seed=0, std=0.1):
    """Random values in every parameter (norms about 1), so that none that starts at zero hides a mistake; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=std, generator=generator).add_("norm" in name and name.endswith("weight"))
    return model.eval().requires_grad_(False)


def weights_by_formula(shapes_file, bias):
    """Weights as tests/golden/README.md makes them: key name -> seed -> values."""
    state = {}
    for key, shape in json.loads((ROOT / "tests" / "golden" / shapes_file).read_text()).items():
        rs = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith(("running_var", "bn.weight")):
            value = 1 + 0.1 * rs.rand(*shape)
        elif key.endswith(("running_mean", "bias")):
            value = bias * rs.standard_normal(shape)
        else:
            value = rs.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


@pytest.fixture(autouse=True)
def signals():
    """The handlers of signals that a script has set do not stay."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Path of Inception's weights, by formula."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights_by_formula("inception_state_shapes.json", 0.1), path)
    return str(path)


@pytest.fixture(scope="session")
def lpips_weights(tmp_path_factory):
    """Paths of VGG16 by formula, its classifier of zeros, and of the published heads, saved as on a GPU."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg, zero = weights_by_formula("vgg16_state_shapes.json", 0.05), torch.zeros(1)  # expanded, it takes no space
    for i, shape in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        vgg |= {f"classifier.{i}.weight": zero.expand(shape), f"classifier.{i}.bias": zero.expand(shape[0])}
    torch.save(vgg, folder / "vgg16.pth")
    arrays, *_ = read_golden(ROOT / "tests" / "golden" / "lpips.npz")
    heads = {f"lin{i}.model.1.weight": arrays[f"lin{i}"].view(1, -1, 1, 1) for i in range(5)}
    with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:0"):
        torch.save(heads, folder / "heads.pth")
    return str(folder / "vgg16.pth"), str(folder / "heads.pth")


TINY_DINO = dict(img_size=32, embed_dim=16, num_heads=2)


def save_tiny_dino(path):
    """A random DINO of 12 blocks and 16 tokens in a file for --dino-weights. From here on train_decoder.py builds such
    a one in the place of ViT-S/8, in this process and in those that start() starts."""
    import train_decoder

    train_decoder.DINO.update(TINY_DINO)
    torch.manual_seed(0)
    options = {key: value for key, value in train_decoder.DINO.items() if key != "model"}
    torch.save(timm.create_model(train_decoder.DINO["model"], **options).state_dict(), path)
    return path


def make_images(folder, count, size=(32, 32), classes=(), seed=0):
    """`count` PNG files of smooth random colours, each with a brightness of its own; in turn in folders `classes`."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        parent = Path(folder) / classes[i % len(classes)] if classes else Path(folder)
        parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 128, (5, 5, 3)) + rng.integers(0, 128, (1, 1, 3))
        Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.BICUBIC).save(parent / f"{i:04}.png")
    return Path(folder)


def rows(out):
    """The rows of a run's log.csv."""
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(value, prefix=""):
    """A nested dictionary of tensors as {path: value}."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{prefix}/{name}").items()}


def assert_identical(a, b):
    """Two checkpoints are equal bit for bit."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        assert same, f"{key} differs"


def start(script, *flags, **environment):
    """A script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [str(ROOT / script)]
    if "--dino-weights" in flags:
        command = ["-c", f"import train_decoder as t; t.DINO.update({TINY_DINO}); t.main()"]
    return subprocess.Popen([sys.executable, *command, *map(str, flags)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def start_ranks(script, *flags, count=2, **environment):
    """A script in `count` processes that know each other, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(script, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(count)]


def finish(*processes, code=0, timeout=180):
    """Wait for processes that have to end with `code` -> what each of them printed."""
    printed = [process.communicate(timeout=timeout)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(printed)[-4000:]
    return printed


def wait_for(condition, *processes, limit=150):
    """Until condition() holds; fails where a process ends before or the time is up."""
    end = time.time() + limit
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        if ended or time.time() > end:
            raise AssertionError([process.kill() or process.communicate()[0][-3000:] for process in processes])
        time.sleep(0.02)


def adaptive_weight_step(file, rank=0, ranks=1, prepare=lambda model: model):
    """A decoder's backward on a golden file of the adaptive weight -> ({name: ours}, {name: recorded}).

    prepare(model) returns what is called in the model's place. Over several processes each has an equal part of the
    images, of which there are then `ranks` of each, so that the recorded means stay.
    """
    import train_decoder
    from decoder import Decoder, from_published

    arrays, config, states = read_golden(file)
    arguments, state = from_published(states["state"])
    model = Decoder(**arguments | dict(heads=config["heads"], mean=config["pixel_mean"], std=config["pixel_std"]))
    model.load_state_dict(state)
    z, target, score = (arrays[key].repeat_interleave(ranks, 0).chunk(ranks)[rank] for key in ("z", "target", "score"))
    still = torch.full((len(z), 5), 0.5)  # draws of diffaug that leave the images as they are
    weigh = train_decoder.adaptive_weight
    with mock.patch.object(train_decoder, "adaptive_weight", wraps=weigh) as watched:
        called = prepare(model)  # kept alive until the backward is done
        fake, hidden = called(z, return_hidden=True)
        gradient, losses = train_decoder.decoder_losses(
            fake, target, discriminator=lambda images: torch.tanh(images) * score, gan_weight=config["gan"],
            augment=still, hidden=hidden, pixel_std=model.std)
    fake.backward(gradient)
    g_rec, g_gan = watched.call_args.args[:2]
    # Without a GAN gradient the weight is the reconstruction's norm over 1e-6; the factor keeps it below its bound.
    rec, gan = (1e-3 * weigh(1e-3 * g, torch.zeros_like(g), hidden, model.std) for g in (g_rec, g_gan))
    ours = dict(weight=losses["gan_weight"], rec_norm=rec, gan_norm=gan)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradients = published_decoder(model)
    recorded = {key: arrays[key] for key in ours} | states["grad"]
    return ours | {key: gradients[key] for key in states["grad"]}, recorded


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile traces from here on. They run as traced: Inductor would take half a minute each."""
    traced, compile_module = [], torch.nn.Module.compile
    torch._dynamo.reset()  # other tests' graphs

    def backend(module, inputs):
        traced.append(module)
        return module

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    return traced
