"""Whether to trust a run, in sentences: what was made, and what speaks for and against it."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

import numpy as np

from orchestrator.evidence import Evidence, trials_of
from orchestrator.words import FEW_STEPS, both, dropped, label, of_the_dense_model, percent, sampler_of, sig, span
from workers import routers
from workers.contracts import MixturePlan

FAR = 0.25
"""Samples are far from dense's above this part of the MSE between unrelated samples."""
RELIABLE, RETURNED = 0.5, 0.7
"""Below these, a reliability and a cut's bootstrap frequency are called low."""
MISPREDICTED = 0.1
"""A time is mispredicted if measured and predicted part of dense's differ by more than this, relatively."""
SLACK = 0.02
"""Above its budget by no more than this, a measured time counts as within: clocks differ from run to run."""

QUALITIES = {"frechet": "Frechet distance", "paired_mse": "MSE to dense"}
LEVELS = ("warning", "note", "good")


class Remark(NamedTuple):
    """One thing to know before trusting the numbers; ``level`` is one of `LEVELS`."""

    level: str
    text: str


def verdict(e: Evidence) -> str:
    """What was made and, at the smallest budget, how far it is from dense."""
    count, mixture, cut_only = len(e.chosen), e.mixture(e.smallest), e.find(e.smallest, "cut only")
    head = dict(enumerate(("A mixture", "Two mixtures", "Three mixtures", "Four mixtures"), 1)).get(count, f"{count} mixtures")
    budgets = of_the_dense_model([plan.budget for plan in e.chosen])
    aside = []
    if cut_only and mixture.mse:
        times = cut_only.mse / mixture.mse
        worse = f"i.e. {times:,.{int(times < 10)}f}x worse" if times > 1.05 else "no worse"
        aside.append(f"cut without training: {sig(cut_only.mse)}, {worse}")
    if not math.isnan(e.unrelated_mse):
        aside.append(f"two unrelated dense samples: {sig(e.unrelated_mse)}")
    loss = mixture.metrics["denoising_loss"] / e.dense.metrics["denoising_loss"]
    time = e.time_ratio(mixture)
    return (
        f"{head} of {len(e.partition)} expert{'s' * (len(e.partition) > 1)} at {budgets}. "
        f"At {mixture.budget}, samples differ from dense by MSE {sig(mixture.mse)}" + (f" ({'; '.join(aside)})" if aside else "") + "; "
        f"the denoising loss is {loss:.2f}x and the time of a step {time:.2f}x the dense model's."
    )


def remarks(e: Evidence) -> list[Remark]:
    """Whether to trust it: what speaks against it first."""
    found = [remark for plan in e.chosen for remark in (_against_uniform(e, plan), _agents(e, plan), _time(e, plan))]
    found += [remark for plan in e.chosen for remark in _against_fewer_steps(e, plan)]
    return sorted(
        [*_devices(e), *_far_from_dense(e), *found, *_mispredicted(e), *uncertain_cuts(e), *_few_steps(e)],
        key=lambda remark: LEVELS.index(remark.level),
    )


def _devices(e: Evidence) -> list[Remark]:
    """Times of two devices do not compare, even each relative to dense on its own."""
    here = e.dense.metrics.get("device")
    elsewhere = [f"{m.name} on {there or 'one that was not named'}" for m in e.measured if (there := m.metrics.get("device")) != here]
    text = f"Times do not compare: dense was timed on {here or 'a device that was not named'}, but {both(elsewhere)}" if elsewhere else ""
    return [Remark("warning", f"{text}. Remove the run's evaluation folder to time them all here.")] if elsewhere else []


