"""The options of `deeplab-jax data`, and the command lines that carry them on."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from typing import Annotated, Any

import typer

from deeplab_jax.cli import options
from deeplab_jax.config import Config, flatten

# The field that each option sets.
_FIELDS = {
    "--classes": "data.folder.classes",
    "--masks-hold": "data.folder.masks_hold",
    "--ignore-label": "data.ignore_label",
    "--threshold": "data.folder.threshold",
    "--mask-name": "data.folder.mask_name",
    "--image-pattern": "data.folder.image_pattern",
    "--mask-pattern": "data.folder.mask_pattern",
    "--channels": "data.folder.channels",
}
_OF_IMAGES = ("data.folder.channels", "data.mean", "data.std")
_OPTIONS = {field: option for option, field in _FIELDS.items()}

# Settings in a message. Those between which there is only "and" are one group.
_SETTING = r"config\.(data\.[a-z_.]+)=('[^']*'|\"[^\"]*\"|\S+)"
_GROUP = re.compile(rf"{_SETTING}(?:[\s,`]+(?:and\s+)?[`-]*{_SETTING})*")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the options of a command say about a data set."""

    config_file: str  # which they change; empty: the defaults
    fields: dict[str, Any]  # that they set

    def config(self, root: str) -> Config:
        """Returns the config of a training on the data set, which is valid."""
        from deeplab_jax.config.io import from_python, with_fields
        from deeplab_jax.config.rules import validate

        base = from_python(self.config_file) if self.config_file else Config()
        config = with_fields(base, {"data.name": "folder", "data.root": root} | self.fields)
        validate(config)
        return config

    def check_command(self, root: str, *more: str) -> str:
        """Returns the command that checks a data set with these options, and others after them."""
        given = ["--config", self.config_file] if self.config_file else []
        for option, field in _FIELDS.items():
            if field in self.fields and option not in more:
                given += [option, str(self.fields[field])]
        return shlex.join(["deeplab-jax", "data", "check", root, *given, *more])

    def train_command(self, root: str) -> str:
        """Returns the command that trains on a data set with these options."""
        values = {"data.root": root} | self.fields
        flags = [
            f"--config.{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for field, value in values.items()
        ]
        name = re.sub(r"[^\w-]+", "_", pathlib.Path(root).absolute().stem)
        config = self.config_file or "configs/folder.py"
        start = ["python", "train.py", "--config", config, "--workdir", f"runs/{name}"]
        return shlex.join([*start, *flags])

    def after_prepare(self) -> DataSettings:
        """Returns the settings for what `data prepare` writes: only those of the images."""
        from deeplab_jax.config.io import from_python

        kept = {field: self.fields[field] for field in _OF_IMAGES if field in self.fields}
        if self.config_file:
            default, ours = flatten(Config()), flatten(from_python(self.config_file))
            reset = [field for field in _OPTIONS if ours[field] != default[field]]
            kept = {field: default[field] for field in reset if field not in _OF_IMAGES} | kept
        return DataSettings(self.config_file, kept)

    def mending_commands(self, root: str, text: str, *always: str) -> list[str]:
        """Returns the commands that check a data set with the settings that a message names.

        Settings between which there is only "and" are set by one command; the others are choices.
        Those that are set already are left out. All commands have the options `always`.
        """
        commands = []
        for group in _GROUP.finditer(text):
            more: list[str] = []
            target = root
            for setting in re.finditer(_SETTING, group[0]):
                value = setting[2].rstrip(".,;:)`").strip("'\"")
                if setting[1] == "data.root":
                    target = value
                elif setting[1] in _OPTIONS and str(self.fields.get(setting[1])) != value:
                    more += [_OPTIONS[setting[1]], value]
            if more or target != root:
                commands.append(self.check_command(target, *more, *always))
        return list(dict.fromkeys(commands))


def _data_settings(
    config: Annotated[
        str, options.path_option("Config file whose data settings to use: configs/folder.py.")
    ] = "",
    classes: Annotated[
        str, options.path_option("File of class names. Default: classes.txt in the root.")
    ] = "",
    masks_hold: Annotated[
        str,
        typer.Option(
            help="Pixel values of masks: ids, colors or binary. Default: auto, which looks at "
            "the masks."
        ),
    ] = "",
    ignore_label: Annotated[
        int | None, typer.Option(help="Id of the pixels that do not count. Default: 255.")
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(help="Grey value from which a pixel of a binary mask is foreground: 128."),
    ] = None,
    mask_name: Annotated[
        str,
        typer.Option(
            help="File name of a mask without its suffix, such as {name}_mask; {name} stands for "
            "that of its image. Default: {name}."
        ),
    ] = "",
    image_pattern: Annotated[
        str,
        typer.Option(help="Paths of images below the root: {split}/{name}.jpg. Default: found."),
    ] = "",
    mask_pattern: Annotated[
        str,
        typer.Option(
            help="Paths of masks below the root: {split}/{name}_mask.png. Default: found."
        ),
    ] = "",
    channels: Annotated[
        int | None, typer.Option(help="Channels of the images. Default: 3.")
    ] = None,
) -> DataSettings:
    values = locals()
    given = {field: values[option[2:].replace("-", "_")] for option, field in _FIELDS.items()}
    fields = {field: value for field, value in given.items() if value not in (None, "")}
    if channels is not None:  # a check does not normalize, so any mean and std will do
        fields |= {"data.mean": (0.5,) * channels, "data.std": (0.5,) * channels}
    return DataSettings(config, fields)


data_options = options.add_options(_data_settings)
