"""VOC and SBD: images of each split, exact labels, errors for damaged files before training."""

import importlib.util
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from deeplab_jax import data
from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import check_ids
from deeplab_jax.data.datasets import records, voc
from deeplab_jax.utils.errors import UserError

SIZES = [(30, 40), (41, 25), (17, 33)]
AUGMENTED = ["a1", "a2", "a3", "a4", "s2", "s1", "s3"]  # of the fixture `root`
VOC_TAR, SBD_TAR = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """Where prepared data goes: a fresh folder for each test."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def mask_of(name: str, shape: tuple[int, int], own: bool) -> np.ndarray:
    """Made-up labels: each image has its own, VOC's with an ignored border and SBD's without."""
    rng = np.random.default_rng([*name.encode(), own])
    mask = rng.integers(0, 21, shape, np.uint8)
    if own:
        mask[0] = 255
    return mask


def write_example(name: str, shape: tuple[int, int], images: pathlib.Path) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    shift = sum(name.encode()) % 60
    pixels = np.stack([2 * x + shift, 3 * y, x + y], -1).astype(np.uint8)
    Image.fromarray(pixels).save(images / f"{name}.jpg", quality=95)


def write_voc(root: pathlib.Path, train: list[str], val: list[str]) -> pathlib.Path:
    devkit = root / "VOCdevkit/VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (devkit / folder).mkdir(parents=True)
    for split, names in {"train": train, "val": val}.items():
        (devkit / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    for index, name in enumerate(train + val):
        shape = SIZES[index % len(SIZES)]
        write_example(name, shape, devkit / "JPEGImages")
        mask = Image.fromarray(mask_of(name, shape, own=True)).convert("P")
        mask.putpalette(labels.VOC.palette().tobytes())
        mask.save(devkit / f"SegmentationClass/{name}.png")
    return devkit


def write_sbd(root: pathlib.Path, train: list[str], val: list[str]) -> pathlib.Path:
    dataset = root / "benchmark_RELEASE/dataset"
    for folder in ("img", "cls"):
        (dataset / folder).mkdir(parents=True)
    for split, names in {"train": train, "val": val}.items():
        (dataset / f"{split}.txt").write_text("\n".join(names))
    for name in train + val:
        write_example(name, SIZES[0], dataset / "img")
        mask = mask_of(name, SIZES[0], own=False)
        scipy.io.savemat(dataset / f"cls/{name}.mat", {"GTcls": {"Segmentation": mask}})
    return dataset


@pytest.fixture
def root(tmp_path):
    """VOC with 4 + 3 images, SBD with 5 + 2: 2 of them VOC train's, 2 VOC val's, so 3 new."""
    write_voc(tmp_path / "root", ["a1", "a2", "a3", "a4"], ["v1", "v2", "v3"])
    write_sbd(tmp_path / "root", ["s2", "v2", "a3", "s1", "a1"], ["v1", "s3"])
    return tmp_path / "root"


def load(root: pathlib.Path | str, split: str):
    return voc.load(DataConfig(root=str(root)), split).source


def names(source) -> list[str]:
    return [source[index]["name"] for index in range(len(source))]


def error_of(root: pathlib.Path, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        load(root, split)
    return str(raised.value)


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    states = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in states.items()}


# What the splits hold.


def test_splits(root):
    assert names(load(root, "train")) == ["a1", "a2", "a3", "a4"]
    assert names(load(root, "val")) == ["v1", "v2", "v3"]
    assert names(load(root, "trainval")) == ["a1", "a2", "a3", "a4", "v1", "v2", "v3"]
    assert names(load(root, "trainaug")) == AUGMENTED


def test_examples(root):
    dataset = voc.load(DataConfig(root=str(root)), "trainaug")
    assert dataset.labels is labels.VOC
    assert dataset.num_channels == 3
    for index in range(len(dataset.source)):
        example = dataset.source[index]
        name, label = example["name"], example["label"]
        own = name.startswith("a")  # a1 and a3 have labels of SBD too
        folder = "VOCdevkit/VOC2012/JPEGImages" if own else "benchmark_RELEASE/dataset/img"
        image = np.array(Image.open(root / folder / f"{name}.jpg"))
        assert example["image"].dtype == label.dtype == np.uint8
        assert np.abs(example["image"].astype(int) - image).max() <= 4
        np.testing.assert_array_equal(label, mask_of(name, image.shape[:2], own))


def test_indices_outside_are_errors(root):
    source = load(root, "trainaug")
    assert len(list(source)) == len(source) == 7
    for index in (7, -1):
        with pytest.raises(IndexError):
            source[index]


def test_reads_in_another_process(root):
    source = load(root, "trainaug")
    source[0]  # its files are open now
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s[6]['label'].sum())"
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True
    )
    assert int(run.stdout) == source[6]["label"].sum()
    assert run.stderr == b""


def test_grey_images_are_rgb(root):
    path = root / "VOCdevkit/VOC2012/JPEGImages/a2.jpg"
    grey = Image.open(path).convert("L")
    grey.save(path)
    image = load(root, "train")[1]["image"]
    assert image.shape == (*SIZES[1], 3)
    assert np.abs(image.astype(int) - np.array(Image.open(path))[..., None]).max() <= 2


# Where data comes from, and where it goes.


def test_is_prepared_once(root, monkeypatch):
    before = names(load(root, "trainaug"))

    def not_again(*args):
        raise AssertionError("prepared again")

    monkeypatch.setattr(records._RecordBuilder, "_generate_examples", not_again)
    assert names(load(root, "trainaug")) == before
    assert len(load(root, "trainval")) == 7


def test_the_root_is_not_changed(root, capsys):
    before = snapshot(root)
    load(root, "trainaug")
    assert snapshot(root) == before
    output = capsys.readouterr()
    assert output.out == ""
    assert f"Preparing VOC 2012 from {root}" in output.err


def test_a_changed_root_is_prepared_again(root):
    assert load(root, "train")[0]["label"].max() == 255
    mask = root / "VOCdevkit/VOC2012/SegmentationClass/a1.png"
    for value in (7, 9):  # files of one size
        Image.fromarray(np.full(SIZES[0], value, np.uint8)).save(mask, compress_level=0)
        assert np.unique(load(root, "train")[0]["label"]).tolist() == [value]
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("a3\n")
    assert names(load(root, "train")) == ["a3"]


def test_roots_do_not_collide(root, tmp_path):
    write_voc(tmp_path / "other", ["b1"], ["b2"])
    assert names(load(tmp_path / "other", "train")) == ["b1"]
    assert names(load(root, "val")) == ["v1", "v2", "v3"]
    assert names(load(tmp_path / "other", "val")) == ["b2"]


def pack(root: pathlib.Path, into: pathlib.Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(into / VOC_TAR, "w") as tar:
        tar.add(root / "VOCdevkit", "VOCdevkit")
    with tarfile.open(into / SBD_TAR, "w:gz") as tar:
        tar.add(root / "benchmark_RELEASE", "benchmark_RELEASE")


def assert_same(ours, theirs) -> None:
    assert names(ours) == names(theirs)
    for index in range(len(ours)):
        np.testing.assert_array_equal(ours[index]["image"], theirs[index]["image"])
        np.testing.assert_array_equal(ours[index]["label"], theirs[index]["label"])


def test_archives_placed_by_the_user(root, tmp_path, data_dir):
    pack(root, tmp_path / "tars")
    assert_same(load(tmp_path / "tars", "trainaug"), load(root, "trainaug"))
    assert_same(load(tmp_path / "tars", "val"), load(root, "val"))
    assert sorted(os.listdir(tmp_path / "tars")) == [VOC_TAR, SBD_TAR]
    assert not list(data_dir.rglob("*.jpg"))  # what was unpacked is gone
    assert not list(data_dir.rglob("incomplete*"))


def test_a_folder_goes_with_an_archive(root, tmp_path):
    pack(root, tmp_path / "mixed")
    (tmp_path / "mixed" / VOC_TAR).unlink()
    (root / "VOCdevkit").rename(tmp_path / "mixed/VOCdevkit")
    assert names(load(tmp_path / "mixed", "trainaug")) == AUGMENTED


def test_without_a_root_the_archives_are_taken_from_the_downloads(root, data_dir):
    pack(root, data_dir / "downloads/voc_segmentation")
    assert_same(load("", "trainaug"), load(root, "trainaug"))
    assert (data_dir / "voc_segmentation/voc2012/1.0.0/dataset_info.json").is_file()


def test_without_a_root_only_what_a_split_needs_is_downloaded(root, data_dir, monkeypatch):
    pack(root, data_dir / "downloads/voc_segmentation")
    (data_dir / "downloads/voc_segmentation" / SBD_TAR).unlink()

    def no_network(url, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert names(load("", "val")) == ["v1", "v2", "v3"]
    message = error_of("", "trainaug")
    assert "benchmark.tgz could not be downloaded" in message
    assert message.count("no network") == 2  # one for each mirror
    assert "config.data.root" in message


def test_published_checksums():
    """Ours are those of torchvision and TFDS, which verify the same archives."""
    tfds = pathlib.Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    checksums = (tfds / "url_checksums/voc.txt").read_text()
    assert re.search(rf"{VOC_TAR}\t{voc.VOC_ARCHIVE.num_bytes}\t", checksums)
    spec = importlib.util.find_spec("torchvision")  # its text: the import needs a CUDA torch
    if spec is None:
        pytest.skip("torchvision is not installed")
    datasets = pathlib.Path(spec.origin).parent / "datasets"
    for module, archive in {"voc": voc.VOC_ARCHIVE, "sbd": voc.SBD_ARCHIVE}.items():
        text = (datasets / f"{module}.py").read_text()
        assert f'"{archive.md5}"' in text
        assert any(f'"{url}"' in text for url in archive.urls)
        assert f'"{archive.file_name}"' in text


# Missing and broken data.


def test_missing_root(tmp_path):
    message = error_of(tmp_path / "nowhere")
    assert f"config.data.root: {tmp_path / 'nowhere'} does not exist" in message
    assert "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt" in message
    assert f"{VOC_TAR} from http://host.robots.ox.ac.uk" in message


def test_empty_root(tmp_path):
    (tmp_path / "empty").mkdir()
    message = error_of(tmp_path / "empty", "trainaug")
    assert "does not hold what this split needs" in message
    assert VOC_TAR in message
    assert SBD_TAR in message


def test_a_root_one_folder_too_deep(root):
    assert f"{root} looks like the root" in error_of(root / "VOCdevkit")


def test_trainaug_asks_for_sbd(tmp_path, data_dir):
    write_voc(tmp_path / "root", ["a1"], ["v1"])
    message = error_of(tmp_path / "root", "trainaug")
    assert "benchmark_RELEASE/dataset/train.txt, or benchmark.tgz from https://" in message
    assert "Only trainaug needs SBD" in message
    assert not data_dir.exists()  # told before VOC was prepared for nothing
    assert len(load(tmp_path / "root", "trainval")) == 2


def test_unknown_split(root):
    with pytest.raises(UserError, match=r"train, trainaug, trainval, val, test, got 'minival'"):
        data.load(DataConfig(name="voc", root=str(root)), "minival")
    assert "VOC's test images have no labels to train or evaluate on" in error_of(root, "test")


def test_another_ignore_label(root):
    with pytest.raises(UserError, match=r"ignore_label must be 255, got 11"):
        voc.load(DataConfig(root=str(root), ignore_label=11), "val")


def test_an_image_to_train_on_and_to_measure_with(tmp_path):
    write_voc(tmp_path / "root", ["a1", "v1"], ["v1", "v2"])
    assert re.search(
        r"train\.txt and .*val\.txt share 1 images, as v1", error_of(tmp_path / "root")
    )


def test_a_missing_or_empty_list(root):
    path = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text("\n")
    assert f"{path}: names no image" in error_of(root)
    path.unlink()
    assert f"{path}: cannot be read (No such file" in error_of(root)


def test_all_problems_are_reported_together(root, data_dir):
    devkit = root / "VOCdevkit/VOC2012"
    images, masks = devkit / "JPEGImages", devkit / "SegmentationClass"
    data = (images / "a1.jpg").read_bytes()
    (images / "a1.jpg").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(masks / "a2.png")
    (masks / "a3.png").unlink()
    (images / "a4.jpg").unlink()
    bad = mask_of("v1", SIZES[4 % 3], own=True)
    bad[1, :3] = 99
    Image.fromarray(bad).save(masks / "v1.png")
    Image.open(masks / "v2.png").convert("RGB").save(masks / "v2.png")
    message = error_of(root, "val")
    lines = message.splitlines()
    assert lines[0] == "Checking VOC 2012: 6 problems"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        f"- {path}"
        for path in (
            images / "a1.jpg",
            masks / "a2.png",
            masks / "a3.png",
            images / "a4.jpg",
            masks / "v1.png",
            masks / "v2.png",
        )
    ]
    for line, expected in zip(
        lines[1:],
        [
            "is truncated or damaged",
            "is 6 x 5 pixels (width x height), but its image",
            f"is missing, but {devkit / 'ImageSets/Segmentation/train.txt'} names a3",
            "is missing, but",
            "holds id 99 (3 pixels); expected a class (0 to 20) or 255",
            "holds colours, not class ids",
        ],
        strict=True,
    ):
        assert expected in line
    written = [path for path in data_dir.rglob("*") if path.is_file()]
    assert [path.name for path in written if path.name != "metadata.json"] == ["lock"]


def test_repaired_data_is_prepared(root):
    image = root / "VOCdevkit/VOC2012/JPEGImages/a1.jpg"
    data = image.read_bytes()
    image.write_bytes(data[:300])
    assert "1 problem\n" in error_of(root)
    image.write_bytes(data)
    assert len(load(root, "train")) == 4


def test_a_mat_without_labels(root):
    path = root / "benchmark_RELEASE/dataset/cls/s1.mat"
    scipy.io.savemat(path, {"GTinst": 1})
    assert f"- {path}: has no matrices of whole numbers" in error_of(root, "trainaug")
    assert len(load(root, "train")) == 4  # VOC's own data is sound


def test_a_broken_archive(root, tmp_path, data_dir):
    pack(root, tmp_path / "tars")
    data = (tmp_path / "tars" / VOC_TAR).read_bytes()
    (tmp_path / "tars" / VOC_TAR).write_bytes(data[: len(data) // 2])
    message = error_of(tmp_path / "tars")
    assert f"{tmp_path / 'tars' / VOC_TAR}: the archive is damaged or truncated" in message
    assert f"{voc.VOC_ARCHIVE.num_bytes} as published" in message
    assert not list(data_dir.rglob("incomplete*"))


def test_a_data_dir_that_cannot_be_written(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    assert "TFDS_DATA_DIR to another folder" in error_of(root)
    monkeypatch.setenv("TFDS_DATA_DIR", "az://bucket/data")
    assert "TFDS_DATA_DIR must be a folder, or gs:// or s3://" in error_of(root)


# Killed, or two at once.

PREPARE = """
import sys
from deeplab_jax.config import DataConfig
from deeplab_jax.data.datasets import voc
{setup}
source = voc.load(DataConfig(root=sys.argv[1]), "trainaug").source
print([source[index]["name"] for index in range(len(source))])
"""
KILLED = """
import os, signal
from deeplab_jax.data.datasets import records
def die(*args):
    yield 0, next(examples(*args))[1]
    os.kill(os.getpid(), signal.SIGKILL)
