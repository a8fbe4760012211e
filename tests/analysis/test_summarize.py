"""The summary of a model, and the figures drawn from it."""

import functools
import json

import numpy as np
import pytest

from conftest import ROOT
from deeplab_jax.analysis import plots, summary
from deeplab_jax.analysis.receptive_field import EffectiveField
from deeplab_jax.models.architecture import ARCHITECTURES, architecture
from deeplab_jax.models.functional import FunctionalModel
from drawings import texts
from torch_reference import torchvision


@functools.cache
def summary_of(name, height=65, width=65, **options):
    options = {"num_classes": 3, "width": 0.125, **options}
    return summary.summarize(architecture(name, **options), height, width)


@functools.cache
def torchvision_summary(backbone):
    return summary.summarize(ARCHITECTURES[f"torchvision_{backbone}"], 520)


# --- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["ResNet50", "ResNet101", "MobileNet_V3_Large"])
def test_totals_are_what_torchvision_publishes(backbone):
    weights = getattr(torchvision.models.segmentation, f"DeepLabV3_{backbone}_Weights")
    published = weights.COCO_WITH_VOC_LABELS_V1.meta
    found = torchvision_summary(backbone.lower())
    assert found.params == published["num_params"]
    # Its "GFLOPS" are multiply-adds of convolutions, with the auxiliary head.
    assert found.all.macs / 1e9 == pytest.approx(published["_ops"], abs=5e-4)
    assert 0.4 * found.all.macs < found.all.valid_macs < found.all.macs


def test_a_model_of_separable_convolutions():
    """smp's DeepLabV3Plus with ResNet-D's shortcuts, counted by hand for a 65x65 image."""
    options = {"shortcut": "avg_pool", "width": 0.125, "num_classes": 5}
    ours = architecture("smpplus_resnet18", **options)
    found = summary.summarize(ours, 65)
    convs = {conv.name: conv for conv in found.all.convolutions}
    branch = [convs[f"classifier.aspp.branches.2.{part}"] for part in ("depthwise", "conv")]
    assert [(c.kernel_size, c.rate, c.groups) for c in branch] == [(3, 24, 64), (1, 1, 1)]
    assert [conv.macs for conv in branch] == [5 * 5 * 9 * 64, 5 * 5 * 64 * 32]
    decoder = convs["classifier.decoder.conv1.depthwise"]
    assert (decoder.in_shape, decoder.groups) == ((17, 17, 32 + 8), 40)
    assert convs["backbone.layer2.0.downsample.conv"].stride == 1
    assert convs["backbone.layer2.0.downsample.conv"].out_shape == (9, 9, 16)
    arrays = FunctionalModel(ours).abstract.params.values()
    assert found.params == sum(leaf.size for leaf in arrays)


# (dilation rule, output stride, multi-grid): (rate, output stride) of the four 3x3 convolutions of
# layer3 and of layer4 of a ResNet-18, and the rates of ASPP.
R18 = {
    ("paper", 32, (1, 2, 4)): ([(1, 16)] * 4, [(1, 32), (1, 32), (2, 32), (2, 32)], (3, 6, 9)),
    ("paper", 16, (1, 1, 1)): ([(1, 16)] * 4, [(2, 16)] * 4, (6, 12, 18)),
    ("paper", 16, (1, 2, 4)): ([(1, 16)] * 4, [(2, 16), (2, 16), (4, 16), (4, 16)], (6, 12, 18)),
    ("paper", 8, (1, 2, 4)): ([(2, 8)] * 4, [(4, 8), (4, 8), (8, 8), (8, 8)], (12, 24, 36)),
    ("torchvision", 32, (1, 1, 1)): ([(1, 16)] * 4, [(1, 32)] * 4, (3, 6, 9)),
    ("torchvision", 16, (1, 2, 4)): (
        *([(1, 16)] * 4, [(1, 16), (2, 16), (4, 16), (4, 16)]),
        (6, 12, 18),
    ),
    ("torchvision", 8, (1, 1, 1)): (
        *([(1, 8), (2, 8), (2, 8), (2, 8)], [(2, 8), (4, 8), (4, 8), (4, 8)]),
        (12, 24, 36),
    ),
}


