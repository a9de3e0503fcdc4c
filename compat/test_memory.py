"""Memory that runs out, numbers that do not fit, and errors that are not MAX's."""

from __future__ import annotations

import ctypes
import gc
import signal
import threading
import weakref

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper import decoding

import whisper_max
from harness import on_max, with_fallback
from recordings import samples
from strategies import numbers, seeds, small, token_rows
from whisper_max.dispatch import out_of_memory_is_unsupported
from whisper_max.runtime import decoder_session, loading, model_state, weights

MEL, FEATURES = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
TOKENS = token_rows((2, 5), 100, 3)

pytestmark = pytest.mark.allow_fallback


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return small().build()


def run_out(*args, **options):
    """What torch.empty does on a machine without memory; not to be taken for its text."""
    torch.empty(1 << 50)


def run_out_in_numpy(*args, **options):
    exec("raise MemoryError('Unable to allocate 2.00 TiB for an array')", {"__name__": "numpy"})


def call(model, target):
    return model.encoder(MEL) if target == "encoder" else model.decoder(TOKENS, FEATURES)


def assert_on_pytorch(model, target, reason, **settings):
    with whisper_max.disabled():
        expected = call(model, target)
    with whisper_max.patched(mode="auto", compile="blocking", **settings):
        found = call(whisper_max.accelerate(model), target)
        counted = whisper_max.status().targets[target]
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected))
    assert torch.equal(found.isnan(), expected.isnan())
    assert counted.max_calls == 0
    assert any(reason in text for text in counted.reasons), counted.reasons


@pytest.mark.parametrize("failing", [run_out, run_out_in_numpy])
@pytest.mark.parametrize(
    ("target", "owner", "name"),
    [
        ("encoder", weights, "pack_encoder"),
        ("decoder", weights, "pack_decoder"),
        ("decoder", decoder_session, "CrossCache"),
        ("decoder", decoder_session, "DecoderState"),
        ("encoder", model_state.Memo, "keep"),
    ],
)
def test_memory_runs_out(model, monkeypatch, target, owner, name, failing):
    monkeypatch.setattr(owner, name, failing)
    assert_on_pytorch(model, target, "memory ran out: ")


@pytest.mark.parametrize("step", [0, 3])
def test_memory_runs_out_in_a_decode(model, monkeypatch, step):
    def decode():
        inference = decoding.PyTorchInference(model, 3)
        tokens = token_rows((2, 8), 100, 1)
        found = [inference.logits(tokens[:, :end], FEATURES) for end in range(3, 9)]
        inference.cleanup_caching()
        return torch.cat(found, dim=1)

    expected = decode()
    steps, to_buffer = iter(range(100)), decoder_session.to_buffer

    def failing(tensor):
        return run_out() if next(steps) >= step else to_buffer(tensor)

    with whisper_max.patched(mode="auto", compile="blocking"):
        monkeypatch.setattr(decoder_session, "to_buffer", failing)
        torch.testing.assert_close(decode(), expected, rtol=1e-4, atol=1e-4)
        reasons = whisper_max.status().targets["inference"].reasons
    assert any("memory ran out" in reason for reason in reasons), reasons


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("shapes do not match"), ValueError("memory"), KeyError("memory")):
        with pytest.raises(type(error)), out_of_memory_is_unsupported():
            raise error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("encoder", "conv1.weight"),
        ("encoder", "blocks.0.attn.query.bias"),
        ("encoder", "positional_embedding"),
        ("decoder", "token_embedding.weight"),
        ("decoder", "blocks.1.cross_attn.key.weight"),
        ("decoder", "ln.bias"),
    ],
)
def test_weights_that_are_not_finite(model, target, name, value):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors[f"{target}.{name}"].view(-1)[7] = value
    assert_on_pytorch(model, target, f"{name} holds values that are not finite, or beyond 1e+05")


def test_weights_are_looked_at_once(model, monkeypatch):
    """Also those that MAX does not take: a call must not read them all to find that out."""
    model.encoder.conv1.bias[0] = float("inf")
    looks = []
    look_at = model_state.ModelState._look_at
    monkeypatch.setattr(
        model_state.ModelState, "_look_at", lambda *args: (looks.append(1), look_at(*args))
    )
    with whisper_max.patched(mode="auto", compile="blocking"):
        whisper_max.accelerate(model)
        for _ in range(3):
            call(model, "encoder")
        assert len(looks) == 1
        model.encoder.conv1.bias[0] = 1
        call(model, "encoder")
        assert len(looks) == 2
        assert whisper_max.status().targets["encoder"].max_calls == 1


def test_weights_are_looked_at_once_while_pytorch_decodes(checkpoint, tmp_path, monkeypatch):
    """As until the graphs are compiled. A decode's caches are hooks, and no sign of a change."""
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(loading, "_engines", {})
    looks = []
    look = model_state.ModelState._look_at
    monkeypatch.setattr(
        model_state.ModelState,
        "_look_at",
        lambda self, *details: looks.append(self.kind) or look(self, *details),
    )
    with whisper_max.patched(compile="cached"):
        for name in ("en01", "es01"):
            checkpoint.transcribe(samples(name), fp16=False)
        served = whisper_max.status().targets["decoding_loop"]
    assert served.torch_calls >= 2 and not served.max_calls
    assert sorted(looks) == ["decoder", "encoder"]


