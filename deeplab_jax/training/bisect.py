"""Compares the receipts of two runs: what differs first, and what most likely made it differ."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from deeplab_jax import config as config_lib
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config
from deeplab_jax.config.io import with_fields
from deeplab_jax.data import oversampling, pipeline
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.data.datasets import records
from deeplab_jax.training.receipt import Receipt, digest_images, spell, split_digests
from deeplab_jax.utils.errors import UserError, first_line, listed
from deeplab_jax.utils.paths import is_bucket
from deeplab_jax.utils.versions import BATCHES, EFFECTS, STEPS

# What a step computes, in order. A checkpoint's "state" is that before its next step.
ORDER = ("batch", "loss", "aux_loss", "grad_norm", "learning_rate")
# What a field of the config can change first; the longest name counts.
_OF_FIELDS = {
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
}
_OF_NOTHING = config_lib.FREE_FIELDS | {
    "data.eval_split",
    *(name for name in config_lib.RESUMABLE if not name.startswith("mesh.")),
}
_OF_VERSIONS = {BATCHES: "batch", STEPS: "start loss update"}
_ALL = "start batch loss update"


@dataclasses.dataclass(frozen=True)
class Change:
    """What two starts do not share: the kind, "versions", "config", "data" or "devices", and more.

    Attributes:
      kind, name: of the field.
      values: there and here, or of both runs.
    """

    kind: str
    name: str
    values: tuple[Any, Any]

    @property
    def can_change(self) -> str:
        """What it can be the first to change."""
        if self.kind == "versions":
            return _OF_VERSIONS.get(EFFECTS.get(self.name, ""), _ALL)
        if self.kind == "devices":
            return _OF_VERSIONS[STEPS]
        if self.kind == "data":
            return "" if self.name == "first crop" else "batch"  # a crop is an effect
        names = itertools.accumulate(self.name.split("."), "{}.{}".format)
        found = [_OF_FIELDS[name] for name in names if name in _OF_FIELDS]
        return found[-1] if found and self.name not in _OF_NOTHING else ""

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
    """The first difference.

    Attributes:
      step: number of steps taken with it.
      what: one of `ORDER`, or "state".
      where: the rows of the batch, or the arrays of the state, that differ.
      values: the bits of both, if it is one number.
    """

    step: int
    what: str
    where: list[Any]
    values: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.what == "state":
            start = f"the state after step {self.step}" if self.step else "the initial state"
            return f"{start}: {len(self.where)} arrays, the first {listed(self.where[:3])}"
        if self.values is None:
            return f"the batch of step {self.step}: {len(self.where)} images, the first in row " + (
                f"{self.where[0]}"
            )
        one, other = map(float_of, self.values)
        relative = relative_difference(one, other)
        return f"{self.what} of step {self.step}: {one:.9g} | {other:.9g}, by {relative:.1e} of it"


def relative_difference(one: float, other: float) -> float:
    """Returns the difference of two numbers as a share of the larger."""
    return abs(one - other) / max(abs(one), abs(other), 1e-38)


def compare_starts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Change]:
    """Returns what differs between two starts, see `receipt.start_facts`."""
    return [
        Change(kind, name, values)
        for kind in ("versions", "config", "data", "devices")
        for name in dict.fromkeys([*one[kind], *other[kind]])
        if json.dumps((values := tuple(each[kind].get(name) for each in (one, other)))[0])
        != json.dumps(values[1])
    ]


def compare_step(step: int, one: Mapping[str, str], other: Mapping[str, str]) -> Difference | None:
    """Returns the first difference between the lines of a step."""
    for what in ORDER:
        if one.get(what) == other.get(what):
            continue
        if what == "batch":
            pairs = itertools.zip_longest(*(split_digests(each[what]) for each in (one, other)))
            return Difference(step, what, [row for row, (a, b) in enumerate(pairs) if a != b])
        return Difference(step, what, [], (one.get(what, ""), other.get(what, "")))
    return None


def compare_states(
    step: int, one: Mapping[str, str], other: Mapping[str, str]
) -> Difference | None:
    """Returns the difference between the digests of two states by array."""
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return Difference(step, "state", names) if names else None


def float_of(bits: str) -> float:
    """Returns the float32 of these bits; NaN if there are none."""
    return float(np.array(int(bits or "7fc00000", 16), np.uint32).view(np.float32))


def compare(one: Receipt, other: Receipt) -> Iterator[Difference]:
    """Yields the first difference of each common step that has one, in order."""
    for step in sorted({*one.steps, *one.states} & {*other.steps, *other.states}):
        found = None
        if step in one.steps and step in other.steps:
            found = compare_step(step, one.steps[step], other.steps[step])
        if found is None and step in one.states and step in other.states:
            found = compare_states(step, one.states[step], other.states[step])
        if found:
            yield found


def likely_causes(difference: Difference, changes: Iterable[Change]) -> list[str]:
    """Returns the changes that can have made the difference, the most likely first."""
    kinds = {"batch": "batch", "loss": "loss", "aux_loss": "loss", "grad_norm": "loss"}
    wanted = {kinds.get(difference.what, "update")}
    if difference.what == "state":
        wanted = {"update", "loss"} if difference.step else {"start"}
    able = [change for change in changes if wanted & {*change.can_change.split()}]
    return [str(change) for change in sorted(able, key=lambda change: change.rank)]


def config_of(start: Mapping[str, Any], root: str = "") -> Config:
    """Returns the config of a start.

    Args:
      start: see `receipt.start_facts`.
      root: where the data are now; empty: where they were.

    Raises:
      UserError: the config has fields that this version does not have.
    """
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in start["config"].items()}
    return with_fields(Config(), fields | ({"data.root": root} if root else {}))


class Batches:
    """The batches of a run, made again from its data, or read from `replay --keep-batches`."""

    def __init__(self, receipt: Receipt, root: str = "", folder: str = "") -> None:
        """Reads nothing yet.

        Args:
          receipt: of the run.
          root: where its data are now; empty: where they were.
          folder: with kept batches; empty: none.
        """
        self._receipt, self._root, self._folder = receipt, root, folder
        self._dataset: Dataset | None = None

    def image(self, step: int, row: int) -> dict[str, Any]:
        """Returns the index of the image in an epoch, and its name if the data are here."""
        start = self._receipt.start_of(step)
        config, size = start["config"], start["data"]["examples in an epoch"]
        position = (step - 1) * config["train.batch_size"] + row
        index = pipeline.train_index(size, config["seed"], position)
        try:
            return {"index": index, "name": read_example(self._load(start), index)["name"]}
        except (UserError, IndexError):
            return {"index": index, "name": None}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and labels of a step.

        Raises:
          UserError: they are not here, or are not those that the run read.
        """
        start = self._receipt.start_of(step)
        file = pathlib.Path(self._folder) / batch_name(step)
        if self._folder and file.is_file():
            with np.load(file) as arrays:
                image, label = arrays["image"], arrays["label"]
            source = str(file)
        else:
            config = config_of(start, self._root)
            made = pipeline.train_batch(
                *(self._load(start), config.data),
                batch_size=config.train.batch_size,
                seed=config.seed,
                step=step - 1,
            )
            image, label, source = made["image"], made["label"], "made again here, it"
        if spell(jax.jit(digest_images)(image, label)) != self._receipt.steps[step]["batch"]:
            raise UserError(
                f"{source} has other bytes than the run read. Where the run was made, "
                "deeplab-jax replay --keep-batches keeps them"
            )
        return image, label

    def _load(self, start: Mapping[str, Any]) -> Dataset:
        if self._dataset is None:
            config = config_of(start, self._root)
            prepared = records.data_dir() / "voc_segmentation"
            is_absent = config.data.name == "voc" and not (config.data.root or prepared.is_dir())
            if is_absent or is_bucket(config.data.root):
                raise UserError("the data are not on this machine, and nothing is downloaded")
            loaded = data_lib.load(config.data, config.data.split)
            self._dataset = oversampling.apply(config.data, loaded, quiet=True)
        return self._dataset


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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of `bisect` or `replay`.

    Attributes:
      changes: what differs between the starts.
      steps: the first and the last step that were compared; None: there are none.
      num_states: number of states that were compared.
      difference: the first difference; None: all is equal.
      causes: its likely causes.
      batch: the first difference of batches.
      image: of that batch the first image that differs, see `Batches.image`, `compare_pixels`.
      notes: what limits the comparison.
    """

    changes: list[Change]
    steps: tuple[int, int] | None = None
    num_states: int = 0
    difference: Difference | None = None
    causes: list[str] = dataclasses.field(default_factory=list)
    batch: Difference | None = None
    image: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON."""
        is_equal = self.steps is not None and self.difference is None
        return {"equal": is_equal} | dataclasses.asdict(self)


