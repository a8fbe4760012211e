"""Weights files and checkpoints with numbers that are no weights, and state dicts in wrappers."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from typer.testing import CliRunner

import deeplab_jax
import small_checkpoint
from deeplab_jax.cli.main import app
from deeplab_jax.config import Config, InitConfig
from deeplab_jax.data.io.images import read_image
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, initialize, saved_model, torch_file
from deeplab_jax.weights.convert import read_model
from random_modules import random_variables
from torch_reference import torch

CONV, VARIANCE = "backbone.layer2.0.conv1.weight", "backbone.bn1.running_var"


@functools.cache
def model(**fields):
    return FunctionalModel(architecture("torchvision_resnet18", num_classes=4, **fields))


@functools.cache
def state_dict():
    """A DeepLabv3 in torchvision's names."""
    return families.from_model(jax.device_get(random_variables(model())), model().architecture)


def spoiled(**values):
    """The state dict with the first of an array's values replaced."""
    arrays = dict(state_dict())
    for name, value in values.items():
        arrays[name] = arrays[name].copy()
        arrays[name].flat[: np.size(value)] = value
    return arrays


def initial(**init):
    config = Config(init=InitConfig(**{field: str(path) for field, path in init.items()}))
    said: list[str] = []
    return initialize.init_variables(config, model(), said.append), said


def to_tensors(value):
    if isinstance(value, dict):
        return {key: to_tensors(item) for key, item in value.items()}
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


# Numbers that are no weights

