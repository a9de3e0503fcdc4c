"""`whisper-max AUDIO…`: openai-whisper's own command, run on MAX.

Upstream's `cli()` does the work. For its duration three names in its module are exchanged: the
argument parser gets our options and tells errors in one line; `transcribe` explains audio that
cannot be read; and instead of printing a traceback for a file that failed, it is noted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPException
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.error import URLError

import whisper_max

from ..conditions import UnsupportedByMax
from ..options import add_options, add_profile, tell_what_ran
from ..settings import Settings
from . import OVERVIEW
from .errors import FAILED, CommandError, Parser, first_line, import_whisper
from .inputs import AudioError, check_audio, check_device, check_model, load_audio

if TYPE_CHECKING:
    from whisper.model import Whisper

logger = logging.getLogger("whisper_max")

_EXPLAINED = (AudioError, UnsupportedByMax, OSError)
"""What a file can fail with whose message says enough."""


def run(arguments: list[str]) -> int:
    """Run upstream's command with these arguments and ours; 2 when any file failed.

    As upstream, goes on with the next file after one that failed. Raises CommandError for what is
    wrong before the first file: arguments, files that are not there, ffmpeg, the model.
    """
    import_whisper()
    upstream = importlib.import_module("whisper.transcribe")
    failed: list[BaseException] = []
    with ExitStack() as stack:
        names = {
            "argparse": SimpleNamespace(
                ArgumentParser=partial(UpstreamParser, arguments, partial(_begin, stack)),
                ArgumentDefaultsHelpFormatter=HelpFormatter,
            ),
            "transcribe": partial(_transcribe, upstream.transcribe),
            "traceback": SimpleNamespace(print_exc=partial(_note_failure, failed)),
        }
        for name, stand_in in names.items():
            stack.enter_context(_exchanged(upstream, name, stand_in))
        try:
            upstream.cli()
        except URLError as error:
            raise CommandError(
                f"cannot download the model ({error.reason}); fetch it on another machine, and "
                "name the file with --model"
            ) from error
        except (OSError, HTTPException, RuntimeError) as error:  # in loading the model
            raise CommandError(first_line(error)) from error
    return FAILED if failed else 0


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of upstream's options; ours do so themselves, and switches have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "default:" in (action.help or "") or action.nargs == 0
        return action.help if told else super()._get_help_string(action)


class UpstreamParser(Parser):
    """Upstream's parser, which its `cli()` fills and uses, with our options among its own.

    arguments : what to parse, instead of sys.argv
    begin : called with our options and with upstream's, before upstream goes on
    """

    def __init__(
        self,
        arguments: list[str],
        begin: Callable[[argparse.Namespace, argparse.Namespace], None],
        formatter_class: type[argparse.HelpFormatter],
    ) -> None:
        # Its usage line names all options; `format_help` has a shorter one.
        super().__init__("whisper-max", argparse.SUPPRESS, formatter_class=formatter_class)
        self.arguments = arguments
        self.begin = begin

    def parse_args(self) -> argparse.Namespace:
        """Upstream's options."""
        # Before the parser: of what the check of a value says, argparse tells nothing.
        check_model(self.arguments)
        ours = self.add_argument_group("options of whisper_max")
        added = [*add_options(ours), *add_profile(ours)]
        self._ours = added
        options = vars(super().parse_args(self.arguments))
        taken = {action.dest: options.pop(action.dest) for action in added}
        self.begin(argparse.Namespace(**taken), argparse.Namespace(**options))
        return argparse.Namespace(**options)

    def _get_option_tuples(self, option_string: str) -> list[tuple]:
        """Options that begin so: whisper's, if there are any, as in its own command."""
        found = super()._get_option_tuples(option_string)
        return [match for match in found if match[0] not in self._ours] or found

    def format_help(self) -> str:
        """All commands, then all options of a transcription."""
        return f"{OVERVIEW}\n{super().format_help()}"


def _begin(stack: ExitStack, ours: argparse.Namespace, theirs: argparse.Namespace) -> None:
    """Check what can be checked, then patch whisper until `stack` ends."""
    asked = {"precision": ours.precision, "mode": ours.mode, "compile": ours.compile}
    try:
        Settings.from_environment(**asked)
    except ValueError as error:
        raise CommandError(str(error)) from error
    check_device(theirs.device)
    check_audio(theirs.audio)
    stack.enter_context(whisper_max.patched(**asked))
    # While it is still patched.
    stack.callback(_tell_what_ran, ours)


def _tell_what_ran(options: argparse.Namespace) -> None:
    """What was asked for; without --profile that nothing ran on MAX, where that is so, and why."""
    tell_what_ran(options)
    if options.profile:
        return
    status = whisper_max.status()
    counted = status.targets.values()
    reasons = {reason: None for one in counted for reason in one.reasons}
    if status.mode == "auto" and reasons and not any(one.max_calls for one in counted):
        print(f"whisper-max: PyTorch did all the work: {'; '.join(reasons)}", file=sys.stderr)


def _transcribe(
    upstream: Callable[..., dict], model: Whisper, path: str, **options: object
) -> dict[str, object]:
    return upstream(model, load_audio(path), **options)


def _note_failure(failed: list[BaseException]) -> None:
    """In place of traceback.print_exc(): upstream then prints one line itself, and goes on."""
    error = sys.exc_info()[1]
    failed.append(error)
    if isinstance(error, _EXPLAINED):
        logger.debug("the error in full:", exc_info=True)
    else:
        traceback.print_exc()


@contextmanager
def _exchanged(owner: object, name: str, stand_in: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)
