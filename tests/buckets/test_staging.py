"""Copies of what a bucket holds: resumed, checked, and as the bucket is now."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deeplab_jax.buckets import staging
from deeplab_jax.buckets.staging import local_path, stage
from deeplab_jax.buckets.store import Store, Unreachable
from deeplab_jax.utils.errors import UserError

TREE = {
    "config.json": b"{}",
    "images/a.png": b"first" * 100,
    "images/deep/er/b.png": b"second",
    "images/empty": b"",
    "masks/ä ö.png": bytes(range(256)),
}


def fill(url, tree=TREE):
    store = Store(url)
    for name, content in tree.items():
        store.write(name, content)
    return store


def tree_of(folder):
    """The content of each file below a folder, but for those of `stage` itself."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".staging-")
    }


@pytest.fixture
def downloads(monkeypatch):
    """The names of all objects that are downloaded."""
    names, download = [], Store.download

    def record(self, name, path, entry):
        names.append(name)
        download(self, name, path, entry)

    monkeypatch.setattr(Store, "download", record)
    monkeypatch.setattr(staging, "_PAUSES", (0, 0, 0, 0))
    return names


def test_a_copy_is_the_tree_in_the_bucket_and_is_read_once(bucket, tmp_path, downloads, capfd):
    store = fill(f"{bucket}/data/set")
    fill(f"{bucket}/data/other")
    folder = stage(f"{bucket}/data/set/", title="a test")
    assert (
        folder == tmp_path / "cache/deeplab_jax/buckets" / bucket.replace("://", "/") / "data/set"
    )
    assert tree_of(folder) == TREE
    assert sorted(downloads) == sorted(TREE)
    times = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert times["a.png"] == store.list()["images/a.png"].time_ns
    downloads.clear()
    assert stage(f"{bucket}/data/set", title="a test") == folder
    assert not downloads
    assert capfd.readouterr().err == ""  # short copies are silent


def test_changed_deleted_and_damaged_files_become_those_of_the_bucket(bucket, downloads):
    store = fill(f"{bucket}/set")
    folder = stage(f"{bucket}/set", title="a test")
    store.write("config.json", b"[]")  # of the same size
    store.delete(["images/a.png", "images/deep/er/b.png"])
    store.write("images/a.png/now/a/folder", b"1")
    (folder / "masks/ä ö.png").write_bytes(bytes(256))
    (folder / "images/of another program").write_text("?")
    downloads.clear()
    stage(f"{bucket}/set", title="a test")
    assert sorted(downloads) == ["config.json", "images/a.png/now/a/folder", "masks/ä ö.png"]
    expected = {"config.json": b"[]", "images/a.png/now/a/folder": b"1", "images/empty": b""}
    assert tree_of(folder) == expected | {"masks/ä ö.png": TREE["masks/ä ö.png"]}
    assert not (folder / "images/deep").exists()


def test_only_what_is_wanted_is_copied_and_deleted(bucket):
    store = fill(f"{bucket}/set")
    folder = stage(f"{bucket}/set", lambda name: name.startswith("images/"), title="a test")
    images = {name: TREE[name] for name in TREE if name.startswith("images/")}
    assert tree_of(folder) == images
    store.delete(list(images)[1:])
    stage(f"{bucket}/set", lambda name: name == "config.json", title="a test")
    assert tree_of(folder) == images | {"config.json": b"{}"}


def test_an_object_and_a_folder_of_choice(bucket, tmp_path, downloads):
    fill(f"{bucket}/set")
    file = stage(f"{bucket}/set/images/a.png", title="a test")
    assert (file.name, file.read_bytes()) == ("a.png", TREE["images/a.png"])
    assert stage(f"{bucket}/set", title="a test", into=tmp_path / "own") == tmp_path / "own"
    assert tree_of(tmp_path / "own") == TREE
    assert not list((tmp_path / "own").rglob(".*"))
    assert stage(bucket, title="the whole bucket") == local_path(bucket)
    assert tree_of(local_path(bucket)) == {f"set/{name}": TREE[name] for name in TREE}
    assert downloads.count("images/a.png") == 1  # into `own`
    assert "set/images/a.png" not in downloads  # its MD5 shows that it is there


def test_nothing_at_an_address(bucket):
    fill(f"{bucket}/set")
    with pytest.raises(UserError, match=f"{bucket}/se: nothing is there"):
        stage(f"{bucket}/se", title="a test")


