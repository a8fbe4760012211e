"""The command line: `deeplab-jax convert`."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import deeplab_jax
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, saved_model, torch_file
from random_modules import random_variables


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torchvision's ResNet-18 DeepLabv3 with 21 classes would be, and its arrays."""
    model = FunctionalModel(architecture("torchvision_resnet18", num_classes=21))
    variables = jax.device_get(random_variables(model))
    path = tmp_path_factory.mktemp("weights") / "some.pth"
    arrays = families.from_model(variables, model.architecture)
    torch_file.write(path, arrays)
    return path, variables, arrays


def test_round_trip_is_bit_exact_and_needs_no_torch(weights, tmp_path):
    path, variables, arrays = weights
    code = (
        "import sys\nsys.modules |= {'torch': None, 'torchvision': None}\n"
        "from deeplab_jax.cli.main import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", path, tmp_path / "model"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(
        "backbone.layer1.0.conv1.weight" in line and "backbone.layer1.0.conv1.kernel" in line
        for line in lines
    )
    assert "torchvision_resnet18, 21 classes, auxiliary head: yes" in done.stdout
    saved = saved_model.read(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, saved.variables, variables)
    assert saved.info["classes"][15] == "person"
    assert saved.info["architecture"]["name"] == "torchvision_resnet18"
    json.dumps(saved.info)

    for name in ("back.pth", "back.safetensors"):
        back = deeplab_jax.convert(tmp_path / "model", tmp_path / name)
        again = torch_file.read(back.destination)
        assert again.keys() == arrays.keys()
        for key, value in arrays.items():
            np.testing.assert_array_equal(again[key], value, err_msg=key)
    # Named pairs are of arrays with the same numbers.
    theirs = torch_file.read(tmp_path / "back.pth")
    ours = saved.variables.params | saved.variables.batch_stats
    for mine, their in back.used:
        assert np.sort(ours[mine], axis=None)[0] == np.sort(theirs[their], axis=None)[0]


def test_dropped_arrays_are_reported(weights, command, tmp_path):
    arrays = {
        f"module.{name}": array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in weights[2].items()
    }
    torch_file.write(tmp_path / "half.pth", arrays)
    code, out, err = command("convert", tmp_path / "half.pth", tmp_path / "model", "--quiet")
    assert code == 0, err
    assert 'All names began with "module."' in out
    assert "arrays were float16 and became float32." in out
    name = "backbone.stem.0.conv.kernel"
    half = weights[1].params[name].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(saved_model.read(tmp_path / "model").variables.params[name], half)


def test_quiet_prints_only_the_result(weights, command, tmp_path):
    code, out, err = command("convert", weights[0], tmp_path / "model", "--quiet")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "model")
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["Assumed", "some.pth:"]
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("missing.pth", "model", "neither a weights file"),
        ("deeplabv3_resnet5", "model", "deeplabv3_resnet50"),
        ("WEIGHTS", "out.pth", "is converted to a folder"),
        ("WEIGHTS", ".", "exists already"),
        (".", "model", "no checkpoint at"),
        (".", "out.pth", "no checkpoint at"),
        ("garbage.pth", "model", "garbage.pth"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(
    weights, command, monkeypatch, tmp_path, source, destination, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage.pth").write_bytes(b"PK\x03\x04 not a zip")
    before = sorted(tmp_path.iterdir())
    source = weights[0] if source == "WEIGHTS" else source
    code, _, err = command("convert", source, destination)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_is_converted_to_a_file_only(model, command, tmp_path):
    code, _, err = command("convert", model, tmp_path / "folder")
    assert code == 2
    assert "is a checkpoint: it is converted to a file that ends in .pth" in err
    assert not (tmp_path / "folder").exists()


def test_a_model_torchvision_does_not_have_is_refused(tmp_path):
    model = FunctionalModel(
        architecture("paper_resnet18", num_classes=2, width=0.125, decoder="transposed")
    )
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract)
    fields = dataclasses.asdict(model.architecture)
    info = {"format": saved_model.FORMAT, "architecture": fields, "registered_by": {}}
    saved_model.write_model(tmp_path / "model", variables, info)
    with pytest.raises(UserError, match="decoder"):
        deeplab_jax.convert(tmp_path / "model", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_options_for_what_a_file_does_not_tell(weights, command, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"thing {i}\n" for i in range(21)))
    arrays = dict(weights[2])
    name = "backbone.conv1.weight"
    arrays[name] = np.full_like(arrays[name], np.nan)
    torch_file.write(tmp_path / "nan.pth", arrays)
    options = ("--set", "model.output_stride=16", "--set", "data.mean=0,0,0",
               "--classes", tmp_path / "names.txt", "--as", "torchvision")  # fmt: skip
    code, _, err = command("convert", tmp_path / "nan.pth", tmp_path / "model", *options)
    assert (code, name in err) == (2, True)
    code, _, err = command(
        "convert", tmp_path / "nan.pth", tmp_path / "model", *options, "--allow-nonfinite"
    )
    assert code == 0, err
    saved = saved_model.read(tmp_path / "model")
    assert (saved.architecture.output_stride, saved.info["mean"]) == (16, [0, 0, 0])
    assert saved.info["classes"][20] == "thing 20"
    code, _, err = command("convert", weights[0], tmp_path / "other", "--as", "smp")
    assert code == 2
    assert "--as smp: the file does not have the names of segmentation_models.pytorch" in err


def test_help_has_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = command("convert", "--help")
    assert "deeplab-jax convert deeplabv3_resnet50_coco-cd0a2569.pth runs/coco" in out
    assert "convert" in command("--help")[1]
