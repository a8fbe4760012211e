"""Objects in buckets, against servers on this machine."""

import hashlib
import subprocess
import sys

import pytest

from deeplab_jax.buckets import store
from deeplab_jax.buckets.store import Store, Unreachable, check_address
from deeplab_jax.utils.errors import UserError


def test_objects_come_back_as_they_were_written(bucket, tmp_path):
    run = Store(f"{bucket}/runs/a/")
    content = bytes(range(256)) * 5
    run.write("config.json", b"{}")
    (tmp_path / "file").write_bytes(content)
    run.upload(tmp_path / "file", "checkpoints/10/data")
    Store(f"{bucket}/runs/ab").write("other", b"")
    assert run.read("config.json") == b"{}"
    assert run.read("absent") is None
    found = run.list()
    assert {name: entry.size for name, entry in found.items()} == {
        "config.json": 2,
        "checkpoints/10/data": len(content),
    }
    assert found["checkpoints/10/data"].md5 == hashlib.md5(content).hexdigest()
    assert list(run.list("checkpoints")) == ["checkpoints/10/data"]
    assert run.list("check") == {}
    assert list(Store(f"{bucket}/runs/a/config.json").list()) == [""]
    run.download("checkpoints/10/data", tmp_path / "copy", found["checkpoints/10/data"])
    assert (tmp_path / "copy").read_bytes() == content
    run.write("config.json", b"{} ")
    assert run.list("config.json")["config.json"].tag != found["config.json"].tag
    run.delete(["config.json", "absent"])
    assert list(run.list()) == ["checkpoints/10/data"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n", b"\n\r"])
def test_the_end_of_a_line_at_the_end_of_a_file_is_kept(bucket, tmp_path, end):
    run = Store(bucket)
    path = tmp_path / "file"
    for name, content in {
        "end": end,
        "short": b"a\r\nb" + end,
        "long": bytes(6_000_000) + end,
    }.items():
        path.write_bytes(content)
        run.upload(path, name)
        assert run.read(name) == content, name
        run.write(name, content)
        assert run.read(name) == content, name


@pytest.mark.parametrize("size", [100, 6_000_000])
def test_what_a_server_stores_otherwise_counts_as_not_written(servers, gs_bucket, size, tmp_path):
    assert gs_bucket  # its environment
    run = Store(servers("gs").make_bucket("lossy"))
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(Unreachable, match="MD5"):
        run.upload(tmp_path / "file", "a")
    with pytest.raises(Unreachable, match="MD5"):
        run.write("a", bytes(size))
    with pytest.raises(Unreachable, match="MD5"):
        run.create(f"new {size}", bytes(size))


def test_a_download_that_differs_is_refused(bucket, tmp_path):
    run = Store(bucket)
    run.write("a", b"before")
    entry = run.list()["a"]
    run.write("a", b"after!")
    with pytest.raises(Unreachable, match="changed or was damaged"):
        run.download("a", tmp_path / "a", entry)


def test_only_one_creates_an_object(bucket):
    assert Store(bucket).create("a", b"1")
    assert not Store(bucket).create("a", b"2")
    assert Store(bucket).read("a") == b"1"


def test_a_bucket_that_does_not_exist_is_named(server):
    absent = Store(f"{server.scheme}://no-such-bucket/run")
    for action in (lambda: absent.list(), lambda: absent.write("a", b""), absent.check_writable):
        with pytest.raises(UserError, match=r"no bucket 'no-such-bucket'.*create"):
            action()


def test_a_bucket_without_permission_to_write_says_which(server):
    run = Store(f"{server.make_bucket('readonly-bucket')}/run")
    assert run.list() == {}
    permission = {"gs": "storage.objects.create", "s3": "s3:PutObject"}[server.scheme]
    with pytest.raises(UserError, match=f"not permitted to write.*{permission}"):
        run.check_writable()


@pytest.mark.parametrize(
    "url",
    [
        "gs:///run",
        "gs://",
        "gs://bucket//run",
        "s3://bucket/a//b",
        "gs://bkt/../c",
        "s3://a b",
        "gs://b/run",
    ],
)
def test_malformed_addresses_are_refused(url):
    with pytest.raises(UserError, match=r"expected (gs|s3)://BUCKET/PATH"):
        check_address(url)


def test_a_slash_at_the_end_is_dropped():
    assert check_address("gs://bucket/run/") == "gs://bucket/run"


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(store._EXTRAS, "gs", ("gcs", "no_such_package.core"))
    with pytest.raises(UserError, match=r"pip install 'deeplab-jax\[gcs\]'"):
        Store("gs://bucket/run")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_gone_is_unreachable(own_server):
    run = Store(own_server.make_bucket())
    run.write("a", b"1")
    own_server.kill()
    with pytest.raises(Unreachable, match="a: "):
        run.read("a")


def test_no_credentials_are_named(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no valid credentials.*aws configure"):
        Store("s3://bucket/run").list()


def test_the_package_imports_no_cloud_library():
    code = (
        "import sys, deeplab_jax, deeplab_jax.buckets.store, deeplab_jax.training.train\n"
        "print([name for name in ('gcsfs', 's3fs', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
