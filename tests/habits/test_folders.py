"""Folders as people have them: hidden files, links, names of any bytes, and earlier outputs."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import labels
from deeplab_jax.data.datasets import cityscapes, raw, records
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.data.io.masks import write_ids
from deeplab_jax.data.statistics import summarize_sample
from deeplab_jax.data_check.check import check
from deeplab_jax.inference import files
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import find_files, is_own_picture, write_png
from own_data import Maker

JUNK = (
    *(".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png/thumb.png", "__MACOSX/a.png", "._a.png"),
    *(".Trash/a.png", ".Trash-1000/files/a.png", "$RECYCLE.BIN/a.png", "#recycle/a.png"),
    *(".thumbnails/a.png", "lost+found/a.png", "Thumbs.db", ".DS_Store", "sub/@eaDir/a.png"),
    *("System Volume Information/a.png", "sub/._b.png", ".@__thumb/a.png"),
)


def write(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, 50, 200)).save(path, "PNG")


@pytest.fixture
def maker(tmp_path):
    result = Maker(tmp_path / "data")
    for index in range(8):
        result.pair(f"{index}")
    result.text("classes.txt", "sky", "traffic light", "car")
    return result


def names_of(maker, **settings):
    layout = detect_layout(maker.config(**settings))
    assert layout.problems == []
    return {pair.name for pairs in layout.splits.values() for pair in pairs}


@pytest.mark.parametrize("name", JUNK)
def test_hidden_files_are_no_images(maker, name):
    for folder in ("images", "masks"):
        write(maker.root / folder / name)
    assert names_of(maker) == set("01234567")
    report, _, _ = check(maker.config())
    assert sum(split.images for split in report.splits.values()) == 8
    assert not any(finding.kind == "other files" for finding in report.findings)
    root = maker.root / "images"
    for argument in (
        root,
        root / "*",
        root / "**",
        root / "**/*.png",
        root / "*/*.png",
        root / "*/*/*",
    ):
        try:
            found, _ = files.find_images([str(argument)], pathlib.Path("out"))
        except UserError as error:
            assert "no file matches" in str(error)  # noqa: PT017
            found = {}
        assert {path.name for path in found} <= {f"{index}.png" for index in range(8)}
    assert list(files.find_images([str(root / name)], root)[0]) == [root / name]  # named


def test_hidden_files_are_no_images_of_cityscapes(tmp_path):
    for name in ("ulm/u_0", "ulm/._u_0", "@eaDir/x", ".cache/y"):
        write(tmp_path / f"leftImg8bit/train/{name}_leftImg8bit.png")
    for name in ("ulm/u_0", "__MACOSX/z"):
        write(tmp_path / f"gtFine/train/{name}_gtFine_labelIds.png")
    pairs = raw._match_files(cityscapes._CITYSCAPES, tmp_path, "train")
    assert [pair.name for pair in pairs] == ["u_0"]


def test_linked_folders_are_followed_once(maker, tmp_path):
    for folder in ("images", "masks"):
        write(tmp_path / "disk" / folder / "x.png")
        root = maker.root / folder
        (root / "part").symlink_to(tmp_path / "disk" / folder)
        (root / "again").symlink_to(root / "part")
        (root / "loop").symlink_to(root)
        (root / "up").symlink_to("../..")
        (tmp_path / "disk" / folder / "back").symlink_to(root)
    # Of two links to one folder, the first in the order of names counts.
    assert names_of(maker) == {*"01234567", "again/x"}
    images = maker.root / "images"
    for argument in (images, images / "**", images / "**/*.png"):
        found, _ = files.find_images([str(argument)], tmp_path)
        assert sorted(path.name for path in found) == [*(f"{i}.png" for i in range(8)), "x.png"]
    found, _ = files.find_images([str(images / "part"), str(images / "again/x.png")], tmp_path)
    assert [path for path in found if path.name == "x.png"] == [images / "part/x.png"]


def test_folders_may_share_their_masks(maker):
    """As before and after a change of the images' brightness."""
    for folder in ("images", "masks"):
        write(maker.root / folder / "dark/x.png")
    write(maker.root / "images/bright/x.png")
    (maker.root / "masks/bright").symlink_to("dark")
    assert names_of(maker) == {*"01234567", "dark/x", "bright/x"}


