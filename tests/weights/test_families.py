"""Families of weights: recognition, names and what shapes tell. The originals' names are recorded.

`python -m benchmarks.certificates` compares outputs with the originals.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import deeplab_jax
from deeplab_jax.config import Config, InitConfig
from deeplab_jax.data import labels
from deeplab_jax.models.architecture import ARCHITECTURES, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, hugging_face, initialize, saved_model, torch_file
from deeplab_jax.weights.convert import Reading, read_model
from deeplab_jax.weights.families.mmseg import values_of_config
from random_modules import random_variables
from torch_reference import torch

RECORDED = pathlib.Path(__file__).parent / "recorded"


@functools.cache
def recorded(name):
    """The arrays of an original, without memory, by its own names."""
    shapes = json.loads((RECORDED / f"{name}.json").read_text())["shapes"]
    kinds = {True: np.int64(0), False: np.float32(0.5)}
    return {
        key: np.broadcast_to(kinds[key.endswith("num_batches_tracked")], shape)
        for key, shape in shapes.items()
    }


@functools.cache
def model_of(name, **fields):
    return FunctionalModel(architecture(name, num_classes=5, **fields))


@functools.cache
def narrow(name, **fields):
    """A narrow model of a family, its random variables, and its arrays in the family's names."""
    model = model_of(name, width=0.125, **fields)
    variables = jax.device_get(random_variables(model))
    return model, variables, families.from_model(variables, model.architecture)


# Recognition and names


@pytest.mark.parametrize(
    ("file", "family", "name", "fields"),
    [
        ("torchvision_resnet50", "torchvision", "torchvision_resnet50", {}),
        ("torchvision_mobilenet_v3_large", "torchvision", "torchvision_mobilenet_v3_large", {}),
        ("mmseg_r50_v1c", "mmseg", "mmseg_resnet50", {"num_classes": 19}),
        ("mmseg_r50b", "mmseg", "mmseg_resnet50", {"num_classes": 19, "stem": "conv7x7"}),
        ("mmseg_r18_v1c", "mmseg", "mmseg_resnet18", {"num_classes": 19, "head_channels": 128}),
        ("smp_resnet18", "smp", "smp_resnet18", {"num_classes": 2}),
        ("smpplus_resnet50", "smp", "smpplus_resnet50", {}),
        ("vainf_resnet50", "vainf", "vainf_resnet50", {}),
        ("vainfplus_resnet50", "vainf", "vainfplus_resnet50", {}),
        ("hf_mobilenet_v2", "hf", "tf_mobilenet_v2", {"output_stride": 8}),
    ],
)
def test_a_family_is_recognised_and_every_array_used_once(file, family, name, fields):
    arrays = recorded(file)
    found = families.recognise(arrays)
    assert found.family.name == family
    has_aux = any(key.startswith("aux") for key in arrays)
    expected = architecture(name, **{"num_classes": 21, "aux_head": has_aux} | fields)
    assert found.architecture() == expected
    model = FunctionalModel.of(expected)
    variables, report = found.to_model(model)
    named = model.abstract.params | model.abstract.batch_stats
    assert (variables.params | variables.batch_stats).keys() == named.keys()
    used, dropped = [theirs for theirs, _ in report.used], [theirs for theirs, _ in report.dropped]
    assert sorted(used + dropped) == sorted(arrays)
    needless = ("num_batches_tracked", "mobilenet_v2.conv_1x1")
    assert all(any(word in theirs for word in needless) for theirs in dropped)
    if found.family.writes:
        back = families.from_model(variables, expected, family)
        assert {key: array.shape for key, array in back.items()} == {
            key: array.shape for key, array in arrays.items()
        }


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("timm_resnet18", {}),
        ("timm_resnet50d", {"stem": "deep", "shortcut": "avg_pool"}),
        ("timm_resnet50s", {"stem": "deep128"}),
    ],
)
def test_timms_classifiers_are_backbones(file, fields):
    arrays, depth = recorded(file), "18" if "18" in file else "50"
    model = FunctionalModel.of(architecture(f"paper_resnet{depth}", num_classes=3, **fields))
    variables, _ = families.to_model(arrays, model, backbone_only=True)
    ours = {name for group in model.abstract for name in group if name.startswith("backbone.")}
    assert (variables.params | variables.batch_stats).keys() == ours
    back = families.from_model(variables, model.architecture, "timm")
    assert back.keys() == {name for name in arrays if not name.startswith("fc.")}
    if fields:
        with pytest.raises(UserError) as caught:
            families.to_model(
                arrays, FunctionalModel.of(ARCHITECTURES["paper_resnet50"]), backbone_only=True
            )
        assert all(f"`--config.model.{k}={v}`" in str(caught.value) for k, v in fields.items())


