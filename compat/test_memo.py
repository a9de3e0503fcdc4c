"""What is remembered between calls is never wrong: same audio, changed audio, changed weights."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import assert_close, on_pytorch
from recordings import samples
from strategies import numbers, small, token_rows
from whisper_max import UnsupportedByMax, settings
from whisper_max.runtime import model_state
from whisper_max.runtime.decoder_session import DecoderSession
from whisper_max.runtime.cross_cache import CrossCache
from whisper_max.runtime.engine import Engine


@pytest.fixture
def executed(monkeypatch) -> Counter:
    """How often each graph was executed."""
    counts: Counter = Counter()
    execute = Engine.execute

    def counting(self, graph, *operands):
        counts[graph] += 1
        return execute(self, graph, *operands)

    monkeypatch.setattr(Engine, "execute", counting)
    return counts


@pytest.fixture
def model(strict):
    return small().build()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_same_audio_is_encoded_once(model, executed):
    mel = numbers((1, 80, 120), 1)
    first, second, third = model.encoder(mel), model.encoder(mel), model.encoder(mel.clone())
    assert executed["encoder"] == 1
    assert torch.equal(first, second) and torch.equal(first, third)


def test_edited_audio_is_encoded_anew(model, executed):
    mel = numbers((1, 80, 120), 1)
    model.encoder(mel)
    mel[0, 3, 7] += 1
    assert_close(model.encoder(mel), on_pytorch(model).encoder(mel))
    mel.numpy()[0, 4, 8] += 1  # behind PyTorch's back
    assert_close(model.encoder(mel), on_pytorch(model).encoder(mel))
    assert executed["encoder"] == 3


def test_audio_that_changes_while_it_is_encoded_is_not_taken_for_what_it_became(
    model, monkeypatch
):
    mel, later = numbers((1, 80, 120), 1), numbers((1, 80, 120), 2)
    execute = Engine.execute

    def changing(self, graph, *operands):
        results = execute(self, graph, *operands)
        if graph == "encoder":
            mel.copy_(later)
        return results

    monkeypatch.setattr(Engine, "execute", changing)
    model.encoder(mel)
    monkeypatch.setattr(Engine, "execute", execute)
    assert_close(model.encoder(mel), on_pytorch(model).encoder(later))


def test_what_was_returned_is_the_callers(model):
    mel, features = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
    tokens = token_rows((2, 5), 100, 1)
    encoded, logits = model.encoder(mel).clone(), model.decoder(tokens, features).clone()
    for _ in range(2):
        model.encoder(mel).fill_(-torch.inf)
        model.decoder(tokens, features).fill_(-torch.inf)
    assert torch.equal(model.encoder(mel), encoded)
    assert torch.equal(model.decoder(tokens, features), logits)


def test_the_callers_audio_and_features_are_left_alone(model):
    mel, features = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
    before = mel.clone(), features.clone()
    model.encoder(mel)
    model.decoder(token_rows((2, 5), 100, 1), features)
    assert torch.equal(mel, before[0]) and torch.equal(features, before[1])


def test_cross_attention_is_prepared_once_per_window(model, executed):
    features = numbers((1, 60, 128), 2)
    for step in range(3):
        model.decoder(token_rows((2, 5), 100, step), features)
        model.decoder(token_rows((5, 5), 100, step), features.repeat(5, 1, 1))
    assert executed["cross_kv"] == 1
    features[0, 2, 3] += 1
    tokens = token_rows((2, 5), 100, 9)
    assert_close(model.decoder(tokens, features), on_pytorch(model).decoder(tokens, features))
    assert executed["cross_kv"] == 2


FEATURES = st.builds(
    numbers,
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.just(128)),
    st.integers(0, 100),
    st.sampled_from([0.0, 1e-3, 1.0, 1e12]),
)


def cross_cache(decoder, features) -> CrossCache:
    """Keys and values of a small model's decoder."""
    state = model_state.state_of(decoder, "decoder")
    ready = state.ready(decoder, settings.active())
    return CrossCache(ready.engine, ready.packed[0], features, 2, ready.cross, state.pool)


@given(features=FEATURES)
def test_what_is_read_of_features_is_remembered_and_measured(model, features):
    cross = cross_cache(model.decoder, features)
    if len(features) == 1:
        assert torch.equal(cross.copied, features)
    else:
        assert len(cross.copied) == 0  # several windows are not remembered
    expected = features.double().norm(dim=-1).max().item()
    assert cross.max_norm == pytest.approx(expected, rel=1e-5)


@given(FEATURES, st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]), st.data())
def test_one_number_that_is_none_is_seen(model, features, value, data):
    place = tuple(data.draw(st.integers(0, size - 1)) for size in features.shape)
    features[place] = value
    assert not cross_cache(model.decoder, features).max_norm <= 1e15


def test_features_that_are_not_finite_are_pytorchs(model):
    features = numbers((1, 60, 128), 2)
    features[0, 59, 127] = torch.nan
    with pytest.raises(UnsupportedByMax, match="audio features hold values that are not finite"):
        model.decoder(token_rows((1, 5), 100, 1), features)
    features[0, 59, 127] = 0
    tokens = token_rows((2, 5), 100, 1)
    assert_close(model.decoder(tokens, features), on_pytorch(model).decoder(tokens, features))


