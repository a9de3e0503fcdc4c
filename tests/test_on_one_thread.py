"""What looks at tensors without PyTorch's threads sees what PyTorch sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from whisper_max import on_one_thread

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=5)
ANY = arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32))
FINITE = arrays.arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32))
VIEWS = {
    "itself": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "every other": lambda tensor: tensor[::2],
    "expanded": lambda tensor: tensor.expand(3, *tensor.shape),
    "negated": lambda tensor: torch.complex(torch.zeros_like(tensor), tensor).conj().imag,
    "with gradients": lambda tensor: tensor.clone().requires_grad_(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@given(numbers=ANY)
def test_finite_numbers_are_told_from_others(view, numbers):
    tensor = view(torch.from_numpy(numbers))
    assert on_one_thread.all_finite(tensor) == bool(tensor.isfinite().all())


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@given(numbers=ANY)
def test_a_copy_is_equal_and_in_memory_of_its_own(view, numbers):
    tensor = view(torch.from_numpy(numbers))
    copy = on_one_thread.copy(tensor)
    assert type(copy) is torch.Tensor and copy.dtype is torch.float32
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    torch.testing.assert_close(copy, tensor.detach(), rtol=0, atol=0, equal_nan=True)


@given(numbers=ANY, other=ANY)
def test_equality_is_pytorchs(numbers, other):
    one = torch.from_numpy(numbers)
    for second in (one, one.clone(), torch.from_numpy(other)):
        assert on_one_thread.equal(one, second) == torch.equal(one, second)


@given(numbers=FINITE)
def test_the_longest_row_is_as_long_as_pytorch_says(numbers):
    tensor = torch.from_numpy(numbers)
    expected = tensor.double().norm(dim=-1).max().item()
    assert on_one_thread.longest_row(tensor) == pytest.approx(expected, rel=1e-6, abs=1e-20)


def test_a_row_too_long_for_float32_is_infinite():
    """And so counts as one that overflows float16, as it does."""
    assert on_one_thread.longest_row(torch.full((2, 3), 1e30)) == np.inf
