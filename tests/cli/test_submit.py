"""`deeplab-jax submit`: the test server's files hold what `evaluate` counts, and nothing else."""

import io
import json
import re
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import voc
from deeplab_jax.data.io.masks import write_ids
from deeplab_jax.evaluation import voc_server
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import saved_model
from random_modules import random_variables

SIZES = {"v1": (30, 40), "v2": (41, 25), "v3": (17, 33), "t1": (30, 40), "t2": (41, 25)}
VAL, TEST = ["v1", "v2", "v3"], ["t1", "t2"]
PROTOCOL = ["--size", 49, "--scales", 1.5, "--flip", "--batch-size", 2]  # one program for all
VAL_FOLDER = "results/VOC2012/Segmentation/comp6_val_cls"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with VOC's val and test images, and what is prepared of them elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        root = tmp_path_factory.mktemp("root")
        devkit = root / "VOCdevkit/VOC2012"
        for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
            (devkit / folder).mkdir(parents=True)
        for split, names in {"train": ["a1"], "val": VAL, "test": TEST}.items():
            (devkit / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        rng = np.random.default_rng(0)
        for name, size in (SIZES | {"a1": (20, 20)}).items():
            blocks = rng.integers(0, 256, (6, 6, 3), np.uint8)
            image = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST)
            image.save(devkit / f"JPEGImages/{name}.jpg")
            if name not in TEST:
                mask = rng.integers(0, 21, size, np.uint8)
                mask[0] = labels.IGNORE
                write_ids(devkit / f"SegmentationClass/{name}.png", mask, labels.VOC)
        yield root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with random weights, whose classes have colours other than VOC's."""
    functions = FunctionalModel(architecture("paper_resnet18", num_classes=21, width=0.125))
    info = saved_model.describe(
        functions.architecture,
        labels.LabelSet(labels.VOC.names, labels.VOC.colors[::-1]),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.2),
        resize="none",
        size=(33, 33),
    )
    variables = jax.device_get(random_variables(functions))
    # No class wins for the sum of its weights alone.
    kernel = variables.params["classifier.logits.kernel"]
    variables.params["classifier.logits.kernel"] = kernel - kernel.mean(axis=2, keepdims=True)
    variables.params["classifier.logits.bias"] = np.zeros(21, np.float32)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return saved_model.write_model(folder, variables, info)


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_files_of_val_score_as_evaluate_does(root, model, command, tmp_path):
    protocol = ["--root", root, "--split", "val", *PROTOCOL]
    archive = tmp_path / "val.tgz"
    code, out, err = command("submit", model, *protocol, "--out", archive)
    assert code == 0, err
    scored = command(
        *("evaluate", model, "--data", "voc", *protocol, "--json", tmp_path / "val.json")
    )
    assert scored[0] == 0, scored[2]
    expected = json.loads((tmp_path / "val.json").read_text())

    files = members(archive)
    assert list(files) == [f"{VAL_FOLDER}/{name}.png" for name in VAL]
    matrix = np.zeros((21, 21), np.int64)
    for name in VAL:
        image = Image.open(io.BytesIO(files[f"{VAL_FOLDER}/{name}.png"]))
        assert image.mode == "P"
        colors = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(colors, np.array(labels.VOC.colors)[np.array(image)])
        mask = Image.open(root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png")
        for true, predicted in zip(np.array(mask).flat, np.array(image).flat, strict=True):
            if true != 255:
                matrix[true, predicted] += 1
    assert (matrix.sum(0) > 0).sum() >= 3
    np.testing.assert_array_equal(matrix, expected["confusion_matrix"])
    assert f"mIoU %        {100 * expected['miou']:.2f}, of the files" in out.splitlines()
    assert "upload" not in out

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for path in (archive, tmp_path / "unpacked"):
        code, again, err = command("submit", "--check", path, "--root", root)
        assert code == 0, err
        assert again.splitlines()[1:] == out.splitlines()[1:]
    (tmp_path / "unpacked" / VAL_FOLDER / "v2.png").unlink()
    code, out, err = command("submit", "--check", tmp_path / "unpacked", "--root", root)
    assert (code, out) == (2, "")
    assert "unpacked: 1 problem\n- v2.png: is missing" in err


def test_the_test_split_needs_no_labels(root, model, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--root", root, "--competition", "comp5", *PROTOCOL]
    code, out, err = command("submit", model, *options)
    assert code == 0, err
    files = members("results.tgz")
    folder = "results/VOC2012/Segmentation/comp5_test_cls"
    assert list(files) == [f"{folder}/t1.png", f"{folder}/t2.png"]
    for name in TEST:
        image = Image.open(io.BytesIO(files[f"{folder}/{name}.png"]))
        assert image.size[::-1] == SIZES[name]
    assert "2 of test" in out
    assert "comp5: trained on VOC's own images alone" in out
    assert "upload to     http://host" in out
    assert "mIoU" not in out
    assert [file.name for file in tmp_path.iterdir()] == ["results.tgz"]

    first = (tmp_path / "results.tgz").read_bytes()
    monkeypatch.setattr(
        voc_server, "write_ids", lambda path, ids, classes: write_ids(path, ids + 200, classes)
    )
    code, out, err = command("submit", model, *options)
    assert code == 2
    assert re.search(r"results\.tgz: 2 problems\n- t1\.png: holds the id 2\d\d", err)
    assert [file.name for file in tmp_path.iterdir()] == ["results.tgz"]
    assert (tmp_path / "results.tgz").read_bytes() == first


def test_files_with_another_score_are_not_kept(tmp_path):
    class Evaluator:
        dataset = SPLIT_SET

        def evaluate(self, variables, *, each, progress):
            for index, name in enumerate(SPLIT):
                example = SPLIT_SET.source[index]
                prediction = type("Prediction", (), {"name": name, "ids": example["label"] % 21})
                each(prediction)
            return type("Evaluation", (), {"matrix": np.eye(21, dtype=np.int64)})

    with pytest.raises(RuntimeError, match="hold other ids than were evaluated"):
        voc_server.write(*(tmp_path / "a.tgz", Evaluator(), None), competition="comp6", split="val")
    assert not list(tmp_path.iterdir())


# What is wrong with files, one thing at a time.


class Examples:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        label = np.full((4, 5 + index), 3 + index, np.uint8)
        label[0, 0] = labels.IGNORE
        return {"image": np.zeros((*label.shape, 3), np.uint8), "label": label, "name": "ab"[index]}


SPLIT = "ab"
SPLIT_SET = Dataset(Examples(), labels.VOC)


def png(width, *, id=3, mode="P", classes=labels.VOC, height=4):
    image = Image.fromarray(np.full((height, width), id, np.uint8))
    if mode == "P":
        image.putpalette(classes.palette().tobytes())
    buffer = io.BytesIO()
    (image if mode == "P" else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def good():
    return [(f"{VAL_FOLDER}/a.png", png(5)), (f"{VAL_FOLDER}/b.png", png(6))]


def pack(path, files):
    """A `.tgz`; a file without content becomes a link."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def swap(place, content):
    files = good()
    files[place] = (files[place][0], content)
    return files


def test_good_files_are_scored(tmp_path):
    for files in (good(), [(f"./{name}", content) for name, content in good()]):
        results = voc_server.read(pack(tmp_path / "r.tgz", files))
        assert (results.competition, results.split) == ("comp6", "val")
        expected = np.zeros((21, 21), np.int64)
        expected[3, 3], expected[4, 3] = 4 * 5 - 1, 4 * 6 - 1
        np.testing.assert_array_equal(voc_server.check(results, SPLIT_SET), expected)


BAD = {
    "missing": (good()[:1], r"- b\.png: is missing"),
    "of another image": ([*good(), (f"{VAL_FOLDER}/c.png", png(5))], r"- c\.png: val has no such"),
    "twice": ([*good(), good()[0]], r"a\.png: occurs twice"),
    "another size": (swap(0, png(6)), r"a\.png: is 6 x 4 pixels .* its image 5 x 4"),
    "turned": (swap(0, png(4, height=5)), r"a\.png: is 4 x 5 pixels"),
    "grey": (swap(1, png(6, mode="L")), r"b\.png: must be a palette PNG, mode P, got mode L"),
    "colours": (swap(1, png(6, mode="RGB")), r"b\.png: must be a palette PNG.* mode RGB"),
    "another palette": (
        swap(0, png(5, classes=labels.CITYSCAPES)),
        r"a\.png: its palette is not VOC's",
    ),
    "ignored": (swap(0, png(5, id=255)), r"a\.png: holds the id 255; the classes are 0 to 20"),
    "no class": (swap(0, png(5, id=21)), r"a\.png: holds the id 21"),
    "truncated": (swap(0, png(5)[:-30]), r"a\.png: is not a complete PNG"),
    "text": (swap(0, b"no"), r"a\.png: is not a complete PNG"),
    "a link": (
        [*good()[:1], (good()[1][0], None)],
        r"b\.png: is not a regular file\n- b\.png: is miss",
    ),
    "other files": (
        [*good(), ("results/VOC2012/README", b"x"), (f"{VAL_FOLDER}/._a.txt", b"x")],
        r"2 problems\n- results/VOC2012/README: is not expected; .*\n- .*_a\.txt: is not",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused(tmp_path, kind):
    files, message = BAD[kind]
    with pytest.raises(UserError, match=message):
        voc_server.check(voc_server.read(pack(tmp_path / "r.tgz", files)), SPLIT_SET)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "r.tgz: has no results; expected those of one split: results/VOC2012/Seg"),
        ([("comp6_val_cls/a.png", png(5))], "has no results.* first of its files is comp6_val_cls"),
        (
            [*good(), (good()[0][0].replace("val", "test"), png(5))],
            "holds results of comp6_val, comp6_test",
        ),
    ],
)
def test_results_of_no_split_or_of_several_splits_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        voc_server.read(pack(tmp_path / "r.tgz", files))


def test_other_files_than_archives_are_reported(tmp_path):
    whole = pack(tmp_path / "r.tgz", good()).read_bytes()
    for name, content in {"cut.tgz": whole[:-40], "text.tgz": b"text"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read as a \.tgz"):
            voc_server.read(tmp_path / name)
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        voc_server.read(tmp_path / "nowhere")


def test_broken_test_images_are_refused(tmp_path):
    for root in ("", str(tmp_path)):
        with pytest.raises(
            UserError, match=rf"\(--root\) is '{root}', .*test\.txt.*VOC2012test\.tar"
        ):
            voc.load_test(DataConfig(root=root))
    devkit = tmp_path / "VOCdevkit/VOC2012"
    (devkit / "ImageSets/Segmentation").mkdir(parents=True)
    (devkit / "JPEGImages").mkdir()
    (devkit / "ImageSets/Segmentation/test.txt").write_text("t1\nt2\n")
    (devkit / "JPEGImages/t1.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"are not there: 1 problem\n- .*JPEGImages/t2\.jpg"):
        voc.load_test(DataConfig(root=str(tmp_path)))
    (devkit / "JPEGImages/t2.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"t1\.jpg: is truncated, or not in a known image format"):
        voc.load_test(DataConfig(root=str(tmp_path))).source[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["submit"], "give a checkpoint to predict with, or --check"),
        (["submit", "{model}", "--check", "x.tgz"], "give a checkpoint to predict with, or"),
        (["submit", "{model}", "--competition", "comp4"], "--competition must be comp5 or comp6"),
        (["submit", "{model}", "--protocol", "torchvision"], "--protocol must be paper or native"),
        (["submit", "{model}", "--out", "r.zip"], "--out must be a file that ends in .tgz"),
        (["submit", "{model}", "--split", "trainaug"], "--split must be one of test, val, train"),
        (["submit", "{model}", "--data", "shapes"], "results for VOC 2012, but .* 'shapes'"),
        (["submit", "{model}", "--scales", "0"], "--scales must be one or more numbers above 0"),
        (["evaluate", "{model}", "--data", "voc", "--split", "test"], "deeplab-jax submit"),
    ],
)
def test_mistakes_are_one_message(root, model, command, options, message):
    code, out, err = command(*(option.format(model=model) for option in options), "--root", root)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert "Traceback" not in err
