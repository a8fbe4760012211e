"""`docs/guide.md`: its pictures and numbers are those of the code. Also other pages' pictures."""

import importlib.util
import itertools
import math
import re
import shlex
import sys
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from matplotlib.axes import Axes

from conftest import ROOT
from deeplab_jax import config
from deeplab_jax.analysis.summary import ModuleSummary, format_count
from deeplab_jax.cli import main
from deeplab_jax.evaluation.confusion import confusion_matrix, scores
from deeplab_jax.models.architecture import ARCHITECTURES
from deeplab_jax.models.backbones.resnet import block_specs
from deeplab_jax.models.decoders import TransposedDecoder
from deeplab_jax.models.ops.resize import bilinear_matrix
from drawings import BOUND, difference, texts

DOCS = ROOT / "docs"
GUIDE = (DOCS / "guide.md").read_text()
FLAT = " ".join(GUIDE.split())
ARCHITECTURE = (DOCS / "architecture.md").read_text()
PAGES = GUIDE + ARCHITECTURE + (DOCS / "augmentation.md").read_text()
EMBEDDED = re.findall(r"!\[[^\]]+\]\(images/(\w+)\.png\)", PAGES)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S)
    for line in block.splitlines()
    if line
]


def load_draw():
    """Imports `docs/draw.py`, which imports modules from its own folder."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("docs_draw", DOCS / "draw.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


draw = load_draw()
labels, atrous, aspp, network, units, architecture = (
    sys.modules[f"drawing.{name}"]
    for name in ("labels", "atrous", "aspp", "network", "units", "architecture")
)


# --- Pictures, commands, links -----------------------------------------------------------------


def test_each_picture_is_used_once_and_has_its_command():
    assert sorted(EMBEDDED) == sorted(draw.PICTURES)
    pages = [path.read_text() for path in [ROOT / "README.md", *DOCS.glob("*.md")]]
    for path in (DOCS / "images").iterdir():
        assert any(f"images/{path.name})" in page for page in pages), path
    for name in EMBEDDED:
        command = f"python docs/draw.py {name.replace('_', '-')}"
        _, _, after = PAGES.partition(f"(images/{name}.png)\n\n```sh\n")
        assert after.startswith(f"{command}\n```"), name


def test_commands_exist():
    ours, theirs = (typer.main.get_command(app) for app in (draw.app, main.app))
    assert set(ours.commands) == {name.replace("_", "-") for name in draw.PICTURES} | {"all"}
    lines = COMMANDS + re.findall(r"`((?:python docs/draw.py|deeplab-jax) [^`]+)`", FLAT)
    assert len(lines) > 15
    for line in lines:
        words = shlex.split(line)
        group, words = (theirs, words[1:]) if words[0] == "deeplab-jax" else (ours, words[2:])
        assert words[0] in group.commands or words == ["--help"], line
        if len(words) > 1:  # raises for an unknown option
            group.commands[words[0]].make_context(words[0], words[1:])


def test_files_are_small():
    sizes = [(DOCS / "images" / f"{name}.png").stat().st_size for name in EMBEDDED]
    assert max(sizes) < 130_000
    assert sum(sizes) < 1_300_000


def test_fields_exist():
    known = config.flatten(config.Config()).keys()
    branches = {name.split(".")[0] for name in known}
    told = {f for f in re.findall(r"`(\w+\.\w+)[=`]", GUIDE) if f.split(".")[0] in branches}
    assert len(told) > 20
    assert told <= known


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", GUIDE) if "://" not in link]
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", GUIDE, re.M)
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (DOCS / link).exists(), link
    assert sum(link.startswith("#") for link in links) == 10


# --- The pictures drawn again ------------------------------------------------------------------


def drawn_difference(figure, name, folder):
    draw.write(folder / "again.png", figure)
    return difference(folder / "again.png", name)


@pytest.mark.parametrize("name", [name for name in draw.PICTURES if name != "receptive_field"])
def test_pictures_are_drawn_by_the_code_and_legible(name, tmp_path):
    figure = draw.PICTURES[name]()
    assert drawn_difference(figure, name, tmp_path) < BOUND
    assert len(texts(figure)) > 3


def test_pictures_are_written_by_suffix(tmp_path):
    figure = draw.PICTURES["gridding"]()
    for suffix in ("png", "svg", "pdf"):
        draw.write(tmp_path / f"picture.{suffix}", figure)
    assert (tmp_path / "picture.png").stat().st_size < 60_000
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")


def test_a_changed_drawing_is_detected(monkeypatch, tmp_path):
    monkeypatch.setattr(atrous, "STACKS", ((2, 2, 2), (1, 2, 3), (1, 2, 4), (2, 4, 6)))
    assert drawn_difference(atrous.gridding(), "gridding", tmp_path) > BOUND
    monkeypatch.setattr(labels, "TRUTH", np.where(labels.TRUTH == 2, 1, labels.TRUTH))
    assert drawn_difference(labels.segmentation(), "segmentation", tmp_path) > BOUND


def test_a_changed_digit_is_detected(monkeypatch, tmp_path):
    text = Axes.text

    def other(self, x, y, written, **options):
        return text(self, x, y, written.replace("40.5 %", "40.6 %"), **options)

    monkeypatch.setattr(Axes, "text", other)
    assert drawn_difference(aspp.aspp(), "aspp", tmp_path) > BOUND


def test_the_drawn_rooms_are_those_of_the_package():
    with open(ROOT / "pyproject.toml", "rb") as file:
        (contract,) = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = [{room.split(".")[1] for room in layer.split(" | ")} for layer in contract["layers"]]
    assert [set(rooms) for rooms in architecture.FLOORS] == layers
    package = ROOT / "deeplab_jax"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")} - {"configs"}
    assert set().union(*layers) == rooms
    told = re.findall(r"^\| (\d+) \| `(\w+)` \|", ARCHITECTURE, re.M)
    floors = {room: len(layers) - index for index, layer in enumerate(layers) for room in layer}
    assert {room: int(floor) for floor, room in told} == floors


# --- Numbers -----------------------------------------------------------------------------------


def row(*cells):
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def comma(values):
    return ", ".join(map(str, values))


def gflop(summary):
    return f"{2 * summary.all.macs / 1e9:.3f}"


def field_of_view(summary):
    return max(c.field_of_view for c in summary.all.convolutions if c.field_of_view)


def rates(summary, name):
    return [
        conv.rate
        for conv in summary.all.convolutions
        if conv.name.startswith(name) and conv.kernel_size == 3
    ]


def test_the_worked_example():
    matrix = confusion_matrix(labels.TRUTH, labels.PREDICTED, 3)
    found = scores(matrix)
    for index in range(3):
        counts = matrix[index].sum(), matrix[:, index].sum(), matrix[index, index]
        assert row(index, *counts, f"{100 * found.per_class_iou[index]:.1f} %") in GUIDE
    assert f"mIoU of {100 * found.miou:.1f} %" in FLAT
    assert f"{100 * found.pixel_accuracy:.1f} % of the pixels are right" in FLAT


def test_the_cost_of_strides():
    sizes = [round(labels.SIZE * share) for share in config.ShapesConfig().radius_range]
    assert (
        f"{labels.NUM_IMAGES} generated images of {labels.SIZE} pixels, whose shapes have radii "
        f"of {sizes[0]} to {sizes[1]}" in FLAT
    )
    told = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", GUIDE, re.M)
    assert [int(line[0]) for line in told] == list(labels.STRIDES)
    for stride, *values in told:
        found = [labels.best_miou(int(stride), method) for method in labels.METHODS]
        assert [float(value) for value in values] == pytest.approx(found, abs=0.1)  # other OpenCVs


@pytest.mark.parametrize("stride", [4, 16])
def test_nearest_ids_are_those_of_cells(stride):
    label = np.random.default_rng(0).integers(0, 5, (33, 33)).astype(np.uint8)
    ids = labels.through_stride(label, stride, "nearest")
    side = -(-33 // stride)
    for y, x in [(0, 0), (16, 20), (32, 7)]:
        middle = [int((int((z + 0.5) * side / 33) + 0.5) * 33 / side) for z in (y, x)]
        assert ids[y, x] == label[middle[0], middle[1]]
    assert np.array_equal(labels.through_stride(label, 1, "bilinear"), label)
    assert np.array_equal(labels.through_stride(label, 1, "fractions"), label)


def test_positions_of_upsampled_features():
    impulse = np.zeros((1, 33, 33, 1), np.float32)
    impulse[0, [0, 16, 32], 16] = 1
    places = np.arange(513)
    at = (bilinear_matrix(513, 33) * places[:, None]).sum(0) / bilinear_matrix(513, 33).sum(0)
    # At both ends the weights are cut off, so their means are not the positions of the features.
    first = at[1] - (at[2] - at[1])
    assert f"{first:.1f}, {at[1]:.1f}, ..., {512 - first:.1f}" in FLAT
    image = jnp.zeros((1, 513, 513, 3))
    column = np.asarray(TransposedDecoder(1, 16)(jnp.asarray(impulse), image))[0, :, 256, 0]
    middle = (column[200:300] * places[200:300]).sum() / column[200:300].sum()
    assert middle == pytest.approx(16 * 16 + 0.5, abs=1e-3)


def test_fields_of_view_of_kernels():
    line = re.search(r"^\| rate \|(.*)\|\n.*\n\| field of view of a 3x3 \|(.*)\|$", GUIDE, re.M)
    told = dict(zip(*([int(x) for x in cells.split("|")] for cells in line.groups()), strict=True))
    assert list(told) == [1, 2, 4, 6, 12, 18]
    for rate, side in told.items():
        assert side == 3 + 2 * (rate - 1) == atrous.side_of(atrous.paths([rate], 39))


def test_gridding():
    seen = {rates: (atrous.paths(rates, 31) > 0).sum() for rates in atrous.STACKS}
    assert f"the first reads {seen[2, 2, 2]} of the {seen[1, 2, 3]}, the second all" in FLAT
    assert f"(1, 2, 4) reads each of its {seen[1, 2, 4]}." in FLAT
    assert seen[2, 4, 8] == seen[1, 2, 4]
    paper = network.summary_of("paper_resnet50")
    behind = rates(paper, "backbone.layer4") + rates(paper, "classifier")
    assert math.gcd(*behind) == 2
    assert set(rates(paper, "backbone.layer3")) == {1}
    assert f"depend on {17**2} of the {33**2} features of block3" in FLAT
    # Summed up from the middle of 33: all even offsets of the map, and no others.
    assert (atrous.paths(behind, 33) > 0).sum() == 17**2


def test_strided_and_atrous_results_are_equal():
    _, _, shrunk, whole = atrous.two_ways()
    assert np.abs(shrunk).max() > 0.1
    np.testing.assert_allclose(whole[::2, ::2], shrunk, atol=1e-6)


def test_output_strides():
    for stride in network.OUTPUT_STRIDES:
        found = network.summary_of("paper_resnet50", output_stride=stride)
        last = found.all.convolutions[-1].out_shape
        expected = row(
            stride, f"{last[0]}x{last[1]}",
            comma(sorted(set(rates(found, "backbone.layer3")))),
            comma(rates(found, "backbone.layer4")), comma(found.architecture.atrous_rates),
            format_count(found.params), gflop(found), field_of_view(found),
        )  # fmt: skip
        assert expected in GUIDE


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_the_rule_that_keeps_the_field_of_view(stride):
    model = ARCHITECTURES["torchvision_resnet50"].at_output_stride(stride)
    # Each kernel widens the field of view by the distance of its taps; first conv1 and max pool.
    view, pitch = 1 + 6 * 1 + 2 * 2, 4
    *_, block4 = stages = block_specs(model)
    for spec in itertools.chain(*stages):
        view, pitch = view + 2 * spec.first_dilation * pitch, pitch * spec.strides
    view += 2 * model.atrous_rates[-1] * pitch
    assert f"the field of view is {view} at all three output strides" in FLAT
    if stride == 8:
        traced = network.summary_of("torchvision_resnet50").all.convolutions
        branch = next(c for c in traced if c.name.startswith("classifier.aspp.branches.3"))
        assert branch.field_of_view == view
    if stride == 16:  # all features of block3 are read, other than by the paper's variant
        behind = [*(spec.first_dilation for spec in block4), *model.atrous_rates, 1]
        assert behind[0] == 1
        assert (atrous.paths(behind, 33) > 0).all()


def test_residual_units():
    def names(path):
        return [step.name for step in path]

    found = {title: units.trace(name, chosen) for (title, _), name, chosen in units.UNITS}
    v15, v1, pre = (found[t] for t in ("bottleneck, v1.5", "bottleneck, v1", "pre-activation"))
    assert names(v15.branch[:4]) == ["1x1", "batch norm", "relu", "3x3 stride 2"]
    assert names(v1.branch[:4]) == ["1x1 stride 2", "batch norm", "relu", "3x3"]
    assert names(v15.shortcut) == ["1x1 stride 2", "batch norm"]
    assert names(v15.after) == ["relu"]
    assert names(pre.shared) == ["batch norm", "relu"]
    assert names(pre.shortcut) == ["1x1 stride 2"]
    assert pre.after == ()
    assert "3x3 rate 2" in names(found["v1.5, stride removed"].branch)
    assert len([n for n in names(found["basic"].branch) if n.startswith("3x3")]) == 2
    macs = (cost := network.summary_of("paper_resnet50").all).macs
    strided = [c for c in cost.convolutions if c.stride == 2 and ".0.conv2" in c.name]
    assert len(strided) == 2  # of block2 and block3
    for conv in strided:  # v1: the 1x1 before it is strided, too
        first = next(c for c in cost.convolutions if c.name == conv.name.replace("conv2", "conv1"))
        macs -= first.macs - first.macs * conv.out_shape[0] ** 2 // first.out_shape[0] ** 2
    told = f"takes {2 * cost.macs / 1e9:.3f} GFLOP as v1.5 and {2 * macs / 1e9:.3f} as v1"
    assert told in FLAT


def test_aspp():
    convs = network.summary_of("paper_resnet50").all.convolutions
    branches = {c.rate: c for c in convs if ".branches." in c.name and c.kernel_size == 3}
    valid = {rate: f"{100 * conv.valid_fraction:.1f} %" for rate, conv in branches.items()}
    told = f"{valid[6]} of the taps are valid at rate 6, {valid[12]} at 12 and {valid[18]} at 18"
    assert told in FLAT
    for rate, conv in branches.items():
        taps = aspp.valid_taps(33, rate)
        assert taps.mean() / 9 == pytest.approx(conv.valid_fraction)
    assert aspp.valid_taps(33, 33).max() == 1
    pooling = next(c for c in convs if c.output_stride is None)
    # The 1x1 that joins the branches has 256 more channels to read.
    params, macs = pooling.params + 256 * 256, pooling.macs + 33 * 33 * 256 * 256
    assert f"{2 * macs / 1e9:.3f} GFLOP and {format_count(params)} parameters" in FLAT


def test_cascades():
    for _, found in network.cascades():
        views = {part.name: max(c.field_of_view for c in part.convolutions) for part in found.parts}
        choice = f"{found.architecture.output_stride}, ({comma(found.architecture.multi_grid)})"
        blocks = [views[f"backbone.layer{number}"] for number in range(4, 8)]
        assert row(choice, *blocks) in GUIDE
    assert rates(found, "backbone.layer7") == [16, 32, 64]


def test_published_numbers_are_those_of_the_tables():
    published = set(re.findall(r"(?<![\d.])\d\d\.\d\d(?!\d)", GUIDE))
    assert len(published) > 12
    tables = (DOCS / "paper.md").read_text()
    assert {number for number in published if number not in tables} == set()


def test_schedule():
    chosen = config.Config()
    told = f"{chosen.optimizer.learning_rate:g} (1 - step / steps)^{chosen.optimizer.power:g}"
    assert told in FLAT
    assert f"learning rate of {chosen.second_stage.learning_rate:g}" in FLAT
    decay = ARCHITECTURES["paper_resnet50"].bn_momentum
    assert f"decay by {decay:g}" in FLAT
    assert 1 / (1 - decay) == pytest.approx(3300, rel=0.02)


def test_what_torchvision_changes():
    ours, theirs = (ARCHITECTURES[f"{family}_resnet50"] for family in ("paper", "torchvision"))
    block = GUIDE.partition("| `model.` field |")[2].partition("\n\n")[0]
    fields = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", block, re.M)
    assert len(fields) == 8
    for field, *told in fields:
        values = [getattr(model, field) for model in (ours, theirs)]
        assert told == [comma(v) if isinstance(v, tuple) else str(v) for v in values], field
    assert (ours.head_conv, theirs.head_conv) == (False, True)
    mobile = ARCHITECTURES["torchvision_mobilenet_v3_large"]
    assert (mobile.output_stride, mobile.atrous_rates) == (16, (12, 24, 36))
    assert (mobile.backbone_bn_momentum, mobile.backbone_bn_epsilon) == (0.99, 0.001)
    tensorflow = ARCHITECTURES["tf_mobilenet_v2"]
    assert (tensorflow.output_stride, tensorflow.atrous_rates) == (16, ())
    families = ("tf", "paper", "torchvision")
    paddings = [ARCHITECTURES[f"{family}_mobilenet_v2"].padding for family in families]
    assert paddings == ["same", "symmetric", "symmetric"]
    at8 = network.summary_of("paper_resnet50", output_stride=8)
    torchvision = network.summary_of("torchvision_resnet50")
    told = [comma(rates(found, "backbone.layer4")) for found in (at8, torchvision)]
    assert told == ["4, 8, 16", "2, 4, 4"]


def test_models():
    torchvision = network.summary_of("torchvision_resnet50")
    parts = [p for p in torchvision.parts if not p.name.startswith("aux_classifier")]
    without = ModuleSummary("all", tuple(c for part in parts for c in part.convolutions))
    plus = network.summary_of("paper_resnet50", decoder="plus")
    paper = [network.summary_of("paper_resnet50", output_stride=stride) for stride in (16, 8)]
    listed = [
        ("`paper_resnet50`", paper[0].all, 16),
        ("`paper_resnet50`", paper[1].all, 8),
        ("`torchvision_resnet50`, without its auxiliary head", without, 8),
        ("`torchvision_resnet50`", torchvision.all, 8),
        ("`paper_resnet50`, decoder plus", plus.all, 16),
    ]
    for name, part, stride in listed:
        view = max(c.field_of_view for c in part.convolutions if c.field_of_view)
        work = [f"{2 * macs / 1e9:.3f}" for macs in (part.macs, part.valid_macs)]
        assert row(name, stride, format_count(part.params), *work, view) in GUIDE, name
    low_level = next(c for c in plus.all.convolutions if "low_level" in c.name)
    assert (low_level.out_shape[2], low_level.output_stride) == (48, 4)
