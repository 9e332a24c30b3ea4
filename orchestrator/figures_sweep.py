"""The picture of a sweep: what each agent's plans cost, and what they lose, one row of panels per sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from orchestrator.figures import BLUE, DPI, GREEN, INK, MUTED, ORANGE, RED, WIDTH, _png
from orchestrator.words import percent

COLOURS = (ORANGE, GREEN, BLUE, RED, "#cc79a7", "#56b4e9", MUTED, INK)
COSTS = {"macs_ratio": "MACs of a step relative to dense", "time_ratio": "predicted time of a step relative to dense"}


@_png
def pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss against cost, a line per agent through its best seeds; a perfect copy of the dense model has loss 1."""
    samplers = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    agents = list(dict.fromkeys(row["agent"] for row in rows))
    costs = [key for key in COSTS if any(row[key] is not None for row in rows)] or ["macs_ratio"]
    figure = Figure(figsize=(WIDTH, 0.5 + 2.9 * len(samplers)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(samplers), len(costs), squeeze=False, sharex="col", sharey=True)
    for (sampler, steps), line in zip(samplers, panels, strict=True):
        for key, axes in zip(costs, line, strict=True):
            for agent, colour, marker in zip(agents, COLOURS * len(agents), "sov^Dp*X" * len(agents), strict=False):
                mine = [r for r in rows if (r["sampler"], r["steps"], r["agent"]) == (sampler, steps, agent) and r[key] is not None]
                best: dict[float, tuple[float, float]] = {}
                for row in mine:
                    best[row["ratio"]] = min(best.get(row["ratio"], (row["loss"], row[key])), (row["loss"], row[key]))
                axes.plot([r[key] for r in mine], [r["loss"] for r in mine], marker, color=colour, markersize=5, alpha=0.45)
                front = sorted((cost, loss) for loss, cost in best.values())
                axes.plot([c for c, _ in front], [loss for _, loss in front], color=colour, marker=marker, markersize=6, label=agent)
            axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="a perfect copy of dense")
            axes.set(title=f"{sampler}, {steps} steps")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
            axes.margins(x=0.08, y=0.1)
        line[0].set_ylabel("loss of the plan")
    for key, axes in zip(costs, panels[-1], strict=True):
        axes.set_xlabel(COSTS[key])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(agents)))
    return figure
