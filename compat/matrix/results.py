"""What was found, as data: one JSON file for each environment, from which the tables are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FORMAT = 1


@dataclass
class Script:
    """A third-party package's script, run by `python` and by `python -m whisper_max`.

    calls : calls by target, on MAX and on PyTorch
    reasons : why calls went to PyTorch, by target
    remarks : what a reader must know of how it was run
    """

    package: str
    version: str
    script: str
    identical: bool
    calls: dict[str, dict[str, int]]
    reasons: dict[str, list[str]]
    remarks: list[str] = field(default_factory=list)


@dataclass
class Suite:
    """One session of pytest.

    failed : the tests' names
    skipped : how many, by reason; so are `expected_failures`
    calls : calls in the tests' own process, by target, on MAX and on PyTorch
    figures : what tests measured, by name
    """

    name: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    expected_failures: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    scripts: list[Script] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Environment:
    """One environment of tox.ini.

    recorded : the day, or "" where it was not run
    sources : of whisper_max, see `digest_of_sources`; "" in records from before it was kept
    absent : why it was not run
    error : what tox said where an environment failed otherwise than by its tests
    patched, refused : what patch() does there, and the reasons for what it leaves to PyTorch
    """

    name: str
    recorded: str = ""
    sources: str = ""
    absent: str = ""
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    patched: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    suites: list[Suite] = field(default_factory=list)
    format: int = FORMAT

    @property
    def failed(self) -> bool:
        """Whether anything went wrong."""
        return bool(self.error) or any(suite.failed for suite in self.suites)


def save(result: Environment, folder: Path) -> Path:
    """Writes an environment's file, in place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    content = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(content + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def load(path: Path) -> Environment:
    """Reads an environment's file. Raises ValueError for a file of another format."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {content.get('format')!r}, expected {FORMAT}: record it again"
        )
    content["suites"] = [_suite(entry) for entry in content["suites"]]
    return Environment(**content)


def load_all(folder: Path) -> dict[str, Environment]:
    """All recorded environments by name, in the order of their names."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def _suite(entry: dict) -> Suite:
    return Suite(**{**entry, "scripts": [Script(**script) for script in entry["scripts"]]})
