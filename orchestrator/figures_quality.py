"""The report's figures of what quality costs: every measured row against its cost, and where along the timesteps quality is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orchestrator.evidence import Evidence, Measured
from orchestrator.figures import ALLOCATIONS, AXIS, DASHES, DPI, INK, KINDS, MUTED, WIDTH, _dash, _png
from orchestrator.words import percent

QUALITIES = {"frechet": "Frechet distance (log)", "paired_mse": "MSE to dense, same noise (log)"}
COSTS: dict[str, tuple[str, Callable[[Evidence, Measured], float]]] = {
    "MACs": ("MACs of all steps, relative to dense", Evidence.macs_ratio),
    "time": ("measured time of all steps, relative to dense", Evidence.time_ratio),
}


@_png
def pareto(e: Evidence) -> Figure:
    """Quality against the cost of a whole trajectory: the dense model with fewer steps as a line, mixtures and baselines as points."""
    figure = Figure(figsize=(WIDTH, 4.1), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (name, (label, cost)) in zip(panels, COSTS.items(), strict=True):
        _dense_lines(axes, e, cost)
        for (kind, words), marker in zip(ALLOCATIONS.items(), "osv", strict=True):
            found = [m for m in e.measured if m.plan and m.kind == kind and _value(e, m) > 0]
            points = sorted((cost(e, m), _value(e, m), m.budget) for m in found)
            if points:
                axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker, color=KINDS[kind], markersize=7, label=words)
            for x, y, budget in points if kind == "mixture" else ():
                axes.annotate(budget, (x, y), (-4, -13), textcoords="offset points", ha="right", size=8, color=KINDS[kind])
        if e.quality == "paired_mse" and e.unrelated_mse > 0:
            axes.axhline(e.unrelated_mse, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="two unrelated dense samples")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
        axes.set(title=f"Quality against {name}", xlabel=label)
        axes.margins(x=0.1, y=0.12)
    panels[0].set_ylabel(QUALITIES[e.quality])
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3)
    return figure


def _value(e: Evidence, m: Measured) -> float:
    """NaN where it was not measured."""
    value = m.metrics.get(e.quality)
    return float("nan") if value is None else float(value)


def _dense_lines(axes: Axes, e: Evidence, cost: Callable[[Evidence, Measured], float]) -> None:
    """One line per sampler, a point per number of steps. Dense itself is no distance from itself, so a paired error has no such point."""
    job = e.prepared.job.sampler
    lines: dict[str, list[tuple[float, float, int]]] = {}
    for m in e.measured:
        if m.plan is None and _value(e, m) > 0:
            scheduler, _, steps = m.sampler.partition(":")
            lines.setdefault(scheduler or job.scheduler, []).append((cost(e, m), _value(e, m), int(steps or job.steps)))
    for (scheduler, points), dash in zip(lines.items(), DASHES * len(lines), strict=False):
        points = sorted(points)
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            color=INK,
            linestyle=dash,
            linewidth=1.2,
            marker="D",
            markersize=4,
            label=f"dense, {scheduler} (number: steps)",
        )
        for x, y, count in points:
            axes.annotate(str(count), (x, y), (4, 4), textcoords="offset points", size=7.5, color=MUTED)


@_png
def timesteps(measured: Sequence[Measured], boundaries: Sequence[int]) -> Figure:
    """At which timesteps the denoising loss is above the dense model's, the first of ``measured``."""
    figure = Figure(figsize=(WIDTH, 3), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for m in measured:
        if m.kind in ("mixture", "uniform"):
            ratio = np.divide(m.metrics["denoising_loss_by_timestep"], measured[0].metrics["denoising_loss_by_timestep"])
            dash: Any = _dash(m.budget, (other.budget for other in measured if other.plan))
            axes.plot(m.metrics["timesteps"], ratio, color=KINDS[m.kind], linestyle=dash, marker="o", markersize=3, label=m.name)
    for boundary in boundaries:
        axes.axvline(boundary, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.axhline(1, color=INK, linewidth=1)
    axes.set(xlabel=f"{AXIS}   (dashed: the cuts)", ylabel="denoising loss / dense's")
    figure.legend(loc="outside right upper", handlelength=3)
    return figure
