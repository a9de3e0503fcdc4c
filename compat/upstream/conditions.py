"""The conditions that expected_failures.yaml may name, and what else upstream's tests need."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import whisper


def weights_at_hand() -> set[str]:
    """Names of released models whose weights lie in the folder where upstream looks for them."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.getenv("XDG_CACHE_HOME", default)) / "whisper"
    return {name for name, url in whisper._MODELS.items() if (folder / Path(url).name).is_file()}


def hold(condition: str, case: str) -> bool:
    """Whether a condition holds for one test case. Raises KeyError for an unknown one."""
    return {
        "always": lambda: True,
        "weights stand in": lambda: _model_of(case) not in weights_at_hand(),
    }[condition]()


def reason_to_skip(markers: set[str]) -> str | None:
    """What the machine lacks for a test with these markers of upstream's."""
    if "requires_cuda" in markers and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _model_of(case: str) -> str:
    return case.partition("[")[2].removesuffix("]")
