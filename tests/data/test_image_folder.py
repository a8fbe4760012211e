"""A user's own images and masks: every format gives the examples that were written."""

import dataclasses
import io
import pickle
import random
import re
import struct

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
from deeplab_jax import data
from deeplab_jax.config import Config, DataConfig
from deeplab_jax.config.rules import validate
from deeplab_jax.data import labels, pipeline
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.io import images, masks
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.train import resolve_architecture, train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import initialize, saved_model
from own_data import COLORS, NAMES


@pytest.mark.parametrize("encoding", ["ids", "palette"])
@pytest.mark.parametrize("ignore", [255, 3, 77])
def test_ids_with_any_ignore_label(maker, encoding, ignore):
    maker.pair("a", folder="train", ignore=ignore, encoding=encoding)
    dataset = maker.load(ignore_label=ignore)
    maker.expect(dataset, "a")
    assert dataset.labels.names == NAMES


def test_an_ignored_last_class_is_not_a_class_of_the_model(maker):
    maker.text("classes.txt", *NAMES, "void")
    maker.pair("a", folder="train", ignore=3)
    dataset = maker.load(ignore_label=3)
    assert dataset.labels.names == NAMES
    maker.expect(dataset, "a")
    maker.labels["a"][maker.labels["a"] == 1] = IGNORE
    maker.labels["a"][1, 1] = 3
    middle = maker.load(ignore_label=1)
    assert middle.labels.names == (*NAMES, "void")
    maker.expect(middle, "a")


@pytest.mark.parametrize("written", ["decimal", "hex", "void"])
def test_colors(maker, written):
    lines = {
        "decimal": [f"{n} {r}, {g} {b}" for n, (r, g, b) in zip(NAMES, COLORS, strict=True)],
        "hex": [f"{n} #{r:02x}{g:02X}{b:02x}" for n, (r, g, b) in zip(NAMES, COLORS, strict=True)],
    }
    lines["void"] = [*lines["hex"], "void 224 224 192"]
    maker.text("classes.txt", "# of mine", *lines[written])
    maker.pair("a", folder="train", encoding="colors")
    # 255 is VOC's border, whose colour this is; else it is the last line's.
    dataset = maker.load(masks_hold="colors", ignore_label=3 if written == "void" else 255)
    assert dataset.labels == labels.LabelSet(NAMES, COLORS)
    maker.expect(dataset, "a")


