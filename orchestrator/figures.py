"""The report's figures: values in, PNG bytes out. Object API only, so no backend is chosen and nothing global changes.

Legend: K experts, T' grid timesteps, images float32 [n, C, H, W] in [-1, 1]. Experts are coloured from clean (dark) to noisy (light).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any, ParamSpec

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from orchestrator.evidence import Measured, Points, Trainer
from orchestrator.remarks import RELIABLE, RETURNED
from orchestrator.words import both, percent, sig, span
from workers.contracts import Budget, Cost, ElasticSite, Interval, MixturePlan, Partition, SimilarityMatrix
from workers.partition import cell_edges

DPI, WIDTH = 120, 8.2  # inches; about 1000 px, the width of the page
INK, MUTED, PALE = "#1f2933", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"  # Okabe & Ito: safe for colour-blind readers
ALLOCATIONS = {"mixture": "mixture", "uniform": "uniform, trained alike", "cut only": "cut only, untrained"}
KINDS = {"dense": INK, "mixture": BLUE, "uniform": ORANGE, "cut only": "#8a8f98"}
OTHER_KINDS = (GREEN, RED, "#cc79a7", "#56b4e9")
BRANCHES = {"resnet": BLUE, "attention": ORANGE, "transformer": GREEN, "other": "#cc79a7"}
AXIS = "timestep t   (clean \N{RIGHTWARDS ARROW} noisy)"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARK = {"linestyle": "none", "markersize": 8, "markeredgewidth": 1.8, "markerfacecolor": "none"}
MARKS: tuple[dict[str, Any], ...] = tuple(
    {**_MARK, "marker": marker, "markeredgecolor": colour}
    for marker, colour in (("o", BLUE), ("x", ORANGE), ("+", RED), ("v", GREEN), ("^", MUTED))
)
"""Of the chosen partition, then of the others."""
SMALL = 128  # pixels; larger images are reduced in the page
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
P = ParamSpec("P")


def _png(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """The figure as PNG bytes, the same for the same values: default style, no software version inside."""

    @functools.wraps(draw)
    def render(*args: P.args, **kwargs: P.kwargs) -> bytes:
        buffer = io.BytesIO()
        with style.context(["default", STYLE]):
            FigureCanvasAgg(draw(*args, **kwargs)).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    return render


def short_name(site: str) -> str:
    """``down_blocks.0.resnets.1`` -> ``d0.r1``; ``down_blocks.0.downsamplers.0`` -> ``d0.s``."""
    words = {"down_blocks": "d", "up_blocks": "u", "mid_block": "mid", "resnets": "r", "attentions": "a"}
    parts = re.sub(r"(down|up)samplers\.0$", "s", site).split(".")
    return re.sub(r"(?<=[a-z])\.(?=\d)", "", ".".join(words.get(part, part) for part in parts))


def in_network_order(sites: Sequence[ElasticSite]) -> list[ElasticSite]:
    """Down, middle, up; inside a block by number, the resnet before the attention that follows it, the sampler last."""

    def place(site: ElasticSite) -> tuple[Any, ...]:
        parts = site.name.split(".")
        stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(parts[0], 3)
        numbers = [int(part) for part in parts if part.isdecimal()]
        block = numbers[:1] if stage != 1 else [0]
        sampler = any(part.endswith("samplers") for part in parts)
        return stage, block, sampler, numbers[1 if stage != 1 else 0 :][:1], "resnets" not in parts, numbers, site.name

    return sorted(sites, key=place)


def _branch(site: ElasticSite) -> str:
    if site.unit == "head":
        return "attention"
    kinds = {"resnets": "resnet", "samplers": "resnet", "attentions": "transformer"}
    return next((kind for word, kind in kinds.items() if word in site.name), "other")


def _expert_colours(experts: int) -> list[Any]:
    return list(colormaps["viridis"](np.linspace(0.1, 0.8, experts)))


# --- samples --------------------------------------------------------------------------------------------------------


def _tiles(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, side', side', 3]: whole multiples of small images, so that every pixel stays a square; large ones are reduced."""
    colour = images[:, :3] if images.shape[1] >= 3 else images[:, :1].repeat(3, axis=1)
    pixels = np.nan_to_num((colour + 1) * 127.5, nan=0.0).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    if factor := side // pixels.shape[1]:
        return pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.stack([np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS)) for tile in pixels])