def _against_uniform(e: Evidence, plan: MixturePlan) -> Remark:
    """Is the allocation worth anything? Paired over samples, so that the difference comes with its standard error."""
    mixture, uniform = e.mixture(plan), e.find(plan, "uniform")
    at = f"At {mixture.budget}, the mixture"
    known = uniform is not None and not uniform.same_as  # as another network
    if not known and any(t.agent == "uniform" and t.experts == plan.experts for t in trials_of(e, plan)):
        return Remark("warning", f"{at} is the uniform allocation itself: no agent found a better one.")
    if uniform is None:
        return Remark("note", f"{at} was not compared with the uniform allocation under the same fine-tuning (finetune.compare).")
    errors = [np.square(m.samples.astype(np.float64) - e.dense.samples).mean(axis=(1, 2, 3)) for m in (mixture, uniform)]
    difference, n = errors[0] - errors[1], len(errors[0])
    mean, spread = float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    numbers = f"paired MSE {sig(mixture.mse)} against {sig(uniform.mse)} (difference {mean:+.2g}, standard error {spread:.2g}, {n} samples)"
    rise = mixture.metrics["denoising_loss"] / uniform.metrics["denoising_loss"] - 1
    numbers += f"; but its denoising loss is {rise:.1%} higher" if mean < 0 < rise else ""
    if mean >= 0:
        return Remark("warning", f"{at} does not beat the uniform allocation with the same fine-tuning: {numbers}.")
    if -mean <= 2 * spread:
        return Remark("note", f"{at} is ahead of the uniform allocation with the same fine-tuning, but not clearly: {numbers}.")
    return Remark("good" if rise <= 0 else "note", f"{at} beats the uniform allocation with the same fine-tuning: {numbers}.")


def _against_fewer_steps(e: Evidence, plan: MixturePlan) -> list[Remark]:
    """Is the mixture worth anything against the simplest rival, dense with fewer steps, that takes no more measured time? One whose noise
    is scaled otherwise is none: so could the mixture's be."""
    mixture, word = e.mixture(plan), QUALITIES[e.quality]
    mine, time = mixture.metrics[e.quality], e.time_ratio(mixture)
    fewer = [m for m in e.measured if m.sampler and m.plan is None]
    alike = [m for m in fewer if sampler_of(m.metrics).epsilon_scale == sampler_of(mixture.metrics).epsilon_scale]
    rivals = [m for m in alike if m.metrics[e.quality] is not None and e.time_ratio(m) <= time]
    if not rivals or mine is None:
        return []
    best = min(rivals, key=lambda m: m.metrics[e.quality])
    theirs = best.metrics[e.quality]
    numbers = f"{word} {sig(mine)} in {time:.0%} of the time, against {sig(theirs)} in {e.time_ratio(best):.0%}"
    if mine < theirs:
        return [Remark("good", f"At {mixture.budget}, the mixture beats dense with fewer steps ({best.sampler}): {numbers}.")]
    return [Remark("warning", f"At {mixture.budget}, dense with fewer steps ({best.sampler}) is better and no slower: {numbers}.")]


def _agents(e: Evidence, plan: MixturePlan) -> Remark:
    """Which agent found the plan, and whether the learned one (era) earned its place."""
    best: dict[str, MixturePlan] = {}
    for trial in trials_of(e, plan):
        best.setdefault(trial.agent, trial)
    tried, steps = plan.distance is not None, e.prepared.job.proxy_steps
    word = f"distance to dense after {steps} steps of fine-tuning" if tried else "search loss"
    worth = {agent: trial.rank[0] if tried else trial.loss for agent, trial in best.items()}
    at, learned = f"At {label(plan.budget)},", [agent for agent in best if agent in routers.LEARNED]
    if not learned or len(learned) == len(best):
        told = ", ".join(f"{agent} {worth[agent]:.4g}" for agent in best)
        missing = "no baseline was compared" if learned else "era was not compared"
        return Remark("note", f"{at} {plan.agent} was chosen ({word}: {told}); {missing}.")
    name = min(learned, key=worth.__getitem__)
    era, mine = best[name], worth[name]
    for agent in learned:
        del best[agent], worth[agent]
    ahead = {agent: trial for agent, trial in best.items() if not mine < worth[agent]}
    same = [agent for agent, trial in ahead.items() if trial.experts == era.experts]
    if same and all(worth[agent] == mine for agent in ahead):
        return Remark("note", f"{at} {name} kept the plan of {both(same)}: {word} {mine:.4g}.")
    if not ahead:
        rest = both(f"{agent} {value:.4g} ({value / mine - 1:+.1%})" for agent, value in worth.items())
        narrowly = ", narrowly" if min(worth.values()) < 1.02 * mine else ""
        return Remark("good", f"{at} {name} found the best plan{narrowly}: {word} {mine:.4g}, against {rest}.")
    rest = both(
        f"{agent} {worth[agent]:.4g} " + ("with the same plan" if trial.experts == era.experts else f"with {dropped(trial)} dropped")
        for agent, trial in ahead.items()
    )
    lost = f"{word} {mine:.4g} with {(count := dropped(era))} branch{'es' * (count != 1)} dropped, against {rest}"
    return Remark("warning", f"{at} {name} did not beat {both(ahead)} here: {lost}. The plan of {plan.agent} is used.")


