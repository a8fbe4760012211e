"""`python -m benchmarks.speed`: which sides are measured, and what is told of them."""

import dataclasses
import functools
import json
import sys

import cv2
import jax
import pytest
import torch
from drawings import BOUND, committed, difference

from conftest import ROOT
from speed import command, measure, ours, theirs
from speed.cases import Built, Case, cases
from speed.figure import speed_figure

CASE = Case("forward", "resnet50", 8, 1, 33, 49, "float32")


class Side:
    """A side that takes a known time, by a clock of its own."""

    clock = 0.0
    alive = 0

    def __init__(self, seconds):
        self.seconds = seconds
        Side.alive += 1

    def __del__(self):
        Side.alive -= 1

    def start(self):
        Side.clock += self.seconds


def built(seconds, num_bytes=None):
    return Built(Side(seconds).start, lambda: None, 10 * seconds, num_bytes)


@pytest.fixture
def sides(monkeypatch):
    """Ours takes 0.2 s; of theirs compile is best, 0.3 s. At most one of theirs is ever held."""
    seconds = {"eager": 0.5, "channels_last": 0.4, "channels_last, compile": 0.3}

    def build(case, mode):
        assert Side.alive == 1, "a side of theirs is still held"
        return built(seconds[mode], num_bytes=7)

    monkeypatch.setattr(ours, "build", lambda case: built(0.2, num_bytes=5))
    monkeypatch.setattr(theirs, "build", build)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: Side.clock)
    return seconds


def test_the_comparison_is_with_their_best(sides):
    row = measure.measure(CASE, 1e9, turns=3)
    assert row.theirs_by_mode == pytest.approx(sides)
    assert (row.theirs, row.theirs_bytes, row.ours_bytes) == ("channels_last, compile", 7, 5)
    assert (row.ours_seconds, row.theirs_seconds) == pytest.approx((0.2, 0.3))
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((1.5, 1.5, 1.5))
    assert (row.ours_compile_seconds, row.theirs_compile_seconds) == pytest.approx((2, 3))
    assert row.share_of_peak == pytest.approx(row.flops / 0.2 / 1e9)


def test_torch_compiles_each_case_anew(monkeypatch):
    """Else it compiles the second case for any size, and uses that from then on."""
    heights = []

    def compiler(graph, inputs):
        heights.append(inputs[-1].shape[2])
        return graph.forward

    class Doubling(torch.nn.Module):
        def forward(self, x):
            return {"out": 2 * x}

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    monkeypatch.setattr(theirs, "import_torchvision", lambda: None)
    monkeypatch.setattr(theirs, "_model", lambda vision, case: Doubling())
    for height in (33, 35, 37):
        case = dataclasses.replace(CASE, height=height)
        theirs.build(case, "channels_last, compile")
    assert heights == [33, 35, 37]


def test_alone_or_against_some_modes(sides):
    row = measure.measure(CASE, 1e9, turns=2, modes="eager")
    assert (row.theirs, row.ratio) == ("eager", pytest.approx(2.5))
    row = measure.measure(CASE, 1e9, turns=2, modes=None)
    assert (row.theirs, row.ratio, row.theirs_by_mode) == (None, None, {})
    assert row.ours_seconds == pytest.approx(0.2)


def test_a_step_is_three_forward_passes():
    train = Case("train", "resnet50", 8, 2, 33, 49, "float32")
    with_aux = ours.convolutions(ours.model_of(train), 33, 49)
    assert ours.dense_flops(train) == 3 * 2 * 2 * sum(conv.macs for conv in with_aux)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["speed", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_table_and_json(sides, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype: 1e12)
    path = tmp_path / "bench.json"
    code, out, err = run(
        monkeypatch, capsys, "--quick", "--only", "forward", "--turns", 1, "--json", path
    )
    assert code == 0
    (case,) = [case for case in cases(jax.default_backend(), quick=True) if case.kind == "forward"]
    assert case.name in out
    assert "1.50 to 1.50" in out
    assert "theirs: channels_last, compile" in out
    assert "building theirs (eager)" in err
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert (row["name"], row["theirs"]) == (case.name, "channels_last, compile")
    assert row["ratio"] == pytest.approx(1.5)
    assert result["matmul_flops_per_second"] == {"float32": 1e12}
    assert {"date", "device", "versions"} <= result.keys()


@pytest.mark.parametrize("content", ["[", "{}", '{"rows": [{"theirs_by_mode": null}]}'])
def test_a_file_of_other_things_is_no_result(content, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text(content)
    code, _, err = run(monkeypatch, capsys, "--recorded", tmp_path / "other.json")
    assert code == 2
    assert "no results of benchmarks.speed" in err


@pytest.mark.parametrize("machine", ["cpu", "h100"])
def test_recorded_results_are_shown_and_drawn_as_in_docs(machine, monkeypatch, capsys, tmp_path):
    record = ROOT / "benchmarks" / "results" / f"bench_{machine}.json"
    plot = tmp_path / "bench.png"
    code, out, _ = run(monkeypatch, capsys, "--recorded", record, "--plot", plot)
    assert code == 0
    for row in json.loads(record.read_text())["rows"]:
        assert row["name"] in out
    drawn = cv2.imread(str(plot), cv2.IMREAD_COLOR_RGB)
    assert difference(drawn, committed(f"bench_{machine}")) < BOUND


def test_bars_are_as_long_as_times():
    row = {"name": "", "ours_seconds": 1.0, "ratio": 2.0, "theirs_by_mode": {"eager": 2.0}}
    picture = speed_figure({"device": "", "rows": [row]})
    blue, orange = (
        (picture == color).all(axis=2).any(axis=0).sum() for color in ((0, 114, 178), (230, 159, 0))
    )
    assert orange == pytest.approx(2 * blue, abs=2)


def test_alone(sides, monkeypatch, capsys):
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype: 1e12)
    code, out, _ = run(monkeypatch, capsys, "--quick", "--only", "train", "--alone")
    assert code == 0
    assert "theirs:" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "vgg"], "no case holds 'vgg'; they are:\n  forward resnet50"),
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: its folder does not exist"),
        (
            ["--recorded", "none.json"],
            "--recorded none.json: no results of benchmarks.speed",
        ),
        (["--plot", "bench.jpg"], "--plot must be a file that ends in .png"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
