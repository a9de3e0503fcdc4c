"""A device that the graphs for GPUs run on, and the order of MAX's work with PyTorch's there."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from max.driver import Accelerator, Device

from ...conditions import UnsupportedByMax


class MaxDevice:
    """One device, as PyTorch and as MAX know it. This class is for one without a queue of work.

    torch_device, device : the same device, PyTorch's and MAX's
    architecture : as artifacts name it, such as "cuda:sm_90a"
    captures : whether graphs can be captured and replayed
    lock : held by a thread that gives MAX work to do: all of it goes into one queue, and what
        another thread put there during a capture would be recorded
    """

    captures = False

    def __init__(self, torch_device: torch.device, device: Device, architecture: str) -> None:
        self.torch_device = torch_device
        self.device = device
        self.architecture = architecture
        self.lock = threading.RLock()

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """MAX's work inside comes after PyTorch's before, and PyTorch's after comes after it."""
        with self.lock:
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """PyTorch's work inside comes after MAX's before, and MAX's after comes after it.

        For what another thread, whose current stream is another, has had MAX compute.
        """
        yield


class CudaDevice(MaxDevice):
    """An NVIDIA GPU. MAX puts its work into a stream of its own, PyTorch into its current one.

    Each waits for the other on the device, the host for neither. That also keeps memory apart: what
    one side frees, it hands out again only to work that comes after the other's.

    Raises UnsupportedByMax where MAX does not see the GPU, or the kernels are not for it.
    """

    captures = True

    def __init__(self, torch_device: torch.device) -> None:
        try:
            device = Accelerator(id=torch_device.index)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedByMax(f"MAX cannot use {torch_device}: {error}") from error
        architecture = device.architecture_name
        number = re.match(r"sm_(\d+)", architecture)
        if number is None or int(number[1]) < 80:
            raise UnsupportedByMax(
                f"the kernels are for sm_80 and later; this GPU is {architecture}"
            )
        super().__init__(torch_device, device, f"cuda:{architecture}")
        handle = device.default_queue.native_stream_handle
        self._stream = torch.cuda.ExternalStream(handle, torch_device) if handle else None

    @contextmanager
    def in_order(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.torch_device)
        with self.lock:
            self._max_waits(current)
            try:
                yield
            finally:
                self._pytorch_waits(current)

    @contextmanager
    def reading(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.torch_device)
        with self.lock:
            self._pytorch_waits(current)
        try:
            yield
        finally:
            with self.lock:
                self._max_waits(current)

    def _max_waits(self, current: torch.cuda.Stream) -> None:
        """On the device; where MAX's stream is not known, it is the host that waits."""
        if self._stream is None:
            current.synchronize()
        else:
            self._stream.wait_stream(current)

    def _pytorch_waits(self, current: torch.cuda.Stream) -> None:
        if self._stream is None:
            self.device.synchronize()
        else:
            current.wait_stream(self._stream)


_devices: dict[torch.device, CudaDevice] = {}
_devices_guard = threading.RLock()


def cuda_device(device: torch.device) -> CudaDevice:
    """That of a model on an NVIDIA GPU, one for all threads; `CudaDevice` has what is raised."""
    with _devices_guard:
        if device not in _devices:
            _devices[device] = CudaDevice(device)
        return _devices[device]
