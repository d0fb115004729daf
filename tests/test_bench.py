"""tests/bench.py: what it counts and what it writes."""

import json

import bench
import pytest
import torch

import decoder
import dit


@pytest.mark.parametrize("name, published", [("ViT-B", 22.2), ("ViT-L", 78.1), ("ViT-XL", 106.7)])
def test_decoder_flops_are_the_paper_s(name, published):
    """The paper's GFLOPs are multiply-adds (two FLOPs each) and leave out the products of queries, keys and values."""
    size = decoder.SIZES[name]
    N = 257  # with CLS
    attention = 2 * size["depth"] * N * N * size["width"]
    model = bench.empty(lambda: decoder.Decoder(768, 16, 16, **size))
    counted = bench.forward_flops(model, torch.zeros(1, 768, 16, 16))
    assert (counted / 2 - attention) / 1e9 == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("name", ["DiT-S", "DiT-DH-tiny"])
def test_dit_flops_are_those_of_its_weights_and_attention(name):
    C, grid = 128, 4
    N, size = grid * grid, dit.SIZES[name]
    model = dit.DiT(C, grid, 1000, **size)
    total = 0
    for key, weight in model.named_parameters():
        if weight.ndim > 1 and "embedding_table" not in key:  # the time and the trunk's modulation: once for an image
            block = int(key.split(".")[1]) if key.startswith("blocks.") else None
            in_trunk = block is not None and block < size["depth"] or not model.has_head
            total += weight.numel() * (1 if "t_embedder" in key or "adaLN" in key and in_trunk else N)
    total += 2 * N * N * (size["depth"] * size["width"] + size.get("head_depth", 0) * size.get("head_width", 0))
    assert bench.dit_flops(name, (C, grid, grid)) == 2 * total


def test_quick_parts_make_a_table_and_append_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SETTINGS["quick"], "measured", 3)
    path = tmp_path / "new" / "bench.jsonl"
    bench.main(["--quick", "--only", "encode", "dit", "--json", str(path)])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + 2
    bench.main(["--quick", "--only", "encode", "--json", str(path)])
    first, second = map(json.loads, path.read_text().splitlines())
    assert {"hardware", "torch", "date", "peak_tflops"} <= first.keys() and first["torch"] == torch.__version__
    for row in first["rows"] + second["rows"]:
        assert row["images_per_s"] == pytest.approx(1000 * row["images"] / row["ms"])
        assert row["ms"] > 0 and 0 < row["share_of_peak"] < 1.2 and row["peak_gib"] > 0.01
    assert [row["what"] for row in first["rows"]] == ["encode, random-tiny", "DiT step, DiT-DH-tiny, with encoder"]
    assert len(second["rows"]) == 1
