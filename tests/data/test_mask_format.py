"""How masks encode classes is decided from settings, the file of classes and the masks."""

import pickle
import re

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.mask_format import UnknownClassesError, read_mask_format
from deeplab_jax.data.io import masks
from deeplab_jax.data.labels import CAMVID, IGNORE
from deeplab_jax.utils.errors import UserError

FOX = (200, 0, 0)
COLORED = np.uint8([[(0, 0, 0), FOX]])


@pytest.fixture
def decide(maker):
    """Decides for masks, given as arrays; the format, and the label of each mask."""

    def run(*arrays, classes=None, suffix=".png", ignore_label=255, read=True, **folder):
        if classes is None:
            (maker.root / "classes.txt").unlink(missing_ok=True)
        else:
            maker.text("classes.txt", *classes.split("|"))
        paths = [maker.root / f"m{index}{suffix}" for index in range(len(arrays))]
        for path, array in zip(paths, arrays, strict=True):
            picture = array if isinstance(array, Image.Image) else Image.fromarray(np.uint8(array))
            picture.save(path)
        pairs = [Pair(path.stem, path, path, path) for path in paths]
        mask_format = read_mask_format(maker.config(ignore_label=ignore_label, **folder), pairs)
        labels = [mask_format.read_label(path).tolist() for path in paths] if read else []
        return mask_format, labels

    return run


def palette_mask(ids, *colors):
    picture = Image.fromarray(np.uint8(ids)).convert("P")
    picture.putpalette([channel for color in colors for channel in color])
    picture.putdata(np.ravel(ids).tolist())
    return picture


@pytest.mark.parametrize(
    ("mask", "classes", "label"),
    [
        ([[0, 255]], None, [[0, 1]]),
        ([[0, 255]], "road|crack", [[0, 1]]),
        (np.uint8([[[0] * 3, [255] * 3]]), "road|crack", [[0, 1]]),
        ([[0, 1, 2]], "a|b|c", [[0, 1, 2]]),
        ([[0, 1, 255]], "a|b", [[0, 1, IGNORE]]),
        ([[0, 3, 4, 255]], "road|crack 3 4 255", [[0, 1, 1, 1]]),
        ([[0, 127, 255]], "a 0|b 127|c 255", [[0, 1, 2]]),
        ([[7, 24, 26]], "a 7|b 24|c 26", [[0, 1, 2]]),
        ([[1, 2, 3]], "fox 1|other 2|ignore 3", [[0, 1, IGNORE]]),
        (COLORED, "fox 200 0 0|other 0 0 0", [[1, 0]]),
        (COLORED, "fox #c80000 #c90000|other #000000", [[1, 0]]),
        # Grey colours, in an order that is not that of the values.
        ([[0, 255]], "fox 255 255 255|other 0 0 0", [[1, 0]]),
        ([[0, 128]], "other 0 0 0|fox 128 128 128", [[0, 1]]),
        # A palette whose indices are in another order than the classes.
        (palette_mask([[0, 1]], FOX, (0, 0, 0)), "other 0 0 0|fox 200 0 0", [[1, 0]]),
        (palette_mask([[0, 1]], (0, 0, 0), FOX), "other 0 0 0|fox 200 0 0", [[0, 1]]),
        (palette_mask([[1, 0]], (1, 1, 1), FOX), "other 0 0 0|fox 200 0 0", [[1, 0]]),
        (Image.fromarray(np.array([[False, True]])), None, [[0, 1]]),
        (Image.fromarray(np.array([[False, True]])), "a|b", [[0, 1]]),
        (Image.fromarray(np.array([[False, True]])), "a|b|c", [[0, 1]]),
    ],
)
def test_encodings_are_found(decide, mask, classes, label):
    mask_format, found = decide(mask, classes=classes)
    assert found == [label]
    again = pickle.loads(pickle.dumps(mask_format))
    assert (again, hash(again)) == (mask_format, hash(mask_format))