@pytest.mark.parametrize(("rule", "output_stride", "multi_grid"), R18)
def test_rates_and_output_strides(rule, output_stride, multi_grid):
    found = summary_of(
        "paper_resnet18", dilation_rule=rule, output_stride=output_stride, multi_grid=multi_grid
    )
    rows = [dict(zip(summary.COLUMNS, row, strict=True)) for row in summary.rows(found)]

    def of(prefix):
        return [
            (int(row["rate"]), int(row["output stride"]))
            for row in rows
            if row["convolution"].startswith(prefix) and row["kernel"] == "3x3"
        ]

    layer3, layer4, rates = R18[rule, output_stride, multi_grid]
    assert of("backbone.layer3") == layer3
    assert of("backbone.layer4") == layer4
    assert of("classifier.aspp") == [(rate, output_stride) for rate in rates]
    assert of("backbone.layer1") == [(1, 4)] * 4
    assert of("backbone.layer2") == [(1, 8)] * 4


def test_rows_describe_each_convolution():
    rows = {row[0]: row[1:] for row in summary.rows(summary_of("paper_resnet18", 513, 257))}
    assert rows["backbone.stem.0.conv"][:6] == ("7x7", "2", "1", "257x129x8", "2", "7")
    assert rows["classifier.aspp.branches.4.project.conv"][3:6] == ("1x1x32", "-", "image")
    assert rows["classifier.logits"][5] == "1171 + image"
    # 33x17 and rate 18: rows have 33 + 2 * 15 of 3 * 33 taps, columns only the centre's.
    share = (33 + 2 * 15) / (3 * 33) * 17 / (3 * 17)
    assert rows["classifier.aspp.branches.3.conv"][6] == f"{100 * share:.1f} %"
    mobile = dict(row[:2] for row in summary.rows(summary_of("torchvision_mobilenet_v3_large")))
    assert mobile["backbone.block13.depthwise.conv"] == "5x5 depthwise"
    assert mobile["backbone.block13.expand.conv"] == "1x1"


def test_parts_add_up_to_the_model():
    found = summary_of("torchvision_resnet18", decoder="transposed")
    parts = found.parts
    assert [part.name for part in parts] == [
        "backbone.stem",
        *(f"backbone.layer{index}" for index in range(1, 5)),
        *("classifier.aspp", "classifier.head_conv", "classifier.logits"),
        *("aux_classifier.head_conv", "aux_classifier.logits"),
    ]
    for quantity in ("params", "macs", "valid_macs"):
        assert sum(getattr(p, quantity) for p in parts) == getattr(found.all, quantity)
    assert found.other_params == 64 * 64 * 3
    assert f"{found.params:,}".replace(",", " ") in dict(summary.totals(found))["parameters"]
    shares = [float(row[4].removesuffix(" %")) for row in summary.part_rows(found)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_rates_of_a_part_are_unique():
    found = summary_of("paper_resnet18", output_stride=8, multi_grid=(2, 1))
    rates = {part.name: part.rates for part in found.parts}
    assert rates["backbone.layer4"] == (8, 4)
    assert rates["backbone.layer1"] == (1,)
    assert rates["classifier.logits"] == ()


def test_json_contains_the_table():
    found = summary_of("torchvision_resnet18", 97, 65)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (told["height"], told["width"]) == (97, 65)
    assert told["architecture"]["name"] == "torchvision_resnet18"
    convs = told["convolutions"]
    assert told["flops"] == 2 * told["macs"] == sum(conv["flops"] for conv in convs)
    assert told["valid_flops"] == 2 * told["valid_macs"] < told["flops"]
    assert told["params"] == sum(conv["params"] for conv in convs)
    names = [row[0] for row in summary.rows(found)]
    assert [conv["name"] for conv in convs] == names
    assert convs[0]["out_shape"] == [49, 33, 8]


def test_markdown_is_a_table():
    text = summary.markdown_table(("a", "b"), [("x", "1"), ("y", "2")])
    assert text == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"


def test_docs_quote_the_numbers():
    docs = (ROOT / "docs" / "summary.md").read_text()
    found = torchvision_summary("resnet50")
    for columns, rows in (
        (summary.COLUMNS, summary.rows(found)[-9:]),
        (summary.PART_COLUMNS, summary.part_rows(found)),
    ):
        assert summary.markdown_table(columns, rows) in docs
    for name, value in summary.totals(found):
        assert f"- {name}: {value}" in docs


# --- Figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(65, 65), (9, 9), (7, 12), (1, 5)])
def test_tap_fractions_are_counted(height, width):
    for rate in (1, 2, 4, 6, 8, 11, 33, 70):
        counts = np.zeros(10)
        for y in range(height):
            for x in range(width):
                taps = [(y + i * rate, x + j * rate) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                counts[sum(0 <= v < height and 0 <= u < width for v, u in taps)] += 1
        expected = {i: c / (height * width) for i, c in enumerate(counts) if c}
        assert plots.tap_fractions(height, width, rate) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        (
            "paper_resnet18",
            (513, 513),
            ["layer4", "2, 4", "3x3 rate 18", "77, 57, 40", "595"],
        ),
        (
            "torchvision_resnet18",
            (520, 520),
            ["1, 2", "3x3 rate 36", "auxiliary head on layer3: 3x3, 1x1, field of view 227 px"],
        ),
        (
            "torchvision_mobilenet_v3_large",
            (33, 1025),
            ["block7-12", "block13-15", "2", "3 taps"],
        ),
        ("paper_resnet101", (513, 513), ["project", "logits", "4 taps"]),
    ],
)
def test_model_figure_describes_its_model(name, size, expected):
    found = summary_of(name, *size)
    written = texts(plots.model_figure(found))
    assert set(expected) <= set(written), written
    assert f"{size[0]}x{size[1]}x3" in written
    strides = {c.output_stride for c in found.all.convolutions} - {None}
    assert {str(stride) for stride in strides} <= set(written)
    assert {"image pooling", "ASPP", "output stride", "field of view, px"} <= set(written)


