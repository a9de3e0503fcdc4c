"""Bad input gets upstream's own answer where it has one, otherwise a clear one; nothing is lost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import whisper
import whisper.timing
from whisper import decoding

import whisper_max
from harness import load_checkpoint, on_max, with_fallback
from isolation import raise_in
from recordings import assert_same_result, samples
from strategies import numbers, small, token_rows
from whisper_max import demo, settings
from whisper_max.runtime import artifacts, compilation, loading
from whisper_max.runtime.storage import arithmetic_of, keys_of

# What upstream raises for input that it does not take.
ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def outcome(call):
    """What a call returns, or the type and the text of what it raises, without addresses.

    ffmpeg 7 says where in memory its parts are.
    """
    try:
        return call()
    except ERRORS as error:
        return type(error), re.sub(r"\b0x[0-9a-f]+\b", "0x…", str(error))


def transcribe(model, audio):
    torch.manual_seed(3)
    options = {"fp16": False, "temperature": (0.0, 0.4), "sample_len": 5}
    return outcome(lambda: model.transcribe(audio, **options))


@pytest.mark.allow_fallback
@pytest.mark.parametrize(
    "audio",
    [
        np.zeros(0, np.float32),
        np.zeros(1, np.float32),
        np.full(16000, np.nan, np.float32),
        np.full(16000, np.inf, np.float32),
        np.zeros((2, 16000), np.float32),
        np.zeros(16000, np.int16),
        "no such file.wav",
    ],
    ids=["empty", "one sample", "NaN", "infinite", "stereo", "integers", "missing"],
)
def test_audio(plain, checkpoint, audio):
    expected = transcribe(plain, audio)
    with with_fallback():
        found = transcribe(checkpoint, audio)
    if isinstance(expected, dict):
        assert_same_result(found, expected)
    else:
        assert found == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize(
    "mel",
    [
        torch.zeros(80, 3000),
        torch.zeros(1500, 128),
        torch.zeros(2, 2, 80, 3000),
        np.zeros((2, 80, 3000), np.float32),
    ],
    ids=["one window", "its features", "four axes", "an array"],
)
def test_what_is_no_batch_for_beams(plain, checkpoint, mel):
    def run(model):
        options = decoding.DecodingOptions(language="en", beam_size=2, fp16=False)
        return outcome(lambda: decoding.DecodingTask(model, options).run(mel))

    expected = run(plain)
    assert isinstance(expected, tuple)
    with with_fallback():
        assert run(checkpoint) == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize(
    "tokens",
    [
        torch.full((1, 3), 100),
        torch.full((1, 3), -1),
        torch.zeros((1, 31), dtype=torch.int64),
        torch.zeros((1, 0), dtype=torch.int64),
        torch.zeros((1, 3)),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros((2, 3), dtype=torch.int16),
    ],
    ids=["unknown", "negative", "too many", "none", "floats", "one row", "short integers"],
)
@torch.no_grad()
def test_tokens(tokens):
    model, features = small().build(), numbers((1, 60, 128), 3)

    def call():
        return model.decoder(tokens, features).tolist()

    expected = outcome(call)
    with with_fallback():
        whisper_max.accelerate(model)
        assert outcome(call) == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize(
    "shape", [(1, 60, 64), (3, 60, 128), (60, 128), (0, 60, 128), (1, 0, 128)], ids=str
)
@torch.no_grad()
def test_audio_features(shape):
    model, tokens = small().build(), token_rows((2, 3), 100, 1)
    features = numbers(shape, 4)

    def call():
        return torch.nan_to_num(model.decoder(tokens, features)).tolist()

    expected = outcome(call)
    with with_fallback():
        whisper_max.accelerate(model)
        assert outcome(call) == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("scale", [1e14, 1e25, 1e30])
@torch.no_grad()
def test_numbers_whose_squares_overflow(part, scale):
    model, tokens = small().build(), token_rows((1, 3), 100, 1)

    def call():
        if part == "encoder":
            return model.encoder(numbers((1, 80, 120), 2) * scale)
        return model.decoder(tokens, numbers((1, 60, 128), 3) * scale)

    expected = call()
    with with_fallback():
        whisper_max.accelerate(model)
        torch.testing.assert_close(call(), expected, atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("scale", [1e7, 1e20])
@torch.no_grad()
def test_weights_that_make_squares_overflow(part, scale):
    model, tokens = small().build(), token_rows((1, 3), 100, 1)
    module = getattr(model, part)
    for parameter in module.parameters() if scale == 1e7 else [module.positional_embedding]:
        parameter.mul_(scale)

    def call():
        if part == "encoder":
            return model.encoder(numbers((1, 80, 120), 2))
        return model.decoder(tokens, numbers((1, 60, 128), 3))

    expected = call()
    with with_fallback():
        whisper_max.accelerate(model)
        torch.testing.assert_close(call(), expected, atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("change", ["pruned", "appended", "heads"])
def test_alignment_heads_of_another_decoder(change):
    """Its blocks are not as many as when the heads were chosen, or have other heads."""
    model = small().build()
    if change == "pruned":
        model.decoder.blocks = model.decoder.blocks[:-1]
    elif change == "appended":
        model.decoder.blocks.append(model.decoder.blocks[0])
    else:
        model.register_buffer("alignment_heads", torch.ones(1, 7).to_sparse(), persistent=False)
    tokenizer = whisper.tokenizer.get_tokenizer(True, language="en")

    def call():
        arguments = (model, tokenizer, [100, 101], numbers((80, 120), 4), 100)
        words = whisper.timing.find_alignment(*arguments)
        return [(word.word, word.start, word.end) for word in words]

    expected = outcome(call)
    with with_fallback():
        whisper_max.accelerate(model)
        assert outcome(call) == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize("mel", [torch.tensor(1.0), torch.zeros(1, 3), None], ids=str)
@pytest.mark.parametrize("beam_size", [None, 2])
def test_no_spectrogram(plain, checkpoint, mel, beam_size):
    def call(model):
        options = decoding.DecodingOptions(language="en", fp16=False, beam_size=beam_size)
        return decoding.DecodingTask(model, options).run(mel)

    expected = outcome(lambda: call(plain))
    with with_fallback():
        assert outcome(lambda: call(checkpoint)) == expected


@pytest.mark.allow_fallback
@pytest.mark.parametrize("last", ["past the context", "unknown token"])
@torch.no_grad()
def test_steps_that_upstream_refuses(last):
    """In the middle of a decode, where the kernels have no room for them."""
    model, features = small().build(), numbers((1, 60, 128), 3)

    def call():
        count = 30 if last == "past the context" else 5
        tokens = token_rows((2, count), 100, 1)
        inference = decoding.PyTorchInference(model, count)
        inference.logits(tokens, features)
        following = torch.full((2, 1), 100 if last == "unknown token" else 0)
        try:
            return inference.logits(torch.cat([tokens, following], dim=1), features)
        finally:
            inference.cleanup_caching()

    expected = outcome(call)
    with with_fallback():
        whisper_max.accelerate(model)
        # The text may be another: PyTorch comes to all tokens at once, not to the last.
        assert outcome(call)[0] is expected[0]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kept", [0, 1000, 0.9])
def test_truncated_checkpoint(tmp_path, kept):
    content = demo.CHECKPOINT.read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])

    def load():
        with pytest.raises(Exception) as raised:
            whisper.load_model(str(path), device="cpu")
        return raised.type, str(raised.value)

    expected = load()
    with on_max():
        assert load() == expected


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mode", "fast", "'auto', 'strict', 'shadow', 'off'"),
        ("precision", "fp8", "'high', 'highest', 'medium', 'int8'"),
        ("compile", "later", "'background', 'blocking', 'cached'"),
        ("device", "tpu", "'cpu', 'cuda'"),
        ("targets", ["vad"], "'encoder', 'decoder', 'inference', 'decoding_loop', 'alignment'"),
    ],
)
def test_unknown_setting(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} .*must be one of {allowed}"):
        whisper_max.patch(**{name: value})
    assert not whisper_max.is_patched()


@pytest.mark.parametrize("variable", sorted(set(settings.ENVIRONMENT.values())))
def test_unknown_setting_in_the_environment(monkeypatch, variable):
    if variable == "WHISPER_MAX_CACHE_DIR":
        value, message = "~nobody-of-that-name/cache", "give an absolute path"
    else:
        value, message = "quick", f"from the environment variable {variable}.*must be one of"
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{value}.*{message}"):
        whisper_max.patch()
    assert not whisper_max.is_patched()


# The cache folder


@pytest.fixture
def no_engines(monkeypatch, tmp_path):
    """As in a new process: nothing is loaded; returns the cache folder, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(loading, "_engines", {})
    monkeypatch.setattr(compilation, "_children", {})
    monkeypatch.setattr(compilation, "_warned", set())
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(folder))
    return folder


