"""Decides how a user's masks encode classes, from settings, a file of classes and a few masks."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets import polygon_folder
from deeplab_jax.data.io import classes, mask_survey, masks, polygons
from deeplab_jax.data.io.class_formats import MAX_CLASSES, assign_names, to_rgb, two_readings
from deeplab_jax.data.io.classes import ClassTable, Meaning
from deeplab_jax.data.io.mask_survey import MaskSample, colors_in, describe, numbers_in
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.labels import IGNORE, LabelSet, is_background
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import expand_home

_NUM_SAMPLES = 8  # masks that are read to find out what they hold
_MAX_SAMPLES = 200  # masks that are read to propose classes


class UnknownClassesError(UserError):
    """Masks do not show what their classes are, but what a file of classes could say.

    Attributes:
      reason: the message without the proposal.
    """

    def __init__(self, reason: str, proposal: str) -> None:
        super().__init__(f"{reason}. {proposal}")
        self.reason = reason


def class_file(config: DataConfig) -> tuple[pathlib.Path | None, list[str]]:
    """Returns the file of classes that settings name or else the root has, and notes on it.

    Raises:
      UserError: folders of the root have different ones.
    """
    if config.folder.classes:
        return expand_home(config.folder.classes), []
    root = expand_home(config.root)
    if not config.root or not root.exists():
        return None, []
    usable, notes = [], []
    for path in classes.find(root if root.is_dir() else root.parent):
        try:
            if path.name != "classes.txt":  # an error in that one is told where it is read
                classes.read(path)
            usable.append(path)
        except UserError as error:
            if path != root:
                notes.append(f"{path} is not used as a file of classes: {error}")
    if not usable:
        return None, notes
    used, *others = usable
    same = [path for path in others if path.name.lower() == used.name.lower()]
    differ = next((path for path in same if path.read_bytes() != used.read_bytes()), None)
    if differ:
        raise UserError(f"{used} and {differ} differ: set config.data.folder.classes to one")
    unused = ", ".join(str(path) for path in others if path not in same)
    if unused:
        notes.append(f"{unused} is not used: config.data.folder.classes chooses")
    if unused or used.name != "classes.txt":
        notes.append(f"the classes are those of {used}")
    return used, notes


def read_mask_format(config: DataConfig, pairs: Sequence[Pair]) -> MaskFormat:
    """Returns how the masks encode the classes.

    If the ignore label is the last class in a file without values, it is not a class of the data
    set.

    Args:
      config: its `folder`, `ignore_label` and `root` are used.
      pairs: a few of their masks are read where settings leave the encoding open.

    Raises:
      UserError: the file of classes is missing or wrong, or contradicts settings or masks.
    """
    path, notes = class_file(config)
    if path and not path.is_file():
        raise UserError(f"{path}: there is no file of class names. See config.data.folder.classes")
    table = classes.read(path) if path else None
    if table and table.kind:
        notes.append(f"{table.path} is read as {table.kind}")
    if any(polygons.is_json(pair.mask) for pair in pairs):
        labels, found = polygon_folder.read_labels(config, [pair.mask for pair in pairs], table)
        return MaskFormat("ids", labels, config.ignore_label, notes=(*notes, *found))
    mask_format = _Decision(config, table, [pair.mask for pair in pairs]).decide()
    return dataclasses.replace(mask_format, notes=(*notes, *mask_format.notes))


def survey(paths: Sequence[pathlib.Path]) -> Iterator[MaskSample]:
    """Returns what masks hold, in a fixed random order; leaves out those that cannot be read."""
    order = np.random.default_rng(0).permutation(len(paths))
    samples = (mask_survey.try_to_sample(paths[index]) for index in order)
    return (sample for sample in samples if sample is not None)


@dataclasses.dataclass
class _Decision:
    """The way from settings, a file of classes and masks to a format."""

    config: DataConfig
    table: ClassTable | None
    paths: Sequence[pathlib.Path]

    def decide(self) -> MaskFormat:
        encoding, threshold = self.config.folder.masks_hold, self.config.folder.threshold
        if threshold is not None:
            return self._by_threshold(threshold)
        if encoding == "binary":
            return self._binary()
        if self.table is None:
            if encoding == "auto" and _are_binary(self._look(_have_two_values)):
                return self._found_binary(masks.BINARY)
            raise self._failure("there is no file of class names")
        if encoding == "ids":
            ids = self._ids(self.table)
            self._require_class(ids, self._look(_have_two_values))
            return ids
        return self._colors(self.table) if encoding == "colors" else self._auto(self.table)

    def _look(self, enough: Callable[[Sequence[MaskSample]], bool]) -> list[MaskSample]:
        """Samples at least eight masks, then those that hold something new, until enough."""
        samples: list[MaskSample] = []
        seen: set[frozenset[int]] = set()
        for number, sample in enumerate(survey(self.paths), start=1):
            held = frozenset(sample.numbers or sample.colors)
            if number <= _NUM_SAMPLES or held not in seen:
                samples.append(sample)
                seen.add(held)
            if number >= _NUM_SAMPLES and enough(samples):
                break
        return samples

    def _two_classes(self, setting: str) -> LabelSet:
        if self.table is None:
            return masks.BINARY
        if self.table.labels.num_classes != 2:
            raise UserError(
                f"{self.table.path}: names {self.table.labels.num_classes} classes, but {setting} "
                "has two: that of 0, then that of 255"
            )
        return self.table.labels

    def _binary(self) -> MaskFormat:
        labels = self._two_classes("config.data.folder.masks_hold=binary")
        self._require_zero()
        is_stated = self.table and self.table.states_values
        values = (self._ignored, *self.table.values) if self.table and is_stated else ()
        return MaskFormat("binary", labels, self.config.ignore_label, values)

    def _require_zero(self) -> None:
        if self.config.ignore_label == 0:
            raise UserError(
                "config.data.ignore_label is 0, but in masks of 0 and 255, 0 is the first class. "
                "Remove that setting, or write values into classes.txt, as in `crack 255`"
            )

    def _found_binary(self, labels: LabelSet) -> MaskFormat:
        self._require_zero()
        first, second = labels.names
        if is_background(second) and not is_background(first):
            raise UserError(
                f"{self.table and self.table.path}: masks hold 0 and 255, and 255 would be "
                f"{second}, the second class. Write `{first} 0` and `{second} 255`, or, if 255 is "
                f"{first}, {second} first"
            )
        note = f"masks hold 0 and 255: {first} and {second}"
        return MaskFormat("binary", labels, self.config.ignore_label, notes=(note,))

    def _by_threshold(self, threshold: int) -> MaskFormat:
        setting = f"config.data.folder.threshold={threshold}"
        labels = self._two_classes(setting)
        if self.table and self.table.states_values:
            raise UserError(f"{self.table.path}: states values, and so does {setting}. Remove one")
        samples = self._look(lambda samples: True)
        held = describe(samples)
        for sample in samples:
            kinds = {"palette": "indices of a palette", "colors": "colours"}
            kind = kinds.get(sample.kind, "ids" if _holds_ids(sample) else "")
            if kind:
                raise UserError(
                    f"{setting} divides grey values, but {sample.path} holds {kind} ({held}). "
                    f"Remove the threshold, and {self._advice()}"
                )
        largest = max((max(sample.greys, default=0) for sample in samples), default=0)
        if 0 < largest < threshold and not any(sample.is_lossy for sample in samples):
            raise UserError(f"{setting} is above all values of the masks ({held}). Lower it")
        ids = next((sample for sample in samples if sample.greys == {0, 1}), None)
        if ids and threshold > 1:
            raise UserError(
                f"{setting}: {ids.path} holds only 0 and 1, others more ({held}), so "
                "that all of it would be the first class. Save all masks in one encoding"
            )
        ignored = [self._ignored] * (self.config.ignore_label != IGNORE)
        values = ((0, threshold - 1, 0), (threshold, 65535, 1), *ignored)
        return MaskFormat("binary", labels, self.config.ignore_label, values)

    @property
    def _ignored(self) -> Meaning:
        return self.config.ignore_label, self.config.ignore_label, IGNORE

    def _ids(self, table: ClassTable) -> MaskFormat:
        ignore_label = self.config.ignore_label
        if not table.states_values and len(table.values) == table.labels.num_classes:
            return MaskFormat("ids", self._without_last(table.labels), ignore_label)
        claimed = any(low <= ignore_label <= high and i < IGNORE for low, high, i in table.values)
        if ignore_label != IGNORE and claimed:
            raise UserError(
                f"{table.path}: gives {ignore_label} to a class, but config.data.ignore_label "
                f"is {ignore_label}. Write `ignore {ignore_label}` instead"
            )
        return MaskFormat("ids", table.labels, ignore_label, (self._ignored, *table.values))

    def _without_last(self, labels: LabelSet) -> LabelSet:
        if self.config.ignore_label == labels.num_classes - 1 > 0:
            return LabelSet(labels.names[:-1], labels.colors[:-1])
        return labels

    def _colors(self, table: ClassTable) -> MaskFormat:
        ignore_label, names = self.config.ignore_label, table.labels.names
        default = MaskFormat("colors", table.labels, ignore_label)
        owners: dict[int, int] = {}
        notes = []
        for color, _, index in table.colors:
            owner = owners.setdefault(color, index)
            one, two = (names[i] if i < IGNORE else "ignore" for i in (owner, index))
            shared = f"{one} and {two} have one colour, {to_rgb(color)}"
            if owner != index and (max(owner, index) < IGNORE or not table.kind):
                raise UserError(f"{table.path}: {shared}")
            if owner != index:  # as pole and Cityscapes' polegroup, which does not count
                notes.append(f"{table.path.name}: {shared}: these pixels are {one}")
        border = [each for each in default.meanings if each[2] == IGNORE]
        # The last one counts. Ignored ones are the first, and so is the border.
        meanings = sorted(table.colors or default.meanings, key=lambda each: each[2] < IGNORE)
        values = tuple(
            (color, color, IGNORE if index == ignore_label else index)
            for color, _, index in [*border, *meanings]
        )
        labels = self._without_last(table.labels)
        return MaskFormat("colors", labels, ignore_label, values, notes=tuple(notes))

    def _auto(self, table: ClassTable) -> MaskFormat:
        samples = self._look(_have_two_values)
        ids = self._ids_or_training_ids(table, samples)
        has_colors = any(sample.kind == "colors" for sample in samples)
        distinct = len({color for color, _, _ in table.colors}) == len(table.colors)
        colors = self._colors(table) if table.colors and (distinct or has_colors) else None
        odd = [s for s in samples if not (colors and s.colors and _knows(colors, s.colors))]
        if colors and not odd and not all(_agree(ids, colors, sample) for sample in samples):
            note = f"masks hold the colours of the classes in {table.path.name}"
            return dataclasses.replace(colors, notes=(note, *colors.notes))
        if has_colors:
            if mixture := mask_survey.describe_mixture([*odd, *samples]):
                raise UserError(f"{table.path}: {mixture}")
            if colors and len(odd) < len(samples):  # mistakes, which are named when they are read
                return colors
            raise self._failure("its colours are not those of the masks")
        names = table.labels.names
        if len(names) == 2 and not table.states_values and _are_binary(samples):
            return self._found_binary(table.labels)
        known = [_knows(ids, sample.numbers) for sample in samples]
        if all(known):
            return self._checked_ids(ids, samples)
        values = set().union(*(sample.greys for sample in samples))
        fit_otherwise = not table.states_values and (
            two_readings(names, values) or assign_names(names, values)
        )
        if any(known) and not fit_otherwise and not any(sample.is_lossy for sample in samples):
            return ids  # with mistakes, which are named when they are read
        raise self._failure("its classes do not fit the masks")

    def _ids_or_training_ids(self, table: ClassTable, samples: Sequence[MaskSample]) -> MaskFormat:
        """Returns the format of ids; for Cityscapes' table, of ids or of training ids."""
        ids = self._ids(table)
        if not table.train_values:
            return ids
        training = dataclasses.replace(
            ids,
            values=(self._ignored, *table.train_values),
            notes=(f"masks hold training ids of {table.path.name}",),
        )
        ids = dataclasses.replace(ids, notes=(f"masks hold ids of {table.path.name}",))
        are_ids, are_training = (
            all(_knows(each, sample.numbers) for sample in samples) for each in (ids, training)
        )
        by_name = any("trainid" in str(path).lower() for path in self.paths[:1])
        return training if are_training and (by_name or not are_ids) else ids

    def _checked_ids(self, ids: MaskFormat, samples: Sequence[MaskSample]) -> MaskFormat:
        """Returns the format of ids unless 255, which it ignores, looks like a class."""
        is_stated = any(low <= 255 <= high for low, high, _ in ids.values[1:])
        samples = self._require_class(ids, samples)
        if ids.ignore_label != IGNORE or is_stated:
            return ids
        others = [sample for sample in samples if sample.numbers.keys() - {0, 255}]
        if any(255 in sample.numbers for sample in others):
            return ids
        doubtful = [sample for sample in samples if sample.numbers.keys() == {0, 255}]
        if doubtful and others:
            raise UserError(
                f"{doubtful[0].path}: {masks.UNSURE} {others[0].path} holds {describe(others[:1])}."
            )
        return dataclasses.replace(ids, is_unsure=True)

    def _require_class(
        self, ids: MaskFormat, samples: Sequence[MaskSample]
    ) -> Sequence[MaskSample]:
        """Returns samples with more than 0 and 255, or raises UserError if 255 is ignored."""

        def only_void(samples: Sequence[MaskSample]) -> bool:
            return numbers_in(samples) == {0, 255} and IGNORE in _to_ids(ids, [255])

        if only_void(samples):
            samples = self._look(lambda samples: not only_void(samples))
            if only_void(samples):
                raise self._failure("the masks hold only 0 and 255, and 255 is ignored")
        return samples

    def _advice(self) -> str:
        root = shlex.quote(self.config.root)
        return f"run\n  deeplab-jax data check {root} --write-classes"

    def _failure(self, reason: str) -> UserError:
        """Returns an error that says what masks hold, and how to name it."""
        table, ignore_label = self.table, self.config.ignore_label
        path = table.path if table else classes_path(self.config)
        samples = list(itertools.islice(survey(self.paths), _MAX_SAMPLES))
        if not samples:
            try:
                mask_survey.sample_mask(self.paths[0])
            except (UserError, IndexError) as error:
                reason += f"; and {error}" if isinstance(error, UserError) else ""
            return UserError(f"{path}: {reason}")
        held = f"{path}: {reason}. The masks hold {describe(samples)}"
        try:
            text = mask_survey.propose_classes(samples, table, ignore_label)
        except UserError as error:
            return UserError(f"{held}; {error}")
        if table and table.states_values and path == classes_path(self.config):
            stated = masks.spell_values(table.names_of(table.values))
            return UserError(
                f"{held}, but its values are {stated}. Write the right ones there; if a number is "
                "a part of a name, write values after `=`, as in `class 7 = 7`"
            )
        known = {*table.names_of(table.values), IGNORE} if table else {IGNORE}
        values = numbers_in(samples)
        void = values - known
        if any(sample.is_lossy for sample in samples):
            held += ". For two classes, config.data.folder.threshold=128 is an alternative"
        elif len(void) == 1 and {0} < values & known:
            held += f". If {max(void)} does not count, set config.data.ignore_label={max(void)}"
        return UnknownClassesError(
            held,
            f"To write\n{text}into classes.txt, {self._advice()}\nand edit names and order as you "
            "like",
        )


