"""What computes without PyTorch's other threads sees what PyTorch sees, and leaves them alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from whisper_max import on_one_thread, tensor_numbers

from isolation import pytorch_threads

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=5)
ANY = arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32))
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
def test_numbers_below_a_limit_are_told_from_others(view, numbers):
    tensor = view(torch.from_numpy(numbers))
    for limit in (1e15, 3.0, 0.0):
        expected = bool((tensor.abs() <= limit).all())
        assert tensor_numbers.all_below(limit, tensor) == expected


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@given(numbers=ANY)
def test_a_copy_is_equal_and_in_memory_of_its_own(view, numbers):
    tensor = view(torch.from_numpy(numbers))
    copy = tensor_numbers.copy(tensor)
    assert type(copy) is torch.Tensor and copy.dtype is torch.float32
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    torch.testing.assert_close(copy, tensor.detach(), rtol=0, atol=0, equal_nan=True)


@given(numbers=ANY, other=ANY)
def test_equality_is_pytorchs(numbers, other):
    one = torch.from_numpy(numbers)
    for second in (one, one.clone(), torch.from_numpy(other)):
        assert tensor_numbers.equal(one, second) == torch.equal(one, second)


@pytest.fixture
def two_threads():
    with pytorch_threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_a_signal_handler_that_raises_on_the_way_in(monkeypatch):
    """PyTorch's threads come back."""
    stand_in = SimpleNamespace(
        omp_set_num_threads=on_one_thread._pytorch.omp_set_num_threads,
        MKL_Set_Num_Threads_Local=Mock(side_effect=[KeyboardInterrupt, None]),
    )
    monkeypatch.setattr(on_one_thread, "_pytorch", stand_in)
    with pytest.raises(KeyboardInterrupt), on_one_thread.only_this_thread():
        raise AssertionError
    assert torch.get_num_threads() == on_one_thread.pytorch_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_pytorch_keeps_to_this_thread_for_a_while():
    with pytest.raises(RuntimeError), on_one_thread.only_this_thread():
        assert torch.get_num_threads() == 1
        assert on_one_thread.pytorch_threads() == 2
        with on_one_thread.only_this_thread():
            pass
        assert on_one_thread.pytorch_threads() == 2
        raise RuntimeError
    assert torch.get_num_threads() == on_one_thread.pytorch_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_other_threads_compute_as_ever_meanwhile_and_afterwards():
    begun, ended = threading.Event(), threading.Event()

    def alone():
        with on_one_thread.only_this_thread():
            begun.set()
            ended.wait(30)

    other = threading.Thread(target=alone)
    other.start()
    begun.wait(30)
    try:
        assert torch.get_num_threads() == 2
        assert _in_a_new_thread(torch.get_num_threads) == 2
    finally:
        ended.set()
        other.join()
    assert _in_a_new_thread(torch.get_num_threads) == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("function", [torch.exp, torch.clone, torch.sum], ids=lambda f: f.__name__)
def test_nothing_wakes_pytorchs_other_threads(function):
    """exp is MKL's in some builds of PyTorch, which does not go by OpenMP's number."""
    numbers = torch.randn(1 << 20)
    function(numbers)  # now they exist
    with on_one_thread.only_this_thread():
        time.sleep(0.2)  # they spin for a while
        before = _cpu_time_of_others()
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            function(numbers)
        assert _cpu_time_of_others() - before < 0.1


def _in_a_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _cpu_time_of_others():
    """Seconds that the threads of this process except the calling one have computed."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(threading.get_native_id()):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")
