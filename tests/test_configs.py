"""All configs: their values match a record, and the paper's configs match their names.

After an intended change, `python tests/test_configs.py` updates the record; its differences show
which configs the change affects.
"""

import dataclasses
import importlib
import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from deeplab_jax.config import Config, flatten
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.models.architecture import ARCHITECTURES, architecture
from deeplab_jax.models.backbones.resnet import RESNETS, Bottleneck, Stages, block_specs
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "configs.json"
TABLES = ("configs/paper.py", "configs/study.py", "configs/speedrun.py")


def rows_of(path: str) -> list[str]:
    """Returns each row of a config file, as `file.py:row`."""
    namespace = runpy.run_path(str(ROOT / path))
    return [f"{path}:{row}" for row in namespace["ROWS"]]


FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))
PAPER, STUDIES, SPEEDRUNS = map(rows_of, TABLES)
ALL = sorted([*(path for path in FILES if path not in TABLES), *PAPER, *STUDIES, *SPEEDRUNS])
STUDY_BASE = "configs/study.py:base"
STUDY = [path for path in STUDIES if path != STUDY_BASE]
RECIPES_BASE = "configs/study.py:recipe"  # the base of all rows "recipe_..."


def row(path: str) -> str:
    return path.rpartition(":")[2]


def resolved(path: str) -> dict:
    """The fields in which a config differs from the defaults, and its model from the named one.

    Those of the study differ from their base.
    """
    config = config_io.from_python(ROOT / path)
    base = RECIPES_BASE if path.startswith(f"{RECIPES_BASE}_") else STUDY_BASE
    defaults = flatten(config_io.from_python(ROOT / base) if path in STUDY else Config())
    fields = {name: value for name, value in flatten(config).items() if value != defaults[name]}
    named = dataclasses.asdict(ARCHITECTURES[config.model.architecture])
    chosen = dataclasses.asdict(architecture_of(config)).items()
    choices = {name: value for name, value in chosen if value != named[name]}
    return json.loads(json.dumps({"differs": fields, "model": choices}))


def architecture_of(config):
    fields = dataclasses.asdict(config.model) | {"num_classes": 21}
    return architecture(fields.pop("architecture"), **fields)


def common() -> dict:
    """Returns the values that configs are compared with."""
    named = {config_io.from_python(ROOT / path).model.architecture for path in ALL}
    models = {name: dataclasses.asdict(ARCHITECTURES[name]) for name in sorted(named)}
    return json.loads(json.dumps({"defaults": dataclasses.asdict(Config()), "models": models}))


@pytest.mark.parametrize("path", ALL)
def test_each_config_is_valid_and_matches_the_record(path):
    validate(config_io.from_python(ROOT / path))
    recorded = json.loads(RECORD.read_text())["configs"]
    assert resolved(path) == recorded.get(path), "if this is meant: python tests/test_configs.py"


def test_the_record_lists_these_configs_and_defaults():
    recorded = json.loads(RECORD.read_text())
    configs = recorded.pop("configs")
    assert recorded == common()
    assert sorted(configs) == ALL


@pytest.fixture
def short(monkeypatch):
    """Shortens the first stages, which have no rates in the paper's tables, to one block each."""
    for name in ("resnet50", "resnet101"):
        monkeypatch.setitem(RESNETS, name, Stages(Bottleneck, (1, 1, 1, 3)))