examples = records._RecordBuilder._generate_examples
records._RecordBuilder._generate_examples = die
"""


DISK_FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""


def test_no_space_while_preparing(root, data_dir):
    command = [sys.executable, "-c", PREPARE.format(setup=DISK_FULL), str(root)]
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode == 1
    assert re.search(r"UserError: .*1\.0\.0: could not be prepared .*File too large", full.stderr)
    assert not list(data_dir.rglob("1.0.0"))
    assert not list(data_dir.rglob("incomplete*"))
    assert len(load(root, "trainaug")) == 7


def test_killed_while_preparing(root, data_dir):
    killed = subprocess.run([sys.executable, "-c", PREPARE.format(setup=KILLED), str(root)])
    assert killed.returncode == -signal.SIGKILL
    assert list(data_dir.rglob("incomplete*"))  # it was in the middle of it
    assert not list(data_dir.rglob("1.0.0"))
    assert len(load(root, "trainaug")) == 7
    assert not list(data_dir.rglob("incomplete*"))


def test_two_processes_prepare_at_once(root, data_dir):
    command = [sys.executable, "-c", PREPARE.format(setup=""), str(root)]
    runs = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert {out for out, _ in outputs} == {f"{names(load(root, 'trainaug'))}\n"}
    assert sum(err.count("Preparing VOC 2012") for _, err in outputs) == 1
    assert sum(err.count("Preparing SBD") for _, err in outputs) == 1


# Real data.


@pytest.fixture(scope="module")
def mini(shared_data):
    return shared_data / "voc_mini"


def test_real_splits(mini):
    folders = {archive: mini / archive.folder for archive in (voc.VOC_ARCHIVE, voc.SBD_ARCHIVE)}
    pairs = voc._list_pairs("voc2012", folders)
    ids = {split: [pair.name for pair in each] for split, each in pairs.items()}
    added = [pair.name for pair in voc._list_pairs("sbd", folders)["train"]]
    assert (len(ids["train"]), len(ids["val"]), len(added)) == (442, 231, 300)
    for split, each in ids.items():
        path = mini / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt"
        assert each == path.read_text().split()
    trainaug = ids["train"] + added
    assert sorted(trainaug) == sorted((mini / "trainaug_expected.txt").read_text().split())
    assert not set(trainaug) & set(ids["val"])


DEVKIT, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"


@pytest.fixture(scope="module")
def real(mini, tmp_path_factory):
    """Splits of the real images that both data sets label, and of every 12th other one."""
    root = tmp_path_factory.mktemp("root")
    images, masks, sbd_masks = f"{DEVKIT}/JPEGImages", f"{DEVKIT}/SegmentationClass", f"{SBD}/cls"
    for folder in (images, masks, f"{SBD}/img", sbd_masks):
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        (root / folder).symlink_to(mini / folder)
    stems = [{path.stem for path in (mini / each).iterdir()} for each in (masks, sbd_masks)]
    for folder in (f"{DEVKIT}/ImageSets/Segmentation", SBD):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            listed = (mini / folder / f"{split}.txt").read_text().split()
            kept = [name for name in listed if name in stems[0] & stems[1]] + listed[::12]
            (root / folder / f"{split}.txt").write_text("\n".join(kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        return {split: load(root, split) for split in ("trainaug", "val")}


def test_real_labels_and_images(real, mini):
    """Pixel for pixel."""
    both = 0
    for index in range(len(real["trainaug"])):
        example = real["trainaug"][index]
        name = example["name"]
        own, mat = mini / DEVKIT / f"SegmentationClass/{name}.png", mini / SBD / f"cls/{name}.mat"
        other = scipy.io.loadmat(mat)["GTcls"]["Segmentation"][0, 0] if mat.exists() else None
        if own.exists():
            np.testing.assert_array_equal(example["label"], np.array(Image.open(own)))
            assert other is None or (example["label"] != other).any()  # so VOC's label it was
            both += other is not None
        else:
            np.testing.assert_array_equal(example["label"], other)
            assert 255 not in example["label"]
        folder = mini / DEVKIT / "JPEGImages" if own.exists() else mini / SBD / "img"
        image = np.array(Image.open(folder / f"{name}.jpg"))
        error = np.abs(example["image"].astype(int) - image)
        assert error.mean() < 0.5
        assert error.max() <= 8
    assert both == 20


def test_real_val_has_the_ignored_borders(real):
    label = real["val"][0]["label"]
    assert label.max() == labels.IGNORE
    check_ids(label, labels.VOC, "val")