BAD = {
    "NaN": (
        {CONV: np.nan},
        r"1 of \d+ arrays .*infinite: .*conv1.weight \(1 of 73728 float32",
    ),
    "infinite": ({CONV: [np.inf, -np.inf]}, r"NaN or infinite: .*\(2 of 73728 float32 values\)"),
    "two arrays": ({CONV: np.nan, VARIANCE: np.nan}, r"2 of .*\n.*bn1.running_var \(1 .*; .*conv1"),
    "negative variance": ({VARIANCE: -1}, r"negative variances: backbone\.bn1\.running_var \(1 of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_with_numbers_that_are_no_weights_is_refused(tmp_path, kind):
    values, message = BAD[kind]
    path = tmp_path / "model.pth"
    torch_file.write(path, spoiled(**values))
    convert = functools.partial(deeplab_jax.convert, destination=tmp_path / "out")
    for use in (lambda path: read_model(path).variables, convert):
        with pytest.raises(UserError, match=rf"(?s)model\.pth: .*{message}"):
            use(path)
    with pytest.raises(UserError, match=rf"(?s){message}"):
        families.to_model(torch_file.read(path), model(), backbone_only=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("field", ["path", "backbone"])
def test_training_does_not_start_from_numbers_that_are_no_weights(tmp_path, field):
    torch_file.write(tmp_path / "a.safetensors", spoiled(**{CONV: np.nan}))
    message = rf"(?s)config.init.{field} = .*infinite: .*conv1.weight \(1 of 73728"
    with pytest.raises(UserError, match=message):
        initial(**{field: tmp_path / "a.safetensors"})


def test_a_number_too_large_for_float32_is_refused(tmp_path):
    arrays = spoiled()
    arrays[CONV] = arrays[CONV].astype(np.float64)
    arrays[CONV].flat[0] = 1e300
    torch_file.write(tmp_path / "double.pth", arrays)
    with pytest.raises(UserError, match=r"NaN or infinite: .*\(1 of 73728 float32 values\)"):
        read_model(tmp_path / "double.pth").read_variables()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_types_are_checked(tmp_path, dtype):
    tensors = to_tensors(spoiled(**{CONV: np.nan}))
    tensors = {n: t.to(getattr(torch, dtype)) if t.ndim else t for n, t in tensors.items()}
    torch.save(tensors, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"NaN or infinite: .*\(1 of 73728 float32 values\)"):
        read_model(tmp_path / "half.pth").read_variables()


def test_arrays_that_are_not_used_may_hold_anything(tmp_path):
    arrays = spoiled(**{"classifier.4.bias": np.nan})
    families.to_model(arrays, model(), backbone_only=True)


@pytest.fixture(scope="module", params=[np.nan, -np.inf, -1.0])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of this package with a variance that is none."""
    tmp_path = tmp_path_factory.mktemp("checkpoints")
    _, variables = small_checkpoint.write(tmp_path / "good")
    stats = jax.device_get(variables.batch_stats)
    name = "backbone.stem.0.bn.var"
    stats[name] = np.full_like(stats[name], request.param)
    info = saved_model.read(tmp_path / "good").info
    path = tmp_path / "bad"
    saved_model.write_model(path, Variables(jax.device_get(variables.params), stats), info)
    return path


@pytest.mark.parametrize(
    "command",
    ["predict {} {image} --out {out}", "evaluate {} --data shapes", "export {} {out}.onnx",
     "convert {} {out}.pth", "summary {}"],
)  # fmt: skip
def test_every_command_refuses_such_a_checkpoint(tmp_path, checkpoint, command):
    text = command.format(checkpoint, image=tmp_path / "a.png", out=tmp_path / "out")
    done = CliRunner().invoke(app, text.split())
    assert "backbone.stem.0.bn.var (8 of 8 float32 values)" in str(done.exception or done.output)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_training_may_start_from_the_good_part_of_a_checkpoint(tmp_path):
    net, variables = small_checkpoint.write(tmp_path / "good")
    params = jax.device_get(variables.params)
    name = "classifier.logits.bias"
    params[name] = np.full_like(params[name], np.nan)
    bad = Variables(params, jax.device_get(variables.batch_stats))
    with pytest.raises(UserError, match=r"classifier\.logits\.bias \(3 of 3 float32 values\)"):
        initialize.from_checkpoint(bad, net)
    initialize.from_checkpoint(bad, net, backbone_only=True)


def test_images_that_are_not_finite_are_refused(tmp_path):
    small_checkpoint.write(tmp_path / "model")
    segmenter = deeplab_jax.load(tmp_path / "model")
    images = np.zeros((1, 33, 33, 3), np.float32)
    images[0, 0, 0] = np.nan, np.inf, 0
    with pytest.raises(ValueError, match="2 of 3267 values of images are NaN or infinite"):
        segmenter.logits(images)
    for predict in (segmenter.predict, segmenter.probabilities):
        with pytest.raises(ValueError, match="must be uint8"):
            predict(images[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_float_image_that_is_not_finite_is_refused(tmp_path, value):
    path = tmp_path / "a.tif"
    pixels = np.full((9, 9), 0.5, np.float32)
    pixels[4, 4] = value
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=r"a\.tif: holds numbers from"):
        read_image(path)


@pytest.mark.parametrize("signature", [b"\x80", b"PK"])  # of a pickle, of a zip
def test_safetensors_whose_length_looks_like_a_signature_are_read(tmp_path, signature):
    path, arrays = tmp_path / "a.safetensors", {"a": np.ones(3, np.float32)}
    target = int.from_bytes(signature, "little")
    safetensors.numpy.save_file(arrays, path, {"text": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    safetensors.numpy.save_file(arrays, path, {"text": "x" * ((target - length) % 65536)})
    assert path.read_bytes().startswith(signature)
    assert torch_file.read(path)["a"].tolist() == [1, 1, 1]


# Wrappers


def checkpoint_of(entry, prefix="", **others):
    return {"epoch": 3, entry: {prefix + k: v for k, v in state_dict().items()}, **others}


def averaged(prefix="module."):
    return {"n_averaged": np.array(5)} | {prefix + k: v for k, v in state_dict().items()}


OPTIMIZER = {"state": {0: {"momentum_buffer": np.ones(2, np.float32)}}, "param_groups": []}
# Files, the key and the prefix that the notes must name.
WRAPPED = {
    "a module of one's own": (lambda: averaged("net."), "", "net."),
    "an averaged model": (averaged, "", "module."),
    "an averaged parallel model": (lambda: averaged("module.module."), "", "module."),
    "torch.compile": (lambda: averaged("_orig_mod."), "", "_orig_mod."),
    "Lightning": (lambda: checkpoint_of("state_dict", "model."), "state_dict", "model."),
    "timm": (
        lambda: checkpoint_of("state_dict", state_dict_ema=averaged("")),
        "state_dict",
        "",
    ),
    "only the average": (lambda: checkpoint_of("state_dict_ema"), "state_dict_ema", ""),
    "VainF": (
        lambda: checkpoint_of("model_state", optimizer_state=OPTIMIZER, best_score=np.float64(1)),
        "model_state",
        "",
    ),
    "torchvision": (
        lambda: checkpoint_of("model", model_ema=averaged(), optimizer=OPTIMIZER),
        "model",
        "",
    ),
    "ema": (lambda: {"ema": averaged("model.")}, "ema", "model."),
    "a tensor beside it": (lambda: checkpoint_of("net", best_acc1=np.ones(())), "net", ""),
    "an unknown key": (lambda: checkpoint_of("segmentor"), "segmentor", ""),
    "two dictionaries": (lambda: {"checkpoint": checkpoint_of("model")}, "checkpoint/model", ""),
    "an unknown prefix": (lambda: averaged("student.segmentor."), "", "segmentor."),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_state_dict_is_read_and_the_wrapper_named(tmp_path, kind):
    make, entry, prefix = WRAPPED[kind]
    torch.save(to_tensors(make()), tmp_path / "wrapped.pth")
    file = torch_file.read_file(tmp_path / "wrapped.pth")
    variables, report = families.to_model(file.arrays, model(), notes=file.notes)
    expected = random_variables(model())
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    text = " ".join(report.notes)
    assert f'The state dict was under "{entry}"' in text or not entry
    assert f'All names began with "{prefix}"' in text or not prefix


def test_training_and_conversion_report_the_wrapper(tmp_path):
    torch.save(to_tensors(checkpoint_of("ema", "model.")), tmp_path / "wrapped.pth")
    done = deeplab_jax.convert(tmp_path / "wrapped.pth", tmp_path / "model")
    assert done.notes[0] == 'The state dict was under "ema"; not read: epoch.'
    assert done.notes[1].startswith('All names began with "model."')
    _, said = initial(path=tmp_path / "wrapped.pth")
    assert said[1:3] == list(done.notes[:2])


def test_a_wrapped_backbone_is_read():
    arrays = {
        name.replace("backbone.", "encoder."): array
        for name, array in state_dict().items()
        if name.startswith("backbone.")
    }
    report = families.to_model(arrays, model(), backbone_only=True).report
    assert report.notes == ("Read as segmentation_models.pytorch.",)
    renamed = {name.replace("encoder.", "trunk."): array for name, array in arrays.items()}
    report = families.to_model(renamed, model(), backbone_only=True).report
    assert report.notes[0].startswith('All names began with "trunk."')


@pytest.mark.parametrize("entry", ["", "state_dict"])
def test_two_models_in_one_state_dict_are_named(tmp_path, entry):
    arrays = {f"student.{name}": array for name, array in state_dict().items()}
    arrays |= averaged("teacher.module.") | {"criterion.weight": np.ones(4, np.float32)}
    value = to_tensors(arrays)
    torch.save({entry: value, "epoch": 1} if entry else value, tmp_path / "two.pth")
    expected = [
        '"student" (1', '"criterion" (1 arrays)', 'a DeepLabv3 is under "student."',
        'a DeepLabv3 is under "teacher."', "removeprefix(prefix)",
    ]  # fmt: skip
    expected += ['was under "state_dict"; not read: epoch'] if entry else []
    with pytest.raises(UserError) as caught:
        read_model(tmp_path / "two.pth")
    assert all(text in str(caught.value) for text in expected), caught.value
    for backbone_only in (False, True):
        with pytest.raises(UserError, match=r'a DeepLabv3 is under "student\."'):
            families.to_model(arrays, model(), backbone_only=backbone_only)


def test_an_array_beside_a_wrapped_model_is_said_and_not_read(tmp_path):
    arrays = checkpoint_of("x", "model.")["x"] | {"criterion.weight": np.ones(4, np.float32)}
    torch_file.write(tmp_path / "model.safetensors", arrays)
    done = deeplab_jax.convert(tmp_path / "model.safetensors", tmp_path / "model")
    assert 'The model is under "model."; 1 arrays beside it are not read.' in done.notes
    assert ("criterion.weight", 'is not under "model.", where the model is') in done.dropped


def test_several_unknown_state_dicts_are_listed(tmp_path):
    parts = {"student": {"a.weight": torch.ones(1)}, "teacher": {"a.weight": torch.ones(1)}}
    torch.save(parts, tmp_path / "two.pth")
    message = r"holds 2 state dicts, under 'student' \(1 tensors\), 'teacher' \(1 tensors\)"
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "two.pth")


def test_what_a_wrapper_holds_is_named_even_if_it_is_no_deeplab(tmp_path):
    tensors = {f"model.{part}.weight": torch.ones(1, 1, 1, 1) for part in ("conv", "head")}
    torch.save({"net": tensors}, tmp_path / "other.pth")
    message = r'(?s)holds no DeepLabv3.*names begin with "conv" .*under "net".*with "model\."'
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "other.pth")


def test_dictionaries_that_contain_each_other_take_no_time(tmp_path):
    inner: dict = {}
    inner |= {f"key{i}": inner for i in range(3000)}
    torch.save({f"key{i}": inner for i in range(3000)}, tmp_path / "loop.pth")
    with pytest.raises(UserError, match="but no state dict"):
        torch_file.read(tmp_path / "loop.pth")
