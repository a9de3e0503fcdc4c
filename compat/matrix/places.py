"""Where the matrix reads and writes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "compat" / "results"
PAGE = ROOT / "docs" / "compatibility.md"
LOGS = ROOT / ".cache" / "matrix"
"""What tox printed, by environment; not in the repository."""
FOLDER_VARIABLE = "WHISPER_MAX_MATRIX_RECORD"
"""Of the environment: where sessions of pytest leave what they found (`recording`)."""
