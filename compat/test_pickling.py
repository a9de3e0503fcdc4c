"""Models on MAX travel as any other: copies, pickles and checkpoints, also to where MAX is not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import whisper

import whisper_max
from harness import assert_close, load_checkpoint, on_max
from recordings import assert_same_result, samples
from strategies import numbers, small, token_rows
from whisper_max.runtime import model_state

MEL, TOKENS = numbers((1, 80, 120), 1), token_rows((2, 5), 100, 3)

ELSEWHERE = """
import sys
sys.modules["whisper_max"] = None  # what an import of it finds where it is not installed
import torch, whisper
model = torch.load(sys.argv[1], weights_only=False)
names = [type(part).__module__ + "." + type(part).__qualname__ for part in model.children()]
assert names == ["whisper.model.AudioEncoder", "whisper.model.TextDecoder"], names
mel, tokens, expected = torch.load(sys.argv[2])
torch.set_num_threads(2)
with torch.no_grad():
    # Not bit by bit: MKL's sums go by where the operands lie in memory.
    torch.testing.assert_close(model(mel, tokens), expected, rtol=1e-5, atol=1e-5)
"""


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def expected():
    """What PyTorch makes of MEL and TOKENS."""
    return small().build()(MEL, TOKENS)


def in_use():
    """A model that MAX has already worked for; made while whisper is patched."""
    model = small().build()
    model(MEL, TOKENS)
    return model


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_saved_model_loads_where_whisper_max_is_not_installed(tmp_path, expected, protocol):
    path, call = tmp_path / "model.pt", tmp_path / "call.pt"
    torch.save((MEL, TOKENS, expected), call)
    with on_max():
        torch.save(in_use(), path, pickle_protocol=protocol)
    if protocol in (2, pickle.HIGHEST_PROTOCOL):  # a new process takes its time
        command = [sys.executable, "-c", ELSEWHERE, str(path), str(call)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    loaded = torch.load(path, weights_only=False)
    assert type(loaded.encoder) is whisper.model.AudioEncoder
    assert torch.equal(loaded(MEL, TOKENS), expected)


def test_pickled_models_come_back_on_max_where_whisper_is_patched(expected):
    plain = pickle.dumps(small().build())
    with on_max():
        ours = pickle.dumps(in_use())
        for pickled in (plain, ours):
            model = pickle.loads(pickled)
            assert type(model.decoder).__name__ == "MaxTextDecoder"
            assert_close(model(MEL, TOKENS), expected)


def test_nothing_of_max_is_in_what_is_saved():
    with on_max():
        model = in_use()
        pickled = pickle.dumps(model)
        assert b"whisper_max" not in pickled
        whisper_max.restore(model)
        assert model.state_dict().keys() == small().build().state_dict().keys()
    assert len(pickled) == pytest.approx(len(pickle.dumps(small().build())), rel=0.01)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copies_have_a_state_of_their_own(expected, how):
    with on_max():
        model = in_use()
        twin = how(model)
        assert type(twin.encoder) is type(model.encoder)
        assert_close(twin(MEL, TOKENS), expected)
        if how is copy.deepcopy:
            twin.encoder.conv1.weight.zero_()
            twin.decoder.ln.bias.add_(1)
        assert_close(model(MEL, TOKENS), expected)
        states = [model_state.state_of(m.encoder, "encoder") for m in (model, twin)]
        assert (states[0] is states[1]) == (how is copy.copy)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_subclass_says_how_it_is_copied(how):
    with on_max():

        class WithALock(whisper.model.AudioEncoder):
            def __init__(self, *sizes):
                super().__init__(*sizes)
                self.lock = threading.Lock()

            def __getstate__(self):
                return {**self.__dict__, "lock": None}

            def __setstate__(self, state):
                super().__setstate__(state)
                self.lock = threading.Lock()

        one = WithALock(80, 60, 128, 2, 1)
        twin = how(one)
        assert type(twin) is WithALock and twin.lock is not one.lock
        assert (twin.conv1.weight is one.conv1.weight) == (how is copy.copy)


@pytest.mark.parametrize("how", ["the model", "its parts"])
def test_copies_of_accelerated_models_run_on_max_as_well(expected, how, monkeypatch):
    monkeypatch.setenv("WHISPER_MAX_MODE", "strict")
    monkeypatch.setenv("WHISPER_MAX_COMPILE", "blocking")
    model = whisper_max.accelerate(small().build())
    if how == "the model":
        twin = copy.deepcopy(model)
    else:
        twin = small().build()
        twin.encoder, twin.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    del model
    assert_close(twin(MEL, TOKENS), expected)
    for target in ("encoder", "decoder"):
        counted = whisper_max.status().targets[target]
        assert (counted.max_calls, counted.torch_calls) == (1, 0)
    whisper_max.restore(twin)
    assert torch.equal(twin(MEL, TOKENS), expected)


def test_models_in_upstreams_classes_can_be_saved_while_whisper_is_patched(tmp_path, expected):
    """Those loaded before patch(), and those given back by restore()."""
    model = small().build()
    before = pickle.dumps(model)
    with on_max():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickled = pickle.dumps(model, protocol)
            assert type(pickle.loads(pickled).encoder).__name__ == "MaxAudioEncoder"
        torch.save(whisper_max.restore(in_use()), tmp_path / "model.pt")
        for twin in (copy.copy(model.encoder), copy.deepcopy(model).encoder):
            assert type(twin) is type(model.encoder)
    for loaded in (pickle.loads(pickled), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(loaded.encoder) is whisper.model.AudioEncoder
        assert torch.equal(loaded(MEL, TOKENS), expected)
    assert pickle.dumps(model) == before  # nothing stays behind


def test_states_go_into_fresh_models(expected):
    with on_max():
        state = in_use().state_dict()
        fresh = whisper.model.Whisper(small().dims).requires_grad_(False)
        fresh.decoder.positional_embedding.zero_()  # upstream leaves there what was in the memory
        fresh(MEL, TOKENS)
        fresh.load_state_dict(state)
        assert_close(fresh(MEL, TOKENS), expected)
    plain = whisper.model.Whisper(small().dims).requires_grad_(False)
    plain.load_state_dict(state)
    assert torch.equal(plain(MEL, TOKENS), expected)


def test_a_checkpoint_written_from_a_model_on_max(tmp_path, plain):
    """In upstream's own format, by the code that people use for it."""
    path = tmp_path / "again.pt"
    with on_max():
        model = load_checkpoint()
        state = {"dims": vars(model.dims), "model_state_dict": model.state_dict()}
        torch.save(state, path)
        again = whisper.load_model(str(path), device="cpu")
        found = again.transcribe(samples("en01"), fp16=False)
    assert_same_result(found, plain.transcribe(samples("en01"), fp16=False))
