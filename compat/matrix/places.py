"""Where the matrix reads and writes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "compat" / "results"
PAGE = ROOT / "docs" / "compatibility.md"
LOGS = ROOT / ".cache" / "matrix"
"""What tox printed, by environment; not in the repository."""
