"""One contract for every routing agent: within the budget, no worse than `uniform`, and the same seed finds the same plan."""

import copy
import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from workers import families, routers
from workers.contracts import BudgetUnreachable, ElasticSettings, ElasticSite, InputError, RouteSettings, RunFailed
from workers.cost import cost_table
from workers.elastic import ElasticDenoiser
from workers.latency_table import LatencyIdentity, LatencyTable, LatencyValidation
from workers.routers import CalibrationBatch, RouteProblem, Specs, era, greedy, measure_sensitivity, uniform

ELASTIC = ElasticSettings(width_multiple=1, depth=True, importance="magnitude")
SETTINGS = RouteSettings(images=6, era_steps=4, era_batch=4, era_learning_rate=1e-2, cost_weight=2.0, temperature=0.4)
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
def test_a_plan_is_legal_within_the_budget_and_no_worse_than_uniform(roomy, name, ratio):
    problem = with_ratio(roomy, ratio)
    plan = search(name, problem)
    assert len(plan) == len(problem.experts)
    assert routers.check_plan(problem, plan) is plan
    by_hand = sum(s * problem.table.cost(spec).macs for s, spec in zip(problem.shares, plan, strict=True)) / problem.table.dense.macs
    assert by_hand <= ratio + 1e-9
    assert problem.loss(plan) <= problem.loss(search("uniform", problem)) + 1e-6


@every_agent
def test_the_same_seed_finds_the_same_plan(roomy, name):
    torch.manual_seed(1)
    first = search(name, with_ratio(roomy, 0.5, score_batches=roomy.score_batches), seed=3)
    torch.manual_seed(2)
    assert search(name, with_ratio(roomy, 0.5, score_batches=roomy.score_batches), seed=3) == first


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
    assert roomy.loss(plan) <= roomy.loss(dense)
    if name == "uniform":
        assert plan == dense


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
    assert problem.loss(plan) <= problem.loss(search("uniform", problem)) + 1e-6


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
    assert problem.loss(plan) <= problem.loss(search("uniform", problem)) + 1e-6


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


# --- losses ---------------------------------------------------------------------------------------------------------


def test_a_perfect_copy_has_loss_one():
    taught, target = torch.randn(2, 4, 3, 8, 8)
    batch = CalibrationBatch(taught, torch.zeros(4), target, taught)
    assert float(batch.loss(taught)) == pytest.approx(1)
    assert float(batch.loss(target)) == pytest.approx(1)
    expected = (F.mse_loss(taught * 0, taught) + F.mse_loss(taught * 0, target)) / F.mse_loss(taught, target)
    assert float(batch.loss(taught * 0)) == pytest.approx(float(expected))


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


# --- the expert routing agent ---------------------------------------------------------------------------------------


@pytest.fixture
def agent(roomy) -> tuple[era.Agent, RouteProblem, Specs]:
    problem = with_ratio(roomy, 0.5)
    start = greedy.search(problem, SETTINGS, random.Random(0))
    torch.manual_seed(0)
    return era.Agent(problem, start), problem, start


def test_the_agent_starts_from_the_plan_it_was_given(agent):
    model, _, start = agent
    assert model.plan() == start


def test_the_agent_reads_every_site_of_every_expert(agent):
    model, problem, _ = agent
    logits = model()
    assert len(logits) == 2
    assert all(len(expert) == len(problem.space.sites) for expert in logits)
    for expert in logits:
        for site, (width, depth) in zip(problem.space.sites, expert, strict=True):
            assert width.shape == (len([c for c in site.choices if c > 0]),)
            assert depth.shape == ()


