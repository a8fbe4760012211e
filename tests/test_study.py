"""`benchmarks/study.py`: runs resume, verdicts follow from the seeds, docs quote the results."""

import dataclasses
import importlib
import json
import pathlib
import re
import runpy
import sys

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from conftest import ROOT
from deeplab_jax import config as config_lib
from deeplab_jax.utils.errors import UserError
from deeplab_jax.visualization import plots
from drawings import BOUND, difference, texts

RESULTS = ROOT / "benchmarks" / "results"
RECORD = RESULTS / "study_cpu.json"
ROWS = set(runpy.run_path(str(ROOT / "configs" / "study.py"))["ROWS"])
RECIPES = {name for name in ROWS if name.startswith("recipe")}
CONFIGS = ROWS - RECIPES


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("study")


@dataclasses.dataclass(frozen=True)
class Fake:
    """A run that appends a letter to a file, or executes other code."""

    name: str
    folder: pathlib.Path
    code: str = "file.write_text(file.read_text() + 'x' if file.exists() else 'x')"
    seed: int = 0

    def command(self):
        file = f"import pathlib; file = pathlib.Path({str(self.folder / self.name)!r})"
        return [sys.executable, "-S", "-c", f"{file}; {self.code}"]

    @property
    def log(self):
        return self.folder / f"{self.name}.log"

    def miou(self):
        return 0.5 if (self.folder / self.name).exists() else None


def test_finished_runs_are_not_repeated(study, tmp_path):
    runs = [Fake(name, tmp_path) for name in "abc"]
    study.run_all(runs[:2], jobs=2)
    study.run_all(runs, jobs=2)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "x", "x"]


def test_a_failed_run_ends_the_study_with_its_log_and_stops_the_others(study, tmp_path):
    waits = "import time; file.with_suffix('.began').touch(); time.sleep(60); file.touch()"
    fails = (
        "import time, sys\n"
        "while not file.with_name('slow.began').exists(): time.sleep(0.01)\n"
        "sys.exit('the disk is gone')"
    )
    runs = [Fake("slow", tmp_path, waits), Fake("bad", tmp_path, fails), Fake("later", tmp_path)]
    with pytest.raises(UserError, match=r"(?s)bad, seed 0: exit code 1; .*the disk is gone"):
        study.run_all(runs, jobs=2)
    assert not (tmp_path / "slow").exists()
    assert not (tmp_path / "later").exists()
    with pytest.raises(UserError, match="quiet, seed 0: it was stopped"):
        study.run_all([Fake("quiet", tmp_path, "pass")], jobs=1)


def test_a_training_is_finished_when_its_last_step_is_scored(study, tmp_path):
    run = study.Training("os8", 1, ("train.steps=30", "optimizer.warmup_steps=2"), tmp_path)
    assert run.miou() is None
    config = run.last_stage()
    assert (config.seed, config.train.steps, config.model.output_stride) == (1, 30, 8)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    scored = '{"step": 20, "eval/miou": 0.1}\n{"step": 30, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(scored)
    assert run.miou() is None
    (tmp_path / "metrics.jsonl").write_text(scored + '{"step": 30, "eval/miou": 0.25}\n{"st')
    assert run.miou() == 0.25
    with pytest.raises(UserError, match=r"another config \(config.seed: 2 here, 1 there\)"):
        dataclasses.replace(run, seed=2).miou()


def test_the_workdir_of_two_stages_is_that_of_the_second(study, tmp_path):
    run = study.Training("two_stages", 0, (), tmp_path)
    config = run.last_stage()
    assert (config.train.steps, config.train.freeze_bn, config.model.output_stride) == (
        400,
        True,
        8,
    )
    assert run.checkpoint() == tmp_path / "checkpoints" / "400"


def test_every_config_is_a_row_and_every_claim_names_rows(study):
    rows = {row.name for group in study.GROUPS.values() for row in group}
    assert rows == CONFIGS | set(study.SCORINGS)
    assert {row.name for group in study.RECIPES.values() for row in group} == RECIPES
    assert {name for claim in study.CLAIMS for name in (claim.better, claim.worse)} <= rows
    runs = study.trainings(pathlib.Path("w"), 2, [], ["base", "eval_os8"])
    assert [(run.name, run.seed) for run in runs] == [("base", 0), ("base", 1)]
    assert [run.name for run in study.scorings(runs, ["eval_os8"])] == ["eval_os8"] * 2


def test_the_papers_numbers_are_those_of_its_tables(study):
    """Compares with docs/paper.md, which another test compares with the configs."""
    sections = re.split(r"^## ", (ROOT / "docs" / "paper.md").read_text(), flags=re.MULTILINE)
    for claim in study.CLAIMS:
        for number, table in zip(claim.paper, claim.tables, strict=True):
            (section,) = [
                text for text in sections if re.match(rf"Tables? (\d+ and )?{table}\b", text)
            ]
            assert f"{number:.2f}" in section, claim


