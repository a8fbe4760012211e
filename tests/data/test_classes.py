"""Files of classes: every way to write a class, other tools' files, and errors for other lines."""

import json

import pytest

from deeplab_jax.data import labels
from deeplab_jax.data.io import class_formats, classes
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.utils.errors import UserError


def read(tmp_path, text, name="classes.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return classes.read(path)


def expand(meanings):
    return {value: index for low, high, index in meanings for value in range(low, high + 1)}


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
        ("class 7 1 2 3", "class 7", (1, 2, 3)),
        ("été", "été", None),
        ("car,64,0,128", "car", (64, 0, 128)),
        ("car;64;0;128", "car", (64, 0, 128)),
        ("64 0 128 car", "car", (64, 0, 128)),
    ],
)
def test_lines_of_classes(tmp_path, line, name, color):
    table = read(tmp_path, f"\ufeff# names\r\n\r\n{line}\r\n")
    assert table.labels == labels.LabelSet((name,), (color or (0, 0, 0),))
    assert (table.states_values, table.values) == (False, ((0, 0, 0),))
    value = color and color[0] << 16 | color[1] << 8 | color[2]
    assert table.colors == (((value, value, 0),) if color else ())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a\nb\n", {0: 0, 1: 1}),
        ("a 0\ncrack 255 3 4\n", {0: 0, 255: 1, 3: 1, 4: 1}),
        ("a\ncrack 3, 4, 255\n", {0: 0, 255: 1, 3: 1, 4: 1}),
        ("a 0-2\nb 3-5 9\n", {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 9: 1}),
        ("a 5\nb\n", {5: 0, 1: 1}),
        ("a = 0 1 2\nb = 3 4 5\n", {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}),
        ("class 1 = 4\nclass 2 = 5\n", {4: 0, 5: 1}),
        ("zone 1\nzone 2\n", {0: 0, 1: 1}),
        ("zone 1 7\nzone 2 8\n", {7: 0, 8: 1}),
        ("ignore 255 7-9\na\nb\n", {255: IGNORE, 7: IGNORE, 8: IGNORE, 9: IGNORE, 0: 0, 1: 1}),
        ("a\nignore\n", {0: 0, 1: 1}),  # a name
        ("a 7 #010203\nb 8 #040506\n", {7: 0, 8: 1}),
        ("chest, bureau, box, dresser\nsofa, couch\nN/A\nVehicle::Car\n", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("a 40000\nb 65535\n", {40000: 0, 65535: 1}),
    ],
)
def test_values_of_classes(tmp_path, text, values):
    assert expand(read(tmp_path, text).values) == values


@pytest.mark.parametrize(
    ("text", "colors"),
    [
        ("a 1 2 3\nb 4 5 6\n", {0x010203: 0, 0x040506: 1}),
        ("a #010203 #010204\nb #040506\n", {0x010203: 0, 0x010204: 0, 0x040506: 1}),
        ("a 1 2 3\nb #040506\nignore 7 8 9\n", {0x010203: 0, 0x040506: 1, 0x070809: IGNORE}),
        ("a 1 2 3\nb 4\nc 8 9\n", {}),
    ],
)
def test_colors_of_classes(tmp_path, text, colors):
    assert expand(read(tmp_path, text).colors) == colors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 classes, expected 1 to 255"),
        ("a\n" * 2, r"line 2: the class 'a' is already named"),
        ("a 1 2 3\nb 300 0 0\n", r"line 2: the colour 300 0 0 is not three numbers of 0 to 255"),
        ("car #40008\n", r"line 1: 'car #40008' is not a class"),
        ("a #010203\nb\n", "b has no colour, but others have"),
        ("a 1\nb 2-4\nc 3 7\n", r"value 3 is claimed by b \(line 2\) and c \(line 3\)"),
        ("a\nb\nc 1\n", r"value 1 is claimed by b \(line 2, whose number .* c \(line 3\)"),
        ("a\nignore 0\n", r"value 0 is claimed by a \(line 1, .* and ignore \(line 2\)"),
        ("a 7-5\n", "line 1: 7-5 is not a range"),
        ("a 70000\n", "line 1: 70000 is not a range"),
        ("#include other.txt\na\n", "line 1: '#include other.txt' is not a class"),
        ("a,b,c,d\n", "line 1: 'a,b,c,d' is not a class: expected a name"),
        ("names:\n- a\n- b\n", r"line 1: 'names:' is not a class(?s:.*)line 2: '- a' is not"),
        ("file, x, y\na, 1, b\n", "line 1: 'file, x, y' is not a class"),
        ("a: road\nb: car\n", "line 1: 'a: road' is not a class"),
        ("a\r\n\x1a", r"line 2: '\\x1a' is not a class"),  # the end of a file in DOS
        ("nc = 2\n[names]\n", r"line 2: '\[names\]' is not a class"),
        ("label|count\nroad|many\n", r"line 1: 'label\|count' is not a class"),
        ("name, group\ncat, animal\ncar, vehicle\n", "line 1: 'name, group' is not a class"),
        ("a.jpg\nb.png\n", r"line 1: 'a\.jpg' is not a class(?s:.*)line 2: 'b\.png' is"),
        ("0 0.5 0.25 0.1 0.1\n", "line 1: '0 0.5 0.25 0.1 0.1' is not a class"),  # YOLO's boxes
        ("<xml>\n", "line 1: '<xml>' is not a class"),
        ('{"version": 3', "is not a JSON of classes: expected COCO's categories"),
        ('{"images": []}', "is not a JSON of classes"),
        ('{"info": {"year": "2017"}}', "is not a JSON of classes"),
        ("name,r,g,b\na,1,2,3\nb,4,5\n", "line 3: 'b,4,5' does not fit the columns 'name,r,g,b'"),
        ("name,id\na,x\n", "line 2: 'a,x' does not fit the columns"),
        ("\n".join(f"c{i}" for i in range(256)), "names 256 classes"),
        (b"\xff\xfe\x00", "is not UTF-16 text"),
        (b"\xe9", "is not UTF-8 text"),
    ],
)
def test_wrong_lines_of_classes(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"(?s)classes\.txt.*{message}"):
        read(tmp_path, text)


