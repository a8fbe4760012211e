"""Flags that are given twice, and fields that are set to None."""

import subprocess
import sys
import typing

import pytest
from absl import flags, logging

from conftest import ROOT
from deeplab_jax.cli import train
from deeplab_jax.config import Config, flatten
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import union_types, validate
from deeplab_jax.utils.errors import UserError


def types_of_fields(section=Config, prefix=""):
    fields = {}
    for name, hint in typing.get_type_hints(section).items():
        is_section = hasattr(hint, "__dataclass_fields__")
        nested = types_of_fields(hint, f"{prefix}{name}.") if is_section else {prefix + name: hint}
        fields |= nested
    return fields


HINTS = types_of_fields()
OPTIONAL = [name for name, hint in HINTS.items() if type(None) in union_types(hint)]
REQUIRED = [
    name
    for name, hint in HINTS.items()
    if name not in OPTIONAL and hint not in (str, object, tuple[str, ...])
]
TUPLES = {
    "model.multi_grid": ("1,2,4", "1,1,1"),
    "model.atrous_rates": ("6,12,18", "2,4,6"),
    "data.crop_size": ("161", "321"),
    "data.scale_range": ("0.5,1", "0.25,2"),
    "data.duplicate_classes": ("disc,ring", "cross"),
    "data.mean": ("0.1,0.2,0.3", "0.4,0.5,0.6"),
    "data.std": ("0.1,0.2,0.3", "0.4,0.5,0.6"),
    "data.shapes.radius_range": ("0.1,0.2", "0.2,0.3"),
    "eval.scales": ("0.5,1", "0.75"),
    "loss.class_weights": ("1,2,3,4,5", "5,4,3,2,1"),
    "optimizer.arguments": ("nesterov=false", "nesterov=true"),
    "train.loggers": ("tensorboard,tensorboard", "tensorboard"),
}


@pytest.fixture
def parse():
    """Parses the arguments of `train.py`, and returns the config."""
    argv, verbosity = sys.argv, logging.get_verbosity()

    def parse(*arguments):
        arguments = ["train.py", "--config=shapes", "--workdir=run", *arguments]
        sys.argv = train.config_first(arguments)
        train._parse(sys.argv)
        return train.get_config()

    def override(*arguments):
        config = config_io.from_python("shapes")
        return config_io.override(config, [each.removeprefix("--config.") for each in arguments])

    yield {"train": parse, "--set": override}
    sys.argv = argv
    logging.set_verbosity(verbosity)
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_all_tuples_are_tried():
    tuples = {
        name
        for name, hint in HINTS.items()
        if "tuple" in str(hint) or "dict" in str(hint) or hint is object
    }
    assert tuples == TUPLES.keys()


@pytest.mark.parametrize("command", ["train", "--set"])
@pytest.mark.parametrize("field", TUPLES)
def test_the_last_of_two_values_counts(parse, command, field):
    first, last = TUPLES[field]
    once = flatten(parse[command](f"--config.{field}={last}"))
    assert ",".join(str(part) for part in once[field]) != first
    both = [f"--config.{field}={first}", "--config.seed=1", f"--config.{field}={last}"]
    if command == "train":
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
    assert flatten(parse[command](*both)) == once | {"seed": 1}


@pytest.mark.parametrize(
    "program",
    [["train.py", "--config", "configs/shapes.py"], ["-m", "deeplab_jax.cli", "train", "shapes"]],
)
def test_the_last_of_two_values_counts_in_both_programs(tmp_path, program):
    crops = ["--config.data.crop_size=161", "--config.data.crop_size", "1,2,3"]
    command = [sys.executable, *program, f"--workdir={tmp_path}/run", *crops]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.data.crop_size must be one side or height,width")
    assert done.stderr.endswith("got (1, 2, 3)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=voc_os8", "--config", "voc_os16", "--config.mesh.data", "-1"],
        ["--config.mesh.data=4", "--config=voc_os8", "-config=voc_os16", "--config.mesh.data=-1"],
        ["--workdir=one", "--config.seed=0", "--config=voc_os16", "--workdir=two"],
    ],
)
def test_the_last_config_counts_wherever_it_is(parse, arguments):
    assert parse["train"](*arguments) == config_io.from_python("voc_os16")


@pytest.mark.parametrize("command", ["train", "--set"])
@pytest.mark.parametrize("text", ["None", "none"])
def test_optional_fields_take_none(parse, command, text):
    config = parse[command](*(f"--config.{field}={text}" for field in OPTIONAL))
    validate(config)
    assert {field: flatten(config)[field] for field in OPTIONAL} == dict.fromkeys(OPTIONAL)
    assert {"model.multi_grid", "model.stem", "model.aux_head", "model.width"} < set(OPTIONAL)


@pytest.mark.parametrize("field", REQUIRED)
def test_other_fields_refuse_none_and_do_not_offer_it(field):
    with pytest.raises(UserError, match=f"config.{field} must be .*, got 'None'") as error:
        validate(config_io.override(Config(), [f"{field}=None"]))
    assert "or None" not in str(error.value)


@pytest.mark.parametrize("field", OPTIONAL)
def test_optional_fields_offer_none(field):
    if union_types(HINTS[field])[0] is not str:
        with pytest.raises(UserError, match=f"config.{field} must be .* or None, got 'x'"):
            validate(config_io.override(Config(), [f"{field}=x"]))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--config.train.remat"], "train.remat", True),
        (["--noconfig.data.flip"], "data.flip", False),
        (["--config.model.aux_head"], "model.aux_head", True),
        (["--config.train.remat=1"], "train.remat", True),
        (["--config.train.steps", "70"], "train.steps", 70),
        (["--config.model.multi_grid=(1, 2, 4)"], "model.multi_grid", (1, 2, 4)),
        (["--config.model.multi_grid=[1,2,4]"], "model.multi_grid", (1, 2, 4)),
        (["--config.eval.scales=0.5"], "eval.scales", (0.5,)),
        (["--config.data.duplicate_classes='ring',\"disc\""], "data.duplicate_classes", ("ring", "disc")),  # noqa: E501
        (["--config.data.duplicate_classes="], "data.duplicate_classes", ()),
        (["--config.loss.class_weights=auto"], "loss.class_weights", "auto"),
        (["--config.loss.class_weights=None"], "loss.class_weights", None),
    ],
)  # fmt: skip
def test_spellings_of_values(parse, arguments, field, value):
    assert flatten(parse["train"](*arguments))[field] == value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.steps=None", "config.train.steps must be a whole number, got 'None'"),
        ("--config.model=x", "no field 'model', which is a section"),
        ("--config.model.stemm=deep", "no field 'model.stemm'; nearest: model.stem"),
        ("--workdir=", "--workdir is missing or empty"),
        ("--config=", "the path of the config is empty"),
    ],
)
def test_mistakes_are_found_while_flags_are_parsed(parse, argument, message):
    with pytest.raises(UserError, match=message):
        parse["train"](argument)
