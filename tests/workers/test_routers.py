"""One contract for every routing agent: within the budget, and the same seed finds the same plan; `era` is no worse than any baseline."""

import copy
import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from workers import families, routers
from workers.contracts import ArchitectureSpec, BudgetUnreachable, ElasticSettings, InputError, RouteSettings, RunFailed, SiteReason
from workers.cost import cost_table
from workers.elastic import ElasticDenoiser
from workers.latency_table import LatencyIdentity, LatencyTable, LatencyValidation
from workers.refine import OPEN, Archive, refine
from workers.repair import random_spec, repair
from workers.routers import CalibrationBatch, Effort, RouteProblem, Specs, era, greedy, knapsack, stitch, uniform
from workers.sensitivity import explain, measure_sensitivity, ranks_around, reasons

ELASTIC = ElasticSettings(width_multiple=1, depth=True, importance="magnitude")
SETTINGS = RouteSettings(images=6, era_steps=2, era_batch=4, era_learning_rate=1e-2, cost_weight=2.0, temperature=0.4, trials=4)
random_agents = pytest.mark.parametrize("name", ["random_search", "evolution"])
every_agent = pytest.mark.parametrize("name", routers.names())


@pytest.fixture(scope="module")
def roomy() -> RouteProblem:
    """Two experts that are damaged copies of one random model, on random images; any plan fits the budget."""
    torch.manual_seed(0)
    model = families.family("unet2d").tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = json.loads(model.to_json_string())
    experts, search, score = [], [], []
    for k in range(2):
        expert = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01 * (k + 1))
        experts.append(ElasticDenoiser(expert, families.family_of_config(config).sites(expert, ELASTIC)))
        for batches in (search, score):
            noisy, t = torch.randn(6, 3, 16, 16), torch.randint(k * 500, k * 500 + 500, (6,))
            with torch.no_grad():
                taught = model(noisy, t).sample
            batches.append(CalibrationBatch(noisy, t, taught + 0.3 * torch.randn_like(taught), taught))
    sensitivity = [measure_sensitivity(expert, batch) for expert, batch in zip(experts, search, strict=True)]
    return RouteProblem(experts, cost_table(config, ELASTIC), (0.35, 0.65), 1.0, search, score, sensitivity)


def with_ratio(problem: RouteProblem, ratio: float, **changes: object) -> RouteProblem:
    """The same problem under another budget; measured losses stay remembered unless something else changes too."""
    return dataclasses.replace(problem, ratio=ratio, **({"_cache": {}, **changes} if changes else {}))


def search(name: str, problem: RouteProblem, seed: int = 0, settings: RouteSettings = SETTINGS) -> Specs:
    return routers.agent(name).search(problem, settings, random.Random(seed))


# --- the contract of an agent ---------------------------------------------------------------------------------------


@every_agent
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4, 0.25])
def test_a_plan_is_legal_and_within_the_budget(roomy, name, ratio):
    problem = with_ratio(roomy, ratio)
    plan = search(name, problem)
    assert len(plan) == len(problem.experts)
    assert routers.check_plan(problem, plan) is plan
    by_hand = sum(s * problem.table.cost(spec).macs for s, spec in zip(problem.shares, plan, strict=True)) / problem.table.dense.macs
    assert by_hand <= ratio + 1e-9
    if name == "era":
        for baseline in ("uniform", "stitch", "greedy", "knapsack"):
            assert problem.loss(plan) <= problem.loss(search(baseline, problem)) + 1e-6


@every_agent
def test_the_same_seed_finds_the_same_plan(roomy, name):
    torch.manual_seed(1)
    first = search(name, with_ratio(roomy, 0.5, score_batches=roomy.score_batches), seed=3)
    torch.manual_seed(2)
    assert search(name, with_ratio(roomy, 0.5, score_batches=roomy.score_batches), seed=3) == first


@every_agent
def test_what_other_searches_have_run_changes_no_plan(roomy, name):
    settings = dataclasses.replace(SETTINGS, trials=12)
    fresh = with_ratio(roomy, 0.5, effort=Effort())
    found = search(name, fresh, seed=3, settings=settings)
    again = dataclasses.replace(fresh, effort=Effort())  # all that it will run is known
    assert search(name, again, seed=3, settings=settings) == found
    assert again.effort.images == fresh.effort.images


