"""Compares the receipts of two runs: what differs first, and what most likely made it differ."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from deeplab_jax import config as config_lib
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, rules
from deeplab_jax.config.io import with_fields
from deeplab_jax.data import oversampling, pipeline
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.data.datasets import records
from deeplab_jax.training.provenance import BATCHES, EFFECTS, STEPS
from deeplab_jax.training.receipt import KINDS, Receipt, digest_images, spell
from deeplab_jax.utils.errors import UserError, first_line, listed
from deeplab_jax.utils.paths import is_bucket

ORDER = ("batch", "loss", "aux_loss", "grad_norm", "learning_rate", "state")  # in a step
_ALL = "start batch loss update"
_STEPS = "start loss update"
# What a fact of a start can change first: a field of the config by the longest name; else a kind.
_CHANGES = {
    "seed": "start batch loss",
    "model": "start loss",
    "data": "batch",
    "data.mean": "batch loss",
    "data.std": "batch loss",
    "init": "start",
    "optimizer": "start update",
    "optimizer.accumulate": "loss",
    "loss": "loss",
    "train": "loss",
    "train.batch_size": "batch",
    "train.steps": "update",
    "mesh": "loss",
    **dict.fromkeys(config_lib.FREE_FIELDS | {"data.eval_split"}, ""),
    **{name: "" for name in config_lib.RESUMABLE if not name.startswith("mesh.")},
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A fact that two starts do not share, of one of `receipt.KINDS`, and both values."""

    kind: str
    name: str
    values: tuple[Any, Any]

    @property
    def can_change(self) -> str:
        """What it can be the first to change."""
        if self.kind == "versions":
            return {BATCHES: "batch", STEPS: _STEPS}.get(EFFECTS.get(self.name, ""), _ALL)
        if self.kind == "devices":
            return _STEPS
        if self.kind == "data":
            return "" if self.name == "first crop" else "batch"  # a crop is an effect
        names = itertools.accumulate(self.name.split("."), "{}.{}".format)
        found = [_CHANGES[name] for name in names if name in _CHANGES]
        return found[-1] if found else ""

    @property
    def rank(self) -> int:
        """Lower for what is more likely to be the cause; pixels differ if a version decodes so."""
        if self.kind == "versions":
            return 4 if self.can_change == _ALL else 2
        return {"config": 0, "devices": 3}.get(self.kind, 2 if "pixels" in self.name else 1)

    def __str__(self) -> str:
        prefix = {"versions": "version of ", "config": "config.", "devices": "devices: "}
        values = " | ".join(map(_short, self.values))
        return f"{prefix.get(self.kind, '')}{self.name}: {values}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference."""

    step: int
    what: str  # one of `ORDER`
    where: list[Any]  # the rows of the batch, or the arrays of the state, that differ
    values: tuple[str, str] | None = None  # the bits of both numbers

    def __str__(self) -> str:
        if self.what == "state":
            start = f"the state after step {self.step}" if self.step else "the initial state"
            return f"{start}: {len(self.where)} arrays, the first {listed(self.where[:3])}"
        if self.values is None:
            count, first = len(self.where), self.where[0]
            return f"the batch of step {self.step}: {count} images, the first in row {first}"
        one, other = map(float_of, self.values)
        relative = relative_difference(one, other)
        return f"{self.what} of step {self.step}: {one:.9g} | {other:.9g}, by {relative:.1e} of it"


def relative_difference(one: float, other: float) -> float:
    """Returns the difference of two numbers as a share of the larger."""
    return abs(one - other) / max(abs(one), abs(other), 1e-38)


def compare_starts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Change]:
    """Returns what differs between two starts, see `receipt.start_facts`."""
    changes = [
        Change(kind, name, (one[kind].get(name), other[kind].get(name)))
        for kind in KINDS
        for name in one[kind] | other[kind]
    ]
    return [each for each in changes if len(set(map(json.dumps, each.values))) == 2]


def compare(step: int, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference | None:
    """Returns the first difference between what two runs computed in a step, if both did."""
    for what in ORDER:
        if what not in one or what not in other or one[what] == other[what]:
            continue
        a, b = one[what], other[what]
        if what in ("batch", "state"):
            return Difference(step, what, [name for name in a | b if a.get(name) != b.get(name)])
        return Difference(step, what, [], (a, b))
    return None


def float_of(bits: str) -> float:
    """Returns the float32 of these bits."""
    return float(np.array(int(bits, 16), np.uint32).view(np.float32))


def likely_causes(difference: Difference, changes: Iterable[Change]) -> list[str]:
    """Returns the changes that can have made the difference, the most likely first."""
    kinds = {"batch": "batch", "loss": "loss", "aux_loss": "loss", "grad_norm": "loss"}
    wanted = {kinds.get(difference.what, "update")}
    if difference.what == "state":
        wanted = {"update", "loss"} if difference.step else {"start"}
    able = [change for change in changes if wanted & {*change.can_change.split()}]
    return [str(change) for change in sorted(able, key=lambda change: change.rank)]


def config_of(start: Mapping[str, Any], root: str = "") -> Config:
    """Returns the config of a start; `root` is where the data are now, if elsewhere.

    Raises:
      UserError: the config has fields that this version does not have, or wrong values.
    """
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in start["config"].items()}
    config = with_fields(Config(), fields | ({"data.root": root} if root else {}))
    rules.validate(config)
    return config