def test_what_was_found_is_noted(decide):
    assert decide([[0, 255]])[0].notes == ("masks hold 0 and 255: background and foreground",)
    mask_format, _ = decide([[0, 255]], classes="road|crack")
    assert mask_format.notes == ("masks hold 0 and 255: road and crack",)
    mask_format, _ = decide(COLORED, classes="other:0,0,0::|fox:200,0,0::")
    assert re.search("is read as CVAT's labelmap", mask_format.notes[0])
    assert mask_format.notes[1] == "masks hold the colours of the classes in classes.txt"
    assert decide([[0, 1, 2]], classes="a|b|c")[0].notes == ()


@pytest.mark.parametrize(
    ("arrays", "classes", "lines"),
    [
        ([[[0, 3, 4, *[255] * 5]]], None, "background 0|foreground 3 4 255"),
        ([[[0, 1]], [[0, 255]]], None, "background 0|foreground 1 255"),
        ([[[1, 2, 3]]], "a|b|c", "a 1|b 2|c 3"),
        ([[[0, 1]]], "a", "background 0|a 1"),
        ([[[7, 24, 26]]], "a|b|c", "a 7|b 24|c 26"),
        ([[[0, 127, 255]]], "a|b|c", "a 0|b 127|c 255"),
        ([[[0, 255]]], "crack", "background 0|crack 255"),
        ([palette_mask([[0, 255]], *[FOX] * 256)], "a|b", "a 0|b 255"),
        ([COLORED], "a|b", "a #000000|b #c80000"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_lines_that_do(decide, arrays, classes, lines):
    with pytest.raises(UnknownClassesError) as error:
        decide(*arrays, classes=classes)
    proposal = lines.replace("|", "\n")
    assert f"\n{proposal}\n" in str(error.value)
    assert re.search(r"deeplab-jax data check '.*my data' --write-classes", str(error.value))
    labels = decide(*arrays, classes=lines)[1]
    assert not {IGNORE} & set(np.concatenate([np.ravel(label) for label in labels]).tolist())


def test_255_is_not_ignored_where_it_is_the_only_second_value(decide):
    with pytest.raises(UserError, match="hold only 0 and 255, and 255 is ignored"):
        decide(*[[[0, 255]]] * 12, classes="a|b|c")
    with pytest.raises(UserError, match=r"0 and 255, and 255 is ignored(?s:.*)a 0\nb 255\n"):
        decide(*[[[0, 255]]] * 12, classes="a|b", masks_hold="ids")
    late = [[[0, 0]]] * 20 + [[[0, 255]]] * 20 + [[[0, 0]], [[1, 255]]]
    assert decide(*late, classes="a|b|c")[1][-1] == [[1, IGNORE]]
    # Where another mask holds a class, 255 does not count.
    few = decide([[0, 255]], [[0, 1, 255]], classes="a|b|c")[1]
    assert few == [[[0, IGNORE]], [[0, 1, IGNORE]]]


def test_masks_of_0_and_255_among_masks_of_ids_are_named(decide):
    with pytest.raises(UserError, match=r"m1\.png: holds only 0 and 255.*`crack 1 255`.*m0\.png"):
        decide([[0, 1]], [[0, 255]], classes="road|crack")
    assert decide([[0, 1]], [[0, 255]], classes="road|crack 1 255")[1] == [[[0, 1]], [[0, 1]]]
    label = decide([[0, 1]], [[0, 255]], classes="road|crack|ignore 255")[1]
    assert label == [[[0, 1]], [[0, IGNORE]]]


def test_masks_beyond_the_samples_are_not_misread(decide, maker):
    """A mask of 0 and 255 is refused when it is read, if no sample shows that 255 is ignored."""
    mask_format, _ = decide(*[[[0, 1]]] * 8, classes="road|crack")
    late = maker.root / "late.png"
    maker.save(late, np.uint8([[0, 255]]))
    with pytest.raises(UserError, match=r"late\.png: holds only 0 and 255.*`ignore 255`"):
        mask_format.read_label(late)
    sure, _ = decide(*[[[0, 1, 255]]] * 8, classes="road|crack")
    assert sure.read_label(late).tolist() == [[0, IGNORE]]
    binary, _ = decide(*[[[0, 255]]] * 8, classes="road|crack")
    maker.save(late, np.uint8([[0, 1]]))
    with pytest.raises(UserError, match=r"late\.png: value 1, .*`crack 3 4 255`"):
        binary.read_label(late)


def test_empty_masks_do_not_decide(decide):
    """Samples go on until two values are seen."""
    arrays = [np.zeros((1, 2))] * 40
    arrays[33] = [[0, 255]]
    assert decide(*arrays, classes="road|crack")[1][33] == [[0, 1]]
    assert decide(*arrays)[1][33] == [[0, 1]]
    with pytest.raises(UserError, match="The masks hold 0"):
        decide(*[np.zeros((1, 2))] * 9)


def test_colours_among_ids_are_named(decide):
    for classes in ("a|b|c", "a 0 0 0|b 200 0 0|c 1 2 3"):
        with pytest.raises(UserError, match=r"two encodings: \S+ .*m1\.png .*m0\.png holds num"):
            decide([[0, 1, 2]], COLORED, classes=classes)


def test_a_background_of_255_is_not_guessed(decide):
    with pytest.raises(UserError, match="`crack 0` and `_background_ 255`, or"):
        decide([[0, 255]], classes="crack|_background_")
    assert decide([[0, 255]], classes="crack 0|_background_ 255")[1] == [[[0, 1]]]


def test_mistakes_in_some_masks_are_named_where_they_are_read(decide):
    with pytest.raises(
        UserError, match=r"m1\.png: id 11, first at pixel x 1, y 0.*ignore_label=11"
    ):
        decide([[0, 1, 2]], [[0, 11]], classes="a|b|c")
    with pytest.raises(UserError, match=r"m1\.png: id 5, .*\(0, 3-4, 255\).*`ignore 5`"):
        decide([[0, 3]], [[0, 5]], classes="a|b 3 4|ignore 255", masks_hold="ids")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_threshold_reads_jpegs(decide, mode):
    mask = np.zeros((40, 40), np.uint8)
    mask[9:25, 10:26] = 255
    picture = Image.fromarray(mask).convert(mode)
    for settings in ({"threshold": 128}, {"classes": "a 0-127|b 128-255"}):
        mask_format, (label,) = decide(picture, suffix=".jpg", **settings)
        np.testing.assert_array_equal(np.array(label), mask // 255)
        assert mask_format.is_complete
    with pytest.raises(UserError, match=r"(?s)a 0-127\nb 128-255.*--write-classes"):
        decide(picture, suffix=".jpg", classes="a|b")


def test_a_threshold_divides_at_its_value(decide):
    mask = np.uint8([[0, 99, 100, 255]])
    assert decide(mask, threshold=100, classes="a|b")[1] == [[[0, 0, 1, 1]]]
    assert decide(mask, threshold=100, ignore_label=99)[1] == [[[0, IGNORE, 1, 1]]]
    assert decide(Image.fromarray(mask.astype(np.uint16) * 256), threshold=30000)[1] == [
        [[0, 0, 0, 1]]
    ]


@pytest.mark.parametrize(
    ("mask", "settings", "message"),
    [
        ([[0, 1, 2]], {}, r"threshold=128 divides grey values, but \S+ .*holds ids \(0, 1, 2\)"),
        (palette_mask([[0, 200]], FOX), {}, "holds indices of a palette"),
        (COLORED, {}, "holds colours"),
        ([[0, 99]], {}, r"threshold=128 is above all values of the masks \(0, 99\)"),
        ([[0, 1, 1, 255]], {}, r"threshold=128 divides grey values, but .* ids \(0, 1, 255\)"),
        ([[0, 255]], {"classes": "a|b|ignore 255"}, "states values, and so does .*threshold=128"),
        ([[0, 255]], {"classes": "a|b|c"}, "names 3 classes, but .*threshold=128 has two"),
        ([[0, 255]], {"classes": "a 0|b 255"}, "states values, and so does .*threshold=128"),
    ],
)
def test_thresholds_that_contradict_the_masks(decide, mask, settings, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        decide(mask, threshold=128, **settings)


def test_an_ignore_label_of_a_class_with_values(decide):
    with pytest.raises(UserError, match=r"gives 3 to a class, but config\.data.ignore_label is 3"):
        decide([[0, 3]], classes="a|b 3", ignore_label=3)
    assert decide([[0, 3, 9]], classes="a|b 3", ignore_label=9)[1] == [[[0, 1, IGNORE]]]


def test_cityscapes_ids_and_training_ids(decide):
    table = "name,id,trainId|unlabeled,0,255|road,7,0|car,26,1"
    mask_format, labels = decide([[0, 7, 26]], classes=table)
    assert labels == [[[IGNORE, 0, 1]]]
    assert mask_format.notes[-1] == "masks hold ids of classes.txt"
    mask_format, labels = decide([[0, 1, 255]], classes=table)
    assert labels == [[[0, 1, IGNORE]]]
    assert mask_format.notes[-1] == "masks hold training ids of classes.txt"


def test_ignored_values_other_than_255_do_not_make_masks_doubtful(decide):
    """Real masks of Cityscapes that hold a single class, and void."""
    table = "name,id,trainId|unlabeled,0,255|static,4,255|road,7,0|car,26,1"
    masks_of_ids = [[[7, 26]], [[0, 7]], [[4, 7]]]
    assert decide(*masks_of_ids, classes=table)[1] == [[[0, 1]], [[IGNORE, 0]], [[IGNORE, 0]]]
    mask_format, labels = decide([[0, 1]], [[0, 1]], classes=table.replace("unlabeled,0", "x,9"))
    assert (labels, mask_format.is_unsure) == ([[[0, 1]]] * 2, False)  # the table states 255


def test_colours_of_known_data_sets_need_no_table(decide):
    """Names as in CamVid, in masks that hold its colours, in another order than VOC's map."""
    colors = np.uint8([CAMVID.colors])
    assert decide(colors, classes="|".join(CAMVID.names))[1] == [[[*range(11)]]]
    assert decide([[*range(11)]], classes="|".join(CAMVID.names))[1] == [[[*range(11)]]]
    colors = np.uint8([[*CAMVID.colors, (0, 0, 0)]])
    with pytest.raises(UnknownClassesError, match="sky #808080\nbuilding #800000\n") as error:
        decide(colors, classes="|".join(CAMVID.names))
    assert "bicyclist #0080c0\nclass_11 #000000\n" in str(error.value)


def test_tables_of_other_tools_that_lack_values_are_completed(decide, maker):
    """COCO's categories begin with 1; their masks have 0 beside them."""
    maker.text("classes.json", '{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}')
    with pytest.raises(UnknownClassesError, match="background 0\na 1\nb 2\n"):
        decide([[0, 1, 2]])
    with pytest.raises(UserError, match=r"its values are 1-2\. Write the right ones there"):
        decide([[0, 1, 2]], classes="a 1|b 2")


def test_other_files_of_classes_are_found(decide, maker):
    maker.text("LabelMap.txt", "# label:color_rgb:parts:actions", "other:0,0,0::", "fox:200,0,0::")
    mask_format, labels = decide(COLORED)
    assert (mask_format.labels.names, labels) == (("other", "fox"), [[[0, 1]]])
    maker.text("labels.txt", "__ignore__", "_background_", "fox")
    mask_format, _ = decide(COLORED)
    assert mask_format.labels.names == ("other", "fox")
    assert any("labels.txt is not used" in note for note in mask_format.notes)
    assert decide([[0, 1]], classes="a|b")[0].labels.names == ("a", "b")


def test_a_file_that_names_no_classes_is_not_used(decide, maker):
    maker.text("labels.txt", "a.png: cat, dog", "b.png: cat")
    mask_format, _ = decide([[0, 255]])
    assert mask_format.labels == masks.BINARY
    assert "labels.txt is not used as a file of classes" in mask_format.notes[0]


def test_files_of_classes_in_split_folders(decide, maker):
    for split in ("train", "valid"):
        (maker.root / split).mkdir(parents=True)
        maker.text(f"{split}/_classes.csv", "Pixel Value, Class", "0, background", "1, cat")
    assert decide([[0, 1]])[0].labels.names == ("background", "cat")
    maker.text("valid/_classes.csv", "Pixel Value, Class", "0, background", "1, dog")
    with pytest.raises(UserError, match=r"train/_classes\.csv and .*differ: set .*folder\.classes"):
        decide([[0, 1]])


def test_a_missing_file_of_classes(maker):
    with pytest.raises(UserError, match=r"none\.txt: there is no file of class names"):
        read_mask_format(maker.config(classes=str(maker.root / "none.txt")), [])


def test_two_readings_of_names_are_both_told(decide):
    """Of CamVid's masks, 11 is void; of other sets, 0 is a background without name."""
    with pytest.raises(
        UserError, match=r"m0 0\nm1 1\nignore 2\n.*config\.data\.ignore_label=2"
    ) as error:
        decide([[0, 1, 2]], classes="m0|m1")
    assert not isinstance(error.value, UnknownClassesError)  # which has a file to write
    assert "\nbackground 0\nm0 1\nm1 2\n" in str(error.value)
    with pytest.raises(UserError, match=r"background 0\nm0 1\n(?s:.*)m0 0\nm1 1\nignore 2\n"):
        decide([[0, 1, 2]], classes="m0|m1", masks_hold="ids")
    assert decide([[0, 1, 2]], classes="m0|m1", ignore_label=2)[1] == [[[0, 1, IGNORE]]]


def test_an_ignored_255_is_no_class(decide):
    masks, classes = ([[0, 255]], [[0, 0]]), "a|b|ignore 255"
    with pytest.raises(UserError, match=r"and 255 is ignored\..* are 0-1, 255\."):
        decide(*masks, classes=classes)
    _, labels = decide(*masks, [[0, 1]], classes=classes)
    assert labels == [[[0, IGNORE]], [[0, 0]], [[0, 1]]]
    assert decide(*masks, classes=classes, masks_hold="binary")[1] == labels[:2]


@pytest.mark.parametrize("masks_hold", ["auto", "binary"])
def test_0_of_binary_masks_cannot_be_ignored(decide, masks_hold):
    with pytest.raises(UserError, match="ignore_label is 0, but in masks of 0 and 255, 0 is the"):
        decide([[0, 255]], masks_hold=masks_hold, ignore_label=0)


def test_a_threshold_for_masks_of_two_encodings(decide):
    with pytest.raises(
        UserError, match=r"threshold=128: \S+.*m1.png holds only 0 and 1, others more"
    ):
        decide([[0, 255]], [[0, 1]], threshold=128)
    assert decide([[0, 255]], [[0, 1]], threshold=1)[1] == [[[0, 1]], [[0, 1]]]


def test_a_class_keeps_the_colour_that_an_ignored_one_has_too(decide):
    """As Cityscapes' pole and polegroup; in classes.txt, it is a mistake."""
    table = "name,id,trainId,color|fox,3,0,200 0 0|group,4,255,200 0 0|cat,5,1,0 0 0"
    mask_format, labels = decide(COLORED, classes=table)
    assert labels == [[[1, 0]]]
    assert (
        "fox and ignore have one colour, (200, 0, 0): these pixels are fox" in mask_format.notes[-1]
    )
    with pytest.raises(UserError, match=r"fox and ignore have one colour, \(200, 0, 0\)"):
        decide(COLORED, classes="cat #000000|fox #c80000|ignore #c80000")
