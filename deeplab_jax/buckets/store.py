"""Objects in a bucket of Google Cloud Storage or S3, through fsspec's gcsfs and s3fs."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import logging
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, first_line

NUM_THREADS = 8  # that send requests at once
_SMALL = 5 * 2**20  # bytes up to which `gcsfs` sends a file in one request
_SECONDS = 15.0  # without a byte of an answer
_EXTRAS = {"gs": ("gcs", "gcsfs.core"), "s3": ("s3", "s3fs")}
# What the services call the permission for each action.
_PERMISSIONS = {
    ("gs", "read"): "storage.objects.get",
    ("gs", "list"): "storage.objects.list",
    ("gs", "write"): "storage.objects.create",
    ("gs", "delete"): "storage.objects.delete",
    ("s3", "read"): "s3:GetObject",
    ("s3", "list"): "s3:ListBucket",
    ("s3", "write"): "s3:PutObject",
    ("s3", "delete"): "s3:DeleteObject",
}
_CREATE = {"gs": "gcloud storage buckets create", "s3": "aws s3 mb"}
_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or give the machine a service account",
    "s3": "run `aws configure`, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the "
    "machine a role",
}


class Unreachable(UserError):
    """The bucket cannot be reached, or answers with an error of its own; later it may."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object.

    Attributes:
      size: in bytes.
      tag: changes with the content.
      md5: of the content, hexadecimal; empty if the bucket does not tell.
      time_ns: when it was written, in nanoseconds since 1970.
    """

    size: int
    tag: str
    md5: str
    time_ns: int


class Store:
    """The objects below an address; their names are relative to it.

    All methods raise UserError for what a user must mend (bucket, permission, credentials), of
    which Unreachable is what may pass. The service's library tries several times before that.
    """

    def __init__(self, url: str) -> None:
        """Opens a file system, without a request.

        Args:
          url: `gs://bucket/path` or `s3://bucket/path`.

        Raises:
          UserError: the address is malformed, or the package for the service is not installed.
        """
        self.url = check_address(url)
        self.scheme, _, self._root = self.url.partition("://")
        self.bucket = self._root.partition("/")[0]
        self._fs = _open_filesystem(self.scheme)
        # Of what a server stored; the library for S3 sends a checksum.
        self._checks = {"consistency": "md5"} if self.scheme == "gs" else {}

    def __reduce__(self) -> Any:  # file systems hold threads
        return Store, (self.url,)

    def url_of(self, name: str) -> str:
        """Returns the address of an object."""
        return f"{self.url}/{name}" if name else self.url

    def list(self, prefix: str = "") -> dict[str, Entry]:
        """Returns the objects whose names are `prefix`, or begin with it and a slash.

        An object at the store's own address has the empty name.
        """
        path = self._path(prefix)
        with self._errors("list", prefix):
            try:
                found: Mapping[str, Mapping[str, Any]] = self._fs.find(path, detail=True)
            except FileNotFoundError:
                if not self._fs.exists(self.bucket):
                    raise
                found = {}
        return {
            key.removeprefix(self._root).removeprefix("/"): _entry(info)
            for key, info in sorted(found.items())
            # The web consoles make an object for a folder, whose name ends with a slash. The
            # library adds a folder if the first object in it is written meanwhile.
            if (key == path or key.startswith(f"{path}/"))
            and info["type"] == "file"
            and not info["name"].endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object; None if there is none, or no bucket."""
        with self._errors("read", name):
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, at once as a whole."""
        with self._errors("write", name):
            self._pipe(name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless it exists, as one action; returns whether it did not exist."""
        with self._errors("write", name):
            try:
                self._pipe(name, content, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(self, path: pathlib.Path, name: str) -> None:
        """Writes a file as an object, at once as a whole."""
        if self.scheme == "gs" and path.stat().st_size < _SMALL:
            self.write(name, path.read_bytes())
            return
        with self._errors("write", name):
            self._fs.put_file(str(path), self._path(name), **self._checks)

    def download(self, name: str, path: pathlib.Path, entry: Entry) -> None:
        """Reads an object into a file, and compares its size and MD5.

        Raises:
          FileNotFoundError: the object is gone.
          Unreachable: also if the file differs from `entry`.
        """
        with self._errors("read", name):
            self._fs.get_file(self._path(name), str(path))
            if path.stat().st_size != entry.size or (
                entry.md5 and file_digest(path, "md5") != entry.md5 and self._has_md5(name)
            ):
                raise Unreachable(f"{self.url_of(name)} changed or was damaged on the way")

    def _has_md5(self, name: str) -> bool:
        """Whether an object's ETag is its MD5, which it is not under some kinds of encryption."""
        if self.scheme != "s3":
            return True
        key = self._path(name).partition("/")[2]
        head = self._fs.call_s3("head_object", Bucket=self.bucket, Key=key)
        plain = head.get("ServerSideEncryption", "AES256") == "AES256"
        return plain and "SSECustomerAlgorithm" not in head

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that do not exist count as deleted."""
        for name in names:
            with self._errors("delete", name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def check_writable(self) -> None:
        """Writes and deletes a small object, so that a missing permission is known early."""
        probe = self._path(f".probe-{secrets.token_hex(4)}")
        with self._errors("write", ""):
            self._fs.pipe_file(probe, b"")
        with self._errors("delete", ""):
            self._fs.rm_file(probe)

    def _pipe(self, name: str, content: bytes, **options: Any) -> None:
        # `gcsfs` frames contents by newlines; a server takes a "\r" before one as part of it. A
        # content of one chunk or more is sent without a frame.
        if self.scheme == "gs" and content.endswith(b"\r"):
            options["chunksize"] = len(content)
        self._fs.pipe_file(self._path(name), content, **self._checks, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _errors(self, action: str, name: str) -> Iterator[None]:
        """Translates the errors of the two libraries."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            url = self.url_of(name)
            text = first_line(error)
            kind = type(error).__name__
            status = getattr(error, "code", None) or getattr(error, "status", None)
            if isinstance(error, FileNotFoundError):
                if action == "read":
                    raise
                problem = (
                    f"{url}: there is no bucket {self.bucket!r}, or you may not see it. Check the "
                    f"name, or create it: `{_CREATE[self.scheme]} {self.scheme}://{self.bucket}`"
                )
            elif "Credentials" in kind or kind == "DefaultCredentialsError" or status == 401:
                problem = f"{url}: no valid credentials ({text}): {_CREDENTIALS[self.scheme]}"
            elif isinstance(error, PermissionError) or text.startswith("Forbidden"):
                permission = _PERMISSIONS[self.scheme, action]
                problem = f"{url}: not permitted to {action} ({text}). Needed: {permission}"
            elif isinstance(error, (TypeError, AttributeError)):
                raise
            else:
                raise Unreachable(f"{url}: {text}") from error
            raise UserError(problem) from error


def check_address(url: str) -> str:
    """Returns an address without a slash at its end.

    Raises:
      UserError: it is not of the form `gs://bucket/path` or `s3://bucket/path`.
    """
    match = re.fullmatch(r"(gs|s3)://([a-zA-Z0-9][\w.-]{2,})((?:/[^/]+)*)/?", url)
    parts = match[3].split("/") if match else []
    if not match or {".", ".."} & set(parts) or max(len(part.encode()) for part in parts) > 200:
        raise UserError(
            f"{url} is not an address in a bucket: expected {url[:2]}://BUCKET/PATH, a bucket of 3 "
            "characters or more, and single slashes between names of at most 200 bytes"
        )
    return url.removesuffix("/")


def _open_filesystem(scheme: str) -> Any:
    extra, module = _EXTRAS[scheme]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a package that is not installed ({error.name}): "
            f"pip install 'deeplab-jax[{extra}]'"
        ) from error
    # They log what they raise, with tracebacks.
    for name in ("gcsfs", "s3fs", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        # s3fs tries again itself.
        settings = {
            "connect_timeout": _SECONDS,
            "read_timeout": _SECONDS,
            "retries": {"max_attempts": 1},
        }
        return library.S3FileSystem(config_kwargs=settings, **options)
    aiohttp = importlib.import_module("aiohttp")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS, sock_read=_SECONDS)
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        options["token"] = "anon"  # else it asks for credentials, which takes seconds
    # `gcsfs` itself would ask for the kind of each bucket by another protocol.
    return library.GCSFileSystem(requests_timeout=timeout, **options)


def _entry(info: Mapping[str, Any]) -> Entry:
    tag = str(info.get("ETag") or info.get("generation") or info.get("etag"))
    if "ETag" in info:  # of S3: the MD5, except for uploads in several parts
        digest = tag.strip('"')
        md5 = digest if re.fullmatch("[0-9a-f]{32}", digest) else ""
    else:
        md5 = base64.b64decode(info.get("md5Hash", "")).hex()
    time_ns = int((info.get("LastModified") or info["mtime"]).timestamp() * 1e9)
    return Entry(int(info["size"]), tag, md5, time_ns)
