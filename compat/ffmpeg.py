"""ffmpeg, which upstream's `load_audio` starts: the system's, or that of imageio-ffmpeg."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def find(folder: Path) -> str | None:
    """A PATH with an ffmpeg on it, linked in `folder` if need be; None where there is none."""
    if shutil.which("ffmpeg"):
        return os.environ["PATH"]
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError:
        return None
    link = folder / "ffmpeg"
    if not link.is_symlink():
        link.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def environment(folder: Path) -> dict[str, str]:
    """This process's environment with an ffmpeg on its PATH; without one the test is skipped."""
    path = find(folder)
    if path is None:
        pytest.skip("there is no ffmpeg: install it, or imageio-ffmpeg")
    return {**os.environ, "PATH": path}
