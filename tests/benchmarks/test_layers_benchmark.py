"""`benchmarks/layers.py`: bounds compared with manual arithmetic, rows, recorded tables."""

import dataclasses
import json
import sys
import time

import pytest
from layers import Shape, bound_ms, main, measured

from deeplab_jax.analysis.conv_trace import Convolution, convolutions
from speed import measure, ours, theirs
from speed.cases import Case, cases

FORWARD = Case("forward", "resnet50", 8, 2, 33, 33, "float32")
TRAIN = dataclasses.replace(FORWARD, kind="train")
ATROUS = Convolution("aspp", 3, 1, 4, 1, (6, 5, 32), (6, 5, 16), 8, 100, False, 0)
STEM = Convolution("conv1", 7, 2, 1, 1, (33, 33, 3), (17, 17, 8), 2, 7, False, 0)


def test_bounds_by_hand():
    # A tap at distance 4 is valid in 2 of 6 rows and 1 of 5 columns: (2 + 6 + 2) (1 + 5 + 1).
    macs = 10 * 7 * 32 * 16
    moved = 4 * (2 * 6 * 5 * (32 + 16) + 9 * 32 * 16)
    slow_arithmetic, slow_memory = (1e3, 1e12), (1e15, 1e3)
    assert bound_ms(ATROUS, FORWARD, *slow_arithmetic) == pytest.approx(2 * 2 * macs)
    assert bound_ms(ATROUS, FORWARD, *slow_memory) == pytest.approx(moved)
    assert bound_ms(ATROUS, TRAIN, *slow_arithmetic) == pytest.approx(3 * 2 * 2 * macs)
    # The gradient of the image is not computed.
    twice = bound_ms(STEM, TRAIN, *slow_arithmetic) / bound_ms(STEM, FORWARD, *slow_arithmetic)
    assert twice == pytest.approx(2)


def test_shapes_print_their_differences():
    assert str(Shape.of(ATROUS)) == "3x3, 32 -> 16, 6x5, rate 4"
    assert str(Shape.of(STEM)) == "7x7, 3 -> 8, 33x33, stride 2"


@pytest.mark.parametrize("case", [FORWARD, TRAIN])
def test_equal_convolutions_are_one_row(monkeypatch, case):
    again = dataclasses.replace(ATROUS, name="again", params=1)
    monkeypatch.setattr("layers.convolutions", lambda *_: [STEM, ATROUS, again])
    monkeypatch.setattr(measure, "_SECONDS_A_TURN", 0)
    monkeypatch.setattr(measure, "matmul_peak", lambda _: 1e12)
    monkeypatch.setattr(measure, "_COPIED_BYTES", {"cpu": 2**16})
    program = measure.running(lambda: time.sleep(1e-3))
    monkeypatch.setattr(ours, "build", lambda case: program)
    monkeypatch.setattr(theirs, "build", lambda case, mode: program)
    found = measured(case, turns=1)
    assert {row["first"]: row["count"] for row in found["rows"]} == {"conv1": 1, "aspp": 2}
    assert all(row[key] > 0 for row in found["rows"] for key in ("ours_ms", "theirs_ms"))
    assert min(found["ours_whole_ms"], found["theirs_whole_ms"]) >= 1


def test_shows_a_recorded_file(monkeypatch, tmp_path, capsys):
    row = {"convolution": "1x1", "count": 3, "ours_ms": 2.0, "theirs_ms": 3.0, "bound_ms": 1.0}
    found = {
        "case": "forward",
        "matmul_peak_flops": 4e11,
        "copy_bytes_per_second": 2e10,
        "rows": [row],
        "ours_whole_ms": 10.0,
        "theirs_whole_ms": 11.0,
        "theirs": "channels_last",
    }
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["layers", "--recorded", str(file)])
    assert main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1x1", "3", "1.0", "2.0", "3.0", "1.50", "3", "6", "9"] in lines
    assert ["what", "is", "left", "0.50", "4", "2"] in lines


def test_bounds_of_another_machine(monkeypatch, capsys):
    """With unlimited memory bandwidth, the bounds add up to the arithmetic at 1 TFLOP/s."""
    case = "forward resnet101 os16 32x513x513"
    monkeypatch.setattr(sys, "argv", ["layers", case, "--bounds", "1e12", "1e30"])
    assert main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    last = lines[-1]
    assert last[:2] == ["all", "convolutions"]
    chosen = next(c for c in cases("gpu", quick=False) if case in c.name)
    found = convolutions(ours.model_of(chosen), 513, 513)
    expected = 1e3 * 2 * 32 * sum(conv.valid_macs for conv in found) / 1e12
    assert float(last[2]) == pytest.approx(expected, abs=0.01)
    assert ["3x3,", "256", "->", "256,", "33x33", "23"] in [line[:6] for line in lines]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bounds", "0", "1"], "--bounds must be above 0"),
        (["no such"], "no case contains 'no such'; cases: forward resnet50"),
        (["--turns", "0"], "must be 1 or more, got 0"),
        (["--json", "none/layers.json"], "its folder does not exist"),
        (["--recorded", "none.json"], "there is no file none.json"),
    ],
)
def test_mistakes(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layers", *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
