"""Numbers of bytes for people."""

from __future__ import annotations


def readable(size: int) -> str:
    """The size in KiB, MiB or GiB, with one digit behind the point."""
    amount, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}"
