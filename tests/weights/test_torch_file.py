"""Reading and writing weights, against PyTorch itself."""

import argparse
import collections
import datetime
import enum
import functools
import pathlib
import pickletools
import random
import sys
import types
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch

import torch_reference
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import torch_file
from deeplab_jax.weights.torch_format.pickle_writer import pickle_state_dict
from torch_reference import array_bits, assert_same, bits, torch

FORMATS = {"zip": True, "legacy": False}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """Saves as PyTorch does, in either format, and gives the path."""

    def save_to_file(value, **options):
        path = tmp_path / "weights.pth"
        torch.save(value, path, _use_new_zipfile_serialization=FORMATS[request.param], **options)
        return path

    return save_to_file


def sample_tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, 4, generator=generator)
    tensors = {f"of.{dtype}": (base * 9).to(dtype) for dtype in DTYPES if dtype != torch.bool}
    return tensors | {
        "of.bool": base > 0,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(3, 0, 2),
        "whole": base,
        "shared": base,
        "offset": base[2:, 1:],
        "transposed": base.permute(2, 0, 1),
        "stepped": base[::2, :, ::3],
        "one.repeated": base[:, :1].expand(6, 1, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "named.tensor ü": torch.ones(2, 2, requires_grad=True),
    }


# What PyTorch writes


def test_reads_what_pytorch_writes(save):
    tensors = sample_tensors()
    path = save(tensors)
    assert_same(torch_file.read(path), torch.load(path))


def test_arrays_are_read_only_views_that_share_storage(save):
    base = torch.arange(20.0)
    arrays = torch_file.read(save({"a": base, "b": base[3:]}))
    assert np.shares_memory(arrays["a"], arrays["b"])
    assert not arrays["a"].flags.owndata
    assert not arrays["a"].flags.writeable


def test_ordered_dict_with_metadata_of_a_module(save):
    state_dict = torch_reference.classifier("resnet18").state_dict()
    assert_same(torch_file.read(save(state_dict)), state_dict)


def test_newer_pickle_protocol(save):
    tensors = sample_tensors()
    assert_same(torch_file.read(save(tensors, pickle_protocol=4)), tensors)


def test_real_imagenet_weights(shared_data):
    path = shared_data.parent / "weights" / "resnet18_partial.pth"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    arrays = torch_file.read(path)
    assert len(arrays) == 98
    assert_same(arrays, torch.load(path))


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict"])
def test_checkpoint_of_a_training_script(save, entry):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    path = save(
        {
            "epoch": 3,
            entry: model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "args": argparse.Namespace(lr=0.1, device="cpu"),
            "scores": [0.5, -1, None, 2**40],
        }
    )
    weights_file = torch_file.read_file(path)
    others = "epoch, optimizer, lr_scheduler, args, scores"
    assert weights_file.notes == (f'The state dict was under "{entry}"; not read: {others}.',)
    assert_same(weights_file.arrays, model.state_dict())


def test_a_plain_state_dict_has_no_entry(save):
    assert torch_file.read_file(save({"model": torch.ones(2)})).notes == ()


# What training scripts write beside the state dict


def class_of(module, name, *bases, **attributes):
    """A class that pickles under a name of a package which is not installed here."""
    made = types.new_class(name, bases, exec_body=lambda body: body.update(attributes))
    made.__module__, made.__qualname__ = module, name
    return made


class NewWithKeywords:
    def __new__(cls, *, size):
        made = object.__new__(cls)
        made.size = size
        return made

    def __getnewargs_ex__(self):
        return (), {"size": self.size}


def smallest(self):
    return self._log_history.min()


smallest.__module__, smallest.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer.min"
HISTORY = class_of(smallest.__module__, "HistoryBuffer", min=smallest)
CONFIG = class_of("mmengine.config.config", "ConfigDict", dict)
KEYWORDS = class_of("omegaconf.base", "Container", NewWithKeywords)
MODE = enum.Enum("SCMode", "DICT OBJECT", module="omegaconf.base")


def optimizer():
    """An optimizer with state, whose keys are parameters."""
    weight = torch.nn.Parameter(torch.ones(2))
    made = torch.optim.Adam([weight])
    weight.sum().backward()
    made.step()
    return made


def history():
    """As mmengine's: an array, and a method of the class."""
    made = HISTORY()
    made._log_history, made.statistics_methods = np.arange(300.0), {"min": HISTORY.min}
    return made


class UsersConfig:
    pass


def data(protocol):
    """One value for each way in which objects are pickled."""
    values = [
        np.array([{"a": 1}, None], object),
        np.array(["road", "sky"]),
        [np.float32(1), np.datetime64("2024"), np.float32, np.dtypes.Float32DType],
        [np.random.RandomState(0), np.random.default_rng(0), torch.Generator()],
        [np.random.RandomState(0).get_state(), random.getstate(), torch.get_rng_state()],
        [made := optimizer(), torch.optim.lr_scheduler.StepLR(made, 2)],
        collections.defaultdict(list, {"a": [1]}),
        collections.deque([1, {"b": 2}], maxlen=3),
        collections.Counter("abca"),
        [pathlib.PurePosixPath("a/b"), argparse.Namespace(lr=1), types.SimpleNamespace(a=1)],
        [torch.float32, int, torch.device("cuda:0"), torch.Size([1]), torch.__version__],
        [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date.min],
        [{1, "a"}, set(), frozenset({2}), frozenset()],
        [range(3), slice(1, 2), 1j, 2**100, ...],
        [b"", b"\xff\x00", bytearray(b"abc"), bytes(300)],
        {(1, 2): "a", pathlib.PurePath("b"): 1, b"c": 3},
        functools.partial(torch.nn.functional.cross_entropy, ignore_index=255),
        torch.nn.CrossEntropyLoss(weight=torch.ones(4)),
        MODE.OBJECT,
        {"message_hub": {"log_scalars": {"loss": history()}}},
        CONFIG(type="SGD", lr=0.1, params=CONFIG(a=1)),
        UsersConfig(),
    ]
    # Protocol 2 has no instruction for these.
    return values if protocol == 2 else [*values, KEYWORDS(size=3), torch.channels_last]


@pytest.fixture
def classes(monkeypatch):
    """Puts the classes of other packages where `pickle` finds them while it saves."""
    for made in (HISTORY, CONFIG, KEYWORDS, MODE):
        parts = made.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for made in (HISTORY, CONFIG, KEYWORDS, MODE):
        setattr(sys.modules[made.__module__], made.__name__, made)


@pytest.mark.parametrize("protocol", [2, 4])
def test_data_beside_the_state_dict_is_not_needed(save, classes, protocol):
    tensors = {"conv.weight": torch.randn(2, 3), "conv.bias": torch.ones(2)}
    meta = {"CLASSES": ("road", "sky"), "config": "model = dict()", "n": [1, 0.5, None]}
    values = data(protocol)
    checkpoint = {"epoch": values, "state_dict": tensors, "meta": meta | {"x": values}, "last": 3}
    weights_file = torch_file.read_file(save(checkpoint, pickle_protocol=protocol))
    assert_same(weights_file.arrays, tensors)
    assert weights_file.notes == ('The state dict was under "state_dict"; not read: epoch, last.',)
    read = weights_file.config.pop("meta")
    assert len(read.pop("x")) == len(values)
    assert (read, weights_file.config) == (meta, {})


def test_opaque_values_of_a_state_dict_are_named(save):
    path = save(
        {
            "good": torch.ones(1),
            "array": np.ones(3),
            "scalar": np.float32(1),
            "path": pathlib.PureWindowsPath("a"),
            "dtype": torch.float16,
            "set": {1},
        }
    )
    message = r"array is not a tensor but of type numpy\.ndarray; scalar is .*multiarray\.scalar; "
    message += r"path is .*pathlib\.PureWindowsPath; dtype is .*torch\.float16; set is .*\.set$"
    with pytest.raises(UserError, match=message):
        torch_file.read(path)
    with pytest.raises(UserError, match=r"holds one torch\.nn\.modules\.loss\.BCELoss, but no"):
        torch_file.read(save(torch.nn.BCELoss()))


# What PyTorch writes and is refused


class UsersModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"net": model, "epoch": 1}])
@pytest.mark.parametrize("model", [UsersModel(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))])
def test_whole_pickled_model(save, wrap, model):
    name = type(model).__name__
    message = rf"whole pickled model of the class \S*\.{name}, .*state_dict\(\)"
    with pytest.raises(UserError, match=message):
        torch_file.read(save(wrap(model)))


