"""How far from the machine's limits: what was achieved beside what it can do at most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..inputs import PROMPT
from ..peers import PEER
from ..results import Results
from ..samples import summarize
from ..work import encoder_operations, prefill_operations, step_bytes
from .markdown import significant, table
from .speed import groups, title_of


@dataclass(frozen=True)
class Achieved:
    """One peer in one scenario.

    amount : giga-operations or gigabytes per second, as `unit` says
    ceiling : what large matrix products or copies reach
    """

    scenario: str
    model: str
    peer: str
    amount: float
    unit: str
    ceiling: float

    @property
    def part(self) -> float:
        """Of the ceiling; above 1 where fewer bytes or faster products than the ceiling's do."""
        return self.amount / self.ceiling


def achieved(results: Results) -> Iterator[Achieved]:
    """For the scenarios whose operations or bytes are known."""
    for group in groups(results):
        scenario, model = group
        if scenario not in ("encoder", "prefill", "step", "step_beam5"):
            continue
        for one in results.of_group(*group):
            if one.samples:
                seconds = summarize(one.samples).median
                unit, work, ceiling = _work(results, scenario, model, one.peer)
                yield Achieved(scenario, model, one.peer, work / seconds / 1e9, unit, ceiling)


def limits_table(results: Results) -> list[str]:
    """All of `achieved`."""
    rows = [
        [
            f"{title_of((one.scenario, one.model))}, {one.model}",
            PEER[one.peer].label,
            f"{significant(one.amount)} {one.unit}",
            f"{significant(one.ceiling)} {one.unit}",
            f"{100 * one.part:.0f} %",
        ]
        for one in achieved(results)
    ]
    return table(["", "", "achieved", "ceiling", ""], rows)


def ceilings_line(results: Results) -> str:
    """The machine's ceilings in words."""
    ceilings = results.ceilings
    bfloat16 = ceilings["bfloat16_gflops"]
    products = f"{significant(ceilings['float32_gflops'])} GFLOP/s in float32" + (
        " (bfloat16 would be emulated)"
        if bfloat16 is None
        else f", {significant(bfloat16)} GFLOP/s in bfloat16"
    )
    return (
        f"A large matrix product in PyTorch reaches {products}; a large copy "
        f"{significant(ceilings['copy_gbytes'])} GB/s, reading alone "
        f"{significant(ceilings['read_gbytes'])} GB/s."
    )


def _work(
    results: Results, scenario: str, model: str, peer: str
) -> tuple[str, float, float]:
    dims, ceilings = results.models[model], results.ceilings
    if scenario == "encoder":
        return "GFLOP/s", encoder_operations(dims), _most_operations(results)
    if scenario == "prefill":
        return "GFLOP/s", prefill_operations(dims, len(PROMPT)), _most_operations(results)
    entry = PEER[peer]
    rows = 5 if scenario == "step_beam5" else 1
    read = step_bytes(dims, rows, entry.weight_bytes, entry.cross_bytes)
    return "GB/s", read, max(ceilings["copy_gbytes"], ceilings["read_gbytes"])


def _most_operations(results: Results) -> float:
    ceilings = results.ceilings
    return max(ceilings["float32_gflops"], ceilings["bfloat16_gflops"] or 0.0)
