"""Errors that are the user's to mend: one message, no traceback, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the place (file, row and field, or option), says what is wrong and how to mend it.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}\n  mend: {mend}" if mend else text)
