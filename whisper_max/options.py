"""The options that the command lines share, each with its default and its environment variable."""

from __future__ import annotations

import argparse
import json
import os
import sys

from .report import status
from .settings import COMPILE_POLICIES, ENVIRONMENT, MODES, PRECISIONS, Settings

_CHOICES = {"mode": MODES, "precision": PRECISIONS, "compile": COMPILE_POLICIES}
_HELP = {
    "mode": "when MAX cannot run a call: auto: PyTorch does; strict: fail; shadow: run both, "
    "compare, and return PyTorch's result; off: PyTorch does everything",
    "precision": "arithmetic of large matrix products: highest: float32; high: float32, on CPUs "
    "with matrix tiles three products of bfloat16; medium: bfloat16; int8: 8-bit integers",
    "compile": "graphs that are not compiled yet: background: PyTorch serves until they are; "
    "blocking: wait for them; cached: never compile",
}


def add_profile(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """Adds --profile and --status."""
    return [
        parser.add_argument(
            "--profile", action="store_true", help="print at the end what ran where, to stderr"
        ),
        parser.add_argument(
            "--status",
            metavar="FILE",
            type=os.path.abspath,  # a program may change its working folder
            help="write the same to a file, as JSON",
        ),
    ]


def tell_what_ran(options: argparse.Namespace) -> None:
    """Does what --profile and --status ask for."""
    if options.profile:
        print(status(), file=sys.stderr, flush=True)
    if options.status:
        with open(options.status, "w", encoding="utf-8") as file:
            json.dump(status().to_dict(), file)


def add_options(parser: argparse._ActionsContainer, *names: str) -> list[argparse.Action]:
    """Adds --mode, --precision, --compile or some of them; what is not given is None.

    parser : a parser, or a group of one
    names : settings of those three; all of them, if there are none
    """
    return [
        parser.add_argument(
            f"--{name}",
            choices=_CHOICES[name],
            help=f"{_HELP[name]} (default: {getattr(Settings, name)}, or ${ENVIRONMENT[name]})",
        )
        for name in names or _HELP
    ]