@every_agent
def test_a_search_does_not_disturb_the_random_state_of_its_process(roomy, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    search(name, with_ratio(roomy, 0.5))
    assert torch.equal(torch.get_rng_state(), before)


@every_agent
def test_a_search_leaves_the_experts_as_they_were(roomy, name):
    before = [copy.deepcopy(expert.state_dict()) for expert in roomy.experts]
    search(name, with_ratio(roomy, 0.5))
    for expert, state in zip(roomy.experts, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in expert.state_dict().items())
        assert all(p.grad is None for p in expert.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in expert.modules())


@every_agent
def test_a_full_budget_is_met_at_no_more_than_the_dense_loss(roomy, name):
    dense = (roomy.space.dense,) * 2
    plan = search(name, roomy)
    assert roomy.within_budget(plan)
    if name in ("uniform", "stitch"):
        assert plan == dense
    elif name in ("evolution", "era"):  # they know the dense plan; the tables' sums may mislead the others
        assert roomy.loss(plan) <= roomy.loss(dense)


@every_agent
def test_the_smallest_reachable_budget_is_reached(roomy, name):
    problem = with_ratio(roomy, roomy.table.smallest_ratio())
    assert search(name, problem) == (problem.space.smallest,) * 2


@pytest.fixture(scope="module")
def timed(roomy) -> RouteProblem:
    """Time instead of MACs, with what hardware does: the narrowest width of every site is slower than the next one, some than dense."""
    sites = {}
    for i, site in enumerate(roomy.space.sites):
        row = {choice: 1.0 + choice / site.dense for choice in site.choices}
        row[site.narrowest] = 1.9 if i % 2 else 2.5
        sites[site.name] = {str(choice): ms for choice, ms in (row | ({0: 0.1} if 0 in row else {})).items()}
    identity = LatencyIdentity("none", "float32", 1, 16, False, "none", "0", "0", None)
    table = roomy.table.with_latency(LatencyTable(identity, 10.0, sites, 10.0 + 2 * len(sites), LatencyValidation(0, 0.0, 0.0)))
    return dataclasses.replace(roomy, table=table, metric="latency")


@every_agent
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_a_latency_budget_is_met_in_time_even_where_narrower_is_slower(timed, name, ratio):
    problem = with_ratio(timed, ratio)
    plan = search(name, problem)
    assert routers.check_plan(problem, plan) is plan
    time = sum(s * problem.table.cost(spec).latency_ms for s, spec in zip(problem.shares, plan, strict=True))
    assert time <= ratio * problem.table.dense.latency_ms + 1e-9


def test_greedy_never_pays_more_for_less(timed):
    plan = search("greedy", with_ratio(timed, 0.8))
    for k, spec in enumerate(plan):
        for site in timed.space.sites:
            rises, now = timed.sensitivity[k][site.name], spec[site.name]
            better = [c for c in site.choices if rises[c] < rises[now] and timed.price(site.name, c) <= timed.price(site.name, now)]
            assert not better, (site.name, now, better)


def test_an_impossible_latency_budget_is_refused_in_terms_of_time(timed):
    smallest = timed.table.smallest_ratio("latency")
    with pytest.raises(BudgetUnreachable, match=f"needs {smallest:.3f} of the dense model's measured time"):
        with_ratio(timed, smallest * 0.99)


def test_an_impossible_budget_is_refused_before_any_search(roomy):
    with pytest.raises(BudgetUnreachable, match=f"needs {roomy.table.smallest_ratio():.3f} of the dense model's MACs"):
        with_ratio(roomy, roomy.table.smallest_ratio() * 0.99)


@every_agent
def test_an_expert_that_the_sampler_never_calls_costs_nothing(roomy, name):
    problem = with_ratio(roomy, 0.5, shares=(0.0, 1.0))
    plan = search(name, problem)
    assert problem.table.cost(plan[1]).macs <= 0.5 * problem.table.dense.macs
    assert problem.within_budget(plan)


@pytest.fixture(scope="module")
def widths_only(roomy) -> RouteProblem:
    """A search space in which no branch may be dropped."""
    settings = dataclasses.replace(ELASTIC, depth=False)
    config = json.loads(roomy.experts[0].model.to_json_string())
    experts = [ElasticDenoiser(e.model, families.family_of_config(config).sites(e.model, settings)) for e in roomy.experts]
    sensitivity = [{s: {c: v for c, v in row.items() if c > 0} for s, row in table.items()} for table in roomy.sensitivity]
    return with_ratio(roomy, 0.6, experts=experts, table=cost_table(config, settings), sensitivity=sensitivity)


@every_agent
def test_widths_alone_can_be_searched(widths_only, name):
    plan = routers.check_plan(widths_only, search(name, widths_only))
    assert all(choice > 0 for spec in plan for choice in spec.choices.values())


def test_an_unknown_agent_is_refused():
    with pytest.raises(InputError, match="'oracle' is unknown: known are era"):
        routers.agent("oracle")


def test_a_plan_over_the_budget_is_no_plan(roomy):
    with pytest.raises(RunFailed, match=r"costs 1\.0000 of dense, the budget is 0\.5"):
        routers.check_plan(with_ratio(roomy, 0.5), (roomy.space.dense,) * 2)


@random_agents
def test_agents_that_try_plans_try_as_many_as_they_may(roomy, name, monkeypatch):
    tried, problem = [], with_ratio(roomy, 0.5)
    losses = problem.losses
    monkeypatch.setattr(problem, "losses", lambda plans: tried.extend(plans) or losses(plans))
    plan = search(name, problem, settings=dataclasses.replace(SETTINGS, trials=27))
    monkeypatch.undo()
    assert len(tried) == len(set(tried)) == 27
    assert plan == min(tried, key=problem.loss)
    assert all(problem.within_budget(other) for other in tried)


@pytest.mark.parametrize("name", ["random_search", "evolution", "era"])
def test_a_search_tells_how_it_goes_and_may_be_ended_there(roomy, name):
    problem, told = with_ratio(roomy, 0.5), []
    problem.report = lambda done, total, best: told.append((done, total, best))
    plan = search(name, problem, settings=dataclasses.replace(SETTINGS, trials=21))
    steps, totals, bests = zip(*told, strict=True)
    assert list(steps) == sorted(set(steps))
    assert set(totals) == {steps[-1]}
    assert list(bests) == sorted(bests, reverse=True)
    assert bests[-1] == pytest.approx(problem.loss(plan))

    def enough(done: int, total: int, best: float) -> None:
        raise KeyboardInterrupt

    problem.report = enough
    with pytest.raises(KeyboardInterrupt):
        search(name, problem)


def test_evolution_starts_from_uniform_and_greedy(roomy):
    problem = with_ratio(roomy, 0.5)
    plan = search("evolution", problem, settings=dataclasses.replace(SETTINGS, trials=2))
    assert plan == min((search("uniform", problem), search("greedy", problem)), key=problem.loss)


@pytest.mark.parametrize("seed", range(6))
def test_a_repaired_plan_fits_and_nothing_more_would(roomy, seed):
    rng = random.Random(seed)
    problem = with_ratio(roomy, rng.uniform(0.25, 0.9))
    plan = repair(problem, tuple(random_spec(problem.space, rng) for _ in problem.experts), rng)
    assert problem.within_budget(plan)
    for k, spec in enumerate(plan):
        for site in problem.space.sites:
            for choice in site.choices:
                if problem.price(site.name, choice) > problem.price(site.name, spec[site.name]):
                    assert problem.cost_ratio((*plan[:k], spec.replace(site.name, choice), *plan[k + 1 :])) > problem.ratio


# --- losses ---------------------------------------------------------------------------------------------------------


def test_a_perfect_copy_has_loss_one():
    taught, target = torch.randn(2, 4, 3, 8, 8)
    batch = CalibrationBatch(taught, torch.zeros(4), target, taught)
    assert float(batch.loss(taught)) == pytest.approx(1)
    assert float(batch.loss(target)) == pytest.approx(1)
    expected = (F.mse_loss(taught * 0, taught) + F.mse_loss(taught * 0, target)) / F.mse_loss(taught, target)
    assert float(batch.loss(taught * 0)) == pytest.approx(float(expected))


def test_an_error_counts_as_a_part_of_the_dense_models_at_its_timestep():
    taught, target = torch.randn(2, 2, 3, 8, 8)
    batch = CalibrationBatch(taught, torch.zeros(2), target, taught, scale=torch.tensor([0.5, 0.005]))
    rise = batch.losses(taught + 0.1) - 1
    error = 0.01 + (taught + 0.1 - target).square().flatten(1).mean(1) - (taught - target).square().flatten(1).mean(1)
    torch.testing.assert_close(rise, error / torch.tensor([0.5, 0.005]), rtol=1e-3, atol=1e-4)


def test_a_part_of_a_batch_is_measured_like_the_whole(roomy):
    batch, expert = roomy.search_batches[0], roomy.experts[0]
    whole = batch.run(expert)
    torch.testing.assert_close(batch.part([4, 1]).run(expert), whole[[4, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.part(range(1, 6, 2)).run(expert), whole[1::2], rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(roomy, monkeypatch):
    batch, spec = roomy.search_batches[0], roomy.space.narrowest
    whole = batch.run(roomy.experts[0], spec)
    monkeypatch.setattr(routers, "CHUNK", 4)
    torch.testing.assert_close(batch.run(roomy.experts[0], spec), whole, rtol=1e-4, atol=1e-5)


def test_autocast_is_for_gpus(roomy):
    batch = dataclasses.replace(roomy.search_batches[0], mixed_precision="bf16")
    assert torch.equal(batch.run(roomy.experts[0]), roomy.search_batches[0].run(roomy.experts[0]))


def test_losses_count_by_weight_and_costs_by_share(roomy):
    plan, heavy = (roomy.space.narrowest, roomy.space.dense), with_ratio(roomy, 1.0, weights=(3.0, 0.5))
    parts = [with_ratio(roomy, 1.0, weights=w).loss(plan) for w in ((1.0, 0.0), (0.0, 1.0))]
    assert heavy.loss(plan) == pytest.approx(3 * parts[0] + 0.5 * parts[1])
    assert heavy.cost_ratio(plan) == roomy.cost_ratio(plan)
    assert list(with_ratio(roomy, 1.0, shares=(0.0, 1.0), weights=(3.0, 2.0)).weights) == [0.0, 2.0]


def test_what_was_run_once_is_not_run_again(roomy):
    problem = with_ratio(roomy, 1.0, _cache={}, effort=Effort())
    a, b = roomy.space.dense, roomy.space.narrowest
    found = problem.losses([(a, b), (a, a), (a, b)])
    assert problem.passes == 3
    assert found[0] == found[2] == problem.loss((a, b))
    assert problem.passes == 3
    later = dataclasses.replace(problem, effort=Effort())
    assert later.losses([(a, b), (b, b)]) == [found[0], problem.loss((b, b))]
    assert later.passes == 3, "a search pays for what others have run before it, so that it is the same wherever it runs"


def test_two_plans_are_compared_image_by_image(roomy):
    a, b = (roomy.space.narrowest,) * 2, (roomy.space.dense,) * 2
    gap, error = roomy.compare(a, b)
    by_hand = [
        share * (batch.run(expert, a[0]) - batch.run(expert, b[0]))
        for share, batch, expert in zip(roomy.shares, roomy.score_batches, roomy.experts, strict=True)
    ]
    assert gap == pytest.approx(roomy.score(a) - roomy.score(b), rel=1e-4)
    assert error == pytest.approx(math.sqrt(sum(float(g.var()) / len(g) for g in by_hand)), rel=1e-4)
    assert roomy.compare(a, a) == (0, 0)


def test_a_plans_loss_is_the_share_weighted_loss_of_its_experts(roomy):
    plan = (roomy.space.narrowest, roomy.space.dense)
    by_hand = 0.0
    for share, expert, batch, spec in zip(roomy.shares, roomy.experts, roomy.search_batches, plan, strict=True):
        with torch.no_grad():
            by_hand += share * float(batch.loss(expert(batch.noisy, batch.timesteps, spec)))
    assert roomy.loss(plan) == pytest.approx(by_hand) == roomy.loss(plan)
    assert roomy.score(plan) != roomy.loss(plan)


def test_sensitivity_is_the_rise_of_the_loss_and_zero_for_dense(roomy):
    expert, batch, table = roomy.experts[1], roomy.search_batches[1], roomy.sensitivity[1]
    with torch.no_grad():
        base = float(batch.loss(expert(batch.noisy, batch.timesteps)))
        for site in roomy.space.sites:
            assert table[site.name].keys() == set(site.choices)
            assert table[site.name][site.dense] == 0
            spec = expert.space.dense.replace(site.name, site.choices[0])
            assert table[site.name][site.choices[0]] == pytest.approx(float(batch.loss(expert(batch.noisy, batch.timesteps, spec))) - base)


def test_sensitivity_around_a_plan_is_relative_to_that_plan(roomy):
    expert, batch, around = roomy.experts[0], roomy.search_batches[0], roomy.space.narrowest
    site = next(site for site in roomy.space.sites if len(site.choices) == 5)
    table = measure_sensitivity(expert, batch, around=around, sites=[site])
    assert list(table) == [site.name]
    base = float(batch.run(expert, around).mean())
    exact = [float(batch.run(expert, around.replace(site.name, choice)).mean()) - base for choice in site.choices]
    assert ranks_around(site, around[site.name]) == [0, 2, 4]
    assert list(table[site.name].values()) == pytest.approx([*exact[:3], (exact[2] + exact[4]) / 2, exact[4]], abs=1e-5)
    assert table[site.name][around[site.name]] == 0


def test_choices_that_were_not_measured_lie_between_their_neighbours(roomy):
    expert, batch = roomy.experts[0], roomy.search_batches[0]
    exact, rough = measure_sensitivity(expert, batch, points=4), measure_sensitivity(expert, batch, points=2)
    name = next(site.name for site in roomy.space.sites if len(site.choices) == 5)
    ends = [exact[name][choice] for choice in (0, 2, 4)]
    assert [rough[name][choice] for choice in (0, 2, 4)] == pytest.approx(ends)
    assert [rough[name][choice] for choice in (1, 3)] == pytest.approx([(ends[0] + ends[1]) / 2, (ends[1] + ends[2]) / 2])


# --- uniform --------------------------------------------------------------------------------------------------------


def test_uniform_levels_go_from_smallest_over_narrowest_to_dense(roomy):
    assert uniform.at_level(roomy.space, 0) == roomy.space.smallest
    assert uniform.at_level(roomy.space, 1) == roomy.space.narrowest
    assert uniform.at_level(roomy.space, 2) == roomy.space.dense


def test_a_higher_uniform_level_never_keeps_less(roomy):
    levels = [uniform.at_level(roomy.space, i / 200) for i in range(401)]
    for lower, higher in zip(levels, levels[1:], strict=False):
        assert all(lower[site.name] <= higher[site.name] for site in roomy.space.sites)
    assert len(set(levels)) > 30


def test_uniform_cuts_every_site_of_every_expert_alike(roomy):
    plan = search("uniform", with_ratio(roomy, 0.5))
    assert plan[0] == plan[1]
    ranks = [[c for c in site.choices if c].index(plan[0][site.name]) / (len(site.choices) - 2) for site in roomy.space.sites]
    assert max(ranks) - min(ranks) < 1
    assert 0 < sum(ranks) / len(ranks) < 1


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_uniform_takes_the_highest_level_that_fits(roomy, ratio):
    problem = with_ratio(roomy, ratio)
    fits = [spec for i in range(4001) if problem.within_budget((spec := uniform.at_level(problem.space, i / 2000),) * 2)]
    assert problem.cost_ratio(search("uniform", problem)) == max(problem.cost_ratio((spec,) * 2) for spec in fits)


# --- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_leaves_no_room_for_a_better_choice(roomy):
    problem = with_ratio(roomy, 0.5)
    plan = greedy.fit_budget(problem, (problem.space.dense,) * 2)
    for k, spec in enumerate(plan):
        for site in problem.space.sites:
            for choice in site.choices:
                rises = problem.sensitivity[k][site.name]
                if choice > spec[site.name] and rises[choice] < rises[spec[site.name]] - 1e-9:
                    larger = (*plan[:k], spec.replace(site.name, choice), *plan[k + 1 :])
                    assert problem.cost_ratio(larger) > 0.5 - 1e-9


def test_greedy_gives_back_what_a_too_small_plan_left(roomy):
    problem = with_ratio(roomy, 0.6)
    plan = greedy.fit_budget(problem, (problem.space.smallest,) * 2)
    assert problem.within_budget(plan)
    assert problem.cost_ratio(plan) > 0.5
    assert problem.loss(plan) < problem.loss((problem.space.smallest,) * 2)


def test_greedy_gives_back_the_best_exchange_first(roomy):
    """One site of one expert is worth more than all the rest, and the room is just enough for it."""
    prized = roomy.space.sites[0].name
    dull = {site.name: {choice: 1e-6 * (site.dense - choice) for choice in site.choices} for site in roomy.space.sites}
    keen = {**dull, prized: {choice: 10.0 * (roomy.space.sites[0].dense - choice) for choice in roomy.space.sites[0].choices}}
    smallest = (roomy.space.smallest,) * 2
    wanted = (smallest[0], smallest[1].replace(prized, roomy.space.dense[prized]))
    problem = with_ratio(roomy, roomy.cost_ratio(wanted), sensitivity=[dull, keen])
    assert greedy.fit_budget(problem, smallest) == wanted


def test_greedy_spares_the_expert_that_is_sensitive(roomy):
    """Expert 0 loses nothing by any cut, expert 1 loses much: all cuts go to expert 0 as long as they suffice."""
    free = {site.name: dict.fromkeys(site.choices, 0.0) for site in roomy.space.sites}
    dear = {site.name: {choice: float(site.dense - choice) for choice in site.choices} for site in roomy.space.sites}
    problem = with_ratio(roomy, 0.8, sensitivity=[free, dear])
    plan = greedy.fit_budget(problem, (problem.space.dense,) * 2)
    assert plan[1] == problem.space.dense
    assert plan[0] != problem.space.dense
    assert problem.within_budget(plan)


# --- knapsack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0.2, 0.5, 0.8])
def test_the_knapsack_is_the_best_of_all_plans_of_its_table(roomy, room):
    """All choices of two sites of both experts, tried one by one; the other sites stay dense."""
    free = [site for site in roomy.space.sites if len(site.choices) == 5][:2]
    rng = random.Random(int(10 * room))
    tables = []
    for _ in range(2):
        table = {site.name: {site.dense: 0.0} for site in roomy.space.sites}
        table |= {site.name: {choice: rng.random() * (site.dense - choice) for choice in site.choices} for site in free}
        tables.append(table)
    plans = [
        tuple(roomy.space.dense.replace(free[0].name, a).replace(free[1].name, b) for a, b in ((c[0], c[1]), (c[2], c[3])))
        for c in itertools.product(*(site.choices for site in free * 2))
    ]
    costs = [roomy.cost_ratio(plan) for plan in plans]
    problem = with_ratio(roomy, min(costs) + room * (max(costs) - min(costs)), weights=(2.0, 0.7))

    def loss(plan: Specs) -> float:
        return sum(w * sum(table[s][c] for s, c in spec.choices.items()) for w, table, spec in zip((2.0, 0.7), tables, plan, strict=True))

    found = knapsack.best_sum(problem, tables)
    assert problem.within_budget(found)
    assert loss(found) == pytest.approx(min(loss(plan) for plan in plans if problem.within_budget(plan)))
    assert knapsack.best_sum(with_ratio(roomy, min(costs) - 0.01), tables) is None


def test_the_knapsack_is_no_worse_than_greedy_by_their_common_table(roomy):
    for ratio in (0.3, 0.5, 0.8):
        problem = with_ratio(roomy, ratio)
        sums = [
            sum(
                weight * table[site][choice]
                for weight, table, spec in zip(problem.weights, problem.sensitivity, search(name, problem), strict=True)
                for site, choice in spec.choices.items()
            )
            for name in ("knapsack", "greedy")
        ]
        assert sums[0] <= sums[1] + 1e-9


# --- stitch ---------------------------------------------------------------------------------------------------------


def test_stitching_keeps_the_clean_expert_dense_and_the_noisy_one_as_large_as_fits(roomy):
    problem = with_ratio(roomy, 0.6)
    clean, noisy = search("stitch", problem)
    assert clean == problem.space.dense
    fits = [spec for i in range(801) if problem.within_budget((clean, spec := uniform.at_level(problem.space, i / 400)))]
    assert problem.cost_ratio((clean, noisy)) == max(problem.cost_ratio((clean, spec)) for spec in fits)


def test_stitching_cuts_all_alike_where_no_dense_expert_fits(roomy):
    problem = with_ratio(roomy, 0.3)
    assert search("stitch", problem) == search("uniform", problem)


def test_stitching_one_expert_is_uniform(roomy):
    one = {name: getattr(roomy, name)[:1] for name in ("experts", "search_batches", "score_batches", "sensitivity")}
    problem = with_ratio(roomy, 0.5, shares=(1.0,), weights=(), **one)
    assert search("stitch", problem) == search("uniform", problem)


def test_stitching_chooses_how_many_experts_stay_dense_by_their_loss(roomy):
    three = {
        name: [*getattr(roomy, name), getattr(roomy, name)[1]] for name in ("experts", "search_batches", "score_batches", "sensitivity")
    }
    problem = with_ratio(roomy, 0.8, shares=(0.2, 0.2, 0.6), weights=(), **three)
    plans = [stitch._stitched(problem, dense) for dense in (1, 2)]
    assert None not in plans
    assert search("stitch", problem) == min(plans, key=problem.loss)


# --- why ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_explained_by_what_was_dear_to_keep_and_cheap_to_cut(roomy):
    problem = with_ratio(roomy, 0.6)
    plan = search("greedy", problem)
    for k, found in enumerate(reasons(problem, plan)):
        assert len({reason.site for reason in found}) == len(found) == 5
        kept = [reason for reason in found if reason.choice == reason.dense]
        cut = [reason for reason in found if reason.choice < reason.dense]
        assert [*kept, *cut] == list(found)
        for reason in found:
            site = next(site for site in problem.space.sites if site.name == reason.site)
            other = site.choices[0] if reason in kept else reason.choice
            assert reason.choice == plan[k][site.name]
            assert reason.rise == problem.sensitivity[k][site.name][other]
            assert reason.saves == pytest.approx(problem.price(site.name, site.dense) - problem.price(site.name, other))
        whole = [s for s in problem.space.sites if plan[k][s.name] == s.dense]
        dearest = max((problem.sensitivity[k][s.name][s.choices[0]] for s in whole), default=None)
        assert not kept or kept[0].rise == dearest


def test_reasons_are_told_in_sentences():
    found = (SiteReason("mid", 8, 8, 0.25, 0.041), SiteReason("up", 0, 8, 0.001, 0.1), SiteReason("down", 2, 8, -0.002, 0.05))
    assert explain(found) == [
        "mid kept whole: without it, loss +0.250 for 4.1% of the dense cost",
        "up dropped: loss +0.001, saves 10.0% of the dense cost",
        "down cut to 2 of 8: loss -0.002, saves 5.0% of the dense cost",
    ]


# --- the archive and its refinement ---------------------------------------------------------------------------------


def count_images(monkeypatch, problem: RouteProblem) -> list[int]:
    """Images that forward passes take from now on; those of the differentiable ones count three times."""
    taken: list[int] = []
    run, gated_loss = CalibrationBatch.run, RouteProblem.gated_loss
    monkeypatch.setattr(CalibrationBatch, "run", lambda batch, *args: taken.append(len(batch)) or run(batch, *args))
    monkeypatch.setattr(RouteProblem, "gated_loss", lambda p, k, gates, rows: taken.append(3 * len(rows)) or gated_loss(p, k, gates, rows))
    return taken


def some_plans(problem: RouteProblem, count: int) -> list[Specs]:
    rng = random.Random(4)
    return [repair(problem, tuple(random_spec(problem.space, rng) for _ in problem.experts), rng) for _ in range(count)]


def test_the_archive_combines_any_expert_with_any(roomy):
    problem = with_ratio(roomy, 0.5)
    plans = some_plans(problem, 4)
    archive = Archive(problem)
    archive.add(plans)
    for ratio in (0.5, 0.55, 0.8):
        pairs = [pair for pair in itertools.product(*zip(*plans, strict=True)) if problem.cost_ratio(pair) <= ratio + 1e-9]
        best = archive.best(ratio)
        assert problem.cost_ratio(best) <= ratio + 1e-9
        assert problem.loss(best) == pytest.approx(min(problem.losses(pairs)))


def test_refinement_improves_a_plan_within_its_passes(roomy, monkeypatch):
    problem = with_ratio(roomy, 0.5)
    archive = Archive(problem)
    archive.add([search("uniform", problem)])
    before, taken = problem.loss(archive.best(0.5)), count_images(monkeypatch, problem)
    refine(problem, archive, 40.0, random.Random(0))
    after = archive.best(0.5)
    assert problem.within_budget(after)
    assert problem.loss(after) < before
    assert sum(taken) / len(problem.search_batches[0]) <= 40 + len(OPEN) * len(problem.experts)


def test_refinement_without_passes_does_nothing(roomy):
    problem = with_ratio(roomy, 0.5)
    archive = Archive(problem)
    archive.add([search("uniform", problem)])
    refine(problem, archive, 0.0, random.Random(0))
    assert archive.best(0.5) == search("uniform", problem)


def test_refinement_moves_cost_from_one_expert_to_the_other(roomy):
    problem = with_ratio(roomy, 0.5)
    start = search("uniform", problem)
    archive = Archive(problem)
    archive.add([start])
    refine(problem, archive, 60.0, random.Random(1))
    found = archive.best(0.5)
    moved = [
        sum(problem.price(s, c) - problem.price(s, old[s]) for s, c in new.choices.items()) for new, old in zip(found, start, strict=True)
    ]
    assert problem.loss(found) < problem.loss(start)
    assert min(moved) < 0 < max(moved)


# --- the expert routing agent ---------------------------------------------------------------------------------------


@pytest.fixture
def agent(roomy) -> tuple[era.Agent, RouteProblem, Specs]:
    problem = with_ratio(roomy, 0.5)
    start = search("greedy", problem)
    torch.manual_seed(0)
    return era.Agent(problem.space, {0.5: start}), problem, start


def agent_loss(model: era.Agent, problem: RouteProblem, settings: RouteSettings = SETTINGS) -> torch.Tensor:
    choices = era.Choices(problem, torch.device("cpu"))
    return era.agent_loss(model, problem, choices, problem.ratio, settings, torch.Generator().manual_seed(0), random.Random(0))


def test_the_most_likely_plan_of_a_new_agent_is_the_one_it_was_given(agent):
    model, problem, start = agent
    surprise = model.surprise(0.5)
    assert tuple(ArchitectureSpec({site: min(row, key=row.__getitem__) for site, row in expert.items()}) for expert in surprise) == start
    assert knapsack.best_sum(problem, surprise, (1.0, 1.0)) == start


def test_the_agents_probabilities_sum_to_one(agent):
    model, problem, _ = agent
    for expert in model.surprise(0.5):
        for site in problem.space.sites:
            assert expert[site.name].keys() == set(site.choices)
            if site.choices[0] == 0:
                assert sum(math.exp(-value) for value in expert[site.name].values()) == pytest.approx(1, rel=1e-4)


def test_the_agent_starts_between_the_plans_of_its_budgets(roomy):
    small, large = (roomy.space.smallest,) * 2, (roomy.space.dense,) * 2
    model = era.Agent(roomy.space, {0.9: large, 0.3: small})
    depths = [float(model._between(model.start_depth, ratio).mean().detach()) for ratio in (0.2, 0.3, math.sqrt(0.27), 0.9, 1.0)]
    assert depths == pytest.approx([-era.OFFSET, -era.OFFSET, 0, era.OFFSET, era.OFFSET], abs=1e-6)


def test_gradients_reach_every_part_of_the_agent(roomy):
    """From the dense plan: a dropped branch's width cannot matter while it is dropped."""
    model = era.Agent(roomy.space, {0.5: (roomy.space.dense,) * 2})
    agent_loss(model, with_ratio(roomy, 0.5)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not model.inputs.requires_grad


def test_freeing_an_experts_activations_changes_neither_loss_nor_gradient(roomy, monkeypatch):
    problem, model = with_ratio(roomy, 0.5), era.Agent(roomy.space, {0.5: (roomy.space.dense,) * 2})

    def whole(problem: RouteProblem, k: int, units: torch.Tensor, keep: torch.Tensor, rows: list[int]) -> torch.Tensor:
        gates = {site.name: (units[s, : site.dense], keep[s]) for s, site in enumerate(problem.space.sites)}
        return problem.gated_loss(k, gates, rows)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = agent_loss(model, problem)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    found = loss_and_gradients()
    monkeypatch.setattr(era, "_expert_loss", whole)
    torch.testing.assert_close(found, loss_and_gradients(), rtol=1e-4, atol=1e-6)


def test_one_experts_choice_depends_on_the_others_and_on_the_budget(agent):
    model, _, _ = agent
    model.inputs.requires_grad_()
    width, depth = model(0.5)
    gradient = torch.autograd.grad(width[0, 0].clamp_min(-9).square().sum() + depth[0, 0], model.inputs)[0]
    assert gradient[1].abs().sum() > 0
    assert not torch.equal(model(0.7)[1], depth)


@pytest.mark.parametrize("rows", [2, 6])
def test_the_loss_of_a_certain_agent_is_the_plans_loss_and_cost(agent, rows):
    """Logits so large that nothing is left to chance: gates and cost must then be those of the sliced plan."""
    model, problem, start = agent
    model.start_depth.mul_(1e4)
    model.start_width.mul_(1e4)
    found = float(agent_loss(model, problem, dataclasses.replace(SETTINGS, era_batch=rows)).detach())
    cost = SETTINGS.cost_weight * abs(math.log(problem.cost_ratio(start) / problem.ratio))
    expected = math.log(problem.loss(start)) + cost
    assert (found == pytest.approx(expected, rel=1e-4)) == (rows == len(problem.search_batches[0]))


def test_the_cost_term_pulls_towards_the_budget(roomy):
    """With the cost term dominant, training from the dense plan must approach a budget of half."""
    problem = with_ratio(roomy, 0.5)
    torch.manual_seed(0)
    model, choices = era.Agent(problem.space, {0.5: (problem.space.dense,) * 2}), era.Choices(problem, torch.device("cpu"))
    optimizer, noise, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0), random.Random(0)
    settings = dataclasses.replace(SETTINGS, cost_weight=1000.0, era_batch=1)
    for _ in range(25):
        optimizer.zero_grad()
        era.agent_loss(model, problem, choices, 0.5, settings, noise, rng).backward()
        optimizer.step()
    likeliest = tuple(ArchitectureSpec({site: min(row, key=row.__getitem__) for site, row in e.items()}) for e in model.surprise(0.5))
    assert abs(problem.cost_ratio(likeliest) - 0.5) < 0.2


def test_samples_are_hard_choices_with_soft_gradients():
    noise, sites = torch.Generator().manual_seed(0), 3000
    width = torch.tensor([0.5, 0.0, -0.5, -torch.inf]).expand(1, sites, 4).clone().requires_grad_()
    depth = torch.full((1, sites), 0.3, requires_grad=True)
    chosen, keep = era._sample(width, depth, torch.ones(sites, dtype=torch.bool), 0.4, noise)
    assert torch.allclose(chosen.sort().values, torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-6)
    assert torch.allclose(keep, keep.round(), atol=1e-6)
    assert torch.allclose(chosen[0].mean(0), width[0, 0].detach().softmax(0), atol=0.03)  # Gumbel-max samples the softmax
    assert float(keep.detach().mean()) == pytest.approx(1 / (1 + math.exp(-0.3)), abs=0.03)
    gradients = torch.autograd.grad((chosen * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum() + keep.sum(), [width, depth])
    assert all(bool(g.abs().sum() > 0) and bool(g.isfinite().all()) for g in gradients)


def test_a_site_that_cannot_be_dropped_is_always_kept():
    noise, droppable = torch.Generator().manual_seed(0), torch.tensor([False, True])
    for _ in range(20):
        _, keep = era._sample(torch.zeros(1, 2, 2), torch.full((1, 2), -50.0), droppable, 0.4, noise)
        assert keep.tolist() == [[1, 0]]


def test_an_agent_that_loses_its_way_still_answers_with_the_best_it_has_met(roomy):
    problem = with_ratio(roomy, 0.4)
    found = search("era", problem, settings=dataclasses.replace(SETTINGS, era_steps=3, era_learning_rate=1.0))  # far too fast
    assert problem.loss(found) <= min(problem.loss(search(name, problem)) for name in ("uniform", "greedy", "knapsack")) + 1e-9


# --- several budgets ------------------------------------------------------------------------------------------------


def test_one_search_serves_eight_budgets_for_less_than_three(roomy, monkeypatch):
    settings, ratios = dataclasses.replace(SETTINGS, era_steps=8, trials=16), (0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
    one, eight = (with_ratio(roomy, 0.5, _cache={}, effort=Effort()) for _ in range(2))
    taken = count_images(monkeypatch, one)
    era.search(one, settings, random.Random(0))
    assert one.effort.images == sum(taken)
    taken.clear()
    plans = era.search_front(eight, ratios, settings, random.Random(0))
    assert one.effort.images < eight.effort.images == sum(taken) < 3 * one.effort.images
    problems = [with_ratio(roomy, ratio) for ratio in ratios]
    for problem, plan in zip(problems, plans, strict=True):
        assert routers.check_plan(problem, plan) is plan
        assert problem.loss(plan) <= min(problem.loss(search(name, problem)) for name in ("uniform", "greedy", "knapsack")) + 1e-6
    losses = [problem.loss(plan) for problem, plan in zip(problems, plans, strict=True)]
    assert losses == sorted(losses, reverse=True)  # a larger budget never costs quality: what fits the smaller one fits it too


def test_with_one_budget_for_all_every_expert_keeps_within_it_and_is_no_worse_than_cut_uniformly(roomy):
    ratios = (0.8, 0.4)
    plans = routers.agent("era_even").search_front(with_ratio(roomy, 0.8), ratios, SETTINGS, random.Random(0))
    for ratio, plan in zip(ratios, plans, strict=True):
        alike = search("uniform", with_ratio(roomy, ratio))
        for k, (spec, baseline) in enumerate(zip(plan, alike, strict=True)):
            assert roomy.table.cost(spec).macs <= ratio * roomy.table.dense.macs
            roomy.losses([plan, alike])
            assert roomy.expert_loss(k, spec) <= roomy.expert_loss(k, baseline) + 1e-6


def test_a_front_with_an_impossible_budget_is_refused_before_any_search(roomy):
    with pytest.raises(BudgetUnreachable):
        era.search_front(with_ratio(roomy, 0.5, search_batches=(), _cache={}), (0.5, 0.01), SETTINGS, random.Random(0))
