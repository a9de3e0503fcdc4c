"""Which weights float16 holds: told by their bits, and the same as converting them says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from whisper_max.runtime.weights import exact_in_float16

SIZES = st.integers(1, 6)
HALF = arrays.arrays(np.float16, SIZES, elements=st.floats(width=16, allow_nan=False))
SINGLE = arrays.arrays(
    np.float32, SIZES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
# Around the smallest numbers of float16, and its steps.
NEAR = st.builds(
    lambda numerators, power: np.array(numerators, np.float32) * np.float32(2.0**power),
    st.lists(st.integers(-4100, 4100), min_size=1, max_size=6),
    st.integers(-30, 8),
)


def survives(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor.half().float(), tensor)


@given(numbers=st.one_of(SINGLE, NEAR, HALF.map(lambda half: half.astype(np.float32))))
@example(numbers=np.array([65504, -65504], np.float32))
@example(numbers=np.array([65536], np.float32))
@example(numbers=np.array([0.0, -0.0], np.float32))
@example(numbers=np.array([2.0**-24, 1023 * 2.0**-24, 2.0**-14], np.float32))
@example(numbers=np.array([2.0**-25], np.float32))
@example(numbers=np.array([3 * 2.0**-25], np.float32))
@example(numbers=np.array([1 + 2.0**-11], np.float32))
def test_a_number_is_exact_if_it_comes_back(numbers):
    tensor = torch.from_numpy(numbers)
    if tensor.isfinite().all():
        assert exact_in_float16([tensor]) == survives(tensor)


@pytest.mark.parametrize("place", [0, 131071, 131072, 299999])
def test_one_number_of_many_is_found(place):
    tensor = torch.ones(300, 1000)
    assert exact_in_float16([torch.ones(2), tensor])
    tensor.view(-1)[place] = 0.1
    assert not exact_in_float16([torch.ones(2), tensor])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_weights_are_looked_at_as_float32(dtype):
    assert exact_in_float16([torch.ones(3, dtype=dtype)])


def test_a_view_is_looked_at_in_its_own_order():
    tensor = torch.ones(4, 6)
    tensor[:, 1::2] = 0.1
    assert exact_in_float16([tensor[:, ::2], tensor[:, ::2].T])
    assert not exact_in_float16([tensor.T])
