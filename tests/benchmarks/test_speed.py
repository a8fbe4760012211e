"""`python -m benchmarks.speed`: what is measured and reported."""

import dataclasses
import functools
import json
import sys

import jax
import pytest
import torch

from conftest import ROOT
from drawings import BOUND, difference, texts
from speed import command, measure, ours, theirs
from speed.cases import Built, Case, cases
from speed.figure import speed_figure

CASE = Case("forward", "resnet50", 8, 1, 33, 49, "float32")


class Side:
    """A fake program that takes a known time, by a fake clock."""

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
    """Ours takes 0.2 s, theirs 0.3 s with compile. Only one of theirs is in memory at a time."""
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


def test_torch_compiles_each_case_again(monkeypatch):
    """Otherwise torch compiles the second case for dynamic sizes and keeps using that."""
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


def test_alone_or_with_some_modes(sides):
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
def test_another_file_is_not_a_result(content, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text(content)
    code, _, err = run(monkeypatch, capsys, "--recorded", tmp_path / "other.json")
    assert code == 2
    assert "not a file of benchmarks.speed results" in err


@pytest.mark.parametrize("machine", ["cpu", "h100"])
def test_recorded_results_are_shown_and_drawn_as_in_docs(machine, monkeypatch, capsys, tmp_path):
    record = ROOT / "benchmarks" / "results" / f"bench_{machine}.json"
    plot = tmp_path / "bench.png"
    code, out, _ = run(monkeypatch, capsys, "--recorded", record, "--plot", plot)
    assert code == 0
    assert difference(plot, f"bench_{machine}") < BOUND
    result = json.loads(record.read_text())
    names = {row["name"] for row in result["rows"]}
    assert all(name in out for name in names)
    assert names <= set(texts(speed_figure(result)))


def test_bars_are_as_long_as_times():
    row = {"name": "a", "ours_seconds": 1.0, "ratio": 2.0, "theirs_by_mode": {"eager": 2.0}}
    figure = speed_figure({"device": "cpu", "rows": [row]})
    ours, theirs = (bars[0].get_width() for bars in figure.axes[0].containers)
    assert theirs == pytest.approx(2 * ours)


def test_alone(sides, monkeypatch, capsys):
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype: 1e12)
    code, out, _ = run(monkeypatch, capsys, "--quick", "--only", "train", "--alone")
    assert code == 0
    assert "theirs:" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "vgg"], "no case contains 'vgg'; cases:\n  forward resnet50"),
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: its folder does not exist"),
        (
            ["--recorded", "none.json"],
            "--recorded none.json: not a file of benchmarks.speed results",
        ),
        (["--plot", "bench.jpg"], "--plot must be a file that ends in .png or .svg or .pdf"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
