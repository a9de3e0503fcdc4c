"""How the command line tells errors that are not its own: one line, exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn

FAILED = 2
"""The exit code after an error."""


class CommandError(Exception):
    """What was asked for cannot be done; the message says why, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, without the list of all of them."""

    def error(self, message: str) -> NoReturn:
        """Raises CommandError."""
        raise CommandError(f"{message} (see {self.prog} --help)")


def first_line(error: BaseException) -> str:
    """The error's message, without the pages that some libraries put behind it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def import_whisper() -> None:
    """Imports openai-whisper and torch; raises CommandError, with the remedy, without them."""
    from ..patch_table import import_upstream

    try:
        import_upstream()
    except ImportError as error:
        raise CommandError(first_line(error)) from error
