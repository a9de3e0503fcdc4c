"""The models that are measured, and where their files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whisper_max.dimensions_of import OFFICIAL, dimensions_of

from .places import BUNDLED_CHECKPOINT

TRAINED = "micro"
"""The bundled checkpoint."""

GROWN_SIZE = "base"
GROWN = f"grown-{GROWN_SIZE}"
"""The bundled checkpoint, grown to the dimensions of that size: see `grown`."""

WITH_WORDS = (TRAINED, GROWN)
"""Models that transcribe; the others have random weights."""

SIZES = ("tiny", "base", "small", "medium", "large-v2", "large-v3", "turbo")
"""With random weights. From small to large, as far as that goes."""

_WITHOUT_LANGUAGES = 51766
"""Tokens of the multilingual vocabularies that stand for no language."""


@dataclass(frozen=True)
class Model:
    """One model in every form that a peer reads.

    name : of `SIZES` or `WITH_WORDS`
    work : the folder of weights and conversions
    """

    name: str
    work: Path

    @property
    def folder(self) -> Path:
        """Of everything that is made for this model."""
        return self.work / "models" / self.name

    @property
    def checkpoint(self) -> Path:
        """In openai-whisper's format."""
        return BUNDLED_CHECKPOINT if self.name == TRAINED else self.folder / "openai.pt"

    @property
    def transformers(self) -> Path:
        """The folder that transformers loads."""
        return self.folder / "transformers"

    @property
    def ctranslate2(self) -> Path:
        """The folder that CTranslate2 and faster-whisper load."""
        return self.folder / "ctranslate2"

    @property
    def torch_compile(self) -> Path:
        """The folder that torch.compile keeps its results in."""
        return self.folder / "torch-compile"

    @property
    def compile_note(self) -> Path:
        """The file that says how long torch.compile took."""
        return self.torch_compile / "compile-seconds.json"

    @property
    def n_mels(self) -> int:
        """Mel bands of its input."""
        return self.dimensions()["n_mels"]

    @property
    def languages(self) -> int:
        """How many its vocabulary has tokens for."""
        return self.dimensions()["n_vocab"] - _WITHOUT_LANGUAGES

    def dimensions(self) -> dict[str, int]:
        """The fields of `whisper.model.ModelDimensions`."""
        name = GROWN_SIZE if self.name == GROWN else self.name
        return dimensions_of(name if name in OFFICIAL else self.checkpoint)
