"""A pytest plugin, `-p compat.matrix.recording`: writes what a session found for the matrix.

It does nothing unless the environment variable names a folder. There it leaves one file for each
session; the runner puts those of one environment together (`running`).
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pytest

import whisper_max
from whisper_max.settings import TARGETS

from .places import FOLDER_VARIABLE, ROOT
from .results import Environment, Script, Suite, save

UNIT_TESTS = ROOT / "tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", default="parity", help="the session's name in the matrix")


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        recorder = Recorder(config.getoption("--suite"), Path(folder))
        config.pluginmanager.register(recorder, "matrix-recorder")


@pytest.fixture
def keep_script(record_property):
    """Records how a third-party script ran."""
    return lambda script: record_property("script", asdict(script))


@pytest.fixture
def keep_figure(record_property):
    """Records something that was measured, under a name, in words."""
    return lambda name, text: record_property("figure", (name, text))


class Recorder:
    """Counts outcomes and calls while the session runs, and writes them at its end."""

    def __init__(self, name: str, folder: Path) -> None:
        self.suite = Suite(name)
        self.folder = folder
        self.begin = time.monotonic()
        self.skipped: Counter[str] = Counter()
        self.expected: Counter[str] = Counter()
        self.calls = {target: {"max": 0, "torch": 0} for target in TARGETS}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Before the fixtures, which set the counters back to zero."""
        if item.path.is_relative_to(UNIT_TESTS):  # they count calls that are none
            return
        try:
            targets = whisper_max.status().targets
        except ValueError:  # the test has put something into the environment that is no setting
            return
        for target, counted in targets.items():
            self.calls[target]["max"] += counted.max_calls
            self.calls[target]["torch"] += counted.torch_calls

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail"):
            if report.skipped:
                self.expected[report.wasxfail.removeprefix("reason: ")] += 1
            elif report.when == "call":  # it passed, and need not have failed
                self.suite.passed += 1
        elif report.skipped:
            self.skipped[_reason(report)] += 1
        elif report.failed:
            self.suite.failed.append(report.nodeid)
        elif report.when == "call":
            self.suite.passed += 1
        if report.when == "call":
            self._take(report.user_properties)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.suite.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped[_reason(report)] += 1

    def pytest_sessionfinish(self) -> None:
        self.suite.skipped = dict(sorted(self.skipped.items()))
        self.suite.expected_failures = dict(sorted(self.expected.items()))
        self.suite.calls = self.calls
        self.suite.seconds = round(time.monotonic() - self.begin, 1)
        # Where patch() is asked for again, it says what this environment makes of it.
        whisper_max.unpatch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with whisper_max.patched(mode="auto", compile="cached") as report:
                status = whisper_max.status()
        result = Environment(
            name=self.suite.name,
            recorded=date.today().isoformat(),
            versions=status.versions,
            patched=list(report.patched),
            refused={target: list(reasons) for target, reasons in report.refused.items()},
            suites=[self.suite],
        )
        save(result, self.folder)

    def _take(self, properties: list[tuple[str, object]]) -> None:
        for name, value in properties:
            if name == "script":
                self.suite.scripts.append(Script(**value))
            elif name == "figure":
                self.suite.figures.update([value])


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped, in the words of the test."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").splitlines()[0]
