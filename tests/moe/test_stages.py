"""Layers whose experts spawn several times, with every router that there is."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from fairseq_evomoe.moe import ROUTERS, MoELayer, RoutingContext, Vocabulary, record
from fairseq_evomoe.moe.multiplying import try_routers
from fairseq_evomoe.moe.offspring import Offspring
from fairseq_evomoe.moe.options import OptionError
from fairseq_evomoe.moe.plan import make_spawner, resize_plan
from fairseq_evomoe.moe.rescaling import next_router, weights_now_and_then
from fairseq_evomoe.moe.routers.dynmoe import Resize
from fairseq_evomoe.moe.routers.router import Router, fill_uniform, linear32, top1_routing
from support.router_checks import end_update

DIM, VOCABULARY, STAGES = 6, 12, (2, 4, 8)
COUNTS = torch.arange(VOCABULARY, 0, -1).float()
OTHERS = {
    "dts, table": {"router": "dts", "gate_input": "table"},
    "dts, both, bias": {"router": "dts", "gate_input": "both", "balance": "bias", "balance_weight": 0.0},
    "switch, free experts": {
        "router": "switch",
        "zero_experts": 1,
        "constant_experts": 1,
        "balance": "quantile",
        "balance_weight": 0.0,
    },
    "hash, two": {"router": "hash", "hashes": 2},
    "adapter": {"router": "topk", "hyper_adapter": True, "shared_expert": True},
}
SYSTEMS = {**{name: {"router": name} for name in sorted(ROUTERS)}, **OTHERS}
# one of the two experts of the first stage in each stratum; the last norm is used by who asks for it alone
SYSTEMS["stratified"].update(top_k=1, strata_norm="inner")


def make(router, experts=STAGES, method="copy", noise=0.0, **options):
    torch.manual_seed(0)
    numbers = [experts] if isinstance(experts, int) else experts
    spawner = make_spawner(experts=numbers[0], method=method, gate_noise=noise)
    vocabulary = Vocabulary(VOCABULARY, COUNTS, dim=5)
    return MoELayer(DIM, 10, experts, router, spawner=spawner, vocabulary=vocabulary, **options).double()


def run(layer, seed=1, hard=False):
    """A pass of training, with its gradients; and what was routed where."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 7, DIM, dtype=torch.float64, generator=generator)
    tokens = torch.randint(VOCABULARY, (3, 7), generator=generator)
    embeddings = torch.randn(VOCABULARY, 5, dtype=torch.float64, generator=generator)[tokens]
    sequences = torch.arange(3).unsqueeze(1).expand(3, 7)
    context = RoutingContext(noise_key=("test", seed), hard=hard)
    with record() as routings:
        y = layer(x, context, tokens=tokens, sequences=sequences, embeddings=embeddings)
    (y.square().mean() + routings.auxiliary_loss()).backward()
    end_update(layer)
    return y, routings[layer]


