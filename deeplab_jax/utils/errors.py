"""The exception for mistakes that users can fix, and helpers for error messages."""

import difflib
import sys
from collections.abc import Iterable, Sequence

MAX_LISTED_PROBLEMS = 10  # by `raise_problems`
_MAX_LISTED_NAMES = 8  # by `listed`


class UserError(ValueError):
    """Input, configuration or environment is wrong; the message says how to fix it.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


def print_warning(message: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known name nearest to `name`, or an empty string."""
    close = nearest(name, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name most similar to `name`, ignoring case; None if none is similar."""
    folded = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Joins the first names, each cut to 200 characters, and says how many more there are."""
    shown = separator.join(name[:200] for name in names[:_MAX_LISTED_NAMES])
    num_more = len(names) - _MAX_LISTED_NAMES
    return f"{shown} and {num_more} more" if num_more > 0 else shown


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type's name if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def raise_problems(headline: str, problems: Iterable[str]) -> None:
    """Raises one UserError that lists the first problems and counts the rest, if there are any."""
    problems = list(problems)
    if not problems:
        return
    lines = [f"- {problem}" for problem in problems[:MAX_LISTED_PROBLEMS]]
    if len(problems) > MAX_LISTED_PROBLEMS:
        lines.append(f"- and {len(problems) - MAX_LISTED_PROBLEMS} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError("\n".join([f"{headline}: {count}", *lines]))
