"""Finds patterns that pair images with masks, from the names of files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence, Set

from deeplab_jax.data.datasets.pairing import (
    MASK_SUFFIXES,
    PLACEHOLDER,
    SPELLED,
    File,
    Files,
    Key,
    Pairing,
    Pattern,
)
from deeplab_jax.data.io.images import SUFFIXES

# A split as a part of a folder's name, as in `train_masks` and `trainannot`, but not `train_val`.
_SPLIT = re.compile(
    rf"(?<![^\W\d_])(?<!train[\W_])(?!train[\W_]val)(?:{SPELLED})"
    r"(?=[\W\d_]|$|annot|mask|label|image|img|gt|crop|data|set)",
    re.IGNORECASE,
)

# Parts of the names of files and folders, lower case. Long ones count within other words too.
_MASK_WORDS = (
    *("mask", "label", "annot", "truth", "segm", "manual", "semantic", "trimap", "target"),
    *("polygon", "gt", "seg", "ann", "anno", "lbl", "msk", "ho", "matte"),
)
_IMAGE_WORDS = ("image", "photo", "picture", "original", "img", "im", "rgb", "sat", "raw", "input")
# Of masks that hold no classes, or the colours of classes beside the same masks with ids.
_OTHER_WORDS = ("instance", "object", "color", "colour", "rgb", "polygon")
# Of pictures that are made from images or masks.
_DERIVED_WORDS = (
    *("visual", "overlay", "preview", "thumb", "superpixel", "boundar", "depth"),
    *("viz", "vis", "edge"),
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[^\W\d_A-Z]+|[A-Z]+")
_TOKEN = re.compile(r"[^\W\d_]+|\d+")
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")

_MAX_TOKENS = 16  # of a name
_MAX_KINDS = 8  # kinds of files of which samples are taken
_MAX_OTHERS = 300  # files with a name like a sample's that are compared with it
_MAX_DERIVED = 200  # pairs of patterns that are tried on some files
_MAX_CANDIDATES = 40  # pairs of patterns that are tried on all files


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Two patterns that fit files.

    Attributes:
      pairing: what they match.
      pairs: the paths of each image with exactly one mask, and of the mask.
      images: the paired images, without those of test if there are others: their masks may be kept
        by who published the set.
      num_images: number of images that need a mask.
      is_complete: whether each image has exactly one mask, and each mask an image.
      doubts: what the names do not say; the fewer, the more certain are the patterns.
    """

    pairing: Pairing
    pairs: frozenset[tuple[str, str]]
    images: frozenset[str]
    num_images: int
    is_complete: bool
    doubts: tuple[bool, ...]

    @property
    def is_of_masks(self) -> bool:
        """Whether the names of masks say what they are, or are LabelMe's."""
        text = self.pairing.mask_pattern.text
        return looks_like_mask(text) or text.endswith(".json")

    def is_part_of(self, other: Proposal) -> bool:
        """Whether another proposal pairs the same images or files, and more."""
        files, others = (frozenset(itertools.chain(*one.pairs)) for one in (self, other))
        return self.images < other.images or files < others


def propose(files: Files, listed: Set[str] | None = None) -> list[Proposal]:
    """Finds the patterns that fit the files below a root.

    Those with which each image has exactly one mask; if there are none, the one with which most
    images have one, if these are at least half of all. If the last components of names in lists of
    splits are given, only these images need a mask. Of patterns with the same pairs one is in the
    result, and none if another one pairs the same images and more.
    """
    found: dict[frozenset[tuple[str, str]], Proposal] = {}
    for image_text, mask_text in _candidates(files):
        proposal = _fit(files.pair(image_text, mask_text), listed)
        # Any two files in several folders look like a folder for each image.
        is_chance = "{name}/" in image_text and (
            len(proposal.pairs) < 2 or not looks_like_mask(mask_text)
        )
        if 2 * len(proposal.pairs) >= max(proposal.num_images, 1) and not is_chance:
            found.setdefault(proposal.pairs, proposal)
    certain = min((proposal.doubts for proposal in found.values()), default=())
    # By the number of pairs, because a single name can mean anything in a large set.
    proposals = sorted(
        (proposal for proposal in found.values() if proposal.doubts == certain),
        key=lambda proposal: -len(proposal.pairs),
    )
    chosen: list[Proposal] = []
    for proposal in [one for one in proposals if one.is_complete] or proposals[:1]:
        if not any(map(proposal.is_part_of, chosen)):
            chosen.append(proposal)
    return sorted(chosen, key=lambda proposal: proposal.pairing.settings)


