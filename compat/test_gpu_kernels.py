"""Our own kernels for GPUs: the PTX that MAX makes of them, run by ptx_emulator.py.

Their numbers are held against float64, as those of other kernels. How fast they are is not shown.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptx_emulator import Fault, Kernel
from strategies import HEAD_DIM, numbers, seeds
from whisper_max.graphs.gpu.layers import KERNELS

MOJO = Path(sys.executable).with_name("mojo")
PROGRAM = Path(__file__).parent / "programs" / "print_ptx.mojo"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Of a result's error, in parts of the largest value. Half precision rounds the result, and tiles
# round weights.
BOUNDS = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-21}
ROUNDED = {"float16": 2**-11, "bfloat16": 2**-8}
"""Once, at the end."""
THREADS = {"tiles": 128, "lanes 1": 512, "lanes 8": 256}
"""Of a block."""
QUERIES = {"tiles": 128, "lanes 1": 1, "lanes 8": 8}
"""Of a block."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MOJO.exists(), reason="there is no Mojo compiler beside Python"),
]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Instead of the CPU's graphs, which no test here runs."""


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def texts(request) -> dict[str, str]:
    """The PTX of each kernel, by its name in print_ptx.mojo."""
    command = [MOJO, "run", "-D", f"architecture={request.param}", "-I", KERNELS.parent, PROGRAM]
    printed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    parts = re.split(r"^// kernel (.*)$", printed.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


@pytest.fixture(scope="module")
def kernels(texts) -> dict[str, Kernel]:
    """The same, to be run."""
    return {name: Kernel(text) for name, text in texts.items()}


class Case:
    """Queries, keys and values as numbers of a dtype, and what attention makes of them."""

    def __init__(
        self,
        dtype: str,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        *,
        heads_first: bool,
        causal: bool,
        gain: float,
        seed: int,
    ) -> None:
        self.dtype, self.heads_first, self.causal = dtype, heads_first, causal
        shape = (batch, keys, heads, HEAD_DIM)
        self.q, self.k, self.v = (
            (numbers(size, seed + i) * gain).to(DTYPES[dtype])
            for i, size in enumerate([(batch, queries, heads, HEAD_DIM), shape, shape])
        )
        self.last_seen = torch.arange(keys - queries, keys, dtype=torch.int32)

    def expected(self) -> torch.Tensor:
        """In float64, shape = (batch, queries, heads, 64)."""
        q, k, v = (part.double().transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.mT / HEAD_DIM**0.5
        if self.causal:
            scores[..., torch.arange(k.shape[2]) > self.last_seen[:, None]] = -torch.inf
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    def run(self, kernel: Kernel, way: str, seed: int) -> torch.Tensor:
        """What the kernel makes of them."""
        batch, queries, heads, _ = self.q.shape
        keys = self.k.shape[1]
        k, v = (
            part.transpose(1, 2).contiguous() if self.heads_first else part
            for part in (self.k, self.v)
        )
        apart = (HEAD_DIM, keys * HEAD_DIM) if self.heads_first else (heads * HEAD_DIM, HEAD_DIM)
        output = torch.full_like(self.q, torch.nan)
        arrays = [bits(part) for part in (output, self.q, k, v, self.last_seen)]
        grid = (-(-queries // QUERIES[way]), heads, batch)
        kernel.launch(grid, THREADS[way], [*arrays, queries, keys, heads, *apart], seed)
        return output


def run_rows(
    kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, added: torch.Tensor
) -> torch.Tensor:
    """What the kernel for few rows makes of (rows, in), (out, in), (out,) and (rows, out)."""
    output = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    arrays = [bits(part) for part in (output, x, weight, bias, added)]
    grid = (-(-len(weight) // 16), -(-len(x) // 8), 1)
    kernel.launch(grid, 256, [*arrays, len(x), *weight.shape])
    return output


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory."""
    return tensor.view(torch.uint8).numpy()


def check(kernels: dict[str, Kernel], way: str, case: Case, seed: int = 0) -> None:
    """That a kernel gives what it should."""
    kernel = kernels[f"{way} {case.dtype}{' causal' if case.causal else ''}"]
    expected = case.expected()
    error = (case.run(kernel, way, seed).double() - expected).abs().max()
    assert error <= BOUNDS[case.dtype] * case.v.double().abs().max()


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "heads_first": st.booleans(),
        "causal": st.booleans(),
        "gain": st.sampled_from([0.1, 1.0, 3.0]),
        "seed": seeds,
    }
)


@settings(max_examples=12)
@given(
    st.sampled_from(["float16", "bfloat16"]),
    st.integers(1, 140),
    st.integers(0, 140),
    cases,
)
def test_tiles(kernels, dtype, queries, further, drawn):
    check(kernels, "tiles", Case(dtype, queries=queries, keys=queries + further, **drawn))


@settings(max_examples=8)
@given(
    st.sampled_from(["lanes 1", "lanes 8"]),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 12),
    st.integers(0, 200),
    cases,
)
def test_lanes(kernels, way, dtype, queries, further, drawn):
    check(kernels, way, Case(dtype, queries=queries, keys=queries + further, **drawn))


@settings(max_examples=12)
@given(
    st.sampled_from(["float16", "bfloat16"]),
    st.sampled_from(["", " biased", " biased gelu", " biased adding"]),
    st.integers(1, 18),
    st.integers(1, 40),
    st.integers(1, 48).map(lambda i: 32 * i),
    seeds,
)
def test_few_rows(kernels, dtype, kind, rows, outputs, length, seed):
    kernel = kernels[f"rows {dtype}{kind}"]
    x, weight, bias, added = (
        numbers(shape, seed + i).to(DTYPES[dtype])
        for i, shape in enumerate([(rows, length), (outputs, length), (outputs,), (rows, outputs)])
    )
    weight /= length**0.5
    expected = x.double() @ weight.double().T
    if "biased" in kind:
        expected += bias.double()
    if "gelu" in kind:
        expected = torch.nn.functional.gelu(expected)
    if "adding" in kind:
        expected += added.double()
    error = (run_rows(kernel, x, weight, bias, added).double() - expected).abs()
    assert (error <= ROUNDED[dtype] * expected.abs() + 2**-18).all()


WINDOW = {"batch": 1, "heads": 1, "heads_first": False, "causal": False, "gain": 1.0, "seed": 3}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_whole_window_by_tiles(kernels, dtype):
    check(kernels, "tiles", Case(dtype, queries=128, keys=1500, **WINDOW))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_window_by_lanes(kernels, dtype):
    check(kernels, "lanes 8", Case(dtype, queries=5, keys=1500, **WINDOW))


@pytest.mark.parametrize("way", ["tiles", "lanes 1", "lanes 8"])
@pytest.mark.parametrize("position", [0, 70, 445])
def test_a_cache_is_read_as_far_as_it_is_written(kernels, way, position):
    queries = 1 if way == "lanes 1" else 3
    case = Case("float16", 2, 1, queries, 448, heads_first=True, causal=True, gain=1.0, seed=5)
    case.last_seen[:] = torch.arange(position, position + queries)
    expected = case.expected()
    for part in (case.k, case.v):
        part[:, position + queries :] = torch.nan
    found = case.run(kernels[f"{way} float16 causal"], way, seed=0).double()
    assert (found - expected).abs().max() <= BOUNDS["float16"] * 5


@pytest.mark.parametrize("way", ["tiles", "lanes 8"])
def test_what_is_infinite_stays_so(kernels, way):
    """A value at the last key, which is read again for keys that there are not."""
    case = Case("float16", queries=3, keys=70, **WINDOW)
    case.v[:, -1] = torch.inf
    found = case.run(kernels[f"{way} float16"], way, seed=0)
    assert bool(found.isposinf().all())


@pytest.mark.parametrize("way", ["tiles", "lanes 8"])
def test_scores_that_rise_and_fall(kernels, way):
    """The highest score so far is far above all later ones, or far below them."""
    for order in (1, -1):
        case = Case("float16", queries=3, keys=200, **WINDOW)
        case.q[:] = 1
        case.k[:] = torch.linspace(-40 * order, 40 * order, 200)[:, None, None].half()
        check(kernels, way, case)


def test_the_whole_warp_comes_to_what_needs_it(texts):
    """LLVM may not know of an instruction in inline assembly that all lanes must carry it out."""
    for name in ("tiles float16", "tiles bfloat16 causal"):
        parts = re.split(r"^\$L\w+:", texts[name], flags=re.MULTILINE)
        counts = [(part.count("mma.sync"), part.count("ldmatrix.")) for part in parts]
        assert {count for count in counts if any(count)} == {(128, 32)}


@pytest.mark.parametrize("texts", ["sm_90a"], indirect=True)
@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("tiles", r"cp\.async\.wait_group\s+1;"),
        ("tiles", r"cp\.async\.commit_group;"),
        ("tiles", r"bar(rier)?\.sync\s+0;"),
        ("tiles", r"shfl\.sync\.bfly\.b32"),
        ("lanes 8", r"bar(rier)?\.sync\s+0;"),
    ],
)
def test_what_a_kernel_needs_is_missed(texts, way, what):
    """The emulator finds it out where any one of these is taken away."""
    case = Case("float16", queries=32, keys=200, **{**WINDOW, "causal": True})
    text = texts[f"{way} float16 causal"]
    places = list(re.finditer(what, text))
    assert places
    for place in places:
        without = text[: place.start()] + text[place.start() :].split(";", 1)[1]
        with pytest.raises((AssertionError, Fault)):
            for seed in range(4):
                check({f"{way} float16 causal": Kernel(without)}, way, case, seed)
