"""The speedrun: the clock, a tiny run, what makes a record, and the table in docs."""

import gzip
import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks import speedrun
from conftest import ROOT
from deeplab_jax import config as config_lib
from deeplab_jax.config import io as config_io
from deeplab_jax.utils.errors import UserError

# A training that is evaluated three times, and notes when.
FAKE = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "metrics.jsonl").open("a", buffering=1) as metrics:
    for step, miou in enumerate((0.2, 0.5, 0.4)):
        time.sleep(0.4)
        metrics.write(json.dumps({"step": step, "eval/miou": miou}) + "\\n")
        (folder / f"{step}.time").write_text(repr(time.monotonic()))
        metrics.write(json.dumps({"step": step, "loss": 1.0}) + "\\n" + '{"step": 9, "ev')
        metrics.write("\\n")
time.sleep(0.4)
sys.exit(sys.argv[2])
"""
TINY = (
    *("model.width=0.125", "model.dtype=float32", "train.steps=2", "train.batch_size=4"),
    *("data.crop_size=33", "data.num_workers=0", "optimizer.warmup_steps=0"),
)


def timed(folder, target):
    """A fake training: its times, and the seconds at which it wrote its evaluations."""
    command = [sys.executable, "-S", "-c", FAKE.replace("sys.exit(sys.argv[2])", ""), str(folder)]
    begun = time.monotonic()
    times = speedrun.time_training(command, folder, target)
    return times, [float((folder / f"{i}.time").read_text()) - begun for i in range(3)]


def test_the_clock_ends_at_the_first_evaluation_that_reaches_the_target(tmp_path):
    times, written = timed(tmp_path / "run", 0.45)
    assert times["seconds"] == pytest.approx(written[1], abs=0.2)
    assert times["total_seconds"] > written[2] + 0.3
    assert (times["step"], times["steps"], times["miou"]) == (1, 2, 0.4)


def test_a_target_that_is_never_reached_has_no_time(tmp_path):
    times, _ = timed(tmp_path / "run", 0.51)
    assert (times["seconds"], times["step"], times["steps"]) == (None, None, 2)


def test_a_training_that_fails_is_quoted(tmp_path):
    command = [sys.executable, "-S", "-c", FAKE, str(tmp_path / "run"), "the disk is full"]
    with pytest.raises(UserError, match=r"(?s)exit code 1\); .*log.txt ends:\nthe disk is full"):
        speedrun.time_training(command, tmp_path / "run", 0.1)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """A few small images, laid out as CamVid."""
    root, rng = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(11)))
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.repeat(rng.integers(0, 12, (1, 32)), 24, axis=0).astype(np.uint8)
            image = np.stack([mask * 20] * 3, axis=-1)
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
    return root


def test_a_tiny_run_is_measured_and_kept_but_is_no_record(camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    command = ["camvid", f"--root={camvid}", f"--workdir={tmp_path}", "--warm", "--seeds=1"]
    command += ["--target=0", f"--json={tmp_path}/records.json", f"--keep={tmp_path}/kept"]
    command += [f"--set={setting}" for setting in TINY]
    assert speedrun.main(command) == 0
    (record,) = json.loads((tmp_path / "records.json").read_text())
    (run,) = record["seeds"]
    assert 0 < run["seconds"] == record["median_seconds"] <= run["total_seconds"]
    assert (run["seed"], run["step"], run["steps"]) == (1, 2, 2)
    assert 0 <= run["miou"] <= 1
    assert record["device"] == "cpu"
    assert record["versions"]["numpy"] == np.__version__
    assert record["deviations"] == [
        "--target 0.0, not 0.4",
        "1 seeds, not 3",
        "--warm kept compiled programs",
        "images to train on, to evaluate on, and classes: [8, 3, 11], not [367, 101, 11]",
    ]
    kept, workdir = tmp_path / "kept", tmp_path / "camvid-random" / "seed1"
    receipt = gzip.decompress((kept / "seed1_receipt.jsonl.gz").read_bytes())
    assert receipt == (workdir / "receipt.jsonl").read_bytes()
    assert (kept / "seed1_metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()
    config = config_io.from_python(kept / "config.py")
    assert (config.seed, config.train.steps, config.eval.protocol) == (1, 2, "native")
    with pytest.raises(UserError, match="seed1 exists: remove it, or choose another --workdir"):
        speedrun.main(command)


def test_wrong_settings_end_before_anything_runs(camvid, tmp_path):
    command = ["camvid", f"--root={camvid}", f"--workdir={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=r"train\.stepz"):
        speedrun.main([*command, "--set=train.stepz=3"])
    for wrong in (["--track=weights"], ["--weights=x.pth"]):
        with pytest.raises(SystemExit):
            speedrun.main([*command, *wrong])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "deviations"),
    [
        (("optimizer.learning_rate=0.1", "train.steps=7", "eval.batch_size=1"), []),
        (("data.split=trainval",), ["config.data.split is not the recipe's"]),
        (("eval.flip=true",), ["config.eval.flip is not the recipe's"]),
        (("init.backbone=x.pth",), ["the start is not that of the track random"]),
    ],
)
def test_another_recipe_can_be_a_record_but_another_protocol_cannot(tmp_path, settings, deviations):
    recipe = config_io.from_python(ROOT / "configs" / "speedrun.py:camvid")
    config = config_io.override(recipe, settings)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    inputs = {f"number of images of {config.data.split}": 367, "number of images of val": 101}
    inputs |= {"classes of val": [str(number) for number in range(11)]}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    args = speedrun.parse(["camvid", "--root=x", "--keep=kept"])
    assert speedrun.deviations(args, recipe, tmp_path, 3) == deviations


def test_the_table_has_the_fastest_record_first_and_no_others():
    run = {"seconds": 30.04, "miou": 0.412, "steps": 600}
    record = {
        "data": "camvid",
        "track": "random",
        "median_seconds": 30.04,
        "seeds": [run] * 3,
        "device": "H100",
        "date": "2026-01-01",
        "config": "configs/speedrun.py:camvid",
        "settings": ["train.steps=600"],
        "kept": "benchmarks/records/camvid-random",
        "deviations": [],
    }
    slower = record | {"median_seconds": 40.0, "date": "2025-12-31"}
    missed = record | {"median_seconds": None}
    other = record | {"median_seconds": 1.0, "deviations": ["2 seeds, not 3"]}
    lines = speedrun.table([slower, missed, other, record]).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines[:2]] == [
        "30.0 (30.0, 30.0, 30.0)",
        "40.0 (30.0, 30.0, 30.0)",
    ]
    assert "| 41.2, 41.2, 41.2 % | 600 | H100 | 2026-01-01 |" in lines[0]
    assert [line.split(" | ")[3] for line in lines[2:]] == ["not measured"] * 3


def test_each_track_has_its_recipe_and_docs_have_the_table():
    for (data, name), track in speedrun.TRACKS.items():
        config = config_io.from_python(ROOT / f"configs/speedrun.py:{track.row}")
        assert (config.data.name == "voc") == (data == "voc")
        assert config.eval.protocol == "native"
        assert track.row == data + ("_weights" if name == "weights" else "")
    page = (ROOT / "docs" / "speedrun.md").read_text()
    assert speedrun.table(json.loads(speedrun.RECORDS.read_text())) in page
