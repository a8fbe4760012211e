"""COCO and LabelMe files: masks against pycocotools and labelme's definition, layouts, errors."""

import base64
import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from deeplab_jax import data
from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.data.io import coco_json
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.io.polygons import ShapeError
from deeplab_jax.data.labels import named
from deeplab_jax.data_check.check import check
from deeplab_jax.utils.errors import UserError

HEIGHT, WIDTH = 60, 80
NAMES = ("background", "cat", "dog", "road")


def star(rng, num_points=12, radius=25, center=None):
    """A polygon with fractions of pixels, which may leave the image."""
    center = rng.uniform(0, (WIDTH, HEIGHT)) if center is None else np.array(center)
    angles = np.sort(rng.uniform(0, 2 * np.pi, num_points))
    radii = rng.uniform(radius / 3, radius, num_points)
    points = center + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    return points.round(2).ravel().tolist()


def ring(center=(30, 30), radius=20, hole=9):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distances = np.hypot(x - center[0], y - center[1])
    return (distances <= radius) & (distances > hole)


def packed(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def unpacked(mask):
    pixels = mask.T.ravel()
    ends = [*(np.flatnonzero(np.diff(pixels.astype(int))) + 1), pixels.size]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def box(left, top, right, bottom):
    """A polygon around the pixels of columns left..right - 1 and rows top..bottom - 1."""
    return [left, top, right, top, right, bottom, left, bottom]


SEGMENTATIONS = {
    "one polygon": lambda rng: [star(rng)],
    "several parts": lambda rng: [star(rng, radius=12) for _ in range(4)],
    "many points": lambda rng: [star(rng, num_points=200)],
    "partly outside": lambda rng: [star(rng, radius=60, center=(-5, HEIGHT + 4))],
    "a triangle": lambda rng: [star(rng, num_points=3)],
    "whole numbers": lambda rng: [[round(x) for x in star(rng)]],
    "a hole, packed": lambda rng: packed(ring()),
    "a hole, not packed": lambda rng: unpacked(ring()),
    "parts, packed": lambda rng: packed(rng.random((HEIGHT, WIDTH)) < 0.3),
    "parts, not packed": lambda rng: unpacked(rng.random((HEIGHT, WIDTH)) < 0.7),
    "all pixels": lambda rng: packed(np.ones((HEIGHT, WIDTH), bool)),
}


def save_image(path):
    """Saves an image that no other path has."""
    rng = np.random.default_rng(list(str(path).encode()))
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


class Coco:
    """A COCO file of images whose names are their ids."""

    def __init__(self, root, categories=("cat", "dog", "road")):
        self.root = root
        self.content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(categories)],
        }

    def image(self, key, *regions, folder="", file_name="", write=True, size=(HEIGHT, WIDTH)):
        """Adds an image and its regions: (category, segmentation), or one with further fields."""
        name = file_name or f"{key}.png"
        self.content["images"].append(
            {"id": key, "file_name": name, "height": size[0], "width": size[1]}
        )
        if write:
            path = self.root / folder / pathlib.PureWindowsPath(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path)
        for category, segmentation, *more in regions:
            self.content["annotations"].append(
                {
                    "id": len(self.content["annotations"]),
                    "image_id": key,
                    "category_id": category,
                    "segmentation": segmentation,
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": 0,
                }
                | dict(*more)
            )
        return self

    def write(self, name="annotations.json"):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content))
        return path


def draw(path, names=NAMES, ignore_label=255):
    """Returns class ids, and remarks."""
    remarks = []
    return MaskFormat("ids", named(*names), ignore_label).draw(path, remarks), remarks


def config(root, **folder):
    return DataConfig(name="folder", root=str(root), folder=FolderConfig(**folder))


def labels_of(root, split="train", **folder):
    dataset = data.load(config(root, **folder), split)
    examples = [read_example(dataset, index) for index in range(len(dataset.source))]
    return dataset, {example["name"]: example["label"] for example in examples}


def error_of(root, split="train", **folder):
    with pytest.raises(UserError) as raised:
        data.load(config(root, **folder), split)
    return str(raised.value)


def findings_of(root, **folder):
    report, _, _ = check(config(root, **folder), num_threads=2)
    return {finding.kind: finding for finding in report.findings}, report


def notes_of(root):
    return "\n".join(findings_of(root)[1].notes)


