"""docs/plan.md and docs/pods.md quote the recorded results of benchmarks/plan.py and mesh.py."""

import importlib
import json
import re

import pytest

from conftest import ROOT


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def page(name):
    return (ROOT / "docs" / name).read_text()


def tables(text):
    """The lines of a page's tables."""
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def plan():
    return importlib.import_module("plan"), result("plan_tpu")["rows"]


def test_the_plan_is_quoted(plan):
    benchmark, rows = plan
    quoted = tables(page("plan.md"))
    assert set(tables(benchmark.cases_table(rows))) <= set(quoted)
    scaling = [line for line in quoted if re.match(r"\| \d+ \(\d+x\d+\) \|", line)]
    # Those of one image a chip, at both output strides; the benchmark prints more.
    assert scaling == [line for line in tables(benchmark.scaling_tables(rows)) if "x" in line][:12]


def test_fractions_of_all_reduces_are_quoted_in_pods(plan):
    benchmark, rows = plan
    shares = re.findall(r"\| ([\d.]+)% \| [\d.]+% \|", benchmark.scaling_tables(rows))
    lines = [line for line in tables(page("pods.md")) if line.startswith("| share at output")]
    assert re.findall(r"([\d.]+) %", "".join(lines)) == shares[:12]


def test_differences_between_meshes_are_quoted():
    recorded = {
        (row["case"]["name"], row["case"]["dtype"]): row["differences"]
        for row in result("mesh_cpu")["rows"]
        if row["case"]["kind"] == "curve"
    }
    quoted = [line.strip("| ").split(" | ") for line in tables(page("pods.md"))]
    quoted = {row[0]: row[1:] for row in quoted if len(row) == 7 and " x " in row[0]}
    assert quoted.keys() == {name for name, _ in recorded}
    for name, values in quoted.items():
        single, double = (recorded[name, dtype] for dtype in ("float32", "float64"))
        expected = [
            *[single["loss"], single["running statistics"]],
            *[double["loss"], double["parameters"], double["running statistics"]],
        ]
        assert [f"{float(value):.1e}" for value in values[:-1]] == [f"{e:.1e}" for e in expected]
        assert int(values[-1]) == single["confusion"] + double["confusion"]
