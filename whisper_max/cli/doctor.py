"""`whisper-max doctor`: is everything here that is needed, does it compute right, what mends it."""

from __future__ import annotations

import json
from dataclasses import asdict

from .. import versions
from ..options import add_options
from ..runtime import hardware, limits
from ..settings import Settings
from . import findings
from .errors import Parser
from .findings import Finding

_UNHEALTHY = 1


def run(arguments: list[str]) -> int:
    """Print what was found; 1 when something is missing or wrong."""
    parser = Parser(
        prog="whisper-max doctor",
        description="Check the installation, and print the command that fixes what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_options(parser, "precision")
    options = parser.parse_args(arguments)

    found = [*findings.of_the_installation(), *findings.of_the_machine()]
    try:
        settings = Settings.from_environment(precision=options.precision)
    except ValueError as error:
        found.append(Finding("settings", "problem", str(error)))
    else:
        found += [*findings.of_the_settings(settings), *findings.of_the_graphs(settings)]
    healthy = not any(finding.state == "problem" for finding in found)
    print(_json(found, healthy) if options.json else "\n".join(map(str, found)))
    return 0 if healthy else _UNHEALTHY


def _json(found: list[Finding], healthy: bool) -> str:
    content = {
        "healthy": healthy,
        "versions": versions.installed(),
        "machine": {**hardware.describe(), "cpu_quota": limits.cpu_quota()},
        "findings": [asdict(finding) for finding in found],
    }
    return json.dumps(content, indent=2)