FAMILIES = ["torchvision_resnet18", "mmseg_resnet18", "smp_resnet18", "smpplus_resnet18",
            "vainf_resnet18", "vainfplus_resnet18"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_bit_exact_and_tells_the_width(name, suffix, tmp_path):
    model, variables, arrays = narrow(name)
    torch_file.write(tmp_path / f"a{suffix}", arrays)
    saved = read_model(tmp_path / f"a{suffix}")
    assert saved.architecture == model.architecture
    for group, expected in zip(saved.variables, variables, strict=True):
        assert group.keys() == expected.keys()
        assert all(group[key].tobytes() == expected[key].tobytes() for key in expected)


def test_mmsegmentation_concatenates_image_pooling_first():
    _, variables, arrays = narrow("mmseg_resnet18")
    ours = variables.params["classifier.aspp.project.conv.kernel"]  # [3, 3, 5 * n, n]
    n = ours.shape[3]
    theirs = arrays["decode_head.bottleneck.conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(theirs[:, :, :n], ours[:, :, -n:])
    np.testing.assert_array_equal(theirs[:, :, n:], ours[:, :, :-n])


def test_vainf_concatenates_low_level_features_first():
    _, variables, arrays = narrow("vainfplus_resnet18")
    ours = variables.params["classifier.decoder.conv1.conv.kernel"]
    theirs = arrays["classifier.classifier.0.weight"].transpose(2, 3, 1, 0)
    low = ours.shape[2] - 32
    np.testing.assert_array_equal(theirs[:, :, :low], ours[:, :, -low:])


def test_old_files_of_smp():
    _, _, arrays = narrow("smp_resnet18")
    old = {
        "decoder.aspp.": "decoder.0.",
        "decoder.conv.": "decoder.1.",
        "decoder.bn.": "decoder.2.",
    }
    renamed = {}
    for key, array in arrays.items():
        for new, before in old.items():
            key = key.replace(new, before)
        renamed[key] = array
    assert families.architecture_of(renamed) == narrow("smp_resnet18")[0].architecture


# Wrappers


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.module.", "ema_model."])
@pytest.mark.parametrize("name", ["mmseg_resnet18", "smpplus_resnet18", "vainf_resnet18"])
def test_prefixes_of_wrappers_are_removed_and_said(prefix, name):
    model, _, arrays = narrow(name)
    found = families.recognise({prefix + key: array for key, array in arrays.items()})
    assert found.architecture() == model.architecture
    assert all(f'"{part}."' in " ".join(found.notes) for part in prefix[:-1].split("."))


def test_lightnings_module_with_arrays_beside_the_model():
    model, _, arrays = narrow("smp_resnet18")
    beside = {"mean": np.zeros((1, 3, 1, 1), np.float32), "loss.weight": np.zeros(5, np.float32)}
    found = families.recognise({f"model.{k}": v for k, v in arrays.items()} | beside)
    report = found.to_model(model).report
    assert 'The model is under "model."; 2 arrays beside it are not read.' in report.notes
    assert {name for name, why in report.dropped if 'not under "model."' in why} == set(beside)


def test_two_models_in_one_file_are_an_error_that_names_both():
    _, _, arrays = narrow("smp_resnet18")
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in arrays.items()}
    with pytest.raises(UserError) as caught:
        families.recognise(both)
    assert 'a DeepLabv3 is under "student."' in str(caught.value)
    assert 'a DeepLabv3 is under "teacher."' in str(caught.value)


def test_names_of_two_families_are_an_error_that_as_decides():
    smp, mmseg = narrow("smp_resnet18")[2], narrow("mmseg_resnet18")[2]
    with pytest.raises(UserError, match="--as mmseg or --as smp"):
        families.recognise(smp | mmseg)
    assert families.recognise(smp | mmseg, family="smp").family.name == "smp"
    with pytest.raises(UserError, match=r"unknown family 'mmsg' \(did you mean 'mmseg'\?\)"):
        families.recognise(smp, family="mmsg")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["decode_head.psp_modules.0.1.conv.weight", "backbone.layer1.0.conv1.weight"], "UPerNet"),
        (["decode_head.convs.0.conv.weight", "backbone.layer1.0.conv1.weight"], "an FCN of mmseg"),
        (["decode_head.c1_bottleneck.conv.weight", "backbone.layer1.0.conv1.weight"], "v3+ of mm"),
        (["backbone.layer1.0.conv1.weight", "classifier.0.weight", "classifier.4.weight"],
         "an FCN of torchvision"),
        (["encoder.layer1.0.conv1.weight", "decoder.blocks.0.conv1.0.weight",
          "segmentation_head.0.weight"], "a U-Net of segmentation_models.pytorch"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "a classifier"),
        (["mobilenet_v2.conv_stem.first_conv.convolution.weight", "classifier.weight"],
         "a classifier of transformers"),
    ],
)  # fmt: skip
def test_another_task_is_named_and_its_backbone_offered(names, words):
    with pytest.raises(UserError) as caught:
        families.recognise({name: np.zeros((1, 1, 1, 1), np.float32) for name in names})
    message = str(caught.value)
    assert f"it is {words}" in message or words in message
    assert "--config.init.backbone" in message


