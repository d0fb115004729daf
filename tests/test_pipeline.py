"""The pipeline with the real scripts at small scale: train, resume, sample, torchrun; the commands of the README."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_images, read, rows
from PIL import Image

import fid
import sample
import train_decoder
import train_dit

README = (ROOT / "README.md").read_text()
SCRIPTS = {"train_decoder": train_decoder, "train_dit": train_dit, "sample": sample, "fid": fid}
DECODER = ["--preset", "demo", "--batch", "16", "--log-every", "10", "--warmup", "0.01", "--device", "cpu"]
DIT = [*DECODER, "--stats-images", "100"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The working directory, in which both stages of the demo were trained for 60 steps."""
    folder = tmp_path_factory.mktemp("demo")
    here = os.getcwd()
    os.chdir(folder)
    train_decoder.main([*DECODER, "--epochs", "0.12"])  # 60 steps
    train_dit.main([*DIT, "--epochs", "0.12"])
    yield folder
    os.chdir(here)


def test_demo_learns_and_writes_its_files(runs):
    for stage, loss in (("decoder", "l1"), ("dit", "loss")):
        folder = runs / "runs" / "demo" / stage
        assert {f"{stage}.pt", "last.pt", "log.csv"} <= {path.name for path in folder.iterdir()}
        assert list(folder.glob("preview-*.png"))
        values = [float(row[loss]) for row in rows(folder)]
        assert len(values) == 6 and values[-1] < 0.7 * values[0]
    assert (runs / "runs/demo/dit/stat.pt").exists()


def test_demo_resumes_and_finishes(runs, capsys):
    train_decoder.main([*DECODER, "--epochs", "0.14"])
    train_dit.main([*DIT, "--epochs", "0.14"])
    for stage in ("decoder", "dit"):
        assert [int(row["step"]) for row in rows(runs / "runs/demo" / stage)] == [10, 20, 30, 40, 50, 60, 70]
    capsys.readouterr()
    train_decoder.main([*DECODER, "--epochs", "0.14"])
    train_dit.main([*DIT, "--epochs", "0.14"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == 2 * ["finished"]


def test_demo_samples_a_grid(runs):
    sample.main(["--preset", "demo", "--per-class", "2", "--steps", "4", "--device", "cpu"])
    with Image.open("samples.png") as picture:
        assert picture.size == (2 * 32 + 2, 10 * 32 + 18)
        assert np.asarray(picture).std() > 10


def test_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train_decoder.py", *DECODER, "--epochs", "0.004"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    assert "batch 16 = 2 processes x 1 x 8" in run.stdout
    assert read(tmp_path / "runs/demo/decoder/last.pt")["step"] == 2


@pytest.mark.parametrize("classes, summary, known", [
    (["a", "b", "c"], "data: 12 images, 3 classes (a, b, c); skipped files: .txt 1", ["a", "b", "c"]),
    ([], "data: 12 images, 1 classes (data); skipped files: .txt 1", ["data"]),
    (["train/a", "train/b/deep", "val/a"], "data/train: 8 images, 2 classes (a, b); skipped files: .txt 1", ["a", "b"]),
])
def test_train_dit_on_folders(tmp_path, classes, summary, known, capsys):
    make_images(tmp_path / "data", 12, size=(70, 50), classes=classes)
    (tmp_path / "data" / (classes or [""])[0].split("/")[0] / "notes.txt").write_text("no image")
    train_dit.main(["--preset", "demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "dit"),
                    "--batch", "2", "--epochs", "1", "--workers", "0", "--device", "cpu"])
    assert summary in capsys.readouterr().out
    result = read(tmp_path / "dit" / "dit.pt")
    assert result["classes"] == known and result["config"]["num_classes"] == len(known)


def test_readme_python_runs_on_the_demo(runs):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["reconstructions"].shape == (2, 3, 32, 32) and names["images"].shape == (2, 32, 32, 3)


def test_readme_commands_have_flags_that_exist(tmp_path, monkeypatch):
    """All commands in the README and in the docstrings of the scripts are accepted by their parsers."""
    for folder in ("imagenet/val", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "photo.jpg").touch()
    monkeypatch.chdir(tmp_path)
    text = "".join([README.replace("\\\n", " "), *(script.__doc__ for script in SCRIPTS.values())])
    for name, words, word in re.findall(r'\b([A-Z]+\d?)=(?:"([^"]*)"|(\S+))', text):  # shell variables
        text = text.replace(f"${name}", words or word)
    commands = re.findall(r"(?:python|torchrun [^\n]*?) (train_decoder|train_dit|sample|fid)\.py([^\n`]*)", text)
    for script, arguments in commands:
        arguments = shlex.split(re.split("&&|;", arguments)[0], comments=True)
        if not {"...", "REFERENCE"} & set(arguments):
            SCRIPTS[script].parse_args(arguments)
    assert len(commands) > 25 and {script for script, _ in commands} == set(SCRIPTS)


def test_readme_names_code_that_exists():
    """`file.py: name, name` in the tables of the README."""
    found = re.findall(r"`([a-z_]+)\.py: ([^`]+)`", README)
    assert len(found) > 15
    for script, names in found:
        code = (ROOT / f"{script}.py").read_text()
        for name in re.split(r", |\.", names):
            assert re.search(rf"^ *(class|def) {name}\b|^{name} = ", code, re.M), f"{script}.py has no {name}"
