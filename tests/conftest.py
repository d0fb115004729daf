"""Shared by all tests: the project's root on the path, golden files by kind, few threads, no network."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub fails at once instead of waiting
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
             "fc1": "intermediate.dense", "fc2": "output.dense"}  # fmt: skip
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
