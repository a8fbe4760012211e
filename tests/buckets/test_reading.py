"""Models, data and images in buckets are read as those on this machine."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import deeplab_jax as dl
import tiny
from deeplab_jax import data as data_lib
from deeplab_jax.analysis import descriptions
from deeplab_jax.buckets.staging import local_path
from deeplab_jax.buckets.store import Store, Unreachable
from deeplab_jax.config import Config, DataConfig, FolderConfig
from deeplab_jax.config import io as config_io
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.datasets import records
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.initialize import init_variables
from deeplab_jax.weights.saved_model import find_checkpoint
from own_data import Maker

MARKER = "commit_success.txt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run whose best checkpoint, 2, is not its newest, 4."""
    config = tiny.get_config()
    config.model.width = 0.0625
    config.train = dataclasses.replace(config.train, steps=4, eval_every=2, save_every=2, keep=2)
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(config, workdir)
    for step, miou in ((2, 0.5), (4, 0.25)):
        file = workdir / f"checkpoints/{step}/metrics/metrics"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"miou": miou}))
    assert find_checkpoint(workdir).name == "2"
    return workdir


def upload(folder, url):
    """Copies a folder to a bucket, its checkpoints with markers as a mirrored run has them."""
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file() and (path.name != MARKER or path.parent.parent.name != "checkpoints"):
            store.upload(path, path.relative_to(folder).as_posix())
    for step in folder.glob("checkpoints/*"):
        files = [path for path in step.rglob("*") if path.is_file() and path.parent != step]
        listed = {
            path.relative_to(step).as_posix(): [
                path.stat().st_size,
                hashlib.sha256(path.read_bytes()).hexdigest(),
            ]
            for path in files
        }
        store.write(f"checkpoints/{step.name}/{MARKER}", json.dumps({"files": listed}).encode())
    return url


