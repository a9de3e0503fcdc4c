"""Constants that Python and Mojo both have, and that have to agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import whisper_max
from whisper_max.graphs import specification
from whisper_max.graphs.gpu import selection
from whisper_max.runtime.gpu import engine

PACKAGE = Path(whisper_max.__file__).parent
IN_PYTHON = {
    "PANEL": specification.PANEL,
    "HEAD_DIM": specification.HEAD_DIM,
    "MASKED": specification.MASKED,
    "REACHABLE": selection.REACHABLE,
    "MOST_BEAMS": engine.MOST_BEAMS,
}
DEFINITION = re.compile(r"^comptime (\w+)(?:: \w+)? = (-?[\d.e]+)$", re.MULTILINE)


@pytest.mark.parametrize("name", IN_PYTHON)
def test_the_kernels_have_the_same(name):
    found = [
        float(value)
        for path in PACKAGE.rglob("*.mojo")
        for defined, value in DEFINITION.findall(path.read_text(encoding="utf-8"))
        if defined == name
    ]
    assert found
    assert set(found) == {IN_PYTHON[name]}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.mojo")), ids=lambda path: path.stem)
def test_lines_of_kernels_are_as_long_as_lines_of_python(path):
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
