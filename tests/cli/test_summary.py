"""`deeplab-jax summary`, run in this process as a user types it."""

import functools
import json

import pytest
from PIL import Image

from conftest import ROOT
from deeplab_jax.analysis import descriptions, plots, receptive_field
from deeplab_jax.utils.errors import UserError


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return functools.partial(command, "summary")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_checkpoint_is_summarized_at_its_own_size(command, model):
    code, out, err = command(model, "--json", "numbers.json")
    assert (code, err) == (0, "")
    with open("numbers.json") as file:
        told = json.load(file)
    assert (told["height"], told["width"]) == (33, 33)
    assert told["architecture"]["num_classes"] == 3
    lines = out.splitlines()
    assert lines[0].split()[0] == "convolution"
    rows = [line.split() for line in lines[1:] if line.startswith(("backbone", "classifier"))]
    convs = told["convolutions"]
    assert [row[0] for row in rows[: len(convs)]] == [conv["name"] for conv in convs]
    last = next(line for line in lines if line.startswith("classifier.aspp.branches.3.conv"))
    assert last.split() == [
        *("classifier.aspp.branches.3.conv", "3x3", "1", "18", "3x3x32", "16", "1171", "11.1", "%"),
        *("18", "496", "0.000"),
    ]
    assert "paper_resnet18, 3 classes, output stride 16, multi-grid (1, 2, 4)" in out


def test_options_change_the_model_and_the_size(command, model):
    code, out, _ = command(model, "--size", "40x65", "--output-stride", 8, "--json", "-")
    told = json.loads(out)
    assert code == 0
    assert (told["height"], told["width"]) == (40, 65)
    assert told["architecture"]["atrous_rates"] == [12, 24, 36]
    assert told["convolutions"][-1]["out_shape"] == [5, 9, 3]


def test_markdown(command):
    code, out, _ = command(ROOT / "configs" / "shapes.py", "--markdown")
    assert code == 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert cells(table[0])[:4] == ["convolution", "kernel", "stride", "rate"]
    widths = {len(cells(line)) for line in table}
    assert widths == {10, 6}
    assert set(table[1]) <= set("| -:")
    assert "- parameters: " in out


def test_pictures(command, model, monkeypatch):
    drawn = []

    draw = plots.field_figure

    def figure(fields, title):
        drawn.append((fields, title))
        return draw(fields, title)

    monkeypatch.setattr(plots, "field_figure", figure)
    two = receptive_field.variants(descriptions.read(str(model)).architecture)[1:3]
    monkeypatch.setattr(receptive_field, "variants", lambda architecture: two)
    arguments = ("--size", 17, "--plot", "new/blocks.png", "--receptive-field", "field.svg")
    code, out, err = command(model, *arguments, "--samples", 1)
    assert (code, err) == (0, "")
    with Image.open("new/blocks.png") as image:
        assert image.size[0] > 1000
    with open("field.svg") as file:
        assert "<svg" in file.read()
    ((fields, title),) = drawn
    assert title == "Effective receptive field of paper_resnet18, trained weights, 17x17"
    assert [name for name, _ in fields] == [name for name, _ in two]
    lines = [line for line in out.splitlines() if line.startswith("receptive field")]
    for line, (name, field) in zip(lines, fields, strict=True):
        assert name in line
        assert f"95 % of the energy within {field.side(0.95)} px" in line


# --- What a text names -------------------------------------------------------------------------


def test_names_configs_and_checkpoints(model):
    named = descriptions.read("torchvision_resnet50")
    assert (named.architecture.num_classes, named.size) == (21, (513, 513))
    assert descriptions.read("paper_resnet18", num_classes=7).architecture.num_classes == 7
    voc = descriptions.read(str(ROOT / "configs" / "voc_os8.py"))
    assert (voc.architecture.output_stride, voc.architecture.num_classes) == (8, 21)
    camvid = descriptions.read(str(ROOT / "configs" / "camvid.py"), num_classes=11)
    assert camvid.size == (361, 481)
    assert camvid.architecture.num_classes == 11
    shapes = descriptions.read(str(ROOT / "configs" / "shapes.py"))
    assert shapes.architecture.num_classes == 5
    saved = descriptions.read(str(model))
    assert saved.saved is not None
    assert saved.architecture.num_classes == 3


def test_classes_of_a_folder_are_read(tmp_path):
    (tmp_path / "classes.txt").write_text("ground\nred fox\n")
    config = tmp_path / "mine.py"
    config.write_text(
        "from deeplab_jax.config import *\n"
        "def get_config():\n"
        "    data = DataConfig(name='folder', mean=(0.5,), std=(0.5,))\n"
        f"    data.root, data.folder.channels = {str(tmp_path)!r}, 1\n"
        "    return Config(data=data)\n"
    )
    found = descriptions.read(str(config)).architecture
    assert (found.num_classes, found.in_channels) == (2, 1)
    assert descriptions.read(str(config), num_classes=4).architecture.num_classes == 4


@pytest.mark.parametrize(
    ("text", "size"), [("513", (513, 513)), ("360x480", (360, 480)), (" 1x1 ", (1, 1))]
)
def test_sizes(text, size):
    assert descriptions.parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "0x5", "5x0", "-3", "3.5", "5x", "x5", "1x2x3", "large"])
def test_wrong_sizes(text):
    with pytest.raises(UserError, match="--size must be a side such as 513, or height x width"):
        descriptions.parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papper_resnet50"], "did you mean 'paper_resnet50'?"),
        (["deeplabv3_resnet5"], "did you mean 'deeplabv3_resnet50'?"),
        (["notes.txt"], "notes.txt is not a PyTorch or safetensors file"),
        (["nothing.py"], "there is no config file nothing.py"),
        (["."], "no checkpoint at ."),
        (["FOLDER"], "takes the number of classes from its data, which is not available: give"),
        (["paper_resnet18", "--num-classes", "0"], "--num-classes must be 1 to 255, got 0"),
        (["MODEL", "--num-classes", "3"], "is a trained model, which has its own"),
        (["paper_resnet18", "--size", "0"], "got '0'"),
        (["paper_resnet18", "--output-stride", "12"], "output_stride must be 8, 16 or 32"),
        (["paper_resnet18", "--json", "a.txt"], "--json must be a file that ends in .json"),
        (
            ["paper_resnet18", "--plot", "a.jpg"],
            "--plot must be a file that ends in .png or .svg or .pdf",
        ),
        (["paper_resnet18", "--receptive-field", "a"], "--receptive-field must be a file that"),
        (["misspelt.py"], "config.model.output_stride must be 8, 16 or 32"),
    ],
)
def test_mistakes_are_one_message(command, model, tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("no weights at all")
    (tmp_path / "misspelt.py").write_text(
        "from deeplab_jax.config import *\n"
        "def get_config(): return Config(model=ModelConfig(output_stride=12))\n"
    )

    def files():
        return sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__")

    before = files()
    places = {"MODEL": model, "FOLDER": ROOT / "configs" / "folder.py"}
    code, out, err = command(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert files() == before
