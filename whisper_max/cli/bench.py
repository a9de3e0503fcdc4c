"""`whisper-max bench`: the benchmarks, which are in the source tree only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .errors import CommandError

SOURCE_TREE = Path(__file__).resolve().parents[2]


def run(arguments: list[str]) -> int:
    """Run `python -m benchmarks` in the source tree with these arguments; its exit code."""
    if not (SOURCE_TREE / "benchmarks" / "__main__.py").is_file():
        raise CommandError(
            "the benchmarks are not part of the installed package: "
            "get the source tree of whisper_max, and run `make bench` in it"
        )
    # In a process of its own: the harness decides about threads before anything is imported.
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], cwd=SOURCE_TREE)
