"""What figures are compared with: large matrix products in PyTorch, and large copies.

    python -m benchmarks.ceilings THREADS      prints one JSON object
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from whisper_max.runtime.hardware import cpu_flags

from .peers import BFLOAT16_FLAGS

# As Linux spells them: Intel and AMD, Intel's tiles, Arm.
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"})

SIZE = 2048
BYTES = 256 << 20
SECONDS = 1.0  # for each; the best run counts, for it is a ceiling


def measure(threads: int) -> dict[str, float | None]:
    """Giga-operations and gigabytes per second; None for a dtype that would be emulated."""
    torch.set_num_threads(threads)
    has_bfloat16 = not BFLOAT16_FLAGS.isdisjoint(cpu_flags())
    return {
        "float32_gflops": _product(torch.float32),
        "bfloat16_gflops": _product(torch.bfloat16) if has_bfloat16 else None,
        "int8_gflops": None if INT8_FLAGS.isdisjoint(cpu_flags()) else _int8_product(),
        "copy_gbytes": copy_gbytes(),
        "read_gbytes": _read(),
    }


def _product(dtype: torch.dtype) -> float:
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    return 2 * SIZE**3 / _best(lambda: a @ b) / 1e9


def _int8_product() -> float:
    a, b = (torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))
    return 2 * SIZE**3 / _best(lambda: torch._int_mm(a, b)) / 1e9


def copy_gbytes(device: str = "cpu", synchronize: Callable[[], None] = lambda: None) -> float:
    """Gigabytes per second of a large copy, read once and written once.

    synchronize : waits until the device has done it
    """
    source = torch.zeros(BYTES // 4, device=device)
    target = torch.ones(BYTES // 4, device=device)

    def copy() -> None:
        target.copy_(source)
        synchronize()

    return 2 * BYTES / _best(copy) / 1e9


def _read() -> float:
    source = torch.ones(BYTES // 4)
    return BYTES / _best(source.sum) / 1e9


def _best(run: Callable[[], object]) -> float:
    run()
    best = float("inf")
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
