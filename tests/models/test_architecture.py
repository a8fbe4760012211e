"""Named architectures and overrides of their fields."""

import dataclasses
import json

import pytest

from deeplab_jax.config import ModelConfig
from deeplab_jax.models.architecture import (
    ARCHITECTURES,
    BACKBONES,
    Architecture,
    architecture,
)
from deeplab_jax.utils.errors import UserError

DEPTHS = (18, 34, 50, 101, 152)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_papers_choices(depth):
    ours = ARCHITECTURES[f"paper_resnet{depth}"]
    assert ours.backbone == f"resnet{depth}"
    assert (ours.output_stride, ours.multi_grid, ours.atrous_rates) == (16, (1, 2, 4), (6, 12, 18))
    assert (ours.dilation_rule, ours.aux_head, ours.head_conv) == ("paper", False, False)
    assert (ours.dropout, ours.bn_momentum, ours.bn_epsilon) == (0.1, 0.9997, 1e-5)
    assert (ours.stem, ours.stride_place, ours.residual) == ("conv7x7", "conv2", "post")


@pytest.mark.parametrize("depth", DEPTHS)
def test_torchvisions_choices(depth):
    ours = ARCHITECTURES[f"torchvision_resnet{depth}"]
    assert (ours.output_stride, ours.multi_grid, ours.atrous_rates) == (8, (1, 1, 1), (12, 24, 36))
    assert (ours.dilation_rule, ours.aux_head, ours.head_conv) == ("torchvision", True, True)
    assert (ours.dropout, ours.bn_momentum, ours.bn_epsilon) == (0.5, 0.9, 1e-5)


def test_every_named_architecture_is_called_so_and_has_a_backbone():
    for name, ours in ARCHITECTURES.items():
        assert ours.name == name
        assert ours.backbone in BACKBONES


def test_overrides():
    ours = architecture("paper_resnet50", num_classes=3, width=0.5, residual="pre", dropout=None)
    assert (ours.num_classes, ours.width, ours.residual, ours.dropout) == (3, 0.5, "pre", 0.1)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("paper_resnet50", {"output_stride": 8}, (12, 24, 36)),
        ("paper_resnet50", {"output_stride": 32}, (3, 6, 9)),
        ("torchvision_resnet50", {"output_stride": 16}, (6, 12, 18)),
        ("paper_resnet50", {"output_stride": None}, (6, 12, 18)),
        ("paper_resnet50", {"output_stride": 8, "atrous_rates": (1, 2)}, (1, 2)),
        ("paper_resnet50", {"atrous_rates": (1, 2)}, (1, 2)),
    ],
)
def test_atrous_rates_scale_with_the_output_stride_unless_given(name, overrides, expected):
    ours = architecture(name, num_classes=2, **overrides)
    assert ours.atrous_rates == expected
    assert ours.output_stride == (
        overrides.get("output_stride") or ARCHITECTURES[name].output_stride
    )


def test_another_output_stride_changes_nothing_else():
    ours = architecture("paper_resnet18", num_classes=2, width=0.5)
    there = ours.at_output_stride(8)
    assert (there.output_stride, there.atrous_rates) == (8, (12, 24, 36))
    assert there.at_output_stride(16) == ours


def test_rates_that_would_not_be_whole_are_refused():
    ours = architecture("paper_resnet18", num_classes=2, atrous_rates=(3, 6))
    with pytest.raises(
        UserError, match=r"\(1.5, 3\) at 32, which are not whole: give atrous_rates"
    ):
        ours.at_output_stride(32)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "paper_resnet5",
            {},
            r"unknown architecture 'paper_resnet5' \(did you mean 'paper_resnet50'",
        ),
        ("vgg", {}, "Known: paper_mobilenet_v3_large, paper_resnet101, .*torchvision_resnet50"),
        ("paper_resnet18", {"multigrid": (1,)}, r"'multigrid' \(did you mean 'multi_grid'"),
        ("paper_resnet18", {"output_stride": 12}, r"must be 8, 16 or 32 \(nearest: 8\), got 12"),
        ("paper_resnet18", {"output_stride": 0}, r"must be 8, 16 or 32 \(nearest: 8\), got 0"),
        ("paper_resnet18", {"dilation_rule": "none"}, "dilation_rule must be paper or torchvision"),
        ("paper_resnet18", {"multi_grid": ()}, "multi_grid must be whole rates of 1 or more"),
        ("paper_resnet18", {"atrous_rates": (1.5,)}, "atrous_rates must be whole rates of 1"),
        ("paper_resnet18", {"width": 0}, "width must be above 0, got 0"),
        ("paper_resnet18", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("paper_resnet18", {"width": -1, "stem": "x"}, "stem must be .*; width must be"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(UserError, match=message):
        architecture(name, num_classes=2, **overrides)


def test_hashes_and_returns_from_json():
    ours = ARCHITECTURES["paper_resnet50"]
    again = Architecture(**json.loads(json.dumps(dataclasses.asdict(ours))))
    assert again == ours
    assert hash(again) == hash(ours)


def test_each_field_of_the_config_is_an_override():
    options = dataclasses.asdict(ModelConfig(num_classes=4, dtype="bfloat16"))
    ours = architecture(options.pop("architecture"), **options)
    assert (ours.name, ours.num_classes, ours.dtype) == ("paper_resnet101", 4, "bfloat16")
