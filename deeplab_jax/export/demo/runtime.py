"""The files of onnxruntime-web, which runs ONNX models in browsers."""

from __future__ import annotations

import pathlib
import tarfile

from deeplab_jax.utils.download import download_file
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import require_writable, write_bytes
from deeplab_jax.utils.paths import required_path, user_cache

VERSION = "1.30.0"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"


def find_runtime(local: str = "") -> pathlib.Path:
    """Returns a folder with `FILES`, downloaded (33 MB) to the user's cache the first time.

    Args:
      local: a folder with the files, or the unpacked npm package. Empty: use the cache.

    Raises:
      UserError: the folder lacks a file; or the package cannot be downloaded.
    """
    if local:
        folder = required_path(local, "--runtime")
        for each in (folder, folder / "dist", folder / "package" / "dist"):
            if all((each / name).is_file() for name in FILES):
                return each
        raise UserError(
            f"--runtime {folder} must contain {' and '.join(FILES)}, or be the unpacked package "
            f"onnxruntime-web {VERSION} (npm pack onnxruntime-web@{VERSION})"
        )
    folder = user_cache() / "deeplab_jax" / "onnxruntime-web" / VERSION
    if all((folder / name).is_file() for name in FILES):
        return folder
    require_writable(folder, create=True)
    archive = folder / URL.rpartition("/")[2]
    advice = f"Fetch {URL} by other means, unpack it, and name its folder by --runtime"
    download_file([URL], archive, algorithm="sha256", digest=SHA256, advice=advice)
    with tarfile.open(archive) as package:
        for name in FILES:
            content = package.extractfile(f"package/dist/{name}")
            assert content is not None  # the archive has the published checksum
            write_bytes(folder / name, content.read())
    archive.unlink()
    return folder
