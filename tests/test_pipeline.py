"""The whole pipeline through the real scripts: trained in small, resumed, sampled; alone and under torchrun."""

import csv
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
import train_decoder
import train_dit

DECODER = ["--preset", "demo", "--batch", "16", "--log-every", "10", "--warmup", "0.01"]
DIT = ["--preset", "demo", "--batch", "16", "--log-every", "10", "--warmup", "0.02", "--stats-images", "100"]


def column(folder, name):
    with open(folder / "log.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def torchrun(script, *arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / script]
    run = subprocess.run([*command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which both stages of the demo were trained for a few dozen steps: where the README's user stands."""
    folder = tmp_path_factory.mktemp("demo")
    here = os.getcwd()
    os.chdir(folder)
    train_decoder.main([*DECODER, "--epochs", "0.12"])  # 60 steps
    train_dit.main([*DIT, "--epochs", "0.12"])
    yield folder
    os.chdir(here)


def test_demo_learns_and_leaves_its_files(runs):
    for stage, kind in (("decoder", "decoder"), ("dit", "train_dit")):
        folder = runs / "runs" / "demo" / stage
        assert {f"{stage}.pt", "last.pt", "log.csv"} <= {path.name for path in folder.iterdir()}
        assert list(folder.glob("preview-*.png"))
        loss = column(folder, "l1" if kind == "decoder" else "loss")
        assert len(loss) == 6 and loss[-1] < 0.7 * loss[0]
    assert (runs / "runs/demo/dit/stat.pt").exists()


def test_demo_resumes_and_then_says_that_it_is_finished(runs, capsys):
    train_decoder.main([*DECODER, "--epochs", "0.14"])
    train_dit.main([*DIT, "--epochs", "0.14"])
    for stage in ("decoder", "dit"):
        assert column(runs / "runs/demo" / stage, "step") == [10, 20, 30, 40, 50, 60, 70]
    capsys.readouterr()
    train_decoder.main([*DECODER, "--epochs", "0.14"])
    train_dit.main([*DIT, "--epochs", "0.14"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["finished", "finished"]


def test_demo_draws_a_grid(runs):
    sample.main(["--preset", "demo", "--per-class", "2", "--steps", "4"])
    size = torch.load("runs/demo/decoder/decoder.pt", weights_only=True)["encoder"]["image_size"]
    with Image.open("samples.png") as picture:
        assert picture.size == (2 * size + 2, 10 * size + 18)
        assert np.asarray(picture).std() > 10


def test_three_scripts_under_torchrun(tmp_path):
    torchrun("train_decoder.py", *DECODER, "--epochs", "0.02", cwd=tmp_path)
    torchrun("train_dit.py", *DIT, "--epochs", "0.02", cwd=tmp_path)
    out = torchrun(
        "sample.py", "--preset", "demo", "--num-samples", "10", "--steps", "2", "--out", "s.npz", cwd=tmp_path
    )
    assert "10 images in s.npz" in out
    with np.load(tmp_path / "s.npz") as file:
        assert (file["arr_0"].reshape(10, -1).std(1) > 1).all()


@pytest.mark.parametrize("layout", ["classes", "flat", "train and val"])
def test_train_dit_on_folders(tmp_path, layout, capsys):
    folders = {
        "classes": ["a", "b", "c"],
        "flat": ["."],
        "train and val": ["train/a", "train/b/deep", "val/a", "val/b"],
    }
    rng = np.random.default_rng(0)
    for folder in folders[layout]:
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for name in ("x.jpg", "y.png", "notes.txt"):
            path = tmp_path / "data" / folder / name
            if name.endswith("txt"):
                path.write_text("no image")
            else:
                Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    train_dit.main(["--preset", "demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "dit"),
                    "--batch", "2", "--epochs", "1", "--log-every", "1", "--workers", "0"])  # fmt: skip
    images, classes = {"classes": (6, 3), "flat": (2, 1), "train and val": (4, 2)}[layout]
    assert f"{images} images, {classes} classes" in capsys.readouterr().out
    assert torch.load(tmp_path / "dit" / "dit.pt", weights_only=True)["config"]["num_classes"] == classes


README = (ROOT / "README.md").read_text()


def test_readme_python_runs_on_the_demo(runs, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["recon"].shape == (1, 3, 32, 32) and names["images"].shape == (2, 32, 32, 3)


def test_readme_commands_have_flags_that_exist(tmp_path, monkeypatch):
    """Every command for the trainers and sample.py, in the README and in the scripts' docstrings, is accepted."""
    for folder in ("imagenet", "photos"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    text = README.replace("\\\n", " ") + train_decoder.__doc__ + train_dit.__doc__ + sample.__doc__
    commands = re.findall(r"(train_decoder|train_dit|sample)\.py( --?[^\n`,]*)", text)
    assert len(commands) > 20
    for script, arguments in commands:
        arguments = shlex.split(arguments.split("&&")[0], comments=True)
        if "..." not in arguments:
            {"train_decoder": train_decoder, "train_dit": train_dit, "sample": sample}[script].parse_args(arguments)
