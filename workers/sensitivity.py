"""How much does an expert's loss rise when one site changes? Measured around dense, or around any plan; and what a plan kept, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from workers.contracts import ArchitectureSpec, ElasticSite, SiteReason
from workers.elastic import ElasticDenoiser
from workers.routers import CalibrationBatch, RouteProblem, Sensitivity, Specs

REASONS = 5
"""Sites that a plan explains, per expert."""


def measure_sensitivity(
    expert: ElasticDenoiser,
    batch: CalibrationBatch,
    points: int = 4,
    around: ArchitectureSpec | None = None,
    sites: Sequence[ElasticSite] | None = None,
) -> dict[str, dict[int, float]]:
    """Loss rise for every choice of ``sites`` (all by default), the other sites as in ``around`` (dense by default), relative to it.

    Around dense, ``points`` choices a site are run, evenly spaced; around another architecture the ends and the neighbours. Those between
    are interpolated. The device is waited for once.
    """
    sites, base = sites or expert.space.sites, around or expert.space.dense
    ranks = {site.name: ranks_around(site, base[site.name]) if around else _spread(site, points) for site in sites}
    runs = [base, *(base.replace(site.name, site.choices[rank]) for site in sites for rank in ranks[site.name])]
    first, *others = torch.stack([batch.run(expert, spec).mean() for spec in runs]).tolist()
    found, rises = iter(others), {}
    for site in sites:
        known = {rank: next(found) - first for rank in ranks[site.name]} | {site.choices.index(base[site.name]): 0.0}
        rises[site.name] = {choice: _between(known, rank) for rank, choice in enumerate(site.choices)}
    return rises


def _spread(site: ElasticSite, points: int) -> list[int]:
    """Ranks of the choices of a site that are run around dense."""
    last = len(site.choices) - 1
    return sorted({round(i * last / points) for i in range(points)} - {last})


def ranks_around(site: ElasticSite, choice: int) -> list[int]:
    """Ranks of the choices of a site that are run around ``choice``: the ends and the neighbours."""
    now, last = site.choices.index(choice), len(site.choices) - 1
    return sorted({rank for rank in (0, now - 1, now + 1, last) if 0 <= rank <= last} - {now})


def _between(known: Mapping[int, float], rank: int) -> float:
    below, above = max(r for r in known if r <= rank), min(r for r in known if r >= rank)
    if below == above:
        return known[below]
    part = (rank - below) / (above - below)
    return known[below] * (1 - part) + known[above] * part


# --- why a plan is what it is ---------------------------------------------------------------------------------------


def reasons(problem: RouteProblem, specs: Specs, most: int = REASONS) -> tuple[tuple[SiteReason, ...], ...]:
    """Per expert, the most telling sites: of those kept whole, the dearest to lose; of those cut, the cheapest loss per cost saved.

    About half of each, fewer where there are no such sites. Rises are those around dense.
    """
    return tuple(_of_expert(problem, rises, spec, most) for rises, spec in zip(problem.sensitivity, specs, strict=True))


def _of_expert(problem: RouteProblem, rises: Sensitivity, spec: ArchitectureSpec, most: int) -> tuple[SiteReason, ...]:
    kept: list[SiteReason] = []
    cut: list[SiteReason] = []
    for site in problem.space.sites:
        whole = spec[site.name] == site.dense
        least = min((c for c in site.choices if c < site.dense), default=site.dense)
        choice = least if whole else spec[site.name]  # what keeping it avoids, or what cutting it did
        reason = SiteReason(
            site.name,
            spec[site.name],
            site.dense,
            rises[site.name][choice],
            problem.price(site.name, site.dense) - problem.price(site.name, choice),
        )
        (kept if whole else cut).append(reason)
    kept.sort(key=lambda reason: (-reason.rise, reason.site))
    cut.sort(key=lambda reason: (reason.rise / max(reason.saves, 1e-12), reason.site))
    first = min(len(kept), max(most // 2, most - len(cut)))
    return (*kept[:first], *cut[: most - first])


def explain(found: Sequence[SiteReason]) -> list[str]:
    """Lines for a report: why an expert is cut as it is."""
    lines = []
    for reason in found:
        loss, cost = f"loss {reason.rise:+.3f}", f"{reason.saves:.1%} of the dense cost"
        if reason.choice == reason.dense:
            lines.append(f"{reason.site} kept whole: without it, {loss} for {cost}")
        else:
            how = "dropped" if reason.choice == 0 else f"cut to {reason.choice} of {reason.dense}"
            lines.append(f"{reason.site} {how}: {loss}, saves {cost}")
    return lines
