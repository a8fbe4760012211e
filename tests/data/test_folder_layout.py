"""Pairs and splits of each layout of a user's folder, and errors for incomplete pairs."""

import re

import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.config import DataConfig
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.utils.errors import UserError


def test_folders_of_splits(maker):
    for name in "dcb":
        maker.pair(name, folder="train")
    maker.pair("a", folder="val")
    maker.pair("e", folder="test")
    maker.expect(maker.load("train"), "bcd")
    maker.expect(maker.load("val"), "a")
    maker.expect(maker.load("test"), "e")
    maker.expect(maker.load("trainval"), "bcda")


def test_folders_may_be_nested(maker):
    maker.pair("a", folder="train/town/1", mask_name="gt-{name}")
    maker.pair("b", folder="train/town/2", mask_name="gt-{name}")
    maker.expect(maker.load(mask_name="gt-{name}"), ["town/1/a", "town/2/b"])


def test_lists_keep_their_order_and_skip_unlisted_images(maker):
    for name in "abcde":
        maker.pair(name)
    (maker.root / "masks" / "e.png").unlink()
    maker.text("train.txt", "c", "", "# the rest", "a.png")
    maker.text("val.txt", "\ufeffd")
    maker.expect(maker.load("train"), "ca")
    maker.expect(maker.load("val"), "d")


def test_a_fraction_is_val_and_adding_images_moves_none(maker):
    names = [f"{index:03d}" for index in range(200)]
    for name in names:
        maker.pair(name, shape=(2, 3))
    train, val = split_names(maker)
    assert sorted(train + val) == names
    assert 20 <= len(val) <= 60  # 40, with a deviation of 5.7
    assert split_names(maker, seed=1)[1] != val
    assert split_names(maker, val_fraction=0.5)[1] != val
    # A larger fraction only adds.
    assert set(val) < set(split_names(maker, val_fraction=0.5)[1])
    for index in range(500, 520):
        maker.pair(f"{index}", shape=(2, 3))
    assert set(split_names(maker)[0]) >= set(train)
    assert set(split_names(maker)[1]) >= set(val)


def split_names(maker, **folder):
    splits = detect_layout(maker.config(**folder)).splits
    return [[pair.name for pair in splits[split]] for split in ("train", "val")]


def test_a_csv(maker):
    for name in "abc":
        maker.pair(name)
    rows = ["images/a.png, masks/a.png, train", "images/c.png, masks/c.png, val"]
    maker.text("pairs.csv", "image, mask, split", *rows, "images/b.png, masks/b.png, train", "")
    maker.root = maker.root / "pairs.csv"
    maker.expect(maker.load("train"), ["images/a", "images/b"])
    maker.expect(maker.load("trainval"), ["images/a", "images/b", "images/c"])
    maker.expect(maker.load("val"), ["images/c"])


def test_a_csv_without_splits_is_split(maker):
    for index in range(30):
        maker.pair(f"{index}", shape=(2, 3))
    rows = [f"{maker.root}/images/{i}.png,masks/{i}.png" for i in range(30)]
    maker.text("pairs.csv", "image,mask", *rows)
    maker.root = maker.root / "pairs.csv"
    sizes = [len(names) for names in split_names(maker)]
    assert sum(sizes) == 30
    assert min(sizes) > 0


def test_missing_pairs_are_named_both_ways_and_with_the_nearest_name(maker):
    for name in ("street_001", "street_002", "street_003", "yard"):
        maker.pair(name, folder="train")
    (maker.root / "masks/train/street_002.png").rename(maker.root / "masks/train/stret_002.png")
    with pytest.raises(UserError) as error:
        maker.load()
    message = str(error.value)
    assert "2 problems" in message
    assert re.search(
        r"images/train/street_002\.png: has no mask .*masks/train/street_002\.\* "
        r"\(did you mean 'stret_002'\?\)",
        message,
    )
    assert re.search(
        r"stret_002\.png: is the mask of no image \(did you mean 'street_002'\?\)", message
    )


def test_a_pattern_of_names_is_found(maker):
    for name in ("a1", "a2"):
        maker.pair(name, folder="train", mask_name="{name}_mask")
    with pytest.raises(UserError, match=r"Set config\.data\.folder\.mask_name=\{name\}_mask"):
        maker.load()
    maker.expect(maker.load(mask_name="{name}_mask"), ["a1", "a2"])


def test_two_files_of_one_name(maker):
    maker.pair("a", folder="train")
    maker.save(maker.root / "images/train/a.bmp", np.zeros((7, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png and .*a\.bmp have the same name"):
        maker.load()


def test_lists_must_name_existing_images_and_not_overlap(maker):
    for name in ("aaa", "bbb", "ccc"):
        maker.pair(name)
    maker.text("train.txt", "aaa", "bbb", "cccc")
    maker.text("val.txt", "bbb")
    with pytest.raises(UserError) as error:
        maker.load()
    assert re.search(r"train\.txt: names cccc, .*\(did you mean 'ccc'\?\)", str(error.value))
    assert re.search(r"val\.txt and .*train\.txt share 1 images, as bbb", str(error.value))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["img,mask", "a,b"], "must name the columns image, mask"),
        (["image,mask"], "names no image"),
        (["image,mask,split", "images/a.png,masks/a.png,valid"], "line 2 has split 'valid'"),
        (["image,mask", "images/a.png"], "line 2 names no mask"),
        (["image,mask", *["images/a.png,masks/a.png"] * 2], "lines 2 and 3 name one image"),
        (
            ["image,mask", "images/a.png,masks/aa.png"],
            r"masks/aa\.png.*\(did you mean 'a\.png'\?\)",
        ),
    ],
)
def test_mistakes_in_a_csv(maker, rows, message):
    maker.pair("a")
    maker.text("pairs.csv", *rows)
    maker.root = maker.root / "pairs.csv"
    with pytest.raises(UserError, match=rf"pairs\.csv.*{message}"):
        maker.load()


def test_an_empty_and_a_missing_root(maker, tmp_path):
    with pytest.raises(UserError, match=r"has no folder images and no folder masks\. It holds cla"):
        maker.load()
    maker.text("pairs.csv", "image,mask")
    with pytest.raises(UserError, match=r"config\.data\.root=.*pairs\.csv"):
        maker.load()
    (maker.root / "images").mkdir()
    (maker.root / "masks").mkdir()
    with pytest.raises(UserError, match="images: holds no images"):
        maker.load()
    maker.root = tmp_path / "none"
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        maker.load()
    with pytest.raises(UserError, match=r"(?s)root is empty.*images/train.*CSV"):
        data.load(DataConfig(name="folder"), "train")


def test_the_error_for_an_absent_split_lists_the_splits(flat):
    with pytest.raises(UserError, match=r"no images of split val; it has train \(2\).*val\.txt"):
        flat.load("val")
    (flat.root / "train.txt").unlink()
    with pytest.raises(UserError, match=r"no images of split train.*val_fraction"):
        flat.load("train", val_fraction=1.0)
    with pytest.raises(UserError, match=r"must be one of train, val, test, trainval"):
        flat.load("trainn")