def test_colors_of_a_palette_are_colors(maker):
    maker.text("classes.txt", "a 9 9 9", "b 1 2 3", "c 200 0 0")
    maker.pair("a", folder="train")
    mask = Image.fromarray(np.array([[5, 7], [8, 5]], np.uint8)).convert("P")
    palette = np.zeros((256, 3), np.uint8)
    palette[[5, 7, 8]] = (200, 0, 0), (9, 9, 9), (1, 2, 3)
    mask.putpalette(palette.tobytes())
    mask.putdata([5, 7, 8, 5])
    mask.save(maker.root / "masks/train/a.png")
    maker.save(maker.root / "images/train/a.png", np.zeros((2, 2, 3), np.uint8))
    label = maker.load(masks_hold="colors").source[0]["label"]
    assert label.tolist() == [[2, 0], [1, 2]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_binary(maker, mode):
    maker.text("classes.txt", "road", "crack")
    maker.pair("a", folder="train")
    maker.labels["a"] = (maker.labels["a"] == 1).astype(np.uint8)
    picture = Image.fromarray(maker.labels["a"] * 255).convert(mode)
    picture.save(maker.root / "masks/train/a.png")
    dataset = maker.load(masks_hold="binary")
    assert dataset.labels.names == ("road", "crack")
    maker.expect(dataset, "a")
    (maker.root / "classes.txt").unlink()
    assert maker.load(masks_hold="binary").labels.names == ("background", "foreground")


def test_binary_with_an_ignored_grey(maker):
    maker.pair("a", folder="train")
    (maker.root / "classes.txt").unlink()
    Image.fromarray(np.array([[0, 255, 128]], np.uint8)).save(maker.root / "masks/train/a.png")
    maker.save(maker.root / "images/train/a.png", np.zeros((1, 3, 3), np.uint8))
    label = maker.load(masks_hold="binary", ignore_label=128).source[0]["label"]
    assert label.tolist() == [[0, 1, IGNORE]]
    with pytest.raises(
        UserError, match=r"a\.png: value 128, first at pixel x 2, y 0, .*\(0, 255\)"
    ):
        maker.load(masks_hold="binary")


def with_channels(maker, suffix, write, image):
    maker.pair("a", folder="train")
    path = maker.root / "images/train/a.png"
    path.unlink()
    write(path.with_suffix(suffix))
    maker.images["a"] = image
    return maker.load(channels=image.shape[2])


def test_grey_images(maker):
    image = maker.rng.integers(0, 256, (7, 9, 1), np.uint8)
    dataset = with_channels(maker, ".png", Image.fromarray(image[..., 0]).save, image)
    assert dataset.num_channels == 1
    maker.expect(dataset, "a")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tga"])
def test_rgba_images(maker, suffix):
    image = maker.rng.integers(0, 256, (7, 9, 4), np.uint8)
    maker.expect(with_channels(maker, suffix, Image.fromarray(image).save, image), "a")


@pytest.mark.parametrize("channels", [2, 4, 7])
@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_images_of_many_channels(maker, channels, kind):
    image = maker.rng.integers(0, 256, (7, 9, channels), np.uint8)

    def write(path):
        if kind == "npy":
            np.save(path, image)
        else:
            pages = [Image.fromarray(image[..., channel]) for channel in range(channels)]
            pages[0].save(path, save_all=True, append_images=pages[1:])

    dataset = with_channels(maker, f".{kind}", write, image)
    maker.expect(dataset, "a")
    config = DataConfig(mean=(0.5,) * channels, std=(0.5,) * channels, crop_size=(5,))
    config.num_workers = 0
    with pipeline.train_batches(dataset, config, batch_size=2, seed=0, start_step=0) as batches:
        assert next(batches)["image"].shape == (2, 5, 5, channels)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    image = np.array([[[0x1234, 0xFFFF, 0x00FF]]], np.uint16)
    rows = b"\0" + image.astype(">u2").tobytes()
    pages = [Image.fromarray(image[..., channel]) for channel in range(3)]
    pages[0].save(tmp_path / "grey.png")
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:] * 2)
    read = images.read_image(tmp_path / "pages.tif", 5)
    assert read[0, 0].tolist() == [0x12, 0xFF, 0x00, 0xFF, 0x00]
    assert images.read_image(tmp_path / "grey.png", 1)[0, 0].tolist() == [0x12]
    (tmp_path / "rgb.png").write_bytes(png(1, 1, 16, 2, rows))
    assert images.read_image(tmp_path / "rgb.png")[0, 0].tolist() == [0x12, 0xFF, 0x00]
    rgba = b"\0" + struct.pack(">4H", 0x0102, 0x0304, 0x0506, 0x0708)
    (tmp_path / "rgba.png").write_bytes(png(1, 1, 16, 6, rgba))
    assert images.read_image(tmp_path / "rgba.png", 4)[0, 0].tolist() == [1, 3, 5, 7]


def png(width, height, bits, color_type, rows):
    import zlib

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3), (7, 9, 4)])
def test_unexpected_channels(maker, shape):
    maker.pair("a", folder="train")
    maker.save(maker.root / "images/train/a.png", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"a\.png: has \d channels.*folder\.channels is 6"):
        maker.load(channels=6)
    np.save(maker.root / "images/train/a.npy", np.zeros(shape, np.uint8))
    (maker.root / "images/train/a.png").unlink()
    with pytest.raises(UserError, match=r"a\.npy: must be uint8 \[height, width, 6\]"):
        maker.load(channels=6)


