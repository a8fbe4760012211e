"""The state dict in a pickle of PyTorch: the allowed names, and tensors as NumPy arrays.

`pickle_reader` turns the pickle into plain data. This module gives the names in it their meaning
and turns tensors into NumPy views that stay inside the bytes stored for them. A name is one of
three: it builds tensors and dictionaries (`_CALLS`); it belongs to data that training scripts save
beside the state dict (`_DATA`), which becomes `Opaque`; or the file is refused.
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
from deeplab_jax.weights.torch_format.pickle_reader import (
    Global,
    Machine,
    Opaque,
    Unreadable,
    assign,
)

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
# Storages of tensors that are refused. They are known so that the error can name the tensor.
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
_MAX_SEARCHED = 1 << 24  # bytes of a file that are searched for the classes of a model


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional array in the file, which tensors are views of.

    Attributes:
      dtype: The type of the elements.
      key: The storage's name in the file.
      numel: The number of elements.
      view: Start and length of the part that is used; None: all. Only files from before PyTorch
        0.4 have it.
    """

    dtype: np.dtype[Any]
    key: str
    numel: int
    view: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """A tensor of a kind that no array can represent."""

    kind: str


# From the pickle to tensors


def parse(file: IO[bytes], load_persistent: Callable[[Any], Any]) -> Any:
    """Returns the value pickled at the file's position, and moves the position behind it.

    Args:
      file: Contains the pickle.
      load_persistent: Returns the object for a persistent id.

    Raises:
      Unreadable: See `Machine.run`; or the pickle uses a forbidden name.
    """

    def find_global(name: str) -> Global | Opaque:
        if name in _GLOBALS:
            return _GLOBALS[name]
        if _DATA.fullmatch(name):
            return Opaque(name)
        raise Unreadable(_refusal(name, file))

    return Machine(find_global, load_persistent, (Tensor, Unsupported)).run(file)


def _refusal(name: str, file: IO[bytes]) -> str:
    how = '`torch.save(model.state_dict(), "weights.pth")`'
    file.seek(0)
    is_standard = name.partition(".")[0] in {*sys.stdlib_module_names, "__builtin__"}
    has_layers = re.search(rb"torch\.nn\.modules\.(?!loss\b)", file.read(_MAX_SEARCHED))
    if has_layers and not is_standard:
        return (
            f"is a whole pickled model of the class {name[:200]}, which only that class's own code "
            "can rebuild; nothing in the file was run. Where that code is available, save the "
            f"state dict instead: {how}"
        )
    return (
        f"asks for {name[:200]}, which no state dict needs, and was refused; nothing in the file "
        f"was run. If the file is yours, save only the state dict: {how}. If it is not, do not "
        "trust it"
    )


def storage(persistent_id: Any) -> Storage:
    """Returns the storage that a persistent id describes."""
    kind, storage_type, key, _, numel, *rest = _checked(persistent_id, tuple)
    if kind != "storage" or len(rest) > 1:
        raise TypeError
    view = rest[0] if rest else None
    if view is not None:
        _, start, length = _checked(view, tuple)
        view = (_count(start), _count(length))
    dtype = _STORAGE_GLOBALS[_checked(storage_type, Global).name]
    return Storage(dtype, _checked(key, str), _count(numel), view)


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
    if _checked(storage, Storage).dtype.kind == "c":
        return Unsupported(f"complex ({storage.dtype.name})")
    if metadata:  # set only for these and for views of complex tensors
        return Unsupported("negated lazily")
    if len(_checked(size, tuple)) != len(_checked(stride, tuple)) or len(size) > _MAX_DIMENSIONS:
        raise Unreadable("is damaged: a tensor has different numbers of sizes and strides")
    return Tensor(storage, _count(offset), tuple(map(_count, size)), tuple(map(_count, stride)))


def _parameter(data: Any, *rest: Any) -> Any:
    if type(data) not in (Tensor, Unsupported):
        raise TypeError
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    ordered: dict[Any, Any] = {}
    for name, value in pairs:
        assign(ordered, name, value)
    return ordered


def _unsupported(kind: str) -> Callable[..., Unsupported]:
    return lambda *arguments: Unsupported(kind)


_untyped = _unsupported("of a type that PyTorch has no storage class for (uint16, float8, ...)")
_quantised = _unsupported("quantised")
_sparse = _unsupported("sparse")