def photo(seed=0, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@functools.cache
def predicted(source):
    return dl.load(source).probabilities(photo())


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_best_checkpoint_of_a_run_without_what_is_not_needed(gs_bucket, run):
    url = upload(run, f"{gs_bucket}/runs/a")
    segmenter = dl.load(url)
    assert segmenter.path == local_path(url) / "checkpoints/2"
    np.testing.assert_array_equal(segmenter.probabilities(photo()), predicted(run))
    copied = files_of(local_path(url))
    assert {"config.json", "checkpoints/4/info/data.json"} < copied
    folders = {name.split("/")[2] for name in copied if name.startswith("checkpoints/4/")}
    assert folders >= {"info", "metrics"}
    assert not folders & {"model", "training"}
    assert not any("training" in name or "tensorboard" in name for name in copied)
    # The run goes on: another is the best, and the old one is deleted.
    store = Store(url)
    store.write("checkpoints/4/metrics/metrics", b'{"miou": 0.75}')
    digests = json.loads(store.read(f"checkpoints/4/{MARKER}"))
    digests["files"]["metrics/metrics"] = [14, hashlib.sha256(b'{"miou": 0.75}').hexdigest()]
    store.write(f"checkpoints/4/{MARKER}", json.dumps(digests).encode())
    assert dl.load(f"{url}/").path.name == "4"
    store.delete([f"checkpoints/2/{MARKER}"])
    assert dl.load(f"{url}/checkpoints").path.name == "4"
    assert not (local_path(url) / "checkpoints/2").exists()


def test_a_checkpoint_and_the_config_of_its_run(gs_bucket, run):
    url = upload(run, f"{gs_bucket}/runs/a")
    newest = run / "checkpoints/4"
    np.testing.assert_array_equal(predicted(f"{url}/checkpoints/4"), predicted(newest))
    assert not (local_path(url) / "checkpoints/4/training").exists()
    for path in ("", "/checkpoints", "/checkpoints/4"):
        assert config_io.from_run(url + path) == config_io.from_run(run)


def test_weights_files_and_folders_as_on_the_hub(bucket, run, tmp_path):
    expected = predicted(run)
    dl.convert(run, tmp_path / "w" / "mine.pth")
    dl.convert(run, tmp_path / "w" / "mine.safetensors")
    url = upload(tmp_path / "w", f"{bucket}/weights")
    for name in ("mine.pth", "mine.safetensors"):
        np.testing.assert_array_equal(
            predicted(f"{url}/{name}"), predicted(tmp_path / "w" / name), err_msg=name
        )
        assert config_io.from_run(f"{url}/{name}") is None
    from deeplab_jax.weights import hub_folder
    from deeplab_jax.weights.convert import read_model

    hub_folder.write(read_model(run), tmp_path / "hub")
    (tmp_path / "hub/others").mkdir()
    (tmp_path / "hub/others/large").write_text("not needed")
    for each in ("hub", "hub/model.safetensors"):
        upload(tmp_path / "hub", f"{bucket}/{each.replace('/model', '2/model').split('/')[0]}")
        source = f"{bucket}/{each.replace('hub/', 'hub2/')}"
        np.testing.assert_array_equal(predicted(source), expected)
    assert not (local_path(bucket) / "hub/others").exists()


def test_what_is_no_model_is_said(gs_bucket, run):
    Store(gs_bucket).write("data/images/a.png", b"1")
    Store(gs_bucket).write("run/checkpoints/4/info/data.json", b"{}")
    with pytest.raises(UserError, match=f"no model at {gs_bucket}/dat:.*Nothing is there"):
        dl.load(f"{gs_bucket}/dat")
    with pytest.raises(UserError, match=f"no model at {gs_bucket}/data:.*It holds images"):
        dl.load(f"{gs_bucket}/data")
    for path in ("run", "run/checkpoints", "run/checkpoints/4"):
        with pytest.raises(UserError, match=f"no complete checkpoint at {gs_bucket}/{path}:.*"):
            dl.load(f"{gs_bucket}/{path}")
    with pytest.raises(UserError, match=r"as text, not as pathlib\.Path: gs:/"):
        dl.load(pathlib.Path(gs_bucket))
    assert not (local_path(gs_bucket) / "data").exists()


def test_commands_give_what_they_give_for_a_local_run(gs_bucket, run, tmp_path, command):
    url = upload(run, f"{gs_bucket}/run")
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    results = {}
    for kind, source in {"local": run, "bucket": url}.items():
        out = tmp_path / kind
        for arguments in (
            ("evaluate", source, "--json", out / "e.json"),
            ("predict", source, tmp_path / "photo.png", "--out", out / "p"),
            ("summary", source, "--json", out / "s.json"),
            ("export", source, out / "m.stablehlo", "--height", "33", "--width", "33"),
            ("convert", source, out / "m.safetensors", "--quiet"),
        ):
            code, _, err = command(*arguments)
            assert code == 0, err
        scores = json.loads((out / "e.json").read_text())
        for name in ("checkpoint", "seconds", "images_per_second"):
            del scores[name]
        ids = np.asarray(Image.open(out / "p/photo_ids.png")).tolist()
        contents = [(out / name).read_bytes() for name in ("s.json", "m.safetensors")]
        program = json.loads((out / "m.stablehlo.json").read_text())
        results[kind] = (scores, ids, contents, program, (out / "m.stablehlo").stat().st_size)
    assert results["bucket"] == results["local"]


def test_a_run_starts_from_a_model_in_a_bucket(gs_bucket, run):
    url = upload(run, f"{gs_bucket}/run")
    config = tiny.get_config()
    config.model.width = 0.0625
    model = FunctionalModel(dl.load(run).architecture)
    starts = []
    for field, source in (("path", run), ("path", url), ("backbone", run), ("backbone", url)):
        config.init = dataclasses.replace(Config().init, **{field: str(source)})
        starts.append(jax.device_get(init_variables(config, model, lambda message: None)))
    for local, copied in (starts[:2], starts[2:]):
        jax.tree.map(np.testing.assert_array_equal, local, copied)
    config.init.path, config.init.backbone = f"{gs_bucket}/absent", ""
    with pytest.raises(UserError, match=r"config.init.path = .*absent.*Nothing is there"):
        init_variables(config, model, print)


def test_images_of_a_bucket_are_segmented(gs_bucket, model, tmp_path, command):
    photos = {"a.png": 0, "trip/b.png": 1, "trip/c.PNG": 2}
    for name, seed in photos.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(seed)).save(tmp_path / "photos" / name, "png")
    (tmp_path / "photos/notes.txt").write_text("no image")
    url = upload(tmp_path / "photos", f"{gs_bucket}/photos")
    for index, (path, names) in enumerate(
        {
            "": {"a", "trip/b", "trip/c"},
            "/trip": {"b", "c"},
            "/a.png": {"a"},
            "/*/*.png": {"b"},
            "/**/*.png": {"a", "b"},
        }.items()
    ):
        local, copied = tmp_path / f"local{index}", tmp_path / f"bucket{index}"
        for source, out in ((f"{tmp_path}/photos", local), (url, copied)):
            code, _, err = command("predict", model, source + path, "--out", out)
            assert code == 0, err
        assert files_of(copied) == {
            f"{name}_{kind}.png" for name in names for kind in ("ids", "overlay")
        }
        for name in files_of(copied):
            assert (copied / name).read_bytes() == (local / name).read_bytes()
    assert not list(local_path(url).rglob("*.txt"))
    code, _, err = command("predict", model, f"{url}/*.jpg", "--out", tmp_path / "none")
    assert (code, "no file matches the pattern" in err) == (2, True)
    segmenter = dl.load(model)
    np.testing.assert_array_equal(
        segmenter.predict(f"{url}/trip/b.png"), segmenter.predict(photo(1))
    )