def test_a_numpy_mask(maker):
    maker.pair("a", folder="train")
    (maker.root / "masks/train/a.png").unlink()
    np.save(maker.root / "masks/train/a.npy", maker.labels["a"].astype(np.int64))
    maker.expect(maker.load(), "a")
    np.save(maker.root / "masks/train/a.npy", maker.labels["a"] + 0.5)
    with pytest.raises(UserError, match=r"a\.npy: holds .*must be whole numbers"):
        maker.load()


def test_sizes_must_agree(flat):
    flat.save(flat.root / "masks/b.png", np.zeros((9, 7), np.uint8))
    with pytest.raises(UserError, match=r"b\.png: is 7 x 9 pixels .*b\.png is 9 x 7\. .*size"):
        flat.load()


def test_a_turned_image_is_named_as_such(flat):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(flat.images["b"]).save(flat.root / "images/b.png", exif=exif)
    flat.save(flat.root / "masks/b.png", np.zeros((9, 7), np.uint8))
    with pytest.raises(UserError, match=r"9 x 7 as stored \(viewers apply EXIF orientation 6\)"):
        flat.load()


def test_unknown_colors_are_located_with_the_nearest_class(maker):
    maker.text("classes.txt", "sky 10 20 30", "car 64 0 128")
    mask = np.full((7, 9, 3), (64, 0, 128), np.uint8)
    mask[5, 8] = (63, 1, 128)
    mask[6, :2] = (255, 0, 0)
    maker.pair("a", folder="train")
    maker.save(maker.root / "masks/train/a.png", mask)
    with pytest.raises(UserError) as error:
        maker.load(masks_hold="colors")
    assert re.search(
        r"a\.png: colour \(63, 1, 128\) and 1 others, first at pixel x 8, y 5, .*"
        r"nearest is car \(64, 0, 128\) \(3 pixels\)",
        str(error.value),
    )


def test_an_unknown_id_is_located_with_the_setting_that_fixes_it(flat):
    mask = np.zeros((7, 9), np.uint8)
    for name in "ab":
        flat.save(flat.root / f"masks/{name}.png", mask)
    mask[4, 2:] = 11
    flat.save(flat.root / "masks/b.png", mask)
    with pytest.raises(
        UserError,
        match=r"b\.png: id 11, first at pixel x 2, y 4, .*\(0-2, 255\).*\(7 pixels\).*"
        r"ignore_label=11",
    ):
        flat.load()
    assert (flat.load(ignore_label=11).source[1]["label"][4, 2:] == IGNORE).all()


@pytest.mark.parametrize("value", [-1, -256, 256, 2**31 - 1])
def test_ids_beyond_a_byte(flat, value):
    (flat.root / "masks/b.png").unlink()
    np.save(flat.root / "masks/b.npy", np.full((7, 9), value, np.int64))
    with pytest.raises(UserError, match=rf"b\.npy: id {value}, first at pixel x 0, y 0"):
        flat.load()


@pytest.mark.parametrize(
    ("encoding", "mask", "message"),
    [
        ("ids", np.array([[0, 255]]), r"masks_hold=binary"),
        ("binary", np.array([[0, 1]]), r"masks_hold=ids"),
        ("colors", np.array([[0, 1]]), r"masks_hold=ids"),
        ("colors", np.array([[0, 255]]), r"masks_hold=binary"),
        ("ids", np.array([[[1, 1, 2], [2, 2, 3]]]), r"masks_hold=colors"),
    ],
)
def test_a_wrong_mask_format_is_reported_with_the_right_one(maker, encoding, mask, message):
    maker.pair("a", folder="train")
    maker.save(maker.root / "images/train/a.png", np.zeros((1, 2, 3), np.uint8))
    maker.save(maker.root / "masks/train/a.png", mask.astype(np.uint8))
    maker.text("classes.txt", "a 1 1 2", "b 2 2 3")
    with pytest.raises(UserError, match=message):
        maker.load(masks_hold=encoding, ignore_label=7)