def _fit(pairing: Pairing, listed: Set[str] | None) -> Proposal:
    images, masks = pairing.images, pairing.masks
    image_text, mask_text = pairing.image_pattern.text, pairing.mask_pattern.text
    labelled = {images[key][0].split for key in images.keys() & masks.keys()}
    # labelme writes no file for an image without shapes.
    names = [pathlib.PurePosixPath(text) for text in (image_text, mask_text)]
    is_labelme = names[0].stem == names[1].stem and names[1].suffix == ".json"

    def needs_mask(key: Key, file: File) -> bool:
        last_parts = {key[1].rpartition("/")[2], pathlib.PurePosixPath(file.path).stem}
        if listed is not None and not last_parts & listed:
            return False
        # Masks of test may be kept by who published the set.
        return (file.split != "test" or "test" in labelled) and (key in masks or not is_labelme)

    images = {key: found for key, found in images.items() if needs_mask(key, found[0])}
    paired = [
        (found[0], masks[key][0])
        for key, found in images.items()
        if len(found) == len(masks.get(key, ())) == 1
    ]
    num_masks = len(paired) if listed is not None else len(masks)
    doubts = (
        has_word(mask_text, _OTHER_WORDS + _DERIVED_WORDS) or has_word(image_text, _DERIVED_WORDS),
        not (looks_like_mask(mask_text) or _maskness(mask_text) >= 4),
        looks_like_mask(image_text),
        not has_word(image_text, _IMAGE_WORDS),
    )
    return Proposal(
        pairing,
        pairs=frozenset((image.path, mask.path) for image, mask in paired),
        images=frozenset(
            image.path for image, _ in paired if image.split != "test" or labelled == {"test"}
        ),
        num_images=len(images),
        is_complete=len(paired) == len(images) == num_masks > 0,
        doubts=doubts,
    )


@dataclasses.dataclass(frozen=True)
class _Path:
    folders: tuple[str, ...]  # with {split}
    spelling: str
    stem: str
    suffix: str
    suffixes: tuple[str, ...]  # to write in patterns: with .* if those of the folder's images vary

    @functools.cached_property
    def tokens(self) -> list[re.Match[str]]:
        return list(_TOKEN.finditer(self.stem))[:_MAX_TOKENS]


