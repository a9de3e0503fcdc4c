"""Tables of what is not measured in turns: fresh processes, accuracy, threads, the first run."""

from __future__ import annotations

from statistics import median

from ..peers import BASELINE, PEER
from ..results import Accuracy, FirstRun, Results, Start
from ..samples import speed_up, summarize
from ..scenarios import SCENARIO
from .markdown import NONE, duration, percent, significant, table, times


def starts_table(results: Results) -> list[str]:
    """Fresh processes: seconds and memory."""
    plain = {one.model: one for one in results.starts if one.peer == BASELINE and one.ready}
    rows = []
    for one in results.starts:
        label = f"{PEER[one.peer].label}, {one.model}"
        if not one.ready:
            rows.append([label, one.missing.partition(":")[0], *[NONE] * 5])
            continue
        ready, first, over, peak = (
            summarize(values).median
            for values in (one.ready, one.first, _differences(one), one.peak_mib)
        )
        row = [label, duration(ready), duration(first), duration(over)]
        row += [significant(summarize(one.loaded_mib).median), significant(peak)]
        baseline = plain.get(one.model)
        row.append(times(peak / summarize(baseline.peak_mib).median) if baseline else NONE)
        rows.append(row)
    header = ["", "until loaded", "first window", "more than the second"]
    header += ["MiB loaded", "peak MiB", "peak of openai-whisper's"]
    return table(header, rows)


def _differences(start: Start) -> list[float]:
    """How much longer the first window took than the second, in each process."""
    return [first - second for first, second in zip(start.first, start.second)]


def compile_table(results: Results) -> list[str]:
    """Compile times of the peers that compile."""
    rows = [
        [PEER[name].label, ", ".join(f"{model} {duration(s)}" for model, s in by_model.items())]
        for name, by_model in results.compile_seconds.items()
    ]
    return table(["", "compiling, once"], rows)


def overhead_table(results: Results) -> list[str]:
    """Medians for each token: a row for each peer and model, greedily and with beams."""
    found = {(one.peer, one.model, one.beams): one for one in results.overheads}
    counts = sorted({beams for _, _, beams in found})
    rows = []
    for peer, model in dict.fromkeys((peer, model) for peer, model, _ in found):
        row = [f"{PEER[peer].label}, {model}"]
        for beams in counts:
            one = found.get((peer, model, beams))
            measured = one is not None and one.samples
            row.append(duration(summarize(one.samples).median) if measured else NONE)
        rows.append(row)
    return table(["", *map(_way, counts)], rows)


def _way(beams: int) -> str:
    return "greedy" if beams == 1 else f"beam {beams}"


def accuracy_table(results: Results) -> list[str]:
    """Word error rates and identical recordings."""
    rows = []
    for one in results.accuracy:
        row = [PEER[one.peer].label, _way(one.beams)]
        if one.missing:
            row += [one.missing.partition(":")[0], NONE, NONE]
        else:
            same = NONE if one.peer == BASELINE else f"{one.identical} of {one.recordings}"
            row += [percent(one.word_errors), _wrong_words(one), same]
        rows.append(row)
    header = ["", "", "word error rate", "words wrong", "recordings with the same tokens"]
    return table(header, rows)


def _wrong_words(one: Accuracy) -> str:
    """Of all references; a rate of a few hundred words is a handful of them."""
    return f"{round(one.word_errors * one.words)} of {one.words}" if one.words else NONE


def scaling_table(results: Results) -> list[str]:
    """Times with more threads, and how much faster than with one."""
    measured = {
        (one.scenario, one.model, one.peer, one.threads): summarize(one.samples).median
        for one in results.thread_scaling
        if one.samples
    }
    counts = sorted({threads for *_, threads in measured})
    rows = []
    for case in dict.fromkeys(key[:-1] for key in measured):
        scenario, model, peer = case
        seconds = [measured.get((*case, count)) for count in counts]
        alone, most = seconds[0], seconds[-1]
        cells = [NONE if value is None else duration(value) for value in seconds]
        gain = NONE if alone is None or most is None else times(alone / most)
        rows.append([f"{SCENARIO[scenario].title}, {model}: {PEER[peer].label}", *cells, gain])
    header = [f"{count} thread{'s' if count > 1 else ''}" for count in counts]
    return table(["", *header, "gain"], rows)


def first_run_lines(first_run: FirstRun) -> list[str]:
    """What the first run cost, in a sentence or two."""
    count = len(first_run.plain[0])
    plain = [times[-1] for times in first_run.plain]
    patched = [times[count - 1] for times in first_run.patched]
    ratio = speed_up(patched, plain)
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if len(plain) > 1 else ""
    further = first_run.patched[-1]
    change = "The change to MAX did not come while the script ran."
    if first_run.changed >= 0:
        done, moment = first_run.changed + 1, further[first_run.changed]
        change = (
            "It was then made to go on without a pause, until MAX took over: at transcription "
            f"{done}, {duration(moment)} after the start."
        )
        if count > 1 and done > 1:
            each = median((times[-1] - times[0]) / (count - 1) for times in first_run.plain)
            slower = (moment - further[0]) / (done - 1) / each
            change += (
                f" Until then a further transcription took {slower:.2f} times as long as with "
                "plain openai-whisper."
            )
    if first_run.sources:
        change += f" This was measured with whisper_max {first_run.sources}."
    texts = "All texts are identical." if first_run.identical else "**Texts differ.**"
    first = [median(times[0] for times in runs) for runs in (first_run.plain, first_run.patched)]
    return [
        f"A script of {count} transcriptions ({first_run.model}) takes {duration(median(plain))} "
        f"with plain openai-whisper, and {duration(median(patched))} at its first patched run, "
        f"while the graphs are compiled beside it: {ratio.median:.2f} times as long{spread}. The "
        f"first text is there after {duration(first[0])} and {duration(first[1])}. "
        f"{change} {texts}",
        "",
    ]
