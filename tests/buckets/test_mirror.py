"""The mirror of a run's folder: what each state of the bucket holds, and outages."""

import contextlib
import hashlib
import json
import pathlib
import random
import shutil
import threading
import time

import pytest

from deeplab_jax.buckets import mirror as mirror_lib
from deeplab_jax.buckets.mirror import BucketLost, Mirror
from deeplab_jax.buckets.store import Entry, Store, Unreachable
from deeplab_jax.utils.errors import UserError


class RecordingStore:
    """A store in memory that records its writes and deletions, and may be unreachable."""

    url = "gs://bucket/run"

    def __init__(self, objects=()):
        self.objects, self.actions = dict(objects), []
        self.error = None  # that all requests raise
        self.before = lambda name: None  # called before each write

    def _do(self, name, content):
        self.before(name)
        if self.error:
            raise self.error
        self.actions.append((name, content))
        apply(self.objects, name, content)

    def list(self, prefix=""):
        if self.error:
            raise self.error
        return {
            name: Entry(len(content), "", hashlib.md5(content).hexdigest(), 0)
            for name, content in sorted(self.objects.items())
        }

    def read(self, name):
        return self.objects.get(name)

    def write(self, name, content):
        self._do(name, content)

    def upload(self, path, name):
        self._do(name, path.read_bytes())

    def delete(self, names):
        for name in names:
            self._do(name, None)

    @property
    def written(self):
        return [name for name, content in self.actions if content is not None]


def apply(objects, name, content) -> None:
    if content is None:
        objects.pop(name, None)
    else:
        objects[name] = content


class Run:
    """What training does to its folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.random = random.Random(0)
        self.write("config.json", b"{}")
        self.write(".lock", b"hidden")

    def write(self, name, content=b"") -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def train(self, step, place="") -> None:
        """Trains to a step, the multiple of ten of a checkpoint."""
        (self.folder / place).mkdir(exist_ok=True)
        with (self.folder / place / "metrics.jsonl").open("a", buffering=1) as file:
            for each in range(step - 9, step + 1):
                file.write(json.dumps({"step": each}) + "\n")
        self.save(step, place)

    def save(self, step, place="") -> None:
        """As Orbax does, whose data files have random names."""
        unfinished = f"{place}checkpoints/{step}.orbax-checkpoint-tmp"
        for _ in range(3):
            data = self.random.randbytes(20)
            self.write(f"{unfinished}/model/d/{data.hex()[:8]}", data)
        self.write(f"{unfinished}/model/manifest.ocdbt", str(step).encode())
        self.write(f"{unfinished}/_CHECKPOINT_METADATA", b"{}")
        self.write(f"{unfinished}/commit_success.txt", b"Checkpoint commit was successful to ...")
        (self.folder / unfinished).rename(self.folder / place / "checkpoints" / str(step))

    def delete(self, name) -> None:
        shutil.rmtree(self.folder / name)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    for name, seconds in {"_LOOK": 0.01, "_PLAIN": 0.02, "_RETRY": 0.02, "_MAX_RETRY": 0.1}.items():
        monkeypatch.setattr(mirror_lib, name, seconds)


@contextlib.contextmanager
def mirror(store, run, *, patience=60.0, log=pytest.fail, check=lambda: None):
    mirror = Mirror(store, run.folder, patience=patience, log=log, check=check)
    yield mirror
    mirror.stop()


def mirrored(run, *steps) -> RecordingStore:
    """Trains to each of the steps, and returns a store to which the run was then mirrored."""
    store = RecordingStore()
    for step in steps:
        run.train(step)
    with mirror(store, run) as active:
        active.close()
    return store


def is_soon(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def local_files(folder) -> dict[str, bytes]:
    """All files that are mirrored as they are."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {
        name: content
        for name, content in files.items()
        if not name.endswith("commit_success.txt") and not name.startswith((".", "broken/"))
    }


def checkpoints(objects, place="") -> list[int]:
    """The steps of checkpoints with a marker, which must be whole and with their metrics."""
    steps = []
    for name in objects:
        if not name.startswith(f"{place}checkpoints/") or not name.endswith("commit_success.txt"):
            continue
        folder = name.removesuffix("commit_success.txt")
        files = json.loads(objects[name])["files"]
        assert "model/manifest.ocdbt" in files
        for file, (size, digest) in files.items():
            content = objects[folder + file]
            assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
        step = int(folder.split("/")[-2])
        assert objects[f"{folder}model/manifest.ocdbt"] == str(step).encode()
        lines = objects[f"{place}metrics.jsonl"].splitlines()
        assert [json.loads(line)["step"] for line in lines][:step] == list(range(1, step + 1))
        assert "config.json" in objects
        steps.append(step)
    return sorted(steps)


