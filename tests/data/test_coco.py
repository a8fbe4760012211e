"""COCO reduced to VOC's classes: labels against hand-drawn ones, images of each split, errors."""

import ast
import importlib.util
import json
import pathlib
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_jax import data
from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.datasets import coco
from deeplab_jax.utils.errors import UserError

HEIGHT, WIDTH = 5, 7
PERSON, BICYCLE, DOG, CHAIR, ZEBRA = 1, 2, 18, 62, 24  # categories of COCO


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def box(left: int, top: int, right: int, bottom: int) -> list[int]:
    """A polygon around the pixels of columns left..right - 1 and rows top..bottom - 1."""
    return [left, top, right, top, right, bottom, left, bottom]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's run-length code: of 0s and 1s in turn, down the columns."""
    pixels = mask.T.ravel()
    ends = [*(np.flatnonzero(np.diff(pixels.astype(int))) + 1), pixels.size]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


class Maker:
    """A folder laid out as COCO's archives unpack."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.content: dict[str, dict[str, list]] = {
            split: {"images": [], "annotations": []} for split in ("train", "val")
        }
        for split in ("train", "val"):
            (root / f"{split}2017").mkdir(parents=True)
        (root / "annotations").mkdir()

    def image(self, split: str, image_id: int, *objects: tuple) -> None:
        """Each object: a category, a segmentation, and maybe an area and whether it is a crowd."""
        name = f"{image_id:012d}.jpg"
        gradient = np.mgrid[:HEIGHT, :WIDTH].sum(0) * 5 + image_id
        Image.fromarray(gradient.astype(np.uint8)).save(self.root / f"{split}2017" / name)
        content = self.content[split]
        content["images"].append(
            {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH}
        )
        for category, segmentation, *more in objects:
            area, crowd = (*more, *(2000, 0)[len(more) :])
            content["annotations"].append(
                {
                    "id": 100 + len(content["annotations"]),
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": segmentation,
                    "area": area,
                    "iscrowd": crowd,
                }
            )

    def write(self) -> pathlib.Path:
        for split, content in self.content.items():
            path = self.root / f"annotations/instances_{split}2017.json"
            path.write_text(json.dumps(content))
        return self.root


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "coco")


def load(root: pathlib.Path | str, split: str = "train"):
    return data.load(DataConfig(name="coco", root=str(root)), split).source


def names(source) -> list[int]:
    return [int(source[index]["name"]) for index in range(len(source))]


def error_of(root: pathlib.Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        load(root, split)
    return str(raised.value)


# P 15 person, B 2 bicycle, D 12 dog, C 9 chair, - 255, . 0.
IDS = {"P": 15, "B": 2, "D": 12, "C": 9, "-": 255, ".": 0}


def drawn(*rows: str) -> list[list[int]]:
    return [[IDS[letter] for letter in row] for row in rows]


LABELS = {
    "a polygon": (
        [(PERSON, [box(1, 1, 4, 3)])],
        (".......", ".PPP...", ".PPP...", ".......", "......."),
    ),
    "two polygons of one instance, which may overlap": (
        [(DOG, [box(0, 0, 2, 2), box(1, 1, 3, 4), box(6, 4, 7, 5)])],
        ("DD.....", "DDD....", ".DD....", ".DD....", "......D"),
    ),
    # Down the columns: 6 pixels outside, 2 inside, 3 outside, 2 inside, the rest outside.
    "a crowd": (
        [(BICYCLE, {"size": [HEIGHT, WIDTH], "counts": [6, 2, 3, 2, 22]}, 2000, 1)],
        (".......", ".BB....", ".BB....", ".......", "......."),
    ),
    "classes that overlap": (
        [(CHAIR, [box(0, 0, 4, 3)]), (PERSON, [box(2, 1, 6, 4)])],
        ("CCCC...", "CC--PP.", "CC--PP.", "..PPPP.", "......."),
    ),
    "instances of one class that overlap": (
        [(PERSON, [box(0, 0, 3, 2)]), (PERSON, [box(2, 0, 5, 2)])],
        ("PP-PP..", "PP-PP..", ".......", ".......", "......."),
    ),
    "a crowd over an instance": (
        [
            (PERSON, [box(0, 0, 1, 1)]),
            (PERSON, {"size": [HEIGHT, WIDTH], "counts": [0, 10, 25]}, 2000, 1),
        ],
        ("-P.....", "PP.....", "PP.....", "PP.....", "PP....."),
    ),
    "what VOC does not have hides nothing": (
        [(ZEBRA, [box(0, 0, 7, 5)]), (DOG, [box(5, 3, 7, 5)])],
        (".......", ".......", ".......", ".....DD", ".....DD"),
    ),
}


def test_labels_as_drawn_by_hand(maker):
    for index, (objects, _) in enumerate(LABELS.values()):
        maker.image("train", index, *objects)
    source = load(maker.write())
    assert len(source) == len(LABELS)
    for index, (case, (_, rows)) in enumerate(LABELS.items()):
        assert source[index]["label"].tolist() == drawn(*rows), case
        assert source[index]["label"].dtype == np.uint8


def test_labels_are_those_of_torchvisions_rule():
    """The largest class of the instances on a pixel, and 255 where there are several."""
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 5):
        masks = rng.random((count, 9, 11)) < 0.4
        classes = rng.integers(1, 21, count)
        instances = tuple(
            coco.Instance(index, int(class_id), 0, run_lengths(mask))
            for index, (class_id, mask) in enumerate(zip(classes, masks, strict=True))
        )
        expected = torch.zeros(9, 11, dtype=torch.int64)
        if count:
            stacked = torch.from_numpy(masks)
            expected = (stacked * torch.from_numpy(classes)[:, None, None]).max(dim=0).values
            expected[stacked.sum(0) > 1] = 255
        np.testing.assert_array_equal(
            coco.draw_label(coco.AnnotatedImage("x.jpg", 9, 11, instances)), expected.numpy()
        )


def test_categories_are_the_classes_of_the_same_name():
    spec = importlib.util.find_spec("torchvision")  # its text: the import needs a CUDA torch
    if spec is None:
        pytest.skip("torchvision is not installed")
    tree = ast.parse((pathlib.Path(spec.origin).parent / "models/_meta.py").read_text())
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    names = tables["_COCO_CATEGORIES"]
    synonyms = {
        "airplane": "aeroplane",
        "couch": "sofa",
        "motorcycle": "motorbike",
        "tv": "tvmonitor",
    }
    ours = {}
    for category, class_id in coco.CLASS_OF_CATEGORY.items():
        name = names[category].replace(" ", "")
        ours[class_id] = synonyms.get(name, name)
    assert {0: "background"} | ours == dict(enumerate(labels.VOC.names))


def test_which_images_are_in_a_split(maker):
    polygon = [box(1, 1, 4, 3)]
    cases = {
        7: [(PERSON, polygon, 1000.5)],
        3: [(PERSON, polygon, 600), (DOG, polygon, 401)],  # together
        4: [(PERSON, polygon, 1000)],  # no more than that
        5: [(PERSON, polygon, 10), (ZEBRA, polygon, 5000)],  # not VOC's
        6: [(ZEBRA, polygon, 5000)],
        2: [],
        1: [(CHAIR, polygon, 2000)],
    }
    for image_id, objects in cases.items():
        maker.image("train", image_id, *objects)
        maker.image("val", 10 + image_id, *objects)
    root = maker.write()
    assert names(load(root, "train")) == [1, 3, 7]
    assert names(load(root, "val")) == [11, 12, 13, 14, 15, 16, 17]
    assert load(root, "val")[1]["label"].max() == 0


def test_images_and_classes(maker):
    maker.image("val", 40)
    root = maker.write()
    dataset = data.load(DataConfig(name="coco", root=str(root)), "val")
    assert dataset.labels == labels.VOC
    image = dataset.source[0]["image"]
    stored = np.asarray(Image.open(root / "val2017/000000000040.jpg").convert("RGB"))
    np.testing.assert_array_equal(image, stored)
    assert image.shape == (HEIGHT, WIDTH, 3)


def test_archives_in_place_of_folders(maker, tmp_path):
    maker.image("train", 1, (PERSON, [box(1, 1, 4, 3)]))
    root = maker.write()
    packed = tmp_path / "packed"
    packed.mkdir()
    for archive, folder in {
        "annotations_trainval2017": "annotations",
        "train2017": "train2017",
    }.items():
        with zipfile.ZipFile(packed / f"{archive}.zip", "w") as file:
            for path in (root / folder).iterdir():
                file.write(path, path.relative_to(root))
    here, there = load(root)[0], load(packed)[0]
    assert here["name"] == there["name"]
    for key in ("image", "label"):
        np.testing.assert_array_equal(here[key], there[key])
    data_of = (packed / "train2017.zip").read_bytes()
    (packed / "train2017.zip").write_bytes(data_of[:100])
    assert f"{packed / 'train2017.zip'}: the archive is damaged or truncated" in error_of(packed)


def test_prepared_once_and_again_when_it_changes(maker, monkeypatch, capsys):
    maker.image("train", 1, (PERSON, [box(1, 1, 4, 3)]))
    root = maker.write()
    load(root)
    assert "Preparing COCO train" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # as if it were not installed
    assert len(load(root)) == 1
    assert "Preparing" not in capsys.readouterr().err
    maker.image("train", 2, (PERSON, [box(1, 1, 4, 3)]))
    message = error_of(maker.write())
    assert "pip install 'deeplab-jax[coco]'" in message


def test_missing_files(maker, tmp_path):
    assert "annotations_trainval2017.zip" in error_of("")
    message = error_of(tmp_path / "nowhere", "val")
    assert f"config.data.root: {tmp_path / 'nowhere'} does not exist" in message
    assert "annotations/instances_val2017.json, or annotations_trainval2017.zip" in message
    assert (
        "- val2017, or val2017.zip from http://images.cocodataset.org/zips/val2017.zip" in message
    )


def test_an_unknown_split_and_another_ignore_label(maker):
    assert "must be one of train, val, got 'trainval'" in error_of(maker.root, "trainval")
    with pytest.raises(UserError, match=r"ignore_label must be 255, got 0"):
        data.load(DataConfig(name="coco", root=str(maker.root), ignore_label=0), "val")


def test_all_problems_are_reported_together(maker, data_dir):
    polygon = [box(1, 1, 4, 3)]
    for image_id in (1, 2, 3):
        maker.image("train", image_id, (PERSON, polygon))
    maker.image("train", 4, (PERSON, {"size": [WIDTH, HEIGHT], "counts": [35]}))
    maker.image("train", 5, (PERSON, []))
    root = maker.write()
    folder = root / "train2017"
    (folder / "000000000001.jpg").unlink()
    (folder / "000000000002.jpg").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(folder / "000000000003.jpg")
    lines = error_of(root).splitlines()
    assert lines[0] == "Checking COCO train: 5 problems"
    for line, expected in zip(
        lines[1:],
        [
            r"1\.jpg: is missing, but .*instances_train2017\.json names it",
            r"2\.jpg: is a text file\. Expected an image",
            r"3\.jpg: is 9 x 9 pixels \(width x height\), but .* says 7 x 5",
            r"4\.jpg: the segmentation of annotation 103 .*its size is \[7, 5\]",
            r"5\.jpg: the segmentation of annotation 104 cannot be decoded",
        ],
        strict=True,
    ):
        assert re.search(expected, line)
    assert not list(data_dir.rglob("*.array_record*"))


def test_invalid_annotations(maker):
    maker.image("train", 1, (ZEBRA, [box(1, 1, 4, 3)]))
    root = maker.write()
    path = root / "annotations/instances_train2017.json"
    assert f"{path}: has no image with VOC's classes" in error_of(root)
    path.write_text(path.read_text()[:-20])
    assert f"{path}: truncated, or not JSON" in error_of(root)
    path.write_text(json.dumps({"images": []}))
    assert f"{path}: is not a file of COCO's instances (KeyError: 'annotations')" in error_of(root)
