"""python -m compat.matrix: run environments, keep their results, write the page."""

from __future__ import annotations

import argparse
import sys

from .page import write
from .places import LOGS, PAGE, RESULTS
from .results import Environment, save
from .running import environments, run


def main() -> int:
    """Returns 1 where an environment failed; one that is missing here has not."""
    parser = argparse.ArgumentParser(prog="python -m compat.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ENV", help="default: all of tox.ini")
    parser.add_argument("--report", action="store_true", help="only write the page")
    options = parser.parse_args()
    failed = []
    if not options.report:
        for name in options.names or environments():
            print(f"{name} …", end=" ", flush=True)
            result = run(name)
            save(result, RESULTS)
            print(summary(result), flush=True)
            if result.failed:
                failed.append(name)
            write(PAGE, RESULTS)  # each time: a run of hours may be broken off
    write(PAGE, RESULTS)
    return 1 if failed else 0


def summary(result: Environment) -> str:
    """One line for the terminal."""
    if result.absent:
        return f"skipped: {result.absent}"
    if result.error:
        return f"failed: {result.error} ({LOGS / result.name}.log)"
    return "; ".join(
        f"{suite.name}: {suite.passed} passed, {len(suite.failed)} failed, "
        f"{sum(suite.skipped.values())} skipped"
        for suite in result.suites
    )


if __name__ == "__main__":
    sys.exit(main())
