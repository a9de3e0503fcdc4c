"""Transcribing the bundled recordings: the same results as unpatched whisper, field by field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import whisper

import harness
import tolerances
import whisper_max
from harness import on_max
from recordings import LONG, NAMES, assert_same_result, samples
from whisper_max import report

SEED = 11

# They came after 20231117; the last one after 20240930.
NEWER = {"clip_timestamps", "hallucination_silence_threshold", "carry_initial_prompt"}

WAYS = {
    "greedy": {},
    "beam search": {"beam_size": 5},
    # Most recordings are surer than that; those of unknown words are tried at every temperature.
    "temperature fallback": {"logprob_threshold": -0.3},
    "sampling": {"temperature": 0.7, "best_of": 3},
    "word timestamps": {"word_timestamps": True},
}


def transcribe(model, audio, **options):
    torch.manual_seed(SEED)
    return model.transcribe(audio, fp16=False, **options)


def check(plain, model, audio, **options):
    """Transcribe on both; return the result of unpatched whisper."""
    for option in NEWER.intersection(options):
        if option not in whisper.transcribe.__kwdefaults__:
            pytest.skip(f"this openai-whisper has no {option}")
    expected = transcribe(plain, audio, **options)
    with on_max():
        found = transcribe(model, audio, **options)
    assert_same_result(found, expected)
    return expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_recording(plain, checkpoint, name, way):
    check(plain, checkpoint, samples(name), **WAYS[way])


def test_recordings_are_transcribed_in_precision_highest(plain, checkpoint):
    for name in ("en02", "oov01"):
        expected = transcribe(plain, samples(name))
        with on_max("highest"):
            assert_same_result(transcribe(checkpoint, samples(name)), expected)


def test_a_model_loaded_while_patched(plain):
    expected = transcribe(plain, samples("es01"))
    with on_max():
        from harness import load_checkpoint

        model = load_checkpoint()
        assert type(model.encoder).__name__ == "MaxAudioEncoder"
        assert_same_result(transcribe(model, samples("es01")), expected)


@pytest.mark.parametrize("options", [{}, {"beam_size": 5}, {"word_timestamps": True}], ids=str)
def test_a_single_accelerated_model(plain, checkpoint, options, monkeypatch):
    """All of it runs on MAX, without patch(); another model's decode is openai-whisper's own."""
    if harness.device != "cpu":
        pytest.skip("only patch() can ask for a GPU")
    expected = transcribe(plain, samples("en01"), **options)
    monkeypatch.setenv("WHISPER_MAX_COMPILE", "blocking")
    monkeypatch.setenv("WHISPER_MAX_MODE", "strict")
    whisper_max.accelerate(checkpoint)
    assert_same_result(transcribe(checkpoint, samples("en01"), **options), expected)
    ran = whisper_max.status().targets
    assert ran["encoder"].max_calls and ran["decoding_loop"].max_calls
    assert bool(ran["alignment"].max_calls) == ("word_timestamps" in options)
    assert not any(counted.torch_calls for counted in ran.values())

    report.reset()
    assert transcribe(plain, samples("en01"), **options) == expected
    assert not any(counted.max_calls for counted in whisper_max.status().targets.values())
    report.reset()


def test_fallback_is_forced_and_reaches_the_last_temperature(plain, checkpoint):
    """The seeded samples of all temperatures are the same; the last one's are what is returned."""
    expected = check(plain, checkpoint, samples("oov02"), **WAYS["temperature fallback"])
    assert expected["segments"][0]["temperature"] == 1.0


OPTIONS = {
    "task": {"task": "translate"},
    "another language": {"language": "de"},
    "initial prompt": {"initial_prompt": "Her mother paints the old station on Monday."},
    "clips": {"clip_timestamps": "0.5,3,3.5"},
    "without timestamps": {"without_timestamps": True},
    "no earlier text": {"condition_on_previous_text": False},
    "patience": {"beam_size": 3, "patience": 2.0, "length_penalty": 0.5},
    "prefix": {"prefix": "My", "sample_len": 20},
    "all is silence": {"no_speech_threshold": -1.0, "logprob_threshold": 0.0},
    "words of clips": {"word_timestamps": True, "clip_timestamps": [1.0, 5.0]},
    "silence before words": {"word_timestamps": True, "hallucination_silence_threshold": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(plain, checkpoint, option):
    check(plain, checkpoint, samples("en03"), **OPTIONS[option])


@pytest.mark.parametrize(
    "options",
    [
        {"initial_prompt": "John sells the station next week."},
        {"clip_timestamps": "10,40,45,50"},
        {"beam_size": 2, "word_timestamps": True},
    ],
    ids=["initial prompt", "clips", "beams and words"],
)
def test_several_windows(plain, checkpoint, options):
    expected = check(plain, checkpoint, samples(LONG), **options)
    assert len({segment["seek"] for segment in expected["segments"]}) > 1


def test_carried_prompt(plain, checkpoint):
    options = {"initial_prompt": "Her mother paints.", "carry_initial_prompt": True}
    check(plain, checkpoint, samples(LONG), **options)


@pytest.mark.parametrize("name", ["en01", "de01", "es01", "silence01"])
def test_language_detection(plain, checkpoint, name):
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples(name)))
    expected_token, expected = plain.detect_language(mel)
    with on_max():
        token, found = checkpoint.detect_language(mel)
    assert token == expected_token
    assert found == pytest.approx(expected, abs=tolerances.PROBABILITY)


def test_silence_and_noise_made_here(plain, checkpoint):
    noise = np.random.default_rng(1).normal(0, 0.05, 5 * 16000).astype(np.float32)
    for audio in (np.zeros(16000, np.float32), noise):
        check(plain, checkpoint, audio)
        check(plain, checkpoint, torch.from_numpy(audio), word_timestamps=True)


@pytest.mark.parametrize("verbose", [True, False])
def test_what_is_shown_stays(plain, checkpoint, capsys, verbose):
    """`transcribe` is upstream's own: its lines of text, its progress bar."""
    transcribe(plain, samples("en01"), verbose=verbose)
    expected = capsys.readouterr()
    with on_max():
        transcribe(checkpoint, samples("en01"), verbose=verbose)
    found = capsys.readouterr()
    assert found.out == expected.out
    assert "Detected language: English" in found.out
    assert ("frames" in found.err) == ("frames" in expected.err) == (verbose is False)
