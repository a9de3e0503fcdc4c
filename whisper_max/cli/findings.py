"""What `whisper-max doctor` looks at, one function for each part of the list."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from .. import versions
from ..conditions import UnsupportedByMax
from ..patch_table import import_upstream
from ..runtime import cache_listing, compilation, hardware, limits
from ..runtime.cache_folder import REMEDY, CacheRefused
from ..settings import CPU_LEVELS, ENVIRONMENT, TARGETS, Settings
from .remedies import install_command
from .sizes import readable

# What each feature of a CPU changes.
CPU_FEATURES = {
    "avx512": "with it, kernels work on 16 numbers at a time instead of 8",
    "amx": "with it, high, medium and int8 multiply in matrix tiles",
    "bf16": "with it, medium, and the attention of int8, multiply two pairs of bfloat16 at a time",
    "vnni": "with it, int8 multiplies four pairs of int8 at a time",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list.

    state : "ok"; "note" (nothing is wrong, but it could be better); "problem"
    remedy : the command, or what else to do; empty where there is nothing to mend
    """

    topic: str
    state: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.topic:<9} {self.text}"
        return f"{line}\n{'':<18} -> {self.remedy}" if self.remedy else line


def of_the_installation() -> Iterator[Finding]:
    """Python, the packages, and whether the openai-whisper at hand is one we know."""
    found = versions.installed()
    reasons = versions.environment_reasons()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Finding("versions", "problem" if reasons else "ok", text)
    for reason in reasons:
        yield Finding("versions", "problem", *_with_remedy(reason))

    try:
        import_upstream()
    except ImportError as error:
        yield Finding("whisper", "problem", *_with_remedy(str(error)))
    else:
        yield from _of_upstream()

    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg:
        yield Finding("ffmpeg", "ok", ffmpeg)
    else:
        text = "missing; whisper reads audio files with it (arrays of samples need none)"
        yield Finding("ffmpeg", "problem", text, install_command("ffmpeg"))


def _of_upstream() -> Iterator[Finding]:
    refused = {target: versions.structure_reasons(target) for target in TARGETS}
    refused = {target: reasons for target, reasons in refused.items() if reasons}
    newest = versions.TESTED_WHISPER[-1]
    for target, reasons in refused.items():
        text = f"{target} stays on PyTorch: {'; '.join(reasons)}"
        yield Finding("whisper", "problem", text, f"pip install openai-whisper=={newest}")
    if not refused:
        yield Finding("whisper", "ok", f"all parts are as known: {', '.join(TARGETS)}")


def _with_remedy(reason: str) -> tuple[str, str]:
    text, command, package = reason.partition(": pip install ")
    if command:
        return text, command.removeprefix(": ") + package
    if reason.startswith("torch "):
        return reason, f"pip install --upgrade 'torch>={versions.OLDEST_TORCH}'"
    return reason, ""


def of_the_machine() -> Iterator[Finding]:
    """CPU, threads, memory and GPU."""
    yield Finding("cpu", "ok", hardware.cpu_model())
    level = CPU_LEVELS.index(hardware.cpu_level())
    has = {*CPU_LEVELS[: level + 1]}
    has |= {"bf16"} if hardware.has_bf16() else set()
    has |= {"vnni"} if hardware.has_vnni() else set()
    for feature, use in CPU_FEATURES.items():
        text = f"{feature}: {'yes' if feature in has else 'no'}; {use}"
        yield Finding("cpu", "ok", text)

    machine, quota = hardware.describe(), limits.cpu_quota()
    allowed = f"{machine['affinity']} of {machine['cpus']} CPUs allowed"
    limited = "no quota" if quota is None else f"a quota of {quota:g} CPUs"
    yield Finding("threads", "ok", f"{machine['threads']} ({allowed}, {limited})")

    memory = limits.available_memory()
    if memory is not None:
        enough = memory >= compilation.NEEDED_MEMORY
        needed = "" if enough else f"; compiling needs {readable(compilation.NEEDED_MEMORY)}"
        yield Finding("memory", "ok" if enough else "note", f"{readable(memory)} free{needed}")
    yield _of_the_gpu()


def _of_the_gpu() -> Finding:
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            text = f"{name}; models on it run on PyTorch, unless patch(device='cuda') is asked for"
            return Finding("gpu", "note", text)
    return Finding("gpu", "ok", "none that PyTorch can use; none is needed")


def of_the_settings(settings: Settings) -> Iterator[Finding]:
    """What is in force for a program that says nothing else, and the cache folder."""
    words = f"mode {settings.mode}, precision {settings.precision}, compile {settings.compile}"
    if settings.cpu_level:
        words += f", {ENVIRONMENT['cpu_level']}={settings.cpu_level}"
    yield Finding("settings", "ok" if settings.mode != "off" else "note", words)
    try:
        records = cache_listing.list_artifacts(settings.cache_dir)
    except CacheRefused as error:
        yield Finding("cache", "problem", str(error).removesuffix(f"; {REMEDY}"), REMEDY)
        return
    ready = sum(record.state == "ready" for record in records)
    size = readable(sum(record.size for record in records))
    text = f"{settings.cache_dir}: {ready} of {len(records)} usable, {size}"
    stale = sum(record.state == "stale" for record in records)
    if 2 * stale > len(records):
        yield Finding("cache", "note", text, "whisper-max cache clear --stale")
    else:
        yield Finding("cache", "ok", text)


def of_the_graphs(settings: Settings) -> Iterator[Finding]:
    """What the compiled graphs are made for, their state, and the self-check where they are."""
    from ..precompile import artifact_keys

    try:
        (keys,) = artifact_keys(None, settings)
        states = {key: compilation.state(key, settings.cache_dir) for key in keys}
    except (UnsupportedByMax, CacheRefused):  # told above
        return
    from ..graphs.build import vector_width

    # The first that has not failed is the one that is used, or that would be compiled.
    chosen = next((key for key, state in states.items() if state.name != "failed"), None)
    for key, state in states.items():
        if key is chosen:
            break
        yield Finding("graphs", "problem", state.reason, "whisper-max compile")
    if chosen is None:
        return
    key, state = chosen, states[chosen]
    if not state.ready:
        yield Finding("graphs", "note", state.reason, "whisper-max compile")
        return
    tiles = " and matrix tiles" if key.cpu_level == "amx" else ""
    made_for = f"{key.label}: vectors of {vector_width(key.cpu_level)} numbers{tiles}"
    yield Finding("graphs", "ok", made_for)

    from .selfcheck import self_check

    try:
        checks = self_check(settings.precision)
    except UnsupportedByMax as error:
        yield Finding("check", "problem", str(error))
        return
    for check in checks:
        yield Finding("check", check.state, f"{check.name}: {check.text}")
