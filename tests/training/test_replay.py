"""Replayed steps, and what is found when a run, its data, its code or a checkpoint was changed."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
from deeplab_jax.config import SecondStageConfig
from deeplab_jax.data import pipeline
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.training import bisect as bisect_lib
from deeplab_jax.training import checkpoint, provenance, receipt
from deeplab_jax.training.bisect import Batches
from deeplab_jax.training.replay import choose_window, replay
from deeplab_jax.training.state import abstract_state
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError
from own_data import NAMES, Maker

pytestmark = pytest.mark.usefixtures("shared_steps")


def get_config(**fields):
    return tiny.short_config(**{"train__save_every": 1, "train__keep": 9} | fields)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data set of one's own, a run on it, and its config."""
    root = tmp_path_factory.mktemp("own")
    maker = Maker(root / "data")
    for index in range(12):
        maker.pair(f"{index:02}", shape=(33, 33))
    maker.text("classes.txt", *NAMES)
    config = get_config()
    config.data = dataclasses.replace(maker.config(), split="train", crop_size=(33,), num_workers=0)
    train(config, root / "run")
    return root, config


@pytest.fixture
def copied(own, tmp_path):
    """A copy of that data set and run, and the config for it."""
    root, config = own
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    config = copy.deepcopy(config)
    config.data.root = str(tmp_path / "data")
    return tmp_path / "run", config


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bisect(one, other, **options):
    read = [receipt.read(one), receipt.read(other)]
    return bisect_lib.bisect(*read, tuple(Batches(each, **options) for each in read))


@pytest.mark.parametrize(
    ("steps", "start", "num_steps", "num_states"),
    [(None, 3, 1, 2), ((1, 3), 1, 2, 3), ((0, 2), 0, 2, 3)],
)
def test_a_window_replays_bit_for_bit_and_the_run_is_only_read(
    own, steps, start, num_steps, num_states
):
    before = files(own[0])
    result = replay(own[0] / "run", steps)
    assert result.difference is None
    assert result.steps == (start + 1, start + num_steps)
    assert result.num_states == num_states
    assert result.changes == []
    assert files(own[0]) == before


