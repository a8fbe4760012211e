"""Reads and writes weights files: PyTorch's `.pth`, without PyTorch, and `.safetensors`.

Since PyTorch 1.6 a `.pth` is a zip archive of a pickle, which describes the tensors, and of the
tensors' bytes; before that it was a sequence of pickles followed by the bytes. The file is mapped
into memory, the pickle is read as data (`torch_format.state_dict`), and each array is a read-only
view of the mapped bytes. So are those of a `.safetensors` file. Nothing in a file is executed.

Format: `torch/serialization.py` of PyTorch 2.13, functions `_save` and `_legacy_save`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import mmap
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.utils.files import atomic_path
from deeplab_jax.weights.torch_format import pickle_writer, state_dict
from deeplab_jax.weights.torch_format.pickle_reader import Opaque, Unreadable
from deeplab_jax.weights.torch_format.state_dict import Storage

_SAFETENSORS_TYPES: dict[str, np.dtype[Any]] = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (8, 4, 2)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (8, 4, 2, 1)},
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

SUFFIXES = (".pth", ".pt", ".safetensors")  # of written files

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ALIGNMENT = 64  # bytes, of an array's position in a written file; as in PyTorch
_LOCAL_HEADER = 30  # bytes of a zip entry's local header, without its name and extra field

# The first bytes of files that are mistaken for weights, and what these files are.
_OTHER_FORMATS = {
    b"<": "is a web page, not weights: the download led to a login or an error",
    b"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull`",
    b"\x89HDF": "is an HDF5 file, not a PyTorch or safetensors file",
    b"\x1f\x8b": "is compressed by gzip: unpack it with `gunzip` first",
}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The content of a weights file.

    Attributes:
      arrays: Read-only arrays by name, in the file's order. They are views of the file where it
        has them as they are: it may be replaced while they are in use, but not changed in place.
      config: What is known beside the arrays: the `config.json` of a folder (`hub_folder`), what a
        TFLite file's graph says (`tflite_file`), or a checkpoint's "meta" under that key.
      notes: A sentence that says where the state dict was, unless it was the whole file.
    """

    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a weights file by name: `read_file(path).arrays`."""
    return read_file(path).arrays


def read_file(path: str | os.PathLike[str]) -> WeightsFile:
    """Reads a state dict from a `.pth`, `.pt`, `.safetensors` or `.tflite` file.

    The format is detected from the content. A training script's checkpoint, a dictionary with the
    state dict under "model", "state_dict" or another key, is accepted too; see
    `state_dict.find_state_dict`. Checksums are verified if the format has them (PyTorch's zip).
    Arrays keep their types; bfloat16 becomes `ml_dtypes.bfloat16`.

    Raises:
      UserError: The file does not exist or is damaged; it holds no state dict; it holds complex,
        quantised or sparse tensors; or its pickle asks for what only attacks do.
    """
    path = pathlib.Path(path)
    try:
        return _read_file(path)
    except Unreadable as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_file(path: pathlib.Path) -> WeightsFile:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Unreadable("is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = data[:512]
    # Before the others: the length of the header, in bytes 0 to 7, can look like their signature.
    if start[8:9] == b"{":
        return WeightsFile(_read_safetensors(path, data))
    if start[4:8] == b"TFL3":
        from deeplab_jax.weights import tflite_file

        return tflite_file.parse(memoryview(data))
    if start.startswith(b"PK"):
        return _read_zip(path, memoryview(data))
    if start.startswith(pickle.PROTO):
        return _read_legacy(data)
    for first_bytes, message in _OTHER_FORMATS.items():
        if start.lstrip().startswith(first_bytes):
            raise Unreadable(message)
    raise Unreadable(
        f"is not a PyTorch or safetensors file: it begins with the bytes {start[:8].hex(' ')}"
    )


def _weights_file(root: Any, load_storage: Callable[[Storage], np.ndarray]) -> WeightsFile:
    entry, tensors = state_dict.find_state_dict(root)
    arrays = state_dict.arrays(tensors, load_storage)
    if not entry:
        return WeightsFile(arrays)
    meta = root.get("meta")  # mmsegmentation's config and classes
    config = {"meta": meta} if isinstance(meta, dict) else {}
    ignored: list[str] = []
    for key in entry:
        ignored += [str(name) for name in root if name not in (key, *config)]
        root = root[key]
    not_read = f"; not read: {listed(ignored)}" if ignored else ""
    return WeightsFile(
        arrays, config, (f'The state dict was under "{"/".join(entry)}"{not_read}.',)
    )


# PyTorch's zip format


def _read_zip(path: pathlib.Path, data: memoryview) -> WeightsFile:
    entries = _zip_entries(path, len(data))
    order = bytes(_zip_entry(data, entries, "byteorder")) if "byteorder" in entries else b"little"
    if order != b"little":
        raise Unreadable(f"has the byte order {order[:20]!r}, expected b'little'")

    def load_storage(storage: Storage) -> np.ndarray:
        raw = _zip_entry(data, entries, f"data/{storage.key}")
        if len(raw) != storage.numel * storage.dtype.itemsize:
            raise Unreadable(f"has {len(raw)} bytes stored for {storage.numel} elements")
        return np.frombuffer(raw, storage.dtype)

    root = state_dict.parse(io.BytesIO(_zip_entry(data, entries, "data.pkl")), state_dict.storage)
    return _weights_file(root, functools.cache(load_storage))


def _zip_entries(path: pathlib.Path, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the archive's entries by their names inside its only folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # A damaged directory makes `zipfile` raise more than its own exception.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise Unreadable(f"is a damaged or truncated zip archive ({error})") from error
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if "data.pkl" not in entries:
        raise Unreadable("is a zip archive but not PyTorch's: it has no entry data.pkl")
    if "constants.pkl" in entries:
        raise Unreadable(
            "is a TorchScript program: load it with `torch.jit.load` and save its state dict"
        )
    if len(entries) != len(infos):
        raise Unreadable("is damaged: two entries of the archive have the same name")
    if any(info.file_size != info.compress_size or info.flag_bits & 1 for info in infos):
        raise Unreadable(
            "is damaged, encrypted or compressed after PyTorch wrote it: unpack it and pack it "
            "again without compression (`zip -0 -r`)"
        )
    # With overlapping entries, verifying checksums could take the square of the file's size.
    if sum(info.file_size for info in infos) > file_size:
        raise Unreadable("is damaged: its entries are larger than the file")
    return entries


def _zip_entry(data: memoryview, entries: dict[str, zipfile.ZipInfo], name: str) -> memoryview:
    """Returns a view of an entry's bytes, after verifying their checksum."""
    if name not in entries:
        raise Unreadable(f"lacks the entry {name[:200]} in its archive")
    info = entries[name]
    # Only the local header says how long it is.
    header = data[info.header_offset :][:_LOCAL_HEADER] if info.header_offset >= 0 else b""
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise Unreadable(f"is damaged: no header where the entry {name[:200]} should be")
    start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
    content = data[start : start + info.file_size]
    if len(content) < info.file_size or zlib.crc32(content) != info.CRC:
        raise Unreadable(
            f"is damaged: the checksum of its entry {name[:200]} is wrong. Fetch the file again"
        )
    return content


# PyTorch's format before 1.6


def _read_legacy(data: mmap.mmap) -> WeightsFile:
    # The map rather than the file, whose `read(n)` would allocate n bytes before reading.
    file = cast("IO[bytes]", data)
    header = []
    for _ in range(3):
        header.append(state_dict.parse(file, _no_persistent))
        if header[0] != _LEGACY_MAGIC:
            raise Unreadable("is a pickle, but not a PyTorch file: its first value is another")
    _, protocol, system = header
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise Unreadable("has an unknown version of PyTorch's format")
    if system.get("little_endian") is False:
        raise Unreadable("has the byte order of another kind of machine, expected little-endian")

    storages: dict[str, Storage] = {}

    def load_persistent(persistent_id: Any) -> Storage | Opaque:
        match persistent_id:
            case ("module", Opaque() as layer, _, _):  # with its source code
                return layer
        storage = state_dict.storage(persistent_id)
        if isinstance(storage, Storage) and storages.setdefault(storage.key, storage) != storage:
            raise Unreadable("is damaged: a storage has two types or sizes")
        return storage

    root = state_dict.parse(file, load_persistent)
    keys = state_dict.parse(file, _no_persistent)
    position = data.tell()

    @functools.cache
    def contents() -> dict[str, memoryview]:
        return _legacy_contents(memoryview(data), position, keys, storages)

    def load_storage(storage: Storage) -> np.ndarray:
        if storage.key not in contents():
            raise Unreadable("has no bytes stored for it")
        return np.frombuffer(contents()[storage.key], storage.dtype)

    return _weights_file(root, load_storage)


def _legacy_contents(
    data: memoryview, position: int, keys: Any, storages: dict[str, Storage]
) -> dict[str, memoryview]:
    """Returns the bytes of each storage, which follow the pickles with their element counts."""
    contents: dict[str, memoryview] = {}
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in storages or key in contents:
            raise Unreadable("is damaged: its list of storages does not match its tensors")
        storage = storages[key]
        size = storage.numel * storage.dtype.itemsize
        if position + 8 + size > len(data):
            raise Unreadable("is truncated: it ends before its arrays do")
        if struct.unpack_from("<q", data, position)[0] != storage.numel:
            raise Unreadable("is damaged: a storage has not the length that its tensors state")
        contents[key] = data[position + 8 : position + 8 + size]
        position += 8 + size
    return contents


def _no_persistent(persistent_id: Any) -> Any:
    raise TypeError


# safetensors


def _read_safetensors(path: pathlib.Path, data: mmap.mmap) -> dict[str, np.ndarray]:
    """Returns views of the mapped file; the library checks the header, but copies each array."""
    try:
        with safetensors.safe_open(path, "numpy"):
            end = 8 + int.from_bytes(data[:8], "little")
            entries = json.loads(data[8:end])
    except (safetensors.SafetensorError, ValueError) as error:
        raise Unreadable(f"is a damaged safetensors file ({error})") from error
    entries.pop("__metadata__", None)
    kinds = {name: entry["dtype"] for name, entry in entries.items()}
    if refused := [f"{n} is {kind}" for n, kind in kinds.items() if kind not in _SAFETENSORS_TYPES]:
        raise Unreadable(f"holds entries that cannot become arrays: {listed(refused, '; ')}")
    if not entries:
        raise Unreadable("holds no arrays")
    arrays = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        elements = np.frombuffer(
            memoryview(data)[end + first : end + last], _SAFETENSORS_TYPES[entry["dtype"]]
        )
        arrays[name] = elements.reshape(entry["shape"])
    return arrays


# Writing


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` or safetensors loads.

    The file appears under its name only when it is complete. Equal arrays give equal bytes.

    Args:
      path: Ends in `.pth`, `.pt` (PyTorch's zip format) or `.safetensors`.
      arrays: Arrays by name, of the types that `read` returns.

    Raises:
      UserError: The name has another suffix, or the file cannot be written.
      ValueError: An array has another type.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: its name must end in {', '.join(SUFFIXES)}")
    write_format = _write_safetensors if path.suffix == ".safetensors" else _write_zip
    # `np.ascontiguousarray` would add a dimension to a scalar.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in contiguous.items():
        if array.dtype not in pickle_writer.STORAGE_TYPE_OF:
            raise ValueError(f"{name} is {array.dtype}, which PyTorch has no storage class for")
    try:
        with atomic_path(path) as partial:
            write_format(partial, contiguous)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(arrays, path)


def _write_zip(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    contents: dict[str, Any] = {
        "data.pkl": pickle_writer.pickle_state_dict(arrays),
        "byteorder": b"little",
        **{
            f"data/{key}": array.reshape(-1).view(np.uint8).data
            for key, array in enumerate(arrays.values())
        },
        "version": b"3\n",
    }
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(f"archive/{name}")
            start = file.tell() + _LOCAL_HEADER + len(info.filename) + 4
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)