@_png
def samples(rows: Sequence[Measured], classes: Sequence[int] | None = None) -> Figure:
    """One row per denoiser, one column per noise, headed by its class if there are ``classes``.

    Nothing is resampled on the way to the PNG, but images that are too large for it: of those there are fewer, in larger tiles.
    """
    gap, group_gap, width = 4, 12, round(WIDTH * DPI)
    left = 150 if max(len(row.name) for row in rows) < 14 else 176
    count, size = rows[0].samples.shape[0], rows[0].samples.shape[2]
    least, most, largest = (8, 10, SMALL) if size <= SMALL else (5, 5, 2 * SMALL)

    def tile_side(columns: int) -> int:
        room = min(largest, (width - left) // columns - gap)
        return room // size * size or room

    columns = max(range(min(least, count), min(most, count) + 1), key=lambda c: (c * tile_side(c), c))
    side = _tiles(rows[0].samples[:1], tile_side(columns)).shape[1]
    tops, top = [], gap + (18 if classes else 0)
    for i, row in enumerate(rows):
        top += group_gap if i and row.budget != rows[i - 1].budget else 0
        tops.append(top)
        top += side + gap
    width = left + columns * (side + gap)
    canvas = np.full((top, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / DPI, top / DPI), dpi=DPI)
    for row, y in zip(rows, tops, strict=True):
        for column, tile in enumerate(_tiles(row.samples[:columns], tile_side(columns))):
            x = left + column * (side + gap)
            canvas[y : y + side, x : x + side] = tile
        middle = 1 - (y + side / 2) / top
        figure.text((left - 12) / width, middle, row.name, ha="right", va="bottom", weight="bold")
        note = f"MSE {sig(row.mse)}" if row.plan else "the reference"
        figure.text((left - 12) / width, middle, note, ha="right", va="top", size=8, color=MUTED)
    for column, number in enumerate((classes or ())[:columns]):
        x = left + column * (side + gap) + side / 2
        figure.text(x / width, 1 - (tops[0] - 4) / top, f"class {number}", ha="center", va="bottom", size=8, color=MUTED)
    figure.figimage(canvas, origin="upper")
    return figure


# --- where the timesteps were cut -----------------------------------------------------------------------------------


@_png
def similarity(
    matrix: SimilarityMatrix, partitions: Mapping[str, tuple[Partition, float]], frequency: Sequence[float], curve: Mapping[int, float]
) -> Figure:
    """The matrix with the chosen cuts and, on the same axis, how reliable each row is; beside it the cost against K, and other cuts.

    ``partitions``: with their costs, the chosen one first. ``frequency``: of the chosen one's cuts, under the bootstrap.
    """
    partition = next(iter(partitions.values()))[0]
    figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI, layout="constrained")
    halves = figure.add_gridspec(1, 2, width_ratios=[1.45, 1], wspace=0.08)
    left = halves[0].subgridspec(2, 1, height_ratios=[3.6, 1])
    heat = figure.add_subplot(left[0])
    below = figure.add_subplot(left[1], sharex=heat)
    _heat_map(figure, heat, matrix, partition, frequency)
    below.plot(matrix.timesteps, matrix.reliability, color=BLUE, marker="o", markersize=3)
    below.axhline(RELIABLE, color=RED, linewidth=1, linestyle=(0, (4, 2)))
    for boundary in partition.boundaries:
        below.axvline(boundary, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    below.set(xlabel=AXIS, ylabel="reliability", ylim=(min((0, *matrix.reliability)) - 0.05, 1.05))
    right = halves[1].subgridspec(2, 1, height_ratios=[1.35, 1])
    _cost_curve(figure.add_subplot(right[0]), curve, partitions)
    _strips(figure.add_subplot(right[1]), partitions)
    return figure


def _heat_map(figure: Figure, axes: Axes, matrix: SimilarityMatrix, partition: Partition, frequency: Sequence[float]) -> None:
    edges = cell_edges(matrix.timesteps, matrix.num_timesteps)
    values = np.asarray(matrix.values)
    mesh = axes.pcolormesh(edges, edges, values, cmap="cividis", vmin=min(0.0, float(values.min())), vmax=1, rasterized=True)
    figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05, aspect=30).set_label("similarity (cosine)")
    for interval in partition.intervals:
        start, stop = interval.start, interval.stop
        axes.plot([start, stop, stop, start, start], [start, start, stop, stop, start], color="white", linewidth=1.8, clip_on=False)
    for row, (boundary, returned) in enumerate(zip(partition.boundaries, frequency, strict=True)):
        axes.axvline(boundary, color="white", linewidth=0.8, linestyle=(0, (2, 2)))
        axes.axhline(boundary, color="white", linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{returned:.0%}",
            (boundary, matrix.num_timesteps),
            (0, 2 + 11 * (row % 2) * (len(partition) > 4)),  # many cuts: on two levels
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
            color=RED if returned < RETURNED else INK,
        )
    axes.set_title("Similarity; above: how often a cut came back", pad=16 if len(partition) <= 4 else 28)
    axes.set(ylabel="timestep t", xlim=(0, matrix.num_timesteps), ylim=(0, matrix.num_timesteps))
    axes.tick_params(labelbottom=False)


