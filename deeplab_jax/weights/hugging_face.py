"""Models on Hugging Face's hub: `hf://org/name`, downloaded and published by `huggingface_hub`."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import pathlib
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from deeplab_jax.utils.errors import UserError, first_line, listed
from deeplab_jax.utils.paths import CALIBRATION
from deeplab_jax.weights import hub_folder, model_card
from deeplab_jax.weights.saved_model import SavedModel
from deeplab_jax.weights.torch_file import SUFFIXES

_OFFLINE = (
    "no connection to the hub, or it broke off. Run the command again; or download config.json and "
    f"the weights ({hub_folder.EXPECTED}) from {{page}} by other means into one folder, and give "
    "that folder instead"
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_REFUSED = f"the token is missing, expired, or does not permit this: {_LOG_IN}"
# What exceptions of huggingface_hub and of its HTTP clients mean, by the names of their classes,
# HTTP's status or the system's error number.
_REASONS: dict[str | int | None, str] = {
    "GatedRepoError": f"its owner grants access by request: ask at {{page}}, then {_LOG_IN}",
    "RepositoryNotFoundError": "there is no such repository, or it is private. Compare the name "
    f"with {{page}}; for a private one, {_LOG_IN}",
    "RevisionNotFoundError": "the repository has no revision {revision!r}; after the @ stands a "
    "branch, a tag or a commit",
    "HFValidationError": "this is no name of a repository",
    **dict.fromkeys(("LocalEntryNotFoundError", "TransportError"), _OFFLINE),
    **dict.fromkeys(("ConnectionError", "Timeout"), _OFFLINE),
    401: _REFUSED,
    403: _REFUSED,
    errno.ENOSPC: "the disk is full. Free some space, or set HF_HOME to a folder on another disk",
}


_BESIDE = (hub_folder.CONFIG, hub_folder.PREPROCESSOR, CALIBRATION)  # files read with weights


class _Repository(NamedTuple):
    """What a source names; `path` is a file or a folder in the repository."""

    name: str
    revision: str | None = None
    path: str = ""

    @property
    def page(self) -> str:
        revision = urllib.parse.quote(self.revision or "main", safe="")
        return f"https://huggingface.co/{self.name}/tree/{revision}"


def is_remote(text: str) -> bool:
    """Whether a text names something on Hugging Face's hub."""
    return text.startswith("hf:/")  # a `pathlib.Path` keeps one slash of two


def download(source: str) -> pathlib.Path:
    """Returns the folder or file that `org/name`, or `hf://org/name@v1.0/folder`, stands for.

    Only the weights and what is read with them are downloaded. `huggingface_hub` caches files and
    verifies their sizes; without network, what an earlier call downloaded is used.

    Raises:
      UserError: The extra `hub` is not installed, or there is no such model, or no access to it.
    """
    where = _parse(source)
    with _hub(source, where) as hub:
        get = functools.partial(hub.snapshot_download, where.name, revision=where.revision)
        try:
            # Not `list_repo_files`, which tries for 23 s when there is no connection.
            names = _files(hub.HfApi().model_info(where.name, revision=where.revision))
        except Exception as error:
            if _reason(error) == _OFFLINE:
                # Without patterns, it refuses a folder if only some of its files are cached.
                cached = pathlib.Path(get(local_files_only=True, allow_patterns=[]), where.path)
                if cached.exists():
                    return cached
            raise

        def fetch(*wanted: str) -> pathlib.Path:
            return pathlib.Path(get(allow_patterns=[glob.escape(each) for each in wanted]))

        if where.path in names:
            file = pathlib.PurePosixPath(where.path)
            # Weights under one of the hub's names are read with what is beside them.
            has_config = hub_folder.weights_name([file.name]) is not None
            beside = [str(file.with_name(name)) for name in _BESIDE if has_config]
            return fetch(where.path, *beside) / where.path
        prefix = f"{where.path}/" if where.path else ""
        weights = hub_folder.weights_name(
            each.removeprefix(prefix) for each in names if each.startswith(prefix)
        )
        if weights is None:
            files = [each for each in names if each.endswith(SUFFIXES)]
            hint = f"; it has {listed(files)}: give one after the name" if files else ""
            raise UserError(f"{source}: no {hub_folder.EXPECTED} there{hint}")
        root = fetch(*(prefix + name for name in (weights, *_BESIDE)))
        if weights.endswith(".json"):
            fetch(*(prefix + name for name in hub_folder.shards(root / prefix / weights)))
        return root / where.path


