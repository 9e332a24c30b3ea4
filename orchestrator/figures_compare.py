"""The picture of a comparison: two similarity matrices on one axis of noise levels, with each run's cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.figures import DPI, WIDTH, _expert_colours, _png

AXIS = "log-SNR   (clean \N{RIGHTWARDS ARROW} noisy)"
TICKS = 7


@_png
def matrices(found: Mapping[str, Any]) -> Figure:
    """``found``: what `workers.agreement.compare` gives, with the runs' names."""
    figure = Figure(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4.4, 1])
    values = np.asarray(found["matrices"])
    low = min(0.0, float(values.min()))
    heats = [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])]
    for axes, run, matrix, labels in zip(heats, found["runs"], values, found["labels"], strict=True):
        mesh = axes.imshow(matrix, origin="lower", cmap="cividis", vmin=low, vmax=1, extent=(0, len(matrix), 0, len(matrix)))
        for start, stop in _blocks(labels):
            axes.plot([start, stop, stop, start, start], [start, start, stop, stop, start], color="white", linewidth=1.8, clip_on=False)
        axes.set_title(f"{run['name']}, {run['images']} images")
        _level_ticks(axes, found["levels"], both=True)
    figure.colorbar(mesh, ax=heats, pad=0.01, fraction=0.03, aspect=30).set_label("similarity (cosine)")
    strips = figure.add_subplot(grid[1, :])
    for row, labels in enumerate(found["labels"]):
        blocks = _blocks(labels)
        for (start, stop), colour in zip(blocks, _expert_colours(len(blocks)), strict=True):
            strips.barh(row, stop - start, left=start, height=0.6, color=colour, edgecolor="white", linewidth=1.5)
    strips.set(title="The cuts", yticks=[0, 1], yticklabels=[run["name"] for run in found["runs"]], ylim=(1.5, -0.5))
    strips.set_xlim(0, len(found["levels"]))
    strips.tick_params(axis="y", length=0)
    strips.spines["left"].set_visible(False)
    _level_ticks(strips, found["levels"])
    return figure


def _blocks(labels: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of every run of equal labels."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return list(zip(edges, edges[1:], strict=False))


def _level_ticks(axes: Axes, levels: Sequence[float], both: bool = False) -> None:
    places = np.unique(np.linspace(0, len(levels) - 1, min(TICKS, len(levels))).round().astype(int))
    names = [f"{levels[place]:+.1f}" for place in places]
    axes.set_xticks(places + 0.5, names)
    axes.set_xlabel(AXIS)
    if both:
        axes.set_yticks(places + 0.5, names)
