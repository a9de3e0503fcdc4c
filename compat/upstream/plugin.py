"""A pytest plugin for upstream's tests: the patch, stand-ins for weights, expected failures."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import whisper
import yaml

import whisper_max
from whisper_max import demo

from . import conditions

OUTCOMES = pytest.StashKey[dict]()
EXPECTED = Path(__file__).with_name("expected_failures.yaml")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patched", action="store_true", help="patch whisper, in mode strict")
    parser.addoption("--outcomes", type=Path, help="a file for what came of each test")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}
    config.addinivalue_line("markers", "allow_fallback: as in our own suites")
    if config.getoption("--patched"):
        whisper_max.patch(mode="strict", compile="blocking")


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("--outcomes"):
        config.getoption("--outcomes").write_text(json.dumps(config.stash[OUTCOMES]))


@pytest.fixture(scope="session", autouse=True)
def standing_in(tmp_path_factory) -> Iterator[None]:
    """Released weights that are not there: the bundled checkpoint, where upstream downloads them.

    Upstream's own path from the name on: the address, the download, the checksum, the loading. Its
    alignment heads are not those of the released model, so upstream takes its default.
    """
    folder = tmp_path_factory.mktemp("weights")
    digest = hashlib.sha256(demo.CHECKPOINT.read_bytes()).hexdigest()
    missing = whisper._MODELS.keys() - conditions.weights_at_hand()
    (folder / digest).mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in missing:
        source = folder / digest / f"{name}.pt"
        shutil.copy(demo.CHECKPOINT, source)
        patch.setitem(whisper._MODELS, name, source.as_uri())
        patch.setitem(whisper._ALIGNMENT_HEADS, name, None)
    yield
    patch.undo()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    entries = yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
    unused = {test for entry in entries for test in entry["tests"]}
    for item in items:
        reason = conditions.reason_to_skip({mark.name for mark in item.iter_markers()})
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        case = f"{item.path.name}::{item.name}"
        for entry in entries:
            named = {case, case.partition("[")[0]}.intersection(entry["tests"])
            unused -= named
            if named and conditions.hold(entry["condition"], case):
                reason = " ".join(entry["reason"].split())
                expected = {"raises": AssertionError, "strict": entry["strict"]}
                item.add_marker(pytest.mark.xfail(reason=reason, **expected))
    if unused:
        raise pytest.UsageError(f"{EXPECTED.name} names tests that are not there: {sorted(unused)}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Keeps outcome and message of each test: the message of a failure has the text transcribed."""
    report = (yield).get_result()
    if report.when == "call" or report.outcome == "skipped":
        message = str(call.excinfo.value) if call.excinfo else ""
        case = f"{item.path.name}::{item.name}"
        item.config.stash[OUTCOMES][case] = [report.outcome, message]
