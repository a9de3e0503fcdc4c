"""`whisper-max cache`: the compiled graphs on disk."""

from __future__ import annotations

import time

from ..runtime import cache_listing
from ..runtime.cache_folder import CacheRefused
from ..runtime.storage import BUILDER, precisions_of
from ..settings import Settings
from .errors import CommandError, Parser
from .sizes import readable


def run(arguments: list[str]) -> int:
    """List the artifacts, clear them, or print the folder they are in."""
    parser = Parser(prog="whisper-max cache", description="The compiled graphs on disk.")
    actions = parser.add_subparsers(dest="action", metavar="list|clear|path", required=True)
    actions.add_parser("list", help="each file, whether it can be used, and what it took")
    clear = actions.add_parser("clear", help="remove them all; those needed are compiled again")
    clear.add_argument(
        "--stale",
        action="store_true",
        help="only those of other versions or for another CPU, and what is left of failures",
    )
    actions.add_parser("path", help="print the folder (WHISPER_MAX_CACHE_DIR moves it)")
    options = parser.parse_args(arguments)
    action = options.action
    try:
        folder = Settings.from_environment().cache_dir
        if action == "path":
            print(folder)
        elif action == "clear":
            freed = cache_listing.clear(folder, only_stale=options.stale)
            print(f"freed {readable(freed)} in {folder}")
        else:
            print(_table(cache_listing.list_artifacts(folder)) or f"nothing in {folder}")
    except (CacheRefused, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    return 0


def _table(records: list[cache_listing.ArtifactRecord]) -> str:
    if not records:
        return ""
    width = max(len(record.label) for record in records)
    row = f"{{:<{width}}}  {{:<13}}  {{:<9}}  {{:>9}}  {{:<16}}  {{:>7}}  {{:>9}}".format
    lines = [row("graphs", "precision", "state", "size", "made", "took", "memory")]
    for record in records:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created))
        seconds, memory = record.compile_seconds, record.peak_memory_bytes
        lines.append(
            row(
                record.label,
                _precisions(record.key),
                record.state,
                readable(record.size) if record.size else "",
                made if record.created else "",
                "" if seconds is None else f"{seconds:.0f} s",
                "" if memory is None else readable(memory),
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def _precisions(key: dict) -> str:
    if key.get("builder") != BUILDER:  # one for a GPU, or what cannot be read
        return ""
    return ", ".join(precisions_of(key.get("options", {}), key.get("cpu_level", "")))
