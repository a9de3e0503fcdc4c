"""The parity matrix: what sessions record, how it is put together, and the page made from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from compat.matrix import page, places, running
from compat.matrix.results import Environment, Script, Suite, load_all, save

SESSION = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.parametrize("i", range(2))
def test_skips(i): pytest.skip("no luck")
@pytest.mark.xfail(reason="as it is known to")
def test_fails_as_expected(): assert False
def test_measures(keep_figure): keep_figure("weight", "3 kg")
"""


def script(**changes) -> Script:
    known = {
        "package": "listener",
        "version": "1.0",
        "script": "listen",
        "identical": True,
        "calls": {"encoder": {"max": 2, "torch": 0}, "decoder": {"max": 0, "torch": 5}},
        "reasons": {"decoder": ["it | has <hooks>"]},
    }
    return Script(**{**known, **changes})


def environment(name: str = "py311-max", **changes) -> Environment:
    versions = {"python": "3.11.7", "openai-whisper": "20250625", "torch": "2.13", "max": "26.7"}
    known = {
        "recorded": "2026-01-02",
        "sources": "0a1b2c",
        "versions": versions,
        "patched": ["encoder"],
    }
    return Environment(name, **{**known, **changes})


def test_it_is_run_from_an_environment_without_pytest():
    without = "import sys; sys.modules['pytest'] = None; import compat.matrix.__main__"
    subprocess.run([sys.executable, "-c", without], cwd=places.ROOT, check=True)


def test_a_session_is_recorded_where_the_variable_says(tmp_path):
    (tmp_path / "test_it.py").write_text(SESSION)
    command = [sys.executable, "-m", "pytest", "-p", "compat.matrix.recording", "--suite", "trial"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    known = {**os.environ, places.FOLDER_VARIABLE: str(tmp_path / "found")}
    subprocess.run(command, cwd=places.ROOT, env=known, capture_output=True, timeout=120)
    (session,) = load_all(tmp_path / "found").values()
    (suite,) = session.suites
    assert (suite.name, suite.passed) == ("trial", 2)
    assert [name.rpartition("::")[2] for name in suite.failed] == ["test_fails"]
    assert suite.skipped == {"no luck": 2}
    assert suite.expected_failures == {"as it is known to": 1}
    assert suite.figures == {"weight": "3 kg"}
    assert session.versions["openai-whisper"]
    assert set(session.patched) | set(session.refused) == set(suite.calls)


def test_sessions_become_one_environment():
    sessions = [environment(suites=[Suite("one")]), environment(versions={}, suites=[Suite("two")])]
    result = running.combined("py311-max", sessions, 0, "")
    assert [suite.name for suite in result.suites] == ["one", "two"]
    assert result.versions["max"] == "26.7"
    assert re.fullmatch("[0-9a-f]{12}", result.sources)
    assert not result.failed


def test_what_is_missing_here_is_no_failure_and_what_breaks_is():
    text = "py310: skipped because could not find python interpreter\n"
    absent = running.combined("py310", [], 0, text)
    assert absent.absent == "could not find python interpreter"
    assert not absent.failed
    text = "installing\nno space left\n\n  py311: FAIL code 1\n  evaluation failed :( (2 seconds)\n"
    broken = running.combined("py311", [], 1, text)
    assert broken.error == "no space left"
    assert broken.failed
    ended = [environment(suites=[Suite("a", failed=["x"])])]
    told = running.combined("py311", ended, 1, "x failed")
    assert told.failed and not told.error


def test_results_are_read_as_written(tmp_path):
    written = environment(suites=[Suite("a", scripts=[script()], figures={"weight": "3 kg"})])
    save(written, tmp_path)
    assert load_all(tmp_path) == {"py311-max": written}


def test_results_of_another_format_are_refused(tmp_path):
    path = save(environment(), tmp_path)
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format 0, expected 1: record it again"):
        load_all(tmp_path)


def test_tables_show_all_that_was_found():
    suites = [
        Suite("parity", passed=3, failed=["test_x"], skipped={"no luck": 2}),
        Suite("others", scripts=[script(), script(identical=False)], figures={"weight": "3 kg"}),
    ]
    results = {
        "py311-max": environment(suites=suites),
        "py310-max": Environment("py310-max", absent="no interpreter"),
        "broken": Environment("broken", error="no space | left"),
    }
    text = page.block(results)
    for expected in (
        "| 2026-01-02 | 0a1b2c |",
        "| py310-max | no interpreter |",
        "- py311-max: `test_x` failed",
        "| error: no space / left |",
        "| 2 MAX | 5 PyTorch |",
        "**differs**",
        "decoder: it / has &lt;hooks>",
        "| weight | 3 kg | py311-max |",
        "| skipped | no luck | py311-max (2) |",
    ):
        assert expected in text, expected
    rows = [line for line in text.splitlines() if line.startswith("| py311-max |")]
    assert len({row.count(" | ") for row in rows}) == 1


def test_prose_around_the_tables_stays():
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    assert page.with_block(text, "new") == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
    with pytest.raises(ValueError, match="the page has no"):
        page.with_block("before", "new")


def test_page_is_made_from_the_recorded_results():
    text = places.PAGE.read_text(encoding="utf-8")
    assert text == page.with_block(text, page.block(load_all(places.RESULTS)))