def bisect(one: Receipt, other: Receipt, batches: tuple[Batches, Batches]) -> Comparison:
    """Compares two receipts.

    Args:
      one, other: the receipts.
      batches: those of the two runs, to name images and pixels.
    """
    found = list(compare(one, other))
    first = found[0] if found else None
    step = first.step if first else 0
    changes = compare_starts(one.start_of(step), other.start_of(step))
    common = sorted(one.steps.keys() & other.steps.keys())
    notes = [*one.notes, *other.notes]
    if any((change.kind, change.name) == ("config", "train.batch_size") for change in changes):
        notes.append("batches have different sizes, so that no step of one is a step of the other")
        return Comparison(changes, notes=notes)
    for receipt in (one, other):
        for before, start in itertools.pairwise(receipt.starts):
            for change in compare_starts(before, start):
                notes.append(f"{receipt.path} went on at step {start['step']} with {change}")
        if len(receipt.steps) > len(common):
            notes.append(f"{receipt.path} covers {receipt.covered}; the common ones are compared")
    batch = next((each for each in found if each.what == "batch"), None)
    image = {}
    if batch:
        row = batch.where[0]
        images = [each.image(batch.step, row) for each in batches]
        image = {"row": row, "images": images} | compare_pixels(batch.step, row, batches)
    elif first and first.values:
        losses = [[float_of(run.steps[each]["loss"]) for each in common] for run in (one, other)]
        worst = max(map(relative_difference, *losses))
        notes.append(f"all batches are equal; the losses differ by at most {worst:.1e} of them")
    return Comparison(
        changes,
        (common[0], common[-1]) if common else None,
        len(one.states.keys() & other.states.keys()),
        first,
        likely_causes(first, changes) if first else [],
        batch,
        image,
        notes,
    )
