"""`benchmarks/certificates.py` certifies, finds what differs, and docs show its results.

The live originals that are installed are converted here too, in narrow variants where they exist.
"""

import functools
import importlib
import json
import pathlib
import re

import pytest

from deeplab_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ((1, 33, 97),)
MOBILENET = "torchvision: deeplabv3_mobilenet_v3_large"


@pytest.fixture(scope="module")
def certificates():
    return importlib.import_module("certificates")


@pytest.fixture(scope="module")
def originals(certificates):
    return certificates.originals


def row_of(certificates, case, float32=1e-6, float64=1e-15, round_trip="exact"):
    differences = {"float32": {"stem": 0.0, "out": float32}, "float64": {"out": float64}}
    versions = {"timm": "1.0"}
    about = {"family": case.family, "case": case.name, "date": "2026-11-27", "versions": versions}
    return about | differences | {"batches": ["1x33x97"], "round_trip": round_trip}


def run(certificates, file, *options):
    return certificates.main(["--quick", "--json", str(file), *options])


def test_a_family_is_certified_by_the_command(certificates, monkeypatch, tmp_path):
    monkeypatch.setattr(certificates, "QUICK_SHAPES", SMALL)
    file = tmp_path / "certificates.json"
    assert run(certificates, file, "--family", "torchvision", "--only", f"{MOBILENET}$") == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert f"{row['family']}: {row['case']}" == MOBILENET
    blocks = [f"block{number}" for number in range(1, 16)]
    heads = ["aspp", "head_conv", "classifier", "aux_classifier", "out", "aux"]
    for dtype, least in (("float32", 1e-9), ("float64", 1e-18)):
        assert list(row[dtype]) == ["stem", *blocks, "last", *heads]
        assert least < max(row[dtype].values()) < certificates.LIMITS[dtype]
    assert row["round_trip"] == "exact"
    assert "torchvision" in row["versions"]


def test_the_first_part_that_differs_is_named(certificates, originals, monkeypatch):
    """ASPP's rates are wrong, and the logits are resized with `align_corners`."""
    (case,) = [case for case in originals.CASES if str(case) == MOBILENET]
    case = case._replace(settings={"atrous_rates": (12, 24, 30), "align_corners": True})
    monkeypatch.setattr(certificates, "LIMITS", {"float32": 1e-4})
    lines = certificates.problems(certificates.certify(case, ((1, 17, 593),)))
    parts = [re.match(rf"{MOBILENET}: (\w+) differs by", line)[1] for line in lines]
    assert parts == ["aspp", "head_conv", "classifier", "out", "aux"]


# The narrow options of an original's maker, and the case to which they belong.
NARROW = {
    "mmseg: R-18 V1c d8": {
        "backbone": {"base_channels": 16, "stem_channels": 16},
        "decode_head": {"in_channels": 128, "channels": 32},
        "auxiliary_head": {"in_channels": 64, "channels": 16},
    },
    "smp: DeepLabV3 resnet18": {"decoder_channels": 32},
    "smp: DeepLabV3Plus resnet18": {"decoder_channels": 32},
    "timm: resnet18, output stride 8": {},
    "hf: MobileNetV2 0.5, output stride 16": {},
}


@pytest.mark.parametrize("title", NARROW)
def test_an_installed_original_is_certified(certificates, originals, title):
    (case,) = [case for case in originals.CASES if str(case) == title]
    pytest.importorskip(originals.MODULES[case.family], reason="install the `certify` extra")
    row = certificates.certify(case, SMALL, **NARROW[title])
    assert certificates.problems(row) == []
    writes = case.family != "hf"
    assert row["round_trip"] == ("exact" if writes else certificates.NOT_WRITTEN)


def test_recorded_names_are_those_of_the_installed_originals(certificates, originals, tmp_path):
    families = [f for f in originals.TITLES if _is_installed(originals, f)]
    assert {"torchvision", "vainf"} <= set(families)
    cases = [case for case in originals.CASES if case.family in families]
    written = certificates.record(tmp_path, cases)
    assert len(written) == sum(
        title.partition(":")[0] in families for title in certificates._RECORDED.values()
    )
    for path in written:
        recorded = json.loads((certificates.RECORDED / path.name).read_text())
        assert json.loads(path.read_text())["shapes"] == recorded["shapes"], path.name


def _is_installed(originals, family):
    try:
        originals.imported(family)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"float64": 2e-9}, "out differs by 2.0e-09 in float64; the limit is 1e-09"),
        ({"float32": float("nan")}, "out differs by nan in float32; the limit is 1e-04"),
        ({"round_trip": "a.weight differs"}, "in the original's format, a.weight differs"),
    ],
)
def test_a_problem_is_reported_and_exits_with_1(
    certificates, originals, monkeypatch, tmp_path, capsys, values, told
):
    bad = functools.partial(row_of, certificates, **values)
    monkeypatch.setattr(certificates, "certify", lambda case, shapes: bad(case))
    options = ("--family", "timm", "--only", "resnet18, output stride 8")
    assert run(certificates, tmp_path / "a.json", *options) == 1
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_file_of_results_keeps_the_rows_of_other_cases(
    certificates, originals, monkeypatch, tmp_path
):
    first, second, *_ = [case for case in originals.CASES if case.family == "timm"]
    old = [row_of(certificates, case, float32=1e-7) for case in (first, second)]
    certificates.write(tmp_path / "a.json", old)
    new = functools.partial(row_of, certificates, float32=1e-5)
    monkeypatch.setattr(certificates, "certify", lambda case, shapes: new(case))
    assert run(certificates, tmp_path / "a.json", "--only", f"{second}$") == 0
    assert certificates.read(tmp_path / "a.json") == [old[0], new(second)]


def test_another_file_or_no_case_is_refused(certificates, tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{}]}')
    with pytest.raises(UserError, match=r"a\.json is not a file of this command's results"):
        run(certificates, tmp_path / "a.json", "--family", "torchvision")
    with pytest.raises(UserError, match=r"no case is selected. There are: torchvision: deeplab"):
        run(certificates, tmp_path / "b.json", "--family", "torchvision", "--only", "vgg")


def test_docs_have_a_certificate_of_every_case(certificates, originals):
    rows = certificates.read(certificates.RESULTS)
    titles = [(row["family"], row["case"]) for row in rows]
    assert titles == [(case.family, case.name) for case in originals.CASES]
    assert [problem for row in rows for problem in certificates.problems(row)] == []
    assert certificates.markdown(rows) in certificates.DOCS.read_text()