def assert_on_pytorch(plain, reason: str, compile: str = "blocking") -> None:
    """Transcribing gives unpatched whisper's very result, and the status this reason."""
    expected = plain.transcribe(samples("en01"), fp16=False)
    with whisper_max.patched(mode="auto", compile=compile):
        found = load_checkpoint().transcribe(samples("en01"), fp16=False)
        status = whisper_max.status()
    assert found == expected
    for target in ("encoder", "decoder", "decoding_loop"):
        reasons = status.targets[target].reasons
        assert any(re.search(reason, text) for text in reasons), (target, reasons)


@pytest.mark.allow_fallback
def test_cache_folder_cannot_be_made(plain, no_engines):
    no_engines.write_text("a file")
    assert_on_pytorch(plain, f"{re.escape(str(no_engines))}.*WHISPER_MAX_CACHE_DIR")
    assert no_engines.read_text() == "a file"


@pytest.mark.allow_fallback
def test_cache_folder_open_to_others(plain, no_engines):
    no_engines.mkdir()
    no_engines.chmod(0o777)
    assert_on_pytorch(plain, f"{re.escape(str(no_engines))}.*WHISPER_MAX_CACHE_DIR")
    assert not list(no_engines.iterdir())


@pytest.mark.allow_fallback
def test_full_disk(plain, no_engines, monkeypatch):
    monkeypatch.setattr(compilation, "NEEDED_DISK", 1 << 60)
    assert_on_pytorch(plain, "compiling needs .* MiB in .* are free")