def test_a_file_of_no_family_names_the_nearest_and_what_it_lacks():
    arrays = {k: v for k, v in narrow("mmseg_resnet18")[2].items() if "aspp_modules" not in k}
    with pytest.raises(UserError) as caught:
        families.recognise(arrays)
    for words in (
        "nearest is mmsegmentation, of which it lacks decode_head.aspp_modules",
        'its names begin with "',
        "`--config.init.backbone`",
    ):
        assert words in str(caught.value)


# What shapes cannot tell


def test_what_is_assumed_is_said_and_can_be_overridden(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("mmseg_resnet18")[2])
    done = deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a")
    assert any(
        "Assumed model.output_stride=8, model.multi_grid=1,1,1" in note for note in done.notes
    )
    settings = ["model.output_stride=16", "model.multi_grid=1,2,4", "data.std=1,1,1"]
    done = deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "b", settings=settings)
    assert done.architecture.multi_grid == (1, 2, 4)
    assert done.architecture.atrous_rates == (6, 12, 18)
    assert [n for n in done.notes if "Assumed" in n] == [
        "Assumed model.atrous_rates=6,12,18, model.align_corners=False, "
        "data.mean=0.485,0.456,0.406, as mmsegmentation has by default; `deeplab-jax convert` sets "
        "others by --set FIELD=VALUE."
    ]
    assert read_model(tmp_path / "b").info["std"] == [1, 1, 1]
    for wrong in ("model.output_stride=7", "train.steps=3", "model.nothing=1"):
        with pytest.raises(UserError, match=wrong.partition("=")[0].rpartition(".")[2]):
            deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "c", settings=[wrong])


def test_a_normalization_of_values_to_255_is_refused(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("mmseg_resnet18")[2])
    with pytest.raises(UserError, match=r"values 0\.\.1: divide those of 0\.\.255 by 255"):
        read_model(tmp_path / "a.pth", Reading(settings=["data.mean=123.7,116.3,103.5"]))


