"""The page with all tables."""

from __future__ import annotations

from ..machine import BUSY, WARNING
from ..models import GROWN, GROWN_SIZE, TRAINED
from ..peers import PEER
from ..results import Results
from ..scenarios import FORCED_TOKENS
from . import others
from .limits import ceilings_line, limits_table
from .markdown import table
from .speed import ahead_of_us, details, groups, models_of, notes, speed_up_table, title_of

HEAD = """\
<!-- Written by `python -m benchmarks report` from benchmarks/results. Edits are lost. -->

# Benchmarks

`make bench` measures again, on your machine, and then writes this page and the README's figures
anew; `make bench BENCH_FLAGS=--help` tells how to measure a part, or other sizes, which leaves both
as they are. Every peer runs in a process of its own, with the
same number of threads and the same weights: random ones of the real sizes, rounded to float16 as
those of official checkpoints are, or those of two models that transcribe: `micro`, the bundled
trained checkpoint, of width 128, and `grown-base`, which is `micro` grown to the dimensions of base
([how](../benchmarks/grown.py)): it hears what `micro` hears, at the cost of base. Peers take turns
(A B C, A B C, …), so that a slow minute falls on all of them. A time is the median of the rounds,
with the interquartile range (IQR); a speed-up is the median of the ratios within each round.
With random weights every engine decodes the same forced number of tokens, which is verified; with
the two others, whatever it recognizes.
"""

AHEAD_NOTE = (
    "Each precision of whisper_max beside the fastest other engine of the same arithmetic, and "
    "`high`, the default, beside the fastest of all."
)

EMPTY = "\nNothing has been measured yet.\n"

WORK_NOTE = "Only what no implementation can leave out counts as work (benchmarks/work.py)."

OVERHEAD_NOTE = (
    f"What a token of a window of {FORCED_TOKENS} costs beyond the execution of graphs: Python, "
    "PyTorch, entering and leaving MAX; the prompt and the session's beginning are included."
)

STEP_NOTE = (
    "CTranslate2 offers no single step: its figures are differences between decoding more "
    "tokens and fewer, and include the choice of tokens. Of the others a step is timed through "
    "PyTorchInference.logits, as loops other than upstream's call it; whisper_max's transcribe "
    "takes a shorter way, so that a token of a window costs less. Speech is the bundled "
    "recordings, which are synthetic, one by one or joined to 1 or 10 minutes; these are "
    "transcribed at temperature 0, without retries. Loading the model and reading the file are not "
    "included. Of OpenVINO the encoder was measured only, converted from openai-whisper's: not "
    "the decoding of OpenVINO GenAI. whisper.cpp was not measured. A result is as "
    "openai-whisper's where tokens are the same, and words and their times within 0.02 s."
)

SCALING_NOTE = "Measured apart, 1 thread and more in turns: these times compare with each other."

_NAMED = {
    TRAINED: "micro, the bundled trained model",
    GROWN: f"{GROWN}: micro, grown to the size of {GROWN_SIZE}",
}

_FACTS = {
    "cpu_kind": "cpu family",
    "cpu_level": "kernels for",
    "vnni": "VNNI, for int8",
    "bf16": "products of bfloat16",
    "affinity": "CPUs that may be used",
    "threads": "threads at most",
    "memory_available_mib": "free memory, MiB",
    "busy_cpus": "CPUs busy with something else",
}


def page(by_machine: dict[str, Results]) -> str:
    """The whole page.

    by_machine : results by the names of their files
    """
    if not by_machine:
        return HEAD + EMPTY
    sections = [section(machine, results) for machine, results in by_machine.items()]
    return "\n".join([HEAD, *sections])


def section(machine: str, results: Results) -> str:
    """Everything about one machine."""
    lines = [f"## {machine}", "", *_machine_lines(results)]
    if results.measurements:
        lines += _speed_lines(machine, results)
    if results.starts:
        lines += ["### A fresh process", "", "Graphs were compiled before.", ""]
        lines += others.starts_table(results)
    if results.compile_seconds:
        lines += ["### Compiling", ""]
        lines += others.compile_table(results)
    if results.overheads:
        lines += ["### Outside of MAX", "", OVERHEAD_NOTE, ""]
        lines += others.overhead_table(results)
    if results.accuracy:
        lines += ["### Word errors", "", "The bundled recordings and checkpoint.", ""]
        lines += others.accuracy_table(results)
    if results.thread_scaling:
        lines += ["### Threads", "", SCALING_NOTE, "", *others.scaling_table(results)]
    if results.first_run is not None:
        lines += ["### The first run", "", _image(machine, "first-run", "first-run timeline"), ""]
        lines += others.first_run_lines(results.first_run)
    remarks = [f"- {PEER[name].label}: {why}" for name, why in results.absent.items()]
    remarks += [f"- {note}" for note in notes(results)]
    if remarks:
        lines += ["### Missing measurements, and notes", "", *remarks, ""]
    return "\n".join(lines)


def _machine_lines(results: Results) -> list[str]:
    machine = {_FACTS.get(name, name): fact for name, fact in results.machine.items()}
    facts = {**machine, **results.versions}
    busy = (results.machine.get("busy_cpus") or 0) > BUSY
    return [
        f"Measured {results.measured[:10]} in {results.minutes} minutes, with {results.threads} "
        f"threads.{f' **{WARNING.capitalize()}.**' if busy else ''}",
        "",
        *table(
            ["", ""],
            [[name.replace("_", " "), _in_words(fact)] for name, fact in facts.items()],
        ),
    ]


def _in_words(fact: object) -> str:
    if fact is None:
        return "not known"
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return str(fact)


def _speed_lines(machine: str, results: Results) -> list[str]:
    lines = ["### How many times faster than unpatched openai-whisper", ""]
    lines += [_image(machine, "speed-up", "speed-up per scenario and peer"), ""]
    for model in models_of(results):
        named = _NAMED.get(model, f"{model}, random weights")
        lines += [f"**{named}**", "", *speed_up_table(results, model)]
    ahead = list(ahead_of_us(results))
    lines += ["### Where another engine is faster", "", AHEAD_NOTE, ""]
    lines += [*(f"- {line}" for line in ahead), ""] if ahead else ["In no scenario here.", ""]
    if results.ceilings:
        lines += ["### Compared with large products and large copies", ""]
        lines += [ceilings_line(results), ""]
        lines += [WORK_NOTE, ""]
        lines += [_image(machine, "roofline", "share of the reference"), ""]
        lines += limits_table(results)
    lines += ["### Times", "", STEP_NOTE, ""]
    for group in groups(results):
        lines += [f"**{title_of(group)}, {group[1]}**", "", *details(results, group)]
    return lines


def _image(machine: str, name: str, description: str) -> str:
    return f"![{description}](benchmarks/{machine}/{name}.svg)"
