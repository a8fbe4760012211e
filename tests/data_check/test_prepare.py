"""`data prepare`: the written set is plain, and gives the same examples."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.io import images
from deeplab_jax.data_check import check, prepare
from deeplab_jax.utils.errors import UserError
from own_data import COLORS, NAMES, Maker


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "data")


def prepared(config, out, **settings):
    """Prepares a set without errors; the numbers of links and copies, and the new set's config."""
    report, scans, mask_format = check.check(config)
    assert report.errors == []
    ways = prepare.write(out, scans, mask_format, **settings)
    return ways, DataConfig(name="folder", root=str(out))


def assert_same_examples(ours, theirs, splits=("train", "val")):
    for split in splits:
        one, two = data.load(ours, split), data.load(theirs, split)
        assert one.labels == two.labels
        assert len(one.source) == len(two.source) > 0
        found = []
        for dataset in (one, two):  # in another order, where lists gave one
            examples = [read_example(dataset, index) for index in range(len(dataset.source))]
            found.append({each["image"].tobytes(): each["label"] for each in examples})
        assert found[0].keys() == found[1].keys()
        assert len(found[0]) == len(one.source)
        for image, label in found[0].items():
            np.testing.assert_array_equal(found[1][image], label)


def assert_plain(out):
    report, _, _ = check.check(DataConfig(name="folder", root=str(out)))
    assert report.errors == []
    assert report.layout == "folders"
    assert {path.name for path in out.iterdir()} == {"images", "masks", "classes.txt"}
    for path in (out / "masks").rglob("*.png"):
        mask = Image.open(path)
        assert mask.mode == "P"  # 8 bits


@pytest.mark.parametrize(
    ("encoding", "copy"), [("ids", True), ("palette", False), ("colors", False)]
)
def test_the_written_set_gives_the_same_examples(maker, tmp_path, encoding, copy):
    colored = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(NAMES, COLORS, strict=True)]
    maker.text("classes.txt", *(colored if encoding == "colors" else NAMES))
    for split, names in (("train", "abc"), ("val", "de"), ("test", "f")):
        for name in names:
            maker.pair(name, folder=split, encoding=encoding, mask_name="{name}_mask")
    config = maker.config(
        mask_name="{name}_mask", masks_hold="colors" if encoding == "colors" else "ids"
    )
    ways, plain = prepared(config, tmp_path / "out", copy=copy)
    assert ways == {"copy" if copy else "hard link": 6}
    assert_same_examples(config, plain, ("train", "val", "test"))
    assert_plain(tmp_path / "out")
    image = tmp_path / "out/images/train/a.png"
    assert os.path.samefile(image, maker.root / "images/train/a.png") != copy
    if encoding == "colors":
        lines = ["sky 0 #0a141e", "traffic light 1 #faaa1e", "car 2 #400080", "ignore 255"]
        assert (tmp_path / "out/classes.txt").read_text().splitlines() == lines
        assert Image.open(tmp_path / "out/masks/val/d.png").getpalette()[:9] == [*sum(COLORS, ())]


def test_an_ignore_label_becomes_255_and_its_class_goes(maker, tmp_path):
    maker.text("classes.txt", *NAMES, "void")
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            maker.pair(name, folder=split, ignore=3)
    config = maker.config(ignore_label=3, masks_hold="ids")
    _, plain = prepared(config, tmp_path / "out")
    assert_same_examples(config, plain)
    assert_plain(tmp_path / "out")
    assert 255 in np.array(Image.open(tmp_path / "out/masks/train/a.png"))


def test_splits_of_lists_and_of_the_fraction_become_folders(maker, tmp_path):
    maker.text("classes.txt", *NAMES)
    for name in ("sub/a", "sub/b", "c", "d", "e.x", "f"):
        folder, _, stem = name.rpartition("/")
        maker.pair(stem, folder=folder)
    for kind in ("fraction", "lists"):
        if kind == "lists":
            maker.text("train.txt", "sub/a", "d", "e.x")
            maker.text("val.txt", "c", "f")
        config = maker.config(masks_hold="ids", val_fraction=0.5)
        _, plain = prepared(config, tmp_path / kind)
        assert_same_examples(config, plain)
    assert_plain(tmp_path / "lists")
    written = sorted((tmp_path / "lists/images").rglob("*.png"))
    names = [path.relative_to(tmp_path / "lists/images").as_posix() for path in written]
    assert names == ["train/d.png", "train/e.x.png", "train/sub/a.png", "val/c.png", "val/f.png"]


