"""`data_check`: counts are right, and every problem is found with the setting that fixes it."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from deeplab_jax.config import DataConfig
from deeplab_jax.config import io as config_io
from deeplab_jax.data.io import images
from deeplab_jax.data_check import check, contact_sheet, duplicates, findings
from deeplab_jax.data_check.advice import advise
from deeplab_jax.utils.errors import UserError
from own_data import NAMES, Maker


@pytest.fixture
def maker(tmp_path):
    """Six pairs of train and two of val, with nothing wrong."""
    maker = Maker(tmp_path / "data")
    maker.text("classes.txt", *NAMES)
    for index in range(6):
        maker.pair(f"t{index}", folder="train", shape=(24, 32))
    for index in range(2):
        maker.pair(f"v{index}", folder="val", shape=(30, 20 + index))
    return maker


def report_of(maker, **settings):
    report, _, _ = check.check(maker.config(**settings))
    json.dumps(report.to_json())
    return report


def only(report, level):
    """The one finding of a level."""
    (found,) = report.errors if level == "error" else report.warnings
    return found


def test_a_clean_data_set_is_counted(maker):
    report = report_of(maker)
    assert report.findings == ()
    assert report.layout == "folders"
    train, val = report.splits["train"], report.splits["val"]
    assert (train.images, val.images) == (6, 2)
    assert (train.min_size, train.max_size, train.distinct_sizes) == ((32, 24), (32, 24), 1)
    assert (val.min_size, val.max_size, val.distinct_sizes) == ((20, 30), (21, 30), 2)
    for split, letter in (("train", "t"), ("val", "v")):
        labels = [label for name, label in maker.labels.items() if name[0] == letter]
        pixels = np.concatenate([label.ravel() for label in labels])
        assert report.splits[split].pixels == pixels.size
        assert report.splits[split].ignored_share == np.mean(pixels == 255)
        assert report.splits[split].unknown_share == 0
        for one in report.classes:
            assert one.pixels[split] == np.sum(pixels == one.id)
            assert one.share[split] == np.sum(pixels == one.id) / np.sum(pixels != 255)
            assert one.images[split] == len(labels)
    assert [one.name for one in report.classes] == list(NAMES)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_nothing(maker, num_threads):
    (maker.root / "images/train/t3.png").write_bytes(b"")
    report, _, _ = check.check(maker.config(), num_threads=num_threads)
    assert report == report_of(maker)


def test_unreadable_files(maker):
    cut = (maker.root / "images/train/t3.png").read_bytes()[:-30]
    (maker.root / "images/train/t3.png").write_bytes(cut)
    (maker.root / "masks/val/v1.png").write_text("no image")
    found = only(report_of(maker), "error")
    assert (found.kind, found.count) == ("unreadable", 2)
    assert "t3.png: is truncated" in found.examples[0]
    assert "v1.png: is a text file" in found.examples[1]


def test_truncated_files_are_found_where_opencv_fills_them_up(maker, monkeypatch):
    monkeypatch.setattr(images, "_decode", lambda *_: np.zeros((24, 32, 3), np.uint8))
    path = maker.root / "images/train/t3.png"
    path.write_bytes(path.read_bytes()[:-60])
    errors = {found.kind: found.examples for found in report_of(maker).errors}
    assert len(errors["unreadable"]) == 1
    assert "t3.png: is truncated" in errors["unreadable"][0]


def test_sizes_that_differ(maker):
    maker.save(maker.root / "masks/train/t3.png", np.eye(32, 24, dtype=np.uint8))
    found = only(report_of(maker), "error")
    assert (found.kind, found.count) == ("sizes differ", 1)
    assert "t3.png: is 24 x 32 pixels" in found.examples[0]


def test_missing_pairs_do_not_hide_the_rest(maker):
    (maker.root / "masks/train/t3.png").unlink()
    (maker.root / "images/train/t5.png").write_bytes(b"")
    report = report_of(maker)
    assert {found.kind for found in report.errors} == {"pairs", "unreadable"}
    assert report.splits["train"].images == 5


def test_unknown_ids_name_the_setting_that_ignores_them(maker):
    for name in ("t1", "t2"):
        label = maker.labels[name].copy()
        label[label == 255] = 11
        maker.save(maker.root / f"masks/train/{name}.png", label)
    report = report_of(maker)
    found = only(report, "error")
    assert (found.kind, found.count) == ("unknown", 2)
    assert "ignore_label=11" in found.mend
    assert report.unknown == {"id 11": 2}
    assert report.splits["train"].unknown_share == pytest.approx(2 / (6 * 24 * 32))


def test_ids_from_one(maker):
    for path in (maker.root / "masks").rglob("*.png"):
        ids = np.array(Image.open(path))
        maker.save(path, np.where(ids == 255, 255, ids + 1).astype(np.uint8))
    report = report_of(maker)
    found = only(report, "error")
    assert found.kind == "classes"
    assert "its classes do not fit the masks. The masks hold 1, 2, 3, 255" in found.examples[0]
    assert report.proposal == "sky 1\ntraffic light 2\ncar 3\nignore 255\n"
    pixels = np.concatenate([label.ravel() for label in maker.labels.values()])
    assert [sum(one.pixels.values()) for one in report.classes] == np.bincount(pixels)[:3].tolist()


def test_masks_of_another_encoding_are_named(maker):
    """Colours beside ids: all files of the smaller group; with a setting, those that it misses."""
    for name in ("t1", "t4"):
        maker.pair(name, folder="train", shape=(24, 32), encoding="colors")
    found = {one.kind: one for one in report_of(maker).errors}
    assert found.keys() == {"classes", "mixed"}
    assert [text.split(": ")[0].rpartition("/")[2] for text in found["mixed"].examples] == [
        "t1.png",
        "t4.png",
    ]
    assert (
        "t1.png: holds colours (#0a141e, #400080, #e0e0c0, #faaa1e)" in found["mixed"].examples[0]
    )
    found = only(report_of(maker, masks_hold="ids"), "error")
    assert (found.kind, found.count) == ("mixed", 2)
    assert "t4.png: holds colours, not class ids" in found.examples[1]


def test_colors_name_the_setting(maker):
    for name in maker.labels:
        folder = "train" if name[0] == "t" else "val"
        maker.pair(name, folder=folder, shape=(24, 32), encoding="colors")
    found = only(report_of(maker, masks_hold="ids"), "error")
    assert (found.kind, found.count) == ("colors", 8)
    assert "masks_hold=colors" in found.mend
    report = report_of(maker)
    assert only(report, "error").kind == "classes"
    lines = ["#0a141e", "#400080", "#e0e0c0", "#faaa1e"]
    guess, *proposed = report.proposal.splitlines()
    assert "is a guess" in guess
    assert sorted(line.split()[-1] for line in proposed) == lines
    assert [name for name in NAMES if name in report.proposal] == list(NAMES)


def rewrite(maker, function):
    """Replaces each mask by a function of its index and its ids, in which 255 is 0."""
    for index, path in enumerate(sorted((maker.root / "masks").rglob("*.png"))):
        ids = np.array(Image.open(path))
        maker.save(path, function(index, np.where(ids == 255, 0, ids)).astype(np.uint8))


def test_zero_and_one_beside_zero_and_255(maker):
    """In a few masks 255 would be ignored, although it is the second class there."""
    maker.text("classes.txt", "road", "crack")
    rewrite(maker, lambda index, ids: (ids == 1) * (255 if index == 5 else 1))
    report = report_of(maker)
    assert only(report, "error").kind in ("classes", "mixed")
    assert "t5.png" in only(report, "error").examples[0]
    assert report.proposal == "road 0\ncrack 1 255\n"
    maker.text("classes.txt", "road", "crack 1 255")
    assert report_of(maker).errors == []


def test_a_mask_that_the_samples_lack_is_refused_as_in_training(maker):
    maker.text("classes.txt", "road", "crack")
    for index in range(40):
        maker.pair(f"m{index}", folder="train", shape=(24, 32))
    rewrite(maker, lambda index, ids: (ids == 1) * (255 if index == 1 else 1))
    report, scans, mask_format = check.check(maker.config())
    found = only(report, "error")
    assert (found.kind, found.count) == ("mixed", 1)
    (path,) = (scan.pair.mask for scan in scans if scan.remarks)
    assert str(path) in found.examples[0]
    with pytest.raises(UserError, match="255 may be a class"):
        mask_format.read_label(path)
    assert report.proposal == "road 0\ncrack 1 255\n"


def test_zero_and_255_name_the_setting(maker):
    maker.text("classes.txt", "road", "crack")
    rewrite(maker, lambda _, ids: np.where(ids == 1, 255, 0))
    report = report_of(maker, masks_hold="ids")
    found = only(report, "error")
    assert found.kind == "classes"
    assert "255 is ignored" in found.examples[0]
    assert report.proposal == "road 0\ncrack 255\n"
    pixels = np.concatenate([label.ravel() for label in maker.labels.values()])
    for report in (report_of(maker), report_of(maker, masks_hold="binary")):
        assert report.findings == ()
        assert sum(report.classes[1].pixels.values()) == np.sum(pixels == 1)


def test_masks_of_255_that_are_read_as_ids_name_the_setting(maker):
    maker.text("classes.txt", "road 0", "crack 1")
    rewrite(maker, lambda _, ids: np.full_like(ids, 255))
    found = only(report_of(maker, masks_hold="ids"), "error")
    assert (found.kind, found.mend) == ("binary", "Set config.data.folder.masks_hold=binary.")


def test_a_second_value_that_is_ignored_is_an_error(maker):
    """Also if the ignored class is then no class, so that only one is left."""
    maker.text("classes.txt", "road", "crack")
    rewrite(maker, lambda _, ids: ids == 1)
    report = report_of(maker, ignore_label=1)
    assert len(report.classes) == 1
    found = only(report, "error")
    assert (found.kind, found.count) == ("one class", 8)
    assert "id 1 does not count" in found.message
    assert "config.data.ignore_label=255" in found.mend
    assert report_of(maker, ignore_label=255).errors == []


def test_lossy_masks_are_fine_if_every_value_has_a_class(maker):
    maker.text("classes.txt", "road", "crack")
    for path in sorted((maker.root / "masks").rglob("*.png")):
        mask = np.zeros((24, 32), np.uint8)
        mask[8:16, 8:24] = 255
        Image.fromarray(mask).save(path.with_suffix(".jpg"), quality=70)
        path.unlink()
    for path in (maker.root / "images").rglob("*.png"):
        maker.save(path, maker.rng.integers(0, 256, (24, 32, 3), np.uint8))
    assert report_of(maker, threshold=128).findings == ()
    maker.text("classes.txt", "road 0-127", "crack 128-255")
    assert report_of(maker).findings == ()
    maker.text("classes.txt", "road", "crack")
    assert "jpeg mask" in {one.kind for one in report_of(maker, masks_hold="ids").findings}


def test_values_claimed_twice_and_a_threshold_for_ids_name_their_files(maker):
    maker.text("classes.txt", "sky 0 1", "car 1")
    found = only(report_of(maker), "error")
    assert (found.kind, report_of(maker).proposal) == ("classes", "")
    assert "the value 1 is claimed by sky (line 1) and car (line 2)" in found.examples[0]
    maker.text("classes.txt", "sky", "car")
    found = only(report_of(maker, threshold=128), "error")
    assert re.search(
        r"threshold=128 divides grey .*masks/\w+/\w+\.png holds ids", found.examples[0]
    )


@pytest.mark.parametrize(("encoding", "right"), [("binary", "ids"), ("colors", "ids")])
def test_ids_taken_for_something_else_name_the_setting(maker, encoding, right):
    maker.text("classes.txt", "a 10 0 0", "b 9 8 7")
    mends = [found.mend for found in report_of(maker, masks_hold=encoding).errors]
    assert any(f"masks_hold={right}" in mend for mend in mends)


def test_a_single_class(maker):
    for path in (maker.root / "masks").rglob("*.png"):
        maker.save(path, np.zeros_like(np.array(Image.open(path))))
    found = only(report_of(maker), "error")
    assert found.kind == "one class"
    assert "are sky" in found.message


def test_rare_and_absent_classes(maker):
    maker.text("classes.txt", *NAMES, "dog", "cat")
    for path in sorted((maker.root / "masks").rglob("*.png")):
        ids = np.array(Image.open(path))
        if "train" in path.parts:
            ids[5, 5] = 3  # of 768 pixels: in all images, and 0.13 % of the pixels
            ids[ids == 2] = 0
            ids[6, :9] = 2 if path.stem in ("t0", "t1") else 0  # in two images
        maker.save(path, ids)
    report = report_of(maker)
    absent, rare = report.warnings
    assert absent.kind == "absent classes"
    assert absent.examples == ("dog: not in val", "cat: not in train or val")
    assert rare.kind == "rare classes"
    assert [text.split(":")[0] for text in rare.examples] == ["car"]
    assert "in 2 of 6 images" in rare.examples[0]


@pytest.mark.parametrize(("pixels", "rare"), [(1, True), (3, False)])
def test_a_class_in_many_images_is_rare_if_it_is_small(maker, pixels, rare):
    maker.text("classes.txt", *NAMES, "dog")
    for index in range(6):
        maker.pair(f"t{index}", folder="train", shape=(40, 40))
        label = maker.labels[f"t{index}"]
        label[5, :pixels] = 3  # of 1600 pixels
        maker.save(maker.root / f"masks/train/t{index}.png", label)
    kinds = {found.kind: found.examples for found in report_of(maker).warnings}
    assert kinds.keys() == {"absent classes", *(["rare classes"] if rare else [])}
    if rare:
        assert kinds["rare classes"] == ("dog: 0.063% of the pixels, in 6 of 6 images",)


def test_a_mask_that_is_all_ignored(maker):
    maker.save(maker.root / "masks/train/t3.png", np.full((24, 32), 255, np.uint8))
    found = only(report_of(maker), "warning")
    assert (found.kind, found.count) == ("all ignored", 1)


def test_orientation_and_depth_and_jpeg_masks(maker):
    exif = Image.Exif()
    exif[0x0112] = 8
    path = maker.root / "images/train/t0.png"
    Image.open(path).save(path, exif=exif)
    deep = maker.rng.integers(0, 2**16, (24, 32), dtype=np.uint16)
    Image.fromarray(deep).save(maker.root / "images/train/t1.png")
    (maker.root / "masks/train/t2.png").unlink()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(maker.root / "masks/train/t2.jpg")
    report = report_of(maker)
    assert report.errors == []
    kinds = {found.kind: found.examples for found in report.warnings}
    assert kinds.keys() == {"exif", "16 bits", "jpeg mask"}
    assert "t0.png: orientation 8" in kinds["exif"][0]
    assert "t1.png" in kinds["16 bits"][0]
    assert "t2.jpg" in kinds["jpeg mask"][0]


def test_files_that_are_not_images_are_reported(maker):
    (maker.root / "images/train/notes.txt").write_text("x")
    (maker.root / "images/train/.hidden").write_text("x")
    (maker.root / "images/train/Thumbs.db").write_text("x")
    found = only(report_of(maker), "warning")
    assert (found.kind, found.count) == ("other files", 1)


def test_exact_duplicates(maker):
    same = maker.images["t1"]
    maker.save(maker.root / "images/train/t4.png", same)
    found = only(report_of(maker), "warning")
    assert (found.kind, found.examples) == ("duplicates", ("train/t1 = train/t4",))
    maker.save(maker.root / "images/val/v0.bmp", same)
    (maker.root / "images/val/v0.png").unlink()
    maker.save(maker.root / "masks/val/v0.png", maker.labels["t1"])
    report = report_of(maker)
    found = only(report, "error")
    assert found.kind == "duplicates across splits"
    assert found.examples == ("train/t1 = train/t4 = val/v0",)
    assert report.warnings == []  # neither near nor within


def test_near_duplicates_give_a_warning(maker):
    """A brighter, larger, recompressed copy is near; the others are not."""
    rng = np.random.default_rng(3)
    for index in range(6):
        picture = cv2.resize(rng.integers(0, 200, (5, 6, 3), np.uint8), (64, 48))
        maker.save(maker.root / f"images/train/t{index}.png", picture)
        maker.save(maker.root / f"masks/train/t{index}.png", np.eye(48, 64, dtype=np.uint8))
        if index == 2:
            copy = Image.fromarray(cv2.resize(picture, (96, 72)) + np.uint8(30))
    (maker.root / "images/val/v1.png").unlink()
    copy.save(maker.root / "images/val/v1.jpg", quality=60)
    maker.save(maker.root / "masks/val/v1.png", np.eye(72, 96, dtype=np.uint8))
    near = [one for one in report_of(maker).warnings if one.kind.startswith("near")]
    assert len(near) == 1
    assert near[0].count == 1
    assert near[0].examples[0].startswith("val/v1 ~ train/t2 (")


def test_difference_hash_is_the_literal_one():
    """Against a loop over the thumbnail of an image of 9 x 8 blocks."""
    blocks = np.random.default_rng(0).permutation(72).reshape(8, 9).astype(np.uint8) * 3
    image = np.repeat(np.kron(blocks, np.ones((4, 4), np.uint8))[..., None], 3, axis=2)
    bits = "".join(
        "1" if blocks[y, x] < blocks[y, x + 1] else "0" for y in range(8) for x in range(8)
    )
    for each in (image, image[:, :, :1]):
        gradients = duplicates.thumbnail_gradients(each)
        assert duplicates.hash_images(gradients[None]).tolist() == [int(bits, 2)]
    assert duplicates.thumbnail_gradients(np.full((20, 30, 3), 77, np.uint8)) is None
    assert duplicates.thumbnail_gradients(np.zeros((1, 1, 1), np.uint8)) is None


def test_near_pairs_against_all_comparisons():
    rng = np.random.default_rng(0)
    ours = rng.integers(0, 2**63, 50, dtype=np.uint64)
    theirs = ours[rng.permutation(50)[:30]] ^ (np.uint64(1) << rng.integers(0, 64, 30, np.uint64))
    theirs[::3] ^= np.uint64(0b1111111)
    expected = []
    for i, a in enumerate(ours.tolist()):
        distances = [(a ^ b).bit_count() for b in theirs.tolist()]
        if min(distances) <= 6:
            expected.append((i, distances.index(min(distances)), min(distances)))
    assert 10 < len(expected) < 30
    assert duplicates.near_pairs(ours, theirs) == expected
    assert duplicates.near_pairs(ours, theirs[:0]) == []


def test_digests_tell_shapes_apart():
    image = np.arange(24, dtype=np.uint8)
    shapes = [(2, 4, 3), (4, 2, 3), (8, 1, 3), (8, 3, 1)]
    assert len({duplicates.digest(image.reshape(shape)) for shape in shapes}) == 4


def test_unknown_classes_are_an_error_and_a_wrong_root_stops_the_check(maker, tmp_path):
    (maker.root / "classes.txt").unlink()
    report = report_of(maker)
    found = only(report, "error")
    assert found.kind == "classes"
    assert "The masks hold 0, 1, 2, 255" in found.examples[0]
    assert report.proposal == "background 0\nclass_1 1\nclass_2 2\nignore 255\n"
    assert [one.name for one in report.classes] == ["background", "class_1", "class_2"]
    assert report.splits["train"].min_size == (32, 24)  # all else is checked too
    with pytest.raises(UserError, match="there is no folder"):
        check.check(DataConfig(name="folder", root=str(tmp_path / "none")))


def test_an_empty_split_is_reported(maker):
    for folder in ("images", "masks"):
        for path in (maker.root / folder / "val").iterdir():
            path.unlink()
        (maker.root / folder / "val").rmdir()
    found = only(report_of(maker), "warning")
    assert (found.kind, found.examples) == ("empty splits", ("val",))


def test_the_sheet_shows_masks_over_images(maker):
    _, scans, mask_format = check.check(maker.config())
    sheet = contact_sheet.draw(scans, mask_format, 3)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    assert sheet.shape[1] == 6 * 248 + 8
    # The first tile: below its title, an image of 240 x 180 in which the label's colours are.
    tile = sheet[22:202, 8:248].reshape(180, 240, 3)
    image = cv2.resize(maker.images["t0"], (240, 180), interpolation=cv2.INTER_AREA)
    label = cv2.resize(maker.labels["t0"], (240, 180), interpolation=cv2.INTER_NEAREST)
    colors = np.array(mask_format.labels.colors)
    inside = label == 1
    assert inside.any()
    blended = (image[inside].astype(int) + colors[1]) // 2
    np.testing.assert_array_equal(tile[inside], blended)
    np.testing.assert_array_equal(tile[label == 255], image[label == 255])
    few = contact_sheet.draw(scans, mask_format, 3, limit=2)
    assert few.shape[0] < sheet.shape[0]


@pytest.mark.parametrize("shape", [(2, 500), (500, 3)])
def test_the_sheet_bounds_what_is_long(maker, shape):
    maker.pair("t0", folder="train", shape=shape)
    _, scans, mask_format = check.check(maker.config())
    sheet = contact_sheet.draw(scans, mask_format, 3, limit=1)
    assert sheet.shape[0] < 400


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_sheet_of_other_channels(maker, channels):
    for path in (maker.root / "images").rglob("*.png"):
        size = np.array(Image.open(path)).shape[:2]
        np.save(path.with_suffix(".npy"), maker.rng.integers(0, 256, (*size, channels), np.uint8))
        path.unlink()
    report, scans, mask_format = check.check(maker.config(channels=channels))
    assert report.errors == []
    contact_sheet.draw(scans, mask_format, channels)


def test_kinds_of_findings_have_a_level_and_a_message():
    assert {level for level, _, _ in findings._KINDS.values()} == set(findings.LEVELS)
    assert all(message for _, message, _ in findings._KINDS.values())


def test_camvid_is_clean_with_its_config(shared_data):
    config = config_io.from_python(ROOT / "configs/camvid.py")
    config.data.root = str(shared_data / "camvid")
    report, _, _ = check.check(config.data)
    assert report.findings == ()
    assert list(advise(report.splits["train"].median_size, report.classes, config)) == []
    assert report.splits["val"].images == 101
    ids = np.stack(
        [np.array(Image.open(p)) for p in sorted((shared_data / "camvid/masks/val").iterdir())]
    )
    assert [one.pixels["val"] for one in report.classes] == np.bincount(ids.ravel())[:11].tolist()
