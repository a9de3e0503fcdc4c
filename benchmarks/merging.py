"""Results of several runs as one, where they may be put together."""

from __future__ import annotations

import dataclasses

from .peers import OURS
from .results import Results


def merged(old: Results, new: Results) -> Results:
    """The old results, with everything that the new run has measured in its place.

    What was measured in turns is replaced together, so that ratios stay within one run.

    Raises ValueError when they do not belong together.
    """
    if why := why_apart(old, new):
        raise ValueError(why)
    minutes = round(old.minutes + new.minutes, 1)
    if old.versions != new.versions:  # then it is the first run alone
        first_run = dataclasses.replace(new.first_run, sources=new.versions[OURS])
        return dataclasses.replace(old, first_run=first_run, minutes=minutes)
    again = {(one.scenario, one.model) for one in new.measurements}
    retimed = {one.model for one in new.overheads}
    restarted = {one.model for one in new.starts}
    kept = [one for one in old.measurements if (one.scenario, one.model) not in again]
    return dataclasses.replace(
        new,
        absent={**old.absent, **new.absent},
        ceilings=_higher(old.ceilings, new.ceilings),
        models={**old.models, **new.models},
        compile_seconds={
            peer: {**old.compile_seconds.get(peer, {}), **new.compile_seconds.get(peer, {})}
            for peer in {**old.compile_seconds, **new.compile_seconds}
        },
        measurements=kept + new.measurements,
        thread_scaling=new.thread_scaling or old.thread_scaling,
        starts=[one for one in old.starts if one.model not in restarted] + new.starts,
        overheads=[one for one in old.overheads if one.model not in retimed] + new.overheads,
        accuracy=new.accuracy or old.accuracy,
        first_run=new.first_run or old.first_run,
        minutes=minutes,
    )


def _higher(
    old: dict[str, float | None], new: dict[str, float | None]
) -> dict[str, float | None]:
    """The ceilings of both runs: the machine had more to give at one time than at the other."""
    both = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
    return {
        name: max((value for value in values if value is not None), default=None)
        for name, values in both.items()
    }


def why_apart(old: Results, new: Results) -> str:
    """Why results cannot be put together, "" when they can: one machine, the same versions.

    The first run, which compares whisper_max with nothing but itself and openai-whisper, may be of
    other sources, if it is all that is new.
    """
    ours = {} if _more_than_first_run(new) else {OURS: ""}
    for name, before, now in (
        ("machine", _identity(old), _identity(new)),
        ("versions", {**old.versions, **ours}, {**new.versions, **ours}),
        ("threads", old.threads, new.threads),
    ):
        if before != now:
            return f"its {name}: {before}, now {now}; measure everything again, without --add"
    return ""


def _more_than_first_run(results: Results) -> bool:
    others = (results.measurements, results.starts, results.overheads, results.accuracy)
    return results.first_run is None or any((*others, results.thread_scaling))


def _identity(results: Results) -> tuple[object, object]:
    return results.machine["cpu_model"], results.machine["cpus"]