@pytest.mark.parametrize(
    "name", ["../../escaped", "a/../../escaped", "/etc/escaped", "a//b", "x" * 256, "a\0b"]
)
def test_names_that_would_leave_the_folder_are_refused(gs_bucket, name, monkeypatch, tmp_path):
    store = fill(f"{gs_bucket}/set")
    entry = store.list()["config.json"]
    listing = store.list() | {name: entry}
    monkeypatch.setattr(Store, "list", lambda self, prefix="": listing)
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="cannot be files"):
        stage(f"{gs_bucket}/set", title="a test")
    assert not list(tmp_path.rglob("*escaped*"))


def test_hostile_names_of_a_real_bucket_are_refused(server, tmp_path):
    if server.scheme == "gs":
        pytest.skip("the emulator stores objects as files itself")
    url = server.make_bucket()
    store = fill(f"{url}/set")
    for name in ("/abs", "a//b"):
        store.write(name, b"")
        with pytest.raises(UserError, match="cannot be files"):
            stage(f"{url}/set", title="a test")
        store.delete([name])
    store.write("images/a.png/inside", b"")
    with pytest.raises(UserError, match=r"cannot be files.*: .images/a.png.$"):
        stage(f"{url}/set", title="a test")
    stage(f"{url}/set", lambda name: "inside" not in name, title="a test")


def test_a_disk_that_is_too_small_is_named_before_anything_is_read(
    gs_bucket, downloads, monkeypatch
):
    fill(f"{gs_bucket}/set")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"764 bytes are needed in .*set.* 100 bytes .*XDG_CACHE"):
        stage(f"{gs_bucket}/set", title="a test")
    assert not downloads


def test_a_cache_that_cannot_be_written(gs_bucket, monkeypatch, tmp_path):
    fill(f"{gs_bucket}/set")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to.*Set XDG_CACHE_HOME"):
        stage(f"{gs_bucket}/set", title="a test")


def test_files_that_fail_now_and_then_are_read_again(bucket, downloads, monkeypatch):
    fill(f"{bucket}/set")
    download, failures = Store.download, {"config.json": 3, "masks/ä ö.png": 1}

    def fail(self, name, path, entry):
        if failures.get(name):
            failures[name] -= 1
            path.write_bytes(b"a part")
            raise Unreachable("no answer")
        download(self, name, path, entry)

    monkeypatch.setattr(Store, "download", fail)
    folder = stage(f"{bucket}/set", title="a test")
    assert tree_of(folder) == TREE


def test_an_object_that_changes_while_it_is_read(bucket, downloads, monkeypatch):
    store = fill(f"{bucket}/set")
    download = Store.download

    def change(self, name, path, entry):
        if name == "config.json" and not changed:
            changed.append(store.write("config.json", b"[1, 2]"))
        if name == "images/a.png":
            store.delete([name])
        download(self, name, path, entry)

    changed = []
    monkeypatch.setattr(Store, "download", change)
    folder = stage(f"{bucket}/set", title="a test")
    expected = TREE | {"config.json": b"[1, 2]"}
    del expected["images/a.png"]
    assert tree_of(folder) == expected


def test_what_was_copied_before_the_bucket_failed_is_kept(bucket, downloads, monkeypatch):
    fill(f"{bucket}/set", {f"{index}": b"x" * index for index in range(60)})
    download = Store.download
    is_down = []

    def fail(self, name, path, entry):
        if len(downloads) >= 10 and is_down:
            raise Unreachable(f"{name}: no answer")
        download(self, name, path, entry)

    monkeypatch.setattr(Store, "download", fail)
    is_down.append(True)
    with pytest.raises(UserError, match=r"(\d+) of 60 files could not be read: \d+: no answer.*on"):
        stage(f"{bucket}/set", title="a test")
    done = len(tree_of(local_path(f"{bucket}/set")))
    assert 10 <= done < 60
    is_down.clear()
    downloads.clear()
    assert len(tree_of(stage(f"{bucket}/set", title="a test"))) == 60
    assert len(downloads) == 60 - done


def test_a_bucket_that_does_not_answer(gs_bucket, monkeypatch):
    def fail(self, prefix=""):
        raise Unreachable("no answer")

    monkeypatch.setattr(Store, "list", fail)
    with pytest.raises(UserError, match="no answer"):
        stage(f"{gs_bucket}/set", title="a test")


SLOW = """
import sys, time
from deeplab_jax.buckets import staging
from deeplab_jax.buckets.store import Store
download = Store.download
def slow(self, name, path, entry):
    path.write_bytes(b"half")
    time.sleep(float(sys.argv[2]))
    download(self, name, path, entry)
    print(name, flush=True)
Store.download = slow
staging.stage(sys.argv[1], title="a test")
"""


