"""The source files: imports, repeated functions, use without the other files, safe loading, layout."""

import ast
import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

TESTS = ROOT / "tests"
FILES = {  # name -> the other files that it imports
    "encoder": set(), "decoder": set(), "dit": set(), "fid": {"encoder"}, "sample": {"encoder", "decoder", "dit"},
    "train_decoder": {"encoder", "decoder", "fid"}, "train_dit": {"encoder", "decoder", "dit"},
}
PACKAGES, HUB = {"torch", "numpy", "timm", "PIL", "scipy", "tqdm"}, {"huggingface_hub"}  # timm installs the latter
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in FILES}
MAY_DIFFER = {"main", "train", "parse_args", "lr_at", "step_randomness", "Block"}


def imports(tree):
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []  # fails for a relative one: None
        yield from (name.split(".")[0] for name in names)


def test_seven_files_and_their_packages():
    """requirements.txt lists the packages that are imported, and no others."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(FILES)
    wanted = (ROOT / "requirements.txt").read_text().replace("pillow", "PIL")
    assert set(re.findall(r"^\w+", wanted, re.MULTILINE)) == PACKAGES
    assert set().union(*map(imports, TREES.values())) - set(sys.stdlib_module_names) - FILES.keys() == PACKAGES | HUB


@pytest.mark.parametrize("name", FILES)
def test_imports_between_files(name):
    """encoder.py imports nothing that is for a run; one function alone imports huggingface_hub."""
    tree = TREES[name]
    assert set(imports(tree)) & FILES.keys() == FILES[name]
    hub = [getattr(node, "name", "outside") for node in tree.body if "huggingface_hub" in imports(node)]
    assert hub == (["read_checkpoint"] if name in ("decoder", "dit") else [])
    if name == "fid":  # inside the command line only
        assert all("encoder" not in imports(node) for node in tree.body if isinstance(node, ast.ImportFrom))
    assert name != "encoder" or not set(imports(tree)) & {"argparse", "csv", "signal", "tqdm", "urllib"}
    taken = [node.names for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "encoder"]
    assert not name.startswith("train") or len(taken) == 1 and len(taken[0]) <= 14


def test_repeated_functions_are_equal_word_for_word():
    texts = {}
    for name, tree in TREES.items():
        text = (ROOT / f"{name}.py").read_text()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                texts.setdefault(node.name, {})[name] = [ast.get_source_segment(text, part)
                                                         for part in (node, *node.decorator_list)]
    twice = {name: found for name, found in texts.items() if len(found) > 1 and name not in MAY_DIFFER}
    assert not [(name, *found) for name, found in twice.items() if len(set(map(tuple, found.values()))) > 1]
    assert twice.keys() >= set("Log catch_signals compile_blocks due load_last load_weights parse_flags pretrained "
                               "read_checkpoint save_checkpoint say set_up sincos_2d update_ema wrap_ddp".split())


def alone(name, folder, monkeypatch):
    """Import a copy of a file in an empty folder, from which the other files cannot be imported."""
    shutil.copy(ROOT / f"{name}.py", folder)
    for module in FILES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *(path for path in sys.path if Path(path) not in (ROOT, TESTS))])
    return importlib.import_module(name)


def reloads(model, load):
    torch.save(dict(kind=type(model).__name__.lower(), config=model.config, model=model.state_dict()), "file.pt")
    return load("file.pt")[0].config == model.config


USES = {  # name -> packages that the file needs, and a use of it
    "encoder": ({"torch", "numpy", "timm", "PIL"},
                lambda it: it.Encoder("random-tiny", 32)(torch.rand(1, 3, 32, 32)).shape == (1, 128, 4, 4)),
    "decoder": ({"torch", "numpy", "PIL"}, lambda it: reloads(it.Decoder(8, 2, 2, 32, 1, 2, 32), it.load_decoder)),
    "dit": ({"torch", "numpy"}, lambda it: reloads(it.DiT(8, 4, 3, 32, 1, 2), it.load_dit)),
    "fid": (PACKAGES, lambda it: it.psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 255)).shape == (1,)),
}


@pytest.mark.parametrize("name", USES)
def test_files_work_without_the_others(name, tmp_path, monkeypatch):
    """With no packages except those that their docstrings name."""
    needs, use = USES[name]
    monkeypatch.chdir(tmp_path)
    for package in PACKAGES - needs | HUB:
        monkeypatch.setitem(sys.modules, package, None)  # its import fails
    module = alone(name, tmp_path, monkeypatch)
    assert Path(module.__file__).parent == tmp_path and use(module)


def test_files_import_without_the_modules_and_calls_of_unix(monkeypatch):
    """As on Windows and macOS."""
    for module in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, module, None)  # its import fails
    for call in ("fork", "setpgid", "sched_getaffinity"):
        monkeypatch.delattr(os, call, raising=False)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in FILES:
        importlib.import_module(name)
    assert all(sys.modules[name].parse_args(["--preset", "demo"])[1].workers == 0 for name in FILES if "train" in name)
    assert sys.modules["sample"].parse_args([])[1].workers == sys.modules["encoder"].default_workers() == 0


@pytest.mark.parametrize("name", FILES)
def test_loading_a_file_runs_no_code_from_it(name):
    """Every torch.load has weights_only=True, no np.load has allow_pickle=True."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".load", "load_state_dict_from_url")):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("weights_only") == "True" or "torch." not in ast.unparse(node.func), ast.unparse(node)
            assert given.get("allow_pickle", "False") == "False", ast.unparse(node)


def test_lines_end_at_120_and_are_laid_out_by_hand():
    for path in [*ROOT.glob("*.py"), *TESTS.glob("*.py")]:
        text = path.read_text()
        assert not [(path.name, i) for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        assert "fmt: " + "skip" not in text and "fmt: " + "off" not in text, path.name
