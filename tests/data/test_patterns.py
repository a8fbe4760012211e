"""Patterns of paths: those that are found from the names of files, and those that are set."""

import pytest

from deeplab_jax import data
from deeplab_jax.config import Config, DataConfig, FolderConfig
from deeplab_jax.config.rules import validate
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.utils.errors import UserError

NAMES = [f"{index:03d}" for index in range(8)]
TRAIN, VAL = NAMES[:6], NAMES[6:]


def write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def pairs(image, mask, splits):
    """Paths of an image and a mask for each name of each split."""
    return [
        pattern.format(split=split, name=name, folder=split)
        for split, names in splits.items()
        for name in names
        for pattern in (image, mask)
    ]


def detect(root, **folder):
    return detect_layout(DataConfig(root=str(root), folder=FolderConfig(**folder)))


def names_of(layout):
    return {split: [pair.name for pair in found] for split, found in layout.splits.items()}


def expect(root, image, mask, layout=None, **sizes):
    """The layout is found with these patterns, and says so; a name is in its image and mask."""
    layout = layout or detect(root)
    assert layout.problems == []
    assert (layout.image_pattern, layout.mask_pattern) == (image, mask)
    assert layout.notes[0].startswith(f"found: images {image}, masks {mask} (config.data.folder.")
    assert {split: len(found) for split, found in layout.splits.items()} == sizes
    for found in layout.splits.values():
        for pair in found:
            assert pair.image != pair.mask
            for path in (pair.image, pair.mask):
                assert path.is_file()
                assert pair.name.rpartition("/")[2] in str(path)
    again = detect(root, image_pattern=image, mask_pattern=mask)
    assert (again.splits, again.problems) == (layout.splits, [])
    return layout


