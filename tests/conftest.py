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
torch.set_num_threads(min(2, os.cpu_count()))


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
