"""Results and peers made up for the tests of the benchmarks."""

from __future__ import annotations

from benchmarks.peers.interface import NotOffered, Outcome
from benchmarks.results import Accuracy, FirstRun, Measurement, Overhead, Results, Start
from benchmarks.worker_process import PeerFailed

TINY = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 384,
    "n_audio_head": 6,
    "n_audio_layer": 4,
    "n_vocab": 51865,
    "n_text_ctx": 448,
    "n_text_state": 384,
    "n_text_head": 6,
    "n_text_layer": 4,
}


def made_up_results() -> Results:
    """A run in which whisper_max wins the encoder, and faster-whisper a window."""
    results = Results(
        machine={"cpu_model": "Some CPU", "cpus": 2, "busy_cpus": 0.0},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        measured="2026-01-02T03:04:05+00:00",
        threads=2,
        absent={"openvino-fp32": "not installed: openvino"},
        models={"tiny": TINY},
        ceilings={
            "float32_gflops": 300.0,
            "bfloat16_gflops": None,
            "copy_gbytes": 20.0,
            "read_gbytes": 25.0,
        },
        compile_seconds={"whisper_max-high": {"tiny": 45.0}},
        minutes=1.5,
    )
    times = {
        ("encoder", "whisper"): [0.2, 0.4, 0.2],
        ("encoder", "whisper_max-high"): [0.1, 0.1, 0.05],
        ("encoder", "faster-whisper-int8"): [0.2, 0.2, 0.2],
        ("window", "whisper"): [1.0, 1.0, 1.0],
        ("window", "whisper_max-high"): [0.5, 0.5, 0.5],
        ("window", "faster-whisper-int8"): [0.25, 0.25, 0.25],
    }
    for (scenario, peer), samples in times.items():
        one = Measurement(scenario, "tiny", peer, 2, samples)
        if scenario == "window":
            one.tokens, one.audio_seconds, one.identical = 100, 30.0, peer != "whisper_max-high"
        results.measurements.append(one)
    results.measurements.append(
        Measurement("window", "tiny", "transformers", 2, missing="failed: out | of\nmemory")
    )
    results.thread_scaling = [
        Measurement("encoder", "tiny", "whisper", threads, [0.4 / threads]) for threads in (1, 2)
    ]
    results.starts = [
        Start("tiny", "whisper", [2.0], [1.5], [1.0], [300.0], [400.0]),
        Start("tiny", "whisper_max-high", [2.5], [0.8], [0.5], [350.0], [500.0]),
    ]
    results.overheads = [
        Overhead("tiny", "whisper_max-high", 1, [1e-4, 3e-4, 2e-4]),
        Overhead("tiny", "whisper_max-high", 5, missing="failed: it ended"),
    ]
    results.accuracy = [
        Accuracy("whisper", 1, 0.125, 3, 3),
        Accuracy("whisper_max-high", 1, 0.125, 3, 3, words=16),
        Accuracy("transformers", 5, missing="failed: it ended"),
    ]
    results.first_run = FirstRun(
        "micro", [[1.0, 2.0], [1.0, 2.0]], [[1.4, 2.2], [1.5, 2.6, 3.0, 3.2]], 3, True
    )
    return results


class FakeWorker:
    """In place of a peer's process: gives out its outcomes, and fails when they are used up."""

    def __init__(self, outcomes: list[Outcome], offered: bool = True) -> None:
        self.outcomes = list(outcomes)
        self.offered = offered
        self.closed = False

    def prepare(self, scenario) -> None:
        if not self.offered:
            raise NotOffered("it has none")

    def run(self) -> Outcome:
        if not self.outcomes:
            raise PeerFailed("it ended")
        return self.outcomes.pop(0)

    def usage(self) -> dict:
        return {"remarks": ["a remark"], "compile_seconds": None, "peak_mib": 1.0}

    def close(self) -> None:
        self.closed = True
