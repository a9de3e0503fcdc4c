"""What may follow a row of tokens, as the kernel that selects the next one reads it."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """Ranges of tokens, each from its first to before its last (kernels/select.mojo)."""

    text_from: int
    text_to: int
    time_from: int
    time_to: int
    time_may_outweigh: int
    """1 where only timestamps may follow if they are likelier together than any text token."""
