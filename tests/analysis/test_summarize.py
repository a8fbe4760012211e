"""The summary of a model, and the figures drawn from it."""

import functools
import json

import numpy as np
import pytest

from conftest import ROOT
from deeplab_jax.analysis import field_plots as field_figure
from deeplab_jax.analysis import plots as figures
from deeplab_jax.analysis import summary as summaries
from deeplab_jax.analysis.receptive_field import EffectiveField
from deeplab_jax.models.architecture import ARCHITECTURES, architecture
from deeplab_jax.visualization import canvas
from torch_reference import torchvision


@functools.cache
def summary_of(name, height=65, width=65, **options):
    options = {"num_classes": 3, "width": 0.125, **options}
    return summaries.summarize(architecture(name, **options), height, width)


# --- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["ResNet50", "ResNet101", "MobileNet_V3_Large"])
def test_totals_are_what_torchvision_publishes(backbone):
    weights = getattr(torchvision.models.segmentation, f"DeepLabV3_{backbone}_Weights")
    published = weights.COCO_WITH_VOC_LABELS_V1.meta
    found = summaries.summarize(ARCHITECTURES[f"torchvision_{backbone.lower()}"], 520)
    assert found.params == published["num_params"]
    # Its "GFLOPS" are multiply-adds of convolutions, with the auxiliary head.
    assert found.all.macs / 1e9 == pytest.approx(published["_ops"], abs=5e-4)
    assert 0.4 * found.all.macs < found.all.valid_macs < found.all.macs


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
    rows = [dict(zip(summaries.COLUMNS, row, strict=True)) for row in summaries.rows(found)]

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


def test_rows_say_what_there_is():
    rows = {row[0]: row[1:] for row in summaries.rows(summary_of("paper_resnet18", 513, 257))}
    assert rows["backbone.stem.0.conv"][:6] == ("7x7", "2", "1", "257x129x8", "2", "7")
    assert rows["classifier.aspp.branches.4.project.conv"][3:6] == ("1x1x32", "-", "image")
    assert rows["classifier.logits"][5] == "1171 + image"
    # 33x17 and rate 18: rows have 33 + 2 * 15 of 3 * 33 taps, columns only the centre's.
    share = (33 + 2 * 15) / (3 * 33) * 17 / (3 * 17)
    assert rows["classifier.aspp.branches.3.conv"][6] == f"{100 * share:.1f} %"
    mobile = dict(row[:2] for row in summaries.rows(summary_of("torchvision_mobilenet_v3_large")))
    assert mobile["backbone.block13.depthwise.conv"] == "5x5 depthwise"
    assert mobile["backbone.block13.expand.conv"] == "1x1"


