"""The two errors that end a command with one line: wrong input (status 2), or a run that failed (status 1)."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user wrote or passed is wrong; the message says where, what it must be and what it is."""


class RunError(RuntimeError):
    """Something happened during a run that input checks cannot foresee; what is safe on disk is said in the message."""


def near_match(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'beta'?`, or the list of choices if none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(known)}" if known else ""
