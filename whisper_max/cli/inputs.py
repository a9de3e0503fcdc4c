"""What a transcription needs before it can begin: audio files, ffmpeg, a model, a device."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

from ..dimensions_of import dimensions_of
from . import COMMANDS
from .errors import CommandError, Parser
from .remedies import install_command

if TYPE_CHECKING:
    import numpy as np


class AudioError(Exception):
    """A file is there, but there is no sound to be had from it."""


def check_audio(paths: list[str]) -> None:
    """Raises CommandError when a file cannot be read, or when nothing can be, without ffmpeg."""
    problems = [problem for path in paths if (problem := _problem_with(path))]
    if problems:
        raise CommandError("; ".join(problems))
    if shutil.which("ffmpeg") is None:
        raise CommandError(
            f"ffmpeg is not installed; whisper reads audio with it: {install_command('ffmpeg')}"
        )


def _problem_with(path: str) -> str | None:
    if not os.path.exists(path):
        # ffmpeg also takes addresses, "https://…" or "concat:a|b", and "-" for its input.
        is_address = path == "-" or re.match(r"[a-z][a-z0-9+.-]+:", path, flags=re.IGNORECASE)
        is_word = re.fullmatch(r"[a-z]+", path)  # a mistyped command, perhaps
        commands = f" (and no command; those are {', '.join(COMMANDS)})" if is_word else ""
        return None if is_address else f"no such file: {path}{commands}"
    if os.path.isdir(path):
        return f"{path} is a folder, not an audio file"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read: permission denied"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return f"{path} is empty"
    return None


def load_audio(path: str) -> np.ndarray:
    """What ffmpeg makes of a file: shape = (samples,), float32 at 16 kHz, as upstream reads it.

    Raises AudioError, with ffmpeg's last words, when it makes nothing of it.
    """
    from whisper import audio

    try:
        samples = audio.load_audio(path)
    except RuntimeError as error:  # its message is ffmpeg's whole output
        words = [line for line in str(error).splitlines() if line.strip()]
        raise AudioError(f"ffmpeg cannot read it: {words[-1].strip()}") from error
    if len(samples) == 0:
        raise AudioError("it holds no sound")
    return samples


def check_model(arguments: list[str]) -> None:
    """Raises CommandError when --model names neither an official model nor a checkpoint."""
    import whisper

    parser = Parser(prog="whisper-max", add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    name = parser.parse_known_args(arguments)[0].model
    if name is None or name in whisper.available_models():
        return
    try:
        dimensions_of(name)
    except ValueError as error:
        raise CommandError(str(error)) from error


def check_device(device: str) -> None:
    """Raises CommandError when --device names a GPU that PyTorch does not see."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(
            f"--device {device}: PyTorch {torch.__version__} finds no NVIDIA GPU; use --device cpu"
        )
