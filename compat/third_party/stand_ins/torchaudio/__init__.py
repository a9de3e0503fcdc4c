"""Stands in for torchaudio where no build of it fits the torch at hand.

stable-ts imports it when it is imported itself, and uses it only to resample, to filter and to
save audio: what is not used here is not here.
"""


def __getattr__(name: str) -> object:
    raise AttributeError(f"this torchaudio is a stand-in for imports alone; it has no {name!r}")
