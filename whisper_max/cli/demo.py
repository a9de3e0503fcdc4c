"""`whisper-max demo`: a bundled recording, transcribed by plain whisper and then patched."""

from __future__ import annotations

from .errors import Parser, import_whisper


def run(arguments: list[str]) -> int:
    """Run the demonstration; 1 when the two texts differ."""
    Parser(
        prog="whisper-max demo",
        description="Transcribe a bundled recording with plain whisper and then patched. "
        "Nothing is downloaded, and ffmpeg is not needed.",
    ).parse_args(arguments)
    import_whisper()

    from .. import demo

    return demo.main()