def test_smps_rates_do_not_follow_the_output_stride(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("smp_resnet18")[2])
    saved = read_model(tmp_path / "a.pth", Reading(settings=["model.output_stride=16"]))
    assert saved.architecture.atrous_rates == (12, 24, 36)


CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2),
                  multi_grid=(1, 2, 4), norm_cfg=norm_cfg),
    decode_head=dict(type='ASPPHead', dilations=(1, 6, 12, 18), align_corners=True))
__import__('os').system('touch EXECUTED')
"""


def test_mmsegmentations_own_config_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {k: torch.tensor(v) for k, v in narrow("mmseg_resnet18")[2].items()}
    names = [f"thing {index}" for index in range(5)]
    for meta in ({"config": CONFIG, "CLASSES": names},
                 {"cfg": CONFIG, "dataset_meta": {"classes": tuple(names)}}):  # fmt: skip
        torch.save({"state_dict": arrays, "meta": meta, "epoch": 3}, "a.pth")
        saved = read_model("a.pth")
        chosen = saved.architecture
        assert (chosen.output_stride, chosen.multi_grid) == (16, (1, 2, 4))
        assert (chosen.atrous_rates, chosen.align_corners) == ((6, 12, 18), True)
        assert saved.info["classes"] == names
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    "text",
    [None, 3, "model = 1", "model = dict(**evil())", "(" * 5000, "model = dict(a=" + "[" * 300],
)
def test_odd_configs_say_nothing(text):
    model = values_of_config(text).get("model")
    assert not isinstance(model, dict) or model.get("backbone") is None


def test_other_numbers_of_channels_get_the_average_normalization(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("smp_resnet18", in_channels=4)[2])
    info = read_model(tmp_path / "a.pth").info
    assert info["mean"] == pytest.approx([0.449] * 4, abs=1e-3)
    assert info["architecture"]["in_channels"] == 4
    deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a")
    assert deeplab_jax.convert(tmp_path / "a", tmp_path / "b.pth", family="smp").notes == ()


def test_names_of_classes_from_a_file(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("smp_resnet18")[2])
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\nother\n")
    saved = read_model(tmp_path / "a.pth", Reading(classes=str(tmp_path / "classes.txt")))
    assert saved.info["classes"] == ["sky", "road", "car", "tree", "other"]
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(UserError, match="names 2 classes, but the model has 5"):
        read_model(tmp_path / "a.pth", Reading(classes=str(tmp_path / "classes.txt")))


# Writing


def test_a_model_that_the_family_has_not_is_refused(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("mmseg_resnet18")[2])
    deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a")
    with pytest.raises(UserError, match="cannot be written as torchvision"):
        deeplab_jax.convert(tmp_path / "a", tmp_path / "b.pth", family="torchvision")
    with pytest.raises(UserError, match=r"--as must be one of .*mmseg.*, got 'hf'"):
        deeplab_jax.convert(tmp_path / "a", tmp_path / "b.pth", family="hf")
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(
    ("name", "rates", "family", "words"),
    [
        ("torchvision_resnet18", (12, 24), "torchvision",
         "(atrous_rates=(12, 24) here, (12, 24, 36) there)"),
        ("vainfplus_resnet50", (6, 12, 18), "mmseg", "; decoder=plus here, bilinear there"),
        ("tf_mobilenet_v2", (), "mmseg", "(backbone=mobilenet_v2)"),
    ],
)  # fmt: skip
def test_what_a_family_has_not_is_named(name, rates, family, words, tmp_path):
    chosen = dataclasses.replace(ARCHITECTURES[name], atrous_rates=rates)
    info = saved_model.describe(
        chosen, labels.VOC, mean=(0,) * 3, std=(1,) * 3, resize="", size=(1, 1)
    )
    with pytest.raises(UserError, match=f"{name} cannot be written as {family}: ") as caught:
        families.loading_notes(saved_model.SavedModel(tmp_path, info, dict), family)
    assert words in str(caught.value)


def test_what_the_file_does_not_say_is_noted_on_writing(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("mmseg_resnet18")[2])
    settings = ["model.output_stride=16", "model.multi_grid=1,2,4", "data.std=1,1,1"]
    deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a", settings=settings)
    for index, family in enumerate(("mmseg", "")):
        (note,) = deeplab_jax.convert(
            tmp_path / "a", tmp_path / f"{index}.pth", family=family
        ).notes
        fields = ("output_stride=16", "multi_grid=(1, 2, 4)", "atrous_rates=(6, 12, 18)", "std=(1")
        assert all(field in note for field in fields)
    deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "b")
    assert deeplab_jax.convert(tmp_path / "b", tmp_path / "b.pth").notes == ()


def test_a_model_that_no_family_writes(tmp_path):
    model = model_of("tf_mobilenet_v2", width=0.25)
    with pytest.raises(UserError, match="cannot be written as a file of another codebase"):
        families.from_model(jax.device_get(random_variables(model)), model.architecture)
    paper = model_of("paper_resnet18", width=0.125)
    info = saved_model.describe(
        paper.architecture,
        labels.named(*"abcde"),
        mean=(0,) * 3,
        std=(1,) * 3,
        resize="",
        size=(1, 1),
    )
    saved_model.write_model(tmp_path / "p", jax.device_get(random_variables(paper)), info)
    (note,) = deeplab_jax.convert(tmp_path / "p", tmp_path / "p.pth").notes
    assert note.startswith("Only this package reads the file")


def test_what_a_written_file_does_not_say_is_noted(tmp_path):
    fields = {"padding": "same", "output_stride": 16, "atrous_rates": (12, 24, 36)}
    chosen = model_of("torchvision_mobilenet_v2", width=0.25, **fields).architecture
    names, std = labels.named(*"abcde"), families.FAMILIES["torchvision"].std
    info = saved_model.describe(chosen, names, mean=(0.5,) * 3, std=std, resize="", size=(1, 1))
    (note,) = families.loading_notes(saved_model.SavedModel(tmp_path, info, dict))
    assert "does not say output_stride=16, padding=same, mean=(0.5, 0.5, 0.5), unlike" in note


# What people's files also are


def test_an_auxiliary_head_of_other_classes_is_dropped(tmp_path):
    """torchvision's tutorial replaces the last layer of the main head only."""
    for name, aux in (("torchvision_resnet18", "aux_classifier.4"),
                      ("mmseg_resnet18", "auxiliary_head.conv_seg")):  # fmt: skip
        arrays = dict(narrow(name)[2])
        for leaf in ("weight", "bias"):
            arrays[f"{aux}.{leaf}"] = np.zeros((21, *arrays[f"{aux}.{leaf}"].shape[1:]), np.float32)
        torch_file.write(tmp_path / f"{name}.pth", arrays)
        done = deeplab_jax.convert(tmp_path / f"{name}.pth", tmp_path / name)
        assert not done.architecture.aux_head
        assert any(why.startswith("belongs to the auxiliary head") for _, why in done.dropped)
        image = np.zeros((9, 9, 3), np.uint8)
        assert deeplab_jax.load(tmp_path / name).predict(image).shape == (9, 9)


