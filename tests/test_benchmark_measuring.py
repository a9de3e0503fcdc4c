"""How the benchmarks measure: statistics, turns, forced tokens, word errors, work."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import accuracy, machine, work
from benchmarks.inputs import recordings, references
from benchmarks.interleaving import FEWEST_ROUNDS, interleave
from benchmarks.merging import merged, why_apart
from benchmarks.models import WITH_WORDS
from benchmarks.overhead import measure_overhead
from benchmarks.party import Party, fill, same_result
from benchmarks.peers import PEER
from benchmarks.peers.interface import Outcome
from benchmarks.report.others import first_run_lines
from benchmarks.results import Accuracy, Measurement, Overhead
from benchmarks.samples import speed_up, summarize
from benchmarks.scenarios import FORCED_TOKENS, NAMES, SCENARIO, shortened
from benchmarks.word_errors import edit_distance, word_error_rate
from benchmarks.worker_process import wait_until_idle

from benchmark_fakes import TINY, FakeWorker, made_up_results

SECONDS = st.floats(1e-6, 1e3)


# Statistics


def test_median_and_quartiles():
    summary = summarize([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (3.0, 2.0, 4.0, 5)


@settings(deadline=None)  # on a busy machine
@given(st.lists(SECONDS, min_size=1))
def test_half_of_the_samples_lie_within_the_quartiles(samples):
    summary = summarize(samples)
    assert min(samples) <= summary.low <= summary.median <= summary.high <= max(samples)


def test_no_samples_have_no_median():
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_speed_up_is_of_pairs_and_not_of_medians():
    # The machine is three times slower in the middle round, for both.
    assert speed_up([1.0, 3.0, 1.0], [0.5, 1.5, 0.5]).median == 2.0
    assert speed_up([1.0, 3.0, 1.0], [0.5, 1.5, 0.5]).low == 2.0


@settings(deadline=None)  # on a busy machine
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1), st.floats(0.1, 10))
def test_speed_up_does_not_depend_on_how_fast_the_machine_is(pairs, factor):
    baseline, samples = zip(*pairs)
    slower = [[seconds * factor for seconds in times] for times in (baseline, samples)]
    assert speed_up(*slower).median == pytest.approx(speed_up(baseline, samples).median)


# Turns


def test_everybody_takes_a_turn_in_every_round():
    order = []
    turns = {name: lambda name=name: order.append(name) or Outcome(1.0) for name in "ABC"}
    outcomes, failures = interleave(turns, rounds=3, seconds=60)
    assert "".join(order) == "ABCABCABC"
    assert {name: len(runs) for name, runs in outcomes.items()} == {"A": 3, "B": 3, "C": 3}
    assert not failures


def test_no_round_starts_after_the_time_is_over():
    clock = iter(range(100))
    outcomes, _ = interleave({"A": lambda: Outcome(1.0)}, 50, seconds=10, clock=clock.__next__)
    assert FEWEST_ROUNDS < len(outcomes["A"]) < 50
    outcomes, _ = interleave({"A": lambda: Outcome(1.0)}, 50, seconds=0)
    assert len(outcomes["A"]) == FEWEST_ROUNDS


def test_who_fails_in_one_round_has_no_outcomes_and_stops_nobody():
    failing = FakeWorker([Outcome(1.0)])
    outcomes, failures = interleave(
        {"A": failing.run, "B": lambda: Outcome(2.0)}, rounds=3, seconds=60
    )
    assert failures == {"A": "it ended"}
    assert [outcome.seconds for outcome in outcomes["B"]] == [2.0, 2.0, 2.0]
    assert "A" not in outcomes


def test_party_reports_who_is_missing_and_why(tmp_path):
    window = [Outcome(1.0, [[7] * FORCED_TOKENS]) for _ in range(3)]
    workers = {
        "whisper": FakeWorker(window),
        "whisper_max-high": FakeWorker([dataclasses.replace(o, seconds=0.5) for o in window]),
        "openvino-fp32": FakeWorker([], offered=False),
        "transformers": FakeWorker([]),
        "faster-whisper-int8": FakeWorker([Outcome(0.1, [[7] * 52])] * 3),
    }
    said = []
    party = Party([(PEER[name], 2) for name in workers], "tiny", tmp_path, said.append)
    party.workers = {(name, 2): worker for name, worker in workers.items()}
    found = {one.peer: one for one in party.measure(shortened(SCENARIO["window"], 3, False))}
    assert found["whisper"].samples == [1.0, 1.0, 1.0]
    assert found["whisper_max-high"].identical is True
    assert found["whisper_max-high"].remarks == ["a remark"]
    assert found["openvino-fp32"].missing == "not offered: it has none"
    assert found["transformers"].missing == "failed: it ended"
    assert workers["transformers"].closed
    assert found["faster-whisper-int8"].missing == "failed: it decoded 52 tokens in place of 100"
    assert not found["faster-whisper-int8"].samples


def test_overhead_is_of_those_that_run_on_max(tmp_path):
    workers = {
        "whisper": FakeWorker([]),
        "whisper_max-high": FakeWorker([Outcome(seconds) for seconds in (1.0, 2.0, 3.0, 4.0)]),
        "whisper_max-int8": FakeWorker([Outcome(1.0)] * 3),
    }
    party = Party([(PEER[name], 2) for name in workers], "tiny", tmp_path, print)
    party.workers = {(name, 2): worker for name, worker in workers.items()}
    assert measure_overhead(party, rounds=2) == [
        Overhead("tiny", "whisper_max-high", 1, [1.0, 2.0]),
        Overhead("tiny", "whisper_max-high", 5, [3.0, 4.0]),
        Overhead("tiny", "whisper_max-int8", 1, [1.0, 1.0]),
        Overhead("tiny", "whisper_max-int8", 5, missing="failed: it ended"),
    ]


def test_a_process_is_waited_for_until_it_rests():
    lines = ("from time import time", "end = time() + 0.2", "while time() < end: pass", "print()")
    spinning = "\n".join([*lines, "input()"])
    process = subprocess.Popen([sys.executable, "-c", spinning], stdin=-1, stdout=-1)
    try:
        wait_until_idle(process.pid)
        assert os.read(process.stdout.fileno(), 1) == b"\n"
    finally:
        process.communicate(b"\n")


# Results of runs


def test_token_identity_is_judged_round_by_round():
    one = Measurement("speech", "micro", "whisper_max-high", 2, audio_seconds=40.0)
    ours = [Outcome(1.0, [[1, 2], [3]]), Outcome(1.0, [[4]])]
    fill(one, ours, [Outcome(2.0, [[1, 2], [3]]), Outcome(2.0, [[4]])], forced_tokens=0)
    assert one.identical is True
    assert one.tokens == 2
    fill(one, ours, [Outcome(2.0, [[1, 2], [3]]), Outcome(2.0, [[5]])], forced_tokens=0)
    assert one.identical is False


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ([(0.0, 0.5, " a")], True),
        ([(0.02, 0.48, " a")], True),
        ([(0.04, 0.5, " a")], False),
        ([(0.0, 0.5, " b")], False),
        ([], False),
        (None, True),
    ],
)
def test_words_are_the_same_within_one_audio_frame(words, same):
    expected = Outcome(1.0, [[1]], words=[(0.0, 0.5, " a")])
    assert same_result(Outcome(1.0, [[1]], words=words), expected) is same


def test_word_error_rate_is_of_all_words_together():
    pairs = [("One two three, four!", "one two four"), ("", "noise"), ("Five.", "five")]
    assert word_error_rate(pairs) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="no words"):
        word_error_rate([("", "noise")])


@settings(deadline=None)  # on a busy machine
@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_edit_distance_is_a_distance(one, other):
    distance = edit_distance(one, other)
    assert (distance == 0) == (one == other)
    assert distance == edit_distance(other, one)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))


def test_recordings_without_a_reference_count_for_identity_only():
    spoken = {"a": "one two", "b": None}
    plain = {"a": Outcome(1.0, [[1]], "one two"), "b": Outcome(1.0, [[2]], "what")}
    ours = {"a": Outcome(1.0, [[1]], "one too"), "b": Outcome(1.0, [[3]], "else")}
    one = Accuracy("whisper_max-int8", 1)
    accuracy.fill(one, spoken, ours, plain)
    assert (one.word_errors, one.words, one.identical, one.recordings) == (0.5, 2, 1, 2)


# Work, scenarios, machines


def test_operations_of_tiny_are_those_of_its_matrices():
    # One pass over all matrices of the encoder's blocks for each frame, and attention.
    blocks = 4 * (2 * 1500 * 12 * 384**2 + 4 * 1500**2 * 384)
    stem = 2 * 3000 * 384 * 80 * 3 + 2 * 1500 * 384 * 384 * 3
    assert work.encoder_operations(TINY) == blocks + stem


def test_a_step_reads_weights_once_and_caches():
    weights = 4 * 14 * 384**2 + 51865 * 384
    cross, own = 4 * 2 * 1500 * 384, 4 * 2 * 100 * 384
    assert work.step_bytes(TINY, 1, 4, 4) == 4 * (weights + cross + own)
    assert work.step_bytes(TINY, 5, 1, 2) == weights + 2 * cross + 4 * 5 * own


def test_quick_scenarios_are_shorter_and_repeats_are_as_told():
    quick = shortened(SCENARIO["window"], None, quick=True)
    assert quick.forced_tokens < FORCED_TOKENS and quick.rounds < 3
    assert shortened(SCENARIO["window"], 7, quick=False).rounds == 7
    assert shortened(SCENARIO["window"], None, quick=False) == SCENARIO["window"]
    spoken = shortened(SCENARIO["grown_speech"], None, quick=True)
    assert spoken.arguments["audio"] == "short_speech"
    assert len(set(NAMES)) == len(NAMES)


def test_what_a_scenario_with_a_model_transcribes_is_prepared():
    made = recordings({name: np.zeros(1, np.float32) for name in references()})
    spoken = [scenario for scenario in SCENARIO.values() if scenario.operation == "speech"]
    assert {scenario.arguments["audio"] for scenario in spoken} < set(made)
    assert {scenario.model for scenario in spoken} == set(WITH_WORDS)


def test_machine_names_are_file_names():
    name = machine.name_of({"cpu_model": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cpus": 2})
    assert name == "intel-xeon-2.50ghz-2cpus"
    random.seed(0)
    odd = "".join(map(chr, random.sample(range(32, 0x2000), 200)))
    assert "/" not in machine.name_of({"cpu_model": odd, "cpus": 1})


# Runs put together


def test_what_was_measured_again_replaces_whole_turns():
    old, new = made_up_results(), made_up_results()
    new.measurements = [Measurement("encoder", "tiny", "whisper", 2, [9.0])]
    new.accuracy, new.thread_scaling, new.starts, new.first_run = [], [], [], None
    new.overheads = [Overhead("base", "whisper_max-high", 1, [1e-4])]
    both = merged(old, new)
    assert [one.samples for one in both.of_group("encoder", "tiny")] == [[9.0]]
    assert both.of_group("window", "tiny") == old.of_group("window", "tiny")
    assert (both.accuracy, both.starts) == (old.accuracy, old.starts)
    assert both.first_run == old.first_run
    assert both.overheads == old.overheads + new.overheads
    assert both.minutes == old.minutes + new.minutes


def test_of_two_ceilings_the_higher_one_counts():
    old, new = made_up_results(), made_up_results()
    new.ceilings = {**old.ceilings, "float32_gflops": 250.0, "read_gbytes": 30.0}
    assert merged(old, new).ceilings == {
        "float32_gflops": 300.0,
        "bfloat16_gflops": None,
        "copy_gbytes": 20.0,
        "read_gbytes": 30.0,
    }


def test_who_was_absent_from_the_old_run_stays_absent():
    old, new = made_up_results(), made_up_results()
    new.absent = {}  # of an addition without this peer
    assert merged(old, new).absent == old.absent != {}


def test_a_first_run_of_later_sources_says_so():
    old, new = made_up_results(), made_up_results()
    old.versions = {"torch": "2", "whisper_max": "0.1, sources a"}
    new.versions = {"torch": "2", "whisper_max": "0.1, sources b"}
    assert "versions" in why_apart(old, new)  # there is more in it
    new.measurements, new.accuracy, new.starts, new.overheads = [], [], [], []
    assert "versions" in why_apart(old, new)  # threads, still
    new.thread_scaling = []
    both = merged(old, new)
    assert both.first_run.sources == "0.1, sources b"
    assert (both.versions, both.measurements) == (old.versions, old.measurements)
    assert "measured with whisper_max 0.1, sources b" in first_run_lines(both.first_run)[0]
    new.versions["torch"] = "3"
    assert "versions" in why_apart(old, new)


@pytest.mark.parametrize(
    ("field", "value"),
    [("versions", {"torch": "9"}), ("threads", 1), ("machine", {"cpu_model": "b", "cpus": 9})],
)
def test_runs_of_different_machines_or_versions_stay_apart(field, value):
    old, new = made_up_results(), dataclasses.replace(made_up_results(), **{field: value})
    assert field in why_apart(old, new)
    with pytest.raises(ValueError, match="without --add"):
        merged(old, new)
