"""Model folders as on the hub: round trips, folders of other libraries, and damaged ones."""

import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

import deeplab_jax
import small_checkpoint
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub_folder, model_card, saved_model, torch_file
from deeplab_jax.weights.convert import read_model


@pytest.fixture(scope="module")
def saved(model):
    return saved_model.read(model)


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "fox"
    hub_folder.write(saved, folder)
    return folder


@pytest.fixture
def ours(written, tmp_path):
    """A copy of a folder of this package, for damage."""
    return shutil.copytree(written, tmp_path / "ours")


def read_saved(folder):
    return hub_folder.to_saved_model(folder, hub_folder.read(folder))


def write_folder(folder, config=None, name="model.safetensors", arrays=None):
    folder.mkdir(exist_ok=True)
    arrays = {"weight": np.arange(6, dtype=np.float32)} if arrays is None else arrays
    if name.endswith(".safetensors"):
        safetensors.numpy.save_file(arrays, folder / name)
    else:
        torch_file.write(folder / "a.pth", arrays)
        (folder / "a.pth").rename(folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(variables, expected):
    for ours, theirs in zip(variables, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype
            assert ours[name].tobytes() == np.asarray(array).tobytes(), name


# --- This package's ----------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(saved, written):
    back = read_saved(written)
    assert back.info == json.loads(json.dumps(saved.info))
    assert back.architecture == saved.architecture
    assert_same(back.variables, saved.variables)
    assert sorted(os.listdir(written)) == ["config.json", "model.safetensors"]
    assert hub_folder.is_ours(hub_folder.read(written).config)
    with safetensors.safe_open(written / "model.safetensors", "numpy") as stored:
        assert set(stored.keys()) == {*saved.variables.params, *saved.variables.batch_stats}


def test_a_model_without_a_run_has_a_card_without_scores(saved, tmp_path):
    model_card.write(saved, tmp_path, name="me/fox")
    card = (tmp_path / "README.md").read_text()
    front, text = card.split("---\n")[1:]
    assert "library_name: deeplab-jax\npipeline_tag: image-segmentation\n" in front
    assert "license" not in front
    assert "background, red fox, bluebird" in text
    assert 'dl.load("hf://me/fox")' in text
    for absent in ("IoU", "![", "split"):
        assert absent not in text


@pytest.mark.parametrize("license", ["apache-2.0\ntags:", "a b", "mit\n"])
def test_a_license_is_an_identifier(saved, tmp_path, license):
    with pytest.raises(UserError, match="--license must be an identifier"):
        model_card.write(saved, tmp_path, name="me/fox", license=license)


def change(path, value):
    """A function that sets an entry of parsed JSON, or removes it if the value is None."""

    def apply(tree):
        *parents, last = path.split(".")
        for name in parents:
            tree = tree[name]
        tree[last] = value
        if value is None:
            del tree[last]

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("format", 2), "has format 2, and this version of deeplab_jax reads format 1"),
        (change("info", None), "describes no model"),
        (change("info", []), "describes no model"),
        (change("info.mean", None), "missing 1 required .* 'mean'"),
        (change("info.mean", [0.1, 0.2, math.nan]), "do not fit the architecture"),
        (change("info.mean", [0.1, 0.2, math.inf]), "do not fit the architecture"),
        (change("info.mean", [True, 0.2, 0.3]), "mean must be numbers"),
        (change("info.mean", [0.1]), "do not fit the architecture"),
        (change("info.std", [0.1, 0, 1]), "do not fit the architecture"),
        (change("info.classes", ["a", 2, "c"]), "classes must be names"),
        (change("info.classes", ["a", "b"]), "2 class names but 3 colours"),
        (change("info.palette", [[0, 0, 0], [0, 0, 999], [1, 1, 1]]), "describes no model"),
        (change("info.input_size", [33]), "do not fit the architecture"),
        (change("info.architecture.new_option", 1), "describes no model.*new_option"),
        (change("info.architecture.backbone", 18), "backbone.*18"),
        (change("info.architecture.backbone", None), "describes no model.*backbone"),
        (change("info.architecture.backbone", "vgg"), "backbone 'vgg', not registered here"),
        (change("info.architecture.num_classes", 4), "do not fit the architecture"),
        (change("info.architecture.atrous_rates", [6, 1.5]), "atrous_rates must be whole"),
        (change("info.architecture.output_stride", 12), "output_stride"),
        (change("info.architecture.width", 1e29), "does not fit"),
    ],
)
def test_a_damaged_config_of_this_package(ours, damage, message):
    config = json.loads((ours / "config.json").read_text())
    damage(config)
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        _ = read_saved(ours).variables


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: arrays.popitem(), "does not fit .*\n  missing: "),
        (lambda arrays: arrays.update(new=np.zeros(2, np.float32)), "not in the model: new"),
        (
            lambda arrays: arrays.update(
                {"classifier.logits.bias": np.zeros(4, np.float32)},
            ),
            "of another shape: classifier.logits.bias",
        ),
        (
            lambda arrays: arrays.update(
                {"classifier.logits.bias": np.zeros(3, np.float16)},
            ),
            "do not fit its config.json: classifier.logits.bias is float16, not float32",
        ),
        (
            lambda arrays: arrays.update(
                {"classifier.logits.bias": np.full(3, np.nan, np.float32)},
            ),
            "classifier.logits.bias .3 of 3 float32 values.",
        ),
    ],
)
def test_arrays_that_do_not_fit_the_config(ours, damage, message):
    arrays = safetensors.numpy.load_file(ours / "model.safetensors")
    damage(arrays)
    safetensors.numpy.save_file(arrays, ours / "model.safetensors")
    with pytest.raises(UserError, match=message):
        _ = read_model(ours).variables