def states(before, actions):
    """Yields the bucket after each action."""
    objects = dict(before)
    for name, content in actions:
        apply(objects, name, content)
        yield objects


def test_the_bucket_has_what_the_folder_has(bucket, run, tmp_path):
    store = Store(f"{bucket}/runs/a")
    run.write("tensorboard/events", b"1")
    run.write("broken/40/data")
    run.write("pictures/a.png.partial")
    run.write("pictures/b.png", b"2")
    run.write("checkpoints/40.orbax-checkpoint-tmp-7/data")
    run.train(10, "stage1/")
    run.train(10)
    with mirror(store, run) as active:
        active.flush()
        run.train(20)
        run.delete("checkpoints/10")
        run.write("tensorboard/events", b"12")
        active.close()
    run.delete("checkpoints/40.orbax-checkpoint-tmp-7")
    (run.folder / "pictures/a.png.partial").unlink()
    there = {name: store.read(name) for name in store.list()}
    markers = ["checkpoints/20/commit_success.txt", "stage1/checkpoints/10/commit_success.txt"]
    assert there == local_files(run.folder) | {name: there[name] for name in markers}
    assert checkpoints(there) == [20]
    assert checkpoints(there, "stage1/") == [10]


def test_the_order_of_writes(run):
    store = RecordingStore()
    run.train(10)
    with mirror(store, run) as active:
        active.flush()
        marker = store.written.index("checkpoints/10/commit_success.txt")
        assert {"config.json", "metrics.jsonl"} <= set(store.written[:marker])
        assert (
            max(
                index
                for index, name in enumerate(store.written)
                if name.startswith("checkpoints/10/")
            )
            == marker
        )
        store.actions.clear()
        run.train(20)
        run.delete("checkpoints/10")
        active.flush()
    names = [name for name, _ in store.actions]
    deleted = [name for name, content in store.actions if content is None]
    assert deleted[0] == "checkpoints/10/commit_success.txt"
    assert len(deleted) == 6
    assert names.index("metrics.jsonl") < names.index("checkpoints/20/commit_success.txt")
    assert names.index("checkpoints/20/commit_success.txt") < names.index(deleted[0])
    assert "config.json" not in names  # which did not change


def test_every_state_of_the_bucket_can_be_resumed(run):
    """With three kept checkpoints, an outage, and a mirror that is stopped and started."""
    store, before = RecordingStore(), {}
    unreachable = Unreachable("no route")
    run.random.seed(1)
    for part in range(3):
        with mirror(store, run, log=lambda line: None) as active:
            for step in range(100 * part + 10, 100 * part + 100, 10):
                run.train(step)
                if step > 30:
                    run.delete(f"checkpoints/{step - 30}")
                store.error = unreachable if run.random.random() < 0.3 else None
                time.sleep(run.random.random() * 0.03)
            store.error = None
            if part == 2:
                active.close()
        run.train(100 * part + 100)
        run.delete(f"checkpoints/{100 * part + 70}")
    is_begun = False
    for objects in states(before, store.actions):
        found = checkpoints(objects)
        assert found or not is_begun, "no checkpoint"
        is_begun |= bool(found)
    assert found == [270, 280, 290]
    assert sum(name.endswith("txt") for name in store.written) > 4


def test_files_that_are_there_are_not_uploaded_again(run):
    store = RecordingStore()
    run.train(10)
    run.train(20)
    with mirror(store, run) as active:
        active.close()
    # A second mirror finds one checkpoint complete, one without its marker, and one old file.
    del store.objects["checkpoints/20/commit_success.txt"]
    run.write("config.json", b"[]")
    store.actions.clear()
    with mirror(store, run) as active:
        active.close()
    assert store.written == ["config.json", "checkpoints/20/commit_success.txt"]
    assert checkpoints(store.objects) == [10, 20]


