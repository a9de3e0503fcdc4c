"""The patch table: which attribute of openai-whisper is replaced by what."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One attribute of upstream, and what takes its place.

    target : the name in `settings.TARGETS` it belongs to
    module : upstream's module
    attribute : the name in it, dotted for an attribute of a class
    replacement : "module:attribute", imported only when the row is applied
    """

    target: str
    module: str
    attribute: str
    replacement: str

    @property
    def name(self) -> str:
        """The full dotted name of the attribute."""
        return f"{self.module}.{self.attribute}"

    def current(self) -> object:
        """What is there now; None when there is nothing of its own (inherited does not count)."""
        owner, name = self._slot()
        return vars(owner).get(name)

    def put(self, thing: object) -> None:
        """Make `thing` what is there."""
        owner, name = self._slot()
        setattr(owner, name, thing)

    def load_replacement(self) -> object:
        """Import our replacement."""
        module, _, attribute = self.replacement.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def _slot(self) -> tuple[object, str]:
        owner: object = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name


TABLE = (
    Row("encoder", "whisper.model", "AudioEncoder", "whisper_max.audio_encoder:MaxAudioEncoder"),
    Row("decoder", "whisper.model", "TextDecoder", "whisper_max.text_decoder:MaxTextDecoder"),
    Row("inference", "whisper.decoding", "PyTorchInference", "whisper_max.inference:MaxInference"),
    Row(
        "decoding_loop",
        "whisper.decoding",
        "DecodingTask._main_loop",
        "whisper_max.decoding_loop:max_main_loop",
    ),
    Row(
        "decoding_loop",
        "whisper.decoding",
        "DecodingTask.run",
        "whisper_max.decoding_task:max_run",
    ),
    Row("alignment", "whisper.timing", "find_alignment", "whisper_max.alignment:find_alignment"),
)


def import_upstream() -> None:
    """Import the modules of openai-whisper in the table.

    Raises an ImportError that says what to install when openai-whisper or torch is missing.
    """
    try:
        for module in ("whisper.model", "whisper.decoding", "whisper.timing"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("whisper", "torch"):
            raise
        package = "torch" if missing == "torch" else "openai-whisper"
        other = " (the module called whisper here is another one)" if error.name != missing else ""
        raise ImportError(
            f"whisper_max patches openai-whisper, but {package} is not installed{other}: "
            f"pip install {package}",
            name=missing,
        ) from error
