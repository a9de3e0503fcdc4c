"""The tables of docs/compatibility.md, between two marks; the prose around them is ours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from whisper_max.settings import TARGETS

from .results import Environment, Script, Suite, load_all

BEGIN = "<!-- matrix: written by `make matrix` from compat/results; edits are lost -->"
END = "<!-- /matrix -->"
NONE = "–"
CALLS = (
    "A parity test fails if any call falls back to PyTorch, unless it is a test of fallback: those "
    "made the calls on PyTorch counted here. Sources: the beginning of a sha256 of whisper_max's, "
    "as on the page of benchmarks; older records lack it."
)
SHOWN = ("python", "openai-whisper", "torch", "max")


def write(page: Path, results: Path) -> None:
    """Puts the tables of all recorded results into the page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(with_block(text, block(load_all(results))), encoding="utf-8")


def with_block(text: str, tables: str) -> str:
    """The text with the tables in place of what is between the marks.

    Raises ValueError where a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} or no {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def block(results: dict[str, Environment]) -> str:
    """All tables."""
    run = [one for one in results.values() if not one.absent]
    absent = [one for one in results.values() if one.absent]
    scripts = [(one, script) for one in run for suite in one.suites for script in suite.scripts]
    figures = [(one, suite) for one in run for suite in one.suites if suite.figures]
    lines = ["### What was run", "", CALLS, "", *_environments(run)]
    if absent:
        lines += ["### What could not be run", "", *_table(["environment", "why"], _absent(absent))]
    if scripts:
        lines += ["### Packages that use whisper", "", *_scripts(scripts)]
    if figures:
        lines += ["### Long runs, and models of the real sizes", "", *_figures(figures)]
    lines += ["### Why tests were skipped, or failed as expected", "", *_reasons(run)]
    return "\n".join(lines).rstrip()


def _environments(run: list[Environment]) -> list[str]:
    header = ["environment", "tests", "Python", "whisper", "torch", "MAX", "path", "passed"]
    header += ["failed", "failed as expected", "skipped", "minutes", "recorded", "sources"]
    rows = []
    for one in run:
        versions = [one.versions.get(package, NONE) for package in SHOWN]
        for suite in one.suites:
            counts = [suite.passed, len(suite.failed), sum(suite.expected_failures.values())]
            rows.append(
                [one.name, suite.name, *versions, _path(one, suite), *map(str, counts)]
                + [str(sum(suite.skipped.values())), f"{suite.seconds / 60:.1f}"]
                + [one.recorded, one.sources or NONE]
            )
        if one.error:
            rows.append([one.name, f"error: {_cell(one.error)}", *[NONE] * (len(header) - 2)])
    failed = [
        f"- {one.name}: `{test}` failed"
        for one in run
        for suite in one.suites
        for test in suite.failed
    ]
    return [*_table(header, rows), *failed, *([""] if failed else [])]


def _path(one: Environment, suite: Suite) -> str:
    """Where whisper's parts run there: as patch() has it, with the calls that were counted."""
    if not one.patched:
        reasons = dict.fromkeys(reason for why in one.refused.values() for reason in why)
        return f"PyTorch: {_cell('; '.join(reasons))}"
    counted = {
        path: sum(calls[path] for calls in suite.calls.values()) for path in ("max", "torch")
    }
    told = [f"MAX ({', '.join(one.patched)})"]
    told += [f"{target} on PyTorch: {_cell('; '.join(why))}" for target, why in one.refused.items()]
    if any(counted.values()):
        told.append(f"{counted['max']:,} calls on MAX, {counted['torch']:,} on PyTorch")
    return "; ".join(told)


def _absent(absent: list[Environment]) -> list[list[str]]:
    """Environments by reason, since a missing interpreter takes many with it."""
    by_reason: dict[str, list[str]] = {}
    for one in absent:
        by_reason.setdefault(one.absent, []).append(one.name)
    return [[", ".join(names), _cell(reason)] for reason, names in by_reason.items()]


def _scripts(scripts: list[tuple[Environment, Script]]) -> list[str]:
    rows = []
    for one, script in scripts:
        paths = [_calls(script, target) for target in TARGETS]
        same = "identical" if script.identical else "**differs**"
        told = [_cell(remark) for remark in script.remarks]
        told += [
            f"{target}: {_cell(reason)}"
            for target in TARGETS
            for reason in script.reasons.get(target, ())
        ]
        rows.append([f"{script.package} {script.version}", f"`{script.script}`", same])
        rows[-1] += [*paths, "<br>".join(told) or NONE]
    header = ["package", "script", "output", *TARGETS, "remarks, and why calls went to PyTorch"]
    return _table(header, rows)


def _calls(script: Script, target: str) -> str:
    counted = script.calls.get(target, {})
    names = {"max": "MAX", "torch": "PyTorch"}
    told = [f"{counted[path]} {name}" for path, name in names.items() if counted.get(path)]
    return ", ".join(told) or NONE


def _figures(figures: list[tuple[Environment, Suite]]) -> list[str]:
    rows = [
        [name, _cell(text), one.name]
        for one, suite in figures
        for name, text in suite.figures.items()
    ]
    return _table(["what", "found", "environment"], rows)


def _reasons(run: list[Environment]) -> list[str]:
    counted: dict[tuple[str, str], Counter[str]] = {}
    for one in run:
        for suite in one.suites:
            for kind, found in (("skipped", suite.skipped), ("failed", suite.expected_failures)):
                for reason, count in found.items():
                    counted.setdefault((kind, reason), Counter())[one.name] += count
    rows = [
        [kind, _cell(reason), ", ".join(f"{name} ({count})" for name, count in where.items())]
        for (kind, reason), where in sorted(counted.items())
    ]
    return _table(["", "reason", "where, and how many"], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def _cell(text: str) -> str:
    """A text of one line, without what would end the cell."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")