def test_parts_are_the_whole():
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
    assert f"{found.params:,}".replace(",", " ") in dict(summaries.totals(found))["parameters"]
    shares = [float(row[4].removesuffix(" %")) for row in summaries.part_rows(found)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_rates_of_a_part_leave_repetitions_out():
    found = summary_of("paper_resnet18", output_stride=8, multi_grid=(2, 1))
    rates = {part.name: part.rates for part in found.parts}
    assert rates["backbone.layer4"] == (8, 4)
    assert rates["backbone.layer1"] == (1,)
    assert rates["classifier.logits"] == ()


def test_json_holds_the_table():
    found = summary_of("torchvision_resnet18", 97, 65)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (told["height"], told["width"]) == (97, 65)
    assert told["architecture"]["name"] == "torchvision_resnet18"
    convs = told["convolutions"]
    assert told["flops"] == 2 * told["macs"] == sum(conv["flops"] for conv in convs)
    assert told["valid_flops"] == 2 * told["valid_macs"] < told["flops"]
    assert told["params"] == sum(conv["params"] for conv in convs)
    names = [row[0] for row in summaries.rows(found)]
    assert [conv["name"] for conv in convs] == names
    assert convs[0]["out_shape"] == [49, 33, 8]


def test_markdown_is_a_table():
    text = summaries.markdown(("a", "b"), [("x", "1"), ("y", "2")])
    assert text == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"


def test_docs_quote_the_numbers():
    docs = (ROOT / "docs" / "summary.md").read_text()
    found = summaries.summarize(ARCHITECTURES["torchvision_resnet50"], 520)
    for columns, rows in (
        (summaries.COLUMNS, summaries.rows(found)[-9:]),
        (summaries.PART_COLUMNS, summaries.part_rows(found)),
    ):
        assert summaries.markdown(columns, rows) in docs
    for name, value in summaries.totals(found):
        assert f"- {name}: {value}" in docs


# --- Figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(65, 65), (9, 9), (7, 12), (1, 5)])
def test_tap_shares_are_counted(height, width):
    for rate in (1, 2, 4, 6, 8, 11, 33, 70):
        counts = np.zeros(10)
        for y in range(height):
            for x in range(width):
                taps = [(y + i * rate, x + j * rate) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                counts[sum(0 <= v < height and 0 <= u < width for v, u in taps)] += 1
        expected = {i: c / (height * width) for i, c in enumerate(counts) if c}
        assert figures.tap_shares(height, width, rate) == pytest.approx(expected)


class Texts(list):
    """What is written, and where each was last (x in pixels)."""

    def __init__(self):
        super().__init__()
        self.places = {}


@pytest.fixture
def texts(monkeypatch):
    """What is written on canvases; each text must lie on its canvas."""
    written = Texts()
    write = canvas.Canvas.text

    def text(self, x, y, text, *, size=14, anchor="lm", **options):
        width = canvas.text_width(text, size)
        left = x - {"l": 0, "m": width / 2, "r": width}[anchor[0]]
        assert left >= 0, text
        assert left + width <= self.width, text
        assert y - size / 2 >= 0, text
        assert y + size / 2 <= self.height, text
        written.append(text)
        written.places[text] = x
        write(self, x, y, text, size=size, anchor=anchor, **options)

    monkeypatch.setattr(canvas.Canvas, "text", text)
    return written


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        (
            "paper_resnet18",
            (513, 513),
            ["layer4", "rate 2, 4", "3x3 rate 18", "rate 18: 40 % of taps", "sees 595 px"],
        ),
        (
            "torchvision_resnet18",
            (520, 520),
            [
                *("rate 1, 2", "3x3 rate 36", "head_conv"),
                "auxiliary head: 3x3, 1x1, sees 227 px",
            ],
        ),
        (
            "torchvision_mobilenet_v3_large",
            (33, 1025),
            ["block7-12", "block13-15", "rate 2", "3 taps"],
        ),
    ],
)
def test_model_figure_tells_of_its_model(texts, name, size, expected):
    found = summary_of(name, *size)
    picture = figures.model_figure(found)
    assert picture.shape == (920, figures.WIDTH, 3)
    assert set(expected) <= set(texts), texts
    assert f"{size[0]}x{size[1]}x3" in texts
    strides = {c.output_stride for c in found.all.convolutions} - {None}
    assert {f"output stride {s}" for s in strides} <= set(texts)
    assert {"image pooling", "ASPP"} <= set(texts)


def test_rates_are_marked_on_the_models_own_map(texts, monkeypatch):
    """Dashes in the columns where the axis has those rates."""
    found = summary_of("torchvision_resnet18", 520, 520)
    marked = figures.valid_taps_figure(found)
    assert not any("as in the paper" in text for text in texts)  # it is 65x65 itself
    monkeypatch.setattr(canvas.Canvas, "dashed", lambda *_: None)
    changed = (marked != figures.valid_taps_figure(found)).any(-1)
    columns = np.flatnonzero(changed.sum(0) > 60)
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    places = np.array([group.mean() for group in groups])
    rates = np.array([1, 2, 4, 12, 24, 36])
    assert len(places) == len(rates)
    ten, sixty = texts.places["10"], texts.places["60"]
    np.testing.assert_allclose(places, ten + (rates - 10) * (sixty - ten) / 50, atol=1.5)


def test_blocks_with_rates_have_the_colour_of_rates():
    def orange(**options):
        picture = figures.blocks_figure(summary_of("paper_resnet18", **options))
        return int((np.abs(picture[:330].astype(int) - figures._ATROUS).sum(-1) < 40).sum())

    # Frames of ASPP alone; of layer4 too; of layer3 too.
    thirty_two, sixteen, eight = (
        orange(output_stride=stride, multi_grid=(1,)) for stride in (32, 16, 8)
    )
    assert 0 < thirty_two < sixteen < eight


def test_field_figure_shows_the_energy(texts):
    energy = np.zeros((41, 60))
    energy[20, 30], energy[20, 40] = 0.75, 0.25
    fields = [
        (name, EffectiveField(energy, (20, 30), theoretical))
        for name, theoretical in (("one", 99), ("two", 77))
    ]
    picture = field_figure.field_figure(fields, "a title")
    assert {"one", "two", "a title"} <= set(texts)
    assert any("theoretical field of view 77 px" in text for text in texts)
    assert any("within 21 px, half of it within 1 px" in text for text in texts)
    # Viridis: its end is yellow, and its start violet; 0.25 of 0.75 is 0.58 of the scale.
    yellow = (np.abs(picture.astype(int) - (253, 231, 37)).sum(-1) < 12).sum()
    assert yellow >= 2 * 7**2  # a pixel of the image is 7 of the figure
    green = (np.abs(picture.astype(int) - (31, 158, 137)).sum(-1) < 40).sum()
    assert green >= 2 * 7**2