def child(url, seconds):
    command = [sys.executable, "-c", SLOW, url, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_copy_that_was_killed_goes_on(bucket, downloads):
    tree = {f"{index:02}": f"{index}".encode() * 1000 for index in range(40)}
    fill(f"{bucket}/set", tree)
    with child(f"{bucket}/set", 0.2) as process:
        for _ in range(16):  # each is printed before it gets its final name, in one of 8 threads
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    folder = local_path(f"{bucket}/set")
    partial = [path for path in folder.iterdir() if path.suffix == ".partial"]
    assert partial  # it was in the middle of some
    there = {path.name for path in folder.iterdir()} & tree.keys()
    assert 8 <= len(there) < 40
    assert all((folder / name).read_bytes() == tree[name] for name in there)
    index = next(folder.parent.glob(".staging-*.index"))
    index.write_bytes(index.read_bytes()[:-5])  # a line that the kill cut short
    for path in partial:
        os.utime(path, (time.time() - 1e5,) * 2)
    stage(f"{bucket}/set", title="a test")
    assert set(downloads) == tree.keys() - there
    assert tree_of(folder) == tree


def test_processes_that_copy_the_same_read_each_file_once(bucket):
    fill(f"{bucket}/set")
    first = child(f"{bucket}/set", 6)
    deadline = time.monotonic() + 60
    while not list(local_path(bucket).rglob(".*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = child(f"{bucket}/set", 0)
    out, err = second.communicate(timeout=60)
    assert (out, first.communicate(timeout=60)[1]) == ("", "")
    assert err == f"{bucket}/set: waiting for another process that copies it\n"
    assert tree_of(local_path(f"{bucket}/set")) == TREE


def test_long_copies_say_what_where_and_why(bucket, capfd):
    fill(f"{bucket}/set", {f"{index}": b"x" * 1000 for index in range(100)})
    folder = stage(f"{bucket}/set", title="training reads each image many times")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == (
        f"{bucket}/set: 100 files, 100.0 kB, copied to {folder}: "
        "training reads each image many times"
    )


CHECKPOINT = {"info/data.json": b"{}", "model/arrays": b"of a model", "_METADATA": b"1"}


def marker(files=CHECKPOINT, **changed):
    listed = {
        name: [len(content), hashlib.sha256(content).hexdigest()]
        for name, content in (files | changed).items()
    }
    return json.dumps({"files": listed}).encode()


def test_checkpoints_count_once_their_marker_is_there(bucket, capfd):
    store = fill(f"{bucket}/run", {"config.json": b"{}"})
    for step in (1, 2, 3, 4):
        fill(f"{bucket}/run/checkpoints/{step}", CHECKPOINT)
    store.write("checkpoints/1/commit_success.txt", marker())
    store.write("checkpoints/2/commit_success.txt", b"Checkpoint commit was successful")  # Orbax's
    store.write("checkpoints/4/commit_success.txt", marker(absent=b"x"))
    folder = stage(f"{bucket}/run", title="a test")
    steps = {path.name for path in (folder / "checkpoints").iterdir()}
    assert steps == {"1", "2"}
    warning = capfd.readouterr().err  # nothing of 3, which may be written right now
    assert warning.count("warning") == 1
    assert "run/checkpoints/4 is left out: checkpoints/4/absent is gone or has another" in warning
    assert tree_of(folder / "checkpoints/2").keys() == {*CHECKPOINT, "commit_success.txt"}

    store.write("checkpoints/3/commit_success.txt", marker())
    store.delete(["checkpoints/1/commit_success.txt"])  # the run deletes it
    stage(f"{bucket}/run", lambda name: name.endswith(".json"), title="a test")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"2", "3"}
    assert tree_of(folder / "checkpoints/3") == {"info/data.json": b"{}"}


def test_files_of_a_checkpoint_are_those_that_the_run_wrote(bucket):
    fill(f"{bucket}/run/checkpoints/1", CHECKPOINT | {"model/arrays": b"of another"})
    Store(bucket).write("run/checkpoints/1/commit_success.txt", marker())
    with pytest.raises(UserError, match=r"checkpoints/1/model/arrays is damaged.*SHA-256"):
        stage(f"{bucket}/run", title="a test")
    assert not (local_path(f"{bucket}/run") / "checkpoints/1/model/arrays").exists()


def test_addresses_are_checked():
    with pytest.raises(UserError, match="expected gs://BUCKET/PATH"):
        stage("gs://bucket//x", title="a test")
    assert isinstance(local_path("gs://bucket/x"), pathlib.Path)
