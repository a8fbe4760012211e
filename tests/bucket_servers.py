"""Stand-ins on this machine for Google Cloud Storage (an emulator) and S3 (moto).

Each runs in a process of its own, so that tests can stop it. A bucket whose name begins with
"readonly" refuses writes; Google's named "lossy" tells the MD5 of all but the last byte.
"""

import contextlib
import functools
import http
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import types
import urllib.request
import uuid

import pytest

_READ_ONLY = "readonly"


class Server:
    """The server of one kind of bucket, "gs" or "s3".

    The one for "gs" keeps its objects in a folder, and has them after `kill` and `start`.
    """

    def __init__(self, scheme: str, folder: pathlib.Path):
        self.scheme, self.folder = scheme, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": self.url}
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        command = [sys.executable, __file__, self.scheme, str(self.port), str(self.folder)]
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout.readline() == "ready\n", (self.folder / "log").read_text()

    def freeze(self) -> None:
        """Lets it accept connections and answer nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def make_bucket(self, name: str = "") -> str:
        """Makes an empty bucket and returns its address."""
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        if self.scheme == "gs":
            request = urllib.request.Request(
                f"{self.url}/storage/v1/b",
                f'{{"name": "{name}"}}'.encode(),
                {"Content-Type": "application/json"},
            )
        else:
            request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        with contextlib.suppress(urllib.error.HTTPError):  # it exists
            urllib.request.urlopen(request, timeout=30).close()
        return f"{self.scheme}://{name}"


@functools.cache
def _shared(scheme: str, folder: pathlib.Path) -> Server:
    return Server(scheme, folder)


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    yield lambda scheme: _shared(scheme, tmp_path_factory.getbasetemp() / f"{scheme}_server")
    for scheme in ("gs", "s3"):
        folder = tmp_path_factory.getbasetemp() / f"{scheme}_server"
        if folder.exists():
            _shared(scheme, folder).kill()


def _use(server: Server, monkeypatch, tmp_path) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(params=["gs", "s3"])
def server(request, servers, monkeypatch, tmp_path) -> Server:
    """A server that tests share, and the environment that leads to it, with an empty cache."""
    shared = servers(request.param)
    _use(shared, monkeypatch, tmp_path)
    return shared


@pytest.fixture
def bucket(server) -> str:
    """The address of an empty bucket of each kind."""
    return server.make_bucket()


@pytest.fixture
def gs_bucket(servers, monkeypatch, tmp_path) -> str:
    """The address of an empty bucket of Google's kind."""
    shared = servers("gs")
    _use(shared, monkeypatch, tmp_path)
    return shared.make_bucket()


@pytest.fixture(params=["gs", "s3"])
def own_server(request, monkeypatch, tmp_path) -> Server:
    """A server of each kind that a test may stop."""
    server = Server(request.param, tmp_path / "server")
    _use(server, monkeypatch, tmp_path)
    yield server
    server.kill()


@pytest.fixture
def impatient(monkeypatch):
    """Lets gcsfs try again without the pauses of half a minute."""

    async def no_pause(seconds):
        pass

    retry = pytest.importorskip("gcsfs.retry")
    monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=no_pause))


def _serve_gs(port: int, folder: pathlib.Path) -> None:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def guarded(write):
        def answer(request, response, storage):
            bucket = request.params["bucket_name"]
            name = request.query.get("name", [""])[0]
            if isinstance(request.data, dict):
                name = name or request.data.get("meta", {}).get("name")
            if bucket.startswith(_READ_ONLY):
                response.status = http.HTTPStatus.FORBIDDEN
                return
            # The emulator knows no preconditions. The service: cloud.google.com/storage/docs/
            # request-preconditions. One thread answers all requests.
            if request.query.get("ifGenerationMatch") == ["0"]:
                with contextlib.suppress(NotFound):
                    storage.get_file_obj(bucket, name)
                    response.status = http.HTTPStatus.PRECONDITION_FAILED
                    return
            write(request, response, storage)

        return answer

    def lossy_checksums(content, described, checksums=objects._checksums):
        return checksums(content[:-1] if described["bucket"] == "lossy" else content, described)

    objects._checksums = lossy_checksums
    for name in ("_media_upload", "_multipart_upload", "_create_resumable_upload"):
        setattr(objects, name, guarded(getattr(objects, name)))
    emulator = server.create_server("127.0.0.1", port, data_dir=str(folder / "objects"))
    emulator.start()
    print("ready", flush=True)
    signal.pause()


def _serve_s3(port: int, folder: pathlib.Path) -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)

    def guarded(environ, start_response):
        parts = environ["PATH_INFO"].split("/")
        writes = len(parts) > 2 and environ["REQUEST_METHOD"] not in ("GET", "HEAD")
        if parts[1].startswith(_READ_ONLY) and writes:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return app(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3 = make_server("127.0.0.1", port, guarded, threaded=True)
    print("ready", flush=True)
    s3.serve_forever()


if __name__ == "__main__":
    # The server ends with the tests, even if these are killed.
    threading.Thread(target=lambda: os._exit(not sys.stdin.read()), daemon=True).start()
    os.environ.setdefault("MOTO_ACCOUNT_ID", "123456789012")
    {"gs": _serve_gs, "s3": _serve_s3}[sys.argv[1]](int(sys.argv[2]), pathlib.Path(sys.argv[3]))