def test_replay_from_the_start_without_checkpoints(own, tmp_path):
    shutil.copy(own[0] / "run" / receipt.FILE, tmp_path)
    with pytest.raises(UserError, match=r"covers steps 1 to 4, and the checkpoints are at no st"):
        replay(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint at or before step 2.* --from-start"):
        replay(tmp_path, (2, 4))
    result = replay(tmp_path, (2, 4), from_start=True)
    assert result.difference is None
    assert result.steps == (1, 4)


@pytest.mark.parametrize("steps", [(0, 5), (2, 2), (3, 1)])
def test_steps_that_are_not_covered(own, steps):
    with pytest.raises(UserError, match=r"that .* covers, or 0 and one of them: steps 1 to 4"):
        choose_window(receipt.read(own[0] / "run"), [1, 2], steps, from_start=False)


def test_a_stage_of_two_replays(tmp_path):
    config = get_config(second_stage=SecondStageConfig(steps=2, output_stride=8, split="val"))
    config.train.steps = 2
    train(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert replay(tmp_path / "moved", (0, 2)).difference is None
    assert replay(tmp_path / "moved" / "stage1", (0, 2)).difference is None


def test_data_may_move(copied):
    run, _ = copied
    (run.parent / "data").rename(run.parent / "elsewhere")
    with pytest.raises(UserError, match="data"):
        replay(run.parent / "run", root=str(run.parent / "data"))
    assert replay(run, root=str(run.parent / "elsewhere")).difference is None


def test_a_flipped_bit_in_a_checkpoint_is_found(copied):
    run, config = copied
    parts = tiny.Run(config)
    folder = run / "checkpoints" / "2"
    state = checkpoint.read_state(folder, abstract_state(config, parts.model, parts.mesh))
    name = "backbone.layer1.0.conv1.kernel"
    kernel = np.array(state.variables.params[name])
    kernel.view(np.uint32)[0, 0, 0, 0] ^= 1 << 7
    state.variables.params[name] = jax.device_put(kernel, mesh_lib.replicated(parts.mesh))
    info = json.loads((folder / "info" / "data.json").read_text())
    shutil.rmtree(run / "checkpoints")
    saved = checkpoint.Checkpoints(run / "checkpoints", keep=1, log=print)
    saved.save(state, 2, info, None, wait=True)
    saved.close()
    found = replay(run, (2, 4)).difference
    assert (found.step, found.what, found.where) == (2, "state", [f"params/{name}"])


def test_a_damaged_file_of_a_checkpoint_is_named(copied):
    run, _ = copied
    for path in (run / "checkpoints" / "2" / "model").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read"):
        replay(run, (2, 4))


def test_a_changed_image_is_named(copied):
    run, config = copied
    dataset = tiny.Run(config).dataset
    # An image that the first batch does not have.
    size = len(dataset.source)
    order = [pipeline.train_index(size, config.seed, position) for position in range(16)]
    row = next(row for row in range(8) if order[8 + row] not in order[:8])
    rows = [each for each in range(8) if order[8 + each] == order[8 + row]]
    name = dataset.source[order[8 + row]]["name"]
    (path,) = (run.parent / "data" / "images").rglob(f"{name}.*")
    pixels = np.asarray(Image.open(path)).copy()
    pixels[:] = 255 - pixels
    Image.fromarray(pixels).save(path)
    result = replay(run, (1, 3), root=config.data.root)
    assert (result.difference.step, result.difference.what) == (2, "batch")
    assert result.difference.where == rows
    assert result.image == {"index": order[8 + row], "name": name}
    again = run.parent / "again"
    train(config, again)
    found = bisect(run, again)
    assert (found.difference.step, found.difference.where) == (2, rows)
    assert found.image["images"][0]["name"] == name
    # The receipt says where the data were when the run was made: there they are as they were.
    colors = np.array(found.image["colors"])
    assert (abs(colors.sum(0) - 255) <= 1).all()
    found = bisect(run, again, root=config.data.root)
    assert "the batch of A is not at hand" in found.image["reason"]
    assert found.causes[0].startswith("pixels of images of train")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    train(get_config(), workdir)
    return workdir


def test_the_same_run_twice_is_equal(first, tmp_path):
    train(get_config(data__num_workers=1, train__save_every=2), tmp_path)
    found = bisect(first, tmp_path)
    assert found.difference is None
    assert found.steps == (1, 4)
    assert {change.name for change in found.changes} == {"data.num_workers", "train.save_every"}


def test_a_changed_seed(first, tmp_path):
    train(get_config(seed=1), tmp_path)
    found = bisect(first, tmp_path)
    assert (found.difference.step, found.difference.what) == (0, "state")
    assert (found.batch.step, found.batch.where) == (1, [*range(8)])
    assert found.causes == ["config.seed: 0 | 1"]


@pytest.mark.parametrize(
    ("field", "value", "step", "what"),
    [
        ("data__scale_range", (0.6, 2.0), 1, "batch"),
        ("loss__label_smoothing", 0.1, 1, "loss"),
        ("optimizer__learning_rate", 0.06, 1, "learning_rate"),
        ("optimizer__momentum", 0.8, 2, "state"),
        ("train__steps", 5, 2, "learning_rate"),
    ],
)
def test_a_changed_field(first, tmp_path, field, value, step, what):
    train(get_config(**{field: value}), tmp_path)
    found = bisect(first, tmp_path)
    assert (found.difference.step, found.difference.what) == (step, what)
    assert len(found.causes) == 1
    assert found.causes[0].startswith(f"config.{field.replace('__', '.')}: ")


def test_pixels_of_batches_that_can_be_made_again(first, tmp_path):
    train(get_config(data__flip=False), tmp_path)
    found = bisect(first, tmp_path)
    batches = [
        pipeline.train_batch(
            tiny.Run(config).dataset, config.data, batch_size=8, seed=0, step=found.batch.step - 1
        )
        for config in (get_config(), get_config(data__flip=False))
    ]
    row = found.image["row"]
    assert row == found.batch.where[0]
    images = [batch["image"][row] for batch in batches]
    labels = [batch["label"][row] for batch in batches]
    differs = (images[0] != images[1]).any(-1) | (labels[0] != labels[1])
    y, x = np.argwhere(differs)[0]
    assert (found.image["y"], found.image["x"], found.image["pixels"]) == (y, x, differs.sum())
    assert found.image["colors"] == [image[y, x].tolist() for image in images]
    assert found.causes == ["config.data.flip: true | false"]


@pytest.mark.parametrize("root", ["", "gs://bucket/voc"])
def test_bisect_downloads_no_data(first, tmp_path, monkeypatch, root):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    start, state, step, *rest = map(json.loads, (first / receipt.FILE).read_text().splitlines())
    start["config"] |= {"data.name": "voc", "data.root": root}
    for name, line in {"a": step, "b": step | {"batch": step["batch"][::-1]}}.items():
        (tmp_path / name).mkdir()
        text = "\n".join(map(json.dumps, (start, state, line, *rest)))
        (tmp_path / name / receipt.FILE).write_text(text)
    found = bisect(tmp_path / "a", tmp_path / "b")
    assert found.batch.step == 1
    assert [image["name"] for image in found.image["images"]] == [None, None]
    assert "the data are not on this machine" in found.image["reason"]


def test_changed_code_and_kept_batches(first, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    assert replay(first, (0, 4), keep_batches=tmp_path / "kept").difference is None
    assert len(list((tmp_path / "kept").iterdir())) == 4
    real = pipeline.augment

    def darker(image, *arguments, **options):
        return real(image // 2, *arguments, **options)

    monkeypatch.setattr(pipeline, "augment", darker)
    versions = provenance.byte_versions() | {"deeplab_jax source": "0123456789ab"}
    monkeypatch.setattr(provenance, "byte_versions", lambda: versions)
    train(get_config(), tmp_path / "run")
    result = replay(first, (0, 4))
    assert (result.difference.step, result.difference.what) == (1, "batch")
    read = [receipt.read(first), receipt.read(tmp_path / "run")]
    batches = Batches(read[0], folder=str(tmp_path / "kept")), Batches(read[1])
    found = bisect_lib.bisect(*read, batches)
    assert found.image["pixels"] > 500
    for causes in (result.causes, found.causes):
        assert len(causes) == 1
        assert causes[0].startswith("version of deeplab_jax source: ")
        assert "0123456789ab" in causes[0]


def test_other_devices_compute_other_roundings_of_the_same_batches(first, tmp_path):
    train(get_config(mesh__data=4), tmp_path)
    found = bisect(first, tmp_path)
    assert found.batch is None
    assert found.difference.what in ("loss", "grad_norm")
    assert any("devices: devices: 1 | 4" in cause for cause in found.causes)
    (note,) = (note for note in found.notes if "all batches are equal" in note)
    assert float(note.split("at most ")[1].split()[0]) < 1e-3


def test_other_batch_sizes_are_not_compared(first, tmp_path):
    start, *rest = (first / receipt.FILE).read_text().splitlines()
    start = json.loads(start)
    start["config"]["train.batch_size"] = 4
    (tmp_path / receipt.FILE).write_text("\n".join([json.dumps(start), *rest]))
    found = bisect(first, tmp_path)
    assert found.steps is None
    assert not found.to_json()["equal"]
    assert "no step of one is a step of the other" in found.notes[0]


def test_a_shorter_run_is_compared_as_far_as_it_goes(first, tmp_path):
    lines = (first / receipt.FILE).read_text().splitlines(keepends=True)
    (tmp_path / receipt.FILE).write_text("".join(lines[:5]) + lines[5][:40])
    found = bisect(first, tmp_path)
    assert found.difference is None
    assert found.steps == (1, 2)
    assert any("is cut short" in note for note in found.notes)
    assert any("covers steps 1 to 4; the common ones are compared" in note for note in found.notes)


def test_one_flipped_bit_of_each_number_is_named(first, tmp_path):
    lines = (first / receipt.FILE).read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if json.loads(line).get("loss") and i > 4)
    line = json.loads(lines[number])
    for what in bisect_lib.ORDER:
        if what not in line:
            continue
        digit = f"{int(line[what][-1], 16) ^ 1:x}"
        changed = json.dumps(line | {what: line[what][:-1] + digit})
        (tmp_path / receipt.FILE).write_text(
            "\n".join([*lines[:number], changed, *lines[number + 1 :]])
        )
        found = bisect(first, tmp_path).difference
        assert (found.step, found.what) == (line["step"], what)
        assert found.where == ([7] if what == "batch" else [])
