"""The peers of the benchmarks: attendance, the worker, and the adapters that can run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from whisper.tokenizer import get_tokenizer

from benchmarks import inputs, weights
from benchmarks.inputs import Inputs
from benchmarks.models import SIZES, TRAINED, WITH_WORDS, Model
from benchmarks.peers import BASELINE, PEER, PEERS
from benchmarks.peers.interface import Alternating, NotOffered, Outcome, Peer, Setup
from benchmarks.scenarios import SCENARIOS
from benchmarks.worker import Server
from whisper_max import demo

MELS = 80
ROOT = Path(__file__).parents[1]


class FakePeer(Peer):
    """Counts how often its operation ran with which arguments."""

    def __init__(self) -> None:
        self.runs: list[tuple] = []

    def window(self, tokens, beams, words):
        def run() -> Outcome:
            self.runs.append((tokens, beams, words))
            return Outcome(0.5, [[1] * tokens])

        return run


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    """The bundled model, with noise for windows and a little speech for a clip."""
    work = tmp_path_factory.mktemp("work")
    made = Inputs(work)
    made.folder.mkdir()
    noise = np.random.default_rng(0).normal(size=(2, MELS, 3000)).astype(np.float32)
    np.save(made.folder / f"mel-{MELS}.npy", noise * 0.3)
    np.save(made.folder / "clip.npy", demo.read_wav(demo.RECORDING)[: 3 * inputs.SAMPLE_RATE])
    return Setup(Model(TRAINED, work), made, threads=1, variant="")


def test_what_is_not_installed_is_absent_and_no_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for entry in PEERS:
        assert entry.why_absent(set()).startswith("not installed: ")


def test_bfloat16_is_absent_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert "emulated" in PEER["torch-bf16"].why_absent({"avx512f"})
    assert PEER["torch-bf16"].why_absent({"avx512f", "avx512_bf16"}) == ""
    assert PEER[BASELINE].why_absent({"avx512f"}) == ""


def test_names_of_peers_are_unique_and_the_baseline_comes_first():
    assert len(PEER) == len(PEERS)
    assert PEERS[0].name == BASELINE  # others are compared with its outcomes


def test_every_scenario_is_an_operation_of_the_interface(setup):
    for scenario in SCENARIOS:
        with pytest.raises(NotOffered):
            getattr(Peer(setup), scenario.operation)(**scenario.arguments)


def test_recordings_are_transcribed_one_by_one(setup):
    class Clock(Peer):
        def speech(self, audio, beams, words, retries=True):
            assert (beams, words) == (1, False)
            return lambda: Outcome(0.5, [[1], [2]], audio)

    outcome = Clock(setup).recordings(beams=1)()
    names = setup.inputs.bundled
    assert outcome.seconds == 0.5 * len(names) > 5
    assert outcome.tokens == [[1], [2]] * len(names)
    assert outcome.text.split() == names


def test_worker_warms_up_with_shorter_runs_and_answers():
    peer = FakePeer()
    server = Server(peer)
    window = {
        "name": "window",
        "title": "",
        "operation": "window",
        "arguments": {"tokens": 100, "beams": 1, "words": False},
        "warm_up": {"tokens": 4},
    }
    assert server.answer({"command": "prepare", "scenario": window}) == {}
    assert peer.runs == [(4, 1, False)] * inputs.VARIANTS
    answer = server.answer({"command": "run"})
    assert Outcome(**json.loads(json.dumps(answer))) == Outcome(0.5, [[1] * 100])
    assert peer.runs[-1] == (100, 1, False)
    assert server.answer({"command": "usage"})["peak_mib"] > 1


def test_memory_is_what_the_process_held_itself():
    held = np.ones(1 << 28, np.uint8)  # by the process that starts the other, and 256 MiB
    program = "from benchmarks.worker import usage; print(usage()['peak_mib'])"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert held.all() and 1 < float(printed) < 200


def test_worker_says_what_its_peer_does_not_offer():
    encoder = {"name": "encoder", "title": "", "operation": "encoder"}
    answer = Server(FakePeer()).answer({"command": "prepare", "scenario": encoder})
    assert list(answer) == ["not_offered"]


def test_items_alternate():
    alternating = Alternating("ab")
    assert "".join(alternating.next() for _ in range(5)) == "ababa"


def test_whisper_decodes_exactly_the_forced_tokens(setup):
    peer = PEER[BASELINE].load(setup)
    for beams in (1, 2):
        outcome = peer.window(tokens=3, beams=beams, words=False)()
        assert [len(tokens) for tokens in outcome.tokens] == [3]
        assert outcome.seconds > 0


def test_whisper_times_every_component(setup):
    peer = PEER[BASELINE].load(setup)
    for operation in (peer.encoder(), peer.step(1), peer.step(5), peer.prefill()):
        assert 0 < operation().seconds < 60
    words = peer.window(tokens=4, beams=1, words=True)().words
    assert all(0 <= start <= end <= 30 for start, end, _ in words)
    spoken = peer.speech("clip", beams=1, words=False)()
    assert spoken.text and spoken.words is None


def test_inputs_are_the_same_for_all_and_differ_from_turn_to_turn(setup):
    first, second = setup.inputs.audio("clip")
    assert len(second) == len(first) + inputs.DELAY
    assert len(setup.history) == 100
    assert setup.history == Inputs(setup.inputs.work).history(99)
    assert setup.history[-4:] == setup.prompt


@pytest.mark.parametrize("name", [*SIZES, *WITH_WORDS])
def test_tokens_are_of_the_models_vocabulary(tmp_path, name):
    model = Model(name, tmp_path)
    tokenizer = get_tokenizer(multilingual=True, num_languages=model.languages)
    setup = Setup(model, Inputs(tmp_path), threads=1, variant="")
    sequence = [tokenizer.sot, tokenizer.to_language_token("en"), tokenizer.transcribe]
    assert setup.prompt == [*sequence, tokenizer.no_timestamps]
    assert setup.history[0] == tokenizer.sot_prev
    assert inputs.END_OF_TEXT == tokenizer.eot
    assert model.n_mels == model.dimensions()["n_mels"]


def test_long_speech_is_made_of_the_english_recordings():
    bundled = {name: np.full(10, i, np.float32) for i, name in enumerate(inputs.references())}
    made = inputs.recordings(bundled)
    assert len(made["speech"]) == 600 * 16000
    english = {value[0] for name, value in bundled.items() if name.startswith("en")}
    assert set(np.unique(made["speech"])) == english
    np.testing.assert_array_equal(made["clip"], bundled["en01"])


def test_random_weights_are_float16_and_the_same_every_time(tmp_path, monkeypatch):
    small = {**Model("tiny", tmp_path).dimensions(), "n_vocab": 100}
    small |= {f"n_{part}_{what}": 1 for part in ("audio", "text") for what in ("head", "layer")}
    small |= {"n_audio_state": 64, "n_text_state": 64}
    monkeypatch.setattr(Model, "dimensions", lambda model: small)
    for name in ("one", "two"):
        weights.save_random(Model("tiny", tmp_path), tmp_path / name)
    one, two = (torch.load(tmp_path / name)["model_state_dict"] for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in one.values())


def test_conversion_knows_every_parameter(tmp_path):
    transformers = pytest.importorskip("transformers")
    from benchmarks import conversion

    conversion.to_transformers(Model(TRAINED, tmp_path), tmp_path / "converted")
    _, found = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
