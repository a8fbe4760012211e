"""Lists, tables and class files as Windows, spreadsheets and other projects write them."""

import os

import pytest

from deeplab_jax.data.datasets import voc
from deeplab_jax.data.datasets.folder_layout import detect_layout
from deeplab_jax.data.io import classes
from deeplab_jax.utils.errors import UserError
from own_data import Maker

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.fixture
def maker(tmp_path):
    result = Maker(tmp_path / "data")
    for name in ("a", "b", "c d", "sub/e"):
        folder, _, stem = name.rpartition("/")
        result.pair(stem, folder=folder)
    result.text("classes.txt", "sky", "traffic light", "car")
    result.text("val.txt", "sub/e")
    return result


def expect_train(maker, text, names):
    (maker.root / "train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    maker.expect(maker.load("train"), names)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings(maker, encoding, newline):
    expect_train(maker, newline.join(["a", "b.png", ""]).encode(encoding), "ab")
    (maker.root / "classes.txt").write_bytes(newline.join("xyz").encode(encoding))
    assert classes.read(maker.root / "classes.txt").labels.names == ("x", "y", "z")
    path = maker.root / "pairs.csv"
    path.write_bytes(newline.join(["image,mask", "images/a.png,masks/a.png"]).encode(encoding))
    maker.root = path
    assert sum(map(len, detect_layout(maker.config()).splits.values())) == 1


def test_other_encodings_are_named(maker):
    path = maker.root / "classes.txt"
    path.write_bytes("sky\ncar\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"classes\.txt: .*UTF-16 text without .* Save it as UTF-8"):
        classes.read(path)
    path.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt: is not UTF-8 text"):
        classes.read(path)
    path.write_bytes(b"\xff\xfea")  # half a character
    with pytest.raises(UserError, match="is not UTF-16 text"):
        classes.read(path)
    maker.pair("café")
    (maker.root / "train.txt").write_bytes("café\n".encode("latin-1"))
    (problem,) = detect_layout(maker.config()).problems
    assert "save the file as UTF-8" in problem


@pytest.mark.parametrize(
    "lines",
    [
        ["images/a.png", "./images/b.png", "images/c d.png"],
        ["images\\a.png", ".\\images\\b.png", "images\\c d.png"],
        ["/home/me/data/images/a.png", "D:\\data\\images\\b.png", "data/images/c d"],
        ["a.png masks/a.png", "b b", "c d"],
        ["a.png\tmasks/a.png", "b.png\tmasks/b.png", "c d.png\tmasks/c d.png"],
        ["images/a.png, masks/a.png", "b,b", "c d,c d"],
        ["a;a", "b.png ; b.png", "c d;masks\\c d.png"],
        ['"a.png"', "'b'", '"c d"'],
        ["a.jpg", "b.JPG", "c d.png"],
    ],
)
def test_lines_that_name_images(maker, lines):
    expect_train(maker, "\n".join(lines), ["a", "b", "c d"])


def test_a_list_of_pairs_says_which_mask_belongs_to_an_image(maker):
    (maker.root / "masks/a.png").rename(maker.root / "masks/other.png")
    expect_train(maker, "a.png other.png\nb.png b.png\na.png other.png\n", "ab")
    maker.text("train.txt", "a.png other.png", "a.png b.png")
    (problem,) = detect_layout(maker.config()).problems
    assert "names two masks of a" in problem


def test_subfolders_stay_part_of_the_name(maker):
    maker.text("val.txt", "a")
    expect_train(maker, "images\\sub\\e.png\nsub\\e.png masks/sub/e.png", ["sub/e"])
    (maker.root / "train.txt").write_text("other/b.png\n")  # is not b.png
    assert "names other/b, but there is no" in detect_layout(maker.config()).problems[0]


@pytest.mark.parametrize("line", ["a 1", "a  -1", "a.png none.png", "a.png a.png a.png"])
def test_other_columns_are_refused_with_a_line_that_would_work(maker, line):
    (maker.root / "train.txt").write_text(f"{line}\n")
    (problem,) = detect_layout(maker.config()).problems
    assert (
        f"train.txt: has the line {line!r}; expected the name of an image, as in a, or" in problem
    )


def test_a_list_of_a_class_is_not_one_of_voc(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("2007_000032 -1\n2007_000039  1\n")
    with pytest.raises(UserError, match=r"train\.txt: has a second column.*as in 2007_000032"):
        voc.read_list(path)
    path.write_bytes("2007_000032\r\n2007_000039\r\n".encode("utf-16"))
    assert voc.read_list(path) == ["2007_000032", "2007_000039"]


@pytest.mark.parametrize(
    "text",
    [
        "image;mask;split\nimages/a.png;masks/a.png;train\nimages/b.png;masks/b.png;val",
        "image\tmask\tsplit\nimages/a.png\tmasks/a.png\ttrain\nimages/b.png\tmasks/b.png\tval",
        "image|mask|split\nimages/a.png|masks/a.png|train\nimages/b.png|masks/b.png|val",
        "sep=;\r\nimage;mask;split\r\nimages/a.png;masks/a.png;train\r\n"
        "images/b.png;masks/b.png;val\r\n",
        "image,mask,split\nimages\\a.png,masks\\a.png,train\n.\\images\\b.png,masks\\b.png,val",
        'Image,Mask,Split\n"images/a.png","masks/a.png","train"\nimages/b.png,masks/b.png,val',
    ],
)
def test_tables(maker, text):
    maker.text("pairs.csv", text)
    maker.root = maker.root / "pairs.csv"
    layout = detect_layout(maker.config())
    assert layout.problems == []
    names = {split: [pair.name for pair in pairs] for split, pairs in layout.splits.items()}
    assert names == {"train": ["images/a"], "val": ["images/b"]}


def test_a_path_that_no_file_can_have_is_a_problem_of_its_line(maker):
    maker.text("pairs.csv", "image;mask", f"images/{'x' * 300}.png;masks/a.png")
    maker.root = maker.root / "pairs.csv"
    (problem,) = detect_layout(maker.config()).problems
    assert "line 2 names images/xxx" in problem


def test_lines_of_a_table_are_counted_as_an_editor_does(maker):
    maker.text("pairs.csv", "sep=;", "image;mask", "images/a.png;masks/none.png")
    maker.root = maker.root / "pairs.csv"
    assert "line 3 names masks/none.png" in detect_layout(maker.config()).problems[0]


def test_a_table_in_another_encoding(maker):
    maker.pair("café")
    path = maker.root / "pairs.csv"
    path.write_bytes("image,mask\nimages/café.png,masks/café.png".encode("cp1252"))
    assert os.path.exists(path)
    maker.root = path
    assert "save the file as UTF-8" in detect_layout(maker.config()).problems[0]


@pytest.mark.parametrize("name", ["Train.txt", "TRAIN.TXT", "training.txt"])
def test_lists_of_other_names_are_not_passed_over(maker, name):
    (maker.root / name).write_text("a\n")
    maker.expect(maker.load("train"), "a")
    if name.lower() != "train.txt":
        maker.text("train.txt", "b")
        (problem,) = detect_layout(maker.config()).problems
        paths = f"{maker.root / 'train.txt'} and {maker.root / name}"
        assert problem == f"{paths} both mean train. Merge them, or rename one"


def test_another_form_of_unicode_is_found_or_named(maker):
    """As of archives that were made on macOS."""
    maker.pair("cafe\u0301")
    for name in ("caf\u00e9", "cafe\u0301", "images/caf\u00e9.png masks/caf\u00e9.png"):
        maker.text("train.txt", name)
        layout = detect_layout(maker.config())
        assert (layout.problems, len(layout.splits["train"])) == ([], 1)
    maker.text("pairs.csv", "image,mask", "images/caf\u00e9.png,masks/cafe\u0301.png")
    maker.root = maker.root / "pairs.csv"
    (problem,) = detect_layout(maker.config()).problems
    assert "another form of Unicode" in problem


@pytest.mark.parametrize(
    "line",
    ["car (64, 0, 128)", "car rgb(64,0,128)", "64 0 128", "car 64;0;128", "car,64,0,128,1"],
)
def test_colours_in_other_forms_are_no_part_of_a_name(tmp_path, line):
    (tmp_path / "classes.txt").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"is not a class: expected a name .* `car 64 0 128`"):
        classes.read(tmp_path / "classes.txt")


def test_a_folder_in_a_table_is_named_as_one(maker):
    maker.text("pairs.csv", "image,mask", "images,masks/a.png")
    maker.root = maker.root / "pairs.csv"
    (problem,) = detect_layout(maker.config()).problems
    assert problem.endswith("line 2 names images, which is a folder")
