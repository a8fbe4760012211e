"""A search that evaluates an expensive predicate as few times as possible."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """Returns the largest number from 1 to `limit` that fits, or 0 if none does.

    Each call of `fits` compiles for minutes. So the search starts at a guess, doubles its stride
    until the answer changes, and then bisects.

    Args:
      fits: predicate that is true up to some number and false beyond it; called at most once per
        number.
      guess: number to start at; clipped to 1..limit.
      limit: largest number to try.
    """
    low, high = 0, limit + 1  # `low` fits and `high` does not; both are never tried
    number, stride, first = min(max(guess, 1), limit), 1, None
    while high - low > 1:
        answer = fits(number)
        low, high = (number, high) if answer else (low, number)
        first = answer if first is None else first
        galloping = answer == first and (high == limit + 1 if first else low == 0)
        if galloping:
            number = number + stride if first else number - stride
            stride *= 2
            number = min(max(number, low + 1), high - 1)
        else:
            number = (low + high) // 2
    return low
