"""Packages that use whisper: unmodified scripts print and write the same, plain and patched.

Each package is installed in a tox environment of its own; elsewhere its tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

import ffmpeg
from recordings import FOLDER
from whisper_max import demo
from whisper_max.settings import TARGETS

SCRIPTS = Path(__file__).parent / "scripts"
HOOKS = ("has hooks",)


@dataclass(frozen=True)
class Case:
    """A script, and which of whisper's parts it runs where.

    on_max : targets with calls on MAX
    on_torch : targets with calls on PyTorch, with parts of the reasons that may be given
    """

    package: str
    script: str
    recording: str
    on_max: tuple[str, ...]
    on_torch: dict[str, tuple[str, ...]]


EVERYWHERE = ("encoder", "decoder", "decoding_loop")  # the decoder: the language is detected
# stable-ts decodes by a loop of its own, and listens to cross attention to place words.
STABLE_TS = (("encoder", "decoder", "inference"), {})
# whisper-timestamped listens to every step: to cross attention, and to the encoder's input.
WHILE_DECODING = (("encoder", "inference"), {"decoding_loop": HOOKS})
# With beams only to the last LayerNorm then, and to cross attention in a second pass.
AFTERWARDS = (("encoder", "decoder", "inference"), {"decoding_loop": HOOKS})
CASES = [
    Case("stable-ts", "stable_ts_words", "en03", *STABLE_TS),
    Case("stable-ts", "stable_ts_align", "en03", *STABLE_TS),
    Case("whisper-timestamped", "timestamped_words", "en03", *WHILE_DECODING),
    Case("whisper-timestamped", "timestamped_accurate", "en03", *AFTERWARDS),
    Case("SpeechRecognition", "recognize_file", "en03", EVERYWHERE, {}),
    Case("lhotse", "annotate_recordings", "en_long01", EVERYWHERE, {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.script)
def test_script(case, tmp_path, request):
    try:
        version = importlib.metadata.version(case.package)
    except importlib.metadata.PackageNotFoundError:
        name = case.package.lower()
        pytest.skip(f"{case.package} is not installed: tox run -e third-party-{name}")
    plain = run([], case, tmp_path)
    status = tmp_path / "status.json"
    launcher = ["-m", "whisper_max", "--compile", "blocking", "--status", str(status)]
    ours = run(launcher, case, tmp_path)
    targets = json.loads(status.read_text())["targets"]

    keep(request, case, version, targets, identical=ours == plain)
    assert ours == plain
    for target in TARGETS:
        counted = targets[target]
        assert bool(counted["max_calls"]) == (target in case.on_max), (target, counted)
        assert bool(counted["torch_calls"]) == (target in case.on_torch), (target, counted)
        for reason in counted["reasons"]:
            assert any(part in reason for part in case.on_torch[target]), (target, reason)


def run(launcher: list[str], case: Case, folder: Path) -> dict[str, str]:
    """What a script prints and writes, by file name; what it prints under ""."""
    output = folder / "output"  # the same for both runs: stable-ts prints it
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    audio = folder / f"{case.recording}.wav"
    soundfile.write(audio, *soundfile.read(FOLDER / f"{case.recording}.flac", dtype="int16"))
    command = [sys.executable, *launcher, str(SCRIPTS / f"{case.script}.py")]
    command += [str(demo.CHECKPOINT), str(audio), "."]
    done = subprocess.run(
        command,
        cwd=output,
        env=ffmpeg.environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text(encoding="utf-8") for path in sorted(output.iterdir())}
    assert done.stdout.strip()
    return {"": done.stdout, **written}


def keep(request, case: Case, version: str, targets: dict, *, identical: bool) -> None:
    """Records the run where the matrix asks for it."""
    if not request.config.pluginmanager.has_plugin("compat.matrix.recording"):
        return
    from compat.matrix.results import Script

    request.getfixturevalue("keep_script")(
        Script(
            package=case.package,
            version=version,
            script=case.script,
            identical=identical,
            calls={
                target: {"max": counted["max_calls"], "torch": counted["torch_calls"]}
                for target, counted in targets.items()
            },
            reasons={target: list(counted["reasons"]) for target, counted in targets.items()},
            remarks=remarks(case.package),
        )
    )


def remarks(package: str) -> list[str]:
    if package == "stable-ts" and not installed("torchaudio"):
        return ["torchaudio, which it imports, is a stand-in: no build fits the CPU build of torch"]
    return []


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