@pytest.mark.parametrize("options", [{"cascade": 3}, {"decoder": "plus"}, {"aux_head": True}])
def test_model_figure_of_other_models_is_legible(options):
    found = summary_of("paper_resnet50", 513, 513, **options)
    assert f"{found.architecture.output_stride}" in texts(plots.model_figure(found))


def test_valid_taps_are_drawn_on_the_models_own_map():
    """With dashed lines at the rates, and each curve at the fractions of positions."""
    figure = plots.model_figure(summary_of("torchvision_resnet18", 520, 520))
    _, chart = figure.axes  # the model's map is the paper's, 65x65
    curves = {line.get_label(): line for line in chart.lines if line.get_linestyle() == "-"}
    dashed = [line for line in chart.lines if line.get_linestyle() == "--"]
    assert sorted(line.get_xdata()[0] for line in dashed) == [1, 2, 4, 12, 24, 36]
    for taps in (1, 2, 4, 6, 9):
        rates, fractions = curves[f"{taps} tap{'s' if taps > 1 else ''}"].get_data()
        expected = [plots.tap_fractions(65, 65, int(rate)).get(taps, 0) for rate in rates]
        np.testing.assert_allclose(np.nan_to_num(fractions), expected)


def test_blocks_with_rates_have_the_colour_of_rates():
    def num_orange(**options):
        axes = plots.model_figure(summary_of("paper_resnet18", **options)).axes[0]
        edges = [patch.get_edgecolor() for patch in axes.patches]
        return sum(edge[:3] == pytest.approx((0xD5 / 255, 0x5E / 255, 0)) for edge in edges)

    # Only the three branches of ASPP; layer4 too; layer3 too.
    strides = (32, 16, 8)
    assert [num_orange(output_stride=s, multi_grid=(1,)) for s in strides] == [3, 4, 5]


def test_field_figure_shows_the_energy():
    energy = np.zeros((41, 60))
    energy[20, 30], energy[20, 40] = 0.75, 0.25
    fields = [
        (name, EffectiveField(energy, (20, 30), theoretical, sees_image))
        for name, theoretical, sees_image in (("one", 99, False), ("two", 77, True))
    ]
    figure = plots.field_figure(fields, "a title")
    written = texts(figure)
    assert {"one", "two", "a title"} <= set(written)
    assert "theoretical field of view 77 px" in written
    assert written.count("95 % of the energy within 21 px") == 2
    assert written.count("50 % of the energy within 1 px") == 2
    assert written.count("and the whole image, by pooling") == 1
    for axes in figure.axes[1:3]:
        (image,), (frame,) = axes.images, axes.patches
        np.testing.assert_allclose(image.get_array(), energy / 0.75)
        assert frame.get_bbox().bounds == (30 - 10.5, 20 - 10.5, 21, 21)


def test_large_fields_are_averaged():
    energy = np.zeros((513, 1025))
    energy[256, 512] = 1
    figure = plots.field_figure([("one", EffectiveField(energy, (256, 512), 99))], "a title")
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (57, 114)
    assert shown.max() == shown[28, 56] == 1
