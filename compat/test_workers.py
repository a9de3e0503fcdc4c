"""Worker processes, of multiprocessing and of DataLoader: they neither hang nor crash.

A child forked after MAX has run uses PyTorch and says so; a spawned one begins anew. Every program
runs in a process of its own, so that one that hangs ends with an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import whisper_max
from whisper_max.settings import TARGETS

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(whisper_max.__file__).parents[1]
FORKED = "this process was forked: MAX does not survive a fork"


def run(program: str, *arguments: str, silent: bool = False) -> str:
    """What a program of `programs` prints; `silent`: nothing to standard error."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not (silent and done.stderr), done.stderr
    return done.stdout


def calls(told: dict, path: str) -> int:
    return sum(counted[f"{path}_calls"] for counted in told["targets"].values())


@pytest.mark.parametrize(
    "worker",
    [
        "fork",
        "spawn",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("fork patch", "spawn patch")),
        pytest.param("forkserver", marks=pytest.mark.long),
    ],
)
def test_pool(worker):
    told = json.loads(run("pool.py", *worker.split()))
    texts = [[one["text"] for one in told[who]] for who in ("plain", "parent", "workers")]
    assert texts[0] == texts[1] == texts[2]
    assert told["after"]["text"] == texts[0][0]
    for one in (*told["parent"], told["after"]):
        assert calls(one, "max") > 0 == calls(one, "torch")
    for one in told["workers"]:
        if worker.startswith("fork") and worker != "forkserver":
            assert calls(one, "max") == 0
            for target in set(TARGETS) - {"alignment"}:
                assert FORKED in one["targets"][target]["reasons"]
        elif worker == "spawn patch":
            assert calls(one, "max") > 0 == calls(one, "torch")
        else:  # a new process, in which nobody has patched whisper
            assert calls(one, "max") == calls(one, "torch") == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(method):
    told = json.loads(run("loader.py", method))
    assert told["worst"] < 1e-3
    assert all(one["max_calls"] == 1 for one in told["parent"])
    for one in told["workers"]:
        assert one["max_calls"] == 0
        assert one["reasons"] == ({FORKED: 1} if method == "fork" else {})


def test_a_forked_child_can_end_as_it_likes():
    """MAX would wait for its threads in what it does at exit."""
    parent, child, status = run("bare_fork.py").splitlines()
    assert parent == child
    assert status == "3"


@pytest.mark.parametrize("what", ["signal", "thread", "fork"])
def test_a_program_notices_nothing_else(what):
    """Its own handler of SIGUSR2, the end of a first use in a thread, a fork during that."""
    assert run("side_effects.py", what, silent=True) == "as without whisper_max\n"
