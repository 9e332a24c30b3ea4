"""What quality costs, in one run or several: every measured row against its cost, and where along the timesteps quality is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.evidence import Evidence, Measured
from orchestrator.figures import ALLOCATIONS, AXIS, DASHES, DPI, GREEN, INK, KINDS, MUTED, RED, WIDTH, _dash, _png
from orchestrator.figures_sweep import COLOURS
from orchestrator.words import percent, sampler
from workers.contracts import METRICS

QUALITIES = {"frechet": "Frechet distance (log)", "paired_mse": "MSE to dense, same noise (log)"}
COSTS = {"MACs": "MACs of all steps, relative to dense", "time": "measured time of all steps, relative to dense"}
BELOW: dict[str, Any] = {"xytext": (0, -14), "ha": "center", "size": 8}
MARKERS = "osvD^Pp*"
ABOVE: dict[str, Any] = {"xytext": (4, 4), "size": 7.5, "color": MUTED}


class Point(NamedTuple):
    """Costs of all steps relative to dense, the quality that they buy, its spread over seeds, and a word beside the point."""

    macs: float
    time: float
    quality: float
    note: str = ""
    spread: float = 0.0


class Series(NamedTuple):
    """Points that are drawn alike. ``style``: how, for matplotlib; ``notes``: where and how their words stand."""

    name: str
    points: Sequence[Point]
    style: Mapping[str, Any]
    notes: Mapping[str, Any] = BELOW


@_png
def pareto(e: Evidence) -> Figure:
    """Quality against the cost of a whole trajectory: the dense model with fewer steps as a line, mixtures and baselines as points."""

    def point(m: Measured, note: str) -> Point:
        return Point(e.macs_ratio(m), e.time_ratio(m), _number(m.metrics.get(e.quality)), note)

    series = _dense_lines([(sampler(m.metrics), point(m, "")) for m in e.distinct if m.plan is None], sampler(e.dense.metrics))
    others = list(dict.fromkeys(m.kind for m in e.distinct if m.plan and m.kind not in ALLOCATIONS))
    colours = {**dict(zip(others, cycle((GREEN, RED, *COLOURS[4:])), strict=False)), **KINDS}
    allocations = {**ALLOCATIONS, **{kind: f"{kind}, trained alike" for kind in others}}
    for (kind, words), marker in zip(allocations.items(), cycle(MARKERS), strict=False):
        points = [point(m, m.budget if kind == "mixture" else "") for m in e.distinct if m.plan and m.kind == kind and not m.sampler]
        series.append(Series(words, points, _marks(colours[kind], marker), {**BELOW, "color": colours[kind]}))
    series += _mixtures_under_further_samplers([(m.budget, m.sampler, point(m, "")) for m in e.distinct if m.plan and m.sampler])
    return _pareto(series, e.quality, e.unrelated_mse if e.quality == "paired_mse" else math.nan)


@_png
def pareto_of_runs(found: Mapping[str, Any]) -> Figure:
    """The same over several runs, as `results.collect` found them: a colour per run, a marker per kind of allocation."""
    rows = found["rows"]
    quality = "paired_mse" if all(row["frechet"] is None for row in rows) else "frechet"
    names = list(dict.fromkeys(row["run"] for row in rows if row["run"]))
    colours, markers = dict(zip(names, COLOURS * len(names), strict=False)), dict[str, str]()
    alike: dict[tuple[str, str], list[Point]] = {}
    dense = []
    for row in rows:
        budget, _, kind = row["label"].partition(" ")
        further = bool(row["run"]) and row["sampler"] != found["sampler"]
        point = Point(row["macs"], _number(row["relative_time"]), _number(row[quality]), _budget(budget), row["std"].get(quality) or 0.0)
        if row["run"]:
            kind += f" {row['sampler']}" if further else ""
            alike.setdefault((row["run"], kind), []).append(point if not kind or further else point._replace(note=""))
            markers.setdefault(kind, MARKERS[len(markers) % len(MARKERS)])
        else:
            dense.append((row["sampler"], point))
    series = _dense_lines(dense, found["sampler"])
    for (run, kind), points in alike.items():
        notes = {**BELOW, "color": colours[run]}
        series.append(Series(f"{run} {kind}".strip(), points, _marks(colours[run], markers[kind]), notes))
    return _pareto(series, quality)


def _budget(name: str) -> str:
    """``latency-0.50`` as ``50% time``; the name of a published version as it is."""
    metric, _, ratio = name.rpartition("-")
    return percent(float(ratio)) + ("" if metric == "macs" else f" {METRICS[metric]}") if metric in METRICS else name


def _pareto(series: Sequence[Series], quality: str, level: float = math.nan) -> Figure:
    """A panel per cost, one axis of ``quality``, which is drawn on a log scale; ``level``: that of unrelated samples."""
    figure = Figure(figsize=(WIDTH, 4.1), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (name, label) in zip(panels, COSTS.items(), strict=True):
        for one in series:
            points = [(p.macs if name == "MACs" else p.time, p.quality, p.note, p.spread) for p in one.points if p.quality > 0]
            found = sorted(point for point in points if math.isfinite(point[0]))
            if not found:
                continue
            x, y, notes, spread = zip(*found, strict=True)
            axes.errorbar(x, y, yerr=spread if any(spread) else None, label=one.name, elinewidth=1, **one.style)
            for note, *place in zip(notes, x, y, strict=True):
                axes.annotate(note, place, textcoords="offset points", **one.notes)
        if level > 0:
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="two unrelated dense samples")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
        axes.set(title=f"Quality against {name}", xlabel=label)
        axes.margins(x=0.12, y=0.12)
    panels[0].set_ylabel(QUALITIES[quality])
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if max(map(len, labels)) < 36 else 2, handlelength=3)
    return figure


def _number(value: float | None) -> float:
    """NaN where it was not measured."""
    return math.nan if value is None else float(value)


def _marks(colour: str, marker: str) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none"}


def _dense_lines(rows: Sequence[tuple[str, Point]], usual: str) -> list[Series]:
    """One line per scheduler of (`words.sampler`, point), a point per number of steps; beside the lines, hollow, those whose noise is
    scaled otherwise than that of the ``usual`` sampler. Dense itself is no distance from itself, so a paired error has no such point."""

    lines: dict[str, list[Point]] = {}
    scaled: dict[str, list[Point]] = {}
    for drawn_with, point in rows:
        scheduler, steps, scale = _parts(drawn_with)
        if scale == _parts(usual)[2]:
            lines.setdefault(scheduler, []).append(point._replace(note=steps))
        else:
            scaled.setdefault(scheduler, []).append(point._replace(note=f"{steps} / {scale}"))
    style = {"color": INK, "linewidth": 1.2, "marker": "D", "markersize": 4}
    found = [
        Series(f"dense, {scheduler} (number: steps)", points, {**style, "linestyle": dash}, ABOVE)
        for (scheduler, points), dash in zip(lines.items(), DASHES * len(lines), strict=False)
    ]
    hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
    found += [
        Series(f"dense, {scheduler}, scaled (steps / scale)", points, {**hollow, "marker": marker}, {**BELOW, "color": INK})
        for (scheduler, points), marker in zip(scaled.items(), cycle(MARKERS), strict=False)
    ]
    return [series for series in found if any(point.quality > 0 for point in series.points)]


def _mixtures_under_further_samplers(rows: Sequence[tuple[str, str, Point]]) -> list[Series]:
    """Hollow points, one series per scheduler of (budget, `Measured.sampler`, point)."""
    found: dict[str, list[Point]] = {}
    for budget, drawn_with, point in rows:
        scheduler, steps, scale = _parts(drawn_with)
        found.setdefault(scheduler, []).append(point._replace(note=f"{budget}: {steps}" + (f" / {scale}" if scale != "1" else "")))
    colour, notes = KINDS["mixture"], {**ABOVE, "color": KINDS["mixture"], "rotation": 45}
    return [
        Series(f"mixtures, {scheduler} (steps / scale)", points, {**_marks(colour, marker), "markerfacecolor": "white"}, notes)
        for (scheduler, points), marker in zip(found.items(), cycle(MARKERS), strict=False)
    ]


def _parts(drawn_with: str) -> tuple[str, str, str]:
    """Scheduler, steps and scale of ``ddim:25``, ``ddim:25:1.002`` or ``ddim:25 eta 0.5``."""
    scheduler, steps, *scale = drawn_with.partition(" ")[0].split(":")
    return scheduler, steps, scale[0] if scale else "1"


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