def test_masks_as_jpeg_are_named_as_the_cause(maker):
    maker.pair("a", folder="train")
    (maker.root / "masks/train/a.png").unlink()
    Image.fromarray(maker.labels["a"]).save(maker.root / "masks/train/a.jpg", quality=50)
    with pytest.raises(UserError, match=r"a\.jpg.*JPEG changes values"):
        maker.load()


def test_no_file_of_classes(maker):
    maker.pair("a", folder="train", ignore=9)
    (maker.root / "classes.txt").unlink()
    with pytest.raises(UserError) as error:
        maker.load(ignore_label=9)
    assert re.search(
        r"(?s)classes\.txt: there is no file of class names\. The masks hold 0, 1, 2, 9\. To "
        r"write\n"
        r"background 0\nclass_1 1\nclass_2 2\ninto classes\.txt, .*run\n"
        r"  deeplab-jax data check '.*/my data' --write-classes",
        str(error.value),
    )
    (maker.root.parent / "names").write_text("\n".join(NAMES))
    dataset = maker.load(ignore_label=9, classes=str(maker.root.parent / "names"))
    assert dataset.labels.names == NAMES
    maker.pair("a", folder="train", encoding="colors")
    with pytest.raises(
        UserError, match=r"no file of class names.*\nclass_0 #400080\nclass_1 #0a141e\n"
    ):
        maker.load(masks_hold="colors")


def test_two_classes_of_one_color(maker):
    maker.text("classes.txt", "a 1 2 3", "b 4 5 6", "c 1 2 3")
    maker.pair("a", folder="train")
    with pytest.raises(UserError, match=r"a and c have one colour, \(1, 2, 3\)"):
        maker.load(masks_hold="colors")
    assert maker.load().labels.names == ("a", "b", "c")


def test_binary_needs_two_classes(maker):
    maker.pair("a", folder="train")
    with pytest.raises(UserError, match=r"names 3 classes.*two: that of 0, then that of 255"):
        maker.load(masks_hold="binary")


def jpeg(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", ["empty", "a text file", "truncated"])
@pytest.mark.parametrize("kind", ["images/b.jpg", "masks/b.png"])
def test_broken_files_are_named(flat, content, kind):
    (flat.root / "images/b.png").unlink()
    (flat.root / "images/b.jpg").write_bytes(jpeg(flat.rng.integers(0, 256, (7, 9, 3), np.uint8)))
    assert len(flat.load().source) == 2
    path = flat.root / kind
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "a text file": b"no image"}.get(content, whole[:-30]))
    with pytest.raises(UserError, match=rf"{kind}: is {content}"):
        flat.load()


def test_a_truncated_jpeg_is_noticed_where_opencv_fills_it_up(flat, monkeypatch):
    monkeypatch.setattr(images, "_decode", lambda *_: np.zeros((7, 9, 3), np.uint8))
    path = flat.root / "cut.jpg"
    whole = jpeg(flat.images["a"])
    path.write_bytes(whole)
    assert images.read_image(path).shape == (7, 9, 3)
    path.write_bytes(whole + b"appended by some camera" * 500)
    assert images.read_image(path).shape == (7, 9, 3)
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut\.jpg: is truncated"):
        images.read_image(path)


def test_an_error_in_a_worker_names_the_file(flat):
    """Beyond the pairs that are looked at when the data set is loaded."""
    for name in ("c", "d", "e", "f", "g"):
        flat.pair(name)
    flat.text("train.txt", *"abcdefg")
    dataset = flat.load()
    (flat.root / "images/d.png").write_bytes(b"")
    config = DataConfig(crop_size=(5,), num_workers=0)
    with (
        pipeline.train_batches(dataset, config, batch_size=7, seed=0, start_step=0) as batches,
        pytest.raises(UserError, match=r"images/d\.png: is empty"),
    ):
        next(batches)


def test_the_source_pickles(maker):
    maker.pair("a", folder="train")
    dataset = maker.load()
    dataset.source[0]
    again = pickle.loads(pickle.dumps(dataset))
    maker.expect(again, "a")
    with pytest.raises(IndexError):
        dataset.source[1]
    with pytest.raises(IndexError):
        dataset.source[-1]