def _time(e: Evidence, plan: MixturePlan) -> Remark:
    ratio, predicted = measured_time(e, plan), plan.budget.metric == "latency"
    text = (
        f"At {label(plan.budget)}, a step takes {ratio:.0%} of the dense model's time on this device"
        + (f" (predicted: {plan.cost_ratio:.0%})" if predicted else "")
        + f", with {plan.macs_ratio:.0%} of its MACs"
    )
    if ratio >= 1:
        return Remark("warning", f"{text}: no time is saved.")
    if predicted and ratio > plan.budget.ratio * (1 + SLACK):
        return Remark("note", f"{text}: more than the budget of {percent(plan.budget.ratio)}.")
    return Remark("good" if 1 - ratio >= 0.75 * (1 - plan.cost_ratio) else "note", f"{text}.")


def measured_time(e: Evidence, plan: MixturePlan) -> float:
    """Of a step of the plan's mixture, as a part of dense's."""
    return e.time_ratio(e.mixture(plan))


def _mispredicted(e: Evidence) -> list[Remark]:
    """Latency budgets are met by a table's prediction: say so where the clock disagrees."""
    found = []
    for plan in e.chosen:
        measured, predicted = measured_time(e, plan), plan.cost_ratio
        if plan.budget.metric == "latency" and abs(measured / predicted - 1) > MISPREDICTED:
            off = f"{abs(measured / predicted - 1):.0%} {'above' if measured > predicted else 'below'}"
            text = (
                f"At {label(plan.budget)}, the measured time of a step is {measured:.1%} of dense's, {off} the {predicted:.1%} that the "
                "latency table predicts: something else was running; `diffpruning profile` on an idle machine tells."
            )
            found.append(Remark("warning", text))
    return found


def _far_from_dense(e: Evidence) -> list[Remark]:
    """Too far to replace dense: the MSE is no small part of that between unrelated samples."""
    far = [m for m in map(e.mixture, e.chosen) if m.mse > FAR * e.unrelated_mse]
    if not far:
        return []
    parts = both(f"{m.mse / e.unrelated_mse:.0%}" for m in far)
    text = f"At {both(m.budget for m in far)}, samples are far from dense's: {parts} of the MSE between unrelated samples."
    return [Remark("warning", f"{text} Train longer (specialize.steps, finetune.steps) or allow a larger budget.")]


def uncertain_cuts(e: Evidence) -> list[Remark]:
    """How sure the cuts are."""
    typical, frequency = median(e.matrix.reliability), e.results["partition"]["boundary_frequency"]
    if (rule := e.results["partition"].get("rule", "learned")) != "learned":
        return [Remark("note", f"The cuts are {rule}, not learned: more images would not move them.")]
    unsure = [f"t = {b} ({f:.0%})" for b, f in zip(e.partition.boundaries, frequency, strict=True) if f < RETURNED]
    found = []
    if typical < RELIABLE:
        found.append(f"the similarity of timesteps is unreliable (median reliability {typical:.2f} with {e.matrix.images} images)")
    if unsure:
        found.append(f"the {'cut' if len(unsure) == 1 else 'cuts'} at {both(unsure)} came back in too few bootstrap resamples")
    if found:
        return [Remark("warning", f"More images needed: {', and '.join(found)}. Raise similarity.images.")]
    sure = f"every cut came back in at least {min(frequency):.0%} of bootstrap resamples, " if frequency else ""
    return [Remark("good", f"The cuts are stable: {sure}median reliability {typical:.2f}.")]


def _few_steps(e: Evidence) -> list[Remark]:
    """Per expert and sampler, and per budget where it does not hold for all of them."""
    few: dict[str, list[str]] = {}
    for plan in e.chosen:
        sampler, steps = plan.budget.scheduler, plan.budget.steps
        for interval, share in zip(plan.partition.intervals, plan.shares, strict=True):
            if (served := round(share * steps)) < FEW_STEPS:
                few.setdefault(f"{span(interval)} ({served} of the {steps} of {sampler})", []).append(label(plan.budget))
    found = [text + ("" if len(budgets) == len(e.chosen) else f" at {both(budgets)}") for text, budgets in few.items()]
    return [Remark("warning", f"Fewer than two sampler steps for the expert of {both(found)}.")] if found else []
