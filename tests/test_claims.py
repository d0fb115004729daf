"""tests/claims.py --quick: its tables, figure and rule, and Theorem 1, which is true after any training."""

import claims
import numpy as np
import pytest
from PIL import Image


def read_tables(text):
    """Markdown -> for each heading the table's rows, as dictionaries."""
    tables = []
    for part in text.split("### ")[1:]:
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in part.splitlines() if line[:1] == "|"]
        header, rule, *rows = lines
        assert set(rule) == {"---"} and all(len(row) == len(header) for row in rows)
        tables.append([dict(zip(header, row, strict=True)) for row in rows])
    return tables


@pytest.mark.filterwarnings("ignore:.*Theorem 1")
def test_tables_and_figure_of_a_quick_run(tmp_path, capsys):
    claims.main(["--quick", "--out", str(tmp_path)])
    theorem, shift, tau = read_tables(capsys.readouterr().out)

    models = [(row["width"], row["width / C"], row["bound 1 - width / C"], row["paper"]) for row in theorem]
    assert models == [("48", "0.500", "0.500", "0.52"), ("48, head 112", "1.167", "0.000", "")]
    narrow, head = (float(row["here"].split()[0]) for row in theorem)
    assert narrow > 0.5 > head > 0
    assert [row["verdict"] for row in theorem] == ["above the bound", "below its trunk's bound"]

    assert [(row["shift"], row["paper: gFID"]) for row in shift] == [("1", "23.08"), ("2", "4.81 (shift 6.93)")]
    assert [(row["tau"], row["paper: rFID"], row["paper: gFID"]) for row in tau] == [("0", "0.49", "4.81"),
                                                                                  ("0.1", "", "")]
    for row in shift + tau:
        for name in row.keys() & {"here: Frechet distance", "here: reconstructions", "PSNR", "here: samples"}:
            assert float(row[name].split()[0]) > 0

    with Image.open(tmp_path / "claims.png") as figure:
        assert figure.size == (1300, 440) and figure.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("values, verdict", [
    ([1, 2], "better"), ([1, 3.5], "not shown"), ([4, 6], "not shown"), ([5.5, 6], "worse")])
def test_settings_differ_only_if_their_ranges_do_not_overlap(values, verdict):
    assert claims.compare(values, baseline=[3, 5]) == verdict


def test_verdicts_on_theorem_1(capsys):
    losses = {(48, 2, 0): [0.49, 0.52], (112, 2, 0): [0.1, 0.6], (96, 2, 0): [0.1, 0.2], (48, 2, 112): [0.1, 0.6]}
    claims.report(losses, {1: np.array([[2.0], [0.5]])}, {0: np.array([[20.0], [1.0], [2.0], [0.5]])}, floor=0.5)
    theorem, *_ = read_tables(capsys.readouterr().out)
    assert [row["verdict"] for row in theorem] == ["BELOW the bound", "not shown", "below them all", "not shown"]
