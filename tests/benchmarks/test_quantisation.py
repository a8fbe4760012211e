"""The benchmark of quantised exports: its numbers, and the table in the documentation."""

import json

import numpy as np
import pytest
from PIL import Image

import small_checkpoint
from conftest import ROOT
from deeplab_jax.export import compare

pytest.importorskip("onnxruntime", reason="install the `onnx` extra")

from benchmarks import quantisation


def test_rows_of_a_model(tmp_path, monkeypatch):
    """The labels are the float32 file's ids, so its mIoU is 1; others fall with each pixel."""
    monkeypatch.setattr(compare, "SYMBOLIC_SHAPES", ((1, 33, 41),))
    small_checkpoint.write(tmp_path / "model")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 33, 41, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "images" / "a.png")
    quantisation.export(tmp_path / "model", tmp_path / "float.onnx")
    ids = quantisation.onnx.load(tmp_path / "float.onnx")(images)
    assert np.unique(ids).tolist() == [0, 2]
    pairs = list(zip(images, ids, strict=True))
    arguments = (tmp_path / "model", str(tmp_path / "images"), pairs)
    rows = quantisation.measure(*arguments, (0, 2), 1)
    assert [row["precision"] for row in rows] == ["float32", "float16", "int8"]
    assert (rows[0]["miou"], rows[0]["changed"]) == (1, 0)
    for row in rows[1:]:
        assert (row["miou"] == 1) == (row["changed"] == 0)
    assert rows[0]["num_bytes"] > rows[1]["num_bytes"] > rows[2]["num_bytes"]


def test_the_documented_table_is_the_recorded_one():
    file = ROOT / "benchmarks" / "results" / "quantisation_cpu.json"
    table = quantisation.markdown(json.loads(file.read_text()))
    assert table in (ROOT / "docs" / "export.md").read_text()
