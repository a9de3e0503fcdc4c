"""`whisper-max compile`: prepare the compiled graphs ahead of the first run."""

from __future__ import annotations

from pathlib import Path

import whisper_max

from ..options import add_options
from ..settings import DEVICES
from .errors import CommandError, Parser
from .sizes import readable

EVERY_SIZE = "for models of every size"


def run(arguments: list[str]) -> int:
    """Compile what the named models need, where it is not there, and wait for it."""
    options = _parser().parse_args(arguments)
    files: dict[Path, str] = {}
    for model in options.models or [None]:
        try:
            found = whisper_max.compile(
                model, precision=options.precision, device=options.device
            )
        except ValueError as error:
            raise CommandError(str(error)) from error
        serves = f"for {model} on this GPU" if options.device == "cuda" else EVERY_SIZE
        files.update(dict.fromkeys(found, serves))
    for file, serves in files.items():
        print(f"ready: {file} ({readable(file.stat().st_size)}), {serves}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="whisper-max compile",
        description="Compile the graphs, so that the first run does not have to. One file serves "
        "all official models, except on a GPU, and nothing is downloaded.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="official names, or checkpoints, of which those whose weights do not fit into "
        "float16 need a file of their own (default: what all official models use)",
    )
    add_options(parser, "precision")
    parser.add_argument("--device", choices=DEVICES, help="where the models will be (default: cpu)")
    return parser
