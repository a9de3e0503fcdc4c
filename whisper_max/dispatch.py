"""One call, two paths: MAX where it can, PyTorch where it must, and a record of which it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from . import report, settings
from .conditions import UnsupportedByMax

logger = logging.getLogger("whisper_max")

Result = TypeVar("Result")


def run(
    target: str,
    why_off: str | None,
    on_max: Callable[[], Result],
    on_torch: Callable[[], Result],
    differs: Callable[[Result, Result], str | None],
) -> Result:
    """Runs `on_max`, or `on_torch` where that raises UnsupportedByMax.

    why_off : a reason not to try MAX at all, from `activation.why_off`
    differs : for mode "shadow": says how MAX's result differs from PyTorch's, if it does

    In mode "strict" UnsupportedByMax goes to the caller, in mode "shadow" both run and PyTorch's
    result is returned. Any other exception is a fault, and goes to the caller in every mode.
    """
    mode = settings.active().mode
    if why_off is not None:
        return on_pytorch(target, on_torch, [why_off])
    begin = time.perf_counter()
    reasons: Sequence[str] | None = None
    try:
        with out_of_memory_is_unsupported():
            result = on_max()
    except UnsupportedByMax as unsupported:
        if mode == "strict":
            raise
        reasons = unsupported.reasons
    # The exception is over: PyTorch's have no context then, and what MAX held is freed.
    if reasons is not None:
        return on_pytorch(target, on_torch, reasons)
    report.record(target, "max", time.perf_counter() - begin)
    if mode != "shadow":
        return result
    expected = on_pytorch(target, on_torch, ["shadow"])
    difference = differs(result, expected)
    if difference:
        logger.warning("%s on MAX differs from PyTorch: %s", target, difference)
    return expected


def on_pytorch(target: str, on_torch: Callable[[], Result], reasons: Sequence[str]) -> Result:
    """Runs upstream's code, and records it with its reasons."""
    begin = time.perf_counter()
    try:
        return on_torch()
    finally:
        report.record(target, "torch", time.perf_counter() - begin, reasons)


@contextmanager
def out_of_memory_is_unsupported() -> Iterator[None]:
    """Raises UnsupportedByMax where memory runs out inside: PyTorch may do with less.

    What a user's hook raises is the user's, and so is what the handler of a signal does.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        of_others = isinstance(error, MemoryError) and not report.is_of_max(error)
        if hasattr(error, "of_a_hook") or of_others:
            raise
        raise UnsupportedByMax(f"memory ran out: {error}") from error
    except RuntimeError as error:
        _, allocator, text = str(error).partition("DefaultCPUAllocator: ")
        if not allocator or hasattr(error, "of_a_hook"):
            raise
        raise UnsupportedByMax(f"memory ran out: {text}") from error


def refuse(reasons: Sequence[str]) -> None:
    """Raises UnsupportedByMax with all reasons, if there are any."""
    if reasons:
        raise UnsupportedByMax(*reasons)