def test_a_checkpoint_that_was_damaged_in_the_bucket_is_uploaded_again(run):
    store = RecordingStore()
    run.train(10)
    with mirror(store, run) as active:
        active.close()
    whole = dict(store.objects)
    name = next(name for name in whole if name.startswith("checkpoints/10/model/"))
    for damaged in (whole | {name: b"?"}, {key: whole[key] for key in whole if key != name}):
        store = RecordingStore(damaged)
        with mirror(store, run) as active:
            active.close()
        assert store.written == [name, "checkpoints/10/commit_success.txt"]
        assert store.objects == whole


def test_lines_that_are_appended(run):
    store = RecordingStore()
    run.write("metrics.jsonl")
    run.write("tensorboard/events")
    files = [
        (run.folder / name).open("ab", buffering=0)
        for name in ("metrics.jsonl", "tensorboard/events")
    ]
    with mirror(store, run) as active:
        for step in range(1, 300):
            line = json.dumps({"step": step}).encode() + b"\n"
            for part in (line[:5], line[5:]):
                for file in files:
                    file.write(part)
                time.sleep(0.0002)
        files[0].write(b'{"step": 300')
        active.close()
    snapshots = [content for name, content in store.actions if name == "metrics.jsonl"]
    assert len(snapshots) > 3
    for content in snapshots:
        steps = [json.loads(line)["step"] for line in content.splitlines()]
        assert steps == list(range(1, len(steps) + 1))
        assert content.endswith(b"\n") or not content
    assert len(steps) == 299
    assert store.objects["tensorboard/events"] == (run.folder / "tensorboard/events").read_bytes()


def test_files_that_grow_are_uploaded_now_and_then_and_with_a_checkpoint(run, monkeypatch):
    monkeypatch.setattr(mirror_lib, "_PLAIN", 30.0)
    store = RecordingStore()
    with mirror(store, run):
        assert is_soon(lambda: store.written == ["config.json"])
        for number in range(20):
            run.write("tensorboard/events", bytes(number))
            time.sleep(0.01)
        assert store.written == ["config.json"]
        run.train(10)
        assert is_soon(lambda: "checkpoints/10/commit_success.txt" in store.objects)
        assert store.written.count("tensorboard/events") == 1


def test_unfinished_checkpoints_of_an_earlier_attempt_are_deleted(run):
    store = RecordingStore({"checkpoints/10/model/d/1": b"1", "checkpoints/5/model/d/1": b"1"})
    run.train(10)
    with mirror(store, run) as active:
        active.close()
    assert checkpoints(store.objects) == [10]
    assert not [name for name in store.objects if name.endswith("d/1")]


def test_a_checkpoint_that_is_made_again_replaces_the_first(run):
    store = RecordingStore()
    run.train(10)
    run.train(20)
    with mirror(store, run) as active:
        active.flush()
        before, first = dict(store.objects), set(store.objects)
        store.actions.clear()
        run.delete("checkpoints/20")
        run.save(20)
        active.close()
    for objects in states(before, store.actions):
        assert 10 in checkpoints(objects)
    assert checkpoints(store.objects) == [10, 20]
    data = {name for name in first if name.startswith("checkpoints/20/model/d")}
    assert not data & set(store.objects)


