"""Hand-made files that PyTorch does not write: of old versions, damaged, and malicious."""

import collections
import io
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest

from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import torch_file
from deeplab_jax.weights.torch_format import pickle_reader
from torch_reference import assert_same, torch, torch_zip

# Old versions and other machines


class _OldPickler(pickle._Pickler):
    """Pickles tuples that begin with "storage" as persistent ids, and `Name` as a global."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Persistent) else None


class Persistent:
    def __init__(self, *identifier):
        self.id = identifier


def old_file(path, value, contents, little_endian=True):
    buffer = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    for header in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(header, buffer, protocol=2)
    _OldPickler(buffer, protocol=2).dump(value)
    pickle.dump(sorted(contents), buffer, protocol=2)
    for key in sorted(contents):
        buffer.write(struct.pack("<q", contents[key].size) + contents[key].tobytes())
    path.write_bytes(buffer.getvalue())
    return path


class Rebuilt:
    """Pickles as a call of `torch._utils._rebuild_tensor` with these arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.arguments


def test_storage_views_of_old_files_are_refused(tmp_path):
    part = Persistent("storage", torch.FloatStorage, "k", "cpu", 10, ("v", 4, 3))
    value = {"part": Rebuilt(part, 1, (2,), (1,))}
    path = old_file(tmp_path / "old.pth", value, {"k": np.zeros(10, np.float32)})
    with pytest.raises(UserError, match=r"has storages of PyTorch before 0\.4"):
        torch_file.read(path)


@pytest.mark.parametrize(
    ("numel", "other", "message"),
    [
        (10, (torch.FloatStorage, 9), "two types or sizes"),
        (10, (torch.IntStorage, 10), "two types or sizes"),
        (9, None, "has not the length that its tensors"),
    ],
)
def test_old_file_that_contradicts_itself(tmp_path, numel, other, message):
    storages = [Persistent("storage", torch.FloatStorage, "k", "cpu", numel, None)]
    if other:
        storages.append(Persistent("storage", other[0], "k", "cpu", other[1], None))
    value = {str(i): Rebuilt(each, 0, (9,), (1,)) for i, each in enumerate(storages)}
    path = old_file(tmp_path / "old.pth", value, {"k": np.zeros(10, np.float32)})
    with pytest.raises(UserError, match=rf"old\.pth .*is damaged: .*{message}"):
        torch_file.read(path)


def test_big_endian_old_file_is_refused(tmp_path):
    path = old_file(tmp_path / "old.pth", {}, {}, little_endian=False)
    with pytest.raises(UserError, match="byte order of another kind of machine"):
        torch_file.read(path)


def test_python_2_strings_and_parameters_of_2017(tmp_path):
    # PyTorch 0.1.12 under Python 2: byte strings, `OrderedDict` from a list of pairs, parameters
    # made by NEWOBJ with a state to BUILD.
    def string(text):
        return pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode()

    def name(module, attribute):
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    tensor = (
        name("torch._utils", "_rebuild_tensor")
        + b"(("
        + string("storage")
        + name("torch", "FloatStorage")
        + string("77")
        + string("cpu")
        + b"K\x03NtQK\x00K\x03\x85K\x01\x85tR"
    )
    parameter = name("torch.nn.parameter", "Parameter") + tensor + b"\x85\x81(\x88\x89}tb"
    pairs = b"](](" + string("conv1.weight") + parameter + b"ee"
    root = b"\x80\x02" + name("collections", "OrderedDict") + pairs + b"\x85R."
    path = old_file(tmp_path / "old.pth", {}, {"77": np.array([1, 2, 3], np.float32)})
    path.write_bytes(path.read_bytes().replace(pickle.dumps({}, protocol=2), root, 1))
    assert torch_file.read(path)["conv1.weight"].tolist() == [1, 2, 3]


# What is refused


