"""The house: what each file imports and where it works, files of strangers, the look of the code."""

import ast
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

TESTS = ROOT / "tests"

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


def alone(name, folder, monkeypatch):
    """The module of a file that lies alone in an otherwise empty folder; what it imports from here is out of reach."""
    shutil.copy(ROOT / f"{name}.py", folder)
    for module in ROOMS:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *(path for path in sys.path if Path(path) not in (ROOT, TESTS))])
    module = importlib.import_module(name)
    assert Path(module.__file__).parent == folder
    return module


USES = {
    "encoder": lambda module: module.Encoder("random-tiny", 32)(torch.rand(1, 3, 32, 32)).shape == (1, 128, 4, 4),
    "decoder": lambda module: module.Decoder(8, 2, 2, 32, 1, 2, 32)(torch.rand(1, 8, 2, 2)).shape == (1, 3, 4, 4),
    "dit": lambda module: module.DiT(8, 4, 3, 32, 1, 2).config["grid"] == 4,
    "fid": lambda module: module.psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 255)).shape == (1,),
}


@pytest.mark.parametrize("name", USES)
def test_files_work_when_copied_out_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert USES[name](alone(name, tmp_path, monkeypatch))


def test_files_import_where_unix_s_modules_and_calls_are_missing(monkeypatch):
    """As on Windows and macOS."""
    for module in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, module, None)  # its import fails
    for call in ("fork", "setpgid", "sched_getaffinity"):
        monkeypatch.delattr(os, call, raising=False)
    for name in ROOMS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ROOMS:
        importlib.import_module(name)
    assert importlib.import_module("encoder").default_workers() == 0
    images = sys.modules["encoder"].Images(sys.modules["encoder"].Shapes(2, 8), lambda image, rng: image)
    assert len(list(sys.modules["encoder"].make_loader(images, [[(0, 0)], [(1, 1)]], None, "cpu"))) == 2


@pytest.mark.parametrize("name", ROOMS)
def test_no_file_of_a_stranger_runs_code(name):
    """Every torch.load says weights_only=True, every np.load leaves pickles alone."""
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".load", "load_state_dict_from_url")):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if ast.unparse(node.func).startswith("torch."):
                assert given.get("weights_only") == "True", ast.unparse(node)
            assert given.get("allow_pickle", "False") == "False", ast.unparse(node)


def test_lines_end_at_120_and_are_laid_out_by_hand():
    for path in [*ROOT.glob("*.py"), *TESTS.glob("*.py")]:
        text = path.read_text()
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        assert not long, f"{path.name}, lines {long}"
        assert "fmt: " + "skip" not in text and "fmt: " + "off" not in text, path.name