CITYSCAPES = """
from collections import namedtuple
labels = [
    #       name                     id    trainId   category   ...
    Label(  'unlabeled'            ,  0 ,      255 , 'void'   , 0, False, True , (  0,  0,  0) ),
    Label(  'road'                 ,  7 ,        0 , 'flat'   , 1, False, False, (128, 64,128) ),
    Label(  'car'                  , 26 ,        1 , 'vehicle', 7, True , False, (  0,  0,142) ),
    Label(  'license plate'        , -1 ,       -1 , 'vehicle', 7, False, True , (  0,  0,142) ),
]
"""
ADE20K = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    "1\t0.1576\t11664\t1172\t1\twall\n2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
)
COCO = json.dumps(
    {"categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "dog"}], "images": []}
)


@pytest.mark.parametrize(
    ("text", "names", "values", "colors"),
    [
        pytest.param(
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nfox:160,96,64:a,b:run\n",
            ("background", "fox"),
            {0: 0, 1: 1},
            {0: 0, 0xA06040: 1},
            id="CVAT",
        ),
        pytest.param(
            "__ignore__\n_background_\ncat\n",
            ("_background_", "cat"),
            {0: 0, 1: 1},
            {},
            id="labelme",
        ),
        pytest.param(
            "Pixel Value, Class\n0, background\n2, dog\n",
            ("background", "dog"),
            {0: 0, 2: 1},
            {},
            id="Roboflow",
        ),
        pytest.param(
            "name,r,g,b\nSky,128,128,128\nCar,64,0,128\n",
            ("Sky", "Car"),
            {0: 0, 1: 1},
            {0x808080: 0, 0x400080: 1},
            id="class_dict.csv",
        ),
        pytest.param(
            "64 128 64\tAnimal\n192 0 128\t\tArchway\n",
            ("Animal", "Archway"),
            {0: 0, 1: 1},
            {0x408040: 0, 0xC00080: 1},
            id="label_colors.txt",
        ),
        pytest.param(COCO, ("car", "dog"), {3: 0, 90: 1}, {}, id="COCO"),
        pytest.param('{"0": "wall", "1": "sky"}', ("wall", "sky"), {0: 0, 1: 1}, {}, id="id2label"),
        pytest.param(
            '{"id2label": {"2": "a", "4": "b"}}', ("a", "b"), {2: 0, 4: 1}, {}, id="Transformers"
        ),
        pytest.param('{"a": 3, "b": 5}', ("a", "b"), {3: 0, 5: 1}, {}, id="label2id"),
        pytest.param('["a", "b"]', ("a", "b"), {0: 0, 1: 1}, {}, id="list"),
        pytest.param(
            CITYSCAPES,
            ("road", "car"),
            {7: 0, 26: 1, 0: IGNORE},
            {0x804080: 0, 0x00008E: 1, 0: IGNORE},
            id="labels.py",
        ),
        pytest.param(
            "name,id,trainId\nunlabeled,0,255\ncar,26,1\nroad,7,0\nlicense plate,-1,-1\n",
            ("road", "car"),
            {7: 0, 26: 1, 0: IGNORE},
            {},
            id="Cityscapes csv",
        ),
        pytest.param(
            ADE20K, ("wall", "building, edifice"), {1: 0, 2: 1, 0: IGNORE}, {}, id="ADE20K"
        ),
        pytest.param("0: road\n5: car\n", ("road", "car"), {0: 0, 5: 1}, {}, id="value: name"),
        pytest.param("1. road\n5. car\n", ("road", "car"), {1: 0, 5: 1}, {}, id="value. name"),
        pytest.param("name\nroad\ncar\n", ("road", "car"), {0: 0, 1: 1}, {}, id="one column"),
        pytest.param(
            '{"classes": [{"title": "a", "color": "#804080"}, {"title": "b", "color": "#00008e"}]}',
            ("a", "b"),
            {0: 0, 1: 1},
            {0x804080: 0, 0x00008E: 1},
            id="Supervisely",
        ),
        pytest.param("road,0\ncar,5\n", ("road", "car"), {0: 0, 5: 1}, {}, id="name,value"),
        pytest.param(
            "id\tlabel\tcolor\n4\troad\t#804080\n5\tcar\t#00008e\n",
            ("road", "car"),
            {4: 0, 5: 1},
            {0x804080: 0, 0x00008E: 1},
            id="tsv with hexadecimal colours",
        ),
        pytest.param(
            'class;pixel value\nroad;"1-3"\nignore;0\n',
            ("road",),
            {1: 0, 2: 0, 3: 0, 0: IGNORE},
            {},
            id="csv with ranges",
        ),
    ],
)
def test_files_of_other_tools(tmp_path, text, names, values, colors):
    """Their content tells what they are, whatever their name."""
    for file in ("classes.txt", "x.csv"):
        table = read(tmp_path, text, file)
        assert table.labels.names == names
        assert expand(table.values) == values
        assert expand(table.colors) == colors


def test_the_example_of_errors_is_right(tmp_path):
    assert expand(read(tmp_path, classes.EXAMPLE).values) == {0: 0, 1: 1, 3: 2, 4: 2, 255: 2}


def test_training_ids_of_cityscapes(tmp_path):
    assert expand(read(tmp_path, CITYSCAPES).train_values) == {0: 0, 1: 1, 255: IGNORE}


def test_colors_of_known_classes(tmp_path):
    camvid = [name.upper() for name in labels.CAMVID.names]
    camvid[6] = "Sign_Symbol"
    for names, expected in (
        (camvid, labels.CAMVID.colors),
        (labels.CITYSCAPES.names, labels.CITYSCAPES.colors),
        (labels.VOC.names, labels.VOC.colors),
        (labels.CAMVID.names[::-1], labels.voc_palette(11)),
    ):
        assert read(tmp_path, "\n".join(names)).labels.colors == expected


def test_usual_names_of_files_are_found_in_a_stated_order(tmp_path):
    (tmp_path / "train").mkdir()
    in_split = tmp_path / "train" / "_classes.csv"
    in_split.write_text("")
    assert classes.find(tmp_path) == [in_split]
    found = [tmp_path / name for name in ("Classes.TXT", "labelmap.txt", "obj.names")]
    for path in [*found, tmp_path / "notes.txt"]:
        path.write_text("")
    assert classes.find(tmp_path) == found


def test_one_value_more_than_names_has_two_readings():
    """CamVid's 11 classes in masks of 0 to 11: the names must not be shifted without a word."""
    names, ids = labels.CAMVID.names, range(12)
    text = class_formats.two_readings(names, ids)
    shifted = "\n".join(f"{name} {i}" for i, name in enumerate(names, start=1))
    kept = "\n".join(f"{name} {i}" for i, name in enumerate(names))
    assert f"\nbackground 0\n{shifted}\n" in text
    assert f"\n{kept}\nignore 11\n" in text
    assert "\nignore 11 255\n" in class_formats.two_readings(names, [*ids, 255])
    for others in (range(1, 12), range(11), range(13), [*range(10), 12], [*range(11), 255]):
        assert class_formats.two_readings(names, others) == ""
    assert class_formats.two_readings(["background", *names], range(13)) == ""


@pytest.mark.parametrize(
    ("names", "values", "lines"),
    [
        ("abc", {7, 24, 26}, "a 7|b 24|c 26"),
        ("abc", {1, 2, 3}, "a 1|b 2|c 3"),
        ("abc", {0, 127, 255}, "a 0|b 127|c 255"),
        ("abc", {1, 2, 3, 255}, "a 1|b 2|c 3|ignore 255"),
        ("ab", {0, 1, 2}, ""),  # 0 or 2 has no name
        ("a", {0, 1}, "background 0|a 1"),
        ("a", {0, 255}, "background 0|a 255"),
        (["class 7", "b"], {5, 9}, "class 7 = 5|b 9"),
        ("abc", {7, 24}, ""),
        ("abc", {0, 1, 11}, ""),  # 11 is a mistake, not c
        ("ab", {-1, 3}, ""),
        ("abc", {0, 1, 2, 3, 255}, ""),  # 0 or 3 has no name
        ("ab", {0, 127, 255}, "background 0|a 127|b 255"),
        (["background", "a"], {0, 1, 2}, ""),  # 2 may be void, or 0 without data
    ],
)
def test_names_without_values_get_those_of_the_masks_in_order(tmp_path, names, values, lines):
    text = class_formats.assign_names(names, values)
    assert text == lines.replace("|", "\n")
    if text:
        assert {*expand(read(tmp_path, text).values)} == values