def with_attribute():
    made = torch.ones(2)
    made.kind = "head"
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "negated"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantised"),
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, dtype=torch.uint16), "no storage class"),
        (lambda: torch.ones(2, dtype=torch.float8_e4m3fn), "no storage class"),
        (lambda: torch.ones(2).requires_grad_()._neg_view().detach(), "negated"),
        (with_attribute, "has attributes"),
        (lambda: 3, "not a tensor but of type int"),
    ],
)
def test_kinds_of_tensors_that_are_refused(save, make, kind):
    path = save({"good": torch.ones(1), "layer.weight": make()})
    with pytest.raises(UserError, match=rf"layer\.weight is .*{kind}"):
        torch_file.read(path)
    if kind == "not a tensor but of type int":
        return
    # They count where one of several dictionaries of tensors is chosen, and do no harm elsewhere.
    tensors = {"a": torch.ones(1)}
    path = save({"a": make(), "b": make(), "ema_of": tensors})
    with pytest.raises(UserError, match=rf"a is .*{kind}"):
        torch_file.read(path)
    path = save({"model": tensors, "other": {"a": make()}})
    assert_same(torch_file.read(path), tensors)


def test_expanded_tensor_is_refused(save):
    with pytest.raises(UserError, match=r"invalid tensor a, which repeats 1 stored elements"):
        torch_file.read(save({"a": torch.ones(1).expand(5)}))