def _cost_curve(axes: Axes, curve: Mapping[int, float], partitions: Mapping[str, tuple[Partition, float]]) -> None:
    axes.plot(list(curve), list(curve.values()), color=INK, marker="o", markersize=4)
    for (partition, cost), mark in zip(partitions.values(), cycle(MARKS), strict=False):
        axes.plot([len(partition)], [cost], **mark)
    axes.set(title="Cost of the best K intervals", xlabel="experts K", ylabel="relative to one interval", ylim=(0, 1.08))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _strips(axes: Axes, partitions: Mapping[str, tuple[Partition, float]]) -> None:
    """Every partition as one bar over the timesteps, under its mark in the curve above."""
    for row, ((name, (partition, cost)), mark) in enumerate(zip(partitions.items(), cycle(MARKS), strict=False)):
        for interval, colour in zip(partition.intervals, _expert_colours(len(partition)), strict=True):
            axes.barh(row, interval.length, left=interval.start, height=0.4, color=colour, edgecolor="white", linewidth=1.5)
        axes.plot([0.03 * partition.num_timesteps], [row - 0.45], clip_on=False, **mark | {"markersize": 6})
        axes.text(0.07 * partition.num_timesteps, row - 0.27, f"{name}, K = {len(partition)}", va="bottom", size=8.5)
        axes.text(partition.num_timesteps, row - 0.27, f"cost {cost:.3f}", va="bottom", ha="right", size=8.5)
    axes.set(title="The cuts compared", xlabel="timestep t", ylim=(len(partitions) - 0.6, -0.75), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0)


# --- what each expert keeps and costs -------------------------------------------------------------------------------


def _part(cost: Cost, plan: MixturePlan) -> float:
    """Of dense, in what the plan's budget limits."""
    return cost.of(plan.budget.metric) / plan.dense_cost.of(plan.budget.metric)


def _quantities(budgets: Iterable[Budget]) -> str:
    """What a cost axis shows."""
    return both(dict.fromkeys(budget.quantity if budget.metric == "macs" else f"predicted {budget.quantity}" for budget in budgets))


