"""How numbers and names read in texts, figures and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from workers.contracts import Budget, Interval, MixturePlan, Partition, SamplerRef

DOUBTFUL_ERROR = 0.1
"""Median prediction error of a latency table beyond which something else was probably running."""

CUT_ONLY = "cut only"
"""The baseline that was never trained, in a row's label."""
FEW_STEPS = 2
"""An expert that serves fewer of a sampler's steps than this is warned of."""


def percent(ratio: float) -> str:
    return f"{100 * ratio:,.0f}%" if ratio >= 10 else f"{100 * ratio:.3g}%"


def sig(value: float) -> str:
    """Three digits, zeros kept, so that numbers in a sentence can be compared."""
    return f"{value:#.3g}".rstrip(".")


def both(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def span(interval: Interval) -> str:
    return f"t {interval.start}\N{EN DASH}{interval.stop}"


def dropped(plan: MixturePlan) -> int:
    """Branches dropped, over all experts."""
    return sum(choice == 0 for spec in plan.experts for choice in spec.choices.values())


def label(budget: Budget) -> str:
    """Short, where room is scarce: ``65%``, or ``65% time``."""
    return percent(budget.ratio) + ("" if budget.metric == "macs" else f" {budget.quantity}")


def of_dense(budget: Budget) -> str:
    """``65% of dense MACs``, or ``65% of dense time``."""
    return f"{percent(budget.ratio)} of dense {budget.quantity}"


def of_the_dense_model(budgets: Sequence[Budget]) -> str:
    """``65% and 50% of the dense model's MACs and 60% of its time``."""
    ratios: dict[str, list[str]] = {}
    for budget in budgets:
        ratios.setdefault(budget.quantity, []).append(percent(budget.ratio))
    owners = ("the dense model's", *("its" for _ in budgets))
    return both(f"{both(found)} of {whose} {quantity}" for (quantity, found), whose in zip(ratios.items(), owners, strict=False))


def gmacs(macs: float, without_attention: float) -> str:
    """In both conventions, where they differ: ``101.20 GMACs (96.02 without attention products)``."""

    def text(value: float) -> str:
        return f"{value / 1e9:.2f}" if value >= 1e9 else sig(value / 1e9)

    return f"{text(macs)} GMACs" + (f" ({text(without_attention)} without attention products)" if without_attention != macs else "")


def few_steps(partition: Partition, served: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence for every expert and sampler (``ddim:20``) of whose steps it serves fewer than FEW_STEPS."""
    return [
        f"{interval.name} serves {steps} of {sampler}'s {sum(counts)} steps; two or more are better"
        for sampler, counts in served.items()
        for interval, steps in zip(partition.intervals, counts, strict=True)
        if steps < FEW_STEPS
    ]


def spent(seconds: Mapping[str, float], training_s: float | None = None) -> str:
    """What a search cost: ``41 s of workers' time (sensitivities 3 s, trials 38 s)``, or ``41 s of workers' time, 3.9% of training's``."""

    def text(value: float) -> str:
        return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"

    told = f"{text(sum(seconds.values()))} of workers' time"
    if training_s:
        return f"{told}, {sum(seconds.values()) / training_s:.1%} of training's"
    return f"{told} ({', '.join(f'{name} {text(value)}' for name, value in seconds.items())})"


def merits(plans: Sequence[MixturePlan], steps: int) -> str:
    """What one budget's plan was chosen by, best first: ``far from dense after 60 fine-tuning steps: era 0.012, uniform 0.02``."""
    ranked = sorted(plans, key=lambda plan: plan.rank)
    if all(plan.distance is None for plan in plans):
        return "search loss: " + ", ".join(f"{plan.agent} {plan.loss:.4f}" for plan in ranked)
    told = ", ".join(f"{plan.agent} {plan.distance:.3g}" for plan in ranked if plan.distance is not None)
    return f"how far from dense after {steps} steps of fine-tuning: {told}"


def gigabytes(count: float) -> str:
    """Of bytes: ``31 GB``, ``0.027 GB``."""
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.2g} GB"


def hours(value: float) -> str:
    """An estimate: ``1,234``, ``2.3``, ``0.06``, ``<0.01``."""
    return "<0.01" if value < 0.01 else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def predicts(dense_ms: float, median_error: float, p95_error: float) -> str:
    """What was just measured, and how far to trust it."""
    return (
        f"measured: a dense step takes {dense_ms:.3g} ms; sub-networks are predicted with a median error of {median_error:.1%} "
        f"(95th percentile {p95_error:.1%})" + ("; something else was probably running" if median_error > DOUBTFUL_ERROR else "")
    )


def predicted_ms(plan: MixturePlan) -> float | None:
    """Schedule-weighted time of a step for a batch, by the job's latency table; None if the plan was made without one."""
    costs = (*plan.expert_costs, plan.dense_cost)
    return None if any(cost.latency_ms is None for cost in costs) else plan.cost("latency")


def timing(batch: int, dtype: str, compiled: bool, cuda_graphs: bool = False, fused_kernels: bool = False) -> str:
    """Under what a time holds: ``a batch of 16 in float32, not compiled``."""
    return f"a batch of {batch} in {dtype}, " + kernels(compiled, cuda_graphs, fused_kernels)


def timed_on(row: Mapping[str, Any], elsewhere: Sequence[str] = ()) -> str:
    """On what, and how, the times of a table were taken; and which of its rows have none, since they were timed on another device."""
    told = f"times: on {row.get('device') or 'a device that an older version did not name'}"
    if row.get("timing"):
        told += f", {timing(*(row['timing'].get(key, False) for key in ('batch', 'dtype', 'compiled', 'cuda_graphs', 'fused_kernels')))}"
    return told + (f"; those of {both(elsewhere)} are left out, as they are of another device" if elsewhere else "")


def measured_under(protocol: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """A protocol in one sentence, beginning with its id. Of distances, those that any of the ``rows`` has are named."""
    p, rows = protocol, list(rows)
    drawn = f"sampled in {p['dtype']}" + (f" with guidance {p['guidance_scale']:g}" if p["guidance_scale"] != 1 else "")
    drawn += f" from the noise of seed {p['seed']}"
    if not p["extractor"]:
        return f"protocol {p['id']}: {drawn}; no distances (evaluate.frechet_samples is 0)"
    resized = f", resized to {p['input_size']} ({p['resize']})" if p["input_size"] not in (None, p["image_shape"][-1]) else ""
    kernel = any(row.get("kid") is not None for row in rows)
    distances = "Frechet (FD) and kernel distance (KID)" if kernel else "Frechet distance (FD)"
    count, digest = p.get("kid_images", p["reference_images"]), p.get("kid_digest", p["reference_digest"])
    behind = f" (KID: {count:,}" + (")" if digest == p["reference_digest"] else f", digest {digest[:8]})")
    behind = behind if kernel and (count, digest) != (p["reference_images"], p["reference_digest"]) else ""
    return (
        f"protocol {p['id']}: {distances} of the {p['extractor']} features of {p['images']:,} images, 8 bits{resized}, to those of "
        f"{p['reference_images']:,} reference images{behind}; {drawn}"
    )


def sampler_of(metrics: Mapping[str, Any]) -> SamplerRef:
    """With what a row was drawn."""
    return SamplerRef.from_json(metrics["sampler"])


def sampler(metrics: Mapping[str, Any]) -> str:
    """``ddim:50``, or with scaled noise ``ddim:50:1.002``, or ``ddim:50 eta 0.5``."""
    found = sampler_of(metrics)
    return found.name + (f" eta {found.eta:g}" if found.eta else "")


def optional(value: float | None, text: Callable[[float], str] = sig) -> str:
    """Nothing for what was not measured, or is no number."""
    return "" if value is None or not math.isfinite(value) else text(value)


def kernels(compiled: bool, cuda_graphs: bool = False, fused_kernels: bool = False) -> str:
    """What ran a network, and how."""
    by = "with compiled blocks" if compiled else "with fused kernels" if fused_kernels else "not compiled"
    return by + (", as CUDA graphs" if cuda_graphs else "")
