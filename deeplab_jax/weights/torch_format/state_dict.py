"""The state dict in a pickle of PyTorch: the names in it, and tensors as NumPy arrays.

`pickle_reader` turns the pickle into plain data. This module gives the names in it their meaning
and turns tensors into NumPy views that stay inside the bytes stored for them. A few names make
tensors and dictionaries (`_CALLS`, `_UNSUPPORTED`). Every other one, of what training scripts save
beside the state dict, becomes `Opaque` and is never imported or called.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

from deeplab_jax.utils.errors import listed
from deeplab_jax.weights.torch_format.pickle_reader import Machine, Opaque, Unreadable, assign

# PyTorch's storage classes and the element type each holds.
STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Those of tensors that are refused; a file of PyTorch before 1.6 is read by the sizes of all.
_REFUSED_STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "QInt8Storage": np.dtype("i1"),
    "QUInt8Storage": np.dtype("u1"),
    "QInt32Storage": np.dtype("<i4"),
    "storage.UntypedStorage": np.dtype("u1"),
}

# Keys under which training scripts save the state dict, in the order of preference; torchvision's
# scripts use "model". The last ones hold averaged parameters.
_ENTRIES = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module"),
    *("weights", "params", "model_ema", "state_dict_ema", "ema_state_dict", "ema", "params_ema"),
)
_MAX_NESTED = 2  # dictionaries around a state dict
_MAX_DIMENSIONS = 64  # NumPy's limit
# Names of models' classes: PyTorch's layers, and what neither PyTorch nor Python nor NumPy has.
_MODEL = re.compile(
    r"torch\.nn\.(parallel|modules)\.(?!loss\.)"
    rf"|(?!({'|'.join(sys.stdlib_module_names)}|__builtin__|copy_reg|numpy|torch)\.)\w+\."
)
# Types of which the name in a pickle is that of a function.
_TYPE_NAMES = dict.fromkeys(
    (f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")), "numpy.ndarray"
)
_HOW = 'save only the state dict: `torch.save(model.state_dict(), "weights.pth")`'

# Names that no training script saves but attacks do. A file with one is refused as a warning, even
# though nothing is called.
_HARMFUL = re.compile(
    r"(os|posix|nt|pty|sys|shutil|socket|commands|subprocess|importlib|runpy)\.\S*"
    r"|(builtins|__builtin__|_?io)\.(__import__|compile|eval|exec|execfile|open)"
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional array in the file, named `key`, which tensors are views of."""

    dtype: np.dtype[Any]
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """A tensor that no array represents; `kind` continues "it is ..."."""

    kind: str


# From the pickle to tensors


def parse(file: IO[bytes], load_persistent: Callable[[Any], Any]) -> Any:
    """Returns the value pickled at the file's position, and moves the position behind it.

    Args:
      file: Contains the pickle.
      load_persistent: Returns the object for a persistent id.

    Raises:
      Unreadable: See `Machine.run`; or the pickle uses a harmful name.
    """
    return Machine(_find_global, load_persistent).run(file)


def _find_global(name: str) -> Any:
    if _HARMFUL.fullmatch(name):
        raise Unreadable(
            f"asks for {name[:200]}, which no state dict needs, and was refused; nothing in the "
            f"file was run. If the file is yours, {_HOW}. If it is not, do not trust it"
        )
    if name in _UNSUPPORTED:
        return lambda *arguments: Unsupported(_UNSUPPORTED[name])
    return _CALLS.get(name) or Opaque(name)


def storage(persistent_id: Any) -> Storage | Opaque:
    """Returns the storage that a persistent id describes; opaque if NumPy lacks its type."""
    kind, storage_type, key, _, numel, *view = _checked(persistent_id, tuple)
    if kind != "storage" or len(view) > 1:
        raise TypeError
    if view and view[0] is not None:
        raise Unreadable(f"has storages of PyTorch before 0.4: load it there and {_HOW}")
    name = _checked(storage_type, Opaque).name
    dtype = (STORAGE_TYPES | _REFUSED_STORAGE_TYPES).get(name.removeprefix("torch."))
    return storage_type if dtype is None else Storage(dtype, _checked(key, str), _count(numel))


# `pickle_reader` takes `TypeError` and `ValueError` to mean that the file is damaged.
def _checked(value: Any, expected: type) -> Any:
    if type(value) is not expected:
        raise TypeError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise Unreadable("is damaged: a tensor has a negative or absurd offset, size or stride")
    return value


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor | Unsupported:
    if type(storage) is Opaque:
        return Unsupported(f"stored as {storage.name}")
    if _checked(storage, Storage).dtype.kind == "c":
        return Unsupported(f"complex ({storage.dtype.name})")
    if metadata:  # set only for these and for views of complex tensors
        return Unsupported("negated lazily")
    if len(_checked(size, tuple)) != len(_checked(stride, tuple)) or len(size) > _MAX_DIMENSIONS:
        raise Unreadable("is damaged: a tensor has different numbers of sizes and strides")
    return Tensor(storage, _count(offset), tuple(map(_count, size)), tuple(map(_count, stride)))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    ordered: dict[Any, Any] = {}
    for name, value in pairs:
        assign(ordered, name, value)
    return ordered


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
# Names that make tensors that no array represents, and what these are.
_UNSUPPORTED = {
    "torch._utils._rebuild_tensor_v3": (
        "of a type that PyTorch has no storage class for (uint16, float8, ...)"
    ),
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._tensor._rebuild_from_type_v2": "of a class of its own, or has attributes",
}


