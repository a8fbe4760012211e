"""What the pickle of a PyTorch file means: the few names it may use, and its state dict as arrays.

`pickle_reader` turns the pickle into plain data; here the names in it get their meaning, every
other name is refused, and the descriptions of tensors become NumPy views that stay inside the
bytes the file stores for them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from deeplab_jax.weights import pickle_reader
from deeplab_jax.weights.pickle_reader import Global, Opaque, Unreadable

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
# Storages of tensors that are refused; known here so that the error can name the tensor.
_REFUSED_STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "QInt8Storage": np.dtype("i1"),
    "QUInt8Storage": np.dtype("u1"),
    "QInt32Storage": np.dtype("<i4"),
    "storage.UntypedStorage": np.dtype("u1"),
}

# Where training scripts keep the state dict among other things; torchvision's own under "model".
_ENTRIES = ("model", "state_dict", "model_state_dict")

_MAX_DIMENSIONS = 64  # NumPy's limit
_LISTED = 8  # names in an error message
_SEARCHED = 1 << 24  # bytes of a pickle that are searched for the classes of a model


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional run of elements in the file, which tensors are views of.

    Attributes:
      dtype: of an element.
      key: names the run in the file.
      numel: its number of elements.
      view: start and length of the part that is meant; None: all. Files before PyTorch 0.4 alone.
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
    """A tensor of a kind that no array here stands for."""

    kind: str


# From the pickle to tensors' descriptions


def parse(
    pickled: memoryview, position: int, load_persistent: Callable[[Any], Any]
) -> tuple[Any, int]:
    """The value pickled at a position, and the position behind it.

    Args:
      pickled: holds the pickle.
      position: of its first byte.
      load_persistent: gives what a persistent id stands for.

    Raises:
      Unreadable: see `pickle_reader.Machine.run`, or the pickle asks for what it may not have.
    """
    machine = pickle_reader.Machine(
        pickled, position, _Names(pickled), load_persistent, (Tensor, Unsupported)
    )
    return machine.run(), machine.position


def storage(persistent_id: Any) -> Storage:
    """The storage that a persistent id describes."""
    kind, storage_type, key, _, numel, *rest = _checked(persistent_id, tuple)
    if kind != "storage" or len(rest) > 1:
        raise TypeError
    view = rest[0] if rest else None
    if view is not None:
        _, start, length = _checked(view, tuple)
        view = (_count(start), _count(length))
    dtype = _STORAGE_GLOBALS[_checked(storage_type, Global).name]
    return Storage(dtype, _checked(key, str), _count(numel), view)


# `TypeError` and `ValueError` say to `pickle_reader` that the file makes no sense.
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
    if metadata:  # the one other use of it is on views of complex tensors
        return Unsupported("negated lazily")
    if len(_checked(size, tuple)) != len(_checked(stride, tuple)) or len(size) > _MAX_DIMENSIONS:
        raise Unreadable("is damaged: a tensor has another number of sizes than of strides")
    return Tensor(storage, _count(offset), tuple(map(_count, size)), tuple(map(_count, stride)))


def _parameter(data: Any, *rest: Any) -> Any:
    if type(data) not in (Tensor, Unsupported):
        raise TypeError
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    ordered: dict[Any, Any] = {}
    for name, value in pairs:
        pickle_reader.assign(ordered, name, value)
    return ordered


def _unsupported(kind: str) -> Callable[..., Unsupported]:
    return lambda *arguments: Unsupported(kind)


def _opaque(*arguments: Any) -> Opaque:
    return Opaque()


_untyped = _unsupported("of a type that PyTorch has no storage class for (uint16, float8, ...)")
_quantised = _unsupported("quantised")
_sparse = _unsupported("sparse")

# All that a file may name, beside the storage types. The last group stands beside the state dict
# in checkpoints of training scripts.
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
    "torch.serialization._get_layout": _opaque,
    "torch.Size": _opaque,
    "torch.device": _opaque,
    "collections.Counter": _opaque,
    "argparse.Namespace": _opaque,
}
_STORAGE_GLOBALS = {
    f"torch.{name}": dtype for name, dtype in (STORAGE_TYPES | _REFUSED_STORAGE_TYPES).items()
}
_GLOBALS = {name: Global(name, call) for name, call in _CALLS.items()} | {
    name: Global(name) for name in _STORAGE_GLOBALS
}


class _Names:
    """Gives names their meaning; the error for any other depends on what else is pickled."""

    def __init__(self, pickled: memoryview) -> None:
        self.pickled = pickled

    def __call__(self, name: str) -> Global:
        if name in _GLOBALS:
            return _GLOBALS[name]
        # Element types, which tensors without a storage class are rebuilt with.
        if name.startswith(("torch.uint", "torch.float8_")):
            return Global(name)
        how = '`torch.save(model.state_dict(), "weights.pth")`'
        if self._is_of_a_model(name):
            raise Unreadable(
                f"is a whole pickled model of the class {name[:200]}, which only that class's own "
                "code can rebuild; nothing of the file was run. Where that code is, save the "
                f"state dict instead: {how}"
            )
        raise Unreadable(
            f"asks for {name[:200]}, which no state dict needs, and was refused; nothing of the "
            f"file was run. If the file is yours, save the state dict alone: {how}. If it is "
            "not, do not trust it"
        )

    def _is_of_a_model(self, name: str) -> bool:
        return name.partition(".")[0] not in {
            *sys.stdlib_module_names,
            "__builtin__",
        } and b"torch.nn.modules." in bytes(self.pickled[:_SEARCHED])


# From tensors' descriptions to arrays


def find(root: Any) -> tuple[str, dict[Any, Any]]:
    """The entry that the state dict is under, empty if it is the whole, and the state dict.

    Raises:
      Unreadable: there is none, or none that holds a tensor.
    """
    if _has_tensors(root):
        return "", root
    if isinstance(root, dict):
        for entry in _ENTRIES:
            if _has_tensors(root.get(entry)):
                return entry, root[entry]
        found = f"a dictionary of {listed([repr(name) for name in root]) or 'nothing'}"
    else:
        found = f"one {type(root).__name__}"
    wanted = " or ".join(repr(entry) for entry in _ENTRIES)
    raise Unreadable(
        f"holds no state dict, neither as the whole nor under {wanted}, but {found}. Save one "
        'with `torch.save(model.state_dict(), "weights.pth")`'
    )


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(item, (Tensor, Unsupported)) for item in value.values()
    )


def arrays(
    state_dict: dict[Any, Any], load_storage: Callable[[Storage], np.ndarray]
) -> dict[str, np.ndarray]:
    """Each tensor as a view of its storage's elements.

    Raises:
      Unreadable: an entry is no tensor, of a kind not supported, or outside its storage.
    """
    problems, views = [], {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            try:
                views[name] = _view(load_storage(value.storage), value)
            except Unreadable as error:
                raise Unreadable(f"cannot give {name[:200]}, which {error}") from error
        elif isinstance(value, Unsupported):
            problems.append(f"{name} is {value.kind}")
        else:
            problems.append(f"{name} is no tensor but one {type(value).__name__}")
    if problems:
        raise Unreadable(f"holds what cannot become an array: {listed(problems, '; ')}")
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
        # Honest or not: a few bytes that unfold to any size once they are copied.
        raise Unreadable(
            f"repeats {elements.size} stored elements to the shape {size}; save a copy of the "
            "tensor (`tensor.contiguous()`)"
        )
    itemsize = elements.dtype.itemsize
    steps = tuple(
        step * itemsize if n > 1 else itemsize for n, step in zip(size, stride, strict=True)
    )
    # As bytes, because bfloat16 has no buffer of its own.
    content = elements.view(np.uint8)
    return np.ndarray(size, elements.dtype, content, tensor.offset * itemsize, steps)


def listed(names: list[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _LISTED
    shown = separator.join(name[:200] for name in names[:_LISTED])
    return f"{shown} and {rest} more" if rest > 0 else shown