class Calls:
    """Pickles as a call, as an attacker's object does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


ATTACKS = {
    "system": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "getattr": lambda marker: Calls(getattr, Calls(open, str(marker), "w"), "close"),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "Popen": lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]),
    "partial": lambda marker: Calls(__import__("functools").partial, open, str(marker), "w"),
}
# Names that data has too, and that are not called: what they would call is refused.
REFUSED = {"getattr": "open", "partial": "open"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["root", "value", "key", "state", "argument", "opaque"])
def test_calls_are_refused_by_name(tmp_path, attack, protocol, place):
    marker = tmp_path / "marker"
    call, refused = ATTACKS[attack](marker), REFUSED.get(attack, attack)
    stateful = collections.OrderedDict()
    stateful.harm = call
    value = {
        "root": call,
        "value": {"conv": call},
        "key": [call],
        "state": stateful,
        "argument": Calls(collections.OrderedDict, [["a", call]]),
        "opaque": collections.deque([call]),
    }[place]
    path = torch_zip(tmp_path / "attack.pth", pickle.dumps(value, protocol=protocol))
    with pytest.raises(UserError, match=rf"attack\.pth asks for \S*{refused}\b.*refused"):
        torch_file.read(path)
    assert not marker.exists()


def test_calls_in_an_old_file_are_refused(tmp_path):
    marker = tmp_path / "marker"
    path = old_file(tmp_path / "attack.pth", {"a": Calls(os.system, f"touch {marker}")}, {})
    with pytest.raises(UserError, match=r"asks for \w+\.system.*refused"):
        torch_file.read(path)
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {marker}")))
    with pytest.raises(UserError, match=r"asks for \w+\.system.*refused"):
        torch_file.read(path)
    assert not marker.exists()


def test_a_model_in_the_same_file_does_not_hide_a_call(tmp_path):
    value = {"harm": Calls(os.system, "true"), "model": torch.nn.Sequential(torch.nn.ReLU())}
    path = tmp_path / "both.pth"
    torch.save(value, path)
    with pytest.raises(UserError, match=r"asks for \w+\.system.*refused"):
        torch_file.read(path)


@pytest.mark.parametrize("function", [np.save, torch.save, torch.load])
def test_an_unknown_call_is_not_run_and_its_value_refused(tmp_path, function):
    marker = tmp_path / "marker"
    value = {"a": torch.ones(1), "b": Calls(function, str(marker), 1)}
    torch.save(value, tmp_path / "attack.pth")
    with pytest.raises(UserError, match=rf"b is not a tensor but of type \S*{function.__name__}"):
        torch_file.read(tmp_path / "attack.pth")
    torch.save({"model": {"a": value["a"]}, "b": value["b"]}, tmp_path / "beside.pth")
    assert_same(torch_file.read(tmp_path / "beside.pth"), {"a": value["a"]})
    assert not list(tmp_path.glob("marker*"))


def instructions(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


# Pickles that Python's own reader answers with gigabytes, a crash of the process, or an
# exception of some other type.
TRAPS = {
    "memo index of 4 billion": b"}r\xff\xff\xff\xff0",
    "memo index taken": b"}r\xff\xff\xff\xff" * 3,
    "a text of 4 gigabytes": b"X\xff\xff\xff\xffabc",
    "a byte array of 2^62 bytes": b"\x96" + b"\xff" * 7 + b"\x3f",
    "nested tuples as a key": b"})" + b"\x85" * 300_000 + b"Ns",
    "nested lists": b"]" * 300_000 + b"a" * 299_999,
    "a list in itself": b"]q\x00h\x00a",
    "a dictionary in itself": b"}q\x00X\x05\x00\x00\x00modelh\x00s",
    "an unhashable key": b"}]Ns",
    "an empty stack": b"t",
    "too short a stack": b"N\x86",
    "memo never set": b"h\x07",
    "no mark": b"NNu",
    "odd items": b"}(Nu",
    "append to a dictionary": b"}Na",
    "items of a list": b"](NNu",
    "call of a number": b"K\x01)R",
    "call with no tuple": b"ccollections\nOrderedDict\n]R",
    "call of a storage class": b"ctorch\nFloatStorage\n)R",
    "state of a number": b"K\x01}b",
    "state of a storage class": b"ctorch\nFloatStorage\n}b",
    "pairs that are none": b"ccollections\nOrderedDict\n](K\x01K\x02e\x85R",
    "too many arguments": b"ccollections\nOrderedDict\n(]]]tR",
    "persistent number": b"K\x01Q",
    "persistent tuple": b"(X\x07\x00\x00\x00storageNNNNtQ",
    "persistent module": b"(X\x06\x00\x00\x00modulecdatetime\ndate\nNtQ",
    "persistent storage class": b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nNNNtQ",
    "extension registry": b"\x82\x01",
    "global without an end": b"c" + b"a" * 5000,
    "global that is no text": b"c\xff\xfe\na\n",
    "attribute of an attribute": b"X\x0b\x00\x00\x00collectionsX\x0c\x00\x00\x00abc.__dict__\x93",
    "items of a set that is none": b"](Ne\x90",
    "append to a number": b"K\x01Na",
    "odd items of an opaque value": b"\x8f(Nu",
    "frozen set without a mark": b"N\x91",
    "keywords that are none": b"cdatetime\ndate\n)N\x92",
    "an array of a number": b"cnumpy.core.multiarray\n_reconstruct\nK\x01\x85R",
    "an array of nothing": b"cnumpy.core.multiarray\n_reconstruct\n)R",
    "a call of an opaque value with no tuple": b"\x8f]R",
    "a persistent opaque value": b"\x8fQ",
    "a tensor of an opaque value": b"ctorch._utils\n_rebuild_tensor\n(\x8f\x8f\x8f\x8ftR",
    "no end": b"N" * 10,
    "too many steps": b"N0" + b"N" * (pickle_reader.MAX_STEPS + 1),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_malicious_pickles(tmp_path, trap):
    path = torch_zip(tmp_path / "trap.pth", instructions(TRAPS[trap]))
    with pytest.raises(UserError, match=r"trap\.pth \w+"):
        torch_file.read(path)


def test_a_list_copied_repeatedly(tmp_path):
    pairs = b"](" + b"NN\x86" * 3000 + b"eq\x00"
    copies = b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 3000 + b"t"
    path = torch_zip(tmp_path / "trap.pth", instructions(pairs, copies))
    with pytest.raises(UserError, match=r"trap\.pth holds a pickle of more than"):
        torch_file.read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"ctorch._utils\n_rebuild_qtensor\n", "a pickle of more than"),
        (b"cdatetime\ndate\n", "one tuple, but no state dict"),  # copies nothing
    ],
)
def test_a_tuple_copied_repeatedly(tmp_path, name, message):
    arguments = b"(" + b"N" * 3000 + b"tq\x00"
    calls = b"(" + (name + b"h\x00R") * 3000 + b"t"
    path = torch_zip(tmp_path / "trap.pth", instructions(arguments, calls))
    with pytest.raises(UserError, match=rf"trap\.pth holds {message}"):
        torch_file.read(path)


def tensor_zip(path, offset, size, stride, numel=6, content=bytes(24), storage="FloatStorage"):
    persistent = Persistent("storage", getattr(torch, storage), "0", "cpu", numel)
    tensor = Calls(torch._utils._rebuild_tensor_v2, persistent, offset, size, stride, False, {})
    buffer = io.BytesIO()
    _OldPickler(buffer, protocol=2).dump({"conv.weight": tensor})
    return torch_zip(path, buffer.getvalue(), {"0": content})


def test_hand_made_tensor_is_well_formed(tmp_path):
    content = np.arange(6, dtype=np.float32).tobytes()
    path = tensor_zip(tmp_path / "good.pth", 1, (2, 2), (3, 1), content=content)
    assert torch_file.read(path)["conv.weight"].tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"offset": -1}, "negative or absurd"),
        ({"offset": 1}, "past the end of the 6 elements"),
        ({"offset": 2**63}, "negative or absurd"),
        ({"size": (-2, -3)}, "negative or absurd"),
        ({"stride": (-3, 1)}, "negative or absurd"),
        ({"stride": (3, 2**61)}, "past the end"),
        ({"size": (2**61, 3), "stride": (0, 1)}, "repeats 6 stored elements"),
        ({"size": (2**61, 0, 2**61)}, "absurd shape"),
        ({"size": (2, 3, 1)}, "different numbers of sizes"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "different numbers of sizes"),
        ({"size": [2, 3]}, "makes no sense"),
        ({"size": (2.0, 3)}, "negative or absurd"),
        ({"size": (True, 3)}, "negative or absurd"),
        ({"numel": 7}, "24 bytes stored for 7"),
        ({"numel": -6}, "negative or absurd"),
        ({"content": b""}, "0 bytes stored for 6"),
        ({"storage": "DoubleStorage"}, "24 bytes stored for 6"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, tensor, message):
    if tensor.get("size") == (2**61, 0, 2**61):
        tensor = {**tensor, "stride": (0, 1, 1)}
    path = tensor_zip(
        tmp_path / "bad.pth", **{"offset": 0, "size": (2, 3), "stride": (3, 1), **tensor}
    )
    with pytest.raises(UserError, match=rf"bad\.pth .*{message}"):
        torch_file.read(path)