@pytest.mark.parametrize("path", PAPER)
def test_the_papers_configs_match_their_names(path, short):
    name = row(path)
    config = config_io.from_python(ROOT / path)
    ours = architecture_of(config)
    _, _, block3, *stages = block_specs(ours)
    assert [spec.kernel_dilation for spec in block3] == [1 if ours.output_stride > 8 else 2]
    assert ours.image_pooling == (not name.startswith("table5"))
    if table := re.fullmatch(r"table1_os(\d+)", name):
        halvings = [16, 32, 64, 128, 256]  # output strides at which block4 to block7 lose theirs
        rates = [max(1, stride // int(table[1])) for stride in halvings[1:]]
        assert ours.output_stride == int(table[1])
        assert [{spec.kernel_dilation for spec in stage} for stage in stages] == [
            {rate} for rate in rates
        ]
        assert ours.backbone == "resnet50"
    elif table := re.fullmatch(r"table([23])_(?:resnet(\d+)|grid(\d+))_block(\d)", name):
        grid = tuple(map(int, table[3] or "111"))
        assert [tuple(spec.kernel_dilation for spec in stage) for stage in stages] == [
            tuple(rate * base for rate in grid) for base in (2, 4, 8, 16)[: int(table[4]) - 3]
        ]
        assert ours.backbone == f"resnet{table[2] or 101}"
    else:
        grid = {"table5_grid111": (1, 1, 1), "table5_grid121": (1, 2, 1)}.get(name, (1, 2, 4))
        finer = 16 / int(name.removeprefix("table10_os")) if name.startswith("table10") else 1
        assert [[spec.kernel_dilation for spec in stage] for stage in stages] == [
            [2 * finer * g for g in grid]
        ]
        rates = (6, 12, 18) + ((24,) if name == "table5_rate24" else ())
        assert ours.atrous_rates == tuple(rate * finer for rate in rates)
        assert ours.backbone == "resnet101"
    model = FunctionalModel(dataclasses.replace(ours, width=1 / 64)).abstract
    copies = {name.split(".")[1] for name in model.params if name.startswith("backbone.layer")}
    assert copies == {f"layer{number}" for number in range(1, 5 + (ours.cascade or 0))}


@pytest.mark.parametrize("path", [STUDY_BASE, *STUDY])
def test_the_studys_configs_have_the_rates_of_their_output_stride_and_grid(path, short):
    ours = architecture_of(config_io.from_python(ROOT / path))
    *_, block4 = block_specs(ours)
    grid = {"grid121": (1, 2, 1), "grid124": (1, 2, 4)}.get(row(path), (1, 1, 1))
    assert [spec.kernel_dilation for spec in block4] == [
        32 // ours.output_stride * rate for rate in grid[: len(block4)]
    ]
    spans = {rate * ours.output_stride for rate in ours.atrous_rates}  # in pixels of the image
    extra = {"rates123": {16, 32, 48}, "rates2468": {32, 64, 96, 128}, "block4": set()}
    assert spans == extra.get(row(path), {32, 64, 96})
    assert FunctionalModel(dataclasses.replace(ours, width=1 / 64)).abstract.params


def test_rows_differ_only_in_what_the_tables_vary():
    base = flatten(config_io.from_python(ROOT / "configs" / "voc_os16.py"))
    changed = {
        "table8_shrunk_labels": {"loss.upsample": False},
        "table8_frozen_bn": {"train.freeze_bn": True},
        "table8_crop321": {"data.crop_size": (321,)},
        "table9_batch4": {"train.batch_size": 4},
        "table9_batch8": {"train.batch_size": 8},
        "table9_batch12": {"train.batch_size": 12},
        "table10_os8": {
            "train.batch_size": 6,
            "model.output_stride": 8,
            "eval.output_stride": 16,
        },
        "table10_os32": {
            "train.batch_size": 24,
            "model.output_stride": 32,
            "eval.output_stride": 16,
        },
        "table6_coco": {
            "init.backbone": "",
            "init.path": "runs/coco",
            "optimizer.learning_rate": 0.0001,
        },
    }
    for name, fields in changed.items():
        config = flatten(config_io.from_python(ROOT / f"configs/paper.py:{name}"))
        assert config == base | fields
    elsewhere = {"model", "init"}
    for path in PAPER:
        if row(path) not in changed:
            assert {field.split(".")[0] for field in resolved(path)["differs"]} <= elsewhere


def test_the_document_is_written_from_the_configs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    paper_tables = importlib.import_module("paper_tables")
    page = paper_tables.PAGE.read_text()
    assert paper_tables.update_tables(page) == page
    assert sorted(re.findall(r"^\| `(table\w+)` \|", page, re.M)) == sorted(map(row, PAPER))
    # A wrong number on the page is corrected.
    assert paper_tables.update_tables(page.replace("| 75.18 |", "| 75.19 |")) == page


def test_an_unknown_row_names_the_nearest_and_files_of_one_config_have_none(tmp_path):
    for path, words in {
        "configs/paper.py:table1_os9": "did you mean 'table1_os8'",
        "configs/study.py:os_8": "did you mean 'os8'",
        "configs/paper.py": "holds 43 configs: name one, as in configs/paper.py:table1_os8",
        "configs/voc_os16.py:os8": "holds one config and no rows",
        "configs/absent.py:os8": "there is no config file",
    }.items():
        with pytest.raises(UserError, match=re.escape(words)):
            config_io.from_python(ROOT / path)
        done = subprocess.run(
            [sys.executable, "train.py", f"--config={path}", f"--workdir={tmp_path}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert words in done.stderr or "there is no file" in done.stderr


@pytest.mark.parametrize("path", TABLES)
def test_a_table_lists_its_rows(path):
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert [f"{path}:{name}" for name in listed] == rows_of(path)
    if "paper" in path:
        assert "table3_grid124_block5      75.74  ResNet-101" in done.stdout


if __name__ == "__main__":
    found = common() | {"configs": {path: resolved(path) for path in ALL}}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
