"""Names, axes and errors of the conversion in both directions; test_parity.py compares outputs."""

import dataclasses
import functools
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import torch_reference
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, torch_file
from random_modules import random_variables
from torch_reference import torch


@functools.cache
def functional(name, num_classes=21, **overrides):
    return FunctionalModel(architecture(name, num_classes=num_classes, **overrides))


@functools.cache
def shapes_of(build, *arguments, **options):
    """torchvision's state dict as arrays that take no memory, of the right names and shapes."""
    with torch.device("meta"):
        state_dict = getattr(torch_reference, build)(*arguments, **options).state_dict()
    return {
        name: np.broadcast_to(
            np.zeros((), np.int64 if tensor.dtype == torch.int64 else np.float32),
            tuple(tensor.shape),
        )
        for name, tensor in state_dict.items()
    }


def deeplab(depth, aux=True, num_classes=21):
    return dict(
        shapes_of(
            "segmentation_model", f"deeplabv3_resnet{depth}", aux=aux, num_classes=num_classes
        )
    )


def classifier(depth):
    return dict(shapes_of("classifier", f"resnet{depth}"))


@pytest.fixture(scope="module")
def small():
    """A narrow ResNet-18 DeepLabv3 in torchvision's names, each number another."""
    model = functional("torchvision_resnet18", num_classes=5, width=0.125)
    variables = jax.device_get(random_variables(model))
    return model, variables, families.from_model(variables, model.architecture)


# What fits


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("aux", [True, False])
def test_every_array_of_a_segmentation_model_is_used_once(depth, aux):
    arrays = deeplab(depth, aux)
    model = functional(f"torchvision_resnet{depth}", aux_head=aux)
    (params, batch_stats), report = families.to_model(arrays, model)
    assert {k: v.shape for k, v in params.items()} == {
        k: v.shape for k, v in model.abstract.params.items()
    }
    assert batch_stats.keys() == model.abstract.batch_stats.keys()
    used, dropped = [theirs for theirs, _ in report.used], [theirs for theirs, _ in report.dropped]
    assert sorted(used + dropped) == sorted(arrays)
    assert sorted(ours for _, ours in report.used) == sorted(params | batch_stats)
    assert dropped == [name for name in arrays if name.endswith("num_batches_tracked")]
    assert (report.replaced, report.missing, report.notes) == ((), (), ())
    assert families.architecture_of(arrays) == model.architecture


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_a_classifier_is_a_backbone(depth):
    arrays = classifier(depth)
    model = functional(f"torchvision_resnet{depth}")
    (params, _), report = families.to_model(arrays, model, backbone_only=True)
    backbone = {name for name in model.abstract.params if name.startswith("backbone.")}
    assert params.keys() == backbone
    assert ("fc.weight", "belongs to a head, and only the backbone is used") in report.dropped
    assert ("conv1.weight", "backbone.stem.0.conv.kernel") in report.used
    assert len(report.used) + len(report.dropped) == len(arrays)


def test_a_segmentation_model_serves_as_a_backbone_for_the_papers():
    model = functional("paper_resnet50", num_classes=3)
    (params, batch_stats), report = families.to_model(deeplab(50), model, backbone_only=True)
    assert all(name.startswith("backbone.") for name in params | batch_stats)
    assert any(theirs == "aux_classifier.4.bias" for theirs, _ in report.dropped)


def test_the_auxiliary_head_is_dropped_where_the_model_has_none():
    model = functional("torchvision_resnet50", aux_head=False)
    report = families.to_model(deeplab(50), model).report
    dropped = dict(report.dropped)
    assert dropped["aux_classifier.0.weight"].startswith("belongs to the auxiliary head")


def test_axes_of_a_kernel(small):
    model, _, arrays = small
    name = "backbone.layer2.0.conv1.weight"
    (params, _), _ = families.to_model(arrays, model)
    kernel = params["backbone.layer2.0.conv1.kernel"]
    for place in [(0, 1, 2, 0), (3, 5, 1, 2)]:
        out, into, row, column = place
        assert kernel[row, column, into, out] == arrays[name][place]