@pytest.mark.parametrize("channels", [(16, 32), (16, 64), (8, 64)])
def test_mmsegs_auxiliary_head_of_other_channels_or_features_is_dropped(channels):
    arrays = dict(narrow("mmseg_resnet18")[2])
    conv, logits = "auxiliary_head.convs.0.conv.weight", "auxiliary_head.conv_seg.weight"
    assert (arrays[conv].shape, families.architecture_of(arrays).aux_head) == ((8, 32, 3, 3), True)
    arrays[conv] = np.zeros((*channels, 3, 3), np.float32)
    arrays[logits] = np.zeros((5, channels[0], 1, 1), np.float32)
    found = families.recognise(arrays)
    assert not found.architecture().aux_head
    report = found.to_model(FunctionalModel.of(found.architecture())).report
    assert dict(report.dropped)[conv].startswith("belongs to the auxiliary head")


def test_another_number_of_classes_than_the_files_is_refused(tmp_path):
    torch_file.write(tmp_path / "a.pth", narrow("smp_resnet18")[2])
    with pytest.raises(UserError, match=r"of another shape: segmentation_head\.0\.bias is \[5\]"):
        deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a", settings=["model.num_classes=7"])
    assert not (tmp_path / "a").exists()


def test_one_class_with_a_sigmoid_becomes_two(tmp_path):
    model = FunctionalModel.of(architecture("smp_resnet18", num_classes=1, width=0.125))
    variables = jax.device_get(random_variables(model))
    torch_file.write(tmp_path / "a.pth", families.from_model(variables, model.architecture))
    segmenter = deeplab_jax.load(tmp_path / "a.pth")
    assert segmenter.classes == ("background", "foreground")
    image = np.random.default_rng(0).integers(0, 256, (17, 33, 3), np.uint8)
    images = (image[None] / 255 - segmenter.mean) / segmenter.std
    logit = model.apply(variables, jax.numpy.asarray(images, jax.numpy.float32))[0]["out"][
        0, :, :, 0
    ]
    expected = 1 / (1 + np.exp(-np.asarray(logit, np.float64)))
    np.testing.assert_allclose(segmenter.probabilities(image)[..., 1], expected, atol=1e-4)


