"""Run a program that uses openai-whisper, unmodified, on MAX.

    python -m whisper_max [options] script.py [arguments]
    python -m whisper_max [options] -m module [arguments]
    python -m whisper_max [options] -c code [arguments]

The program sees the sys.argv, sys.path and __main__ that `python` would give it. Whisper is
patched when the program imports it, not before: what the program sets up first (environment
variables, torch's threads, sys.path) counts as it always did.
"""

from __future__ import annotations

import argparse
import builtins
import os
import pkgutil
import runpy
import sys
import warnings
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType

from . import __version__, is_patched, patch
from .after_import import call_after_import
from .options import add_options, add_profile, tell_what_ran
from .settings import Settings


def main(arguments: list[str] | None = None) -> None:
    """Run the program that `arguments` (default `sys.argv[1:]`) name; its exit is ours."""
    parser = _parser()
    options = parser.parse_args(arguments)
    asked = {
        "mode": options.mode,
        "precision": options.precision,
        "compile": options.compile,
    }
    try:
        settings = Settings.from_environment(**asked)
    except ValueError as error:
        parser.error(str(error))
    if not (options.module or options.code) and not os.path.exists(options.program):
        parser.error(f"no such file: {options.program!r}")

    if settings.mode != "off":
        call_after_import("whisper", lambda: _patch(asked))
    try:
        if options.module:
            _run_module(options.program, options.arguments)
        elif options.code:
            _run_code(options.program, options.arguments)
        else:
            _run_script(options.program, options.arguments)
    finally:
        tell_what_ran(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m whisper_max",
        description="Run a program that uses openai-whisper, unmodified, on MAX.",
        allow_abbrev=False,
    )
    add_options(parser)
    add_profile(parser)
    parser.add_argument("--version", action="version", version=f"whisper_max {__version__}")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "-m", dest="module", action="store_true", help="the program is a module, as in python -m"
    )
    kind.add_argument(
        "-c", dest="code", action="store_true", help="the program is code, as in python -c"
    )
    parser.add_argument("program", help="script.py, or what -m or -c takes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own")
    return parser


def _patch(asked: dict[str, str | None]) -> None:
    if is_patched():
        return
    try:
        patch(**asked)
    except ImportError as error:
        if error.name != "whisper":
            raise
        # The program imported some other package called whisper; it shall run as ever.
        warnings.warn(f"nothing was patched: {error}", RuntimeWarning, stacklevel=2)


def _run_script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    if pkgutil.get_importer(path) is not None:  # a folder or an archive with a __main__.py
        if _has_first_path():
            del sys.path[0]  # run_path() puts in its own
        runpy.run_path(path, run_name="__main__")
        return
    if _has_first_path():
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # Not run_path(): it would make sys.argv[0] and __file__ the same, and take __main__ away at
    # the end, when atexit functions and threads still look for it.
    file = os.path.abspath(path)
    if path.endswith(".pyc"):
        loader = SourcelessFileLoader("__main__", file)
        code = loader.get_code("__main__")
    else:
        loader = SourceFileLoader("__main__", file)
        code = loader.source_to_code(loader.get_data(file), file)
    _run_as_main(code, __file__=file, __cached__=None, __loader__=loader)


def _run_module(name: str, arguments: list[str]) -> None:
    # sys.path[0] is the working folder already, through our own `python -m`.
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_code(source: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    if _has_first_path():
        sys.path[0] = ""
    _run_as_main(compile(source, "<string>", "exec"), __loader__=BuiltinImporter)


def _run_as_main(code: CodeType, **names: object) -> None:
    main_module = ModuleType("__main__")
    vars(main_module).update(names, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    exec(code, vars(main_module))


def _has_first_path() -> bool:
    """Whether Python put the program's place first in sys.path; not so with -P or -I."""
    return not getattr(sys.flags, "safe_path", sys.flags.isolated)


if __name__ == "__main__":
    main()