def test_variables_do_not_share_memory_with_the_file(small):
    model, _, arrays = small
    (params, batch_stats), report = families.to_model(arrays, model)
    for theirs, ours in report.used:
        assert not np.shares_memory(arrays[theirs], (params | batch_stats)[ours]), ours


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_bit_exact(tmp_path, small, suffix):
    model, variables, arrays = small
    torch_file.write(tmp_path / f"a{suffix}", arrays)
    back, _ = families.to_model(torch_file.read(tmp_path / f"a{suffix}"), model)
    for group, expected in zip(back, variables, strict=True):
        assert group.keys() == expected.keys()
        assert all(group[name].tobytes() == expected[name].tobytes() for name in expected)


def test_torchvision_loads_strictly_what_is_written(tmp_path):
    arrays = {
        name: np.arange(array.size, dtype=np.float32).reshape(array.shape) + index
        for index, (name, array) in enumerate(deeplab(50, num_classes=4).items())
        if not name.endswith("num_batches_tracked")
    }
    model = functional("torchvision_resnet50", num_classes=4)
    variables, _ = families.to_model(arrays, model)
    torch_file.write(tmp_path / "back.pth", families.from_model(variables, model.architecture))
    with torch.device("meta"):
        target = torch_reference.segmentation_model("deeplabv3_resnet50", aux=True, num_classes=4)
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    target.load_state_dict(loaded, strict=True, assign=True)
    for name, array in arrays.items():
        assert np.array_equal(target.state_dict()[name], array), name


def test_variables_of_jax_can_be_written(small):
    _, variables, arrays = small
    back = families.from_model(jax.tree.map(jax.numpy.asarray, variables), small[0].architecture)
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(small, prefix):
    model, variables, arrays = small
    (params, _), report = families.to_model({prefix + k: v for k, v in arrays.items()}, model)
    assert all(np.array_equal(params[name], variables.params[name]) for name in params)
    assert "".join(re.findall(r'"(.*?)"', " ".join(report.notes))) == prefix


# Changes that the report lists


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_types_are_converted(small, dtype):
    model, variables, arrays = small
    floating = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in arrays.items()}
    (params, _), report = families.to_model(floating, model)
    name = "backbone.stem.0.conv.kernel"
    assert params[name].dtype == np.float32
    assert np.array_equal(params[name], variables.params[name].astype(dtype).astype(np.float32))
    count = len(variables.params) + len(variables.batch_stats)
    assert report.notes == (f"{count} arrays were {np.dtype(dtype)} and became float32.",)


def test_logits_of_another_number_of_classes_stay_random():
    model = functional("torchvision_resnet50", num_classes=7)
    (params, _), report = families.to_model(deeplab(50), model)
    logits = {
        f"{head}.logits.{leaf}"
        for head in ("classifier", "aux_classifier")
        for leaf in ("kernel", "bias")
    }
    assert set(report.replaced) == logits
    assert params.keys() == model.abstract.params.keys() - logits
    assert not logits & {ours for _, ours in report.used}


def test_allowed_missing_arrays_are_listed(small):
    model, _, arrays = small
    partial = {k: v for k, v in arrays.items() if "layer4.1." not in k}
    (params, batch_stats), report = families.to_model(partial, model, allow_missing=r"layer4\.1\.")
    missing = {n for group in model.abstract for n in group if "layer4.1." in n}
    assert set(report.missing) == missing
    assert missing.isdisjoint(params | batch_stats)
    with pytest.raises(UserError, match=r"missing: backbone\.layer4\.1\.bn1\.bias;"):
        families.to_model(partial, model, allow_missing=r"layer4\.1\.conv")


def test_real_partial_imagenet_weights(shared_data):
    path = shared_data.parent / "weights" / "resnet18_partial.pth"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    arrays, model = torch_file.read(path), functional("paper_resnet18")
    with pytest.raises(UserError, match=r"missing: backbone\.layer4\.0\.bn1"):
        families.to_model(arrays, model, backbone_only=True)
    (params, _), report = families.to_model(
        arrays, model, backbone_only=True, allow_missing=r"layer4\.[01]\.(conv|bn)"
    )
    assert sum("conv" in name for name in report.missing) == 4
    assert np.array_equal(
        params["backbone.stem.0.conv.kernel"], torch.load(path)["conv1.weight"].permute(2, 3, 1, 0)
    )


# What does not fit