@pytest.mark.parametrize("names", [list("aabcd"), ["a", " ", "b\n", "c", "d"], [*"abcde", None]])
def test_odd_names_of_classes_become_numbers(tmp_path, names):
    arrays = {k: torch.tensor(v) for k, v in narrow("mmseg_resnet18")[2].items()}
    torch.save({"state_dict": arrays, "meta": {"CLASSES": names}}, tmp_path / "a.pth")
    assert read_model(tmp_path / "a.pth").info["classes"] == [f"class {i}" for i in range(5)]


def write_mmseg(path, config, name="mmseg_resnet50"):
    arrays = {k: torch.tensor(v) for k, v in narrow(name)[2].items()}
    torch.save({"state_dict": arrays, "meta": {"cfg": config}}, path)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ("model = dict(backbone=dict(style='caffe'))", "stride_place", "conv1"),
        ("model = dict(backbone=dict(dilations=(1, 1, 2, 4)))", "dilation_rule", "paper"),
        ("model = dict(backbone=dict(dilations=(1, 1, 2, 4), contract_dilation=True))",
         "dilation_rule", "mmseg"),
    ],
)  # fmt: skip
def test_mmsegmentations_config_decides_what_is_computed(tmp_path, config, field, value):
    write_mmseg(tmp_path / "a.pth", config)
    assert getattr(read_model(tmp_path / "a.pth").architecture, field) == value


def test_mmsegmentations_dilations_of_small_resnets_are_refused(tmp_path):
    config = "model = dict(backbone=dict(dilations=(1, 1, 2, 4)))"
    write_mmseg(tmp_path / "a.pth", config, "mmseg_resnet18")
    with pytest.raises(UserError, match="contract_dilation=False, which is for ResNet-50 up"):
        read_model(tmp_path / "a.pth")


def test_transformers_config_decides_what_is_computed():
    def read(**config):
        return families.recognise(recorded("hf_mobilenet_v2"), config).architecture()

    assert read(tf_padding=False).padding == "symmetric" != read(tf_padding=True).padding
    assert read(layer_norm_eps=1e-5).backbone_bn_epsilon == 1e-5
    with pytest.raises(UserError, match="hidden_act='swish', not 'relu6'"):
        read(hidden_act="swish")


