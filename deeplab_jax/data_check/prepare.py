"""`deeplab-jax data prepare`: writes a checked data set in the plainest layout and encoding."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence

from deeplab_jax.data.io import classes
from deeplab_jax.data.io.class_formats import from_rgb, spell_class
from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.data.io.masks import MaskFormat, write_ids
from deeplab_jax.data.labels import IGNORE, LabelSet
from deeplab_jax.data_check.scan import Scan
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import atomic_folder, is_hidden, require_writable
from deeplab_jax.utils.paths import expand_home, is_bucket
from deeplab_jax.utils.progress import parallel_map


def require_new_folder(out: str, root: str) -> None:
    """Raises UserError unless `out` is writable, new or empty, and not in the data set's root."""
    if is_bucket(out):
        is_inside = f"{out}/".startswith(f"{root.rstrip('/')}/")
    else:
        path = expand_home(out)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{out}: exists already. Name a new folder, or delete this one")
        real, source = (os.path.realpath(each) for each in (path, expand_home(root)))
        is_inside = pathlib.Path(real).is_relative_to(source)
    if is_inside:
        raise UserError(f"{out}: is in {root}, which would then hold two data sets. Name another")
    if is_bucket(out):
        from deeplab_jax.buckets import outputs

        outputs.check(out, out, kind="new")
    else:
        existing = next(folder for folder in path.absolute().parents if folder.exists())
        require_writable(existing, f"{out}:")


def write(
    out: pathlib.Path,
    scans: Sequence[Scan],
    mask_format: MaskFormat,
    *,
    copy: bool = False,
    num_threads: int = 0,
) -> Counter[str]:
    """Writes images/{split}, masks/{split} with ids and `labels.IGNORE`, and classes.txt.

    Shows a progress bar on stderr. If it raises, it leaves nothing behind.

    Without `copy`, images become hard links, or symbolic links where the file system or the owner
    of the images allows no hard links. The scans are of all pairs, without errors.

    Returns:
      How many images became a "hard link", a "symbolic link", or a "copy".

    Raises:
      UserError: two pairs get one name, or a file cannot be read.
    """
    names: dict[tuple[str, str], Scan] = {}
    for scan in scans:
        if names.setdefault((scan.split, _file_name(scan.pair.name)), scan) is not scan:
            image = scan.pair.image
            raise UserError(f"{image}: another image gets the same name in the new set. Rename it")

    def write_pair(key: tuple[str, str]) -> str:
        (split, name), pair = key, names[key].pair
        suffix = pair.image.suffix if pair.image.suffix.lower() in SUFFIXES else ".png"
        image = partial / f"images/{split}/{name}{suffix}"
        mask = partial / f"masks/{split}/{name}.png"
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_ids(mask, mask_format.read_label(pair.mask), mask_format.labels)
        return _place(pair.image, image, copy)

    with atomic_folder(out) as partial:
        tasks = list(names)
        ways = Counter(parallel_map(write_pair, tasks, "Writing", num_threads=num_threads))
        _write_classes(partial, mask_format.labels)
    return ways


def _write_classes(folder: pathlib.Path, labels: LabelSet) -> None:
    """Writes classes.txt, or classes.json if a name cannot be written there."""
    rows = list(enumerate(zip(labels.names, labels.colors, strict=True)))
    lines = [spell_class(name, [f"{i}", f"#{from_rgb(c):06x}"]) for i, (name, c) in rows]
    path = folder / "classes.txt"
    path.write_text("\n".join([*lines, f"ignore {IGNORE}", ""]), encoding="utf-8")
    try:
        if classes.read(path).labels == labels:
            return
    except UserError:
        pass
    path.unlink()
    table = [{"id": i, "name": name, "color": color} for i, (name, color) in rows]
    table.append({"id": IGNORE, "name": "ignore", "color": (255, 255, 255)})
    (folder / "classes.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


def _file_name(name: str) -> str:
    """Returns a name as a path below a folder, without parts that readers of folders skip."""
    parts = pathlib.PurePosixPath(name).parts
    return "/".join(f"_{part}" if is_hidden(part) else part for part in parts if part != "/")


def _place(source: pathlib.Path, target: pathlib.Path, copy: bool) -> str:
    """Copies or links a file, and returns how."""
    source = pathlib.Path(os.path.realpath(source))
    if copy:
        shutil.copyfile(source, target)
        return "copy"
    try:
        os.link(source, target)
        return "hard link"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS):
            raise
        os.symlink(source, target)
        return "symbolic link"