def test_a_newer_checkpoint_that_is_gone_goes_before_metrics_without_its_steps(run):
    """A run that could not read its newest checkpoint went back to the one before."""
    store = mirrored(run, 10, 20)
    before = dict(store.objects)
    store.actions.clear()
    (run.folder / "broken").mkdir()
    (run.folder / "checkpoints/20").rename(run.folder / "broken/20")
    lines = (run.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    run.write("metrics.jsonl", b"".join(lines[:10]))
    with mirror(store, run) as active:
        active.close()
    for objects in states(before, store.actions):
        assert 10 in checkpoints(objects)
    assert checkpoints(store.objects) == [10]


def test_without_local_checkpoints_none_is_deleted(run):
    store = RecordingStore()
    run.train(10)
    run.train(10, "stage1/")
    with mirror(store, run) as active:
        active.close()
    run.delete("checkpoints")
    run.delete("stage1")
    with mirror(store, run) as active:
        active.close()
    assert checkpoints(store.objects) == checkpoints(store.objects, "stage1/") == [10]


def test_a_checkpoint_that_a_kill_left_in_part_stays_whole_in_the_bucket(run):
    store = mirrored(run, 10, 20)
    (run.folder / "checkpoints/10/model/manifest.ocdbt").unlink()
    store.actions.clear()
    with mirror(store, run) as active:
        active.close()
    assert store.actions == []


def test_checkpoints_that_were_copied_by_hand_are_kept(run):
    run.train(10)
    run.train(20)
    text = {"commit_success.txt": b"Checkpoint commit was successful to ..."}
    objects = local_files(run.folder)
    for step in (10, 20):
        objects[f"checkpoints/{step}/commit_success.txt"] = text["commit_success.txt"]
    store = RecordingStore(objects)
    run.delete("checkpoints/10")
    with mirror(store, run) as active:
        active.flush()
        assert not [name for name in store.written if name.startswith("checkpoints")]
        run.train(30)
        active.close()
    assert "checkpoints/20/commit_success.txt" in store.objects
    assert "checkpoints/10/commit_success.txt" not in store.objects


def test_a_checkpoint_that_vanishes_in_mid_upload_is_left_out(run):
    store = RecordingStore()
    run.train(10)

    def vanish(name):
        if name.startswith("checkpoints/10/") and (run.folder / "checkpoints/10").exists():
            run.delete("checkpoints/10")
            run.train(20)
            raise UserError("there is no such file")  # as a library that misses the local file

    store.before = vanish
    with mirror(store, run) as active:
        active.close()
    assert all(10 not in checkpoints(objects) for objects in states({}, store.actions))
    assert checkpoints(store.objects) == [20]
    assert not [name for name in store.objects if name.startswith("checkpoints/10/")]


def test_a_checkpoint_that_vanishes_before_its_marker_gets_none(run):
    store = RecordingStore()
    run.train(10)
    store.before = lambda name: (
        name == "metrics.jsonl" and shutil.rmtree(run.folder / "checkpoints/10", ignore_errors=True)
    )
    with mirror(store, run) as active:
        active.close()
    assert "checkpoints/10/commit_success.txt" not in store.written
    assert not [name for name in store.objects if name.startswith("checkpoints/10/")]


@pytest.mark.parametrize("error", [Unreachable("no route"), UserError("403: not permitted")])
def test_an_outage_is_waited_for(run, error):
    store, lines = RecordingStore(), []
    with mirror(store, run, log=lines.append) as active:
        assert is_soon(lambda: "config.json" in store.objects)
        store.error = error
        for step in (10, 20):
            run.train(step)
        assert is_soon(lambda: lines)
        time.sleep(0.2)
        active.check()
        threading.Timer(0.2, lambda: setattr(store, "error", None)).start()
        active.close()
    markers = [name for name in store.written if name.endswith("commit_success.txt")]
    assert [int(name.split("/")[1]) for name in markers] == [20, 10]  # the newest first
    assert checkpoints(store.objects) == [10, 20]
    assert lines == [
        f"gs://bucket/run cannot be reached ({error}): saves stay in {run.folder} until it answers",
        "waiting for gs://bucket/run, up to 60 s",
        "gs://bucket/run answers again, and has all that was late",
    ]


def test_an_outage_at_the_start_is_waited_for(run):
    store, lines = RecordingStore({"config.json": b"{}"}), []
    store.error = Unreachable("no route")
    with mirror(store, run, log=lines.append) as active:
        assert is_soon(lambda: lines)
        store.error = None
        active.close()
    assert store.actions == []


def test_a_longer_outage_ends_the_run_with_the_newest_checkpoint_named(run):
    store, lines = RecordingStore(), []
    store.error = Unreachable("no route")
    run.train(20, "stage1/")
    run.train(10)
    message = (
        rf"^gs://bucket/run .*no route.* {run.folder}, its newest checkpoint: "
        rf"{run.folder}/checkpoints/10\. .*same command on this machine goes on"
    )
    with mirror(store, run, patience=0.5, log=lines.append) as active:
        assert is_soon(lambda: lines)
        active.check()
        begin = time.monotonic()
        with pytest.raises(BucketLost, match=message) as raised:
            active.close()
        assert 0.3 < time.monotonic() - begin < 5
        assert raised.value.exit_code == 1
        with pytest.raises(BucketLost, match=message):
            active.check()
        with pytest.raises(BucketLost, match=message):
            active.flush()
    store.error = None
    time.sleep(0.3)
    assert store.actions == []  # nothing is written after the end
    assert len(lines) == 2


def test_progress_in_an_outage_is_no_loss(run):
    """Each second request fails: in all for longer than the patience, never at a stretch."""
    store, number = RecordingStore(), [0]
    run.train(10)
    for each in range(30):
        run.write(f"pictures/{each}.png")

    def fail(name):
        number[0] += 1
        if number[0] % 2:
            raise Unreachable("no route")

    store.before = fail
    begin = time.monotonic()
    with mirror(store, run, patience=1.0, log=lambda line: None) as active:
        active.close()
    assert time.monotonic() - begin > 1
    assert checkpoints(store.objects) == [10]


def test_a_mirror_without_the_lease_writes_nothing(run):
    store, lost = RecordingStore(), []

    def check():
        if lost:
            raise lost[0]

    lines = []
    with mirror(store, run, log=lines.append, check=check) as active:
        active.flush()
        store.actions.clear()
        lost.append(Unreachable("the lease could not be renewed"))
        run.train(10)
        assert is_soon(lambda: lines)
        lost[0] = UserError("the run was taken over")
        with pytest.raises(UserError, match="taken over"):
            active.close()
        with pytest.raises(UserError, match="taken over"):
            active.check()
    assert store.actions == []


def test_a_request_that_hangs_counts_as_an_outage(run):
    """The lease tells: it is not renewed any longer."""
    store, lines, go, errors = RecordingStore(), [], threading.Event(), []

    def check():
        if errors:
            raise errors[0]

    store.before = lambda name: go.wait()
    with mirror(store, run, patience=0.3, log=lines.append, check=check) as active:
        time.sleep(0.1)
        active.check()
        errors.append(Unreachable("the lease could not be renewed"))
        active.check()
        assert len(lines) == 1
        with pytest.raises(BucketLost, match="could not be renewed"):
            active.close()
        go.set()


def test_a_stopped_mirror_writes_nothing_more(run):
    store, begun, go = RecordingStore(), threading.Event(), threading.Event()
    for each in range(30):
        run.write(f"pictures/{each}.png")

    def wait(name):
        begun.set()
        go.wait()

    store.before = wait
    with mirror(store, run) as active:
        begun.wait()
        threading.Timer(0.1, go.set).start()
        active.stop()
        assert len(store.actions) == 1  # the one in progress
        time.sleep(0.1)
    assert len(store.actions) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError])
