"""A server on this machine that speaks what `huggingface_hub` asks Hugging Face's hub for."""

import base64
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

import pytest


@dataclasses.dataclass
class Repo:
    """A repository. `revisions` are further names of its only commit."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False
    revisions: tuple[str, ...] = ("main", "v1.0", "refs/pr/1")
    messages: list[str] = dataclasses.field(default_factory=list)

    @property
    def sha(self):
        text = repr(sorted(self.files.items()))
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def add_folder(self, folder: pathlib.Path, prefix: str = "") -> None:
        for path in folder.iterdir():
            self.files[prefix + path.name] = path.read_bytes()


class Hub:
    """The server, its repositories by name, and the requests that it got.

    Attributes:
      break_after: Downloads of files that are larger break off after this many bytes, as often as
        `num_breaks` says.
    """

    token = "hf_right"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.break_after, self.num_breaks = 1 << 30, 0
        hub = self

        class Handler(_Handler):
            def do_GET(self):
                hub._answer(self)

            do_HEAD = do_POST = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def downloaded(self):
        """Names of the files that were fetched, in order."""
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def _answer(self, call):
        body = call.rfile.read(int(call.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(call.path).path
        self.requests.append((call.command, path, call.headers.get("Range", "")))
        token = call.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.token:
            return call.fail(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(call, json.loads(body), token)
        if path == "/api/validate-yaml":
            return call.reply({"errors": [], "warnings": []})
        match = re.fullmatch(
            r"(?:/api/models/|/)([^/]+/[^/]+)(?:/(resolve|tree|revision|preupload|commit)/(.*))?",
            path,
        )
        name, action, rest = match.groups()
        repo = self.repos.get(name)
        if repo is None or (repo.private and not token):
            return call.fail(404 if token else 401, "RepoNotFound")
        if repo.gated and action == "resolve":
            return call.fail(403 if token else 401, "GatedRepo")
        revision, _, file = (rest or "main").partition("/")
        if urllib.parse.unquote(revision) not in (*repo.revisions, repo.sha):
            return call.fail(404, "RevisionNotFound")
        if action == "tree":
            return call.reply(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0"}
                    for path, content in repo.files.items()
                ]
            )
        if action == "resolve":
            return self._send(call, repo, urllib.parse.unquote(file))
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in repo.files]
            fields = {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings}
            return call.reply(fields)
        if not token:
            return call.fail(403, message="You need write access")
        if action == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return call.reply({"files": files})
        return self._commit(call, name, repo, body)

    def _create(self, call, fields, token):
        if not token:
            return call.fail(401, message="Invalid username or password.")
        name = f"{fields['organization']}/{fields['name']}"
        if name in self.repos:
            return call.reply({"url": f"{self.url}/{name}"}, 409)
        private = bool(fields.get("private")) or fields.get("visibility") == "private"
        self.repos[name] = Repo({".gitattributes": b""}, private)
        return call.reply({"url": f"{self.url}/{name}"})

    def _commit(self, call, name, repo, body):
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del repo.files[value["path"]]
            else:
                repo.messages.append(value["summary"])
        call.reply({"commitUrl": f"{self.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _send(self, call, repo, file):
        if file not in repo.files:
            return call.fail(404, "EntryNotFound")
        content = repo.files[file]
        match = re.fullmatch(r"bytes=(\d+)-", call.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        call.send_response(206 if match else 200)
        call.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        call.send_header("X-Repo-Commit", repo.sha)
        call.send_header("Content-Length", str(len(content) - start))
        if match:
            call.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        call.end_headers()
        if call.command == "HEAD":
            return
        end = len(content)
        if self.num_breaks and len(content) > self.break_after:
            self.num_breaks -= 1
            end = start + self.break_after
        call.wfile.write(content[start:end])
        call.close_connection = True


class _Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, code="", message=""):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message or code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories, which `huggingface_hub` in this process uses, and its cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = Hub()
    template = "{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{template}",
        "HF_HUB_CACHE": str(tmp_path / "hf_cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.close()