def test_a_calibration_is_published_with_the_weights_or_not_at_all(ours, tmp_path, monkeypatch):
    (ours / "calibration.json").write_text("its")

    def fail(*paths):
        raise OSError("no space left")

    with monkeypatch.context() as patches:
        patches.setattr(hub_folder.shutil, "copyfile", fail)
        with pytest.raises(OSError, match="no space left"):
            deeplab_jax.convert(ours, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    deeplab_jax.convert(ours, tmp_path / "to")
    assert (tmp_path / "to" / "calibration.json").read_text() == "its"


def test_a_calibration_beside_weights_of_others_stays_there(model, tmp_path):
    deeplab_jax.convert(model, tmp_path / "a.safetensors")
    folder = write_folder(tmp_path / "others", arrays=torch_file.read(tmp_path / "a.safetensors"))
    (folder / "calibration.json").write_text("its")
    deeplab_jax.convert(folder, tmp_path / "to", settings=["model.output_stride=8"])
    hub_folder.write(read_model(folder), tmp_path / "pushed")
    for name in ("to", "pushed"):
        assert not (tmp_path / name / "calibration.json").exists()


def test_settings_and_nonfinite_weights_of_this_packages_folders(ours, tmp_path):
    for options in ({"settings": ["model.output_stride=16"]}, {"classes": "names.txt"}):
        for target in ("to", "to.pth"):
            with pytest.raises(UserError, match="ours describes itself"):
                deeplab_jax.convert(ours, tmp_path / target, **options)
    path = ours / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["classifier.logits.bias"][:] = np.nan
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match=r"classifier.logits.bias \(3 of 3"):
        deeplab_jax.convert(ours, tmp_path / "a")
    deeplab_jax.convert(ours, tmp_path / "a", allow_nonfinite=True)
    kept = saved_model.read(tmp_path / "a").variables.params["classifier.logits.bias"]
    assert np.isnan(kept).all()
    (ours / "config.json").write_text('{"library": "deeplab-jax", "format": 9}')
    with pytest.raises(UserError, match=re.escape(f"{ours / 'config.json'} has format 9")):
        read_model(path)


# --- Other libraries' --------------------------------------------------------------------------


def assert_arrays_of(folder, module):
    file = hub_folder.read(folder)
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert file.arrays.keys() == state.keys()
    for name, array in state.items():
        assert np.array_equal(file.arrays[name], array), name
    return file.config


def test_a_folder_that_timm_wrote(tmp_path):
    import torch_reference  # noqa: F401 because timm imports torchvision

    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet18d", num_classes=5)
    for safe in (True, False):
        folder = tmp_path / f"{safe}"
        timm.models.save_for_hf(module, folder, safe_serialization=safe)
        config = assert_arrays_of(folder, module)
        assert config["architecture"] == "resnet18d"
        assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
def test_a_folder_that_segmentation_models_wrote(tmp_path, name):
    import torch_reference  # noqa: F401 because its encoders import torchvision

    smp = pytest.importorskip("segmentation_models_pytorch")
    module = getattr(smp, name)("resnet18", encoder_weights=None, classes=3)
    module.save_pretrained(tmp_path / "new")
    config = assert_arrays_of(tmp_path / "new", module)
    assert config["decoder_atrous_rates"] == [12, 24, 36]


def test_a_folder_that_transformers_wrote(tmp_path):
    import torch_reference  # noqa: F401 because transformers imports torchvision

    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=3, depth_multiplier=0.35)
    module = transformers.MobileNetV2ForSemanticSegmentation(config)
    module.save_pretrained(tmp_path / "one")
    module.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    for folder in (tmp_path / "one", tmp_path / "sharded"):
        config = assert_arrays_of(folder, module)
        assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize("config", [None, {}, {"library": "other", "classes": ["a"]}])
def test_a_config_of_others_is_handed_over(tmp_path, config):
    file = hub_folder.read(write_folder(tmp_path / "new", config))
    assert file.config == (config or {})
    assert not hub_folder.is_ours(file.config)


