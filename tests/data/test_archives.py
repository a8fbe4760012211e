"""Archives: mirrors, checksums, damage, and the files that are unpacked."""

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
def packed(tmp_path):
    pack(tmp_path / "kit.tar", FILES)
    return archive_of(tmp_path / "kit.tar"), tmp_path / "kit.tar"


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
def test_unpacks_the_selected_files(tmp_path, mode):
    pack(tmp_path / "kit.tar", FILES, mode)
    archive = archive_of(tmp_path / "kit.tar")
    folder = archives.unpack(archive, tmp_path / "kit.tar", ("lists", "images"), tmp_path / "out")
    assert folder == tmp_path / "out/kit/data"
    wanted = {name: FILES[name] for name in list(FILES)[:3]}
    assert files_below(tmp_path / "out") == wanted


def test_unpacks_files_of_the_folder_itself(tmp_path):
    pack(tmp_path / "kit.tar", {"./kit/data/train.txt": b"a", "./kit/data/img/a.jpg": b"b"})
    archive = dataclasses.replace(archive_of(tmp_path / "kit.tar"), marker="train.txt")
    archives.unpack(archive, tmp_path / "kit.tar", (".",), tmp_path / "out")
    assert files_below(tmp_path / "out") == {"kit/data/train.txt": b"a"}


def test_never_writes_outside(tmp_path):
    files = {"kit/data/lists/train.txt": b"a", "kit/data/images/../../../../evil": b"x"}
    pack(tmp_path / "kit.tar", files)
    folders = ("lists", "images/../../../..")
    archives.unpack(
        archive_of(tmp_path / "kit.tar"), tmp_path / "kit.tar", folders, tmp_path / "in/out"
    )
    assert sorted(files_below(tmp_path)) == ["in/out/kit/data/lists/train.txt", "kit.tar"]


def test_an_unpacked_archive_is_used_as_it_is(tmp_path, packed):
    folder = archives.unpack(*packed, ("lists",), tmp_path / "root")
    assert archives.find_archive(packed[0], tmp_path / "root") == folder
    assert archives.unpack(packed[0], folder, ("lists",), tmp_path / "never") == folder
    assert not (tmp_path / "never").exists()


def test_find_archive(tmp_path, packed):
    archive, file = packed
    assert archives.find_archive(archive, tmp_path) == file
    assert archives.find_archive(archive, tmp_path / "absent") is None
    (tmp_path / "kit/data/lists").mkdir(parents=True)
    assert archives.find_archive(archive, tmp_path) == file  # a folder without its lists
    (tmp_path / "kit/data/lists/train.txt").touch()
    assert archives.find_archive(archive, tmp_path) == tmp_path / "kit/data"


def test_a_flipped_bit_is_noticed(tmp_path, packed):
    data = bytearray(packed[1].read_bytes())
    data[5000] ^= 1
    packed[1].write_bytes(data)
    with pytest.raises(UserError, match=r"kit\.tar: is damaged: its MD5 .*http://example\.invalid"):
        archives.unpack(*packed, ("lists",), tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6])
def test_a_truncated_archive_is_noticed(tmp_path, mode, fraction):
    pack(tmp_path / "kit.tar", FILES, mode)
    archive = archive_of(tmp_path / "kit.tar")
    data = (tmp_path / "kit.tar").read_bytes()
    (tmp_path / "kit.tar").write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(UserError, match=r"kit\.tar: .*damaged or truncated.*as published\. Downl"):
        archives.unpack(archive, tmp_path / "kit.tar", ("lists", "images"), tmp_path / "out")


def test_a_repacked_archive_is_used_with_a_warning(tmp_path, packed, caplog):
    pack(packed[1], FILES | {"kit/data/images/e.jpg": b"e" * 20_000})
    archives.unpack(*packed, ("lists", "images"), tmp_path / "out")
    assert (tmp_path / "out/kit/data/images/e.jpg").stat().st_size == 20_000
    assert "is not kit.tar as published" in caplog.text


def test_an_archive_of_something_else(tmp_path, packed):
    pack(packed[1], {"other/file": b"x" * 30_000})
    with pytest.raises(UserError, match=r"holds no kit/data/lists/train\.txt"):
        archives.unpack(*packed, ("lists",), tmp_path / "out")


def test_downloads_from_the_first_mirror_that_answers(tmp_path, web, capsys):
    pack(tmp_path / "web/kit.tar", FILES)
    archive = archive_of(tmp_path / "web/kit.tar", f"{web}/gone.tar", f"{web}/kit.tar")
    path = archives.download(archive, tmp_path / "downloads")
    assert path == tmp_path / "downloads/kit.tar"
    assert path.read_bytes() == (tmp_path / "web/kit.tar").read_bytes()
    assert capsys.readouterr().out == ""
    (tmp_path / "web/kit.tar").unlink()
    assert archives.download(archive, tmp_path / "downloads") == path  # not again


def test_a_failed_download_reports_the_reason_and_leaves_nothing(tmp_path, web):
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
    archive = archives.Archive("kit.tar", ("http://a",), "kit", "list", "0" * 32, 500)
    with pytest.raises(UserError, match="broke off after 100 of 500 bytes"):
        archives.download(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
