"""Whether a module's weights are still what they were when MAX took them."""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping
from ctypes import Array, c_char

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_SAMPLED = 64
"""Bytes of a tensor's memory that are looked at together."""


class _Seen:
    """A parameter or buffer as it was.

    Its address does not tell `p.data = other` when `other` got the memory that `p` had before, as
    in half() and float() one after the other. A weak reference keeps a storage's identity, without
    its memory; one to the tensor does not keep what its hooks refer to, such as its module.

    What is written through `.data`, or an array that shares the memory, counts nowhere. But mostly
    it is all of a tensor, so that some of its bytes tell.
    """

    __slots__ = "name", "tensor", "storage", "address", "version", "view", "places", "sampled"

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.tensor = weakref.ref(tensor)
        storage = tensor.untyped_storage()  # stays while its bytes are looked at
        self.storage = StorageWeakRef(storage)
        self.address = tensor.data_ptr()
        self.version = tensor._version
        self.view = _view_of(tensor)
        self.places = _places_in(tensor)
        self.sampled = [place.raw for place in self.places]

    def is_still(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor of this name is that one, unchanged."""
        if tensor is not self.tensor() or name != self.name:
            return False
        storage = tensor.untyped_storage()  # another thread may exchange it: this one stays
        return (
            storage._cdata == self.storage.cdata
            and tensor.data_ptr() == self.address
            and tensor._version == self.version
            and _view_of(tensor) == self.view
            and [place.raw for place in self.places] == self.sampled
        )


def _view_of(tensor: Tensor) -> tuple[object, ...]:
    """How a tensor reads its memory."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def _places_in(tensor: Tensor) -> list[Array[c_char]]:
    """Two places in a tensor's memory, as far as it is the CPU's; they do not keep it."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() == 0:
        return []
    whole = tensor.numel() * tensor.element_size()
    size = min(whole, _SAMPLED)
    place = c_char * size
    return [place.from_address(tensor.data_ptr() + at) for at in (0, (whole - size) // 2)]


class Watch:
    """A module's tensors as they were when it was last looked at."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def unchanged(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these, by name, are the same objects with the same contents."""
        return len(tensors) == len(self._seen) and all(
            map(_Seen.is_still, self._seen, tensors.keys(), tensors.values())
        )

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """These are as they should be."""
        self._seen = [_Seen(name, tensor) for name, tensor in tensors.items()]

    def forget(self) -> None:
        """Until `note`, whatever comes is a change."""
        self._seen = []

    def after_step_of(self, parameters: Container[int]) -> None:
        """An optimizer has changed these, by identity; fused ones do so without counting it."""
        if any(id(seen.tensor()) in parameters for seen in self._seen):
            self.forget()
