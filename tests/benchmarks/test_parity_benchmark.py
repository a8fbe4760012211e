"""`benchmarks/parity.py` measures, resumes and reports violations; docs quote its results."""

import importlib
import json
import pathlib

import pytest

from deeplab_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parity():
    return importlib.import_module("parity")


@pytest.fixture
def file(parity, tmp_path):
    """Results of all quick cases but the last, as written by an earlier run."""
    rows = {case: {"out": 1e-15, "aux": 2e-15} for case in parity.all_cases(quick=True)}
    rows.popitem()
    parity.write(tmp_path / "parity.json", parity.conditions("here"), rows)
    return tmp_path / "parity.json"


def run(parity, file, *options):
    return parity.main(["--quick", "--machine", "here", "--json", str(file), *options])


def test_a_case_is_measured(parity):
    case = parity.Case("stages", "deeplabv3_mobilenet_v3_large", "float32", 33, 65, 1)
    differences = parity.measure(case)
    assert list(differences)[:17] == ["stem", *(f"block{n}" for n in range(1, 16)), "last"]
    assert {"ASPP branch 4", "ASPP", "classifier", "aux_classifier"} < set(differences)
    assert 0 < max(differences.values()) <= 1e-4


def test_it_resumes(parity, file, monkeypatch):
    measured = []

    def measure(case):
        measured.append(case)
        return {"out": 3e-15, "aux": 4e-15}

    monkeypatch.setattr(parity, "measure", measure)
    assert run(parity, file) == 0
    assert measured == parity.all_cases(quick=True)[-1:]
    assert len(json.loads(file.read_text())["rows"]) == len(parity.all_cases(quick=True))
    assert run(parity, file) == 0
    assert len(measured) == 1
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("value", [2e-9, float("nan")])
def test_a_violation_is_reported_and_exits_with_1(parity, file, monkeypatch, capsys, value):
    last = parity.all_cases(quick=True)[-1]
    assert last.dtype == "float64"
    monkeypatch.setattr(parity, "measure", lambda case: {"out": 1e-15, "aux": value})
    assert run(parity, file) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"{last}: aux differs by {value:.1e}; the limit is 1e-09" in told


def test_results_of_other_conditions_are_not_mixed(parity, file):
    file.write_text(file.read_text().replace('"jax": "', '"jax": "0.'))
    with pytest.raises(UserError, match=r"was measured with versions .*choose another file"):
        run(parity, file)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{}]}', '{"rows": []}'])
def test_another_file_is_refused(parity, file, text):
    file.write_text(text)
    with pytest.raises(UserError, match=r"parity\.json (is not a file|was measured with)"):
        run(parity, file)
    assert file.read_text() == text


def test_docs_quote_the_results(parity):
    result = parity.read(ROOT / "benchmarks" / "results" / "parity_cpu.json")
    assert parity.violations(parity.rows_of(result)) == []
    assert parity.markdown(result) in (ROOT / "docs" / "numerics.md").read_text()
