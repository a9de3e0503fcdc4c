"""Word error rates and tokens on the bundled recordings, with the bundled trained checkpoint."""

from __future__ import annotations

from .inputs import references
from .party import Party
from .peers import BASELINE, PEER
from .peers.interface import NotOffered, Outcome
from .results import NOT_OFFERED, Accuracy
from .scenarios import Scenario
from .word_errors import word_error_rate, words_of
from .worker_process import PeerFailed, WorkerProcess

BEAMS = (1, 5)


def measure_accuracy(party: Party, names: list[str] | None = None) -> list[Accuracy]:
    """Every member transcribes every recording once, greedily.

    Those that promise openai-whisper's tokens, and openai-whisper, do it with beam search too.

    names : recordings to take, default all
    """
    spoken = {
        name: text for name, text in references().items() if names is None or name in names
    }
    found = []
    for beams in BEAMS:
        baseline: dict[str, Outcome] = {}
        for (peer, _), worker in party.workers.items():
            if beams > 1 and peer != BASELINE and not PEER[peer].ours:
                continue
            one = Accuracy(peer, beams)
            try:
                outcomes = {name: _transcribe(worker, name, beams) for name in spoken}
            except NotOffered as reason:
                one.missing = f"{NOT_OFFERED}: {reason}"
            except PeerFailed as failed:
                one.missing = f"failed: {failed}"
            else:
                baseline = outcomes if peer == BASELINE else baseline
                fill(one, spoken, outcomes, baseline)
            found.append(one)
    return found


def fill(
    accuracy: Accuracy,
    spoken: dict[str, str | None],
    outcomes: dict[str, Outcome],
    baseline: dict[str, Outcome],
) -> None:
    """Compares transcriptions, by recording, with what is said and with the baseline's tokens.

    spoken : None where it is not known what is said
    """
    known = {name: text for name, text in spoken.items() if text is not None}
    accuracy.word_errors = word_error_rate(
        (text, outcomes[name].text) for name, text in known.items()
    )
    accuracy.words = sum(len(words_of(text)) for text in known.values())
    accuracy.recordings = len(spoken)
    accuracy.identical = sum(
        name in baseline and outcomes[name].tokens == baseline[name].tokens for name in spoken
    )


def _transcribe(worker: WorkerProcess, name: str, beams: int) -> Outcome:
    arguments = {"audio": name, "beams": beams, "words": False}
    worker.prepare(Scenario("accuracy", name, "speech", arguments, warm_up=None))
    return worker.run()