def classes_path(config: DataConfig) -> pathlib.Path:
    """Returns where a file of classes is written: with the capitals of one that is there."""
    if config.folder.classes:
        return expand_home(config.folder.classes)
    root = expand_home(config.root)
    folder = root if root.is_dir() else root.parent
    named = [path for path in folder.glob("*") if path.name.lower() == "classes.txt"]
    return min(named, default=folder / "classes.txt")


def _to_ids(mask_format: MaskFormat, values: Iterable[int]) -> list[int]:
    return mask_format.to_ids(np.array([[*values]], np.int64))[0].tolist()


def _knows(mask_format: MaskFormat, values: Iterable[int]) -> bool:
    return masks.UNKNOWN not in _to_ids(mask_format, values)


def _are_binary(samples: Sequence[MaskSample]) -> bool:
    """Whether masks hold 0 and 255, but not as indices of a palette, where 255 is often void."""
    are_grey = all(sample.kind in ("grey", "rgb", "1 bit") for sample in samples)
    return are_grey and set().union(*(sample.greys for sample in samples)) == {0, 255}


def _have_two_values(samples: Sequence[MaskSample]) -> bool:
    return max(len(numbers_in(samples)), len(colors_in(samples))) > 1


def _holds_ids(sample: MaskSample) -> bool:
    """Whether a mask holds several small numbers, or 1 and void, and 255 in few pixels."""
    objects = sample.numbers.keys() - {0, 255}
    void, others = sample.numbers.get(255, 0), sum(sample.numbers[value] for value in objects)
    are_ids = len(objects) > 1 or (objects == {1} and void > 0)
    return not sample.is_lossy and are_ids and max(objects) < MAX_CLASSES and void < others


def _agree(ids: MaskFormat, colors: MaskFormat, sample: MaskSample) -> bool:
    """Whether a palette or grey mask has the same classes, read as ids and as colours."""
    by_id, by_color = _to_ids(ids, sample.shown), _to_ids(colors, sample.shown.values())
    return sample.kind != "colors" and by_id == by_color
