"""Numbers and tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column is text, the others are numbers, set to the right."""
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return [_row(cells) for cells in (header, aligned, *rows)] + [""]


def duration(seconds: float) -> str:
    """Three digits: milliseconds under a second, else seconds."""
    if seconds < 1:
        return f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds)} s"


def times(ratio: float) -> str:
    """A speed-up."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def significant(value: float) -> str:
    """At least three digits, and no more than that behind the point."""
    for limit, decimals in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def percent(fraction: float) -> str:
    """One digit behind the point."""
    return f"{100 * fraction:.1f} %"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
