"""Tables, plots and the README's figures, made from the results and from nothing else."""

from __future__ import annotations

from pathlib import Path

from ..places import Destination
from ..results import load_all
from .page import page
from .readme import block, with_block

__all__ = ["block", "page", "with_block", "write"]


def write(destination: Destination) -> list[Path]:
    """Writes the page, the README's block and the plots; returns the files.

    Without matplotlib there are no plots, and the page shows those of before.
    """
    by_machine = load_all(destination.results)
    readme = destination.readme
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""
    texts = {
        destination.document: page(by_machine),
        readme: with_block(before, block(by_machine)),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [*texts, *_plots(destination, by_machine)]


def _plots(destination: Destination, by_machine: dict) -> list[Path]:
    try:
        from .plots import draw
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        return []
    return [
        path
        for machine, results in by_machine.items()
        for path in draw(results, destination.figures / machine)
    ]
