"""Initial variables from checkpoints and torchvision's files, in full or in part."""

import re

import jax
import numpy as np
import pytest

from conftest import SHARED
from deeplab_jax.config import Config, InitConfig
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, initialize, torch_file


def model_with(**fields) -> FunctionalModel:
    fields = {"name": "torchvision_resnet18", "num_classes": 5, "width": 0.125} | fields
    return FunctionalModel(architecture(fields.pop("name"), **fields))


def variables(model, log=lambda text: None, **init) -> Variables:
    return initialize.init_variables(Config(init=InitConfig(**init)), model, log)


@pytest.fixture(scope="module")
def source():
    """A model of 5 classes with an auxiliary head, and its random variables."""
    model = model_with()
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(7)))


@pytest.fixture(scope="module", params=[".pth", ".safetensors"])
def file(request, source, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"model{request.param}"
    torch_file.write(path, families.from_model(source[1], source[0].architecture))
    return path


def test_a_seed_gives_its_own_variables():
    model = model_with()
    one, same = variables(model), variables(model)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    other = initialize.init_variables(Config(seed=1), model, print)
    name = "backbone.stem.0.conv.kernel"
    assert np.any(one.params[name] != other.params[name])


def test_a_weights_file_gives_all_variables(file, source):
    model, expected = source
    jax.tree.map(np.testing.assert_array_equal, variables(model, path=str(file)), expected)


def test_another_number_of_classes_keeps_the_last_layers_random_and_logs_it(file, source):
    said: list[str] = []
    model = model_with(num_classes=3)
    taken, fresh = variables(model, said.append, path=str(file)), variables(model)
    last = {
        f"{h}.logits.{leaf}"
        for h in ("classifier", "aux_classifier")
        for leaf in ("bias", "kernel")
    }
    for name, value in taken.params.items():
        expected = fresh if name in last else source[1]
        np.testing.assert_array_equal(value, expected.params[name], err_msg=name)
    (line,) = [line for line in said if "other number of classes" in line]
    assert all(name in line for name in last)


def test_a_backbone_leaves_the_heads_fresh(file, source):
    model = model_with(name="paper_resnet18")
    taken, fresh = variables(model, backbone=str(file)), variables(model)
    for name, value in taken.params.items():
        expected = source[1] if name.startswith("backbone.") else fresh
        np.testing.assert_array_equal(value, expected.params[name], err_msg=name)


def test_a_checkpoint_may_lack_allowed_arrays(source):
    model, saved = source
    name = "backbone.layer4.1.conv2.kernel"
    part = Variables({n: v for n, v in saved.params.items() if n != name}, saved.batch_stats)
    with pytest.raises(UserError, match=rf"missing: {re.escape(name)}"):
        initialize.from_checkpoint(part, model)
    taken, report = initialize.from_checkpoint(part, model, allow_missing=r"layer4\.1\.conv2")
    assert report.missing == (name,)
    assert taken.params.keys() == saved.params.keys() - {name}


def test_the_backbone_of_a_cascade_is_one_without_it():
    cascade = model_with(name="paper_resnet18", atrous_rates=(), cascade=1)
    saved = jax.device_get(jax.jit(cascade.init)(jax.random.key(7)))
    assert any(name.startswith("backbone.layer5.") for name in saved.params)
    model = model_with(name="paper_resnet18")
    taken, _ = initialize.from_checkpoint(saved, model, backbone_only=True)
    backbone = {name for name in model.abstract.params if name.startswith("backbone.")}
    assert taken.params.keys() == backbone
    for name in backbone:
        np.testing.assert_array_equal(taken.params[name], saved.params[name])


def test_extra_arrays_and_other_shapes_are_errors(source):
    _, saved = source
    with pytest.raises(UserError, match=r"not in the model: .*head_conv\.conv\.kernel"):
        initialize.from_checkpoint(saved, model_with(aux_head=False))
    with pytest.raises(UserError, match=r"stem\.0\.conv\.kernel is \[7, 7, 3, 8\]"):
        initialize.from_checkpoint(saved, model_with(in_channels=4))


@pytest.mark.parametrize("field", ["path", "backbone"])
def test_the_error_for_an_unknown_source_lists_the_names(field):
    with pytest.raises(UserError, match=rf"config.init.{field} = 'nothing' is neither .*resnet101"):
        variables(model_with(), **{field: "nothing"})


def test_real_imagenet_weights_that_lack_four_convolutions():
    path = SHARED / "weights" / "resnet18_partial.pth"
    if not path.exists():
        pytest.skip(f"real weights are not at {path}")
    model = model_with(name="paper_resnet18", width=1.0)
    with pytest.raises(UserError, match=r"(?s)missing: .*layer4.*allow_missing=REGEX"):
        variables(model, backbone=str(path))
    said: list[str] = []
    allowed = r"layer4\.\d\.(conv|bn)"
    taken = variables(model, said.append, backbone=str(path), allow_missing=allowed)
    (line,) = [line for line in said if "missing as allowed" in line]
    assert line.count("kernel") == 4
    stem = torch_file.read(path)["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(taken.params["backbone.stem.0.conv.kernel"], stem)
