"""Named architectures and overrides of their fields."""

import dataclasses
import json

import pytest

from deeplab_jax.config import ModelConfig
from deeplab_jax.models.architecture import (
    ARCHITECTURES,
    BACKBONE_NEUTRAL,
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


# From the originals' sources: what differs from torchvision's DeepLabv3.
SMP = {"dilation_rule": "paper", "aux_head": False, "align_corners": True}
VAINF = {"output_stride": 16, "atrous_rates": (6, 12, 18), "dropout": 0.1, "aux_head": False}
PLUS = {"decoder": "plus", "decoder_convs": 1}
MMSEG = {
    "dilation_rule": "mmseg",
    "stem": "deep",
    "head_conv": False,
    "dropout": 0.1,
    "head_channels": 512,
    "projection_kernel": 3,
}
FAMILIES = {
    "mmseg_resnet50": MMSEG,
    "mmseg_resnet18": MMSEG | {"head_channels": 128},
    "smp_resnet34": SMP,
    "smpplus_resnet101": SMP
    | PLUS
    | {"output_stride": 16, "separable_aspp": True, "separable_head": True},
    "vainf_resnet50": VAINF,
    "vainfplus_resnet50": VAINF | PLUS | {"head_conv": False},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_originals_choices(name):
    theirs = ARCHITECTURES[f"torchvision_{name.partition('_')[2]}"]
    assert ARCHITECTURES[name] == dataclasses.replace(theirs, name=name, **FAMILIES[name])


def test_families_have_the_backbones_of_their_originals():
    assert "smp_mobilenet_v3_large" not in ARCHITECTURES
    assert "tf_resnet50" not in ARCHITECTURES
    assert "mmseg" not in ARCHITECTURES
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES)


def test_tensorflows_choices():
    ours = ARCHITECTURES["tf_mobilenet_v2"]
    assert (ours.padding, ours.atrous_rates, ours.align_corners) == ("same", (), True)
    assert (ours.backbone_bn, ours.bn_epsilon) == ((0.997, 1e-3), 1e-5)
    assert (ours.head_conv, ours.aux_head, ours.image_pooling) == (False, False, True)
    for family in ("paper", "torchvision"):
        ours = ARCHITECTURES[f"{family}_mobilenet_v2"]
        assert (ours.padding, ours.backbone_bn[1]) == ("symmetric", 1e-5)


def test_a_plus_decoder_of_a_family_keeps_its_convolution():
    assert architecture("smpplus_resnet50", num_classes=2, decoder="plus").head_conv
    assert not architecture("smp_resnet50", num_classes=2, decoder="plus").head_conv


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


def test_an_absolute_multi_grid_scales_with_the_features():
    ours = architecture("mmseg_resnet50", num_classes=2, output_stride=16, multi_grid=(1, 2, 4))
    assert ours.at_output_stride(8).multi_grid == (2, 4, 8)
    with pytest.raises(
        UserError, match=r"multi_grid \(1, 2, 4\) .* \(0.5, 1, 2\) at 32, which are"
    ):
        ours.at_output_stride(32)
    relative = architecture("mmseg_resnet50", num_classes=2)
    assert relative.at_output_stride(16).multi_grid == (1, 1, 1)


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
        ("vgg", {}, "Known: .*paper_mobilenet_v3_large, paper_resnet101, .*torchvision_resnet50"),
        ("paper_resnet18", {"multigrid": (1,)}, r"'multigrid' \(did you mean 'multi_grid'"),
        ("paper_resnet18", {"output_stride": 12}, r"must be 8, 16 or 32 \(nearest: 8\), got 12"),
        ("paper_resnet18", {"output_stride": 0}, r"must be 8, 16 or 32 \(nearest: 8\), got 0"),
        (
            "paper_resnet18",
            {"dilation_rule": "none"},
            "dilation_rule must be paper, torchvision or mmseg",
        ),
        ("paper_resnet18", {"multi_grid": ()}, "multi_grid must be whole rates of 1 or more"),
        ("paper_resnet18", {"atrous_rates": (1.5,)}, "atrous_rates must be whole rates of 1"),
        (
            "paper_resnet18",
            {"align_corners": True, "decoder": "transposed"},
            "align_corners must be False with the decoder transposed",
        ),
        ("smp_resnet18", {"decoder": "transposed"}, "align_corners must be False with the decoder"),
        ("paper_resnet18", {"stem": "deep64"}, "stem must be conv7x7, deep or deep128"),
        ("paper_resnet18", {"shortcut": "pool"}, "shortcut must be conv1x1 or avg_pool"),
        ("paper_resnet18", {"projection_kernel": 2}, "projection_kernel must be 1 or 3, got 2"),
        ("paper_resnet18", {"decoder_convs": 0}, "decoder_convs must be 1 or more, got 0"),
        ("paper_resnet18", {"head_channels": 0}, "head_channels must be 1 or more, got 0"),
        ("paper_resnet18", {"padding": "same"}, "padding must be 'symmetric' .the backbone resnet"),
        ("paper_resnet18", {"width": 0}, "width must be above 0, got 0"),
        ("paper_resnet18", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("paper_resnet18", {"width": -1, "stem": "x"}, "stem must be .*; width must be"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(UserError, match=message):
        architecture(name, num_classes=2, **overrides)


def test_choices_of_resnets_are_refused_for_mobilenets():
    choices = {
        "multi_grid": (1, 2, 4),
        "dilation_rule": "torchvision",
        "residual": "pre",
        "stem": "deep",
        "shortcut": "avg_pool",
        "stride_place": "conv1",
        "padding": "same",
        "cascade": 1,
    }
    with pytest.raises(UserError) as info:
        architecture("paper_mobilenet_v3_large", num_classes=2, **choices)
    expected = [
        f"{field} must be {BACKBONE_NEUTRAL[field]!r} (the backbone mobilenet_v3_large has no such "
        f"choice), got {value!r}"
        for field, value in choices.items()
    ]
    assert str(info.value).partition(": ")[2].split("; ") == expected


def test_hashes_and_returns_from_json():
    ours = ARCHITECTURES["paper_resnet50"]
    again = Architecture(**json.loads(json.dumps(dataclasses.asdict(ours))))
    assert again == ours
    assert hash(again) == hash(ours)


def test_each_field_of_the_config_is_an_override():
    options = dataclasses.asdict(ModelConfig(num_classes=4, dtype="bfloat16"))
    ours = architecture(options.pop("architecture"), **options)
    assert (ours.name, ours.num_classes, ours.dtype) == ("paper_resnet101", 4, "bfloat16")
