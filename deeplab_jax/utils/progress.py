"""Progress bars on stderr, and loops over many items in threads."""

from __future__ import annotations

import collections
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
    """Yields `function(item)` for each item in order, computed in threads (0: one per CPU).

    Shows a progress bar with the title on stderr, unless `quiet`.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        results = pool.map(function, items)
        yield from results if quiet else track(results, title, len(items))


def in_thread(
    function: Callable[..., _Result], *arguments: object, name: str
) -> concurrent.futures.Future[_Result]:
    """Calls a function in a new thread, whose name begins with `name`."""
    pool = concurrent.futures.ThreadPoolExecutor(1, name)
    result = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return result


def bounded_map(
    pool: concurrent.futures.Executor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    max_items: int,
    max_weight: float,
    weight: Callable[[_Item], float],
) -> Iterator[_Result]:
    """Yields `function(item)` for each item in order, computed in a pool a few items ahead.

    Args:
      pool: of threads.
      function: called in the pool.
      items: the next one is taken when there is room for it.
      max_items: how many results may be computed, or wait to be yielded, at the same time.
      max_weight: of these items together; an item that is heavier is computed by itself.
      weight: of an item.
    """
    pending = collections.deque[tuple[concurrent.futures.Future[_Result], float]]()
    total = 0.0
    for item in items:
        own = weight(item)
        while pending and (
            len(pending) >= max_items or total + own > max_weight or pending[0][0].done()
        ):
            future, done = pending.popleft()
            total -= done
            yield future.result()
        pending.append((pool.submit(function, item), own))
        total += own
        del item  # which only the pool needs
    while pending:
        yield pending.popleft()[0].result()


def check_all(
    check: Callable[[_Item], _Result], items: Sequence[_Item], title: str
) -> list[_Result]:
    """Returns `check(item)` for each item in order, computed by `parallel_map`.

    Raises:
      UserError: raised by `check` for some items. The message begins with the title and lists them.
    """

    def attempt(item: _Item) -> tuple[_Result | None, str]:
        try:
            return check(item), ""
        except UserError as error:
            return None, str(error)

    outcomes = list(parallel_map(attempt, items, title))
    raise_problems(title, [problem for _, problem in outcomes if problem])
    return [result for result, _ in outcomes]  # type: ignore[misc]  # no problem: no None
