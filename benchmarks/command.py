"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import models, peers, places, scenarios

DEFAULT_MODELS = ("tiny", "base")
FAILED, REFUSED = 1, 2  # exit codes

NO_GPU = "PyTorch finds no NVIDIA GPU. For graphs of GPUs that need not be there: gpu-compile."
GPU_MODELS = ("base", "turbo", "large-v3")
GPU_ARCHITECTURES = ("sm_80", "sm_90a")
GPU_DTYPES = ("float16", "bfloat16", "float32")

TAKES = {
    "measure": {
        "scenarios",
        "models",
        "peers",
        "repeats",
        "threads",
        "add",
        "quick",
        "prepare",
        "machine",
        "work",
    },
    "report": set(),
    "gpu-compile": {"models", "architectures", "dtypes"},
    "gpu": {"models", "repeats", "machine"},
}
"""The options of each command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    argv : the arguments, default those of the process
    """
    parser = _parser()
    options = parser.parse_args(argv)
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if stray := sorted(given - TAKES[options.command] - {"command"}):
        parser.error(f"{options.command} takes no --{', --'.join(stray)}")
    if options.add and peers.BASELINE not in options.peers:
        parser.error(f"--add is for what is measured in turns with {peers.BASELINE}")
    if options.command == "gpu-compile":
        return _gpu_compile(options)
    if options.command == "gpu":
        return _gpu(options)
    if options.command == "report":
        return _report(places.PUBLISHED)
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    # Nothing here is to compete with a peer's process for a CPU.
    os.environ["OMP_NUM_THREADS"] = "1"
    # These bring in PyTorch and openai-whisper, which the other commands do without.
    from . import campaign, machine, preparation
    from .merging import merged, why_apart
    from .results import load, save

    plan = campaign.Plan(
        scenarios=options.scenarios,
        models=("tiny",) if options.quick and options.models is None else _models(options),
        peers=options.peers,
        threads=options.threads,
        repeats=options.repeats,
        quick=options.quick,
        work=options.work,
    )
    if options.prepare:
        present, _ = campaign.attendance(plan.entries())
        preparation.prepare(plan.models, present, plan.threads, plan.work, _say)
        return 0
    whole = set(options.scenarios) == set(scenarios.NAMES) and set(options.peers) == set(peers.PEER)
    publish = not options.quick and (whole or options.add)
    destination = places.PUBLISHED if publish else places.trial(options.work)
    results = campaign.begin(plan)
    path = destination.results / f"{options.machine or machine.name_of(results.machine)}.json"
    earlier = load(path) if options.add and path.exists() else None
    alone = set(options.scenarios) == {"first_run"}
    if earlier is not None and not alone and (why := why_apart(earlier, results)):
        print(f"cannot add to {path}: {why}", file=sys.stderr)
        return REFUSED

    def keep() -> None:
        if alone and results.first_run is None:
            return
        save(results if earlier is None else merged(earlier, results), path)

    campaign.run(plan, results, _say, keep)
    _say(f"wrote {path} after {results.minutes} minutes")
    return _report(destination)


def _gpu(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return REFUSED
    from . import gpu, machine

    name = options.machine or machine.slug(torch.cuda.get_device_name())
    path = places.PUBLISHED.results / "gpu" / f"{name}.json"
    gpu.run(options.models or GPU_MODELS, "cuda", path, _say, options.repeats or gpu.ROUNDS)
    _say(f"wrote {path}")
    return 0


def _gpu_compile(options: argparse.Namespace) -> int:
    from . import gpu_compile

    failures = gpu_compile.run(
        options.models or ("tiny",), options.architectures, options.dtypes, _say
    )
    return FAILED if failures else 0


def _report(destination: places.Destination) -> int:
    from .report import write

    for path in write(destination):
        _say(f"wrote {path}")
    return 0


def _models(options: argparse.Namespace) -> tuple[str, ...]:
    return options.models or DEFAULT_MODELS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure whisper_max and its peers. Without a command: measure and report. "
        "A complete run is published: it replaces this machine's results in benchmarks/results, "
        "docs/benchmarks.md and the README's figures. A run of only some scenarios or peers, or a "
        "quick one, goes into the work folder.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("measure", "report", "gpu-compile", "gpu"),
        default="measure",
        help="report: make tables and plots from the results that are there; gpu-compile: compile "
        "the graphs for GPUs that need not be there; gpu: measure a GPU that is there",
    )
    parser.add_argument(
        "--scenarios",
        type=_names_of(scenarios.NAMES),
        default=scenarios.NAMES,
        metavar="A,B",
        help=f"measure only these, of {', '.join(scenarios.NAMES)}",
    )
    parser.add_argument(
        "--models",
        type=_names_of(models.SIZES),
        metavar="A,B",
        help=f"sizes with random weights, of {', '.join(models.SIZES)} (default: "
        f"{','.join(DEFAULT_MODELS)}; on a GPU {','.join(GPU_MODELS)})",
    )
    parser.add_argument(
        "--peers",
        type=_names_of(tuple(peers.PEER)),
        default=tuple(peers.PEER),
        metavar="A,B",
        help=f"measure only these, of {', '.join(peers.PEER)}; all are loaded at once, which takes "
        "memory",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="how often every scenario is measured (default: its own number)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="threads of every peer (default: 2)"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="publish some scenarios, models or peers: put them into the results that are there, "
        "which must be of the same machine and versions. What was measured in turns is replaced "
        f"together, so {peers.BASELINE} must be among the peers",
    )
    parser.add_argument(
        "--architectures",
        type=_names_of(GPU_ARCHITECTURES),
        default=GPU_ARCHITECTURES,
        metavar="A,B",
        help=f"for gpu-compile, of {', '.join(GPU_ARCHITECTURES)}",
    )
    parser.add_argument(
        "--dtypes",
        type=_names_of(GPU_DTYPES),
        default=GPU_DTYPES[:1],
        metavar="A,B",
        help=f"for gpu-compile, of {', '.join(GPU_DTYPES)} (default: {GPU_DTYPES[0]})",
    )
    parser.add_argument("--quick", action="store_true", help="see that it works, measure nothing")
    parser.add_argument(
        "--prepare", action="store_true", help="make weights and conversions, and stop"
    )
    parser.add_argument(
        "--machine", metavar="NAME", help="name of the results file (default: the CPU's)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=places.WORK,
        metavar="FOLDER",
        help="where weights and conversions are kept, a few gigabytes (default: .cache/benchmarks)",
    )
    return parser


def _names_of(known: Sequence[str]):
    def names(text: str) -> tuple[str, ...]:
        chosen = [name.strip() for name in text.split(",")]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
        return tuple(name for name in known if name in chosen)

    return names


def _say(line: str) -> None:
    print(line, flush=True)
