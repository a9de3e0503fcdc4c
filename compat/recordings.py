"""The bundled recordings, and how two results of transcribing one are compared."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tolerances

FOLDER = Path(__file__).parents[1] / "tests" / "recordings"
NAMES = sorted(path.stem for path in FOLDER.glob("*.flac"))
LONG = "en_long01"

_FLOATS = {
    "avg_logprob": tolerances.AVG_LOGPROB,
    "no_speech_prob": tolerances.PROBABILITY,
}
_OF_WORDS = {
    "start": tolerances.WORD_SECONDS,
    "end": tolerances.WORD_SECONDS,
    "probability": tolerances.PROBABILITY,
}


@lru_cache(maxsize=None)
def samples(name: str) -> np.ndarray:
    """A recording, shape = (samples,), float32, 16 kHz; not to be written to."""
    audio, _ = soundfile.read(FOLDER / f"{name}.flac", dtype="float32")
    return audio


def assert_same_result(found: dict, expected: dict) -> None:
    """Fail unless two results of `transcribe` are the same, field by field.

    Floats that are computed may differ by what `tolerances` says; with word timestamps, the
    segments' times are those of their words.
    """
    assert found.keys() == expected.keys()
    assert found["language"] == expected["language"]
    for ours, theirs in zip(found["segments"], expected["segments"]):
        _assert_same_segment(ours, theirs)
    assert len(found["segments"]) == len(expected["segments"])
    assert found["text"] == expected["text"]


def _assert_same_segment(found: dict, expected: dict) -> None:
    assert found["tokens"] == expected["tokens"], (
        f"segment {expected['id']}, token {_first_difference(found, expected)}: "
        f"{found['tokens']} for {expected['tokens']}"
    )
    assert found.keys() == expected.keys()
    tolerated = {**_FLOATS, **_OF_WORDS} if "words" in expected else _FLOATS
    for name in expected.keys() - {"tokens", "words"}:
        if name in tolerated:
            tolerance = tolerated[name]
            assert found[name] == pytest.approx(expected[name], abs=tolerance, nan_ok=True), name
        else:
            assert found[name] == expected[name], name
    for ours, theirs in zip(found.get("words", []), expected.get("words", []), strict=True):
        assert ours["word"] == theirs["word"]
        for name, tolerance in _OF_WORDS.items():
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance), (theirs, name)


def _first_difference(found: dict, expected: dict) -> int:
    pairs = zip(found["tokens"], expected["tokens"])
    shorter = min(len(found["tokens"]), len(expected["tokens"]))
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