@pytest.mark.parametrize("name", ["data_preprocessor", "img_norm_cfg"])
def test_mmsegmentations_config_has_the_normalization(tmp_path, name):
    key = {"data_preprocessor": "bgr_to_rgb", "img_norm_cfg": "to_rgb"}[name]
    values = "mean=[0, 51.0, 102.0], std=[255, 255, 127.5]"
    write_mmseg(tmp_path / "a.pth", f"{name} = dict({values}, {key}=True)")
    info = read_model(tmp_path / "a.pth").info
    assert (info["mean"], info["std"]) == ([0, 0.2, 0.4], [1, 1, 0.5])
    write_mmseg(tmp_path / "b.pth", f"{name} = dict({values}, {key}=False)")
    with pytest.raises(UserError, match="BGR"):
        read_model(tmp_path / "b.pth")


def test_the_number_of_rates_must_be_given_if_it_is_another(tmp_path):
    model = model_of("mmseg_resnet18", width=0.125, atrous_rates=(3, 6, 9, 12))
    variables = jax.device_get(random_variables(model))
    torch_file.write(tmp_path / "a.pth", families.from_model(variables, model.architecture))
    with pytest.raises(UserError, match=r"4 atrous branches.*--set model.atrous_rates=RATE,RATE"):
        read_model(tmp_path / "a.pth")
    reading = Reading(settings=["model.atrous_rates=3,6,9,12"])
    assert read_model(tmp_path / "a.pth", reading).architecture == model.architecture
    arrays = recorded("vainf_resnet50")
    gap = {name: a for name, a in arrays.items() if ".convs.1." not in name}
    beyond = {name.replace(".convs.3.", ".convs.7."): a for name, a in arrays.items()} | arrays
    for found, count in ((gap, 2), (beyond, 4)):
        with pytest.raises(UserError, match=f"ASPP has {count} atrous branches"):
            families.architecture_of(found)