# From tensors to arrays


def find_state_dict(root: Any) -> tuple[tuple[str, ...], dict[Any, Any]]:
    """Returns the keys that lead from a checkpoint's dictionary to the state dict, and that.

    A dictionary under one of `_ENTRIES` is preferred, then the root, unless the only other
    dictionary of tensors holds more of them.

    Raises:
      Unreadable: There is no dictionary of tensors, or it is not clear which one is meant.
    """
    own = _num_tensors(root)
    level: dict[tuple[str, ...], Any] = {(): root}
    found: dict[tuple[str, ...], int] = {}
    seen = {id(root)}  # a damaged file's dictionaries may contain each other
    for _ in range(_MAX_NESTED):
        outer, level = level, {}
        for path, dictionary in outer.items():
            for key, value in dictionary.items() if isinstance(dictionary, dict) else ():
                if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    level[*path, key] = value
        found = {path: count for path, value in level.items() if (count := _num_tensors(value))}
        if found or own:
            break
    for entry in _ENTRIES:
        for path in found:
            if path[-1] == entry:
                return path, level[path]
    if own >= max([1, *found.values()]):
        return (), root
    if len(found) == 1:
        return next((path, level[path]) for path in found)
    if found:
        keys = [f"{'/'.join(path)!r} ({count} tensors)" for path, count in found.items()]
        raise Unreadable(f"holds {len(found)} state dicts, under {listed(keys)}: {_HOW}")
    if model := _model_class(root):
        raise Unreadable(
            f"holds a whole pickled model of the class {model[:200]}, which only that class's own "
            f"code can rebuild; nothing in the file was run. Where that code is available, {_HOW}"
        )
    content = f"one {_type_name(root)[:200]}"
    if root and isinstance(root, dict):
        content += f" of {listed([f'{k!r} ({_type_name(v)})' for k, v in root.items()])}"
    raise Unreadable(f"holds {content}, but no state dict. Where its code can load it, {_HOW}")


def _model_class(root: Any) -> str:
    """Returns the class of a model that is pickled as an object, by itself or under an entry."""
    values = [root, *(root.get(key) for key in _ENTRIES)] if isinstance(root, dict) else [root]
    names = (value.name for value in values if isinstance(value, Opaque))
    return next((name for name in names if _MODEL.match(name)), "")


def _type_name(value: Any) -> str:
    name = value.name if isinstance(value, Opaque) else type(value).__name__
    return _TYPE_NAMES.get(name, name)


def _num_tensors(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else ()
    return sum(isinstance(item, Tensor | Unsupported) for item in items)


def arrays(
    state_dict: dict[Any, Any], load_storage: Callable[[Storage], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns each tensor as a view of its storage's elements.

    Raises:
      Unreadable: An entry is not a tensor, is of an unsupported kind, or exceeds its storage.
    """
    problems = [
        f"{name} is {value.kind}"
        if isinstance(value, Unsupported)
        else f"{name} is not a tensor but of type {_type_name(value)}"
        for name, value in state_dict.items()
        if not (isinstance(value, Tensor) and isinstance(name, str))
    ]
    if problems:
        raise Unreadable(f"holds entries that cannot become arrays: {listed(problems, '; ')}")
    views = {}
    for name, tensor in state_dict.items():
        try:
            views[name] = _view(load_storage(tensor.storage), tensor)
        except Unreadable as error:
            raise Unreadable(f"has an invalid tensor {name[:200]}, which {error}") from error
    return views


def _view(elements: np.ndarray, tensor: Tensor) -> np.ndarray:
    size, stride = tensor.size, tensor.stride
    if 0 in size:
        if math.prod(n for n in size if n) > elements.nbytes + 2**40:  # NumPy counts these too
            raise Unreadable(f"has the absurd shape {size}")
        return np.empty(size, elements.dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= elements.size:
        raise Unreadable(f"reaches past the end of the {elements.size} elements stored for it")
    if math.prod(size) > elements.size:
        # A few bytes could expand to any size when they are copied.
        raise Unreadable(
            f"repeats {elements.size} stored elements to the shape {size}; save a copy of the "
            "tensor (`tensor.contiguous()`)"
        )
    itemsize = elements.dtype.itemsize
    steps = tuple(
        step * itemsize if n > 1 else itemsize for n, step in zip(size, stride, strict=True)
    )
    # As bytes, because a bfloat16 array does not support the buffer protocol.
    content = elements.view(np.uint8)
    return np.ndarray(size, elements.dtype, content, tensor.offset * itemsize, steps)
