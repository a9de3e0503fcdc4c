"""openai-whisper, faster, with the same text: `import whisper_max; whisper_max.patch()`.

Importing this package changes nothing and costs nothing: torch, whisper and MAX are imported by
the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conditions import UnsupportedByMax
    from .live_models import refresh
    from .patching import accelerate, is_patched, patch, patched, restore, unpatch
    from .precompile import compile
    from .report import PatchReport, Status, status
    from .settings import disabled

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "Status",
    "UnsupportedByMax",
    "__version__",
    "accelerate",
    "compile",
    "disabled",
    "is_patched",
    "patch",
    "patched",
    "refresh",
    "restore",
    "status",
    "unpatch",
]

_HOMES = {
    "PatchReport": "report:PatchReport",
    "Status": "report:Status",
    "UnsupportedByMax": "conditions:UnsupportedByMax",
    "accelerate": "patching:accelerate",
    "compile": "precompile:compile",
    "disabled": "settings:disabled",
    "is_patched": "patching:is_patched",
    "patch": "patching:patch",
    "patched": "patching:patched",
    "refresh": "live_models:refresh",
    "restore": "patching:restore",
    "status": "report:status",
    "unpatch": "patching:unpatch",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
