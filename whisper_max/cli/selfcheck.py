"""The self-check of `whisper-max doctor`: each part on MAX against PyTorch, in a second.

The bundled checkpoint decodes the bundled recording; the graphs are those that serve models of
every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import whisper

import whisper_max

from .. import demo
from ..settings import EXACT_PRECISIONS

if TYPE_CHECKING:
    from whisper.model import Whisper

Result = TypeVar("Result")

# Largest error relative to the largest number of PyTorch's result: about ten times what is seen.
TOLERANCES = {"highest": 1e-4, "high": 1e-4, "medium": 5e-3, "int8": 0.2}
DECODED_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One comparison.

    state : "ok"; "note" (another text, where the precision does not promise PyTorch's);
        "problem" (MAX's result is not PyTorch's, within what the precision promises)
    text : how far they are apart
    """

    name: str
    state: str
    text: str


def self_check(precision: str) -> list[Check]:
    """Compare encoder, decoder and decoding on MAX with PyTorch's.

    Compiles nothing. Raises UnsupportedByMax, with the reason, where MAX does not run.
    """
    audio = demo.read_wav(demo.RECORDING)
    with whisper_max.patched(mode="strict", compile="cached", precision=precision):
        model = whisper.load_model(str(demo.CHECKPOINT), device="cpu").requires_grad_(False)
        padded = whisper.pad_or_trim(torch.from_numpy(audio))
        mel = whisper.log_mel_spectrogram(padded, model.dims.n_mels)
        with whisper_max.disabled():
            features = model.encoder(mel[None])
        tokens = torch.arange(40, dtype=torch.int64).reshape(2, 20) * 1000
        return [
            _numbers("encoder", precision, lambda: model.encoder(mel[None])),
            _numbers("decoder", precision, lambda: model.decoder(tokens, features)),
            _words("greedy decoding", precision, lambda: _decode(model, mel, None)),
            _words("beam search", precision, lambda: _decode(model, mel, 5)),
        ]


def _both(compute: Callable[[], Result]) -> tuple[Result, Result]:
    """The result on MAX, and the result on PyTorch."""
    found = compute()
    with whisper_max.disabled():
        return found, compute()


def _numbers(name: str, precision: str, compute: Callable[[], torch.Tensor]) -> Check:
    found, expected = _both(compute)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    # Written so that an error that is no number does not pass.
    state = "ok" if error <= TOLERANCES[precision] else "problem"
    return Check(name, state, f"largest relative error {error:.1e}")


def _words(name: str, precision: str, compute: Callable[[], list]) -> Check:
    found, expected = _both(compute)
    if found == expected:
        return Check(name, "ok", "tokens identical")
    state = "problem" if precision in EXACT_PRECISIONS else "note"
    return Check(name, state, f"tokens {found} for PyTorch's {expected}")


def _decode(model: Whisper, mel: torch.Tensor, beam_size: int | None) -> list[int]:
    options = whisper.DecodingOptions(
        language="en", beam_size=beam_size, sample_len=DECODED_TOKENS, fp16=False
    )
    return whisper.decode(model, mel, options).tokens
