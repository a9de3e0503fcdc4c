"""Where things are read and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDINGS = ROOT / "tests" / "recordings"
BUNDLED_CHECKPOINT = ROOT / "whisper_max" / "data" / "micro.pt"
WORK = ROOT / ".cache" / "benchmarks"
"""Weights, conversions and logs: large, made when they are missing, not in the repository."""


@dataclass(frozen=True)
class Destination:
    """What a run writes.

    results : folder of the results, one file for each machine
    document : the page with all tables
    figures : folder of the plots
    readme : the file with a block of figures between two marks
    """

    results: Path
    document: Path
    figures: Path
    readme: Path


PUBLISHED = Destination(
    results=ROOT / "benchmarks" / "results",
    document=ROOT / "docs" / "benchmarks.md",
    figures=ROOT / "docs" / "benchmarks",
    readme=ROOT / "README.md",
)


def trial(work: Path) -> Destination:
    """Places inside the work folder, for runs that are not meant to be published."""
    folder = work / "trial"
    return Destination(
        results=folder / "results",
        document=folder / "benchmarks.md",
        figures=folder / "benchmarks",
        readme=folder / "README.md",
    )
