"""Progress bars on stderr, and loops over many items in threads."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

from deeplab_jax.utils.errors import UserError, raise_problems

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def track(items: Iterable[_Item], title: str, total: int) -> Iterable[_Item]:
    """Yields the items and shows a progress bar on stderr."""
    return rich.progress.track(items, title, total, console=Console(stderr=True))


def parallel_map(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    title: str,
    *,
    num_threads: int = 0,
    quiet: bool = False,
) -> Iterator[_Result]:
    """Yields `function(item)` for each item in order, and shows a progress bar on stderr.

    Args:
      function: called in threads.
      items: the arguments of `function`.
      title: the title of the progress bar.
      num_threads: the number of threads; 0: one per CPU.
      quiet: whether to hide the progress bar.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        results = pool.map(function, items)
        yield from results if quiet else track(results, title, len(items))


def check_all(
    check: Callable[[_Item], _Result], items: Sequence[_Item], title: str
) -> list[_Result]:
    """Returns `check(item)` for each item in order, computed by `parallel_map`.

    Args:
      check: raises UserError for an item with a problem. Called in threads.
      items: the arguments of `check`.
      title: the title of the progress bar, and the first line of the error.

    Raises:
      UserError: items have problems, which the message lists.
    """

    def attempt(item: _Item) -> tuple[_Result | None, str]:
        try:
            return check(item), ""
        except UserError as error:
            return None, str(error)

    outcomes = list(parallel_map(attempt, items, title))
    raise_problems(title, [problem for _, problem in outcomes if problem])
    return [result for result, _ in outcomes]  # type: ignore[misc]  # no problem: no None
