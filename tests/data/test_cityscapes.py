"""Cityscapes and ADE20K, read as published: classes of ids, pairs, and errors."""

import importlib.util
import pathlib
import pickle
import re
import shlex

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from deeplab_jax import data
from deeplab_jax.analysis import descriptions
from deeplab_jax.config import DataConfig
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.data import labels
from deeplab_jax.data.datasets import cityscapes
from deeplab_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
ADE = "ADEChallengeData2016"
HEIGHT, WIDTH = 5, 8  # 40 pixels: more than Cityscapes has ids


def write_image(path: pathlib.Path, seed: int, shape: tuple[int, ...] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: pathlib.Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def grid(*values: int) -> np.ndarray:
    """The values row by row, and 0 after them."""
    filled = np.zeros(HEIGHT * WIDTH, int)
    filled[: len(values)] = values
    return filled.reshape(HEIGHT, WIDTH)


@pytest.fixture
def streets(tmp_path):
    """Three images of train in two cities, one of val; and other files that the archives hold."""
    root = tmp_path / "cityscapes"
    for index, (split, name) in enumerate(
        [
            ("train", "zurich/zurich_000000_000019"),
            ("train", "aachen/aachen_000001_000019"),
            ("train", "aachen/aachen_000000_000019"),
            ("val", "lindau/lindau_000000_000019"),
        ]
    ):
        write_image(root / f"leftImg8bit/{split}/{name}_leftImg8bit.png", index)
        masks = root / f"gtFine/{split}/{name}_gtFine"
        write_mask(
            pathlib.Path(f"{masks}_labelIds.png"), grid(*range(34), 255) if index else grid()
        )
        write_mask(pathlib.Path(f"{masks}_instanceIds.png"), grid(99))
        pathlib.Path(f"{masks}_polygons.json").write_text("{}")
    return root


@pytest.fixture
def scenes(tmp_path):
    root = tmp_path / "ade20k"
    for split, names in {
        "training": ["ADE_train_00000002", "ADE_train_00000001"],
        "validation": ["ADE_val_00000001"],
    }.items():
        for index, name in enumerate(names):
            write_image(root / ADE / f"images/{split}/{name}.jpg", index)
            write_mask(root / ADE / f"annotations/{split}/{name}.png", grid(0, 1, 2, 149, 150))
    lines = [
        "Idx\tRatio\tTrain\tVal\tName",
        "1\t0.15\t11664\t1172\twall ",
        "2\t0.11\t6046\t612\tbuilding, edifice",
    ]
    lines += [f"{index}\t0.1\t9\t9\tclass {index};other name" for index in range(3, 151)]
    (root / ADE / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def load(name: str, root: pathlib.Path | str, split: str = "train"):
    return data.load(DataConfig(name=name, root=str(root)), split)


def names(source) -> list[str]:
    return [source[index]["name"] for index in range(len(source))]


def error_of(name: str, root: pathlib.Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        load(name, root, split)
    return str(raised.value)


def test_cityscapes_ids_become_classes(streets):
    dataset = load("cityscapes", streets)
    assert dataset.labels == labels.CITYSCAPES
    label = dataset.source[0]["label"]
    assert label.dtype == np.uint8
    # Ids 0 to 33 in order, then 255: Cityscapes' table of train ids, and 5 times id 0.
    assert label.ravel().tolist() == [
        *(255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255),
        *(6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
        *[255] * 6,
    ]


def test_cityscapes_classes_are_those_of_its_scripts():
    spec = importlib.util.find_spec("torchvision")  # its text: the import needs a CUDA torch
    if spec is None:
        pytest.skip("torchvision is not installed")
    text = (pathlib.Path(spec.origin).parent / "datasets/cityscapes.py").read_text()
    rows = re.findall(r'CityscapesClass\("([\w ]+)", (-?\d+), (-?\d+)', text)
    assert len(rows) == 35
    for name, mask_id, train_id in rows:
        class_id = cityscapes.CLASS_OF_ID[int(mask_id) % 256]
        assert class_id == (int(train_id) % 256 if 0 <= int(train_id) < 19 else 255)
        assert class_id == 255 or labels.CITYSCAPES.names[class_id] == name
    assert sorted(cityscapes.CLASS_OF_ID) == sorted(int(row[1]) % 256 for row in rows)


def test_cityscapes_splits(streets):
    train = ["aachen_000000_000019", "aachen_000001_000019", "zurich_000000_000019"]
    assert names(load("cityscapes", streets).source) == train
    assert names(load("cityscapes", streets, "val").source) == ["lindau_000000_000019"]
    both = pickle.loads(pickle.dumps(load("cityscapes", streets, "trainval").source))
    assert names(both) == [*train, "lindau_000000_000019"]
    path = streets / "leftImg8bit/train/zurich/zurich_000000_000019_leftImg8bit.png"
    np.testing.assert_array_equal(both[2]["image"], np.asarray(Image.open(path)))
    assert (both[2]["label"] == 255).all()
    for index in (-1, 4):
        with pytest.raises(IndexError):
            both[index]


def test_ade20k(scenes):
    dataset = load("ade20k", scenes)
    assert dataset.labels.num_classes == 150
    assert dataset.labels.names[:3] == ("wall", "building", "class 3")
    assert names(dataset.source) == ["ADE_train_00000001", "ADE_train_00000002"]
    example = dataset.source[0]
    assert example["label"].ravel().tolist() == [255, 0, 1, 148, 149, *[255] * 35]
    path = scenes / ADE / "images/training/ADE_train_00000001.jpg"
    assert np.abs(example["image"].astype(int) - np.asarray(Image.open(path))).max() <= 8
    assert names(load("ade20k", scenes, "trainval").source)[2:] == ["ADE_val_00000001"]


def test_an_id_of_another_data_set(scenes, streets):
    write_mask(scenes / ADE / "annotations/validation/ADE_val_00000001.png", grid(151, 7))
    message = error_of("ade20k", scenes, "val")
    assert "ADE_val_00000001.png: holds 151, no id of this data set, which has 0, 1, 2" in message
    mask = streets / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    write_mask(mask, grid(34))
    assert f"{mask}: holds 34, no id" in error_of("cityscapes", streets, "val")
    Image.fromarray(np.full((HEIGHT, WIDTH), 263, np.uint16)).save(mask)  # 263 & 255 is a road's
    assert f"{mask}: holds 263, no id" in error_of("cityscapes", streets, "val")


def test_a_mask_of_another_size(streets):
    write_image(streets / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png", 0, (3, 8))
    message = error_of("cityscapes", streets, "val")
    assert "is 8 x 5 pixels (width x height), but its image" in message


def test_images_without_masks_and_masks_without_images(streets):
    (streets / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    (streets / "leftImg8bit/train/zurich/zurich_000000_000019_leftImg8bit.png").unlink()
    lines = error_of("cityscapes", streets).splitlines()
    assert lines[0].startswith(
        f"Cityscapes train: images {streets}/leftImg8bit/train/NAME_leftImg8"
    )
    assert lines[0].endswith("must have the same names: 2 problems")
    assert lines[1].endswith("aachen_000001_000019_leftImg8bit.png: has no mask")
    assert lines[2].endswith("zurich_000000_000019_gtFine_labelIds.png: has no image")
    for path in (streets / "leftImg8bit/val").rglob("*.png"):
        path.unlink()
    assert "val: holds no *_leftImg8bit.png" in error_of("cityscapes", streets, "val")


def test_an_invalid_root(tmp_path, streets, scenes):
    wanted = "- leftImg8bit, or leftImg8bit_trainvaltest.zip from https://www.city"
    message = error_of("cityscapes", "")
    assert "config.data.root is empty" in message
    assert wanted in message
    message = error_of("cityscapes", tmp_path / "none")
    assert f"{tmp_path / 'none'} does not exist" in message
    assert wanted in message
    packed = tmp_path / "packed"
    packed.mkdir()
    assert wanted in error_of("cityscapes", packed)
    for name in ("leftImg8bit", "gtFine"):
        (packed / f"{name}_trainvaltest.zip").touch()
    (packed / "leftImg8bit").mkdir()
    assert error_of("cityscapes", packed).endswith(f"unpack gtFine_trainvaltest.zip in {packed}")
    assert f"{scenes} looks like the root" in error_of("ade20k", scenes / ADE)


def test_another_ignore_label(streets):
    with pytest.raises(UserError, match=r"ignore_label must be 255, got 0"):
        data.load(DataConfig(name="cityscapes", root=str(streets), ignore_label=0), "val")


def test_the_names_of_ade20k_s_classes(scenes):
    path = scenes / ADE / "objectInfo150.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    assert f"{path}: names 149 classes" in error_of("ade20k", scenes)
    path.unlink()
    assert f"{path}: cannot be read" in error_of("ade20k", scenes)


def test_cityscapes_config_is_the_papers():
    config = config_io.from_python(ROOT / "configs/cityscapes.py")
    assert config.data.crop_size == (769,)
    assert (config.train.steps, config.train.batch_size) == (90_000, 16)
    assert (config.optimizer.learning_rate, config.optimizer.power) == (0.007, 0.9)
    for name, num_classes in {"cityscapes": 19, "ade20k": 150}.items():
        read = descriptions.read(str(ROOT / f"configs/{name}.py")).architecture
        assert (read.output_stride, read.num_classes) == (16, num_classes)


def test_the_document_names_each_data_set_and_gives_commands_that_work():
    text = (ROOT / "docs/datasets.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", text, re.M)
    assert sorted(name for name, _ in rows) == sorted(data.DATASETS)
    for name, splits in rows:
        told = re.findall(r"\b(train\w*|val)\b", re.sub(r"\(.*?\)", "", splits))
        # VOC's test images have no labels: asking for them says so.
        assert name == "folder" or {*told} == {*data.DATASETS[name].splits} - {"test"}
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("python train.py")]
    assert len(commands) == 4
    for line in commands:
        argv = [part.replace("configs/", f"{ROOT}/configs/") for part in shlex.split(line)[1:]]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        values(argv)
        validate(values.config)
