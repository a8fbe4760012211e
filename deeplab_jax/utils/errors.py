"""The one exception for mistakes that the user can mend, and hints at what was meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input, configuration or environment is wrong in a way the message tells how to mend.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words to put behind a name that is not known: " (did you mean 'x'?)", or none."""
    close = nearest(name, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like another, in whatever case; None if none is much."""
    folded = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None