def test_backbones_that_are_not_known_are_named():
    arrays = dict(recorded("torchvision_resnet50"))
    for name in [name for name in arrays if ".conv2.weight" in name]:
        out, into, *sides = arrays[name].shape
        arrays[name] = np.broadcast_to(np.float32(0), (2 * out, into // 16, *sides))
    with pytest.raises(UserError, match="a ResNeXt"):
        families.architecture_of(arrays)
    excited = recorded("mmseg_r18_v1c") | {"backbone.layer1.0.se.conv1.conv.weight": np.zeros(1)}
    with pytest.raises(UserError, match="squeeze-excite"):
        families.architecture_of(excited)
    stem = {
        "stem.0.weight": np.zeros((4, 3, 4, 4)),
        "stages.0.conv_dw.weight": np.zeros((4, 1, 7, 7)),
    }
    with pytest.raises(UserError, match="has no known backbone"):
        families.recognise(stem, backbone_only=True)
    with pytest.raises(UserError, match="encoder is timm-efficientnet-b0 of depth 5"):
        families.recognise(
            narrow("smp_resnet18")[2], {"encoder_name": "timm-efficientnet-b0"}
        ).architecture()


def test_other_networks_of_a_family_are_named_by_config_before_shapes():
    resnet = narrow("smp_resnet18")[2]
    other = {key.replace("layer1.0", "_blocks.0"): array for key, array in resnet.items()}
    with pytest.raises(UserError, match="the file's backbone is no ResNet"):
        families.architecture_of(other)
    with pytest.raises(UserError, match="encoder is timm-efficientnet-b0 of depth 5"):
        families.recognise(other, {"encoder_name": "timm-efficientnet-b0"}).architecture()
    with pytest.raises(UserError, match="encoder is resnet18 of depth 4"):
        families.recognise(resnet, {"encoder_depth": 4, "encoder_name": "resnet18"}).architecture()
    timms = families.recognise(recorded("torchvision_resnet50"), {"architecture": "resnetaa50d"})
    with pytest.raises(UserError, match="the file is a resnetaa50d of timm"):
        timms.architecture()


@pytest.mark.parametrize(
    "file", ["hf_mobilenet_v2", "mmseg_r18_v1c", "smp_resnet18", "timm_resnet50d",
             "torchvision_mobilenet_v3_large", "vainfplus_resnet50"]
)  # fmt: skip
def test_arrays_of_other_shapes_give_an_architecture_or_an_error(file):
    found = families.recognise(recorded(file), backbone_only=True)
    for name in found.arrays:
        for shape in ((), (0,), (7,), (0, 0, 0, 0)):
            arrays = found.arrays | {name: np.zeros(shape, np.float32)}
            with contextlib.suppress(UserError):
                dataclasses.replace(found, arrays=arrays).architecture()


def test_a_wrapped_classifier_with_arrays_beside_it_is_a_backbone():
    wrapped = {f"model.{k}": v for k, v in recorded("timm_resnet18").items()}
    wrapped["criterion.weight"] = np.zeros(3, np.float32)
    model = FunctionalModel.of(ARCHITECTURES["paper_resnet18"])
    report = families.to_model(wrapped, model, backbone_only=True).report
    assert any("arrays beside it are not read" in note for note in report.notes)


def test_what_the_weights_computed_otherwise_is_said():
    said = []
    found = families.recognise(recorded("smp_resnet18"), {"encoder_output_stride": 16})
    config = Config(init=InitConfig(path="x"))
    initialize._compare(found, config, ARCHITECTURES["torchvision_resnet18"], said.append)
    (line,) = [line for line in said if "trained with" in line and "model" not in line]
    assert "output_stride=16 (here 8)" in line
    assert "align_corners=True (here False)" in line


def test_what_is_pushed_is_read_with_the_settings(tmp_path, monkeypatch):
    torch_file.write(tmp_path / "a.pth", narrow("smp_resnet18")[2])
    monkeypatch.setattr(hugging_face, "push", lambda saved, url: url)
    settings = ["model.output_stride=16"]
    done = deeplab_jax.convert(tmp_path / "a.pth", "hf://me/a", settings=settings)
    assert done.architecture.output_stride == 16


def test_nonfinite_weights_are_refused_by_name_or_kept(tmp_path):
    arrays = dict(narrow("smp_resnet18")[2])
    name = "encoder.layer1.0.conv1.weight"
    arrays[name] = np.where(np.arange(arrays[name].size).reshape(arrays[name].shape) == 3, np.nan,
                            arrays[name]).astype(np.float32)  # fmt: skip
    torch_file.write(tmp_path / "a.pth", arrays)
    with pytest.raises(UserError, match=rf"{name} \(1 of"):
        deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a")
    done = deeplab_jax.convert(tmp_path / "a.pth", tmp_path / "a", allow_nonfinite=True)
    assert (tmp_path / "a" / "model").is_dir()
    assert len(done.used) > 100
    with pytest.raises(UserError, match=r"\(1 of"):
        deeplab_jax.convert(tmp_path / "a", tmp_path / "b.pth")
    deeplab_jax.convert(tmp_path / "a", tmp_path / "b.pth", allow_nonfinite=True)
    np.testing.assert_array_equal(torch_file.read(tmp_path / "b.pth")[name], arrays[name])


def test_without_the_originals(tmp_path):
    """`convert` and `load` with none of the originals, PyTorch included, importable."""
    torch_file.write(tmp_path / "a.pth", narrow("mmseg_resnet18")[2])
    torch_file.write(tmp_path / "b.safetensors", narrow("smpplus_resnet18")[2])
    program = textwrap.dedent("""
        import sys
        for name in ("torch torchvision timm segmentation_models_pytorch mmseg mmcv mmengine "
                     "transformers tensorflow ai_edge_litert huggingface_hub").split():
            sys.modules[name] = None
        import numpy as np
        import deeplab_jax
        for name in ("a.pth", "b.safetensors"):
            deeplab_jax.convert(name, name[0])
            one, two = deeplab_jax.load(name), deeplab_jax.load(name[0])
            image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
            assert (one.predict(image) == two.predict(image)).all()
    """)
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