@pytest.mark.parametrize("kind", SEGMENTATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_coco_masks_are_those_of_pycocotools(tmp_path, kind, seed):
    segmentation = SEGMENTATIONS[kind](np.random.default_rng(seed))
    path = Coco(tmp_path).image(7, (2, segmentation), write=False).write()
    api = COCO(str(path))
    expected = api.annToMask(api.loadAnns([0])[0])
    ids, remarks = draw(path / "7")
    assert expected.any()
    np.testing.assert_array_equal(ids, 2 * expected)
    assert remarks == []


def test_smaller_regions_are_on_top(tmp_path):
    rng = np.random.default_rng(0)
    regions = [(1 + i % 3, [star(rng, radius=10 + 5 * (i * 7 % 6))]) for i in range(12)]
    regions.append((1, unpacked(ring()), {"iscrowd": 1}))
    path = Coco(tmp_path).image("x", *regions, write=False).write()
    api = COCO(str(path))
    masks = {one["category_id"]: [] for one in api.anns.values()}
    areas = np.full((HEIGHT, WIDTH), np.inf)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    for one in api.anns.values():  # a pixel is of the smallest region that holds it
        mask = api.annToMask(one).astype(bool)
        masks[one["category_id"]].append(mask)
        wins = mask & (mask.sum() < areas)
        areas[wins], expected[wins] = mask.sum(), one["category_id"]
    ids, remarks = draw(path / "x")
    np.testing.assert_array_equal(ids, expected)
    number = (sum(np.any(each, axis=0).astype(int) for each in masks.values()) > 1).sum()
    assert number > 0
    assert remarks == [("overlaps", f"{path}/x: {number} pixels of x.png")]


def test_regions_without_a_class_are_not_drawn_and_background_is(tmp_path):
    path = Coco(tmp_path, ("cat", "zebra", "_background_", "__ignore__")).image(
        1,
        (1, [box(0, 0, 40, 40)]),
        (2, [box(0, 0, 5, 5)]),
        (3, [box(10, 10, 16, 16)]),
        (4, [box(20, 20, 24, 24)]),
        write=False,
    )
    ids, _ = draw(path.write() / "1", ("dog", "background", "cat"), 9)
    expected = np.full((HEIGHT, WIDTH), 1)
    expected[:40, :40] = 2
    expected[10:16, 10:16] = 1
    expected[20:24, 20:24] = 9
    np.testing.assert_array_equal(ids, expected)


BAD_SEGMENTATIONS = {
    "too many pixels": ({"size": [HEIGHT, WIDTH], "counts": [5, 9999]}, "Invalid RLE"),
    "packed, too many": (packed(np.ones((200, 200))) | {"size": [HEIGHT, WIDTH]}, "Invalid RLE"),
    "packed, truncated": ({"size": [HEIGHT, WIDTH], "counts": "ono"}, "counts are truncated"),
    "packed, empty": ({"size": [HEIGHT, WIDTH], "counts": ""}, "index out of range"),
    "negative": ({"size": [HEIGHT, WIDTH], "counts": [-5, 9]}, "-5"),
    "another size": (packed(ring()[:30]), "its size is [30, 80], its image's [60, 80]"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "counts"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "odd number of coordinates"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "could not convert"),
    "not a number": ([[math.nan, 2, 3, 4, 5, 6]], "must be pixels"),
    "huge": ([[0, 0, 1e12, 3, 4, 5]], "must be pixels"),
    "text": ("polygon", ""),
}


@pytest.mark.parametrize("kind", BAD_SEGMENTATIONS)
def test_damaged_segmentations(tmp_path, kind):
    segmentation, words = BAD_SEGMENTATIONS[kind]
    path = Coco(tmp_path).image(1, (1, segmentation), write=False).write()
    with pytest.raises(ShapeError) as raised:
        draw(path / "1")
    assert str(raised.value).startswith(f"{path}: annotation 0 (cat) of 1.png cannot be drawn (")
    assert words in str(raised.value)


@pytest.mark.parametrize("garbage", [0, 1, 7])
@pytest.mark.parametrize("counts", [[5, 9], "59", "zzz"])
def test_pixels_after_the_last_count_are_no_garbage(tmp_path, monkeypatch, counts, garbage):
    """pycocotools does not initialize the memory of a mask."""
    decode = coco_mask.decode

    def decode_into_used_memory(code):
        mask = np.array(decode(code), order="F")
        mask.ravel("K")[30 if counts == "zzz" else 14 :] = garbage
        return mask

    monkeypatch.setattr(coco_mask, "decode", decode_into_used_memory)
    code = {"size": [HEIGHT, WIDTH], "counts": counts}
    path = Coco(tmp_path).image(1, (1, code), write=False).write()
    if garbage:
        with pytest.raises(ShapeError, match="fewer pixels than the image has"):
            draw(path / "1")
    else:
        assert draw(path / "1")[0].sum() == (10 if counts == "zzz" else 9)


def test_regions_that_are_not_drawn_are_named(tmp_path):
    path = Coco(tmp_path).image(
        1,
        (1, [[3, 3, 9, 9]]),
        (2, [box(0, 0, 9, 9), [1, 1]]),
        (1, [box(90, 5, 99, 9)]),
        (1, []),
        (1, None),
        (3, box(50, 50, 52, 52)),
        write=False,
    )
    ids, remarks = draw(path.write() / "1")
    expected = np.zeros((HEIGHT, WIDTH))
    expected[:9, :9], expected[50:52, 50:52] = 2, 3
    np.testing.assert_array_equal(ids, expected)
    words = "(cat) of 1.png has no pixel in the image (80 x 60), or no polygon"
    assert remarks == [
        ("not drawn", f"{tmp_path}/annotations.json: annotation {number} {words}")
        for number in (0, 2, 3, 4)
    ]


# LabelMe.


def labelme_mask(points, shape_type):
    """labelme's `utils.shape_to_mask`, written after its source."""
    mask = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8))
    draw = ImageDraw.Draw(mask)
    xy = [tuple(point) for point in points]
    if shape_type == "circle":
        (cx, cy), (px, py) = xy
        d = math.sqrt((cx - px) ** 2 + (cy - py) ** 2)
        draw.ellipse([cx - d, cy - d, cx + d, cy + d], outline=1, fill=1)
    elif shape_type == "rectangle":
        (x0, y0), (x1, y1) = xy
        draw.rectangle([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], outline=1, fill=1)
    elif shape_type in ("line", "linestrip"):
        draw.line(xy=xy, fill=1, width=10)
    elif shape_type == "point":
        (cx, cy) = xy[0]
        draw.ellipse([cx - 5, cy - 5, cx + 5, cy + 5], outline=1, fill=1)
    else:
        draw.polygon(xy=xy, outline=1, fill=1)
    return np.array(mask, bool)