@pytest.mark.parametrize(
    "value", [[torch.ones(1)], torch.ones(1), {}, {"epoch": 1}, {"model": {"a": 1}}, None]
)
def test_no_state_dict(save, value):
    with pytest.raises(UserError, match=r"but no state dict.*torch\.save\(model\.state_dict\(\)"):
        torch_file.read(save(value))


# safetensors


def test_reads_safetensors_whatever_it_is_called(tmp_path):
    tensors = {name: t.detach().clone().contiguous() for name, t in sample_tensors().items()}
    path = tmp_path / "weights.pth"
    safetensors.torch.save_file(tensors, path)
    arrays = torch_file.read(path)
    assert_same(dict(sorted(arrays.items())), dict(sorted(tensors.items())))
    assert not arrays["whole"].flags.writeable


@pytest.mark.parametrize(("dtype", "kind"), [("complex64", "C64"), ("float8_e4m3fn", "F8_E4M3")])
def test_safetensors_of_other_types(tmp_path, dtype, kind):
    tensors = {"good": torch.ones(2), "odd": torch.ones(2).to(getattr(torch, dtype))}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors .*odd is {kind}"):
        torch_file.read(tmp_path / "a.safetensors")


# Writing


def sample_arrays():
    generator = np.random.default_rng(0)
    base = generator.normal(size=(4, 3, 5)).astype(np.float32)
    types = [np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8]
    return {f"of.{np.dtype(kind)}": (base * 9).astype(kind) for kind in types} | {
        "of.uint8": np.arange(7, dtype=np.uint8),
        "of.bool": base > 0,
        "conv.weight ü": base,
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "scalar": np.array(3),
        "empty": np.zeros((2, 0, 3), np.float32),
        "transposed": base.T,
        "reversed": base[::-1, :, ::2],
    }


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_round_trip_is_bit_exact(tmp_path, suffix):
    arrays = sample_arrays()
    path = tmp_path / f"weights{suffix}"
    torch_file.write(path, arrays)
    ours = torch_file.read(path)
    theirs = (
        safetensors.torch.load_file(path)
        if suffix == ".safetensors"
        else torch.load(path, weights_only=True)
    )
    assert set(ours) == set(theirs) == set(arrays)
    for name, array in arrays.items():
        assert array_bits(ours[name]) == array_bits(array) == bits(theirs[name]), name
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_written_file_loads_strictly(tmp_path):
    source = torch_reference.classifier("resnet18", seed=1)
    target = torch_reference.classifier("resnet18", seed=2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    torch_file.write(tmp_path / "b.pth", torch_file.read(tmp_path / "a.pth"))
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "b.pth", weights_only=True, mmap=mapped)
        target.load_state_dict(loaded, strict=True)
        assert_same(torch_file.read(tmp_path / "a.pth"), target.state_dict())


def test_written_bytes_are_aligned_and_depend_only_on_the_arrays(tmp_path):
    arrays = {"a" * length: np.full(3 * length, length) for length in range(1, 70, 5)}
    torch_file.write(tmp_path / "a.pth", arrays)
    torch_file.write(tmp_path / "b.pth", arrays)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    read = torch_file.read(tmp_path / "a.pth").values()
    assert all(array.ctypes.data % 64 == 0 for array in read)


def test_writes_what_it_reads_from_the_same_file(tmp_path):
    path = tmp_path / "a.pth"
    torch_file.write(path, {"a": np.arange(10_000)})
    torch_file.write(path, torch_file.read(path))
    assert torch_file.read(path)["a"].tolist() == list(range(10_000))


def test_sizes_of_2_gib_and_more_are_written():
    sizes = [2**31 - 1, 2**31, 2**40]
    arrays = {str(size): np.broadcast_to(np.float32(0), size) for size in sizes}
    written = [argument for _, argument, _ in pickletools.genops(pickle_state_dict(arrays))]
    assert set(sizes) <= set(written)


def test_writes_arrays_of_jax(tmp_path):
    torch_file.write(tmp_path / "a.pth", {"a": jnp.ones((2, 3), jnp.bfloat16)})
    assert torch.load(tmp_path / "a.pth")["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    torch_file.write(path, {"a": np.ones(3)})

    def full(*arguments, **options):
        pathlib.Path(arguments[1]).write_bytes(b"half") if suffix == ".safetensors" else None
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        torch_file.write(path, {"a": np.zeros(3)})
    assert torch_file.read(path)["a"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_impossible_writes(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.pth, \.pt, \.safetensors"):
        torch_file.write(tmp_path / "a.npz", {"a": np.ones(1)})
    with pytest.raises(UserError, match=r"cannot write .*absent"):
        torch_file.write(tmp_path / "absent" / "a.pth", {"a": np.ones(1)})
    with pytest.raises(UserError, match="cannot write"):
        torch_file.write(tmp_path / "absent" / "a.safetensors", {"a": np.ones(1)})
    with pytest.raises(ValueError, match="a is complex64"):
        torch_file.write(tmp_path / "a.pth", {"a": np.ones(1, np.complex64)})
    assert list(tmp_path.iterdir()) == []