def test_paths_of_a_table_stay_below_the_new_folder(maker, tmp_path):
    """Absolute paths, paths upwards, and hidden folders, which readers of folders skip."""
    maker.text("classes.txt", *NAMES)
    for name in "abcd":
        maker.pair(name)
    hidden = maker.root / ".cache"
    hidden.mkdir()
    (maker.root / "images/b.png").rename(hidden / "b.png")
    maker.text(
        "table.csv",
        "image,mask,split",
        f"{maker.root}/images/a.png,masks/a.png,train",
        ".cache/b.png,masks/b.png,train",
        f"../{maker.root.name}/images/c.png,masks/c.png,val",
        "images/d.png,masks/d.png,val",
    )
    config = DataConfig(name="folder", root=str(maker.root / "table.csv"))
    config.folder.masks_hold = "ids"
    _, plain = prepared(config, tmp_path / "out")
    assert_same_examples(config, plain)
    assert_plain(tmp_path / "out")
    assert (tmp_path / "out/images/train/_.cache/b.png").is_file()
    assert (tmp_path / f"out/images/val/_../{maker.root.name}/images/c.png").is_file()


def test_links_of_the_source_are_resolved_and_other_file_systems_get_links(
    maker, tmp_path, monkeypatch
):
    maker.text("classes.txt", *NAMES)
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            maker.pair(name, folder=split)
    image = maker.root / "images/train/a.png"
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to("../../../elsewhere.png")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    config = maker.config(masks_hold="ids")
    ways, plain = prepared(config, tmp_path / "out")
    assert ways == {"symbolic link": 5}
    assert_same_examples(config, plain)
    target = tmp_path / "out/images/train/a.png"
    assert os.readlink(target) == str(tmp_path / "elsewhere.png")


def test_nothing_stays_of_a_set_that_fails(maker, tmp_path, monkeypatch):
    maker.text("classes.txt", *NAMES)
    for name in "abcd":
        maker.pair(name)
    config = maker.config(masks_hold="ids")
    _, scans, mask_format = check.check(config)
    scans[-1].pair.mask.write_bytes(b"")  # after the check
    with pytest.raises(UserError, match="is empty"):
        prepare.write(tmp_path / "new/out", scans, mask_format)
    assert list((tmp_path / "new").iterdir()) == []


def test_names_that_become_equal_are_an_error(maker, tmp_path):
    maker.text("classes.txt", *NAMES)
    for folder in (".x", "_.x"):
        maker.pair("a", folder=folder)
    maker.text(
        "table.csv",
        "image,mask,split",
        "images/.x/a.png,masks/.x/a.png,train",
        "images/_.x/a.png,masks/_.x/a.png,train",
    )
    config = DataConfig(name="folder", root=str(maker.root / "table.csv"))
    config.folder.masks_hold = "ids"
    _, scans, mask_format = check.check(config)
    with pytest.raises(UserError, match="another image gets the same name"):
        prepare.write(tmp_path / "out", scans, mask_format)