def test_weights_exchanged_through_data_for_others_in_the_same_memory(model):
    """As `model.half().float()` may leave them: the address and the version are the same."""
    mel, bias = numbers((1, 80, 120), 1), model.encoder.conv1.bias
    memory = bias.numpy().copy()
    bias.data = torch.from_numpy(memory)
    assert_close(model.encoder(mel), on_pytorch(model).encoder(mel))
    bias.data = torch.zeros(128)
    memory += 3
    bias.data = torch.from_numpy(memory)
    assert_close(model.encoder(mel), on_pytorch(model).encoder(mel))


def test_models_do_not_share_what_is_remembered(strict):
    one, other = small().build(), small().build()
    other.encoder.conv1.weight.mul_(1.5)
    other.decoder.token_embedding.weight.mul_(0.5)
    mel, features = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
    tokens = token_rows((2, 5), 100, 1)
    for model in (one, other, one, other):
        assert_close(model.encoder(mel), on_pytorch(model).encoder(mel))
        assert_close(model.decoder(tokens, features), on_pytorch(model).decoder(tokens, features))


@given(st.data())
def test_any_order_of_calls_and_edits(strict, data):
    model = small().build()
    mels = [numbers((batch, 80, 120), batch) for batch in (1, 2)]
    choices = st.sampled_from(["call", "edit the audio", "edit a weight", "edit the result"])
    result = None
    for _ in range(data.draw(st.integers(1, 8))):
        mel = data.draw(st.sampled_from(mels))
        match data.draw(choices):
            case "edit the audio":
                mel[0, 5, data.draw(st.integers(0, 119))] += 1
            case "edit a weight":
                model.encoder.conv1.bias[data.draw(st.integers(0, 127))] += 0.5
            case "edit the result":
                if result is not None:
                    result.zero_()
        result = model.encoder(mel)
        assert_close(result, on_pytorch(model).encoder(mel))


def test_one_window_is_encoded_once_for_all_that_transcribe_does(
    plain, checkpoint, strict, executed
):
    """Detection of the language, every temperature, and word timestamps."""
    options = {"fp16": False, "word_timestamps": True, "logprob_threshold": 0.0}
    torch.manual_seed(1)
    checkpoint.transcribe(
        samples("en01"), temperature=(0.0, 0.5, 1.0), no_speech_threshold=None, **options
    )
    assert executed["encoder"] == 1
    assert executed["cross_kv"] == 1


def test_only_single_windows_are_remembered(model, executed):
    """Of the largest models a window's keys and values are 490 MB."""
    features = numbers((3, 60, 128), 2)
    tokens = token_rows((3, 5), 100, 1)
    expected = on_pytorch(model).decoder(tokens, features)
    for _ in range(2):
        assert_close(model.decoder(tokens, features), expected)
        model.encoder(numbers((3, 80, 120), 1))
    assert executed["cross_kv"] == executed["encoder"] == 2
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, CrossCache)]
    model.decoder(tokens, features[:1])
    model.decoder(tokens, features)  # makes room before it takes more
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, CrossCache)]


def open_session(model, features):
    return DecoderSession(model.decoder, features, 1, settings.active())


def keys_of(session) -> int:
    """Where the keys and values of a session's window are."""
    return session._state.cross.keys._data_ptr()


def test_the_next_window_gets_the_memory_of_the_last(model):
    tokens, twin = token_rows((1, 5), 100, 1), on_pytorch(model)
    places = set()
    for seed in range(3):
        features = numbers((1, 60, 128), seed)
        session = open_session(model, features)
        places.add(keys_of(session))
        assert_close(session.prefill(tokens, range(5)), twin.decoder(tokens, features))
        del session
    assert len(places) == 1


def test_a_window_that_is_still_decoded_keeps_its_memory(model):
    tokens, twin = token_rows((1, 5), 100, 1), on_pytorch(model)
    features = [numbers((1, 60, 128), seed) for seed in range(4)]
    sessions = [open_session(model, window) for window in features]
    assert len({keys_of(session) for session in sessions}) == 4
    for session, window in zip(sessions, features):
        assert_close(session.prefill(tokens, range(5)), twin.decoder(tokens, window))


def test_windows_of_another_length_get_memory_of_their_own(model):
    tokens, twin = token_rows((1, 5), 100, 1), on_pytorch(model)
    for frames in (60, 200, 60):
        features = numbers((1, frames, 128), frames)
        session = open_session(model, features)
        assert_close(session.prefill(tokens, range(5)), twin.decoder(tokens, features))


def test_spare_memory_goes_with_its_model(model):
    session = open_session(model, numbers((1, 60, 128), 1))
    pool = weakref.ref(model_state.state_of(model.decoder, "decoder").pool)
    model_state.drop(model.decoder)
    gc.collect()
    assert pool() is None
    tokens = token_rows((1, 5), 100, 1)
    features = numbers((1, 60, 128), 1)
    assert_close(session.prefill(tokens, range(5)), on_pytorch(model).decoder(tokens, features))
