"""Pairs and splits of each layout of a user's folder, and errors for incomplete pairs."""

import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import tiny
from deeplab_jax import data
from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.data.datasets.splits import split_by_hash
from deeplab_jax.training.train import set_up
from deeplab_jax.training.workdir import Workdir
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


HASHES = st.lists(st.text("abc012/", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@hypothesis.given(HASHES, st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.99, 1.0]), st.integers(0, 3))
def test_both_splits_have_images_and_only_a_single_one_moves(names, fraction, seed):
    config = FolderConfig(val_fraction=fraction, seed=seed)

    def split(names):
        paths = [pathlib.Path(name) for name in names]
        pairs = [Pair(*pair) for pair in zip(names, paths, paths, paths, strict=True)]
        return {
            key: {pair.name for pair in found}
            for key, found in split_by_hash(pairs, config).items()
        }

    before = {"train": set[str](), "val": set[str]()}
    for number in range(1, len(names) + 1):
        after = split(names[:number])
        assert after["train"] | after["val"] == set(names[:number])
        assert not after["train"] & after["val"]
        if fraction in (0, 1):
            assert not after["val" if fraction == 0 else "train"]
        elif number > 1:
            assert after["train"]
            assert after["val"]
            for one, other in (("train", "val"), ("val", "train")):
                moved = before[one] & after[other]
                # Only the single one of its split, whose place the new image takes.
                assert not moved or number == 2 or (moved == before[one] and len(moved) == 1)
                assert not moved or number == 2 or after[one] == {names[number - 1]}
        before = after


def test_a_small_set_has_an_image_in_val(maker):
    for index in range(11):
        maker.pair(f"{index}", shape=(2, 3))
    for seed in range(8):  # without a least number, that of seed 1 would be 0
        train, val = split_names(maker, seed=seed)
        assert len(train) + len(val) == 11
        assert train
        assert val


def split_names(maker, **folder):
    splits = detect_layout(maker.config(**folder)).splits
    return [[pair.name for pair in splits[split]] for split in ("train", "val")]


def test_a_csv(maker):
    for name in "abc":
        maker.pair(name)
    rows = ["images/a.png, masks/a.png, Train", "images/c.png, masks/c.png, valid"]
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
    maker.expect(maker.load(mask_name="{name}_mask"), ["a1", "a2"])
    found = maker.load(val_fraction=0.0)
    maker.expect(found, ["a1", "a2"])
    masks = "masks/{split}/{name}_mask.png"
    assert found.notes[0].startswith(f"found: images images/{{split}}/{{name}}.png, masks {masks}")
    settings = {"image_pattern": "images/{split}/{name}.*", "mask_pattern": masks}
    maker.expect(maker.load(val_fraction=0.0, **settings), ["a1", "a2"])


def test_two_files_of_one_name(maker):
    maker.pair("a", folder="train")
    maker.save(maker.root / "images/train/a.bmp", np.zeros((7, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png and .*a\.bmp have the same name"):
        maker.load()


def test_of_two_masks_the_suffix_of_most_is_advised(maker):
    for name in ("a", "b", "c"):
        maker.pair(name)
    maker.save(maker.root / "masks/a.bmp", np.zeros((7, 9), np.uint8))
    with pytest.raises(UserError, match=r"a\.bmp have the same .*mask_pattern='masks/{name}\.png'"):
        maker.load()
    patterns = {"image_pattern": "images/{name}.*", "mask_pattern": "masks/{name}.png"}
    maker.text("classes.txt", "a", "b", "c")
    assert maker.load(**patterns).source


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
        (["image,mask,split", "images/a.png,masks/a.png,vall"], "line 2 has split 'vall'"),
        (["image,mask", "images/a.png"], "line 2 names no mask"),
        (
            ["image,mask", *["images/a.png,masks/a.png"] * 2],
            "line 3 names the image images/a.png of line 2 again",
        ),
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
    with pytest.raises(UserError, match=r"has no folder images and no folder masks.* It holds cla"):
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


def test_test_images_without_masks_are_left_out(maker):
    for name, folder in {"a": "train", "b": "val", "c": "test"}.items():
        maker.pair(name, folder=folder)
    mask = maker.root / "masks/test/c.png"
    mask.unlink()
    layout = detect_layout(maker.config())
    assert (list(layout.splits), layout.problems) == (["train", "val"], [])
    assert layout.notes == ["test: no image has a mask, so it is left out"]
    mask.parent.rmdir()
    layout = detect_layout(maker.config())
    assert (list(layout.splits), layout.problems) == (["train", "val"], [])
    assert layout.notes == ["test: no image has a mask, so it is left out"]
    maker.text("train.txt", "train/a")
    (maker.root / "masks/val/b.png").unlink()
    (problem,) = detect_layout(maker.config()).problems
    assert f"none of its 1 images has a mask, such as {maker.root}/masks/val/b.*" in problem


def test_only_train_says_how_to_take_a_part_of_it(maker):
    for name in "abcdef":
        maker.pair(name, folder="Training")
    with pytest.raises(UserError, match="no images of split val") as error:
        maker.load("val")
    image, mask = re.findall(r"_pattern='([^']*)'", str(error.value))
    assert (image, mask) == ("images/Training/{name}.*", "masks/Training/{name}.*")
    patterns = {"image_pattern": image, "mask_pattern": mask}
    sizes = [len(maker.load(split, **patterns).source) for split in ("train", "val")]
    assert sum(sizes) == 6
    assert min(sizes) > 0


def test_training_says_once_what_was_found(maker, tmp_path, capfd):
    for name in "abcdef":
        maker.pair(name, mask_name="{name}_mask", shape=(20, 40))
    config = tiny.get_config()
    config.data = maker.config()
    config.data.split, config.data.num_workers, config.data.crop_size = "train", 0, (33,)
    config.train.batch_size = 2
    set_up(config, Workdir(tmp_path / "run"), tmp_path / "run")
    found = "data: found: images images/{name}.png, masks masks/{name}_mask.png ("
    assert capfd.readouterr().err.count(found) == 1


def test_an_image_is_the_mask_rather_than_other_files_beside_it(maker):
    maker.pair("a", folder="train")
    for suffix in (".json", ".mat", ".npz"):
        maker.text(f"masks/train/a{suffix}", "{}")
    layout = detect_layout(maker.config())
    assert layout.problems == []
    assert [pair.mask.name for pair in layout.splits["train"]] == ["a.png"]
    assert sorted(path.suffix for path in layout.skipped) == [".json", ".mat", ".npz"]


def test_the_error_for_an_absent_split_lists_the_splits(flat):
    with pytest.raises(UserError, match=r"no images of split val; it has train \(2\).*val\.txt"):
        flat.load("val")
    (flat.root / "train.txt").unlink()
    with pytest.raises(UserError, match=r"no images of split train.*val_fraction"):
        flat.load("train", val_fraction=1.0)
    with pytest.raises(UserError, match=r"must be one of train, val, test, trainval"):
        flat.load("trainn")