def shape_points(rng, shape_type):
    number = {"polygon": 9, "linestrip": 5, "point": 1, "oriented_rectangle": 4}.get(shape_type, 2)
    return rng.uniform((-10, -10), (WIDTH + 10, HEIGHT + 10), (number, 2)).round(3).tolist()


def encoded(mask):
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_labelme(path, shapes, image=True, **fields):
    """Writes a file of (label, shape type, points), or of these and further fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_suffix(".jpg").name
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": [
            {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
            | dict(*more)
            for label, kind, points, *more in shapes
        ],
        "imagePath": name,
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    path.write_text(json.dumps(content | fields))
    if image:
        save_image(path.with_name(name))
    return path


@pytest.mark.parametrize(
    "kind",
    ["polygon", None, "rectangle", "oriented_rectangle", "circle", "line", "linestrip", "point"],
)
@pytest.mark.parametrize("seed", range(4))
def test_labelme_shapes_are_those_of_labelme(tmp_path, kind, seed):
    points = shape_points(np.random.default_rng(seed), kind or "polygon")
    path = write_labelme(tmp_path / "a.json", [("dog", kind, points)])
    expected = labelme_mask(points, kind)
    np.testing.assert_array_equal(draw(path)[0], 2 * expected)


def test_closed_forms_of_labelme_shapes(tmp_path):
    """Rectangles hold their last row and column; a mask is put between its corners."""
    mask = np.random.default_rng(0).random((4, 6)) < 0.5
    path = write_labelme(
        tmp_path / "a.json",
        [
            ("cat", "rectangle", [[20, 10], [5, 3]]),
            ("dog", "mask", [[30.7, 20.2], [35.7, 23.2]], {"mask": encoded(mask)}),
            ("road", "rotation", [[50, 30], [60, 30], [60, 40], [50, 40]]),
            ("road", "rectangle", [[70, 50], [75, 50], [75, 52], [70, 52]]),
        ],
    )
    expected = np.zeros((HEIGHT, WIDTH))
    expected[3:11, 5:21] = 1
    expected[20:24, 30:36][mask] = 2
    expected[30:41, 50:61] = 3
    expected[50:53, 70:76] = 3
    np.testing.assert_array_equal(draw(path)[0], expected)


def test_later_shapes_are_on_top_and_ignore_and_background_are_known(tmp_path):
    rng = np.random.default_rng(3)
    values = {"cat": 1, "dog": 2, "_background_": 0, "__ignore__": 255}
    kinds = ("polygon", "circle", "linestrip", "rectangle", "point", "line")
    shapes = [
        (list(values)[i % 4], kinds[i % 6], shape_points(rng, kinds[i % 6])) for i in range(24)
    ]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    for label, kind, points in shapes:
        expected[labelme_mask(points, kind)] = values[label]
    path = write_labelme(tmp_path / "a.json", shapes)
    np.testing.assert_array_equal(draw(path)[0], expected)
    assert set(np.unique(expected)) == {0, 1, 2, 255}


def test_old_labelme_files_take_the_size_from_the_image(tmp_path):
    shapes = [("cat", "rectangle", [[0, 0], [9, 9]])]
    fields = {"imageHeight": None, "imagePath": "..\\x\\a.jpg"}
    path = write_labelme(tmp_path / "a.json", shapes, **fields)
    with pytest.raises(UserError, match=r"a\.json: has no imageHeight.*Open it in labelme"):
        draw(path)
    write_labelme(path, shapes, **fields | {"imagePath": "a.jpg"})
    assert draw(path)[0].shape == (HEIGHT, WIDTH)
    write_labelme(path, shapes, **fields, imageData=encoded(np.zeros((7, 9))))
    assert draw(path)[0].shape == (7, 9)


BAD_SHAPES = {
    "an unknown label": (("dgo", "polygon", [[0, 0], [9, 0], [9, 9]]), "did you mean 'dog'"),
    "an unknown shape": (("dog", "points", [[0, 0], [9, 0]]), "known are the shapes polygon,"),
    "no mask": (("dog", "mask", [[0, 0], [9, 9]]), "shape 1 (dog, mask) cannot be drawn"),
    "a mask of another size": (
        ("dog", "mask", [[0, 0], [9, 9]], {"mask": encoded(np.ones((3, 3)))}),
        "its mask is [3, 3]",
    ),
    "no number": (("dog", "polygon", [[0, 0], [9, None], [9, 9]]), "must be pixels"),
    "three coordinates": (("dog", "polygon", [[0, 0, 1]]), "odd number"),
}


@pytest.mark.parametrize("kind", BAD_SHAPES)
def test_shapes_that_cannot_be_drawn(tmp_path, kind):
    shape, words = BAD_SHAPES[kind]
    path = write_labelme(tmp_path / "a.json", [shape])
    with pytest.raises(ShapeError) as raised:
        draw(path)
    assert str(raised.value).startswith(f"{path}: shape 1")
    assert words in str(raised.value)


def test_shapes_that_are_not_drawn_are_named(tmp_path):
    path = write_labelme(
        tmp_path / "a.json",
        [
            ("cat", "polygon", [[0, 0], [9, 9]]),
            ("cat", "rectangle", [[200, 0], [210, 9]]),
            ("dog", "circle", [[-5, -5], [-2, -5]]),
            ("dog", "circle", [[-5, 5], [5, 5]]),
        ],
    )
    ids, remarks = draw(path)
    assert remarks == [
        ("not drawn", f"{path}: shape 1 (cat, polygon) has 2 points, expected at least 3"),
        ("not drawn", f"{path}: shape 2 (cat, rectangle) is outside the image (80 x 60)"),
        ("not drawn", f"{path}: shape 3 (dog, circle) is outside the image (80 x 60)"),
    ]
    assert set(np.unique(ids)) == {0, 2}


# Folders.


def roboflow(root):
    for split in ("train", "valid", "test"):
        coco = Coco(root / split, ("cat", "dog"))
        coco.content["categories"] = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ]
        coco.image(0, (1, [box(0, 0, 9, 9)]), file_name=f"{split}_a_jpg.rf.1.png")
        coco.image(1, (2, [box(0, 0, 9, 9)]), file_name="b.png").write("_annotations.coco.json")


def cvat(root):
    coco = Coco(root, ("cat", "dog"))
    for key in range(6):
        coco.image(key, (1 + key % 2, unpacked(ring()), {"iscrowd": 1}), folder="images/default")
    coco.write("annotations/instances_default.json")


def official(root):
    for split in ("train", "val"):
        coco = Coco(root, ("cat", "dog"))
        for key in range(3):
            name = f"{split}{key}.png"
            coco.image(key, (1, [box(0, 0, 9, 9)]), folder=f"{split}2017", file_name=name)
        coco.write(f"annotations/instances_{split}2017.json")
        for one in coco.content["annotations"]:
            one["keypoints"] = [1, 2, 2]
        coco.write(f"annotations/person_keypoints_{split}2017.json")
        coco.content["annotations"] = [{"id": 1, "image_id": 0, "caption": "a cat"}]
        coco.write(f"annotations/captions_{split}2017.json")


def label_studio(root):
    coco = Coco(root, ("cat", "dog"))
    for key, name in enumerate(("images\\0a1b2c3d-a b.png", "images/c%20d.png", "..\\x\\e.png")):
        coco.image(key, (2, [box(0, 0, 9, 9)]), folder="images", file_name=name)
    (root / "images/0a1b2c3d-a b.png").rename(root / "images/a b.png")
    (root / "images/c%20d.png").rename(root / "images/c d.png")
    coco.write("result.json")


LAYOUTS = {
    "roboflow": (roboflow, {"train": 2, "val": 2, "test": 2}),
    "cvat": (cvat, 6),
    "official": (official, {"train": 3, "val": 3}),
    "label_studio": (label_studio, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_coco_files(tmp_path, name):
    write, expected = LAYOUTS[name]
    write(tmp_path)
    layout = detect_layout(config(tmp_path))
    assert layout.problems == []
    sizes = {split: len(pairs) for split, pairs in layout.splits.items()}
    if isinstance(expected, int):
        assert set(sizes) == {"train", "val"}
        assert min(sizes.values()) >= 1
        expected = {"train": expected - sizes["val"], "val": sizes["val"]}
    assert sizes == expected
    names = [pair.name for pairs in layout.splits.values() for pair in pairs]
    assert len(set(names)) == len(names)
    dataset, labels = labels_of(tmp_path)
    assert dataset.labels.names == ("background", "cat", "dog")
    assert len(labels) == sizes["train"]
    assert all(set(np.unique(label)) - {0} for label in labels.values())
    report, scans, _ = check(config(tmp_path), num_threads=1)
    assert report.errors == []
    assert len(scans) == sum(sizes.values())
    assert any("polygons in" in note and "smallest is on top" in note for note in report.notes)


def test_the_file_itself_is_a_root_with_the_same_splits(tmp_path):
    cvat(tmp_path)
    layouts = [
        detect_layout(config(root))
        for root in (tmp_path, tmp_path / "annotations/instances_default.json")
    ]
    assert layouts[0].splits == layouts[1].splits
    names = [pair.name for pair in layouts[0].splits["train"]]
    assert all(name.startswith("images/default/") for name in names)


def test_a_set_without_val_gets_a_fraction(tmp_path):
    for split in ("train", "test"):
        coco = Coco(tmp_path / split)
        for key in range(8):
            coco.image(key, (1, [box(0, 0, 9, 9)]))
        coco.write("_annotations.coco.json")
    layout = detect_layout(config(tmp_path, val_fraction=0.3))
    sizes = {split: len(pairs) for split, pairs in layout.splits.items()}
    assert sizes["test"] == 8
    assert sizes["train"] + sizes["val"] == 8
    assert sizes["val"]
    assert any("no JSON file is of val: the fraction 0.3 of train" in n for n in layout.notes)


def test_files_of_one_split_are_merged_and_each_image_is_listed_once(tmp_path):
    Coco(tmp_path).image(1, folder="images").image(2, folder="images").write("batch1.json")
    Coco(tmp_path).image(7, (1, [box(0, 0, 9, 9)]), folder="images").write("batch2.json")
    layout = detect_layout(config(tmp_path))
    assert sorted(p.name for ps in layout.splits.values() for p in ps) == [
        "images/1",
        "images/2",
        "images/7",
    ]
    Coco(tmp_path).image(9, file_name="2.png", write=False).write("batch3.json")
    image = tmp_path / "images/2.png"
    assert f"{tmp_path}/batch3.json: lists {image}, as does {tmp_path}/batch1.json." in error_of(
        tmp_path
    )


def test_the_image_beside_the_file_or_of_its_split_is_meant(tmp_path):
    for split in ("train", "val"):
        coco = Coco(tmp_path, ("cat",)).image(1, (1, [box(0, 0, 9, 9)]), folder=f"images/{split}")
        coco.write(f"{split}.json")
    layout = detect_layout(config(tmp_path))
    assert [str(layout.splits[s][0].image) for s in ("train", "val")] == [
        f"{tmp_path}/images/{split}/1.png" for split in ("train", "val")
    ]
    (tmp_path / "val.json").unlink()
    (tmp_path / "train.json").rename(tmp_path / "all.json")
    assert (
        f"{tmp_path}/all.json: 1.png (image id 1) may be {tmp_path}/images/train/1.png, "
        f"{tmp_path}/images/val/1.png" in error_of(tmp_path)
    )


def labelme_set(root, folder="", annotations="", labels=("dog", "cat")):
    for number in range(6):
        shapes = [
            (labels[number % 2], "polygon", [[5, 5], [40, 5], [40, 30]]),
            ("__ignore__", "rectangle", [[50, 50], [60, 55]]),
        ]
        path = write_labelme(root / folder / f"{number}.json", shapes)
        if annotations:
            (root / annotations).mkdir(exist_ok=True)
            path.rename(root / annotations / path.name)


@pytest.mark.parametrize(("folder", "annotations"), [("", ""), ("images", "labels"), ("a", "json")])
def test_labelme_files_beside_images_and_in_their_own_folder(tmp_path, folder, annotations):
    labelme_set(tmp_path, folder, annotations)
    dataset, labels = labels_of(tmp_path)
    assert dataset.labels.names == ("background", "cat", "dog")  # by name
    assert len(labels) >= 3
    expected = labelme_mask([[5, 5], [40, 5], [40, 30]], "polygon")
    for name, label in labels.items():
        class_id = 2 - int(pathlib.PurePath(name).name) % 2
        assert (label[expected] == class_id).all()
        assert (label[50:56, 50:61] == 255).all()
        assert (label == 0).sum() == label.size - expected.sum() - 6 * 11
    found, report = findings_of(tmp_path)
    assert report.errors == []
    assert not {"unreadable", "other files"} & found.keys()


@pytest.mark.parametrize(("folder", "annotations"), [("", ""), ("images", "labels")])
def test_images_without_a_labelme_file_are_left_out(tmp_path, folder, annotations):
    labelme_set(tmp_path, folder, annotations)
    for number in range(20):
        save_image(tmp_path / folder / f"new{number}.jpg")
    layout = detect_layout(config(tmp_path))
    assert layout.problems == []
    assert sum(map(len, layout.splits.values())) == 6
    first = tmp_path / folder / "new0.jpg"
    assert f"20 images have no LabelMe file and are left out, as {first}" in layout.notes


def test_a_broken_file_is_named_and_the_others_are_checked(tmp_path):
    labelme_set(tmp_path)
    (tmp_path / "3.json").write_text('{"version": "5.0", "shapes": [')
    found, report = findings_of(tmp_path)
    assert found["unreadable"].examples[0].startswith(f"{tmp_path}/3.json: is truncated, or not")
    assert [finding.kind for finding in report.errors] == ["unreadable"]
    assert any(note.startswith(f"{tmp_path}/3.json: ") for note in report.notes)
    assert sum(sum(one.pixels.values()) > 0 for one in report.classes) == 3
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    assert "the LabelMe files have no labels: 6 problems\n- " in error_of(tmp_path)


def test_mask_pattern_chooses_labelme_files(tmp_path):
    labelme_set(tmp_path)
    for path in tmp_path.glob("*.json"):
        Image.new("L", (WIDTH, HEIGHT)).save(path.with_name(f"{path.stem}_mask.png"))
    patterns = {"image_pattern": "{name}.jpg", "mask_pattern": "{name}.json"}
    assert labels_of(tmp_path, **patterns)[0].labels.names == ("background", "cat", "dog")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("background", "dog", "cat"), ("background", "dog", "cat")),
        (("dog", "nothing", "_background_", "cat"), ("dog", "nothing", "_background_", "cat")),
        (("dog", "cat"), ("background", "dog", "cat")),
        (("other", "dog", "cat"), ("other", "dog", "cat")),
    ],
)
@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_a_file_of_classes_orders_them(tmp_path, lines, expected, kind):
    cvat(tmp_path) if kind == "coco" else labelme_set(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    dataset, labels = labels_of(tmp_path)
    assert dataset.labels.names == expected
    background = expected.index("_background_") if "_background_" in expected else 0
    for name, label in labels.items():
        which = int(pathlib.PurePath(name).name) % 2
        class_id = expected.index(
            ("cat", "dog")[which] if kind == "coco" else ("dog", "cat")[which]
        )
        assert label[0, 0] == background
        assert set(np.unique(label)) - {255} == {background, class_id}


def test_a_file_of_classes_chooses_categories(tmp_path):
    cvat(tmp_path)
    (tmp_path / "classes.txt").write_text("background\ndog\n")
    _, labels = labels_of(tmp_path)
    for name, label in labels.items():
        assert label.any() == (int(pathlib.PurePath(name).name) % 2)
    assert "does not name are background: cat" in notes_of(tmp_path)


def test_categories_of_all_splits_are_classes_of_each(tmp_path):
    Coco(tmp_path / "train", ("cat", "dog")).image(1, (1, [box(0, 0, 9, 9)])).write("a.json")
    coco = Coco(tmp_path / "valid", ("road", "cat")).image(1, (2, [box(0, 0, 9, 9)]))
    coco.content["categories"][0]["id"] = 2.0
    coco.content["categories"][1]["id"] = "10"
    coco.content["annotations"][0]["category_id"] = 10
    coco.write("a.json")
    for split in ("train", "val"):
        dataset, labels = labels_of(tmp_path, split)
        assert dataset.labels.names == ("background", "cat", "dog", "road")
        assert [set(np.unique(label)) for label in labels.values()] == [{0, 1}]


def test_categories_of_one_name_are_one_class(tmp_path):
    coco = Coco(tmp_path, ("cat", "dog", "cat"))
    for key in range(4):
        coco.image(key, (1 + key % 3, [box(0, 0, 9, 9)]))
    coco.write()
    dataset, labels = labels_of(tmp_path)
    assert dataset.labels.names == ("background", "cat", "dog")
    assert all(label[0, 0] == 1 + int(name) % 3 % 2 for name, label in labels.items())
    assert "categories of the name 'cat' are one class" in notes_of(tmp_path)


def test_roboflows_group_of_id_0_is_a_class_only_if_it_is_used(tmp_path):
    roboflow(tmp_path)
    assert "category 'pets' of id 0 stands for the others" in notes_of(tmp_path)
    path = tmp_path / "valid/_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    assert labels_of(tmp_path)[0].labels.names == ("background", "pets", "cat", "dog")


def test_sources_pickle_and_a_file_is_parsed_once(tmp_path, monkeypatch):
    cvat(tmp_path)
    coco_json._parse_coco.cache_clear()
    dataset, labels = labels_of(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset.source))
    for index in range(len(copy)):
        example = copy[index]
        np.testing.assert_array_equal(example["label"], labels[example["name"]])
    assert coco_json._parse_coco.cache_info().misses == 1
    path = tmp_path / "annotations/instances_default.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    assert labels_of(tmp_path)[0].labels.names == ("background", "cow", "dog")


PROBLEMS = {
    "no images": (lambda c: c["images"].clear(), "annotations.json: lists no images"),
    "an unknown category": (
        lambda c: c["annotations"][0].update(category_id=9),
        "annotation 0 has the category 9, expected one of 1 (cat), 2 (dog)",
    ),
    "an id of two categories": (
        lambda c: c["categories"][1].update(id=1),
        "the categories 'cat' and 'dog' have one id, 1",
    ),
    "an id of two images": (
        lambda c: c["images"][1].update(id=0),
        "the images 0.png and 1.png have one id, 0",
    ),
    "no size": (lambda c: c["images"][2].pop("height"), "images[2] has no height"),
    "a wrong size": (
        lambda c: c["images"][2].update(height="x"),
        "the image 2.png (id 2) has height 'x' and width 80, expected pixels",
    ),
    "a huge size": (lambda c: c["images"][2].update(height=10**9), "expected pixels"),
    "a missing image": (
        lambda c: c["images"][2].update(file_name="2.pgn"),
        "annotations.json: 1 of the 4 images that it lists are not below {root}: 2.pgn. Put them "
        "there, or set config.data.root to a folder that holds the file and the images",
    ),
    "no image that exists": (
        lambda c: [one.update(file_name=f"x{i}") for i, one in enumerate(c["images"])],
        "annotations.json: 4 of the 4 images that it lists are not below {root}: x0, x1, x2, x3. ",
    ),
    "an image twice": (
        lambda c: c["images"][2].update(file_name="1.png"),
        "annotations.json: lists {root}/1.png, as does {root}/annotations.json. Keep it once",
    ),
    "no category": (
        lambda c: [one.pop("category_id") for one in c["annotations"]],
        "annotations[0] has no category_id, and 3 others",
    ),
    "boxes": (
        lambda c: [one.update(segmentation=[]) for one in c["annotations"]],
        "annotations.json: has no polygons and no masks: it has only boxes or texts",
    ),
    "no list": (lambda c: c.update(annotations={}) or c.update(images={"a": 1}), "lists no images"),
    "a damaged polygon": (
        lambda c: [one.update(segmentation={"size": [1, 1]}) for one in c["annotations"]],
        "(cat) of 1.png cannot be drawn",
    ),
    "another size": (
        lambda c: [one.update(height=30) for one in c["images"]],
        "1.png is 80 x 60. A mask must have its image's size",
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems_of_coco_files(tmp_path, kind):
    change, words = PROBLEMS[kind]
    coco = Coco(tmp_path, ("cat", "dog"))
    for key in range(4):
        coco.image(key, (1, [box(0, 0, 9, 9)]))
    change(coco.content)
    coco.write()
    message = error_of(tmp_path)
    assert f"{tmp_path}/annotations.json" in message
    assert words.format(root=tmp_path) in message
    report = findings_of(tmp_path)[1]
    assert words.format(root=tmp_path) in json.dumps(report.to_json(), ensure_ascii=False)
    assert {finding.kind for finding in report.errors} <= {
        "pairs",
        "one class",
        "sizes differ",
        "shapes",
    }


def test_annotations_of_unknown_images_are_noted(tmp_path):
    coco = Coco(tmp_path).image(0, (1, [box(0, 0, 9, 9)])).image(1).image(5)
    coco.content["images"].pop()
    coco.content["annotations"] += [{"id": 8, "image_id": 5, "category_id": 1}] * 3
    coco.write()
    notes = notes_of(tmp_path)
    assert "3 annotations are of images that it does not list, and not used" in notes
    assert f"1 images are in no JSON file and not used, as {tmp_path}/5.png" in notes


JSONS = {
    "truncated": (
        '{"images": [\n {"id": 1},\n {"id"',
        "is truncated, or not JSON (Expecting ':' delimiter: line 3 column 7 (char",
    ),
    "other": (
        '{"objects": []}',
        "has the keys objects, expected those of COCO: images, annotations, categories.",
    ),
    "of LabelMe": (
        '{"version": "5", "shapes": []}',
        "has the keys version, shapes, expected those of COCO: images, annotations, categories. "
        "config.data.root is a COCO file, or the folder of LabelMe's files and their images.",
    ),
    "a list": ("[1, 2]", "has the keys of no object, expected those of COCO"),
    "nested": ("[" * 100_000, "is truncated, or not JSON (maximum recursion"),
    "binary": (b"\x00\x01\x02", "zero bytes"),
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("is_root", [True, False])
def test_json_that_is_neither(tmp_path, kind, is_root):
    text, words = JSONS[kind]
    path = tmp_path / "annotations.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    message = error_of(path if is_root else tmp_path)
    assert f"{path}: " in message
    assert words in message
    if not is_root:
        assert "Expected one of\n- images/train" in message


def test_many_files_of_coco_among_others(tmp_path, monkeypatch):
    for key in range(70):
        coco = Coco(tmp_path, ("cat",)).image(key, (1, [box(0, 0, 9, 9)]), folder="images")
        coco.write(f"annotations/batch_{key}.json")
    for number in range(40):
        (tmp_path / f"settings{number}.json").write_text('{"a": 1}')
    coco_json._parse_coco.cache_clear()
    layout = detect_layout(config(tmp_path))
    assert layout.problems == []
    assert sum(map(len, layout.splits.values())) == 70
    num_parsed = coco_json._parse_coco.cache_info().currsize
    paths = []
    read = coco_json.read
    monkeypatch.setattr(coco_json, "read", lambda path: paths.append(path) or read(path))
    labels_of(tmp_path)
    assert coco_json._parse_coco.cache_info().currsize == num_parsed == 70
    assert sum(path.parent == tmp_path for path in paths) == 16  # then it gives up


@pytest.mark.parametrize("folder", ["masks", ""])
def test_json_beside_masks_is_no_mask(tmp_path, folder):
    Coco(tmp_path).image(1, folder="images").image(2, folder="images").write()
    (tmp_path / "masks").mkdir()
    for key in (1, 2):
        Image.new("L", (WIDTH, HEIGHT), key).save(tmp_path / f"masks/{key}.png")
    (tmp_path / "annotations.json").rename(tmp_path / folder / "x.json")
    layout = detect_layout(config(tmp_path))
    assert layout.problems == []
    assert {pair.mask.suffix for pairs in layout.splits.values() for pair in pairs} == {".png"}


def test_json_in_utf_16_and_with_a_mark(tmp_path):
    path = Coco(tmp_path).image(0, (1, [box(0, 0, 9, 9)])).image(1).write()
    text = path.read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert labels_of(tmp_path)[0].labels.names == ("background", "cat", "dog", "road")


def test_polygons_and_masks_are_not_chosen_for_the_user(tmp_path):
    cvat(tmp_path)
    (tmp_path / "masks").mkdir()
    for key in range(6):
        Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / f"masks/{key}.png")
    path = tmp_path / "annotations/instances_default.json"
    message = error_of(tmp_path)
    assert f"--config.data.root={path}\nor the masks with\n" in message
    assert "mask_pattern=" in message
    assert labels_of(path)[0].labels.names == ("background", "cat", "dog")


def test_masks_of_two_kinds_are_named(tmp_path):
    labelme_set(tmp_path, "images", "masks")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "masks/3.png")
    (tmp_path / "masks/3.json").unlink()
    (tmp_path / "pairs.csv").write_text(
        "image,mask\n"
        + "".join(f"images/{n}.jpg,masks/{n}.{'png' if n == 3 else 'json'}\n" for n in range(6))
    )
    message = error_of(tmp_path / "pairs.csv")
    assert "3.png" in message
    assert ".json" in message
    assert "must be of one kind" in message


def test_unknown_names_are_near_others(tmp_path):
    cvat(tmp_path / "coco")
    (tmp_path / "coco/classes.txt").write_text("background\ncat\ndgo\n")
    assert "classes.txt: no categories are 'dgo' (did you mean 'dog'?)" in error_of(
        tmp_path / "coco"
    )
    (tmp_path / "coco/classes.txt").write_text("background\nzebra\n")
    assert "names none of cat, dog, the classes in" in error_of(tmp_path / "coco")
    labelme_set(tmp_path / "labelme", labels=("dog", "dgo"))
    (tmp_path / "labelme/classes.txt").write_text("background\ncat\ndog\n")
    found, _ = findings_of(tmp_path / "labelme")
    assert found["shapes"].count == 3
    assert found["shapes"].level == "error"
    assert "1.json: shape 1 has the label 'dgo', which the file" in found["shapes"].examples[0]
    assert "(did you mean 'dog'?)" in found["shapes"].examples[0]


@pytest.mark.parametrize("setting", [{"masks_hold": "colors"}, {"threshold": 128}])
def test_settings_of_pixels_are_refused(tmp_path, setting):
    cvat(tmp_path)
    assert "masks_hold and threshold are for images, not polygons" in error_of(tmp_path, **setting)


def test_the_check_names_shapes_and_overlaps(tmp_path):
    coco = Coco(tmp_path, ("cat", "dog"))
    for key in range(6):
        coco.image(key, (1, [box(0, 0, 30, 30)]), (2, [box(10, 10, 14, 15)]), (2, [[1, 2, 3, 4]]))
    coco.write()
    found, report = findings_of(tmp_path)
    assert report.errors == []
    assert found["not drawn"].count == 6
    assert found["not drawn"].level == "warning"
    assert "has no pixel in the image" in found["not drawn"].examples[0]
    assert found["overlaps"].count == 6
    assert found["overlaps"].level == "advice"
    assert found["overlaps"].examples[0].startswith(f"{tmp_path}/annotations.json/")
    assert ": 20 pixels of " in found["overlaps"].examples[0]
    dog = next(one for one in report.classes if one.name == "dog")
    assert sum(dog.pixels.values()) == 6 * 20


def test_pycocotools_is_asked_for(tmp_path, monkeypatch):
    cvat(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pycocotools" else find_spec(name)
    )
    assert "pip install 'deeplab-jax[coco]'" in error_of(tmp_path)


def test_ignore_label_is_the_id_of_a_class_that_does_not_count(tmp_path):
    labelme_set(tmp_path)
    settings = dataclasses.replace(config(tmp_path), ignore_label=1)
    dataset = data.load(settings, "train")
    for index in range(len(dataset.source)):
        example = read_example(dataset, index)
        is_cat = int(example["name"]) % 2
        assert set(np.unique(example["label"])) == ({0, 255} if is_cat else {0, 2, 255})