def refusal(arrays, model, **options):
    with pytest.raises(UserError) as caught:
        families.to_model(arrays, model, **options)
    return str(caught.value)


def test_all_problems_are_shown_together(small):
    model, _, arrays = small
    arrays = dict(arrays)
    del arrays["classifier.2.bias"]
    arrays["backbone.conv1.weight"] = arrays["backbone.conv1.weight"][:, :2]
    arrays["backbone.bn1.weight"] = arrays["backbone.bn1.weight"].astype(np.int32)
    arrays["backbone.layer5.0.conv1.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    arrays["extra"] = np.zeros(3, np.float32)
    message = refusal(arrays, model)
    for line in (
        "does not fit torchvision_resnet18:",
        "missing: classifier.2.bias\n",
        "of another shape: backbone.conv1.weight is [8, 2, 7, 7], the model's is [8, 3, 7, 7]\n",
        "of another type: backbone.bn1.weight is int32, not floating point\n",
        "not in the model: backbone.layer5.0.conv1.weight; extra\n",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("file", "model", "found"),
    [
        (lambda: deeplab(101), "torchvision_resnet50", "torchvision_resnet101 (100% of the arrays"),
        (lambda: deeplab(50, aux=False), "paper_resnet18", "torchvision_resnet50 (100% of the"),
    ],
)
def test_another_architecture_is_named(file, model, found):
    message = refusal(file(), functional(model, aux_head=False))
    assert f"it is nearest to {found}" in message
    assert f"--config.model.architecture={found.split()[0]}`" in message


def test_another_backbone_is_named():
    message = refusal(classifier(34), functional("paper_resnet18"), backbone_only=True)
    assert "the file's backbone does not fit paper_resnet18" in message
    assert "nearest to torchvision_resnet34 (100% of the arrays agree)" in message


def test_an_unknown_model_names_the_nearest():
    arrays = deeplab(50)
    arrays = {k.replace("backbone.layer3.5", "backbone.layer3.6"): v for k, v in arrays.items()}
    message = refusal(arrays, functional("torchvision_resnet50"))
    assert "not in the model: backbone.layer3.6.bn1.bias" in message
    assert re.search(r"nearest to torchvision_resnet50 all the same \(9\d% of the arrays", message)
    assert "`--config.init.allow_missing=REGEX`" in message


def test_no_auxiliary_head_in_the_file():
    message = refusal(deeplab(50, aux=False), functional("torchvision_resnet50"))
    assert "missing: aux_classifier.0.weight" in message
    assert "`--config.model.aux_head=False`" in message


def test_a_classifier_is_not_a_segmentation_model():
    assert "--config.init.backbone" in refusal(classifier(50), functional("torchvision_resnet50"))
    with pytest.raises(UserError, match="holds no DeepLabv3"):
        families.architecture_of(classifier(50))


def test_logits_may_differ_only_in_the_number_of_classes():
    arrays = deeplab(50, num_classes=3)
    arrays["classifier.4.weight"] = np.zeros((3, 128, 1, 1), np.float32)
    message = refusal(arrays, functional("torchvision_resnet50"))
    assert "classifier.4.weight is [3, 128, 1, 1], the model's is [21, 256, 1, 1]" in message


def test_bad_pattern(small):
    model, _, arrays = small
    assert "must be a regular expression, got '('" in refusal(arrays, model, allow_missing="(")


def test_variables_without_a_counterpart_cannot_be_written():
    model = functional("torchvision_resnet18", width=0.125, decoder="transposed")
    zeros = Variables(*({k: np.zeros(v.shape) for k, v in g.items()} for g in model.abstract))
    with pytest.raises(UserError, match=r"decoder\.kernel has no counterpart"):
        families.from_model(zeros, model.architecture)
    arrays = families.from_model(
        zeros._replace(params={k: v for k, v in zeros.params.items() if "decoder" not in k}),
        model.architecture,
    )
    assert "missing: decoder.kernel" in refusal(arrays, model)


def test_architecture_of_another_number_of_classes(small):
    found = families.architecture_of(deeplab(101, aux=False, num_classes=2))
    expected = architecture("torchvision_resnet101", num_classes=2, aux_head=False)
    assert dataclasses.asdict(found) == dataclasses.asdict(expected)
