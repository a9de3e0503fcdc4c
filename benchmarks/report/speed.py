"""Times and speed-ups: who is how much faster than unpatched openai-whisper."""

from __future__ import annotations

from collections.abc import Iterator

from ..models import WITH_WORDS
from ..peers import BASELINE, OURS, PEER
from ..results import NOT_OFFERED, Measurement, Results
from ..samples import Summary, speed_up, summarize
from ..scenarios import SCENARIO, SCENARIOS
from .markdown import NONE, duration, significant, table, times

LEVEL = 1.005
"""A ratio that is shown as 1.00 or less is no lead."""

DEFAULT = f"{OURS}-high"
"""The precision that users get who ask for none."""

Group = tuple[str, str]
"""A scenario and a model: what was measured in turns."""


def groups(results: Results) -> list[Group]:
    """Everything that was measured, model by model, in the order of the scenarios."""
    models = dict.fromkeys(one.model for one in results.measurements)
    models = sorted(models, key=lambda model: model in WITH_WORDS)  # others may be additions
    return [
        (scenario.name, model)
        for model in models
        for scenario in SCENARIOS
        if results.of_group(scenario.name, model)
    ]


def models_of(results: Results) -> list[str]:
    """Models in the order in which they were measured, those that transcribe last."""
    return list(dict.fromkeys(model for _, model in groups(results)))


def peers_of(results: Results) -> list[str]:
    """Peers with any figure, without the baseline, in the order of `peers.PEERS`."""
    measured = {one.peer for one in results.measurements if one.samples}
    return [name for name in PEER if name in measured and name != BASELINE]


def speed_ups(results: Results, group: Group) -> dict[str, Summary]:
    """By peer, without the baseline; empty where the baseline has no figure."""
    baseline = results.find(*group, BASELINE)
    if baseline is None:
        return {}
    found = {name: results.find(*group, name) for name in peers_of(results)}
    return {
        name: speed_up(baseline.samples, one.samples)
        for name, one in found.items()
        if one is not None
    }


def speed_up_table(results: Results, model: str) -> list[str]:
    """Scenarios by peers; the fastest of each row is bold."""
    peers = peers_of(results)
    rows = []
    for group in groups(results):
        baseline = results.find(*group, BASELINE)
        if group[1] != model or baseline is None:
            continue
        ratios = speed_ups(results, group)
        # It may be the baseline itself that is the fastest.
        best = max([1.0, *(ratio.median for ratio in ratios.values())])
        cells = [_ratio_cell(ratios.get(peer), best) for peer in peers]
        rows.append([title_of(group), duration(summarize(baseline.samples).median), *cells])
    return table(["", "openai-whisper", *(PEER[name].label for name in peers)], rows)


def ahead_of_us(results: Results) -> Iterator[str]:
    """One line for each other peer that beats a precision of whisper_max it is to be compared with.

    Those are the precision with the same arithmetic, and the default one; each is compared with the
    fastest other peer.
    """
    for group in groups(results):
        ratios = {name: ratio.median for name, ratio in speed_ups(results, group).items()}
        others = {BASELINE: 1.0, **{n: r for n, r in ratios.items() if not PEER[n].ours}}
        for our in (name for name in ratios if PEER[name].ours):
            same = {n: r for n, r in others.items() if PEER[n].arithmetic == PEER[our].arithmetic}
            rivals = others if our == DEFAULT else same
            if not rivals:
                continue
            best = max(rivals, key=rivals.get)
            if rivals[best] > LEVEL * ratios[our]:
                yield (
                    f"{title_of(group)}, {group[1]}: {PEER[best].label} is "
                    f"{times(rivals[best] / ratios[our])} as fast as {PEER[our].label}"
                )


def details(results: Results, group: Group) -> list[str]:
    """Every peer of a scenario: time, spread, speed-up, throughput, and what it decoded."""
    baseline = results.find(*group, BASELINE)
    decodes = any(one.audio_seconds for one in results.of_group(*group))
    header = ["", "median", "IQR", "speed-up", "IQR", "runs"]
    if decodes:
        header += ["real-time factor", "tokens/s", "result as openai-whisper"]
    rows = []
    for one in results.of_group(*group):
        label = PEER[one.peer].label
        if one.missing.startswith(NOT_OFFERED):
            continue
        if not one.samples:
            rows.append([label, one.missing.partition(":")[0], *[NONE] * (len(header) - 2)])
            continue
        row = [label, *_time_cells(summarize(one.samples))]
        if baseline is None or one is baseline:
            row += [NONE, NONE]
        else:
            ratio = speed_up(baseline.samples, one.samples)
            row += [times(ratio.median), f"{times(ratio.low)} to {times(ratio.high)}"]
        row.append(str(len(one.samples)))
        rows.append(row + (_decoding_cells(one) if decodes else []))
    return table(header, rows)


def notes(results: Results) -> list[str]:
    """Why figures are missing, and what has to be known about others; each once."""
    lines = {}
    for one in [*results.measurements, *results.thread_scaling]:
        where = f"{PEER[one.peer].label}, {SCENARIO[one.scenario].title}, {one.model}"
        for remark in (one.missing, *one.remarks):
            if remark:
                lines.setdefault((PEER[one.peer].label, remark), []).append(where)
    return [
        f"{label}: {_one_line(remark)} ({len(places)} cases, first: {places[0]})"
        for (label, remark), places in lines.items()
    ]


def title_of(group: Group) -> str:
    """The scenario's title."""
    return SCENARIO[group[0]].title


def _time_cells(summary: Summary) -> list[str]:
    return [duration(summary.median), f"{duration(summary.low)} to {duration(summary.high)}"]


def _decoding_cells(one: Measurement) -> list[str]:
    seconds = summarize(one.samples).median
    identical = {None: NONE, True: "identical", False: "differ"}[one.identical]
    if one.peer == BASELINE:
        identical = NONE
    tokens = significant(one.tokens / seconds) if one.tokens else NONE
    return [f"{seconds / one.audio_seconds:.4f}", tokens, identical]


def _ratio_cell(ratio: Summary | None, best: float) -> str:
    if ratio is None:
        return NONE
    return f"**{times(ratio.median)}**" if ratio.median == best else times(ratio.median)


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= limit else f"{line[:limit]} …"
