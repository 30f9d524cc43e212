"""The one exception that is printed to the user as a sentence."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: one clear sentence that says what is wrong, where, and which flag or file to change.

    Command lines print it as ``error: <sentence>`` on stderr and exit with status 2.
    """
