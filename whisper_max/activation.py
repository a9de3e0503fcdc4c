"""What is switched on in this process: the patched targets, and single modules beside them.

`patching` and `live_models` write here, the replacements read. It is a leaf so that a replacement
can ask whether it is wanted without importing the layer that installed it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakSet

from . import settings

if TYPE_CHECKING:
    from torch import nn

# Upstream's own object for every attribute ever replaced, by dotted name. The first one saved
# wins and stays, also after unpatch(): structural checks and fallbacks mean this one.
originals: dict[str, object] = {}

# Modules made to run on MAX by accelerate(model), with or without patch().
accelerated: WeakSet[nn.Module] = WeakSet()

# Modules that a decode took up while their target was patched; unpatch() gives them back.
adopted: WeakSet[nn.Module] = WeakSet()

# Modules that were made, copied or unpickled as ours; unpatch() makes them upstream's.
made: WeakSet[nn.Module] = WeakSet()

# Modules that restore(model) gave back to PyTorch: a decode must not take them up again.
released: WeakSet[nn.Module] = WeakSet()

_active_targets: frozenset[str] = frozenset()


def set_active_targets(targets: frozenset[str]) -> None:
    """Replace the set of patched targets, at once."""
    global _active_targets
    _active_targets = targets


def model_state() -> ModuleType | None:
    """`runtime.model_state`; None where nothing has run on MAX, which need not be imported then."""
    return sys.modules.get(f"{__package__}.runtime.model_state")


def is_active(target: str) -> bool:
    """Whether `target` is patched. One look into a set: cheap enough for every call."""
    return target in _active_targets


def why_off(target: str, module: nn.Module | None = None) -> str | None:
    """Why a call of `target` is upstream's to run, or None when it may run on MAX.

    module : the encoder or decoder called, for calls that accelerate(model) also switches on
    """
    if settings.is_disabled():
        return "disabled"
    if settings.active().mode == "off":
        return "mode is 'off'"
    if is_active(target) or _is_accelerated(module):
        return None
    return f"the {target} is not patched"


def _is_accelerated(module: object) -> bool:
    try:
        return module in accelerated
    except TypeError:  # upstream takes for a decoder what a set could not hold
        return False
