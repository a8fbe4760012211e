"""Archives: mirrors, checksums, damage, and what is unpacked of them."""

import dataclasses
import functools
import hashlib
import http.server
import io
import pathlib
import tarfile
import threading

import pytest

from deeplab_jax.data.datasets import archives
from deeplab_jax.utils.errors import UserError

FILES = {
    "kit/data/lists/train.txt": b"a b\n",
    "kit/data/images/a.jpg": bytes(range(256)) * 400,
    "kit/data/images/b.jpg": b"b" * 3000,
    "kit/data/other/c.xml": b"not wanted",
    "elsewhere/images/d.jpg": b"not wanted",
}


def pack(path: pathlib.Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def archive_of(path: pathlib.Path, *urls: str) -> archives.Archive:
    """The archive as whose publication a file is taken."""
    return archives.Archive(
        file_name=path.name,
        urls=urls or ("http://example.invalid/kit",),
        md5=hashlib.md5(path.read_bytes()).hexdigest(),
        num_bytes=path.stat().st_size,
        folder="kit/data",
        marker="lists/train.txt",
    )


@pytest.fixture
def published(tmp_path):
    pack(tmp_path / "kit.tar", FILES)
    return archives.Place(archive_of(tmp_path / "kit.tar"), tmp_path / "kit.tar")


@pytest.fixture
def web(tmp_path):
    """A web server on this machine, which serves the folder `web`; gives its address."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def files_below(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_unpacks_what_is_wanted(tmp_path, mode):
    pack(tmp_path / "kit.tar", FILES, mode)
    place = archives.Place(archive_of(tmp_path / "kit.tar"), tmp_path / "kit.tar")
    folder = archives.unpack(place, ("lists", "images"), tmp_path / "out")
    assert folder == tmp_path / "out/kit/data"
    wanted = {name: FILES[name] for name in list(FILES)[:3]}
    assert files_below(tmp_path / "out") == wanted


def test_unpacks_files_of_the_folder_itself(tmp_path):
    pack(tmp_path / "kit.tar", {"./kit/data/train.txt": b"a", "./kit/data/img/a.jpg": b"b"})
    archive = dataclasses.replace(archive_of(tmp_path / "kit.tar"), marker="train.txt")
    archives.unpack(archives.Place(archive, tmp_path / "kit.tar"), (".",), tmp_path / "out")
    assert files_below(tmp_path / "out") == {"kit/data/train.txt": b"a"}


def test_never_writes_outside(tmp_path):
    files = {"kit/data/lists/train.txt": b"a", "kit/data/images/../../../../evil": b"x"}
    pack(tmp_path / "kit.tar", files)
    place = archives.Place(archive_of(tmp_path / "kit.tar"), tmp_path / "kit.tar")
    archives.unpack(place, ("lists", "images/../../../.."), tmp_path / "in/out")
    assert sorted(files_below(tmp_path)) == ["in/out/kit/data/lists/train.txt", "kit.tar"]


def test_an_unpacked_archive_is_used_as_it_is(tmp_path, published):
    folder = archives.unpack(published, ("lists",), tmp_path / "root")
    place = archives.find(published.archive, tmp_path / "root")
    assert place.unpacked
    assert archives.unpack(place, ("lists",), tmp_path / "never") == folder
    assert not (tmp_path / "never").exists()


def test_find(tmp_path, published):
    assert archives.find(published.archive, tmp_path) == published
    assert archives.find(published.archive, tmp_path / "absent") is None
    (tmp_path / "kit/data/lists").mkdir(parents=True)
    assert archives.find(published.archive, tmp_path) == published  # a folder without its lists
    (tmp_path / "kit/data/lists/train.txt").touch()
    assert archives.find(published.archive, tmp_path).path == tmp_path / "kit/data"


def test_a_flipped_bit_is_noticed(tmp_path, published):
    data = bytearray(published.path.read_bytes())
    data[5000] ^= 1
    published.path.write_bytes(data)
    with pytest.raises(UserError, match=r"kit\.tar: is damaged: its MD5 .*http://example\.invalid"):
        archives.unpack(published, ("lists",), tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_archive_is_noticed(tmp_path, mode, share):
    pack(tmp_path / "kit.tar", FILES, mode)
    archive = archive_of(tmp_path / "kit.tar")
    data = (tmp_path / "kit.tar").read_bytes()
    (tmp_path / "kit.tar").write_bytes(data[: int(share * len(data))])
    place = archives.Place(archive, tmp_path / "kit.tar")
    with pytest.raises(UserError, match=r"kit\.tar: .*damaged or truncated.*as published\. Downl"):
        archives.unpack(place, ("lists", "images"), tmp_path / "out")


def test_an_archive_packed_anew_is_used_with_a_warning(tmp_path, published, caplog):
    pack(published.path, FILES | {"kit/data/images/e.jpg": b"e" * 20_000})
    archives.unpack(published, ("lists", "images"), tmp_path / "out")
    assert (tmp_path / "out/kit/data/images/e.jpg").stat().st_size == 20_000
    assert "is not kit.tar as published" in caplog.text


def test_an_archive_of_something_else(tmp_path, published):
    pack(published.path, {"other/file": b"x" * 30_000})
    with pytest.raises(UserError, match=r"holds no kit/data/lists/train\.txt"):
        archives.unpack(published, ("lists",), tmp_path / "out")


def test_downloads_from_the_first_mirror_that_answers(tmp_path, web, capsys):
    pack(tmp_path / "web/kit.tar", FILES)
    archive = archive_of(tmp_path / "web/kit.tar", f"{web}/gone.tar", f"{web}/kit.tar")
    place = archives.download(archive, tmp_path / "downloads")
    assert place.path == tmp_path / "downloads/kit.tar"
    assert place.path.read_bytes() == (tmp_path / "web/kit.tar").read_bytes()
    assert capsys.readouterr().out == ""
    (tmp_path / "web/kit.tar").unlink()
    assert archives.download(archive, tmp_path / "downloads") == place  # not again


def test_a_failed_download_tells_why_and_leaves_nothing(tmp_path, web):
    pack(tmp_path / "web/kit.tar", FILES)
    archive = archive_of(tmp_path / "web/kit.tar", f"{web}/gone.tar", f"{web}/kit.tar")
    (tmp_path / "web/kit.tar").write_bytes(b"something else")
    with pytest.raises(UserError) as raised:
        archives.download(archive, tmp_path / "downloads")
    message = str(raised.value)
    assert f"{web}/gone.tar: HTTP Error 404" in message
    assert f"{web}/kit.tar: " in message
    assert "MD5" in message
    assert "config.data.root" in message
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_connection_that_breaks_off_is_a_failure(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        headers = {"Content-Length": "500"}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"x" * 100))
    archive = archives.Archive("kit.tar", ("http://a",), "0" * 32, 500, "kit", "list")
    with pytest.raises(UserError, match="broke off after 100 bytes"):
        archives.download(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
