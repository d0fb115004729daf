"""tests/bench.py: FLOPs, the table and the JSON file."""

import json

import bench
import pytest
import torch

import decoder
import dit


@pytest.mark.parametrize("name, published", [("ViT-B", 22.2), ("ViT-L", 78.1)])
def test_decoder_flops_are_the_paper_s(name, published):
    """The paper's GFLOPs are multiply-adds (two FLOPs each), without the products of queries, keys and values."""
    size = decoder.SIZES[name]
    N = 257  # with CLS
    attention = 2 * size["depth"] * N * N * size["width"]
    model = bench.empty(lambda: decoder.Decoder(768, 16, 16, **size))
    counted = bench.forward_flops(model, torch.zeros(1, 768, 16, 16))
    assert (counted / 2 - attention) / 1e9 == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("name", ["DiT-S", "DiT-DH-tiny"])
def test_dit_flops_are_those_of_weights_and_attention(name):
    C, grid = 128, 4
    N, size = grid * grid, dit.SIZES[name]
    model = dit.DiT(C, grid, 1000, **size)
    total = 0
    for key, weight in model.named_parameters():
        if weight.ndim > 1 and "embedding_table" not in key:  # time and modulation of the trunk: once per image
            block = int(key.split(".")[1]) if key.startswith("blocks.") else None
            in_trunk = block is not None and block < size["depth"] or not model.has_head
            total += weight.numel() * (1 if "t_embedder" in key or "adaLN" in key and in_trunk else N)
    total += 2 * N * N * (size["depth"] * size["width"] + size.get("head_depth", 0) * size.get("head_width", 0))
    assert bench.dit_flops(name, (C, grid, grid)) == 2 * total


def read_table(printed):
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return lines[2:]


def test_quick_parts_make_a_table_and_append_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SETTINGS["quick"], "repeats", 3)
    monkeypatch.chdir(tmp_path)  # for the part `save`
    synced = []
    monkeypatch.setattr(bench.os, "fsync", synced.append)
    path = tmp_path / "new" / "bench.jsonl"
    bench.main(["--quick", "--only", "encode", "dit", "save", "--json", str(path)])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and bench.time.strftime("%F") in printed
    assert len(read_table(printed)) == 1 + 1 + 2 and len(synced) == 2
    bench.main(["--quick", "--only", "encode", "--json", str(path)])
    first, second = map(json.loads, path.read_text().splitlines())
    assert {"device", "torch", "date", "peak_tflops"} <= first.keys() and first["torch"] == torch.__version__
    for row in first["rows"][:2] + second["rows"]:
        assert row["images_per_s"] == pytest.approx(1000 * row["images"] / row["ms"])
        assert row["ms"] > 0 and 0 < row["share_of_peak"] < 1.2 and row["peak_gib"] > 0.01
    assert [row["what"] for row in first["rows"]] == [
        "encode, random-tiny", "DiT step, DiT-DH-tiny, with encoder, micro-batch 32 x 1",
        "save 0.02 GB, without CRC32, as last.pt", "save 0.02 GB, with CRC32, as dit.pt"]
    assert len(second["rows"]) == 1 and not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("tmp*"))


def test_swiglu_has_a_row_for_each_size(tmp_path, capsys):
    bench.main(["--quick", "--only", "swiglu", "all-reduce", "--json", str(tmp_path / "bench.jsonl")])
    rows = [line.split("|")[1].strip() for line in read_table(capsys.readouterr().out)]
    mlp = [f"SwiGLU, 128 wide, {hidden} hidden, 64 tokens, {way}" for hidden in (341, 344)
           for way in ("forward", "forward and backward")]
    assert rows[:-1] == mlp and (torch.cuda.device_count() > 1 or rows[-1].endswith("needs two GPUs"))


def test_a_row_out_of_memory_says_so(monkeypatch):
    def too_large(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(dit.DiT, "forward", too_large)
    monkeypatch.setattr(bench, "dit_flops", lambda *_: 1)
    (row,) = bench.measure("dit", bench.SETTINGS["quick"], "float32", peak=1.0)
    assert row["what"].endswith(": out of memory") and row["ms"] is row["images_per_s"] is row["share_of_peak"] is None


@pytest.mark.parametrize("settings", bench.SETTINGS.values(), ids=bench.SETTINGS)
def test_latents_are_those_of_the_encoder(settings):
    with bench.offline():
        encoder = bench.encoder.Encoder(settings["encoder"], settings["size"])
    assert settings["latents"] == encoder.latent_shape
