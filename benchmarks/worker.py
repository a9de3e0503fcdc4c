"""A peer's own process: it loads the peer, prepares operations and runs them when told to.

    python -m benchmarks.worker WORK PEER MODEL THREADS

Requests and replies are lines of JSON, on stdin and stdout; `worker_process` is the other end.
Whatever the packages print goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from .inputs import VARIANTS, Inputs
from .models import Model
from .peers import PEER
from .peers.interface import NotOffered, Operation, Peer, Setup
from .scenarios import Scenario


def main(work: str, name: str, model: str, threads: str) -> int:
    """Serves one peer until stdin ends."""
    replies = _keep_stdout()
    use_cpus(int(threads))
    folder = Path(work)
    setup = Setup(Model(model, folder), Inputs(folder), int(threads), PEER[name].variant)
    begin = time.perf_counter()
    server = Server(PEER[name].load(setup))
    _reply(replies, {"load_seconds": time.perf_counter() - begin, **usage()})
    for line in sys.stdin:
        _reply(replies, server.answer(json.loads(line)))
    return 0


class Server:
    """Answers requests for one peer."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._operation: Operation | None = None

    def answer(self, request: dict) -> dict:
        """The reply to one request; {"not_offered": why} for an operation the peer has not."""
        command = request["command"]
        if command == "prepare":
            try:
                self._operation = self._prepare(Scenario(**request["scenario"]))
            except NotOffered as reason:
                return {"not_offered": str(reason)}
            return {}
        if command == "run":
            return dataclasses.asdict(self._operation())
        if command == "usage":
            return {
                **usage(),
                "remarks": self.peer.remarks(),
                "compile_seconds": self.peer.compile_seconds(),
            }
        raise ValueError(f"no such command: {command!r}")

    def _prepare(self, scenario: Scenario) -> Operation:
        """The operation, after first runs that nobody times."""
        prepare = getattr(self.peer, scenario.operation)
        if scenario.warm_up is not None:
            warm_up = prepare(**{**scenario.arguments, **scenario.warm_up})
            for _ in range(VARIANTS):  # so that the next run meets another one than the last
                warm_up()
        return prepare(**scenario.arguments)


def usage() -> dict:
    """The largest part of memory that the process ever held, in MiB."""
    with suppress(FileNotFoundError):  # not Linux
        # getrusage() counts also what the process that started this one had held until then.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return {"peak_mib": int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M).group(1)) / 1024}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak / 1024 if sys.platform != "darwin" else peak / (1 << 20)}


def use_cpus(count: int) -> None:
    """Keeps the process on so many CPUs, where the system can.

    To be called before any thread pool is made: some follow this, some the environment.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _keep_stdout() -> IO[str]:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: IO[str], reply: dict) -> None:
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