def test_masks_may_be_linked_otherwise(maker, tmp_path):
    for folder, links in {"images": "pq", "masks": "q"}.items():
        write(tmp_path / "disk" / folder / "x.png")
        for link in links:
            (maker.root / folder / link).symlink_to(tmp_path / "disk" / folder)
    (maker.root / "masks/p").symlink_to("q")
    assert names_of(maker) == {*"01234567", "p/x"}


def test_a_folder_is_found_without_links_if_it_can(tmp_path):
    write(tmp_path / "z/x.png")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/z").symlink_to(tmp_path / "z")
    assert find_files(tmp_path) == [tmp_path / "z/x.png"]


def test_linked_folders_of_cityscapes(tmp_path):
    write(tmp_path / "disk/ulm/u_0_leftImg8bit.png")
    write(tmp_path / "gtFine/train/ulm/u_0_gtFine_labelIds.png")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    (tmp_path / "leftImg8bit/train/ulm").symlink_to(tmp_path / "disk/ulm")
    pairs = raw._match_files(cityscapes._CITYSCAPES, tmp_path, "train")
    assert [pair.name for pair in pairs] == ["u_0"]


def test_files_have_the_order_of_a_walk(tmp_path):
    for name in ("b.png", "a/z.png", "a b/y.png", "a/c/x.png", "a.png", "B/w.png"):
        write(tmp_path / name)
    expected = []
    for parent, folders, names in os.walk(tmp_path):
        folders.sort()
        expected += [pathlib.Path(parent, name) for name in sorted(names)]
    assert find_files(tmp_path) == expected