@dataclasses.dataclass
class Batches:
    """The batches of a run, made again from its data, or read from `replay --keep-batches`."""

    receipt: Receipt
    root: str = ""  # where the data are now, if elsewhere than they were
    folder: str = ""  # with kept batches

    @functools.cached_property
    def _config(self) -> Config:
        return config_of(self.receipt.starts[-1], self.root)

    @functools.cached_property
    def _dataset(self) -> Dataset:
        data = self._config.data
        prepared = records.data_dir() / "voc_segmentation"
        is_absent = data.name == "voc" and not (data.root or prepared.is_dir())
        if is_absent or is_bucket(data.root):
            raise UserError("the data are not on this machine, and nothing is downloaded")
        return oversampling.apply(data, data_lib.load(data, data.split), quiet=True)

    def image(self, step: int, row: int) -> dict[str, Any]:
        """Returns the index of the image in an epoch, and its name if the data are here."""
        config, data = (self.receipt.starts[-1][kind] for kind in ("config", "data"))
        position = (step - 1) * config["train.batch_size"] + row
        index = pipeline.train_index(data["examples in an epoch"], config["seed"], position)
        try:
            return {"index": index, "name": read_example(self._dataset, index)["name"]}
        except (UserError, IndexError):
            return {"index": index, "name": None}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and labels of a step.

        Raises:
          UserError: they are not here, or are not those that the run read.
        """
        file = pathlib.Path(self.folder) / batch_name(step)
        if self.folder and file.is_file():
            source = str(file)
            with np.load(file) as arrays:
                image, label = arrays["image"], arrays["label"]
        else:
            source = "made again here, it"
            made = pipeline.train_batch(
                *(self._dataset, self._config.data),
                batch_size=self._config.train.batch_size,
                seed=self._config.seed,
                step=step - 1,
            )
            image, label = made["image"], made["label"]
        digests = map(spell, jax.jit(digest_images)(image, label))
        if [*digests] != [*self.receipt.steps[step]["batch"].values()]:
            raise UserError(
                f"{source} has other bytes than the run read. Where the run was made, "
                "deeplab-jax replay --keep-batches keeps them"
            )
        return image, label


def batch_name(step: int) -> str:
    """Returns the file name of a kept batch."""
    return f"batch_{step:08d}.npz"


def compare_pixels(step: int, row: int, batches: tuple[Batches, Batches]) -> dict[str, Any]:
    """Returns how many pixels of an image differ, and the first; or, as "reason", why not."""
    pixels = []
    for number, each in enumerate(batches):
        try:
            image, label = each.batch(step)
        except UserError as error:
            run = "AB"[number]
            return {"reason": f"the batch of {run} is not at hand: {first_line(error)}"}
        pixels.append(np.concatenate([image[row], label[row][..., None]], axis=-1))
    if pixels[0].shape != pixels[1].shape:
        return {"reason": f"crops have the shapes {pixels[0].shape} and {pixels[1].shape}"}
    differs = (pixels[0] != pixels[1]).any(-1)
    y, x = np.argwhere(differs)[0].tolist()
    return {
        "pixels": int(differs.sum()),
        "of": differs.size,
        "x": x,
        "y": y,
        "colors": [each[y, x, :-1].tolist() for each in pixels],
        "labels": [int(each[y, x, -1]) for each in pixels],
    }


@dataclasses.dataclass
class Comparison:
    """The outcome of `bisect` or `replay`."""

    changes: list[Change]  # between the starts
    steps: tuple[int, int] | None = None  # the first and the last that were compared
    num_states: int = 0  # that were compared
    difference: Difference | None = None
    causes: list[str] = dataclasses.field(default_factory=list)
    batch: Difference | None = None  # the first difference of batches
    # Of that batch the first image that differs, see `Batches.image` and `compare_pixels`.
    image: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON."""
        is_equal = self.steps is not None and self.difference is None
        return {"equal": is_equal} | dataclasses.asdict(self)


def bisect(one: Receipt, other: Receipt, batches: tuple[Batches, Batches]) -> Comparison:
    """Compares two receipts; `batches` are those of the two runs, to name images and pixels."""
    found = [
        difference
        for step in sorted(one.steps.keys() & other.steps.keys())
        if (difference := compare(step, one.steps[step], other.steps[step]))
    ]
    first = found[0] if found else None
    step = first.step if first else 0
    changes = compare_starts(one.start_of(step), other.start_of(step))
    notes = [*one.notes, *other.notes]
    if any((change.kind, change.name) == ("config", "train.batch_size") for change in changes):
        notes.append("batches have different sizes, so that no step of one is a step of the other")
        return Comparison(changes, notes=notes)
    steps, states = (
        sorted({*one.steps_with(name)} & {*other.steps_with(name)}) for name in ("batch", "state")
    )
    for receipt in (one, other):
        for before, start in itertools.pairwise(receipt.starts):
            for change in compare_starts(before, start):
                notes.append(f"{receipt.path} went on at step {start['step']} with {change}")
        if receipt.steps_with("batch") != steps:
            notes.append(f"{receipt.path} covers {receipt.covered}; the common ones are compared")
    result = Comparison(changes, (steps[0], steps[-1]) if steps else None, len(states), first)
    result.notes = notes
    result.batch = next((each for each in found if each.what == "batch"), None)
    if first:
        result.causes = likely_causes(first, changes)
    if result.batch:
        step, row = result.batch.step, result.batch.where[0]
        images = [each.image(step, row) for each in batches]
        result.image = {"row": row, "images": images} | compare_pixels(step, row, batches)
    elif first and first.what != "state":
        losses = [[float_of(run.steps[step]["loss"]) for step in steps] for run in (one, other)]
        worst = max(map(relative_difference, *losses))
        notes.append(f"all batches are equal; the losses differ by at most {worst:.1e} of them")
    return result
