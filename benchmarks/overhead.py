"""What a token costs outside of MAX: Python, PyTorch, and the way into a graph and back."""

from __future__ import annotations

from .party import Party
from .peers import PEER
from .results import Overhead
from .scenarios import FORCED_TOKENS, Scenario
from .worker_process import PeerFailed

BEAMS = (1, 5)
WARM_UP_TOKENS = 4


def measure_overhead(party: Party, rounds: int) -> list[Overhead]:
    """Every member that runs on MAX decodes windows, greedily and with beams."""
    found = []
    for (peer, _), worker in party.workers.items():
        if not PEER[peer].ours:
            continue
        for beams in BEAMS:
            one = Overhead(party.model, peer, beams)
            arguments = {"tokens": FORCED_TOKENS, "beams": beams}
            scenario = Scenario(
                "overhead", peer, "overhead", arguments, warm_up={"tokens": WARM_UP_TOKENS}
            )
            try:
                worker.prepare(scenario)
                one.samples = [round(worker.run().seconds, 7) for _ in range(rounds)]
            except PeerFailed as failed:
                one.missing = f"failed: {failed}"
            found.append(one)
    return found