@pytest.mark.allow_fallback
def test_nothing_compiled_and_nothing_to_be_compiled(plain, no_engines):
    assert_on_pytorch(plain, "the graphs of whisper-float16-float32-.* are not compiled", "cached")


@pytest.mark.allow_fallback
def test_max_cannot_load_an_artifact(plain, compiled, monkeypatch):
    """As where a driver is too old for it. It is not tried again for every call."""
    tries = []

    def load(found):
        tries.append(found)
        raise_in("max.engine.api", RuntimeError("the driver is too old"))

    monkeypatch.setattr(loading, "_engines", {})
    monkeypatch.setattr(loading, "_unloadable", {})
    monkeypatch.setattr(loading, "Engine", load)
    reason = "MAX could not load whisper-float16-.*: the driver is too old"
    assert_on_pytorch(plain, reason, "cached")
    assert len(tries) == 1


@pytest.mark.allow_fallback
def test_damaged_artifact(plain, compiled, no_engines, caplog):
    """It is removed, and PyTorch works until there is another."""
    original = artifacts.find(keys_of(arithmetic_of("high", exact=True))[0], compiled)
    no_engines.mkdir(mode=0o700)
    for path in (original, original.with_suffix(".json")):
        copy = no_engines / path.name
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
    damaged = no_engines / original.name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert_on_pytorch(plain, "could not be read|are not compiled", "cached")
    assert not damaged.exists()
    assert any(str(damaged) in entry.message for entry in caplog.records)
