"""The `whisper-max` command: upstream's own command under the patch, and what goes with it.

Here: the choice of the command, the log, and how an error is told. Each command is a module of
its own with a function `run(arguments) -> exit code`; only the one that is asked for is imported.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..conditions import UnsupportedByMax
from .errors import FAILED, CommandError, first_line

logger = logging.getLogger("whisper_max")

COMMANDS = ("compile", "cache", "doctor", "demo", "bench")
OVERVIEW = """\
usage: whisper-max [-v | -vv] AUDIO [AUDIO ...] [options]
       whisper-max [-v | -vv] COMMAND [options]

Transcribe audio as the `whisper` command does, with the encoder and decoder on MAX.

commands:
  compile     compile the graphs ahead of the first run
  cache       list, clear or locate the compiled graphs
  doctor      check the installation, and print the command that fixes it
  demo        transcribe a bundled recording, with plain whisper and then patched
  bench       run the benchmarks of the source tree

  -v, -vv     tell what runs where, and why; tell everything, with tracebacks
  --version   print the version
  --help      print all options, those of `whisper` too
"""
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after an error, which is one line.

    argv : the arguments, default `sys.argv[1:]`

    Raises SystemExit after printing help. A fault of the program comes out as it is.
    """
    verbosity, arguments = _take_verbosity(sys.argv[1:] if argv is None else argv)
    with _logging_to_stderr(_LEVELS[min(verbosity, 2)]):
        try:
            return _run(arguments)
        except (CommandError, UnsupportedByMax) as error:
            logger.debug("the error in full:", exc_info=True)
            print(f"whisper-max: {first_line(error)}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            return _INTERRUPTED


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(OVERVIEW, file=sys.stderr)
        return FAILED
    if arguments == ["--version"]:
        print(f"whisper-max {__version__}")
        return 0
    if arguments[0] in COMMANDS:
        name, arguments = arguments[0], arguments[1:]
    else:
        name = "transcribe"
    command = importlib.import_module(f".{name}", __name__)
    return command.run(arguments)


def _take_verbosity(argv: Sequence[str]) -> tuple[int, list[str]]:
    """How many times "v" was said before any "--", and the other arguments."""
    end = argv.index("--") if "--" in argv else len(argv)
    said = [argument for argument in argv[:end] if re.fullmatch("-v+", argument)]
    rest = [argument for argument in argv[:end] if argument not in said]
    return sum(map(len, said)) - len(said), [*rest, *argv[end:]]


@contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("whisper-max: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
