"""The one exception that is printed to the user as a sentence."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: one clear sentence that says what is wrong, where, and which flag or file to change.

    Command lines print it as ``error: <sentence>`` on stderr and exit with status 2.
    """


def printable(text: str) -> str:
    """A text for a terminal: control characters, by which a file's name could move the cursor or change colours, are
    written out, like \\x1b; line ends and tabs stay.
    """
    return text.translate(_CONTROL)


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