BY_SPLIT = {"train": TRAIN, "val": VAL}
CITIES = {"train": ["ulm/ulm_0_1", "ulm/ulm_0_2", "bonn/bonn_0_1"], "val": ["hamm/hamm_0_1"]}
LAYOUTS = {
    "CrackForest": (("Images/{name}.jpg", "Masks/{name}_label.PNG"), {}),
    "split first": (("{split}/images/{name}.jpg", "{split}/masks/{name}.png"), BY_SPLIT),
    "side by side": (("{split}/{name}.jpg", "{split}/{name}_mask.png"), BY_SPLIT),
    "one suffix": (("{split}/{name}.png", "{split}/{name}_mask.png"), BY_SPLIT),
    "one folder": (("{name}.png", "{name}_mask.png"), {}),
    "prefixes": (("{split}/img_{name}.png", "{split}/gt_{name}.png"), BY_SPLIT),
    "both renamed": (("images/{name}_image.png", "masks/{name}_mask.png"), {}),
    "cwfid": (("images/{name}_image.png", "annotations/{name}_annotation.png"), {}),
    "VOC": (("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"), {}),
    "same stem": (("{name}.jpg", "{name}.png"), {}),
    "numbers": (("data/image{name}.png", "data/label{name}.png"), {}),
    "ADE20K": (
        ("images/{split}/{name}.jpg", "annotations/{split}/{name}.png"),
        {"training": TRAIN, "validation": VAL},
    ),
    "Crack500": (("{split}crop/{name}.jpg", "{split}crop/{name}.png"), BY_SPLIT),
    "capitals": (
        ("{split}/Images/{name}.tif", "{split}/GT/{name}.tif"),
        {"Train": TRAIN, "Valid": VAL},
    ),
    "CamVid": (("{split}/{name}.png", "{split}annot/{name}.png"), BY_SPLIT),
    "words": (("{split}_images/{name}.jpg", "{split}_masks/{name}.png"), BY_SPLIT),
    "camel": (("{split}Images/{name}.jpg", "{split}Labels/{name}.png"), BY_SPLIT),
    "years": (("{split}2017/{name}.jpg", "stuffthingmaps/{split}2017/{name}.png"), BY_SPLIT),
    "Cityscapes": (
        ("leftImg8bit/{split}/{name}_leftImg8bit.png", "gtFine/{split}/{name}_gtFine_labelIds.png"),
        CITIES,
    ),
    "split in names": (
        ("{split}/images/{name}_{split}.tif", "{split}/1st_manual/{name}_manual1.gif"),
        {"training": TRAIN, "validation": VAL},
    ),
    "splits of images": (("images/{split}/{name}.jpg", "masks/{name}.png"), BY_SPLIT),
    "splits of masks": (("images/{name}.jpg", "masks/{split}/{name}.png"), BY_SPLIT),
    "Roboflow": (
        ("{split}/{name}.jpg", "{split}/{name}_mask.png"),
        {"train": ["a_jpg.rf.0f3", "b_jpg.rf.9c1"], "valid": ["c_jpg.rf.77a"]},
    ),
    "Supervisely": (("ds/img/{name}.jpg", "ds/masks_machine/{name}.png"), {}),
    "datasets": (
        ("{folder}/img/{name}.jpg", "{folder}/masks_machine/{name}.png"),
        {"ds0": NAMES, "ds1": NAMES},
    ),
    "ISIC": (
        (
            "ISIC-2017_{split}_Data/{name}.jpg",
            "ISIC-2017_{split}_Part1_GroundTruth/{name}_segmentation.png",
        ),
        {"Training": TRAIN, "Validation": VAL},
    ),
    "folder of each": (("{name}/img.png", "{name}/label.png"), {}),
    "subfolders": (
        ("pictures/{name}.jpg", "labels/{name}_seg.png"),
        {"": ["a/0", "a/1", "b/0", "b/c/0"]},
    ),
    "LabelMe": (("{name}.jpg", "{name}.json"), {}),
    "LabelMe folders": (("images/{name}.jpg", "labels/{name}.json"), {}),
    "arrays": (("images/{name}.jpg", "gt/{name}.mat"), {}),
    "NumPy": (("images/{name}.png", "labels/{name}.npy"), {}),
    "two images": (("a/{name}.jpg", "a/{name}_mask.png"), {"": ["x", "y"]}),
    "similar names": (("a/{name}.png", "b_mask/{name}.png"), {"": ["a1", "a2", "a11", "b1", "m"]}),
    "tiles": (
        ("img/{name}.tif", "gt/{name}_gt.tif"),
        {"": [f"t_{i}_{j}" for i in range(4) for j in range(4)]},
    ),
    "words as names": (
        ("Images/{name}.jpg", "Masks/{name}.png"),
        {"": ["street", "yard", "mask", "image"]},
    ),
    "not ASCII": (
        ("Bilder/{name}.jpg", "Masken/{name}_maske.png"),
        {"": ["straße", "ü1", "深圳", "a b"]},
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_are_found(tmp_path, case):
    (image, mask), splits = LAYOUTS[case]
    write(tmp_path, "classes.txt", *pairs(image, mask, splits or {"": NAMES}))
    layout = detect(tmp_path)
    total = sum(len(names) for names in splits.values()) or len(NAMES)
    if "{split}" in image + mask:
        sizes = dict(zip(("train", "val"), map(len, splits.values()), strict=True))
    else:
        sizes = {split: len(found) for split, found in layout.splits.items()}
        assert sum(sizes.values()) == total
        assert min(sizes.values()) > 0
    expect(tmp_path, image, mask, layout, **sizes)


def refuse(root, *words, **folder):
    """The layout is refused with all these words, and nothing is taken."""
    with pytest.raises(UserError) as error:
        detect(root, **folder)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def spelled(image, mask):
    return (
        f"--config.data.folder.image_pattern='{image}' --config.data.folder.mask_pattern='{mask}'"
    )


ONE = {"": NAMES}


def test_drives_masks_of_the_view_are_not_taken_if_test_has_no_vessels(tmp_path):
    """Its published form: the masks of the view pair more images, those of test too."""
    write(
        tmp_path,
        *pairs(
            "{split}/images/{name}_{split}.tif",
            "{split}/mask/{name}_{split}_mask.gif",
            {"training": ["21", "22", "23", "24"], "test": ["01", "02", "03"]},
        ),
    )
    write(tmp_path, *(f"training/1st_manual/{number}_manual1.gif" for number in range(21, 25)))
    refuse(
        tmp_path,
        spelled("{split}/images/{name}_{split}.tif", "{split}/1st_manual/{name}_manual1.gif"),
        spelled("{split}/images/{name}.tif", "{split}/mask/{name}_mask.gif"),
    )


def test_two_observers_are_both_named(tmp_path):
    """CHASEDB1's layout: the user must say whose masks count."""
    names = [f"Image_{index:02d}{eye}" for index in range(1, 5) for eye in "LR"]
    for observer in ("1stHO", "2ndHO"):
        write(tmp_path, *pairs("{name}.jpg", f"{{name}}_{observer}.png", {"": names}))
    choices = [spelled("{name}.jpg", f"{{name}}_{each}.png") for each in ("1stHO", "2ndHO")]
    message = refuse(tmp_path, *(f"\n- {choice}" for choice in choices))
    assert message.count("image_pattern") == 2
    layout = detect(tmp_path, image_pattern="{name}.jpg", mask_pattern="{name}_2ndHO.png")
    assert layout.problems == []
    assert sum(map(len, layout.splits.values())) == 8
    assert {pair.mask.name[-9:] for found in layout.splits.values() for pair in found} == {
        "2ndHO.png"
    }


def test_drives_masks_of_the_view_are_not_taken_for_those_of_vessels(tmp_path):
    for split, numbers in {"training": range(21, 26), "test": range(1, 6)}.items():
        for number in numbers:
            write(
                tmp_path,
                f"{split}/images/{number:02d}_{split}.tif",
                f"{split}/1st_manual/{number:02d}_manual1.gif",
                f"{split}/mask/{number:02d}_{split}_mask.gif",
            )
    write(tmp_path, *(f"test/2nd_manual/{number:02d}_manual2.gif" for number in range(1, 6)))
    image = "{split}/images/{name}_{split}.tif"
    message = refuse(
        tmp_path,
        spelled(image, "{split}/1st_manual/{name}_manual1.gif"),
        spelled("{split}/images/{name}.tif", "{split}/mask/{name}_mask.gif"),
    )
    assert message.count("image_pattern") == 2
    layout = detect(
        tmp_path, image_pattern=image, mask_pattern="{split}/1st_manual/{name}_manual1.gif"
    )
    assert layout.problems == []
    sizes = {split: len(found) for split, found in layout.splits.items()}
    assert sizes == {"train": 4, "val": 1, "test": 5}
    assert "there is no split val" in layout.notes[0]


def test_cityscapes_other_files_are_not_masks(tmp_path):
    for mask in ("instanceIds.png", "color.png", "polygons.json", "labelIds.png"):
        image, mask = LAYOUTS["Cityscapes"][0][0], f"gtFine/{{split}}/{{name}}_gtFine_{mask}"
        write(tmp_path, *pairs(image, mask, CITIES))
    write(tmp_path, "leftImg8bit/test/rome/rome_0_1_leftImg8bit.png")
    layout = expect(tmp_path, *LAYOUTS["Cityscapes"][0], train=3, val=1)
    assert layout.notes[1:] == ["test: no image has a mask, so it is left out"]


@pytest.mark.parametrize("num_cities", [3, 18])
def test_pictures_of_cityscapes_classes_are_not_images(tmp_path, num_cities):
    """Folders of cities are many, so that those of images are a small part of all."""
    cities = {
        "train": [f"c{index}/c{index}_0_1" for index in range(num_cities)],
        "val": ["v/v_0_1"],
    }
    image, mask = LAYOUTS["Cityscapes"][0]
    write(tmp_path, *pairs(image, mask, cities))
    for other in ("instanceIds.png", "color.png", "polygons.json"):
        write(tmp_path, *pairs(image, mask.replace("labelIds.png", other), cities))
    expect(tmp_path, image, mask, train=num_cities, val=1)
    write(tmp_path, *pairs(image, mask.replace("labelIds", "labelTrainIds"), cities))
    message = refuse(
        tmp_path, spelled(image, mask), spelled(image, mask.replace("labelIds", "labelTrainIds"))
    )
    assert message.count("image_pattern") == 2


def test_kitti(tmp_path):
    """It has masks of classes, the same in colours, and of instances."""
    write(tmp_path, *(f"testing/image_2/{name}.png" for name in NAMES))
    for mask in ("semantic", "semantic_rgb", "instance"):
        write(tmp_path, *pairs("training/image_2/{name}.png", f"training/{mask}/{{name}}.png", ONE))
    patterns = "{split}/image_2/{name}.png", "{split}/semantic/{name}.png"
    expect(tmp_path, *patterns, train=7, val=1)


def test_folders_that_happen_to_hold_two_files_are_no_folders_of_images(tmp_path):
    """The images of train and the masks of val."""
    write(tmp_path, *(f"train/images/{name}.png" for name in "0123"))
    write(tmp_path, *(f"val/masks/{name}.png" for name in "0123"))
    refuse(tmp_path, "no mask was found", "train/images/*.png (4)")


def test_masks_of_no_split_that_belong_to_no_image_are_named(tmp_path):
    write(tmp_path, *pairs("images/{split}/{name}.jpg", "gt/{name}.png", BY_SPLIT), "gt/900.png")
    assert f"{tmp_path}/gt/900.png: is the mask of no image" in detect(tmp_path).problems


def test_an_image_of_two_splits_with_one_mask_says_how_to_choose(tmp_path):
    write(tmp_path, *pairs("images/{split}/{name}.jpg", "gt/{name}.png", BY_SPLIT))
    write(tmp_path, "images/val/002.jpg")
    (problem,) = [one for one in detect(tmp_path).problems if "the same name" in one]
    assert "train/002.jpg" in problem
    assert spelled("images/train/{name}.jpg", "gt/{name}.png") in problem


def test_files_that_no_other_pattern_tells_apart_are_to_be_renamed(tmp_path):
    write(tmp_path, "a/1.jpg", "a/01.jpg", "m/1.png")
    patterns = {"image_pattern": "a/{number}.jpg", "mask_pattern": "m/{number}.png"}
    (problem,) = detect(tmp_path, **patterns).problems
    assert problem.endswith("Rename one, or set the image_pattern so that only one of them fits")


def test_an_image_of_no_split_is_named_with_the_pattern_of_its_mask(tmp_path):
    write(tmp_path, *pairs("img/{name}.jpg", "gt/{split}/{name}.png", BY_SPLIT), "img/900.jpg")
    patterns = {"image_pattern": "img/{name}.jpg", "mask_pattern": "gt/{split}/{name}.png"}
    (problem,) = detect(tmp_path, **patterns).problems
    assert f"{tmp_path}/img/900.jpg: has no mask {tmp_path}/gt/{{split}}/900.png" in problem


def test_a_root_of_images_only_is_not_said_to_be_too_high(tmp_path):
    write(tmp_path, *(f"images/train/{name}.jpg" for name in NAMES))
    refuse(tmp_path, "has no folder masks", "images/train/*.jpg (8)")
    write(tmp_path, *(f"images/train/{name}_mask.png" for name in NAMES))
    patterns = "images/{split}/{name}.jpg", "images/{split}/{name}_mask.png"
    expect(tmp_path, *patterns, train=7, val=1)


def test_a_list_may_name_masks_that_mask_name_does_not_fit(tmp_path):
    write(tmp_path, *pairs("images/{name}.jpg", "masks/{name}_mask.png", ONE), "masks/other.png")
    (tmp_path / "train.txt").write_text("000\n001.jpg other.png\nimages/002.jpg 002_mask.png\n")
    (tmp_path / "val.txt").write_text("003\n")
    layout = detect(tmp_path, mask_name="{name}_mask")
    assert (layout.problems, layout.skipped) == ([], [])
    masks = [pair.mask.name for pair in layout.splits["train"]]
    assert masks == ["000_mask.png", "other.png", "002_mask.png"]


def test_lists_do_not_choose_between_images_of_one_stem(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path, *pairs(f"img/{folder}/{{name}}.jpg", f"gt/{folder}/{{name}}.png", ONE))
    (tmp_path / "train.txt").write_text("a/000\nimg/b/001.jpg gt/b/001.png\n")
    (tmp_path / "val.txt").write_text("b/002\n")
    layout = detect(tmp_path)
    assert (layout.problems, names_of(layout)["train"]) == ([], ["a/000", "b/001"])
    (tmp_path / "val.txt").write_text("002\n")
    (problem,) = detect(tmp_path).problems
    assert "val.txt: names 002, but there is no" in problem


def test_instances_are_taken_only_if_there_is_nothing_else(tmp_path):
    for folder in ("SegmentationClass", "SegmentationObject"):
        write(tmp_path, *pairs("JPEGImages/{name}.jpg", folder + "/{name}.png", ONE))
    expect(tmp_path, "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", train=7, val=1)
    (tmp_path / "SegmentationClass/003.png").unlink()
    problems = detect(tmp_path).problems
    assert "masks SegmentationClass/{name}.png fit, but only for 7 of 8 images" in problems[0]
    assert "003.jpg: has no mask" in problems[1]


@pytest.mark.parametrize("name", ["train.txt", "Train.txt", "ImageSets/Segmentation/train.txt"])
def test_lists_name_the_images_that_need_masks(tmp_path, name):
    """VOC has masks of a part of its images."""
    write(tmp_path, *(f"JPEGImages/{index:04d}.jpg" for index in range(40)))
    write(tmp_path, *(f"SegmentationClass/{index:04d}.png" for index in range(0, 40, 5)))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("0000\n0005.jpg\nJPEGImages/0010.jpg\n")
    (
        tmp_path / name.lower().replace("train", "val").replace("imagesets/s", "ImageSets/S")
    ).write_text("0015 0015\n/home/me/JPEGImages/0020.jpg /home/me/SegmentationClass/0020.png\n")
    layout = detect(tmp_path)
    assert layout.problems == []
    assert layout.kind == "lists"
    assert names_of(layout) == {"train": ["0000", "0005", "0010"], "val": ["0015", "0020"]}


def test_numbers_with_other_zeros(tmp_path):
    for index in range(1, 12):
        write(tmp_path, f"images/{index}.jpg", f"masks/{index:04d}_mask.png")
    layout = detect(tmp_path)
    assert layout.problems == []
    assert layout.image_pattern == "images/{number}.jpg"
    assert layout.mask_pattern == "masks/{number}_mask.png"
    found = [pair for pairs in layout.splits.values() for pair in pairs]
    assert len(found) == 11
    assert all(int(pair.image.stem) == int(pair.mask.stem[:4]) for pair in found)


def test_images_of_several_suffixes(tmp_path):
    write(tmp_path, *pairs("Images/{name}.jpg", "Masks/{name}.png", {"": TRAIN}))
    write(tmp_path, *pairs("Images/{name}.PNG", "Masks/{name}.png", {"": VAL}))
    layout = detect(tmp_path)
    assert (layout.image_pattern, layout.mask_pattern) == ("Images/{name}.*", "Masks/{name}.png")
    assert sum(map(len, layout.splits.values())) == 8


def test_carvana(tmp_path):
    """Its test images have no masks, and there is no val."""
    write(tmp_path, *pairs("train/{name}.jpg", "train_masks/{name}_mask.gif", ONE))
    write(tmp_path, "test/900.jpg", "test/901.jpg", "train_masks.csv")
    layout = expect(tmp_path, "{split}/{name}.jpg", "{split}_masks/{name}_mask.gif", train=7, val=1)
    assert layout.notes[1:] == [
        "test: no image has a mask, so it is left out",
        "there is no split val: 1 of the 8 images of train are val "
        "(config.data.folder.val_fraction)",
    ]


def test_a_split_without_masks_is_an_error_that_says_how_to_leave_it_out(tmp_path):
    """DeepGlobe's validation images have no masks."""
    write(tmp_path, *pairs("{split}/{name}_sat.jpg", "{split}/{name}_mask.png", {"train": NAMES}))
    write(tmp_path, "valid/900_sat.jpg", "valid/901_sat.jpg", "test/902_sat.jpg")
    layout = detect(tmp_path)
    use = spelled("train/{name}_sat.jpg", "train/{name}_mask.png")
    assert layout.problems[1:] == [
        f"{tmp_path}: split valid: none of its 2 images has a mask, such as "
        f"{tmp_path}/valid/900_mask.png. To use the other split only, set {use}"
    ]
    layout = detect(
        tmp_path, image_pattern="train/{name}_sat.jpg", mask_pattern="train/{name}_mask.png"
    )
    assert layout.problems == []
    assert {split: len(found) for split, found in layout.splits.items()} == {"train": 7, "val": 1}


def test_an_image_without_a_mask_is_named_and_not_to_be_moved(tmp_path):
    write(tmp_path, *pairs("{split}/{name}.png", "{split}/{name}_mask.png", BY_SPLIT))
    (tmp_path / "train/002.png").unlink()
    (tmp_path / "val/007_mask.png").unlink()
    layout = detect(tmp_path)
    assert layout.problems == [
        f"{tmp_path}: images {{split}}/{{name}}.png and masks {{split}}/{{name}}_mask.png fit, but "
        "only for 6 of 7 images",
        f"{tmp_path}/train/002_mask.png: is the mask of no image",
        f"{tmp_path}/val/007.png: has no mask {tmp_path}/val/007_mask.png. Add it, or leave the "
        "image out",
    ]
    assert {split: len(found) for split, found in layout.splits.items()} == {"train": 5, "val": 1}


def test_two_masks_of_an_image_are_both_named(tmp_path):
    write(tmp_path, *pairs("Images/{name}.jpg", "Masks/{name}.png", ONE), "Masks/003.bmp")
    layout = detect(tmp_path)
    (problem,) = layout.problems
    assert f"{tmp_path}/Masks/003.png and {tmp_path}/Masks/003.bmp have the same name" in problem
    assert problem.endswith(spelled("Images/{name}.jpg", "Masks/{name}.png"))
    settled = detect(tmp_path, image_pattern="Images/{name}.jpg", mask_pattern="Masks/{name}.png")
    assert settled.problems == []
    assert settled.skipped == [tmp_path / "Masks/003.bmp"]
    (problem,) = detect(
        tmp_path, image_pattern="Images/{name}.jpg", mask_pattern="Masks/{name}.*"
    ).problems
    assert "003.png" in problem
    assert "003.bmp" in problem


def test_two_spellings_of_a_split_are_both_named(tmp_path):
    image, mask = "{split}/images/{name}.jpg", "{split}/masks/{name}.png"
    write(tmp_path, *pairs(image, mask, {"train": TRAIN, "val": VAL, "valid": ["900", "901"]}))
    problems = detect(tmp_path).problems
    merge = "both mean val. Merge them, or rename one"
    assert problems == [f"{tmp_path}/val and {tmp_path}/valid {merge}"]


@pytest.mark.parametrize("ends", [("",), ("_left", "_right"), ("_1", "_2", "_11")])
def test_images_without_masks_are_no_layout(tmp_path, ends):
    write(tmp_path, *(f"photos/{name}{end}.jpg" for name in NAMES for end in ends), "notes.txt")
    refuse(
        tmp_path,
        "no mask was found",
        f"photos/*.jpg ({8 * len(ends)})",
        "config.data.folder.image_pattern and mask_pattern",
    )


@pytest.mark.parametrize("inner", ["set", "a/b"])
def test_a_root_one_level_too_high(tmp_path, inner):
    write(tmp_path / inner, *pairs("images/{name}.jpg", "masks/{name}.png", ONE), "classes.txt")
    write(tmp_path, ".DS_Store", "__MACOSX/._x")
    refuse(tmp_path, f"holds only the folder {inner}. Set config.data.root={tmp_path / inner}")
    assert detect(tmp_path / inner).problems == []


def test_images_and_masks_of_one_folder(tmp_path):
    real = tmp_path / "disk"
    write(real, *pairs("{name}.jpg", "{name}_mask.png", ONE))
    root = tmp_path / "linked"
    root.mkdir()
    for name in ("images", "masks"):
        (root / name).symlink_to(real)
    message = refuse(root, f"are one folder, {real}: each", f"set config.data.root={real}")
    assert "classes" not in message
    write(root, "classes.txt")
    refuse(root, f"{real} and config.data.folder.classes={root}/classes.txt")
    assert detect(real).problems == []
    for name in ("images", "masks"):
        (root / name).unlink()
        (root / name).mkdir()
        (root / name / "train").symlink_to(real)
    refuse(root, f"are one folder, {real}: each")


def test_nobody_can_say_which_folder_holds_masks(tmp_path):
    write(tmp_path, *pairs("a/{name}.png", "b/{name}.png", ONE))
    refuse(
        tmp_path,
        spelled("a/{name}.png", "b/{name}.png"),
        spelled("b/{name}.png", "a/{name}.png"),
    )


def test_a_wrong_name_of_masks_is_not_passed_over(tmp_path):
    write(tmp_path, *pairs("images/{name}.jpg", "masks/{name}_gt.png", ONE))
    message = refuse(
        tmp_path,
        "config.data.folder.mask_name: {name}_mask fits no mask",
        spelled("images/{name}.jpg", "masks/{name}_gt.png"),
        mask_name="{name}_mask",
    )
    assert "--config.data.folder.mask_name='{name}' " in message
    assert detect(tmp_path, mask_name="{name}_gt").problems == []


def test_patterns_that_match_nothing(tmp_path):
    write(tmp_path, *pairs("Images/{name}.jpg", "Masks/{name}.png", ONE))
    for image, mask, wrong in (
        ("Images/{name}.png", "Masks/{name}.png", "image_pattern: Images/{name}.png"),
        ("Images/{name}.jpg", "Mask/{name}.png", "mask_pattern: Mask/{name}.png"),
    ):
        refuse(
            tmp_path,
            f"config.data.folder.{wrong} matches no file below",
            "Images/*.jpg (8)",
            image_pattern=image,
            mask_pattern=mask,
        )


def test_windows_spellings_and_capitals(tmp_path):
    write(tmp_path, *pairs("Images/{name}.JPG", "Masks/{name}.png", ONE))
    layout = detect(
        tmp_path, image_pattern=".\\images\\{name}.jpg", mask_pattern="./masks/{name}.*"
    )
    assert layout.problems == []
    assert sum(map(len, layout.splits.values())) == 8


def test_names_in_two_forms_of_unicode_match(tmp_path):
    """As of archives that were made on macOS."""
    write(tmp_path, "Images/cafe\u0301.jpg", "Masks/caf\u00e9.png", "Images/b.jpg", "Masks/b.png")
    layout = detect(tmp_path)
    assert layout.problems == []
    assert sum(map(len, layout.splits.values())) == 2


def test_other_files_are_reported(tmp_path):
    write(tmp_path, *pairs("{split}/{name}.jpg", "{split}/{name}_mask.png", BY_SPLIT))
    write(tmp_path, "train/_classes.csv", "README.md", "train/000.heic", "docs/figure.png", "x.zip")
    layout = detect(tmp_path)
    assert layout.problems == []
    assert layout.skipped == [tmp_path / "docs/figure.png", tmp_path / "train/000.heic"]


def test_loveda(tmp_path):
    for split, names in {"Train": TRAIN, "Val": VAL}.items():
        for scene in ("Rural", "Urban"):
            image, mask = (
                f"{split}/{scene}/{kind}_png/{{name}}.png" for kind in ("images", "masks")
            )
            write(tmp_path, *pairs(image, mask, {"": names}))
    patterns = (f"{{split}}/{{folder}}/{kind}_png/{{name}}.png" for kind in ("images", "masks"))
    expect(tmp_path, *patterns, train=12, val=4)


def test_pictures_of_other_things_are_no_masks(tmp_path):
    """Superpixels of ISIC, and what `deeplab-jax predict` wrote into the folder."""
    write(tmp_path, *pairs("Images/{name}.jpg", "Masks/{name}.png", ONE))
    for other in ("Images/{name}_superpixels.png", "out/{name}_ids.png", "out/{name}_overlay.png"):
        write(tmp_path, *(other.format(name=name) for name in NAMES))
    expect(tmp_path, "Images/{name}.jpg", "Masks/{name}.png", train=7, val=1)


def test_a_folder_of_train_and_val_is_not_mixed_with_test(tmp_path):
    """SUIM's layout."""
    write(tmp_path, *pairs("train_val/images/{name}.jpg", "train_val/masks/{name}.bmp", ONE))
    write(tmp_path, *pairs("TEST/images/{name}.jpg", "TEST/masks/{name}.bmp", {"": ["8", "9"]}))
    expect(tmp_path, "train_val/images/{name}.jpg", "train_val/masks/{name}.bmp", train=7, val=1)
    assert len(detect(tmp_path).skipped) == 4


def test_masks_without_images_are_named(tmp_path):
    write(tmp_path, *pairs("Images/{name}.jpg", "Masks/{name}.png", ONE), "Masks/900.png")
    assert detect(tmp_path).problems == [f"{tmp_path}/Masks/900.png: is the mask of no image"]


def test_a_layout_with_test_only_says_how_to_train_on_it(tmp_path):
    write(tmp_path, *pairs("test_images/{name}.jpg", "test_masks/{name}.png", ONE))
    config = DataConfig(name="folder", root=str(tmp_path))
    for split in ("train", "val"):
        with pytest.raises(UserError) as error:
            data.load(config, split)
        assert str(error.value).endswith(
            "To divide test into train and val, set "
            + spelled("test_images/{name}.jpg", "test_masks/{name}.png")
        )


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ("{name}.jpg", "", r"mask_pattern must be set with data\.folder\.image_pattern"),
        ("", "{name}.jpg", r"mask_pattern must be set with data\.folder\.image_pattern"),
        ("{name}.*", "{name}.*", "mask_pattern must be set with .*, and another one"),
        ("images/*.jpg", "masks/{name}.png", r"image_pattern must be empty, or .*\{name\}"),
        ("images/{name}", "masks/{name}.png", "image_pattern must be empty, or .*suffix"),
        ("images/{nam}.jpg", "masks/{name}.png", "image_pattern must be empty, or"),
        ("{name}.jpg", "/data/{name}.png", r"mask_pattern must be empty, or .*below data\.root"),
        ("{name}/*/a.jpg", "{name}/b.png", "image_pattern must be empty, or"),
    ],
)
def test_wrong_patterns(image, mask, message):
    config = Config(data=DataConfig(name="folder"))
    validate(config)
    config.data.folder.image_pattern, config.data.folder.mask_pattern = image, mask
    with pytest.raises(UserError, match=message):
        validate(config)
    config.data.folder.image_pattern = "{split}/{folder}/a {name}.jpg"
    config.data.folder.mask_pattern = "{folder}/{number}_b.*"
    validate(config)
    config.data.folder.mask_name = "{name}_mask"
    with pytest.raises(UserError, match=r"mask_name must be \{name\}, because"):
        validate(config)


