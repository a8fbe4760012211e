"""Writes the pickle of a PyTorch file without PyTorch.

Its instructions are those of `torch.save`, so `torch.load(..., weights_only=True)` accepts them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping

import numpy as np

from deeplab_jax.weights.torch_format.state_dict import STORAGE_TYPES

STORAGE_TYPE_OF = {dtype: name for name, dtype in STORAGE_TYPES.items()}


def pickle_state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the pickle of an `OrderedDict` of tensors.

    Args:
      arrays: Contiguous arrays by name. Each has its own storage, whose key is the array's index:
        "0", "1", ...
    """
    ordered_dict = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO, b"\2", ordered_dict, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        strides = (step // array.itemsize for step in array.strides)
        parts += [
            _text(name),
            _name("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            _tuple(
                _text("storage"),
                _name("torch", STORAGE_TYPE_OF[array.dtype]),
                _text(str(key)),
                _text("cpu"),
                _integer(array.size),
            ),
            pickle.BINPERSID,
            _integer(0),
            _tuple(*map(_integer, array.shape)),
            _tuple(*map(_integer, strides)),
            pickle.NEWFALSE,  # requires_grad
            ordered_dict,  # hooks of the backward pass
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(*items: bytes) -> bytes:
    return b"".join([pickle.MARK, *items, pickle.TUPLE])
