"""`benchmarks/augmentations.py` measures what `docs/augmentation.md` lists."""

import dataclasses
import importlib
import re

from conftest import ROOT
from deeplab_jax.config import MIXES, AugmentConfig


def test_the_page_lists_all_fields_and_the_time_of_each_operation():
    page = (ROOT / "docs" / "augmentation.md").read_text()
    row = r"^\| (?:`(\w+)`)? ?\| (?:`(\w+)` \|)?.*\| ?([\d.]*) ?\|$"
    table = re.findall(row, page, re.M)
    fields = {field.name for field in dataclasses.fields(AugmentConfig)}
    assert {field for field, _, _ in table} - {""} == fields
    timed = {mix or field for field, mix, milliseconds in table if milliseconds}
    assert timed == (fields - {"mix", "mix_probability"}) | set(MIXES)
    measured = importlib.import_module("augmentations").measure(1)
    assert measured.keys() == timed | {"warp"}