def test_camvid(shared_data):
    config = DataConfig(name="folder", root=str(shared_data / "camvid"), ignore_label=11)
    train, val = data.load(config, "train"), data.load(config, "val")
    assert (len(train.source), len(val.source)) == (367, 101)
    assert train.labels.colors == labels.CAMVID.colors
    index = random.Random(0).randrange(367)
    example = read_example(train, index)
    mask = np.array(Image.open(shared_data / "camvid/masks/train" / f"{example['name']}.png"))
    np.testing.assert_array_equal(example["label"], np.where(mask == 11, IGNORE, mask))


def test_fine_tuning_replaces_the_head_of_other_classes_and_says_so(maker, tmp_path):
    for name in "abcdef":
        maker.pair(name, folder="train", shape=(20, 40))
    maker.pair("v", folder="val", shape=(33, 20))
    config = tiny.get_config()
    config.train.steps, config.train.batch_size = 1, 4
    config.data = maker.config()
    config.data.split, config.data.num_workers, config.data.crop_size = "train", 0, (33,)
    five = FunctionalModel(architecture("paper_resnet18", num_classes=5, width=0.125))
    saved = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), five.abstract)
    info = saved_model.describe(
        five.architecture, labels.named(*"abcde"), mean=(0,), std=(1,), resize="", size=(33, 33)
    )
    config.init.path = str(saved_model.write_model(tmp_path / "five", saved, info))

    said = []
    dataset = maker.load()
    three = FunctionalModel(resolve_architecture(config, dataset))
    start = initialize.init_variables(config, three, log=said.append)
    assert any("classifier.logits.kernel" in line and "stay random" in line for line in said)
    assert start.params["classifier.logits.kernel"].shape[-1] == 3
    assert np.unique(start.params["backbone.stem.0.conv.kernel"]).tolist() == [0.5]

    result = train(config, tmp_path / "run")
    assert (result.step, result.stopped) == (1, False)
    assert saved_model.read(tmp_path / "run").info["classes"] == list(NAMES)


def test_the_table_of_colors_is_exact():
    """All colours, against a search one by one."""
    rng = np.random.default_rng(0)
    colors = tuple(map(tuple, rng.choice(256, (200, 3)).tolist()))
    mask_format = masks.MaskFormat(
        "colors", labels.LabelSet(tuple(map(str, range(200))), colors), 1
    )
    assert mask_format.meanings == tuple(
        (v, v, i) for i, v in enumerate(map(masks.from_rgb, colors))
    )
    ignored = (masks.from_rgb(colors[1]),) * 2
    mask_format = dataclasses.replace(
        mask_format, values=(*mask_format.meanings, (*ignored, IGNORE))
    )
    rgb = rng.choice(np.array([*colors, (0, 0, 1), (255, 255, 255)]), 5000)
    values = (rgb * (65536, 256, 1)).sum(-1).reshape(50, 100)
    expected = [
        IGNORE if tuple(c) == colors[1] else colors.index(tuple(c)) if tuple(c) in colors else -1
        for c in rgb.tolist()
    ]
    np.testing.assert_array_equal(mask_format.to_ids(values).ravel(), expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "channels",
            4,
            r"data\.mean must be one number per channel.*= 4.*mean=0\.5,0\.5,0\.5,0\.5",
        ),
        ("channels", 0, r"folder\.channels must be 1 or more"),
        (
            "mask_name",
            "{name}.png",
            r"mask_name must be a text that holds \{name\} once and no suffix",
        ),
        ("val_fraction", 1.5, r"val_fraction must be in \[0, 1\]"),
        (
            "masks_hold",
            "id",
            r"must be auto, ids, colors or binary \(did you mean 'ids'\?\), got 'id'",
        ),
    ],
)
def test_wrong_settings_are_named_before_any_file_is_read(field, value, message):
    config = Config(data=DataConfig(name="folder"))
    setattr(config.data.folder, field, value)
    with pytest.raises(UserError, match=message):
        validate(config)