@pytest.mark.parametrize(("folders", "suffixes"), [("images masks", "* *"), ("pics gt", "jpg png")])
def test_splits_in_names_of_files_are_noted_with_the_patterns_that_use_them(
    tmp_path, folders, suffixes
):
    image, mask = (
        f"{folder}/{{split}}_{{name}}.{suffix}"
        for folder, suffix in zip(folders.split(), suffixes.split(), strict=True)
    )
    names = pairs(image, mask, BY_SPLIT)
    write(tmp_path, *(name.replace("*", "png") for name in names))
    layout = detect(tmp_path)
    assert layout.kind == "fraction"
    assert layout.notes[-1] == (
        "names begin with train, val, but a fraction of all is val. To use these splits, set "
        + spelled(image, mask)
    )
    layout = detect(tmp_path, image_pattern=image, mask_pattern=mask)
    assert (names_of(layout), layout.problems) == (BY_SPLIT, [])
    write(tmp_path, *(name.replace("*", "png") for name in pairs(image, mask, {"other": ["1"]})))
    assert not any("names begin" in note for note in detect(tmp_path).notes)


def test_two_spellings_of_a_split_in_names_of_files(tmp_path):
    write(tmp_path, *pairs("img/{split}_{name}.jpg", "gt/{split}_{name}.png", BY_SPLIT))
    write(tmp_path, "img/valid_900.jpg", "gt/valid_900.png")
    patterns = {"image_pattern": "img/{split}_{name}.jpg", "mask_pattern": "gt/{split}_{name}.png"}
    merge = "both mean val. Merge them, or rename one"
    assert detect(tmp_path, **patterns).problems == [
        f"{tmp_path}/{kind}/val_{{name}}.{suffix} and {tmp_path}/{kind}/valid_{{name}}.{suffix} "
        + merge
        for kind, suffix in (("img", "jpg"), ("gt", "png"))
    ]
