"""The bundled checkpoint and recordings are the ones that their READMEs describe."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import whisper

from whisper_max import demo

RECORDINGS = Path(__file__).with_name("recordings")
REFERENCES = json.loads((RECORDINGS / "references.json").read_text(encoding="utf-8"))
WITHOUT_REFERENCE = {"oov01.flac", "oov02.flac"}
SAMPLE_RATE = 16000


@pytest.fixture(params=sorted(REFERENCES))
def reference(request) -> dict:
    return REFERENCES[request.param]


def test_checkpoint_is_the_one_described():
    digest = hashlib.sha256(demo.CHECKPOINT.read_bytes()).hexdigest()
    assert digest.startswith("9e08ddd9")
    assert f"`{digest}`" in (demo.DATA / "README.md").read_text(encoding="utf-8")


def test_checkpoint_loads_as_any_other_of_whisper():
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    assert vars(model.dims) == {
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": 128,
        "n_audio_head": 2,
        "n_audio_layer": 3,
        "n_vocab": 51865,
        "n_text_ctx": 448,
        "n_text_state": 128,
        "n_text_head": 2,
        "n_text_layer": 2,
    }
    assert model.is_multilingual


def test_every_recording_has_a_reference_except_the_unknown_words():
    names = {path.name for path in RECORDINGS.glob("*.flac")}
    assert names == set(REFERENCES) | WITHOUT_REFERENCE


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.flac")), ids=lambda path: path.stem)
def test_recording_is_readable(path):
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE
    assert samples.ndim == 1
    assert np.isfinite(samples).all()
    if path.name in REFERENCES:
        assert len(samples) / rate == pytest.approx(REFERENCES[path.name]["duration"], abs=1e-3)


def test_demonstration_plays_one_of_the_recordings():
    samples, _ = soundfile.read(RECORDINGS / f"{demo.RECORDING.stem}.flac", dtype="float32")
    np.testing.assert_array_equal(demo.read_wav(demo.RECORDING), samples)


def test_text_is_that_of_the_segments_and_their_words(reference):
    segments = reference["segments"]
    assert reference["text"] == " ".join(segment["text"] for segment in segments)
    for segment in segments:
        words = [word["word"] for word in segment["words"]]
        assert words == re.sub(r"[^\w\s]", "", segment["text"]).split()


def test_times_run_forward_within_the_recording(reference):
    end = 0.0
    for segment in reference["segments"]:
        assert segment["start"] >= end
        end = segment["start"]
        for word in segment["words"]:
            assert end <= word["start"] <= word["end"]
            end = word["end"]
        assert end <= segment["end"] <= reference["duration"]
        end = segment["end"]


def test_language_is_one_of_whispers_and_only_silence_has_none(reference):
    if reference["text"]:
        assert reference["language"] in whisper.tokenizer.LANGUAGES
    else:
        assert reference["language"] is None
