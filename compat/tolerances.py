"""How far a result may be from the truth: the one place that says so.

Operations and modules are held against upstream's own modules computing in float64. What a
precision promises is relative to the error that PyTorch's own float32 makes on the same input:
ill-conditioned inputs spoil both alike. The floors are for inputs where PyTorch happens to be more
exact than its format lets one expect; over 6,000 drawn models the errors of `high` went up to
7 * 2^-24 (root mean square) and 82 * 2^-24 (largest) beyond twice PyTorch's.

Cosine similarity is no measure here: it stays at 0.9999 while half the text gets lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whisper_max import settings
from whisper_max.runtime import hardware


@dataclass(frozen=True)
class Promise:
    """What a precision promises of the errors in one result.

    times : of PyTorch's own error, both in the root mean square and at the largest
    floor : of the largest number in the result, added to the root mean square
    largest_floor : likewise, added to the largest error
    """

    times: float
    floor: float
    largest_floor: float


FLOAT32 = Promise(times=2, floor=2**-20, largest_floor=2**-17)

# float32 as three products of bfloat16, in matrix tiles. Over 150 drawn encoders and logits the
# errors went up to 2^-16.6 (root mean square) and 2^-12.6 (largest), measured in an emulator.
THREE_PRODUCTS = Promise(times=2, floor=2**-15, largest_floor=2**-11)

# `high` computes in float32, as `highest` does, on CPUs without matrix tiles.
HAS_TILES = hardware.cpu_level(settings.active().cpu_level) == "amx"
PROMISES = {"highest": FLOAT32, "high": THREE_PRODUCTS if HAS_TILES else FLOAT32}

# Of what passes through a decoder, which hooks hear of. A single row of sharp attention is a chance
# more than an average: over 2,500 drawn decoders the errors of `high` went up to 2^-19.1 (root mean
# square) and 2^-18.0 (largest) beyond twice PyTorch's.
INSIDE = Promise(
    times=2,
    floor=max(2**-18, PROMISES["high"].floor),
    largest_floor=max(2**-15, PROMISES["high"].largest_floor),
)

# Of single layers whose operands are rounded (kernels/products.mojo): both to bfloat16, or the
# activations to 8 bits a row. Over 2,000 drawn layers the errors went up to 2^-10.9 (root mean
# square) and 2^-8.3 (largest) with bfloat16, to 2^-9.3 and 2^-6.8 with int8.
PRODUCTS = {
    "float32": FLOAT32,
    "bfloat16": Promise(times=2, floor=2**-10, largest_floor=2**-7),
    "int8": Promise(times=2, floor=2**-8, largest_floor=2**-6),
}
PRODUCTS |= {
    "float32_tiles": THREE_PRODUCTS,
    "bfloat16_tiles": PRODUCTS["bfloat16"],
    "int8_tiles": PRODUCTS["int8"],
}

# What rounding activations to 16 bits may add up to in a product, in standard deviations of
# independent roundings. In 3,000 drawn layers it was 4.5.
ROUNDINGS = 6.5

# Of whole encoders and of logits. Over 120 drawn models each, the errors went up to 2^-8.3 (root
# mean square) and 2^-4.9 (largest) with medium, to 2^-6.2 and 2^-2.0 with int8: among them are
# models that multiply what they are given.
REDUCED = {
    "medium": Promise(times=2, floor=2**-7, largest_floor=2**-4),
    "int8": Promise(times=2, floor=2**-5, largest_floor=2**-1),
}
WORD_ERROR_RATE = 0.01  # how much of it reduced precision may add, absolute

# Of results, between `high` and unpatched whisper. Tokens, texts and all decisions are identical.
AVG_LOGPROB = 1e-4
PROBABILITY = 1e-4
WORD_SECONDS = 0.02


def assert_precise(
    found: Tensor, on_torch: Tensor, exact: Tensor, promise: Promise = PROMISES["high"]
) -> None:
    """Fail unless `found` keeps the promise.

    found : MAX's result, float32
    on_torch : PyTorch's, float32
    exact : the same computed in float64
    """
    assert found.dtype == on_torch.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert found.shape == on_torch.shape == exact.shape
    assert bool(found.isfinite().all()), "not all numbers are finite"
    scale = exact.abs().max()
    error, torch_error = (found - exact).abs(), (on_torch - exact).abs()
    for kind, measure, floor in (
        ("root mean square", _root_mean_square, promise.floor),
        ("largest", torch.max, promise.largest_floor),
    ):
        ours, theirs = measure(error).item(), measure(torch_error).item()
        limit = promise.times * theirs + floor * scale.item()
        assert ours <= limit, (
            f"the {kind} error is {ours:.3g}, PyTorch's {theirs:.3g}, the limit {limit:.3g}; "
            f"{_worst(found, exact)}"
        )


def _root_mean_square(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def _worst(found: Tensor, exact: Tensor) -> str:
    flat = (found - exact).abs().argmax()
    place = tuple(int(i) for i in torch.unravel_index(flat, exact.shape))
    return (
        f"the worst is {found[place]:.9g} for {exact[place]:.9g} at {place} "
        f"in {tuple(exact.shape)}"
    )