def test_an_unexpected_error_is_raised(run, error):
    store = RecordingStore()

    def fail(name):
        if name.startswith("checkpoints/10/model/"):
            raise error("in a library")

    store.before = fail
    run.train(10)
    with mirror(store, run) as active, pytest.raises(error):
        active.close()
    assert "checkpoints/10/commit_success.txt" not in store.objects


def test_the_end_of_the_block(run):
    def train(step, error):
        with Mirror(store, run.folder, patience=60, log=lambda line: None):
            run.train(step)
            if error:
                raise error

    store = RecordingStore()
    train(10, None)
    assert checkpoints(store.objects) == [10]
    with pytest.raises(UserError, match="first"):
        train(20, UserError("first"))
    assert checkpoints(store.objects) == [10, 20]
    store.error = Unreachable("no route")
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(30, KeyboardInterrupt())
    assert time.monotonic() - begin < 8


def test_a_server_that_stops_for_a_while(own_server, run):
    store, lines = Store(f"{own_server.make_bucket()}/run"), []
    with mirror(store, run, log=lines.append) as active:
        run.train(10)
        active.flush()
        own_server.freeze()
        run.train(20)
        run.delete("checkpoints/10")
        time.sleep(0.5)
        active.check()
        own_server.thaw()
        active.close()
    there = {name: store.read(name) for name in store.list()}
    assert checkpoints(there) == [20]
    assert not [name for name in there if name.startswith("checkpoints/10/")]


def test_a_server_that_is_gone_and_comes_back(tmp_path, monkeypatch, run):
    bucket_servers = pytest.importorskip("bucket_servers")
    server = bucket_servers.Server("gs", tmp_path / "server")
    bucket_servers._use(server, monkeypatch, tmp_path)
    try:
        store, lines = Store(f"{server.make_bucket()}/run"), []
        run.train(10)
        with mirror(store, run, log=lines.append) as active:
            active.flush()
            server.kill()
            run.train(20)
            time.sleep(1)
            server.start()
            active.close()
        assert checkpoints({name: store.read(name) for name in store.list()}) == [10, 20]
    finally:
        server.kill()