def test_a_folder_that_cannot_be_read_is_an_error(maker, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (maker.root / "images/closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"closed: the folder cannot be read \(Permission denied"):
        names_of(maker)


def test_a_link_to_nothing_is_not_passed_over(maker, tmp_path):
    (maker.root / "images/3.png").unlink()
    (maker.root / "images/3.png").symlink_to(tmp_path / "unmounted.png")
    (maker.root / "images/more").symlink_to(tmp_path / "unmounted")
    report, _, _ = check(maker.config())
    kinds = {finding.kind: finding.examples[0] for finding in report.findings}
    assert "3.png" in kinds["unreadable"]
    assert "more" in kinds["other files"]
    assert (
        maker.root / "images/3.png" in files.find_images([str(maker.root / "images")], tmp_path)[0]
    )


BYTES = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_are_split_and_checked(maker):
    maker.pair(BYTES)
    assert names_of(maker) == {*"01234567", BYTES}
    report, _, _ = check(maker.config())
    assert report.errors == []
    rows = [f"images/{name}.png,masks/{name}.png" for name in sorted(names_of(maker))]
    (maker.root / "pairs.csv").write_bytes(os.fsencode("\n".join(["image,mask", *rows])))
    (maker.root / "train.txt").write_bytes(os.fsencode(f"{BYTES}\n1\n"))
    (maker.root / "val.txt").write_text("2\n")
    maker.expect(maker.load("train"), [BYTES, "1"])
    summarize_sample(maker.load("train"), None)  # hashes names
    records.fingerprint([(BYTES, maker.root / f"images/{BYTES}.png")])
    maker.root = maker.root / "pairs.csv"
    assert len(names_of(maker)) == 9


def test_own_pictures_are_not_images(tmp_path):
    photos = tmp_path / "photos"
    ids = np.zeros((5, 6), np.uint8)
    write(photos / "x.png")
    write(photos / "x_ids.png")  # by somebody else
    write_png(photos / "x_overlay.png", np.zeros((5, 6, 3), np.uint8))
    write_png(photos / "sheet.png", np.zeros((5, 6, 3), np.uint8))
    write_ids(photos / "y_ids.png", ids, labels.VOC)
    for argument in (photos, photos / "*.png", photos / "**"):
        found, num_own = files.find_images([str(argument)], tmp_path / "elsewhere")
        assert sorted(path.name for path in found) == ["x.png", "x_ids.png"]
        assert num_own == 3
    found, num_own = files.find_images([str(photos / "y_ids.png")], tmp_path)
    assert [path.name for path in found] == ["y_ids.png"]  # as it is named
    assert num_own == 0
    (tmp_path / "only").mkdir()
    write_ids(tmp_path / "only/a.png", ids, labels.VOC)
    with pytest.raises(UserError, match=r"no image files but what deeplab-jax wrote \(1\)"):
        files.find_images([str(tmp_path / "only")], tmp_path)


def test_an_own_picture_can_be_decoded(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as read:
        read.load()
        assert read.text == {"Software": "deeplab_jax"}
        np.testing.assert_array_equal(np.asarray(read), image)
    assert is_own_picture(tmp_path / "a.png")
    write(tmp_path / "b.png")
    assert not is_own_picture(tmp_path / "b.png")
    assert not is_own_picture(tmp_path / "absent.png")


def test_no_output_replaces_an_image(tmp_path):
    """`cat_ids.png` is what prediction of `cat.png` would write."""
    for name in ("cat.png", "cat_ids.png", "dog.png"):
        write(tmp_path / name)
    found, _ = files.find_images([str(tmp_path)], tmp_path)
    assert [str(name) for name in found.values()] == ["cat_png", "cat_ids", "dog"]
    found, _ = files.find_images([str(tmp_path)], tmp_path / "out")
    assert [str(name) for name in found.values()] == ["cat", "cat_ids", "dog"]


def test_outputs_differ_where_case_does_not_count(tmp_path):
    write(tmp_path / "a/X.png")
    write(tmp_path / "b/x.png")
    found, _ = files.find_images([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path)
    assert len({str(name).casefold() for name in found.values()}) == 2


def test_a_link_to_itself_is_one_unreadable_file(maker, tmp_path):
    (maker.root / "images/3.png").unlink()
    (maker.root / "images/3.png").symlink_to("3.png")
    report, _, _ = check(maker.config())
    (finding,) = [finding for finding in report.findings if finding.kind == "unreadable"]
    assert finding.count == 1
    found, _ = files.find_images([str(maker.root / "images")], tmp_path)
    assert maker.root / "images/3.png" in found


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("training", "validation"), ("train", "valid")]
)
def test_splits_have_other_names(maker, train, val):
    for folder in ("images", "masks"):
        for split in (train, val):
            write(maker.root / folder / split / f"{split}.png")
    layout = detect_layout(maker.config())
    names = {split: [pair.name for pair in pairs] for split, pairs in layout.splits.items()}
    assert (names, layout.problems) == ({"train": [train], "val": [val]}, [])


def test_a_split_has_one_name(maker):
    for folder in ("images", "masks"):
        for split in ("train", "Training", "val"):
            write(maker.root / folder / split / "x.png")
    problems = detect_layout(maker.config()).problems
    folders = [
        [str(maker.root / kind / name) for name in ("Training", "train")]
        for kind in ("images", "masks")
    ]
    assert [
        f"{' and '.join(two)} both mean train. Merge them, or rename one" for two in folders
    ] == problems


def test_images_beside_the_folders_of_splits_are_reported(maker):
    for folder in ("images", "masks"):
        for name in ("train/x.png", "val/y.png", "more/z.png", ".cache/z.png"):
            write(maker.root / folder / name)
    layout = detect_layout(maker.config())
    assert layout.problems == []
    names = [path.name for path in layout.skipped]
    assert names == [*(f"{index}.png" for index in range(8)), "z.png"] * 2


def test_pipes_are_no_files(tmp_path):
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert find_files(tmp_path) == [tmp_path / "a.png"]