@pytest.fixture
def maker(tmp_path):
    maker = Maker(tmp_path / "set")
    for name in ("a", "b", "c", "d", "e"):
        maker.pair(name, shape=(33, 40))
    maker.text("classes.txt", "sky", "traffic light", "car")
    return maker


def examples(dataset):
    return [read_example(dataset, index) for index in range(len(dataset.source))]


def test_own_images_in_a_bucket_are_those_on_this_machine(gs_bucket, maker, tmp_path):
    maker.text("train.csv", "image,mask", *(f"images/{x}.png,masks/{x}.png" for x in "abcde"))
    maker.text("names", "sky", "traffic light", "car")
    url = upload(maker.root, f"{gs_bucket}/sets/mine")
    folder = FolderConfig(classes=f"{url}/names")
    for config in (
        DataConfig(name="folder", root=f"{url}/train.csv", folder=folder),
        DataConfig(name="folder", root=url),
        DataConfig(name="folder", root=str(maker.root), folder=folder),
    ):
        before = dataclasses.asdict(config)
        for split in ("train", "val"):
            found = data_lib.load(config, split)
            local = maker.load(split) if config.root.endswith("mine") else found
            assert found.labels.names == ("sky", "traffic light", "car")
            maker.expect(found, [example["name"] for example in examples(local)])
        assert dataclasses.asdict(config) == before
    assert len(data_lib.load(config, "trainval").source) == 5


def test_the_classes_of_a_config_are_counted_without_its_images(gs_bucket, maker):
    url = upload(maker.root, f"{gs_bucket}/mine")
    config = Config(data=DataConfig(name="folder", root=url))
    assert descriptions.of_config(config, "a config").architecture.num_classes == 3
    assert files_of(local_path(url)) == {"classes.txt"}


def test_a_data_set_in_a_bucket_is_checked_and_prepared(gs_bucket, maker, tmp_path, command):
    url = upload(maker.root, f"{gs_bucket}/mine")
    reports = {}
    for kind, root in {"local": maker.root, "bucket": url}.items():
        code, out, err = command("data", "check", root, "--json", tmp_path / f"{kind}.json")
        assert code == 0, err
        assert f"--config.data.root={root}" in out
        report = json.loads((tmp_path / f"{kind}.json").read_text())
        assert report.pop("root") == str(root)
        reports[kind] = json.dumps(report)
    local = str(local_path(url))
    assert reports["bucket"].replace(local, str(maker.root)) == reports["local"]
    code, _, err = command("data", "check", url, "--write-classes")
    assert (code, "--write-classes writes no file in a bucket" in err) == (2, True)
    code, _, err = command("data", "prepare", url, tmp_path / "clean")
    assert code == 0, err
    config = DataConfig(name="folder", root=str(tmp_path / "clean"))
    assert len(examples(data_lib.load(config, "trainval"))) == 5


def test_a_run_is_evaluated_on_data_in_a_bucket(gs_bucket, model, maker, tmp_path, command):
    maker.text("classes.txt", "background", "red fox", "bluebird")
    url = upload(maker.root, f"{gs_bucket}/mine")
    scores = []
    for root in (maker.root, url):
        arguments = ("--data", "folder", "--root", root, "--json", tmp_path / "e.json")
        code, _, err = command("evaluate", model, *arguments)
        assert code == 0, err
        report = json.loads((tmp_path / "e.json").read_text())
        assert report["root"] == str(root)
        scores.append([report[name] for name in ("miou", "pixel_accuracy", "images")])
    assert scores[0] == scores[1]