def test_gradients_reach_every_part_of_the_agent(roomy):
    """From the dense plan: a dropped branch's width cannot matter while it is dropped."""
    problem, model = with_ratio(roomy, 0.5), era.Agent(roomy, (roomy.space.dense,) * 2)
    noise = torch.Generator().manual_seed(0)
    era._agent_loss(model, problem, SETTINGS, noise, random.Random(0)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert not model.inputs.requires_grad


def test_freeing_an_experts_activations_changes_neither_loss_nor_gradient(roomy, monkeypatch):
    problem, model = with_ratio(roomy, 0.5), era.Agent(roomy, (roomy.space.dense,) * 2)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = era._agent_loss(model, problem, SETTINGS, torch.Generator().manual_seed(0), random.Random(0))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    found = loss_and_gradients()
    monkeypatch.setattr(era, "_expert_loss", RouteProblem.gated_loss)
    torch.testing.assert_close(found, loss_and_gradients(), rtol=1e-4, atol=1e-6)


def test_one_experts_choice_depends_on_the_others(agent):
    model, _, _ = agent
    model.inputs.requires_grad_()
    width, depth = model()[0][0]
    gradient = torch.autograd.grad(width.square().sum() + depth, model.inputs)[0]
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize("rows", [2, 6])
def test_the_loss_of_a_certain_agent_is_the_plans_loss_and_cost(agent, rows):
    """Logits so large that nothing is left to chance: gates and cost must then be those of the sliced plan."""
    model, problem, start = agent
    with torch.no_grad():
        model.start_depth.mul_(1e4)
        model.start_width = [[width * 1e4 for width in expert] for expert in model.start_width]
    settings = dataclasses.replace(SETTINGS, era_batch=rows)
    found = era._agent_loss(model, problem, settings, torch.Generator().manual_seed(0), random.Random(0))
    cost = SETTINGS.cost_weight * abs(torch.tensor(problem.cost_ratio(start) / problem.ratio).log())
    if rows == len(problem.search_batches[0].noisy):
        assert float(found.detach()) == pytest.approx(math.log(problem.loss(start)) + float(cost), rel=1e-4)
    else:
        assert float(found.detach()) != pytest.approx(math.log(problem.loss(start)) + float(cost), rel=1e-4)


def test_the_cost_term_pulls_towards_the_budget(roomy):
    """With the cost term dominant, training from the dense plan must approach a budget of half."""
    problem = with_ratio(roomy, 0.5)
    torch.manual_seed(0)
    model = era.Agent(problem, (problem.space.dense,) * 2)
    optimizer, noise, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0), random.Random(0)
    settings = dataclasses.replace(SETTINGS, cost_weight=1000.0, era_batch=1)
    for _ in range(25):
        optimizer.zero_grad()
        era._agent_loss(model, problem, settings, noise, rng).backward()
        optimizer.step()
    assert abs(problem.cost_ratio(model.plan()) - 0.5) < 0.2


def test_samples_are_hard_choices_with_soft_gradients():
    site, noise = ElasticSite("mid", (0, 2, 4, 6), "group"), torch.Generator().manual_seed(0)
    width, depth = torch.tensor([0.5, 0.0, -0.5], requires_grad=True), torch.tensor(0.3, requires_grad=True)
    counts, kept = torch.zeros(3), 0.0
    for _ in range(3000):
        chosen, keep = era._sample(width, depth, site, 0.4, noise)
        assert torch.allclose(chosen.sort().values, torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
        assert min(abs(keep.item()), abs(keep.item() - 1)) < 1e-6
        counts, kept = counts + chosen.detach(), kept + keep.item()
    assert torch.allclose(counts / 3000, width.detach().softmax(0), atol=0.03)  # Gumbel-max samples the softmax
    assert kept / 3000 == pytest.approx(float(depth.detach().sigmoid()), abs=0.03)
    gradients = torch.autograd.grad((chosen * torch.tensor([1.0, 2.0, 3.0])).sum() + keep, [width, depth])
    assert all(bool(g.abs().sum() > 0) for g in gradients)


def test_a_site_that_cannot_be_dropped_is_always_kept():
    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        _, keep = era._sample(torch.zeros(2), torch.tensor(-50.0), ElasticSite("mid", (2, 4), "group"), 0.4, noise)
        assert float(keep) == 1
    _, keep = era._sample(torch.zeros(1), torch.tensor(-50.0), ElasticSite("mid", (0, 4), "group"), 0.4, noise)
    assert float(keep) == 0


@pytest.mark.parametrize("ratio", [0.8, 0.4])
def test_the_agent_is_never_worse_than_the_greedy_plan_it_starts_from(roomy, ratio):
    problem = with_ratio(roomy, ratio)
    settings = dataclasses.replace(SETTINGS, era_steps=3, era_learning_rate=1.0)  # far too fast, so that it loses its way
    found, start = search("era", problem, settings=settings), search("greedy", problem)
    assert problem.loss(found) <= problem.loss(start)


def test_an_agent_without_steps_answers_with_its_start(roomy):
    problem = with_ratio(roomy, 0.5)
    assert search("era", problem, settings=dataclasses.replace(SETTINGS, era_steps=0)) == search("greedy", problem)