def test_a_claim_is_seen_if_all_seeds_agree(study):
    record = {
        "gflop_an_image": {"base": 0.25, "os32": 0.125},
        "miou": {
            "base": [0.5, 0.625, 0.75],
            "os32": [0.4, 0.6, 0.7],
            "os8": [0.51, 0.6, 0.8],
            "shrunk_labels": [0.6, 0.7, 0.8],
        },
    }
    text = study.tables(record)
    assert "| 16, the base of all groups below | `base` | 62.5 | 50.0 to 75.0 | 0.250 |" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    seen = {line.split(" | ")[0][2:]: line.split(" | ")[3:] for line in lines}
    assert seen["output stride 16 over 32"] == ["+5.8", "+10.0, +2.5, +5.0", "yes |"]
    assert seen["output stride 8 over 16"] == ["+1.2", "+1.0, -2.5, +5.0", "no: seeds disagree |"]
    assert seen["upsampled logits over downsampled labels"][2] == "the opposite |"
    assert "flip" not in text
    assert "Multi-grid" in text  # because of its row "base"


_TWO_BASES = {
    "gflop_an_image": {},
    "miou": {
        "base": [0.5, 0.6],
        "recipe": [0.75, 0.8],
        "recipe_adamw": [0.77, 0.78],
        "recipe_ema": [0.76, 0.81],
    },
}


def test_recipes_are_compared_with_their_base_seed_by_seed(study):
    header, _, *lines = study.tables(_TWO_BASES).splitlines()[-6:]
    assert header.startswith("| | config | mIoU, % | range | points over the base |")
    assert lines.pop(0).startswith("| **Recipes, 700 steps** |")
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert cells == [
        ["`recipe`", "77.5", "75.0 to 80.0", "", "", ""],
        ["`recipe_adamw`", "77.5", "77.0 to 78.0", "+0.0", "+2.0, -2.0", "no: seeds disagree"],
        ["`recipe_ema`", "78.5", "76.0 to 81.0", "+1.0", "+1.0, +1.0", "yes"],
    ]


def test_the_band_of_a_group_is_that_of_its_base(study):
    axes = study.plot(_TWO_BASES).axes[-1]
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    spans = [band.get_paths()[0].get_extents().intervalx for band in bands]
    *groups, recipes = np.array(spans)
    assert len(groups) == 6  # those that have the row "base"
    np.testing.assert_allclose(groups, [[50, 60]] * 6)
    np.testing.assert_allclose(recipes, [75, 80])


@pytest.mark.parametrize(
    ("file", "rows", "picture", "words", "changed"),
    [
        ("study_cpu", None, "study", {"Output stride", "16, the base of all groups below"}, "os8"),
        ("recipes_cpu", RECIPES, "study_recipes", {"AdamW, cosine schedule"}, "recipe_adamw"),
    ],
)
def test_the_document_has_the_recorded_table_and_picture(
    study, file, rows, picture, words, changed, tmp_path
):
    record = json.loads((RESULTS / f"{file}.json").read_text())
    assert record["settings"] == []
    assert {len(values) for values in record["miou"].values()} == {3}
    assert record["miou"].keys() == (rows or CONFIGS | set(study.SCORINGS))
    assert study.tables(record) in (ROOT / "docs" / "study.md").read_text()
    figure, path = study.plot(record), tmp_path / "study.png"
    plots.save(path, figure)
    assert difference(path, picture) < BOUND
    assert words <= set(texts(figure))
    record["miou"][changed][0] -= 0.01
    plots.save(path, study.plot(record))
    assert difference(path, picture) > BOUND


def test_a_recorded_study_is_shown_and_drawn_without_training(study, monkeypatch, capsys, tmp_path):
    plot = tmp_path / "study.png"
    options = ["--recorded", str(RECORD), "--plot", str(plot), "--markdown"]
    monkeypatch.setattr(sys, "argv", ["study", "--workdir", str(tmp_path / "runs"), *options])
    study.main()
    assert capsys.readouterr().out.strip() == study.tables(json.loads(RECORD.read_text())).strip()
    assert plot.exists()
    assert not (tmp_path / "runs").exists()


def test_only_takes_patterns(study, monkeypatch):
    runs = []
    monkeypatch.setattr(study, "run_all", lambda given, jobs: runs.extend(given))
    monkeypatch.setattr(study, "make_record", lambda *_: {"miou": {}, "gflop_an_image": {}})
    options = ["--only", "recipe_?ong*,eval_os8,os8", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["study", *options])
    study.main()
    long = ["recipe_long", "recipe_long_copy_paste", "recipe_long_modern"]
    assert [run.name for run in runs] == ["os8", *long]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recorded", "none.json"], "there is no file none.json"),
        (["--only", "base,os9"], "no row os9; rows: os32, base"),
        (["--jobs", "0"], "must be 1 or more"),
    ],
)
def test_mistakes(study, options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", *options])
    with pytest.raises(UserError, match=message):
        study.main()