@pytest.fixture
def voc(tmp_path):
    devkit = tmp_path / "voc/VOCdevkit/VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (devkit / folder).mkdir(parents=True)
    for split, names in {"train": ["x", "y"], "val": ["z"]}.items():
        (devkit / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            Image.fromarray(photo(index, (20, 30))).save(devkit / f"JPEGImages/{name}.jpg")
            mask = np.full((20, 30), index + 3, np.uint8)
            Image.fromarray(mask).save(devkit / f"SegmentationClass/{name}.png")
    return tmp_path / "voc"


def same_examples(ours, theirs):
    for one, other in zip(examples(ours), examples(theirs), strict=True):
        assert one["name"] == other["name"]
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_prepared_data_sets_are_shared_through_a_bucket(gs_bucket, voc, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    expected = data_lib.load(DataConfig(root=str(voc)), "trainval")
    root = upload(voc, f"{gs_bucket}/voc")
    monkeypatch.setenv("TFDS_DATA_DIR", f"{gs_bucket}/tfds/")
    same_examples(data_lib.load(DataConfig(root=root), "trainval"), expected)
    shared = Store(f"{gs_bucket}/tfds").list()
    assert {name.rpartition("/")[2] for name in shared} >= {"dataset_info.json", "features.json"}
    with monkeypatch.context() as patch:  # the same host again, and another one, prepare nothing
        patch.setattr(records._RecordBuilder, "__init__", lambda *_, **__: pytest.fail("again"))
        for host in ("cache", "another"):
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
            same_examples(data_lib.load(DataConfig(root=root), "trainval"), expected)
    assert Store(f"{gs_bucket}/tfds").list() == shared
    # A data set counts once its last file is there.
    last = next(name for name in shared if name.endswith("dataset_info.json"))
    Store(f"{gs_bucket}/tfds").delete([last])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    same_examples(data_lib.load(DataConfig(root=root), "trainval"), expected)
    assert Store(f"{gs_bucket}/tfds").list().keys() == shared.keys()


PREPARE = """
import sys
from deeplab_jax import data
from deeplab_jax.config import DataConfig
print(len(data.load(DataConfig(root=sys.argv[1]), "trainval").source))
"""


def test_two_hosts_prepare_at_once(gs_bucket, voc, tmp_path, monkeypatch):
    root = upload(voc, f"{gs_bucket}/voc")
    monkeypatch.setenv("TFDS_DATA_DIR", f"{gs_bucket}/tfds")
    hosts = []
    for host in ("1", "2"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
        hosts.append(
            subprocess.Popen(
                [sys.executable, "-c", PREPARE, root],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for host in hosts:
        out, err = host.communicate(timeout=120)
        assert (out, host.returncode) == ("3\n", 0), err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "3"))
    found = data_lib.load(DataConfig(root=root), "trainval")
    assert [example["name"] for example in examples(found)] == ["x", "y", "z"]
    assert not (tmp_path / "3/deeplab_jax/tensorflow_datasets").exists()


def test_a_bucket_that_cannot_be_written_keeps_prepared_data_here(
    server, voc, tmp_path, monkeypatch, capfd
):
    url = server.make_bucket("readonly-prepared")
    monkeypatch.setenv("TFDS_DATA_DIR", f"{url}/tfds")
    for _ in range(2):
        found = data_lib.load(DataConfig(root=str(voc)), "val")
        assert [example["name"] for example in examples(found)] == ["z"]
        err = capfd.readouterr().err
        assert "warning: " in err
        assert "is only on this machine; others prepare it again" in err
        assert "not permitted to write" in err


def test_the_upload_of_prepared_data_is_tried_again(bucket, voc, monkeypatch, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", f"{bucket}/tfds")
    upload, failed = Store.upload, set()

    def fail_once(self, path, name):
        if name not in failed:
            failed.add(name)
            raise Unreachable(f"{name}: no answer")
        upload(self, path, name)

    monkeypatch.setattr(Store, "upload", fail_once)
    monkeypatch.setattr("deeplab_jax.buckets.outputs.time.sleep", lambda seconds: None)
    data_lib.load(DataConfig(root=str(voc)), "val")
    assert "dataset_info.json: no answer; trying again" in capfd.readouterr().err
    assert {name.rpartition("/")[2] for name in Store(f"{bucket}/tfds").list()} == failed


def test_a_bucket_for_prepared_data_that_does_not_exist(server, voc, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", f"{server.scheme}://no-such-bucket/tfds")
    with pytest.raises(UserError, match="no bucket 'no-such-bucket'"):
        data_lib.load(DataConfig(root=str(voc)), "val")