def tensors(module):
    return {} if module is None else {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_stage_has_what_the_one_before_has_learned(system):
    layer = make(**SYSTEMS[system])
    run(layer)
    layer.spawn()
    for before, after in zip(STAGES, STAGES[1:]):
        run(layer, hard=True)  # so that there are counts and tables
        torch.nn.init.normal_(layer.experts.w1)
        old, experts = tensors(layer.router), layer.experts.tensors()
        plan = layer.plan_spawn()
        parents = list(plan.offspring.parent_E)
        assert sorted(parents) == [e for e in range(before) for _ in range(after // before)]
        layer.spawn(plan=plan)
        assert layer.num_experts == len(layer.experts.widths) == after
        for name, tensor in layer.experts.tensors().items():
            rows = experts[name].split(1 if name == "b2" else 10)
            assert torch.equal(tensor, torch.cat([rows[parent] for parent in parents])), name
        for name, tensor in tensors(layer.router).items():
            check_router_tensor(layer.router, name, old[name], tensor, parents)
        y, routing = run(layer, 2)
        assert y.isfinite().all() and routing.experts == after
        assert all(p.grad is not None for p in layer.parameters())
    assert layer.stage == 3
    with pytest.raises(OptionError, match="has spawned all its 8 experts"):
        layer.spawn()


def check_router_tensor(router, name, old, new, parents):
    """Every number that a child has is its parent's, but for what has a meaning of its own."""
    before, after = max(parents) + 1, len(parents)
    if name.endswith("table_V"):
        known = old >= 0
        assert torch.equal(torch.tensor(parents)[new[known]], old[known]) and (new[~known] == -1).all()
        for parent in range(before):  # the most frequent entries go to different children
            entries = (old.reshape(-1) == parent).nonzero().squeeze(1)[:2]
            assert len(new.reshape(-1)[entries].unique()) == len(entries)
    elif name == "origin_E":
        assert new.tolist() == list(range(after))
    elif name == "used_E":
        assert torch.allclose(new, old[parents] * before / after)
    elif name == "balancing.bias_E":
        expected = torch.cat([old[parents], old[before:]]) * before / after
        assert torch.allclose(new, expected - expected.mean())
    elif name == "cutoffs.updates":
        assert old > 0 and new == 0
    elif name.startswith("gates."):  # of the experts that are still to be reached
        reached = [parent - (before - len(old)) for parent in parents if parent >= before - len(old)]
        assert torch.equal(new, old[reached])
    elif name == "node":
        assert torch.equal(new[:, : before - 1], old) and (new[:, before - 1 :].abs() <= 0.01).all()
    elif old.shape == new.shape:
        assert torch.equal(old, new)
    else:
        dim = next(d for d in range(old.dim()) if old.shape[d] != new.shape[d])
        width = new.shape[dim] // after
        place = [parent * width + i for parent in parents for i in range(width)]
        assert torch.equal(new, old.index_select(dim, torch.tensor(place)))


@pytest.mark.parametrize("system", SYSTEMS)
def test_children_differ_by_the_noise_of_the_gate(system):
    layers = [make(noise=noise, **SYSTEMS[system]) for noise in (0.0, 0.1, 0.1)]
    for layer in layers:
        layer.spawn(), layer.spawn()
    plain, one, same = (tensors(layer.router) for layer in layers)
    grown = [
        name for name, p in layers[0].router.named_parameters() if p.shape[:1] != (1,) and name != "node"
    ]
    changed = {name for name, x in plain.items() if not torch.equal(one[name], x)}
    assert changed <= set(grown) and all(torch.equal(one[name], same[name]) for name in one)
    for name in changed - {"threshold_E"}:
        spread = (one[name] - plain[name]).std() / plain[name].std()
        assert 0.03 < spread < 0.2, name
    gates = {"weight", "centroid_ED", "leaf", "token_weight"} & set(plain)
    assert gates <= changed


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_state_of_any_stage_can_be_loaded(system):
    layer = make(**SYSTEMS[system])
    states = [layer.state_dict()]
    for _ in STAGES:
        layer.spawn()
        run(layer)
        states.append(copy.deepcopy(layer.state_dict()))
    for stage, state in enumerate(states):
        other = make(**SYSTEMS[system])
        other.load_state_dict(copy.deepcopy(state))
        assert other.stage == stage and other.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
        for _ in STAGES[stage:]:
            other.spawn()
        assert len(other.experts.widths) == 8
    # one that does not grow any more, and does not care how the other has grown
    last = make(**{**SYSTEMS[system], "experts": 8})
    last.load_state_dict(states[-1])
    assert "stage" not in last.state_dict() and len(last.experts.widths) == 8


def test_a_number_of_experts_that_no_stage_has_is_refused():
    layer = make("switch", (2, 6))
    layer.spawn(), layer.spawn()
    with pytest.raises(OptionError, match="6 experts .* stages have 2, 4"):
        make("switch", (2, 4)).load_state_dict(layer.state_dict())


def test_experts_that_come_and_go_multiply_from_what_there_are():
    layer = make("dynmoe", (3, 6), max_experts=8)
    layer.spawn()
    layer.apply_plan(plan_without(layer, 1))
    layer.router.resize(Resize([0, 2]))
    state = copy.deepcopy(layer.state_dict())
    other = make("dynmoe", (3, 6), max_experts=8)
    other.load_state_dict(state)
    assert other.stage == 1 and other.num_experts == 2
    for each in (layer, other):
        each.spawn()
        assert each.num_experts == 6 and each.router.origin_E.tolist() == list(range(6))
        assert len(run(each)[1].load_E()) == 6
    assert layer.router.max_experts == 8


def plan_without(layer, expert):
    from fairseq_evomoe.moe.plan import resize_plan

    return resize_plan(layer.experts.widths, [e for e in range(layer.num_experts) if e != expert])


METHODS = ("mask", "noise", "reinit", "copy", "slice")


@pytest.mark.parametrize("method", METHODS)
def test_children_are_changed_by_the_method(method):
    layers = [make("switch", (2, 6), method) for _ in range(2)]
    for layer in layers:
        layer.spawn()
        parents = layer.experts.tensors()["w1"].split(10)
        layer.spawn()
    one, same = (layer.experts.tensors() for layer in layers)
    assert all(torch.equal(one[name], same[name]) for name in one)
    children = one["w1"].split(10)
    distinct = {tuple(child.flatten().tolist()) for child in children}
    assert len(distinct) == (1 if method == "copy" else 6)
    for e, child in enumerate(children):
        equal = (child == parents[e // 3]).double().mean()
        if method == "slice":  # but for one of ten units, which is the last and does nothing yet
            assert not one["w2"].split(10)[e][-1].any()
            assert all(any(torch.equal(row, old) for old in parents[e // 3]) for row in child[:-1])
            continue
        low, high = {"mask": (0.7, 1), "noise": (0, 0), "reinit": (0.5, 0.5), "copy": (1, 1)}[method]
        assert low <= equal <= high


def test_a_table_is_divided_by_load():
    offspring = Offspring([0, 0, 1, 1, 1], 0.0, lambda *key: torch.Generator())
    table = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    counts = torch.tensor([5.0, 3, 2, 1, 9, 1, 7])
    assert offspring.table(table, counts).tolist() == [0, 1, 1, 3, 2, 4, -1]
    assert offspring.table(table).tolist() == [0, 1, 0, 2, 3, 4, -1]


class SilentRouter(Router):
    """Somebody else's, which says nothing of its tensors."""

    def __init__(self, dim, experts, **options):
        super().__init__(dim, experts, **options)
        self.key = torch.nn.Parameter(torch.empty(dim, 2 * experts))
        self.factor = torch.nn.Parameter(torch.empty(dim))
        self.register_buffer("table", torch.arange(6) % experts)

    @torch.no_grad()
    def initialize(self, generator):
        fill_uniform(self.key, 1.0, generator), fill_uniform(self.factor, 1.0, generator)

    def forward(self, x_TD, context):
        weight_T, expert_T = linear32(x_TD * self.factor, self.key.t()).max(-1)
        return top1_routing(expert_T // 2, weight_T, self.experts)


def test_a_router_that_says_nothing_gets_a_default():
    layer = make(SilentRouter, (2, 4))
    layer.spawn()
    old = tensors(layer.router)
    layer.spawn()
    new = tensors(layer.router)
    assert torch.equal(new["key"], old["key"][:, [0, 1, 0, 1, 2, 3, 2, 3]])
    assert torch.equal(new["factor"], old["factor"])
    assert (new["table"] // 2).tolist() == old["table"].tolist()
    run(layer)


class OddRouter(SilentRouter):
    def __init__(self, dim, experts, **options):
        super().__init__(dim, experts, **options)
        self.factor = torch.nn.Parameter(torch.empty(experts**2))


def test_a_router_whose_tensors_cannot_grow_is_refused_before_it_is_trained():
    with pytest.raises(OptionError, match=r"router .* 4 rows for 2 experts and 16 for 4 .* one stage\.$"):
        try_routers(make(OddRouter, (2, 4)))
    try_routers(make(SilentRouter, (2, 4)))


@pytest.mark.parametrize("counts", [[4, 1, 1], [2, 3, 1]])
def test_more_children_for_more_demand(counts):
    layer = make("switch", (3, 6))
    layer.spawner = make_spawner(experts=3, select="load", method="noise", gate_noise=0.1)
    layer.spawn()
    assert layer.demand.share_E.tolist() == [0] * 3
    layer.demand.share_E.copy_(torch.tensor(counts).float())
    parents = list(layer.plan_spawn().offspring.parent_E)
    assert parents == [e for e in range(3) for _ in range(counts[e])]
    old = layer.experts.tensors()["w1"].split(10)
    gate = layer.router.weight.clone()
    layer.spawn()
    assert layer.demand is None and layer.num_experts == 6
    for parent, child, row in zip(parents, layer.experts.tensors()["w1"].split(10), layer.router.weight):
        only = counts[parent] == 1  # an only child is its parent
        assert torch.equal(child, old[parent]) == torch.equal(row, gate[parent]) == only


def test_demand_is_a_running_mean_of_shares():
    layer = make("switch", (2, 4))
    layer.spawner = make_spawner(experts=2, select="load")
    layer.spawn()
    share = torch.zeros(2)
    for seed in range(3):
        _, routing = run(layer, seed)
        share += 0.01 * (routing.load_E() / routing.load_E().sum() - share)
        assert torch.allclose(layer.demand.share_E, share)
    layer.demand.commit(torch.zeros(2)), layer.demand.commit(torch.tensor([1.0, torch.inf]))
    assert torch.allclose(layer.demand.share_E, share)


def inputs_of(layer):
    """Arguments of a pass, as ``run`` gives them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, DIM, dtype=torch.float64, generator=generator)
    tokens = torch.randint(VOCABULARY, (3, 7), generator=generator)
    embeddings = torch.randn(VOCABULARY, 5, dtype=torch.float64, generator=generator)[tokens]
    sequences = torch.arange(3).unsqueeze(1).expand(3, 7)
    return x, RoutingContext(hard=layer.router_class.anneals), None, tokens, sequences, embeddings


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_next_router_is_the_one_to_come(system):
    layer = make(noise=0.1, **SYSTEMS[system])
    for _ in STAGES:
        run(layer)
        plan = layer.plan_spawn()
        expected = next_router(layer, plan).state_dict()
        layer.spawn(plan=plan)
        found = layer.router.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


STRAIGHT = {"renormalize": "straight-through"}
# the weights of a token's experts sum to 1, whatever there is of them
UNIT = {
    "hash": {"router": "hash"},
    "dynmoe": {"router": "dynmoe"},
    "switch, straight-through": {"router": "switch", **STRAIGHT},
    "dts, straight-through": {"router": "dts", **STRAIGHT},
    "dts, soft": {"router": "dts", "eval_routing": "adaptive", "threshold": 0.0},
}
# a child's weight is an m-th of its parent's
PROBABLE = {
    "switch": {"router": "switch"},
    "switch, scaled": {"router": "switch", "scaling_factor": 2.0},
    "switch, two heads": {"router": "switch", "heads": 2},
    "dts": {"router": "dts"},
    "dts, both": {"router": "dts", "gate_input": "both"},
}
# ... or as great; what the experts of a token weigh after the first spawn
LASTING = {
    "base": ({"router": "base"}, 0.3, 0.8),
    "stable": ({"router": "stable"}, 0.3, 0.8),
    "hash, two": (OTHERS["hash, two"], 2, 2),
}


def spawned(layer, rescale):
    """The output before and after a spawn, and the weights of both."""
    inputs = inputs_of(layer)
    layer.eval()
    if layer.router is not None:
        torch.nn.init.normal_(layer.experts.w1, generator=torch.Generator().manual_seed(layer.num_experts))
    before, plan = layer(*inputs), layer.plan_spawn()
    now, then = weights_now_and_then(layer, plan, *inputs).tolist()
    layer.spawn(plan=replace(plan, output_scale=now / then) if rescale else plan)
    return before, layer(*inputs), now, then


@pytest.mark.parametrize("system", UNIT)
def test_weights_that_sum_to_one_leave_the_function_as_it_was(system):
    layer = make(**UNIT[system])
    for _ in STAGES:
        before, after, now, then = spawned(layer, rescale=False)
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-12) and now == pytest.approx(then)


@pytest.mark.parametrize("system", PROBABLE)
def test_a_gate_of_probabilities_leaves_it_if_the_output_is_scaled(system):
    """On average at the first spawn, and exactly when experts multiply."""
    for rescale in (False, True):
        layer = make(**PROBABLE[system])
        before, after, now, then = spawned(layer, rescale)
        change = (after.norm() / before.norm()).item()
        assert change == pytest.approx(1 if rescale else then / now, rel=0.1)
        factor = PROBABLE[system].get("scaling_factor", 1)
        assert then < 0.95 * factor * now and then > 0.5 * factor * now  # the best of two
        for _ in STAGES[1:]:
            before, after, now, then = spawned(layer, rescale)
            assert then == pytest.approx(now / 2)
            assert torch.allclose(after, before if rescale else before / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("system", LASTING)
def test_other_weights_change_at_the_first_spawn_alone(system):
    options, low, high = LASTING[system]
    layer = make(**options)
    _, _, now, then = spawned(layer, rescale=True)
    assert low * now <= then <= high * now
    for _ in STAGES[1:]:
        before, after, now, then = spawned(layer, rescale=False)
        assert now == pytest.approx(then) and torch.allclose(before, after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in ("soft", "stratified")])
def test_every_router_says_what_its_experts_weigh(system):
    """``then`` is what the router to come gives; experts of its own do not count."""
    layer = make(**SYSTEMS[system]).eval()
    for _ in STAGES:
        inputs, plan = inputs_of(layer), layer.plan_spawn()
        expected = weights_now_and_then(layer, plan, *inputs)[1].item()
        layer.spawn(plan=plan)
        rows, context = layer.router_input(*inputs)
        routing = layer.router(rows, context)
        own_N = routing.expert_N < layer.num_experts
        assert expected == pytest.approx(routing.weight_N[own_N].sum().item()), system


def test_experts_that_came_and_multiplied_can_be_loaded():
    """More of them than a stage has, which is how many there may be."""
    layer = make("dynmoe", (2, 4), max_experts=8)
    layer.spawn()
    for experts in (2, 3, 4, 5):
        change = Resize(list(range(experts)), 0, torch.ones(DIM))
        layer.apply_plan(resize_plan(layer.experts.widths, change.kept, change.copied))
        layer.router.resize(change)
    layer.spawn()
    assert layer.num_experts == 6
    other = make("dynmoe", (2, 4), max_experts=8)
    other.load_state_dict(layer.state_dict())
    assert other.num_experts == 6 and other.stage == 2
    assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), other.parameters()))


def test_output_masking_is_made_up_for():
    layer = make("switch", output_masking=0.5).eval()
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    now, then = weights_now_and_then(layer, layer.plan_spawn(), x, RoutingContext())
    before = layer(x)
    layer.spawn(plan=replace(layer.plan_spawn(), output_scale=float(now / then)))
    assert now == 21 and then < 0.5 * 21
    # each token's weight differs from the mean by which the output is scaled
    assert torch.isclose((layer(x) / before).mean(), torch.ones((), dtype=torch.float64), rtol=0.1)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_token_that_is_not_finite_is_left_to_fairseq(system):
    """Which finds out after the backward pass, and skips the update or names the layer."""
    layer = make(**SYSTEMS[system], experts=4)
    layer.spawn()
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    x[0, 0], x[1, 1], x[2, 2] = math.nan, math.inf, -math.inf
    told = {"tokens": torch.zeros(3, 7, dtype=torch.long), "embeddings": x[..., :5]}
    told["sequences"] = torch.arange(3).unsqueeze(1).expand(3, 7)
    with record() as routings:
        layer(x, RoutingContext(noise_key=("test", 1)), **told)
    assert routings[layer].tokens == 21