# The names that make tensors and dictionaries, besides the storage types.
_CALLS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_tensor_v3": _untyped,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch.per_tensor_affine": None,
    "torch.per_channel_affine": None,
    "torch._utils._rebuild_sparse_tensor": _sparse,
}
# The names of data that training scripts save beside the state dict, as a pattern. `getattr` and
# `partial` may be among them because nothing is called: the history buffers of mmengine hold bound
# methods, and Python 3.11 pickles the members of an enum with `getattr`.
_DATA = re.compile(
    r"""
    (builtins|__builtin__)\.(bool|bytearray|bytes|complex|dict|float|frozenset|getattr|int|list|long
        |object|range|set|slice|str|tuple|unicode|xrange|Ellipsis)
    |collections\.(Counter|ChainMap|defaultdict|deque)
    |argparse\.Namespace|types\.SimpleNamespace|functools\.partial|typing\.[A-Z]\w*
    |pathlib\.(_local\.)?\w+Path|datetime\.(date|datetime|time|timedelta|timezone)
    |zoneinfo\.ZoneInfo|decimal\.Decimal|fractions\.Fraction|uuid\.UUID
    |_codecs\.encode|copy_?reg\._reconstructor  # bytes and objects of older protocols
    |numpy\.(ndarray|dtype|(bool|u?int|float|complex|str|bytes|datetime|timedelta)[\d_]*)
    |numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\.(random|dtypes)\.(\w+\.)?\w+
    |torch\.((q?u?int|b?float|complex|bool)\w*|device|Size|_C\.Generator|torch_version\.TorchVersion
        |serialization\._get_layout|strided)
    |(\w+\.)*torch\.(channels_\w+|\w+_format)  # under any module that imports PyTorch
    |torch\.(nn\.modules\.loss|nn\.functional|optim\.\w+|(cuda\.)?amp\.grad_scaler)\.\w+
    |mmengine\.(config|logging)(\.\w+){2,3}|mmcv\.utils\.config\.\w+|addict\.addict\.Dict
    |easydict\.EasyDict|yacs\.config\.CfgNode|omegaconf\.\w+\.\w+
    |(pytorch_lightning|lightning|lightning_fabric)(\.\w+)?\.utilities\.\w+\.\w+
    """,
    re.VERBOSE,
)
_STORAGE_GLOBALS = {
    f"torch.{name}": dtype for name, dtype in (STORAGE_TYPES | _REFUSED_STORAGE_TYPES).items()
}
_GLOBALS = {name: Global(name, call) for name, call in _CALLS.items()} | {
    name: Global(name) for name in _STORAGE_GLOBALS
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
    how = '`torch.save(model.state_dict(), "weights.pth")`'
    if found:
        keys = [f"{'/'.join(path)!r} ({count} tensors)" for path, count in found.items()]
        raise Unreadable(
            f"holds {len(found)} state dicts, under {listed(keys)}: save the one that is meant, "
            f"with {how}"
        )
    if isinstance(root, dict):
        content = f"a dictionary of {listed([repr(name) for name in root]) or 'nothing'}"
    else:
        content = f"one {_type_name(root)}"
    raise Unreadable(
        f"holds {content}, but no state dict, neither by itself nor under a key such as "
        f"{' or '.join(map(repr, _ENTRIES[:3]))}. Save one with {how}"
    )


def _type_name(value: Any) -> str:
    return value.name if isinstance(value, (Opaque, Global)) else type(value).__name__


def _num_tensors(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else ()
    return sum(isinstance(item, (Tensor, Unsupported)) for item in items)


def arrays(
    state_dict: dict[Any, Any], load_storage: Callable[[Storage], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns each tensor as a view of its storage's elements.

    Raises:
      Unreadable: An entry is not a tensor, is of an unsupported kind, or exceeds its storage.
    """
    problems, views = [], {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            try:
                views[name] = _view(load_storage(value.storage), value)
            except Unreadable as error:
                raise Unreadable(f"has an invalid tensor {name[:200]}, which {error}") from error
        elif isinstance(value, Unsupported):
            problems.append(f"{name} is {value.kind}")
        else:
            problems.append(f"{name} is not a tensor but of type {_type_name(value)}")
    if problems:
        raise Unreadable(f"holds entries that cannot become arrays: {listed(problems, '; ')}")
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
