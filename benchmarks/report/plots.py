"""Plots, each as PNG and SVG: speed-up, distance to the limits, timeline of the first run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed

from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from ..inputs import FIRST_RUN  # noqa: E402
from ..peers import PEER  # noqa: E402
from ..results import FirstRun, Results  # noqa: E402
from .limits import achieved  # noqa: E402
from .speed import groups, models_of, peers_of, speed_ups, title_of  # noqa: E402

FORMATS = ("png", "svg")
# The same results give the same files.
STYLE = {
    "svg.hashsalt": "benchmarks",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
OURS = ("#0b3d91", "#2f6fde", "#8ab4f8")
OTHERS = ("#333333", "#7a0177", "#c51b8a", "#d94801", "#fd8d3c", "#238b45", "#74c476", "#969696")


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws what there are results for; returns the files."""
    paths = []
    with pyplot.rc_context(STYLE):
        for name, figure in _figures(results):
            folder.mkdir(parents=True, exist_ok=True)
            for form in FORMATS:
                path = folder / f"{name}.{form}"
                metadata = {"Date": None} if form == "svg" else {"Software": None}
                figure.savefig(path, dpi=110, bbox_inches="tight", metadata=metadata)
                paths.append(path)
            pyplot.close(figure)
    return paths


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    if any(speed_ups(results, group) for group in groups(results)):
        yield "speed-up", speed_up_figure(results)
    if results.ceilings and any(True for _ in achieved(results)):
        yield "roofline", roofline_figure(results)
    if results.first_run is not None:
        yield "first-run", first_run_figure(results.first_run)


def speed_up_figure(results: Results) -> Figure:
    """Bars: one panel for each model, one cluster for each scenario, one bar for each peer."""
    models = models_of(results)
    counts = [sum(model == m for _, m in groups(results)) for model in models]
    colors = _colors(peers_of(results))
    figure, panels = pyplot.subplots(
        len(models),
        1,
        figsize=(8, 1.2 + 0.1 * (len(colors) + 2) * sum(counts)),
        height_ratios=counts,
        squeeze=False,
        sharex=True,
    )
    for axes, model in zip(panels[:, 0], models):
        of_model = [group for group in groups(results) if group[1] == model]
        _clusters(axes, [speed_ups(results, group) for group in of_model], colors)
        axes.set_yticks(range(len(of_model)), [title_of(group) for group in of_model])
        axes.set_title(model, loc="left")
        axes.set_ylim(len(of_model) - 0.5, -0.5)
    panels[-1, 0].set_xlabel("times faster than unpatched openai-whisper")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    labels = [PEER[name].label for name in colors]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def roofline_figure(results: Results) -> Figure:
    """Bars: what each peer reaches of its reference, see `limits`."""
    reached = list(achieved(results))
    rows = list(dict.fromkeys((one.scenario, one.model) for one in reached))
    colors = _colors([name for name in PEER if any(one.peer == name for one in reached)])
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.1 * (len(colors) + 2) * len(rows)))
    for row, group in enumerate(rows):
        parts = {one.peer: one.part for one in reached if (one.scenario, one.model) == group}
        for place, name in _places(colors):
            if parts.get(name) is not None:
                axes.barh(row + place, parts[name], 0.8 / len(colors), color=colors[name])
    axes.set_yticks(range(len(rows)), [f"{title_of(group)}, {group[1]}" for group in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("of large matrix products in the same arithmetic, or of reading memory")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    labels = [PEER[name].label for name in colors]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def first_run_figure(first_run: FirstRun) -> Figure:
    """Lines: how fast transcriptions are done, plain and over the first patched run."""
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    plain = median(
        (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
        for times in first_run.plain
    )
    axes.axhline(plain, color=OTHERS[0], label="openai-whisper, on average")
    times = first_run.patched[-1]
    # As many as the script has recordings: they are of different lengths.
    window = min(len(FIRST_RUN), len(times) - 1)
    rates = [window / (end - begin) for begin, end in zip(times, times[window:])]
    axes.plot(
        times[window:], rates, color=OURS[0], label=f"patched, over the last {window}"
    )
    if first_run.changed >= 0:
        moment = times[first_run.changed]
        axes.axvline(moment, color="black", linewidth=0.8, linestyle="--")
        place = axes.get_xaxis_transform()  # upwards in shares of the height
        axes.text(moment, 0.6, "MAX takes over ", ha="right", transform=place)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the script was started")
    axes.set_ylabel("transcriptions per second")
    axes.legend(loc="upper left")
    return figure


def _clusters(axes: pyplot.Axes, clusters: list[dict], colors: dict[str, str]) -> None:
    for row, ratios in enumerate(clusters):
        for place, name in _places(colors):
            if name in ratios:
                ratio = ratios[name]
                spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
                width = 0.8 / len(colors)
                axes.barh(row + place, ratio.median, width, color=colors[name], xerr=spread)
    axes.axvline(1.0, color="black", linewidth=0.8)


def _places(colors: dict[str, str]) -> Iterator[tuple[float, str]]:
    """Where each peer's bar stands in its cluster, around 0."""
    for number, name in enumerate(colors):
        yield 0.8 * ((number + 0.5) / len(colors) - 0.5), name


def _colors(peers: list[str]) -> dict[str, str]:
    """Shades of blue for whisper_max, other colors for others; the same in every plot."""
    ours, others = iter(OURS), iter(OTHERS)
    colors = {name: next(ours if peer.ours else others) for name, peer in PEER.items()}
    return {name: colors[name] for name in peers}