def _candidates(files: Files) -> list[tuple[str, str]]:
    """Returns patterns that may pair the files, from samples of them; those with .* are the last.

    Of the patterns that are derived, those that match few of the files are dropped.
    """
    split_paths = [
        path for path in map(_split_path, files.paths) if path[2].lower() in MASK_SUFFIXES
    ]
    suffixes: dict[str, set[str]] = collections.defaultdict(set)
    for folder, _, suffix in split_paths:
        suffixes[folder] |= {suffix.lower()} & SUFFIXES
    by_folder: dict[tuple[str, ...], list[_Path]] = collections.defaultdict(list)
    kinds: dict[tuple[str, ...], list[_Path]] = collections.defaultdict(list)
    by_token: dict[str, list[_Path]] = collections.defaultdict(list)
    for folder, stem, suffix in split_paths:
        written = (suffix, ".*") if len(suffixes[folder]) > 1 else (suffix,)
        path = _Path(*_template(folder), stem, suffix, written)
        by_folder[path.folders].append(path)
        kinds[*_kind(folder), suffix.lower()].append(path)
        for token in {_normal(token[0]) for token in path.tokens}:
            by_token[token].append(path)
    texts: collections.Counter[tuple[str, str]] = collections.Counter()
    for group in sorted(kinds.values(), key=len, reverse=True)[:_MAX_KINDS]:
        for path in dict.fromkeys((group[0], group[len(group) // 2], group[-1])):
            # The files that share its rarest word or number, and others if they are few.
            alike = sorted((by_token[_normal(token[0])] for token in path.tokens), key=len)
            few = [each for each in (*alike[1:], by_folder[path.folders]) if len(each) <= 64]
            others = dict.fromkeys(itertools.chain(*alike[:1], *few))
            nearest = sorted(others, key=lambda other: -len({*path.folders} & {*other.folders}))
            derived = _derive_all(path, nearest[:_MAX_OTHERS])
            texts.update(dict.fromkeys(text for two in derived for text in _orient(*two)).keys())
    # Those of all images are found from most samples.
    found = [text for text, _ in texts.most_common(_MAX_DERIVED)]
    sample = files.paths[:: max(len(files.paths) // 200, 1)]
    patterns = {text: Pattern(text, MASK_SUFFIXES) for text in itertools.chain(*found)}
    counts = {
        text: sum(bool(pattern.match(path)) for path in sample)
        for text, pattern in patterns.items()
    }
    total = {(image, mask): counts[image] + counts[mask] for image, mask in found}
    kept = [pair for pair in found if 3 * total[pair] >= max(total.values())]
    kept = sorted(kept, key=lambda pair: -total[pair])[:_MAX_CANDIDATES]
    return sorted(kept, key=lambda pair: "".join(pair).count(".*"))


def _derive_all(path: _Path, others: Sequence[_Path]) -> Iterator[tuple[str, str]]:
    """Yields patterns for a file and each of its candidates for a counterpart."""
    found: dict[tuple[str, str], list[tuple[int, list[tuple[str, str]]]]] = {}
    for other in others:
        if (other.folders, other.stem, other.suffix) == (path.folders, path.stem, path.suffix):
            continue  # the file itself, or one of another split
        last = _common_start(path.folders[::-1], other.folders[::-1])
        num_equal = len(_common_start(path.folders, other.folders)) + len(last)
        num_last = len(list(itertools.takewhile(lambda each: not _is_of_split(each), last)))
        heads = list(_derive_folders(path.folders, other.folders, num_last))
        for names in _derive_names(path, other):
            texts = [
                ("/".join((*head, names[0])), "/".join((*other_head, names[1])))
                for head, other_head in heads
            ]
            found.setdefault(names, []).append((num_equal, texts))
        if path.folders == other.folders and num_last:  # a folder for each image
            head = "/".join((*path.folders[:-num_last], "{name}/"))
            yield head + path.stem + path.suffix, head + other.stem + other.suffix
    for candidates in found.values():  # 1.png and gt/a/1.png, not gt/b/1.png, belong to img/a/1.png
        most, _ = max(candidates)
        yield from itertools.chain(*(pairs for number, pairs in candidates if number == most))


def _common_start(one: Sequence[str], two: Sequence[str]) -> list[str]:
    pairs = zip(one, two, strict=False)
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _derive_folders(
    one: tuple[str, ...], two: tuple[str, ...], num_common: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yields the folders before the names: all, without the common last ones, with {folder}."""
    yield one, two
    if num_common:
        yield one[:-num_common], two[:-num_common]
    one, two = one[: len(one) - num_common], two[: len(two) - num_common]
    start = end = len(_common_start(one, two))
    while start and not _is_of_split(one[start - 1]):
        start -= 1
    if start < end:
        yield (*one[:start], "{folder}", *one[end:]), (*two[:start], "{folder}", *two[end:])


def _derive_names(one: _Path, two: _Path) -> Iterator[tuple[str, str]]:
    """Yields the names of two files with {name} for what they have in common, longest first."""
    combinations = itertools.combinations_with_replacement(one.tokens, 2)
    spans = [(first.start(), last.end()) for first, last in combinations]
    names: dict[tuple[str, str], None] = {}
    for start, end in sorted([(0, len(one.stem)), *spans], key=lambda span: span[0] - span[1]):
        found = _find_whole(one.stem[start:end], two.stem)
        if found >= 0:
            first = f"{one.stem[:start]}{{name}}{one.stem[end:]}"
            second = f"{two.stem[:found]}{{name}}{two.stem[found + end - start :]}"
            names[first, second] = None
    for a, b in itertools.product(one.tokens, two.tokens):
        if a[0].isdecimal() and a[0] != b[0] and _normal(a[0]) == _normal(b[0]):
            first, second = (
                token.string[: token.start()] + "{number}" + token.string[token.end() :]
                for token in (a, b)
            )
            names[first, second] = None
    for literal in list(names):
        names[_mark_split(literal[0], one.spelling), _mark_split(literal[1], two.spelling)] = None
    for first, second in names:
        if one.folders == two.folders and first == second:  # only the suffixes differ
            yield first + one.suffix, second + two.suffix
            continue
        for suffix, other in itertools.product(one.suffixes, two.suffixes):
            yield first + suffix, second + other


def _mark_split(text: str, spelling: str) -> str:
    """Replaces a spelling of a split in the name of a file or folder by {split}."""
    return _SPLIT.sub(
        lambda found: "{split}" if found[0].lower() == spelling.lower() else found[0], text
    )


def _find_whole(text: str, stem: str) -> int:
    """Finds a text where no word or number goes on before or after it; -1: nowhere."""
    for found in re.finditer(re.escape(text), stem):
        start, end = found.span()
        joints = stem[max(start - 1, 0) : start] + text[0], text[-1] + stem[end : end + 1]
        if not any(len(two) > 1 and (two.isalpha() or two.isdecimal()) for two in joints):
            return start
    return -1


def _orient(one: str, two: str) -> Iterator[tuple[str, str]]:
    """Yields two patterns as those of images and masks; in both orders if neither is certain."""
    if one.lower() == two.lower():
        return
    first, second = _maskness(one), _maskness(two)
    for image, mask in ((one, two),) * (first <= second) + ((two, one),) * (second <= first):
        # An image beside a JPEG that is not called a mask is no mask either.
        if _maskness(image) < 4 and (looks_like_mask(mask) or not mask.lower().endswith(_LOSSY)):
            yield image, mask


def _maskness(text: str) -> int:
    """Scores by its words and suffix whether a pattern is that of masks; 4 and more: no image."""
    suffix = text[text.rfind(".") :].lower()
    score = 2 * looks_like_mask(text) - has_word(text, _IMAGE_WORDS) - (suffix in _LOSSY)
    return score + 8 * (suffix in MASK_SUFFIXES - SUFFIXES)


def _is_of_split(folder: str) -> bool:
    """Whether a folder may be that of a split, also of several, as `trainval` is."""
    return "{split}" in folder or re.search("train|val|test", folder.lower()) is not None


def has_split(folder: str) -> bool:
    """Whether the name of a folder has a split as a part."""
    return _SPLIT.search(folder) is not None


def looks_like_mask(path: str) -> bool:
    """Whether a path has a word as masks have it in their names."""
    return has_word(path, _MASK_WORDS)


def has_word(path: str, words: tuple[str, ...]) -> bool:
    """Whether a path has one of `words`; those of four letters and more count within others too."""
    stem = PLACEHOLDER.sub(" ", path[: path.rfind(".")] if "." in path else path)
    found = [word.lower() for word in _WORD.findall(stem)]
    return any(
        word in (each, each.removesuffix("s")) or (len(word) > 3 and word in each)
        for word in words
        for each in found
    )


def _normal(token: str) -> str:
    return (token.lstrip("0") or "0") if token.isdecimal() else token.lower()


def _split_path(path: str) -> tuple[str, str, str]:
    """Splits a path into its folder, its name without the suffix, and the suffix with its dot."""
    folder, _, name = path.rpartition("/")
    stem, suffix = os.path.splitext(name)
    return folder, stem, suffix


@functools.lru_cache(maxsize=4096)
def _kind(folder: str) -> tuple[str, ...]:
    """Returns the components of a folder, with * for those that may be names, as of cities."""
    words = _MASK_WORDS + _IMAGE_WORDS
    return tuple(
        each if "{split}" in each or has_word(each, words) else "*" for each in _template(folder)[0]
    )


@functools.lru_cache(maxsize=4096)
def _template(folder: str) -> tuple[tuple[str, ...], str]:
    """Returns the components of a folder with {split} for the first split, and its spelling."""
    folders = folder.split("/") if folder else []
    first = next((_SPLIT.search(each) for each in folders if has_split(each)), None)
    spelling = first[0] if first else ""
    return tuple(_mark_split(each, spelling) for each in folders), spelling