def test_the_new_folder_must_be_new_and_elsewhere(maker, tmp_path):
    maker.text("classes.txt", *NAMES)
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare.require_new_folder(str(empty), str(maker.root))
    (empty / "x").touch()
    for out, message in (
        (empty, "exists already"),
        (empty / "x", "exists already"),
        (maker.root / "clean", "is in .*data, which would then hold two"),
        ("/proc/none/out", "^/proc/none/out: /proc cannot be written to"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.require_new_folder(str(out), str(maker.root))


def test_an_image_with_a_foreign_suffix_is_found_again(maker, tmp_path):
    maker.text("classes.txt", *NAMES)
    for name in "ab":
        maker.pair(name)
    (maker.root / "images/a.png").rename(maker.root / "images/a.dat")
    maker.text(
        "table.csv",
        "image,mask,split",
        "images/a.dat,masks/a.png,train",
        "images/b.png,masks/b.png,val",
    )
    config = DataConfig(name="folder", root=str(maker.root / "table.csv"))
    config.folder.masks_hold = "ids"
    assert ".dat" not in images.SUFFIXES
    _, plain = prepared(config, tmp_path / "out")
    assert_same_examples(config, plain)


def test_names_that_a_text_cannot_hold_go_to_json(maker, tmp_path):
    names = ("wall", "earth, ground: brown", "a = 7")
    maker.root.mkdir()
    (maker.root / "classes.json").write_text(json.dumps(names))
    for name in "abcd":
        maker.pair(name)
    config = maker.config(masks_hold="ids", val_fraction=0.5)
    _, plain = prepared(config, tmp_path / "out")
    assert data.load(plain, "train").labels.names == names
    assert_same_examples(config, plain)
    assert not (tmp_path / "out/classes.txt").exists()


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_polygons_become_masks(tmp_path, kind):
    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    squares = [(label, box) for label in ("cat", "dog") for box in ((2, 3, 20, 22), (9, 8, 30, 24))]
    table: dict = {"images": [], "annotations": [], "categories": []}
    table["categories"] = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    for index in range(6):
        name = f"x{index}.png"
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(root / name)
        label, (left, top, right, bottom) = squares[index % 4]
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        if kind == "labelme":
            shape = {"label": label, "points": corners, "shape_type": "polygon"}
            size = {"imageHeight": 32, "imageWidth": 40, "imagePath": name, "shapes": [shape]}
            (root / f"x{index}.json").write_text(json.dumps(size))
        table["images"].append({"id": index, "file_name": name, "height": 32, "width": 40})
        table["annotations"].append(
            {
                "id": index,
                "image_id": index,
                "category_id": {"dog": 7, "cat": 3}[label],
                "segmentation": [[float(x) for corner in corners for x in corner]],
                "iscrowd": 0,
            }
        )
    if kind == "coco":
        (root / "annotations.json").write_text(json.dumps(table))
    config = DataConfig(name="folder", root=str(root))
    config.folder.val_fraction = 0.4
    _, plain = prepared(config, tmp_path / "out")
    assert data.load(plain, "train").labels.names == ("background", "cat", "dog")
    assert_same_examples(config, plain)
    assert_plain(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jpeg", "many to one", "sparse", "only background and void"])
def test_values_become_ids(maker, tmp_path, kind):
    classes = {
        "jpeg": ("road 0-127", "crack 128-255"),
        "many to one": ("road 0", "crack 3 4 255", "ignore 9"),
        "sparse": ("sky 7 30-40", "car 24", "person 26", "ignore 255"),
        "only background and void": ("sky 0", "car 1", "ignore 255"),
    }[kind]
    values = {"jpeg": (0, 255), "many to one": (0, 3, 4, 255, 9), "sparse": (7, 33, 24, 26, 255)}
    maker.text("classes.txt", *classes)
    for name in "abcdefgh":
        maker.pair(name, shape=(32, 48))
        held = values.get(kind, (0, 255) if name != "a" else (0, 1, 255))
        mask = np.repeat(np.repeat(maker.rng.choice(held, (4, 6)), 8, 0), 8, 1).astype(np.uint8)
        path = maker.root / f"masks/{name}.png"
        maker.save(path, mask)
        if kind == "jpeg":
            Image.open(path).save(path.with_suffix(".jpg"), quality=80)
            path.unlink()
    config = maker.config(val_fraction=0.4)
    _, plain = prepared(config, tmp_path / "out")
    assert_same_examples(config, plain)
    assert_plain(tmp_path / "out")


@pytest.mark.parametrize("pattern", ["{split}/{name}_mask.png", "{split}/masks/{name}.png"])
def test_patterns_become_plain_folders(maker, tmp_path, pattern):
    maker.text("classes.txt", *NAMES)
    for split, names in (("Training", "abc"), ("valid", "de")):
        for name in names:
            maker.pair(name)
            for kind, target in (("images", "{split}/{name}.png"), ("masks", pattern)):
                if "masks/" in pattern and kind == "images":
                    target = "{split}/images/{name}.png"
                path = maker.root / target.format(split=split, name=name)
                path.parent.mkdir(parents=True, exist_ok=True)
                (maker.root / f"{kind}/{name}.png").rename(path)
    for kind in ("images", "masks"):
        (maker.root / kind).rmdir()
    _, plain = prepared(maker.config(), tmp_path / "out")
    assert_same_examples(maker.config(), plain)
    assert_plain(tmp_path / "out")
