"""What masks hold is recognised, and the proposed file of classes gives every value a class."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import labels
from deeplab_jax.data.io import classes, mask_survey
from deeplab_jax.data.io.class_formats import Entry
from deeplab_jax.utils.errors import UserError


def write(folder, *masks, suffix=".png", **options):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}{suffix}" for index in range(len(masks))]
    for path, mask in zip(paths, masks, strict=True):
        array = mask if isinstance(mask, Image.Image) else Image.fromarray(np.uint8(mask))
        array.save(path, **options)
    return [mask_survey.sample_mask(path) for path in paths]


def named(*names, values=(), colors=()):
    """A table of a file of classes, which states values or colours if they are given."""
    ids = [(index, index, index) for index in range(len(names))]
    return classes.ClassTable(
        path=pathlib.Path("classes.txt"),
        kind="",
        labels=labels.named(*names),
        values=tuple(values or ids),
        states_values=bool(values),
        colors=tuple(colors),
    )


def row(*values):
    """A mask with some pixels of each value."""
    return np.repeat(np.array(values), 5)[None]


def square(value=255):
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 8:40] = value
    return mask


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ([row(0, 255)], "background 0|foreground 255"),
        ([row(0, 255), row(0, 3, 4, *[255] * 5)], "background 0|foreground 3 4 255"),
        ([row(0, 1), row(0, 255, 255)], "background 0|foreground 1 255"),
        ([row(0, 1, 255)], "background 0|class_1 1|ignore 255"),
        ([row(0, 1, 2)], "background 0|class_1 1|class_2 2"),
        ([row(0, 1, 2, 255), row(0, 255)], "background 0|class_1 1|class_2 2|ignore 255"),
        ([row(1, 2, 3)], "# a trimap of Oxford-IIIT Pet: 1 animal, 2 background, 3 border|"
                         "class_1 1|class_2 2|class_3 3"),
        ([row(7, 24, 26)], "class_7 7|class_24 24|class_26 26"),
        ([row(0, 127, 255)], "background 0|class_127 127|class_255 255"),
        ([row(0, 85, 170, 255)], "background 0|class_85 85|class_170 170|class_255 255"),
        ([row(*range(0, 256, 4), 255)], "background 0-127|foreground 128-255"),  # smooth edges
        ([np.dstack([row(0, 255)] * 3)], "background 0|foreground 255"),
        ([Image.fromarray(row(0, 255).astype(np.uint8)).convert("1")], "background 0|foreground 1"),
    ],
)  # fmt: skip
def test_encodings_without_names(tmp_path, masks, text):
    samples = write(tmp_path / "masks", *masks)
    proposal = mask_survey.propose_classes(samples)
    assert proposal == text.replace("|", "\n") + "\n"
    (tmp_path / "classes.txt").write_text(proposal)
    table = classes.read(tmp_path / "classes.txt")
    known = {v for low, high, _ in table.values for v in range(low, high + 1)}
    assert set().union(*(sample.numbers for sample in samples)) <= known


@pytest.mark.parametrize(
    ("masks", "names", "text"),
    [
        ([row(1, 2, 3)], "abc", "a 1|b 2|c 3"),
        ([row(7, 24, 26)], "abc", "a 7|b 24|c 26"),
        ([row(0, 255)], "ab", "a 0|b 255"),
        ([row(0, 255)], ["crack"], "background 0|crack 255"),
        ([row(0, 255), row(0, 3, 4, *[255] * 5)], "ab", "a 0|b 3 4 255"),
        ([row(0, 1, 2, 9)], "abcd", "a 0|b 1|c 2|d 3|class_9 9"),
        ([row(1, 2, 3)], "ab", "a 1|b 2|class_3 3"),
        ([row(1, 2, 3)], ["background", "a"], "background 0|a 1|class_2 2|class_3 3"),
        (
            [row(*range(9))],
            "abc",
            "background 0|" + "|".join(f"class_{i} {i}" for i in range(1, 9)),
        ),
        ([row(0, 127, 255)], "ab", "background 0|a 127|b 255"),
        ([row(*range(4))], ["background", "a", "b"], "background 0|a 1|b 2|class_3 3"),
    ],
)
def test_names_keep_their_order(tmp_path, masks, names, text):
    samples = write(tmp_path, *masks)
    assert mask_survey.propose_classes(samples, named(*names)) == text.replace("|", "\n") + "\n"


def test_two_readings_of_names_are_no_proposal(tmp_path):
    with pytest.raises(UserError, match=r"4 names(?s:.*)d 4\nIf a is 0(?s:.*)d 3\nignore 4\n"):
        mask_survey.propose_classes(write(tmp_path, row(*range(5))), named(*"abcd"))


def test_names_of_one_colour_are_no_proposal(tmp_path):
    samples = write(tmp_path, np.uint8([[(0, 0, 0), (200, 0, 0), (0, 200, 0)]]))
    fox, group = ((0xC80000, 0xC80000, index) for index in (1, labels.IGNORE))
    table = named("cat", "fox", colors=[(0, 0, 0), fox, group])
    assert "fox #c80000\n" in mask_survey.propose_classes(samples, table)
    with pytest.raises(UserError, match="classes have one colour"):
        mask_survey.propose_classes(samples, named("a", "b", colors=[fox, (0xC80000, 0xC80000, 0)]))


def test_values_of_other_files_are_kept(tmp_path):
    """The table of another tool lacks the background, and has several values a class."""
    samples = write(tmp_path, row(0, 1, 2, 3, 5))
    values = [(3, 3, 0), (1, 2, 0), (4, 4, 1), (9, 9, labels.IGNORE)]
    text = mask_survey.propose_classes(samples, named("fox", "cat", values=values))
    assert text == "background 0\nfox 1-3\ncat 4\nclass_5 5\nignore 9\n"


def test_the_ignored_value_is_no_class(tmp_path):
    samples = write(tmp_path, row(0, 1, 2, 9))
    text = mask_survey.propose_classes(samples, named("a", "b", "void"), ignore_label=2)
    assert text == "a 0\nb 1\nclass_9 9\n"


def test_jpeg_gives_ranges(tmp_path):
    samples = write(tmp_path / "a", square(), suffix=".jpg", quality=85)
    assert mask_survey.propose_classes(samples) == "background 0-127\nforeground 128-255\n"
    thin = np.zeros((200, 200), np.uint8)
    thin[100, 20:60] = 255
    samples = write(tmp_path / "b", thin, suffix=".jpg", quality=85)
    assert mask_survey.propose_classes(samples) == "background 0-127\nforeground 128-255\n"
    levels = np.maximum(square(), np.roll(square(127), 25, axis=1))
    samples = write(tmp_path / "c", levels, suffix=".jpg", quality=95)
    assert mask_survey.propose_classes(samples, named(*"abc")) == "a 0-63\nb 64-190\nc 191-255\n"


def test_jpeg_of_ids_cannot_be_mended(tmp_path):
    samples = write(tmp_path, square(2), suffix=".jpg", quality=85)
    with pytest.raises(UserError, match=r"0\.jpg: JPEG changes values.* save masks as PNG"):
        mask_survey.propose_classes(samples)


def test_colours_in_jpegs_cannot_be_mended(tmp_path):
    colored = np.uint8([(0, 0, 0), (200, 0, 0)])[square(1)]
    with pytest.raises(UserError, match=r"0\.jpg: JPEG changes values.* save masks as PNG"):
        mask_survey.propose_classes(write(tmp_path, colored, suffix=".jpg", quality=85))


def test_colors(tmp_path):
    palette = np.uint8([labels.VOC.colors[i] for i in (0, 15, 7)] + [(224, 224, 192)])
    samples = write(tmp_path, palette[[[0, 1, 3]]], palette[[[0, 2]]])
    expected = "background #000000\nclass_1 #808080\nclass_2 #c08080\nignore #e0e0c0\n"
    assert mask_survey.propose_classes(samples) == expected
    assert "b #808080" in mask_survey.propose_classes(samples, named(*"abc"))
    one = mask_survey.propose_classes(samples[:1], named("fox"))
    assert one == "background #000000\nfox #c08080\nignore #e0e0c0\n"
    colors = [(0, 0, 0), (0xC08080, 0xC08080, 1), (0xC08081, 0xC08081, 1)]
    some = mask_survey.propose_classes(samples, named("sky", "fox", colors=colors))
    assert some == "sky #000000\nfox #c08080 #c08081\nclass_2 #808080\nignore #e0e0c0\n"
    (tmp_path / "classes.txt").write_text(expected)
    assert len(classes.read(tmp_path / "classes.txt").colors) == 4


def test_photos_are_not_masks(tmp_path):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (20, 20, 3))
    with pytest.raises(UserError, match="hold 400 colours, too many for classes"):
        mask_survey.propose_classes(write(tmp_path, photo))
    with pytest.raises(UserError, match=r"values \(1, 2, .*too many for classes"):
        mask_survey.propose_classes(write(tmp_path, np.arange(1, 200)[None]))


def test_colours_and_ids_in_one_set_are_named(tmp_path):
    colored = np.uint8([[(0, 0, 0), (200, 0, 0)]])
    samples = write(tmp_path, colored, row(0, 1, 2))
    with pytest.raises(UserError, match=r"two encodings: \S+0\.png .*#c80000.*1\.png .*0, 1, 2"):
        mask_survey.propose_classes(samples)
    samples = write(tmp_path, colored, row(0))  # black is a colour too
    assert mask_survey.propose_classes(samples) == "background #000000\nclass_1 #c80000\n"


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_samples_count_pixels(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    ids = np.array([[0, 0, 300]], np.uint16)
    np.save(path, ids) if suffix == ".npy" else Image.fromarray(ids).save(path)
    sample = mask_survey.sample_mask(path)
    assert (sample.kind, sample.numbers) == ("grey", {0: 2, 300: 1})


def test_entries_without_values_are_classes_even_if_their_name_is_ignore():
    assert not Entry(1, "ignore").is_ignored
    assert Entry(1, "Ignore", ((255, 255),)).is_ignored
