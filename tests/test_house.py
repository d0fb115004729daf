"""The house: what each file imports, files copied out alone, compiled blocks."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import dit as dits
import encoder as encoders

ROOMS = {
    "encoder": set(), "decoder": set(), "dit": set(), "fid": {"encoder"}, "sample": {"encoder", "decoder", "dit"},
    "train_decoder": {"encoder", "decoder", "fid"}, "train_dit": {"encoder", "decoder", "dit", "fid"},
}
PACKAGES = {"torch", "numpy", "timm", "PIL", "scipy", "tqdm"}  # requirements.txt


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ROOMS)
def test_who_may_enter_which_room(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = set(imports(tree)) - set(sys.stdlib_module_names)
    assert found - PACKAGES <= ROOMS[name]
    if name == "fid":  # inside its command line only
        assert "encoder" not in set(imports(ast.Module([n for n in tree.body if "Import" in type(n).__name__], [])))
    assert {path.stem for path in ROOT.glob("*.py")} == set(ROOMS)


def test_files_work_when_copied_out_alone(tmp_path):
    """encoder.py, decoder.py, dit.py, fid.py, each from an otherwise empty folder."""
    code = ["import sys", "paths = sys.path[1:]"]
    for name, use in {
        "encoder": "encoder.Encoder('random-tiny', 32).grid",
        "decoder": "decoder.Decoder(8, 2, 2, 32, 1, 2, 32).image_size",
        "dit": "dit.DiT(8, 4, 3, 32, 1, 2).config['grid']",
        "fid": "4",
    }.items():
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        code += [f"sys.path = [{str(tmp_path / name)!r}, *paths]", f"import {name}", f"print({use})",
                 f"del sys.modules[{name!r}]"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, env=environment, capture_output=True,
                         text=True, timeout=120)
    assert run.stdout.split() == ["4"] * 4, run.stderr[-2000:]


def test_compiled_blocks_keep_a_graph_for_each_shape():
    """A smaller batch in between leaves no dynamic graph that would serve the usual one from then on."""
    graphs, runs = [], []
    torch._dynamo.reset()  # other tests' graphs

    def backend(module, inputs):
        graphs.append(module)
        number = len(graphs)
        return lambda *values: runs.append(number) or module(*values)

    model = dits.DiT(16, 2, 4, width=16, depth=2, heads=2)
    with pytest.MonkeyPatch.context() as patch:
        compile_module = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
        encoders.compile_blocks(model)
    for batch in (4, 3, 4):
        model(torch.randn(batch, 16, 2, 2), torch.rand(batch), torch.zeros(batch).long())
    assert runs == [1, 1, 2, 2, 1, 1]  # two blocks each