@pytest.mark.parametrize("value", [7e4, -1e30])
def test_weights_beyond_float16(model, value):
    """Every other precision takes them; `medium` would hold infinity."""
    for target, name in (("encoder", "conv2.weight"), ("decoder", "blocks.0.mlp.2.weight")):
        getattr(model, target).get_parameter(name).view(-1)[7] = value
        assert_on_pytorch(model, target, "weights are beyond float16", precision="medium")


@pytest.mark.parametrize("precision", ["medium", "int8"])
def test_cross_attention_beyond_float16(model, precision):
    """Keys and values are held in float16, whatever the weights are held in."""
    model.decoder.blocks[1].cross_attn.key.weight.mul_(6e4)
    reason = "cross-attention keys or values may be beyond float16"
    if precision == "medium":
        model.decoder.blocks[1].cross_attn.key.weight.clamp_(-6e4, 6e4)
    assert_on_pytorch(model, "decoder", reason, precision=precision)


@given(seeds, st.sampled_from([1e-3, 1.0, 300.0, 3000.0]), st.floats(0, 7e4))
def test_keys_and_values_that_overflow_are_foreseen(seed, scale, bias):
    decoder = small().build().decoder
    for block in decoder.blocks:
        block.cross_attn.key.weight.mul_(scale)
        block.cross_attn.value.bias.fill_(bias)
    features = numbers((2, 60, 128), seed)
    largest = max(
        layer(features).abs().max().item()
        for block in decoder.blocks
        for layer in (block.cross_attn.key, block.cross_attn.value)
    )
    foreseen = weights.may_overflow(
        weights.reach(decoder.state_dict()), features.norm(dim=-1).max().item()
    )
    assert foreseen or largest < 65504
    assert not foreseen or max(largest, bias) > 2000  # not without need either


class Timeout(RuntimeError):
    """Somebody's limit of time."""


@pytest.mark.parametrize("raised", [Timeout, MemoryError, KeyError])
def test_what_another_thread_raises_here_is_the_programs(model, raised):
    """Such an error has no message, and no trace of where it is from."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    here = ctypes.c_ulong(threading.get_ident())
    with with_fallback():
        whisper_max.accelerate(model).encoder(MEL)
        timer = threading.Timer(0.05, raise_in, (here, ctypes.py_object(raised)))
        timer.start()
        with pytest.raises(raised):
            for _ in range(1000):
                model.encoder(MEL.clone().mul_(torch.rand(())))
        timer.join()


def test_a_signal_handler_that_decodes_while_weights_are_packed(model, monkeypatch):
    """It must not wait for what it has interrupted."""
    found = []
    pack = model_state.ModelState._pack

    def interrupted(state, *arguments, **options):
        if not found:
            found.append(None)
            signal.raise_signal(signal.SIGALRM)
        return pack(state, *arguments, **options)

    monkeypatch.setattr(model_state.ModelState, "_pack", interrupted)
    expected = model.encoder(MEL)
    before = signal.signal(signal.SIGALRM, lambda *_: found.append(model.encoder(MEL)))
    try:
        with with_fallback():
            whisper_max.accelerate(model)
            found.append(model.encoder(MEL))
            counted = whisper_max.status().targets["encoder"]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (counted.max_calls, counted.torch_calls) == (1, 1)
    assert torch.equal(found[1], expected)
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-4)


def test_pytorch_takes_over_when_the_exception_is_over(model):
    """What it raises has no context then, and what MAX held is free."""
    with with_fallback():
        whisper_max.accelerate(model)
        with pytest.raises(AssertionError) as raised:
            model.encoder(MEL[:, :, :100])
        assert raised.value.__context__ is None
        with pytest.raises(Exception) as raised:
            decoding.PyTorchInference(model, 3).logits(torch.tensor([[10**6]]), FEATURES)
        assert raised.value.__context__ is None


@pytest.mark.parametrize("raised", [RuntimeError, ValueError, MemoryError])
def test_what_a_signal_handler_raises_is_the_programs(raised):
    """Python runs handlers behind a call of native code: inside of what is taken for MAX's."""

    def time_is_over(number, frame):
        raise raised("time is over")

    before = signal.signal(signal.SIGALRM, time_is_over)
    try:
        with on_max():
            encoder = whisper.model.AudioEncoder(80, 1500, 384, 6, 4)
            windows = numbers((48, 80, 3000), 1)
            encoder(windows[:1])
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(raised, match="time is over"):
                encoder(windows)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_where_pytorch_fills_memory_that_is_empty(model):
    """Told to be deterministic, it does: caches are from elsewhere then, and results the same."""
    with on_max():
        whisper_max.accelerate(model)
        expected = model.decoder(TOKENS, FEATURES)
        torch.use_deterministic_algorithms(True)
        try:
            found = model.decoder(TOKENS, FEATURES)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


def test_a_parameter_that_refers_to_its_model_does_not_keep_it():
    model = small().build().requires_grad_()
    model.encoder.conv1.weight.register_hook(lambda gradient, model=model: gradient)
    with on_max():
        whisper_max.accelerate(model).encoder(numbers((1, 80, 120), 1))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
