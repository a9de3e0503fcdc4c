"""The README's figures, between two marks."""

from __future__ import annotations

from ..models import GROWN, GROWN_SIZE, SIZES, WITH_WORDS
from ..peers import BASELINE, OURS, PEER
from ..results import Results
from ..samples import summarize
from .markdown import NONE, duration, significant, table, times
from .speed import groups, models_of, speed_ups, title_of

BEGIN = "<!-- figures -->"
END = "<!-- /figures -->"
SCENARIOS = ("encoder", "step", "window", "window_beam5", "window_words")
SCENARIOS += ("grown_clip", "grown_speech", "grown_words")
OF_THE_LARGEST = ("window", "window_beam5")
PRECISIONS = ("high", "medium", "int8")


def block(by_machine: dict[str, Results]) -> str:
    """The text between the marks: of the machine measured last, the size with the most rows.

    Of the largest size that is measured, some; and the model that transcribes at a real size.
    """
    if not by_machine:
        return "Not measured yet: `make bench` writes the figures here."
    results = max(by_machine.values(), key=lambda one: one.measured)
    measured = [model for name, model in groups(results) if name in SCENARIOS]
    sized = [model for model in reversed(models_of(results)) if model not in WITH_WORDS]
    shown = max(sized, key=measured.count, default=None)
    largest = max(sized, key=SIZES.index, default=None)
    scenarios = {GROWN: SCENARIOS, largest: OF_THE_LARGEST, shown: SCENARIOS}
    ours = [f"{OURS}-{precision}" for precision in PRECISIONS]
    rows = []
    for group in groups(results):
        baseline = results.find(*group, BASELINE)
        name, model = group
        if name not in scenarios.get(model, ()) or baseline is None:
            continue
        ratios = {name: ratio.median for name, ratio in speed_ups(results, group).items()}
        others = {name: ratio for name, ratio in ratios.items() if name not in ours}
        best = max(others, key=others.get, default=None)
        rows.append(
            [
                f"{title_of(group)} ({group[1]})",
                duration(summarize(baseline.samples).median),
                *(times(ratios[name]) if name in ratios else NONE for name in ours),
                NONE if best is None else f"{times(others[best])} {PEER[best].label}",
            ]
        )
    header = ["", "openai-whisper", *(PEER[name].label for name in ours), "fastest other measured"]
    return "\n".join([*table(header, rows), *_legend(results, shown)])


def with_block(text: str, figures: str) -> str:
    """The text with the block in place of what is between the marks, or at the end."""
    marked = f"{BEGIN}\n{figures}\n{END}"
    if BEGIN not in text or END not in text:
        return f"{text.rstrip()}\n\n{marked}\n".lstrip()
    before, _, rest = text.partition(BEGIN)
    return before + marked + rest.partition(END)[2]


def _legend(results: Results, model: str | None) -> list[str]:
    """What the table shows, and what it does not."""
    cpu, threads = results.machine["cpu_model"], results.threads
    peaks = [
        f"{significant(summarize(one.peak_mib).median)} MiB with {PEER[one.peer].label}"
        for one in results.starts
        if one.model == model and one.peak_mib
    ]
    lines = [
        "First column: the time of unpatched openai-whisper, in float32. Others: how many times "
        f"faster. {cpu}, {threads} threads, {results.measured[:10]}.",
        "Models have the real sizes and random weights; a decoder step makes one token. "
        f"{GROWN} has the size of {GROWN_SIZE} and understands synthetic speech. Loading the model "
        "and reading the file are not included.",
        f"{_needed(results)} for this.",
        "Not measured: whisper.cpp, and OpenVINO's decoding. "
        "[All figures, and how they were measured](docs/benchmarks.md)",
    ]
    if peaks:
        lines.insert(2, f"Peak memory of a process ({model}): {', '.join(peaks)}.")
    return [f"- {line}" for line in lines]


def _needed(results: Results) -> str:
    if results.machine.get("cpu_level") == "amx":
        return "The encoder needs AMX"
    return "The encoder in medium and int8 needs AVX512-BF16 and AVX512-VNNI"
