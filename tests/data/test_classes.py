"""classes.txt: every way to write a class, and errors for other lines."""

import pytest

from deeplab_jax.data import labels
from deeplab_jax.data.io import classes
from deeplab_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("line", "name", "color"),
    [
        ("car", "car", None),
        ("  traffic light  ", "traffic light", None),
        ("traffic light 1 2 3", "traffic light", (1, 2, 3)),
        ("car 1, 2, 3  # a comment", "car", (1, 2, 3)),
        ("car #400080", "car", (64, 0, 128)),
        ("car #400080 # one", "car", (64, 0, 128)),
        ("car # 400080", "car", None),
        ("class 7", "class 7", None),
        ("été", "été", None),
    ],
)
def test_lines_of_classes(tmp_path, line, name, color):
    (tmp_path / "classes.txt").write_text(f"\ufeff# names\r\n\r\n{line}\r\n", encoding="utf-8")
    read = classes.read(tmp_path / "classes.txt")
    assert read == labels.LabelSet((name,), (color or (0, 0, 0),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 classes, expected 1 to 255"),
        ("a\n" * 2, r"line 2: the class 'a' is already named"),
        ("a\nb 300 0 0\n", r"line 2: the colour 300 0 0 has a number greater than 255"),
        ("car #40008\n", r"line 1: 'car #40008' is not a class"),
        ("a 1 2 3\nb\n", "b has no colour, but others have"),
        ("\n".join(f"c{i}" for i in range(256)), "names 256 classes"),
        (b"\xff\xfe\x00", "is not UTF-16 text"),
        (b"\xe9", "is not UTF-8 text"),
    ],
)
def test_wrong_lines_of_classes(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"(?s)classes\.txt.*{message}"):
        classes.read(path)


def test_colors_of_known_classes(tmp_path):
    path = tmp_path / "classes.txt"
    camvid = [name.upper() for name in labels.CAMVID.names]
    camvid[6] = "Sign_Symbol"
    for names, expected in (
        (camvid, labels.CAMVID.colors),
        (labels.CITYSCAPES.names, labels.CITYSCAPES.colors),
        (labels.VOC.names, labels.VOC.colors),
        (labels.CAMVID.names[::-1], labels.voc_palette(11)),
    ):
        path.write_text("\n".join(names))
        assert classes.read(path).colors == expected
