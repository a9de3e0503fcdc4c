"""What was achieved, beside large matrix products in PyTorch and large copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..inputs import PROMPT_TOKENS
from ..peers import PEER
from ..results import Results
from ..samples import summarize
from ..work import encoder_operations, prefill_operations, step_bytes
from .markdown import NONE, significant, table
from .speed import groups, title_of


@dataclass(frozen=True)
class Achieved:
    """One peer in one scenario.

    amount : giga-operations or gigabytes per second, as `unit` says
    ceiling : what large matrix products of the peer's arithmetic reach, or large copies; None
        where that was not measured
    """

    scenario: str
    model: str
    peer: str
    amount: float
    unit: str
    ceiling: float | None

    @property
    def part(self) -> float | None:
        """Of the ceiling; above 1 for what does better than PyTorch's large products."""
        return None if self.ceiling is None else self.amount / self.ceiling


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
            NONE if one.ceiling is None else f"{significant(one.ceiling)} {one.unit}",
            NONE if one.part is None else f"{100 * one.part:.0f} %",
        ]
        for one in achieved(results)
    ]
    return table(["", "", "achieved", "reference", ""], rows)


def ceilings_line(results: Results) -> str:
    """The machine's ceilings in words."""
    ceilings = results.ceilings
    products = [f"{significant(ceilings['float32_gflops'])} GFLOP/s in float32"]
    for name in ("bfloat16", "int8"):
        if ceilings.get(f"{name}_gflops") is not None:
            products.append(f"{significant(ceilings[f'{name}_gflops'])} GFLOP/s in {name}")
        else:
            products.append(f"{name} would be emulated, or was not measured")
    return (
        f"A large matrix product in PyTorch reaches {', '.join(products)}; a large copy "
        f"{significant(ceilings['copy_gbytes'])} GB/s, reading alone "
        f"{significant(ceilings['read_gbytes'])} GB/s. A peer's reference is that of its own "
        "arithmetic. It is no bound: who does better than PyTorch is above 100 %."
    )


def _work(
    results: Results, scenario: str, model: str, peer: str
) -> tuple[str, float, float | None]:
    dims, ceilings, entry = results.models[model], results.ceilings, PEER[peer]
    most = ceilings.get(f"{entry.arithmetic}_gflops")
    if scenario == "encoder":
        return "GFLOP/s", encoder_operations(dims), most
    if scenario == "prefill":
        return "GFLOP/s", prefill_operations(dims, PROMPT_TOKENS), most
    rows = 5 if scenario == "step_beam5" else 1
    read = step_bytes(dims, rows, entry.weight_bytes, entry.cross_bytes)
    return "GB/s", read, max(ceilings["copy_gbytes"], ceilings["read_gbytes"])