@_png
def architecture(plans: Mapping[str, MixturePlan], sites: Sequence[ElasticSite]) -> Figure:
    """One chart per budget, one panel per expert, one bar per branch: the part of its width that is kept."""
    sites = in_network_order(sites)
    kinds = [kind for kind in BRANCHES if kind in map(_branch, sites)]
    heights = [0.62 * len(plan.partition) + 0.95 for plan in plans.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    charts = figure.subfigures(len(plans), 1, height_ratios=heights, squeeze=False)[:, 0]
    for chart, (title, plan) in zip(charts, plans.items(), strict=True):
        panels = chart.subplots(len(plan.partition), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, interval, spec, cost in zip(panels, plan.partition.intervals, plan.experts, plan.expert_costs, strict=True):
            kept = [spec[site.name] / site.dense for site in sites]
            axes.bar(range(len(sites)), [1.0] * len(sites), color=PALE, width=0.78)
            axes.bar(range(len(sites)), kept, color=[BRANCHES[_branch(site)] for site in sites], width=0.78)
            dropped = [i for i, part in enumerate(kept) if part == 0]
            axes.plot(dropped, [0.5] * len(dropped), "x", color=RED, markersize=7, markeredgewidth=2, linestyle="none")
            part = percent(_part(cost, plan))
            axes.set_ylabel(f"{span(interval)}\n{part} {plan.budget.quantity}", rotation=0, ha="right", va="center")
            axes.set(ylim=(0, 1.04), yticks=[0, 1], yticklabels=["0", "1"], xlim=(-0.7, len(sites) - 0.3))
            axes.tick_params(axis="x", length=0)
        names = [short_name(site.name) for site in sites]
        panels[-1].set_xticks(range(len(sites)), names, rotation=90, size=8 if len(sites) <= 36 else 6.5)
        panels[0].set_title(title)
    handles: list[Any] = [Patch(color=BRANCHES[kind], label=kind) for kind in kinds]
    handles.append(Patch(color=PALE, label="cut away"))
    handles.append(Line2D([], [], color=RED, marker="x", markeredgewidth=2, linestyle="none", label="branch dropped"))
    charts[0].legend(handles=handles, loc="upper right", ncols=len(handles), columnspacing=1.2, handlelength=1.2)
    return figure


@_png
def cost(plans: Mapping[str, MixturePlan]) -> Figure:
    """Per budget: one bar per expert, as wide as its share of the steps and as high as its cost, so that area is what a user pays."""
    columns = min(2, len(plans))
    rows = -(-len(plans) // columns)
    figure = Figure(figsize=(WIDTH, 2.9 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(plans) :]:
        axes.set_visible(False)
    for axes, (title, plan) in zip(panels.flat, plans.items(), strict=False):
        begin = 0.0
        for interval, share, one, colour in zip(
            plan.partition.intervals, plan.shares, plan.expert_costs, _expert_colours(len(plan.partition)), strict=True
        ):
            height = _part(one, plan)
            axes.bar(begin, height, width=share, align="edge", color=colour, edgecolor="white", linewidth=1.5)
            if share > 0.11 * columns:  # room for the text
                inside = height > 0.22
                ink = "white" if inside and np.dot(colour[:3], (0.3, 0.6, 0.1)) < 0.5 else INK
                text = f"{span(interval)}\n{percent(height)} {plan.budget.quantity}\n{one.params / 1e6:.3g}M par."
                y = 0.025 if inside else height + 0.015
                axes.text(begin + share / 2, y, text, ha="center", va="bottom", size=7.5, linespacing=1.3, color=ink)
            begin += share
        for level, name, colour, dash in ((plan.budget.ratio, "budget", RED, "-"), (1.0, "dense", INK, (0, (4, 2)))):
            axes.axhline(level, color=colour, linewidth=1.4, linestyle=dash)
            axes.text(1.01, level, name, color=colour, va="center", size=8)
        axes.set(title=title, xlim=(0, 1), ylim=(0, 1.06))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    figure.supxlabel("share of the sampler's steps   (clean \N{RIGHTWARDS ARROW} noisy)", size=9)
    figure.supylabel(f"{_quantities(plan.budget for plan in plans.values())} relative to dense", size=9)
    return figure


# --- how it was trained ---------------------------------------------------------------------------------------------


def _smooth(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Moving average over a tenth of the curve: one step's loss is that of one small batch."""
    steps, losses = np.asarray(points, float).T
    window = max(1, len(losses) // 10)
    return steps[window - 1 :], np.convolve(losses, np.ones(window) / window, mode="valid")


@_png
def training(curves: Mapping[str, Mapping[Interval, Points]]) -> Figure:
    """Loss curves. First panel: the elastic experts ("specialize"); then one per interval, a line per fine-tuned mixture."""
    intervals = sorted({interval for found in curves.values() for interval in found})
    tuned = {name: found for name, found in curves.items() if name != "specialize"}
    columns = min(4, 1 + len(intervals))
    rows = -(-(1 + len(intervals)) // columns)
    figure = Figure(figsize=(WIDTH, 2.4 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[1 + len(intervals) :]:
        axes.set_visible(False)
    others = dict.fromkeys(kind for _, kind in map(_budget_and_kind, tuned) if kind not in KINDS)
    colours = {**dict(zip(others, cycle(OTHER_KINDS), strict=False)), **KINDS}
    for interval, colour, axes in zip(intervals, _expert_colours(len(intervals)), panels[1:], strict=False):
        if points := curves.get("specialize", {}).get(interval):
            panels[0].plot(*_smooth(points), color=colour, label=f"specialize {span(interval)}")
        for name, found in tuned.items():
            budget, kind = _budget_and_kind(name)
            if interval in found:
                axes.plot(*_smooth(found[interval]), color=colours[kind], linestyle=_dash(budget, tuned), linewidth=1.4, label=name)
        axes.set(title=f"finetune {span(interval)}", xlabel="step")
    panels[0].set(title="specialize", xlabel="step", ylabel="loss")
    for axes in panels[: 1 + len(intervals)]:
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    handles = {line.get_label(): line for axes in panels[:] for line in axes.get_lines()}
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _budget_and_kind(name: str) -> tuple[str, str]:
    """The parts of a `Measured.name`, or of its budget alone."""
    parts = re.fullmatch(r"(\S+%(?: time)?)(?: (.*))?", name)
    assert parts, name
    return parts[1], parts[2] or ""


def _dash(budget: str, names: Iterable[str]) -> Any:
    """One dash pattern per budget, in the order of appearance."""
    budgets = list(dict.fromkeys(_budget_and_kind(name)[0] for name in names))
    return DASHES[budgets.index(budget) % len(DASHES)]


def most_at_once(trainers: Sequence[Trainer]) -> tuple[int, float]:
    """The most trainers that ran at the same time, and for how many seconds that many did."""
    moments = sorted({moment for trainer in trainers for moment in (trainer.started, trainer.ended)})
    running = [(sum(t.started <= a and b <= t.ended for t in trainers), b - a) for a, b in pairwise(moments)]
    most = max(count for count, _ in running)
    return most, sum(seconds for count, seconds in running if count == most)


def overlap(stage: str, trainers: Sequence[Trainer]) -> str:
    """The timeline in one sentence."""
    most, seconds = most_at_once(trainers)
    if most == 1:
        return f"The {stage} trainers ran one after the other."
    return f"{most} of {len(trainers)} {stage} trainers ran at the same time for {seconds:.0f} s."


@_png
def timeline(stages: Mapping[str, Sequence[Trainer]]) -> Figure:
    """Every trainer as one bar; seconds count from the first start of its stage."""
    heights = [0.22 * len(trainers) + 0.55 for trainers in stages.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(stages), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    intervals = sorted({trainer.interval for trainers in stages.values() for trainer in trainers})
    colours = dict(zip(intervals, _expert_colours(len(intervals)), strict=True))
    for axes, (stage, trainers) in zip(panels, stages.items(), strict=True):
        zero = min(trainer.started for trainer in trainers)
        for row, trainer in enumerate(trainers):
            seconds = trainer.ended - trainer.started
            axes.barh(row, seconds, left=trainer.started - zero, height=0.62, color=colours[trainer.interval])
            axes.text(trainer.ended - zero, row, f" {seconds:.0f} s", va="center", size=7.5, color=MUTED)
        axes.set_yticks(range(len(trainers)), [trainer.name for trainer in trainers], size=8)
        axes.set(title=stage, ylim=(len(trainers) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    panels[-1].set_xlim(0, 1.07 * max(t.ended - min(u.started for u in group) for group in stages.values() for t in group))
    panels[-1].set_xlabel("seconds since the stage's first trainer started")
    return figure
