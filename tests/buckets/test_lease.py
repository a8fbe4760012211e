"""The lease of a run: several takers, dead holders, other machines, outages."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from deeplab_jax.buckets import lease as lease_lib
from deeplab_jax.buckets.lease import Lease
from deeplab_jax.buckets.store import Store, Unreachable
from deeplab_jax.utils.errors import UserError

DEAD = subprocess.Popen([sys.executable, "-c", ""])
DEAD.wait()
DEAD = DEAD.pid  # of a process that has ended


class MemoryStore:
    """A store of which the requests named in `failing` do not reach the bucket."""

    url = "gs://bucket/run"

    def url_of(self, name):
        return f"{self.url}/{name}"

    def __init__(self):
        self.objects, self.failing, self._lock = {}, set(), threading.Lock()

    def _reach(self, request):
        if request in self.failing:
            raise Unreachable("no route to host")

    def list(self, prefix=""):
        self._reach("list")
        return {name: None for name in sorted(self.objects) if name.startswith(f"{prefix}/")}

    def read(self, name):
        self._reach("read")
        return self.objects.get(name)

    def write(self, name, content):
        self._reach("write")
        self.objects[name] = content

    def create(self, name, content):
        with self._lock:
            if name in self.objects:
                return False
            self.objects[name] = content
            return True

    def delete(self, names):
        for name in names:
            self.objects.pop(name, None)

    def holder(self, number):
        return json.loads(self.objects[f".lease/{number:06d}.json"])

    def put(self, number, **fields):
        """Writes the lease of a process on this machine that was killed, except for `fields`."""
        holder = {
            "pid": DEAD,
            "started": lease_lib._started(fields.get("pid", DEAD)),
            "host": socket.gethostname(),
            "boot": lease_lib._boot(),
            "copy": "its copy",
            "nonce": "its nonce",
            "turn": 3,
            "ended": False,
        }
        self.objects[f".lease/{number:06d}.json"] = json.dumps(holder | fields).encode()


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def take(tmp_path):
    """Takes a lease for a local copy of its own, and releases it at the end."""
    taken = []

    def take(store, copy="copy", log=lambda line: None):
        (tmp_path / copy).mkdir(exist_ok=True)
        taken.append(Lease.take(store, tmp_path / copy, log))
        return taken[-1]

    yield take
    for each in taken:
        each.release()


def numbers(store) -> list[int]:
    return [int(re.search(r"\d+", name)[0]) for name in store.list(".lease")]


def is_soon(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_one_run_after_another(bucket, tmp_path):
    store = Store(f"{bucket}/runs/a")
    for number, copy, is_own in [(1, "a", False), (2, "a", True), (3, "b", False), (4, "a", False)]:
        (tmp_path / copy).mkdir(exist_ok=True)
        with Lease.take(store, tmp_path / copy, pytest.fail) as held:
            assert held.is_copy_complete is is_own
            held.mark_complete()
            held.confirm()
            assert numbers(store) == [number - 1, number][number == 1 :]
            with pytest.raises(
                UserError,
                match=rf"^{store.url} is in use by process {os.getpid()} on host .*: wait for it "
                "or stop it, or choose another --workdir$",
            ):
                Lease.take(store, tmp_path / "c", pytest.fail)


def test_one_of_many_wins(bucket, tmp_path, monkeypatch):
    # Each thread is as a process on another host: this process's leases are none of its own.
    monkeypatch.setattr(lease_lib, "_boot", lambda: "")
    monkeypatch.setattr(lease_lib, "_RENEWAL", 0.1)
    monkeypatch.setattr(lease_lib, "_LOOK", 0.1)
    store, won, refused = Store(bucket), [], []
    barrier = threading.Barrier(8)

    def run(index):
        own = Store(bucket)
        barrier.wait()
        try:
            won.append(Lease.take(own, tmp_path / str(index), lambda line: None))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 7
    assert all("is in use by process" in line for line in refused)
    assert numbers(store) == [1]
    won[0].release()


def test_a_dead_process_on_this_machine_is_followed_at_once(memory, take):
    memory.put(6)
    memory.put(7)
    assert not take(memory, log=pytest.fail).is_copy_complete
    assert numbers(memory) == [7, 8]


def test_another_process_with_the_id_of_a_dead_one_is_not_that(memory, take):
    memory.put(1, pid=os.getppid(), started="before")
    take(memory, log=pytest.fail)
    assert numbers(memory) == [1, 2]


def test_a_process_that_nobody_waits_for_is_dead(memory, take):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        memory.put(1, pid=process.pid)
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            take(memory)
        process.kill()
        assert is_soon(lambda: lease_lib._started(process.pid) == "ended")
        take(memory, log=pytest.fail)


def test_a_copy_is_complete_until_another_is_begun(memory, take, tmp_path):
    take(memory).mark_complete()
    memory.failing = {"list"}
    with pytest.raises(Unreachable):
        take(memory)
    memory.failing = set()
    memory.put(2, copy=memory.holder(1)["copy"])
    for _ in range(2):  # killed before anything else
        assert take(memory).is_copy_complete
        memory.put(max(numbers(memory)) + 1, copy=memory.holder(max(numbers(memory)))["copy"])
    memory.put(max(numbers(memory)) + 1)  # of another copy
    for _ in range(2):
        assert not take(memory).is_copy_complete
        memory.put(max(numbers(memory)) + 1, copy=memory.holder(max(numbers(memory)))["copy"])


def test_a_killed_process_is_followed_and_its_copy_known(gs_bucket, tmp_path):
    code = (
        "import os, pathlib, signal; from deeplab_jax.buckets.lease import Lease, Store\n"
        f"held = Lease.take(Store('{gs_bucket}/run'), pathlib.Path('{tmp_path}'), print)\n"
        "held.mark_complete()\n"
        "print('taken', flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    store = Store(f"{gs_bucket}/run")
    try:
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on host"):
            Lease.take(store, tmp_path, pytest.fail)
    finally:
        process.kill()
        process.wait()
    with Lease.take(store, tmp_path, pytest.fail) as held:
        assert held.is_copy_complete


@pytest.mark.parametrize("other", [{"host": "other"}, {"boot": "of a container"}])
def test_a_live_process_on_another_machine_is_named(memory, take, monkeypatch, other):
    monkeypatch.setattr(lease_lib, "_LOOK", 0.01)
    memory.put(1, **other)
    threading.Timer(0.2, lambda: memory.put(1, turn=4, **other)).start()
    lines = []
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=f"in use by process {DEAD} on host {memory.holder(1)['host']}"
    ):
        take(memory, log=lines.append)
    assert time.monotonic() - begin < 5
    assert len(lines) == 1
    assert re.search(f"process {DEAD}.*watching for 30 s", lines[0])
    assert numbers(memory) == [1]


@pytest.mark.parametrize("now", [0.0, 4e9, -1e9])
def test_a_dead_process_on_another_machine_is_followed_whatever_the_clocks(
    memory, take, monkeypatch, now
):
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(lease_lib, "_WATCH", 0.3)
    monkeypatch.setattr(lease_lib, "_LOOK", 0.05)
    memory.put(1, host="other")
    begin = time.monotonic()
    take(memory)
    assert 0.3 <= time.monotonic() - begin < 5
    assert numbers(memory) == [1, 2]


def test_an_ended_lease_on_another_machine_is_followed_at_once(memory, take, monkeypatch):
    memory.put(1, host="other", ended=True)
    take(memory, log=pytest.fail)
    memory.put(3, host="other")
    monkeypatch.setattr(lease_lib, "_LOOK", 0.01)
    threading.Timer(0.2, lambda: memory.put(3, host="other", ended=True)).start()
    begin = time.monotonic()
    take(memory)
    assert time.monotonic() - begin < 5


def test_a_lost_answer_is_not_a_lost_lease(memory, take, monkeypatch):
    create = memory.create
    monkeypatch.setattr(memory, "create", lambda *arguments: create(*arguments) and False)
    take(memory).confirm()
    assert numbers(memory) == [1]


def test_a_lease_taken_after_later_ones_is_none(memory, take, monkeypatch):
    """A slow taker creates a number that others have passed and deleted meanwhile."""
    memory.put(5)
    create = memory.create

    def create_late(*arguments):
        monkeypatch.setattr(memory, "create", create)
        memory.objects.clear()
        memory.put(7, pid=os.getppid())
        return create(*arguments)

    monkeypatch.setattr(memory, "create", create_late)
    with pytest.raises(UserError, match=f"is in use by process {os.getppid()} "):
        take(memory)


def test_a_lease_is_renewed(memory, take, monkeypatch):
    monkeypatch.setattr(lease_lib, "_RENEWAL", 0.05)
    take(memory)
    assert is_soon(lambda: memory.holder(1)["turn"] >= 3)


def test_an_outage_ends_no_lease(memory, take, monkeypatch):
    monkeypatch.setattr(lease_lib, "_RENEWAL", 0.02)
    monkeypatch.setattr(lease_lib, "_WATCH", 0.2)
    held = take(memory)
    held.confirm()
    memory.failing = {"write"}
    time.sleep(0.3)
    with pytest.raises(Unreachable, match="could not be renewed"):
        held.confirm()
    memory.failing = set()
    turn = memory.holder(1)["turn"]
    assert is_soon(lambda: memory.holder(1)["turn"] > turn + 1)
    held.confirm()


def test_a_lost_lease_is_noticed(memory, take, monkeypatch):
    monkeypatch.setattr(lease_lib, "_RENEWAL", 0.05)
    held = take(memory)
    memory.put(2, host="other")
    assert is_soon(lambda: held.lost)
    with pytest.raises(
        UserError, match=f"gs://bucket/run was taken over by process {DEAD} on host other while"
    ):
        held.confirm()
    held.release()
    assert not memory.holder(1)["ended"]


def test_a_released_lease_is_not_written_again(memory, take, monkeypatch):
    monkeypatch.setattr(lease_lib, "_RENEWAL", 0.001)
    for number in range(1, 20):
        held = take(memory)
        time.sleep(0.005)
        held.release()
        time.sleep(0.005)
        assert memory.holder(number)["ended"]


def test_a_release_without_the_bucket_is_silent(memory, take):
    held = take(memory)
    memory.failing = {"write", "list", "read"}
    held.release()
    memory.failing = set()
    take(memory)  # this process holds it no longer
    assert numbers(memory) == [1, 2]


def test_a_take_without_the_bucket_leaves_nothing(memory, take):
    memory.failing = {"list"}
    with pytest.raises(Unreachable):
        take(memory)
    assert not lease_lib._held


@pytest.mark.parametrize("content", [b'{"pid": 47', b"[1]", b"{}", b'{"pid": 4711}', b"\xff"])
def test_a_damaged_lease_is_named(memory, take, content):
    memory.objects[".lease/000003.json"] = content
    with pytest.raises(UserError, match=r"\.lease/000003\.json is damaged.*Delete it"):
        take(memory)
