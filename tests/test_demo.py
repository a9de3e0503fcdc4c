"""The demonstration's verdict and its reading of the bundled recording."""

from __future__ import annotations

import wave
from dataclasses import replace

import numpy as np
import pytest

import whisper_max
from whisper_max import demo

SPOKEN = demo.Transcription("The same.", [[50364, 440, 912]], first_seconds=2, later_seconds=0.5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replaces patch and unpatch by functions that only note the call."""
    noted: list[object] = []
    monkeypatch.setattr(whisper_max, "patch", lambda **options: noted.append(options))
    monkeypatch.setattr(whisper_max, "unpatch", lambda: noted.append("unpatch"))
    return noted


def outcome(monkeypatch: pytest.MonkeyPatch, *transcriptions: demo.Transcription) -> int:
    results = iter(transcriptions)
    monkeypatch.setattr(demo, "transcribe", lambda audio: next(results))
    return demo.main()


def test_identical_texts_exit_with_zero(monkeypatch, calls, capsys):
    assert outcome(monkeypatch, SPOKEN, replace(SPOKEN, later_seconds=0.1)) == 0
    shown = capsys.readouterr().out
    assert shown.count("The same.") == 2
    assert "identical: yes" in shown
    assert str(whisper_max.status()) in shown
    assert calls == [{"compile": "blocking"}, "unpatch"]


@pytest.mark.parametrize(
    "other",
    [replace(SPOKEN, text="Another."), replace(SPOKEN, tokens=[[50364, 440, 913]])],
    ids=["text", "tokens"],
)
def test_any_difference_exits_with_one(monkeypatch, calls, capsys, other):
    assert outcome(monkeypatch, SPOKEN, other) == 1
    assert "identical: no" in capsys.readouterr().out


def test_a_failure_leaves_nothing_patched(monkeypatch, calls):
    with pytest.raises(StopIteration):
        outcome(monkeypatch, SPOKEN)
    assert calls[-1] == "unpatch"


def test_real_time_factor_is_seconds_spent_per_second_of_audio():
    header, row = demo.timing_table({"plain whisper": SPOKEN}, duration=10).splitlines()
    assert header.split() == ["first", "run", "later", "runs", "real-time", "factor"]
    assert row.split() == ["plain", "whisper", "2.00", "s", "0.500", "s", "0.0500"]


def test_wav_samples_are_scaled_as_whisper_scales_them(tmp_path):
    path = tmp_path / "three.wav"
    write_wav(path, channels=1, samples=[-32768, 0, 16384])
    samples = demo.read_wav(path)
    assert samples.dtype == np.float32
    assert samples.tolist() == [-1.0, 0.0, 0.5]


def test_another_kind_of_wav_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "stereo.wav"
    write_wav(path, channels=2, samples=[0, 0])
    with pytest.raises(ValueError, match=r"stereo\.wav .*\(2, 2, 16000\); convert it to"):
        demo.read_wav(path)


def write_wav(path, channels: int, samples: list[int]) -> None:
    with wave.open(str(path), "wb") as recording:
        recording.setnchannels(channels)
        recording.setsampwidth(2)
        recording.setframerate(16000)
        recording.writeframes(np.array(samples, dtype="<i2").tobytes())