def push(saved: SavedModel, destination: str, *, private: bool = False, license: str = "") -> str:
    """Uploads a model and its card to Hugging Face's hub in one commit, and returns the page's URL.

    Args:
      saved: The model.
      destination: `org/name` or `hf://org/name`. The repository is created if it does not exist.
      private: Whether to create the repository as a private one.
      license: For the card, see `model_card.write`.

    Raises:
      UserError: The repository has other files than this function's; it is public and must be
        private; or as `download` and `model_card.write`.
    """
    where = _parse(destination)
    if where.revision or where.path:
        raise UserError(f"{destination}: a model is pushed to hf://org/name, without more")
    with tempfile.TemporaryDirectory() as scratch, _hub(destination, where) as hub:
        folder = pathlib.Path(scratch) / "model"
        hub_folder.write(saved, folder)
        model_card.write(saved, folder, name=where.name, license=license)
        api = hub.HfApi()
        api.create_repo(where.name, private=private or None, exist_ok=True)
        there = api.model_info(where.name)
        present = {*_files(there)} - {".gitattributes"}
        ours = hub_folder.CONFIG in present and hub_folder.is_ours(
            hub_folder.read_json(pathlib.Path(hub.hf_hub_download(where.name, hub_folder.CONFIG)))
        )
        if present and not ours:
            raise UserError(
                f"{destination} has files that this command did not write: "
                f"{listed(sorted(present))}. Choose another name, or remove them there"
            )
        if private and not there.private:
            raise UserError(
                f"{destination} is public; change that in its settings, or choose another"
            )
        api.upload_folder(
            repo_id=where.name,
            folder_path=folder,
            commit_message="Upload a model of deeplab_jax",
            delete_patterns=[model_card.PICTURE, CALIBRATION],  # of an older model
        )
        return f"{api.endpoint}/{where.name}"


def _files(info: Any) -> list[str]:
    return [each.rfilename for each in info.siblings or ()]


def _parse(source: str) -> _Repository:
    """Returns the parts of `[hf://]org/name[@revision][/path]`."""
    parts = r"(?:hf:/+)?([^/@:]+/[^/@]+)(?:@(refs/pr/\d+|[^/]+))?(?:/(.*?))?/*"
    match = re.fullmatch(parts, source.strip())
    if match is None:
        raise UserError(f"{source} must be hf://org/name[@revision][/path]")
    name, revision, path = match.groups()
    return _Repository(name, urllib.parse.unquote(revision) if revision else None, path or "")


@contextlib.contextmanager
def _hub(source: str, where: _Repository) -> Iterator[Any]:
    """Yields the module `huggingface_hub`, and explains the exceptions of its functions."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} needs huggingface_hub, which is not installed: pip install "
            f"'deeplab-jax[hub]'. Or download {where.page} into a folder, and give that"
        ) from error
    try:
        yield huggingface_hub
    except UserError:
        raise
    except Exception as error:  # of two HTTP clients, as the version has it
        reason = _reason(error).format(page=where.page, revision=where.revision)
        raise UserError(f"{source}: {reason or first_line(error)}") from error


def _reason(error: Exception) -> str:
    """Returns what an exception means for the user, or an empty string."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    names = [kind.__name__ for kind in type(error).__mro__]
    keys = (*names, status, getattr(error, "errno", None))
    return next((_REASONS[key] for key in keys if key in _REASONS), "")
