"""The files of onnxruntime-web, which runs ONNX models in browsers."""

from __future__ import annotations

import pathlib
import shutil
import tarfile

from deeplab_jax.utils.download import download_file, file_digest
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import require_writable
from deeplab_jax.utils.paths import required_path, user_cache

VERSION = "1.30.0"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"


def copy_runtime(folder: pathlib.Path, local: str = "") -> None:
    """Copies `FILES` into a folder, from a package (33 MB) that is downloaded the first time.

    Args:
      folder: an existing folder.
      local: a folder with the files, or the unpacked npm package. Empty: use the user's cache.

    Raises:
      UserError: the folder lacks a file; or the package cannot be downloaded.
    """
    if local:
        path = required_path(local, "--runtime")
        for each in (path, path / "dist", path / "package" / "dist"):
            if all((each / name).is_file() for name in FILES):
                for name in FILES:
                    shutil.copyfile(each / name, folder / name)
                return
        raise UserError(
            f"--runtime {path} must contain {' and '.join(FILES)}, or be the unpacked package "
            f"onnxruntime-web {VERSION} (npm pack onnxruntime-web@{VERSION})"
        )
    archive = user_cache() / "deeplab_jax" / URL.rpartition("/")[2]
    if not archive.is_file() or file_digest(archive, "sha256") != SHA256:
        require_writable(archive.parent, create=True)
        advice = f"Fetch {URL} by other means, unpack it, and name its folder by --runtime"
        download_file([URL], archive, algorithm="sha256", digest=SHA256, advice=advice)
    with tarfile.open(archive) as package:
        for name in FILES:
            content = package.extractfile(f"package/dist/{name}")
            assert content is not None  # the archive has the published checksum
            (folder / name).write_bytes(content.read())
