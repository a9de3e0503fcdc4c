"""A model on one device, patched and not, in turns: `python -m benchmarks gpu`.

Smaller than the other benchmarks: one process, random weights, no other packages. It is for
machines that are at hand for minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import whisper
from whisper.model import ModelDimensions, Whisper

import whisper_max
from whisper_max import report
from whisper_max.dimensions_of import dimensions_of

from . import machine
from .ceilings import copy_gbytes
from .peers.interface import STEPS, UNTIMED_STEPS, Alternating, Stopwatch
from .peers.openai_whisper import forced
from .results import save
from .samples import speed_up, summarize
from .scenarios import FORCED_TOKENS
from .weights import SEED, random_state
from .work import TOKENS_IN, step_bytes

ROUNDS = 10


@dataclass
class Comparison:
    """One operation of one model, seconds; the samples of both sides pair up.

    reasons : why calls went to PyTorch on the patched side, if any did
    identical : whether both sides decoded the same tokens; None where they decode none
    """

    model: str
    operation: str
    plain: list[float] = field(default_factory=list)
    patched: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    identical: bool | None = None


@dataclass
class GpuResults:
    """One run.

    copy_gbytes : gigabytes per second of a large copy on the device, see `ceilings`
    step_bytes : what a step of each model reads at least
    """

    device: str
    machine: dict[str, object]
    versions: dict[str, str]
    measured: str
    dtype: str
    copy_gbytes: float
    step_bytes: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)


def run(
    models: Sequence[str],
    device: str,
    path: Path,
    say: Callable[[str], None],
    rounds: int = ROUNDS,
    tokens: int = FORCED_TOKENS,
) -> GpuResults:
    """Measures models of these names and sizes; writes what was found after each model.

    device : as PyTorch names it; float16 on a GPU, float32 on a CPU
    path : of the results
    say : takes one line of the table at a time
    """
    dtype = torch.float32 if device == "cpu" else torch.float16
    results = GpuResults(
        device=device if device == "cpu" else torch.cuda.get_device_name(device),
        machine=machine.describe(),
        versions=machine.versions(),
        measured=date.today().isoformat(),
        dtype=str(dtype).removeprefix("torch."),
        copy_gbytes=copy_gbytes(device, lambda: _synchronize(device)),
    )
    say(f"{results.device}, {results.copy_gbytes:,.0f} GB/s, {results.dtype}")
    say(f"{'model':<10} {'operation':<22} {'plain, ms':>10} {'patched':>9} {'ratio':>6}")
    # Models that are on the GPU run there only where that is asked for.
    wanted = None if device == "cpu" else "cuda"
    with torch.no_grad(), whisper_max.patched(compile="blocking", device=wanted):
        for name in models:
            sizes = dimensions_of(name)
            results.step_bytes[name] = step_bytes(sizes, 1, dtype.itemsize, dtype.itemsize)
            model = Whisper(ModelDimensions(**sizes))
            model.load_state_dict(random_state(sizes))
            model.to(device)
            # Each side takes the same audio in the same turns.
            sides = [_operations(model, dtype, tokens) for _ in range(2)]
            for operation in sides[0]:
                works = [side[operation] for side in sides]
                comparison = _compare(name, operation, works, device, rounds)
                results.comparisons.append(comparison)
                say(_line(comparison))
            save(results, path)
            del model
    return results


Work = Callable[[], "tuple[float, list[int] | None]"]


def _compare(
    model: str, operation: str, works: Sequence[Work], device: str, rounds: int
) -> Comparison:
    found = Comparison(model, operation)
    texts: list[list] = [[], []]
    for number in range(-UNTIMED_STEPS, rounds):
        for side, work in enumerate(works):
            report.reset()
            _synchronize(device)
            if side:
                seconds, text = work()
                told = whisper_max.status().targets.values()
                found.reasons += [reason for one in told for reason in one.reasons]
            else:
                with whisper_max.disabled():
                    seconds, text = work()
            if number >= 0:
                (found.plain, found.patched)[side].append(seconds)
                texts[side].append(text)
    found.reasons = list(dict.fromkeys(found.reasons))
    if texts[0][0] is not None:
        found.identical = texts[0] == texts[1]
    return found


def _operations(model: Whisper, dtype: torch.dtype, tokens: int) -> dict[str, Work]:
    device = model.device
    generator = torch.Generator().manual_seed(SEED)
    shape = (2, model.dims.n_mels, 2 * model.dims.n_audio_ctx)
    # The patched encoder remembers the last.
    mels = Alternating(torch.randn(shape, generator=generator).to(device, dtype))

    def encoder() -> tuple[float, None]:
        with Stopwatch() as watch:
            model.encoder(mels.next()[None])
            _synchronize(device.type)
        return watch.seconds, None

    def step() -> tuple[float, None]:
        # As a program's own loop decodes: one token, all its logits.
        features = model.encoder(mels.next()[None])
        history = torch.randint(1000, 50000, (1, TOKENS_IN + UNTIMED_STEPS + STEPS))
        history = history.to(device)
        inference = whisper.decoding.PyTorchInference(model, TOKENS_IN)
        inference.logits(history[:, :TOKENS_IN], features)
        for count in range(TOKENS_IN + 1, TOKENS_IN + UNTIMED_STEPS + 1):
            inference.logits(history[:, :count], features)
        _synchronize(device.type)
        with Stopwatch() as watch:
            for count in range(TOKENS_IN + UNTIMED_STEPS + 1, history.shape[1] + 1):
                inference.logits(history[:, :count], features)
            _synchronize(device.type)
        inference.cleanup_caching()
        return watch.seconds / STEPS, None

    def window(count: int, beams: int = 1) -> Work:
        options = forced(count, beams, fp16=dtype is torch.float16)

        def run() -> tuple[float, list[int]]:
            with Stopwatch() as watch:
                decoded = whisper.decode(model, mels.next(), options).tokens
            return watch.seconds, decoded

        return run

    def selected_step() -> tuple[float, None]:
        """What one token more costs inside the main loop, its choice included."""
        longer, shorter = window(tokens)()[0], window(tokens // 2)()[0]
        return (longer - shorter) / (tokens - tokens // 2), None

    return {
        "encoder": encoder,
        "step, all logits": step,
        "step, in the loop": selected_step,
        "window": window(tokens),
        "window, 5 beams": window(tokens, 5),
    }


def _line(found: Comparison) -> str:
    plain, patched = (1e3 * summarize(side).median for side in (found.plain, found.patched))
    ratio = speed_up(found.plain, found.patched).median
    told = "" if found.identical is None else f"  {'same' if found.identical else 'other'} tokens"
    told += f"  PyTorch: {'; '.join(found.reasons)}" if found.reasons else ""
    return (
        f"{found.model:<10} {found.operation:<22} {plain:>10.2f} {patched:>9.2f} "
        f"{ratio:>6.2f}{told}"
    )


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
