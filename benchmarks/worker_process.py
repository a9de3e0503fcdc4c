"""The parent's end of a peer's process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from .peers import Entry
from .peers.interface import NotOffered, Outcome
from .places import ROOT
from .scenarios import Scenario

LIMIT_SECONDS = 900.0  # for one answer; a compile is the longest
SETTLE_SECONDS = 0.5  # at most, until its threads rest
LAST_LINES = 3


class PeerFailed(Exception):
    """A peer's process ended, did not answer in time, or could not be started."""


class WorkerProcess:
    """One peer with one model, loaded in a process of its own.

    work : folder of models and inputs; the process writes its log there
    threads : how many CPUs it may use

    Raises PeerFailed when the peer cannot be loaded; so do all methods when it ends.
    """

    def __init__(self, entry: Entry, model: str, threads: int, work: Path) -> None:
        self.entry = entry
        self.log = work / "logs" / f"{entry.name}-{model}-{threads}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.worker"]
        begin = time.perf_counter()
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, str(work), entry.name, model, str(threads)],
                cwd=ROOT,
                env=environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            loaded = self._answer()
        except PeerFailed:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin
        """From starting the process until the model is loaded."""
        self.load_seconds: float = loaded["load_seconds"]
        """Of that, importing the peer's packages and loading the model."""
        self.loaded_mib: float = loaded["peak_mib"]

    def prepare(self, scenario: Scenario) -> None:
        """Makes the scenario the one that `run` runs. Raises NotOffered with the peer's reason."""
        reply = self._ask("prepare", scenario=dataclasses.asdict(scenario))
        if "not_offered" in reply:
            raise NotOffered(reply["not_offered"])

    def run(self) -> Outcome:
        """One timed run, and then a moment until the process rests."""
        outcome = Outcome(**self._ask("run"))
        wait_until_idle(self._process.pid)
        return outcome

    def usage(self) -> dict:
        """`peak_mib`, `remarks` and `compile_seconds`."""
        return self._ask("usage")

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, command: str, **details: object) -> dict:
        try:
            self._process.stdin.write(json.dumps({"command": command, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer says so
        return self._answer()

    def _answer(self) -> dict:
        timer = threading.Timer(LIMIT_SECONDS, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise PeerFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-LAST_LINES:]) or f"it ended with status {self._process.poll()}"


def wait_until_idle(pid: int) -> None:
    """Waits until no thread of a process runs: some spin for a while after the work is done."""
    end = time.monotonic() + SETTLE_SECONDS
    quiet = 0
    while quiet < 2 and time.monotonic() < end:
        quiet = 0 if _running(pid) else quiet + 1
        time.sleep(0.001)


def _running(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():  # not Linux, where nothing is known: wait as long as it may take
        return True
    for stat in tasks.glob("*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:  # that thread has just ended
            continue
        if state == "R":
            return True
    return False


def environment(threads: int) -> dict[str, str]:
    """Of a process with so many threads that is to reach for nothing outside."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MODULAR_TELEMETRY_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
    }