# --- Files -------------------------------------------------------------------------------------


def write_shards(folder, names):
    """Writes one array a shard, and their index."""
    folder.mkdir()
    index = {}
    for position, name in enumerate(names):
        array = np.full(3, position, np.float32)
        write_folder(folder, name=name, arrays={f"array{position}": array})
        index[f"array{position}"] = name
    stem = names[0].partition("-")[0] + os.path.splitext(names[0])[1]
    path = folder / f"{stem}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


SHARDS = {
    "safetensors": [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)],
    "bin": [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)],
}


@pytest.mark.parametrize("names", SHARDS.values(), ids=SHARDS)
def test_shards(tmp_path, names):
    index = write_shards(tmp_path / "new", names)
    assert hub_folder.is_hub_folder(index.parent)
    arrays = hub_folder.read(index.parent).arrays
    assert {name: array.tolist() for name, array in arrays.items()} == {
        f"array{position}": [position] * 3 for position in range(3)
    }
    (index.parent / names[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {names[1]}: 1 of the 3 files .* Download them"):
        hub_folder.read(index.parent)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must name files"),
        ({"weight_map": {}}, "weight_map must name files"),
        ({"weight_map": {"a": 1}}, "lacks 1"),
        ({"weight_map": {"a": [1]}}, "weight_map must name files"),
        ({"weight_map": {"a": "../secret.bin"}}, "must name files of the same folder: ../secret"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files of the same folder"),
        ({"weight_map": {"a": ".."}}, "must name files of the same folder"),
    ],
)
def test_a_damaged_index(tmp_path, index, message):
    path = write_shards(tmp_path / "new", SHARDS["safetensors"])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        hub_folder.read(path.parent)


def test_safetensors_are_preferred(tmp_path):
    folder = write_folder(tmp_path / "new", name="pytorch_model.bin", arrays={"b": np.ones(2)})
    assert list(hub_folder.read(folder).arrays) == ["b"]
    write_folder(folder)
    assert list(hub_folder.read(folder).arrays) == ["weight"]


def test_which_folders_are_hub_folders(tmp_path, written, model):
    assert hub_folder.is_hub_folder(written)
    assert not hub_folder.is_hub_folder(model)
    assert not hub_folder.is_hub_folder(written / "config.json")
    assert not hub_folder.is_hub_folder(tmp_path / "absent")
    write_folder(tmp_path / "run", {}).joinpath("checkpoints").mkdir()
    assert not hub_folder.is_hub_folder(tmp_path / "run")  # a workdir with an exported file
    with pytest.raises(UserError, match=r"has no model.safetensors or pytorch_model.bin"):
        hub_folder.read(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": ', "Expecting value"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "integer string conversion"),
    ],
    ids=["empty", "list", "cut", "no text", "deep", "large number"],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    folder = write_folder(tmp_path / "new")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config.json cannot be read as JSON: .*{message}"):
        hub_folder.read(folder)


# --- Mutations ---------------------------------------------------------------------------------

VALUES = (
    *(None, True, -1, 0, 7, 2.5, 1e300, 10**40, "", "x", "resnet50", "\0", [], [1], [[0]], {}),
    {"a": {}},
)


def mutated(rng, tree):
    """A copy of parsed JSON with one entry replaced, removed or added."""
    tree = copy.deepcopy(tree)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return tree


def test_mutated_json_is_read_or_refused(ours, tmp_path):
    rng = random.Random(0)
    index = write_shards(tmp_path / "shards", SHARDS["safetensors"])
    theirs = {
        "_model_class": "DeepLabV3",
        "decoder_atrous_rates": [12, 24, 36],
        "classes": 3,
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]},
        "architecture": "resnet50",
        "id2label": {"0": "a"},
    }
    (index.parent / "config.json").write_text(json.dumps(theirs))
    refused = read = 0
    for path in (ours / "config.json", index, index.parent / "config.json"):
        text = path.read_bytes()
        for count in range(100):
            if count % 4:
                path.write_text(json.dumps(mutated(rng, json.loads(text))))
            else:
                changed = bytearray(text)
                changed[rng.randrange(len(text))] = rng.randrange(256)
                path.write_bytes(changed)
            try:
                file = hub_folder.read(path.parent)
                if hub_folder.is_ours(file.config):
                    found = hub_folder.to_saved_model(path.parent, file)
                    assert dataclasses.is_dataclass(found.architecture)
                    assert found.variables.params
                read += 1
            except UserError:
                refused += 1
        path.write_bytes(text)
    assert refused > 100
    assert read > 30
    assert_same(read_saved(ours).variables, small_checkpoint_variables(ours))


def small_checkpoint_variables(ours):
    return small_checkpoint.write(ours.parent / "again")[1]
