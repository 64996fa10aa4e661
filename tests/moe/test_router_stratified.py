"""Stratified MoE against a loop over tokens in float64, and what holds of its passes."""

import copy
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.offspring import Offspring
from fairseq_evomoe.moe.options import OptionError
from fairseq_evomoe.moe.ranks import ALONE
from fairseq_evomoe.moe.routers import StratifiedRouter
from support.rank_threads import on_ranks
from support.router_checks import close, dot, gradients_are_right, is_deterministic, make, softmax

DIM, HIDDEN = 6, 5


def make_layer(experts=6, dim=DIM, seed=0, **options):
    """A layer in float64 whose LayerNorms are not those that they start as."""
    torch.manual_seed(seed)
    layer = MoELayer(dim, HIDDEN, experts, "stratified", spawned=True, **options).double()
    for norm in layer.router.norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    return layer


def layer_norm(row, norm):
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    scaled = [(v - mean) / math.sqrt(variance + norm.eps) for v in row]
    return [v * w + b for v, w, b in zip(scaled, norm.weight.tolist(), norm.bias.tolist())]


def expert_output(experts, e, row):
    """W2 relu(W1 x + b1) + b2 of one expert, number by number."""
    units = range(sum(experts.widths[:e]), sum(experts.widths[: e + 1]))
    hidden = {u: max(dot(experts.w1[u].tolist(), row) + experts.b1[u].item(), 0.0) for u in units}
    return [
        experts.b2[e, d].item() + sum(hidden[u] * experts.w2[u, d].item() for u in units)
        for d in range(len(row))
    ]


def reference(layer, x, residual, top_k):
    """Outputs, the passes of each token as (stratum, experts), what is at the end, balance and z-loss."""
    router, sizes = layer.router, layer.router.strata
    strata = [s for s, size in enumerate(sizes) for _ in range(size)]
    outputs, ways, ends, decisions = [], [], [], {}
    for row, base in zip(x.tolist(), residual.tolist()):
        stratum, seen, total, way = 0, row, [0.0] * len(row), []
        while stratum < len(sizes):
            below = sum(sizes[:stratum])
            logits = [dot(w, seen) for w in router.gates[stratum].weight.tolist()]
            p = softmax(logits)
            best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
            share = sum(p[e] for e in best)
            for e in best:
                out = expert_output(layer.experts, below + e, seen)
                total = [t + p[e] / share * o for t, o in zip(total, out)]
            decisions.setdefault(stratum, []).append((p, best[0], logits))
            way.append((stratum, [below + e for e in best]))
            stratum = strata[below + best[0]] + 1
            if stratum < len(sizes) or len(router.norms) == len(sizes):
                seen = layer_norm([r + t for r, t in zip(base, total)], router.norms[stratum - 1])
            else:
                seen = [r + t for r, t in zip(base, total)]
        outputs.append(total)
        ways.append(way)
        ends.append(seen)
    losses, zs = [], []
    for made in decisions.values():
        count = len(made[0][0])
        mean_p = [sum(p[e] for p, _, _ in made) / len(made) for e in range(count)]
        share = [sum(best == e for _, best, _ in made) / len(made) for e in range(count)]
        losses.append(count**2 * sum(a * b for a, b in zip(mean_p, share)) / count)
        zs.append(sum(math.log(sum(map(math.exp, logits))) ** 2 for _, _, logits in made) / len(made))
    outputs, ends = (torch.tensor(rows, dtype=torch.float64) for rows in (outputs, ends))
    return outputs, ways, ends, sum(losses) / len(losses), sum(zs) / len(zs)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("strata, norm", [("2,4", "every"), ("1,3,2", "every"), ("3,3", "inner")])
def test_equals_the_reference(strata, norm, top_k):
    layer = make_layer(strata=strata, strata_norm=norm, top_k=top_k)
    x, residual = torch.randn(2, 30, DIM, dtype=torch.float64)
    with record() as routings:
        y = layer(x, RoutingContext(), residual=residual)
    expected, ways, ends, balance, z = reference(layer, x, residual, top_k)
    assert close(y, expected) and close(layer.finish(residual + y), ends)
    routing = routings[layer]
    found = sorted(zip(routing.token_N.tolist(), routing.expert_N.tolist()))
    assert found == sorted((t, e) for t, way in enumerate(ways) for _, experts in way for e in experts)
    assert close(routing.losses["balance"], balance) and close(routing.losses["z"], z)
    assert routing.losses.keys() == layer.router.loss_weights.keys()
    passes = {len(way) for way in ways}
    assert passes == set(range(1, len(layer.router.strata) + 1)), "a number of passes that no token makes"
    # the cost is what is passed
    assert routing.report().assignments == top_k * sum(map(len, ways)) == int(routing.load_E().sum())


def test_without_a_residual_it_is_the_input():
    layer, x = make_layer(), torch.randn(2, 7, DIM, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x, residual=x))
    assert not torch.equal(layer(x), layer(x, residual=2 * x + 1))


def test_one_stratum_is_topk():
    options = {"random_second": True, "capacity_factor": 0.8}
    one = make_layer(strata="6", strata_norm="inner", **options).train()
    torch.manual_seed(0)
    other = MoELayer(DIM, HIDDEN, 6, "topk", spawned=True, balance_choices="first", **options).double()
    other.experts.load_state_dict(one.experts.state_dict())
    other.router.weight.data.copy_(one.router.gates[0].weight)
    x = torch.randn(50, DIM, dtype=torch.float64)
    context = RoutingContext(noise_key=("gate", 1))
    with record() as routings:
        assert torch.equal(one(x, context), other(x, context))
    losses = [routings[layer].losses["balance"] for layer in (one, other)]
    assert torch.equal(*losses) and int(routings[one].dropped) == int(routings[other].dropped) > 0


def test_gradients_of_a_layer():
    layer = make_layer(4, dim=4, strata="1,1,2", top_k=1)
    x, residual = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_().unbind(0)
    x, residual = (each.detach().requires_grad_() for each in (x, residual))

    def run(*_):
        with record() as routings:
            y = layer.finish(residual + layer(x, residual=residual))
        return y, routings[layer].losses["balance"]

    assert torch.autograd.gradcheck(run, (x, residual, *layer.parameters()))


def test_gradients_of_a_gate():
    assert gradients_are_right(make("stratified", 4, 4), torch.randn(7, 4, dtype=torch.float64))


def capacity_reference(ways, sizes, tokens, factor, top_k, causal):
    """The pairs of all passes that have room: those of first choices come first, but for a decoder."""
    kept = []
    for stratum in range(len(sizes)):
        made = [(t, experts) for t, way in enumerate(ways) for s, experts in way if s == stratum]
        share = math.ceil((tokens if causal else len(made)) / sum(sizes[stratum:]))
        room = dict.fromkeys(range(sum(sizes)), math.floor(factor * top_k * share))
        pairs = [(t, experts[turn]) for turn in range(top_k) for t, experts in made]
        for t, e in sorted(pairs, key=lambda pair: pair[0]) if causal else pairs:
            if room[e] > 0:
                kept.append((t, e))
                room[e] -= 1
    return sorted(kept)


@pytest.mark.parametrize("causal", [False, True])
def test_a_capacity_is_that_of_each_pass(causal):
    layer = make_layer(capacity_factor=0.6, strata="3,3").train()
    layer.experts.w2.data.zero_()  # so that what is dropped changes no later choice
    layer.experts.b2.data.zero_()
    x = torch.randn(60, DIM, dtype=torch.float64)
    with record() as routings:
        layer(x, RoutingContext(causal=causal))
    ways = reference(layer, x, x, 2)[1]
    routing = routings[layer]
    found = sorted(zip(routing.token_N.tolist(), routing.expert_N.tolist()))
    every = sum(len(experts) for way in ways for _, experts in way)
    assert found == capacity_reference(ways, [3, 3], 60, 0.6, 2, causal)
    assert int(routing.dropped) == every - len(found) > 0


@pytest.mark.parametrize("options", [{}, {"random_second": True}, {"capacity_factor": 0.7}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(options, training):
    """Outputs of whole layers: what a later token passes is nothing to those before."""
    layer = make_layer(**options, output_masking=0.2).train(training)
    x = torch.randn(40, DIM, dtype=torch.float64)
    context = RoutingContext(noise_key=("gate", 1), causal=True)
    expected = layer(x, context)
    for _ in range(12):
        x[-1] = 3 * torch.randn(DIM, dtype=torch.float64)
        assert close(layer(x, context)[:-1], expected[:-1])


@pytest.mark.parametrize("sizes", [(7, 13), (1, 0, 9, 4)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"random_second": True, "capacity_factor": 0.8}, {"top_k": 1, "z_weight": 0.1}], ids=str
)
def test_ranks_make_the_passes_of_one_process(options, causal, sizes):
    """Passes, capacities, noise and losses, where some ranks have no token in a pass, or none at all."""
    layer = make_layer(strata="1,2,3", output_masking=0.2, **options).train()
    x = torch.randn(sum(sizes), DIM, dtype=torch.float64)

    def run(ranks, part):
        own = copy.copy(layer)
        own.ranks = ranks
        with record() as routings:
            y = own(part, RoutingContext(noise_key=("gate", 1), causal=causal, losses=layer.wanted_losses))
        return y, routings[own]

    y, one = run(ALONE, x)
    found = on_ranks(run, x.split(sizes))
    assert close(torch.cat([part for part, _ in found]), y)
    assert sum(int(routing.dropped) for _, routing in found) == int(one.dropped)
    for _, routing in found:
        assert routing.losses.keys() == one.losses.keys()
        assert all(close(routing.losses[name], value) for name, value in one.losses.items())


def test_every_pass_is_made_while_training_and_none_in_vain_otherwise():
    """Every parameter has a gradient, whatever tokens there are; generation asks no empty stratum."""
    layer = make_layer(strata="2,2,2")
    layer(torch.zeros(0, DIM, dtype=torch.float64)).sum().backward()
    inner = [p for name, p in layer.router.named_parameters() if not name.startswith("norms.2.")]
    assert all(p.grad is not None for p in (*inner, *layer.experts.parameters()))
    asked = []
    for stratum, gate in enumerate(layer.router.gates):
        gate.register_forward_hook(lambda *_, stratum=stratum: asked.append(stratum))
    layer.eval()
    for x in torch.randn(40, 1, DIM, dtype=torch.float64):
        asked.clear()
        with torch.no_grad(), record() as routings:
            layer(x)
        assert routings[layer].report().assignments == 2 * len(asked)
        assert asked[0] == 0 and len(set(asked)) == len(asked)


def test_statistics():
    layer = make_layer(strata="3,3", top_k=1).eval()
    x = torch.randn(200, DIM, dtype=torch.float64)
    with record() as routings:
        layer(x)
    report = routings[layer].report()
    ways = reference(layer, x, x, 1)[1]
    assert report.tokens == 200 and report.assignments == sum(map(len, ways))
    assert 1 < report.assignments / report.tokens < 2
    assert report.load_E.tolist() == [sum([e] in [x for _, x in way] for way in ways) for e in range(6)]
    assert 0 < float(report.gate_entropy) / 200 < math.log(6)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 1),
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 2),
    scale=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_a_token_passes_1_to_s_strata(sizes, tokens, top_k, scale):
    top_k = min(top_k, sizes[-1])
    layer = make_layer(sum(sizes), strata=",".join(map(str, sizes)), top_k=top_k)
    x = scale * torch.randn(tokens, DIM, dtype=torch.float64)
    with record() as routings:
        y = layer.finish(x + layer(x))
    routing = routings[layer]
    passes_T = torch.bincount(routing.token_N, minlength=tokens) / top_k
    assert bool(((passes_T >= 1) & (passes_T <= len(sizes))).all())
    assert torch.isfinite(y).all() and torch.isfinite(routing.losses["balance"])
    last = sum(sizes[:-1])  # whoever ends has been in the last stratum
    ended = set(routing.token_N[routing.expert_N >= last].tolist())
    assert ended == set(range(tokens))
    (y.sum() + routing.losses["balance"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    layer = make_layer(8, dim=32).to(dtype)
    x = torch.randn(64, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), record() as routings:
        y = layer(x)
    assert y.dtype == dtype and layer.finish(y).dtype == dtype
    assert routings[layer].losses["balance"].dtype == torch.float32
    (y.float().sum() + routings[layer].losses["balance"]).backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters() if p.grad is not None)
    assert torch.allclose(y.double(), layer.double()(x.double()), atol=0.1) or dtype == torch.bfloat16


def test_initialisation_and_the_state_of_a_layer():
    assert is_deterministic("stratified", 4, 6)
    layer = make_layer(strata="2,4").eval()
    other = make_layer(strata="2,4", seed=1).eval()
    x = torch.randn(9, DIM, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_spawn_makes_gates_and_norms():
    layer = MoELayer(DIM, HIDDEN, 6, "stratified", strata="2,4").double()
    x = torch.randn(9, DIM, dtype=torch.float64)
    assert not layer.in_passes and torch.equal(layer.finish(x), x)
    before = layer(x)
    layer.spawn("copy")
    with record() as routings:
        y = layer(x)
    passes_T = torch.bincount(routings[layer].token_N) / 2
    assert layer.in_passes and set(passes_T.tolist()) == {1, 2}
    # equal experts, so that a token with one pass has what it had
    assert close(y[passes_T == 1], before[passes_T == 1])
    assert not close(y[passes_T == 2], before[passes_T == 2])


def test_a_state_tells_the_strata():
    for strata, norm in (("2,4", "every"), ("1,2,3", "inner"), ("6", "every"), ("6", "inner")):
        state = StratifiedRouter(DIM, 6, strata=strata, strata_norm=norm).state_dict()
        assert StratifiedRouter.options_of_state(state) == {"strata": strata, "strata_norm": norm}
    with pytest.raises(ValueError, match="has the `strata` 2,4, but the model's 3,3: give `strata` 2,4"):
        make_layer(strata="3,3").load_state_dict(make_layer(strata="2,4").state_dict())


@pytest.mark.parametrize(
    "options, name, words",
    [
        ({"strata": "4,5"}, "strata", "sum to the `experts` (8), but is 4,5"),
        ({"strata": "4,four"}, "strata", "whole numbers from 1 on"),
        ({"strata": "8,0"}, "strata", "from 1 on"),
        ({"strata": ""}, "strata", "with commas between"),
        ({"strata": "9,-1"}, "strata", "from 1 on"),
        ({"strata": "7,1"}, "top_k", "from 1 to the 1 experts of the last of the `strata`"),
        ({"top_k": 3, "random_second": True}, "random_second", "needs `top_k` 2"),
        ({"strata_norm": "outer"}, "strata_norm", "one of every, inner"),
        ({"balance_choices": "all"}, "balance_choices", "no option"),
        ({"capacity_factor": -1.0}, "capacity_factor", "at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, name, words):
    with pytest.raises(OptionError) as raised:
        StratifiedRouter(DIM, 8, **options)
    assert raised.value.option == name and words in str(raised.value) and str(raised.value).count(". ") == 0


def test_a_router_of_somebody_else_s_is_asked_in_the_same_way():
    """The layer knows ``passes`` and two methods, and no name."""
    layer, x = make_layer(), torch.randn(5, DIM, dtype=torch.float64)
    router = layer.router
    router.run_passes = types.MethodType(
        lambda self, x_TD, context, apply, always: (7 * x_TD, self(x_TD, context)), router
    )
    assert torch.equal(layer(x), 7 * x)


@pytest.mark.parametrize("before, after", [(3, 6), (4, 6)])
def test_strata_that_do_not_grow_alike_are_refused(before, after):
    """Of three experts one is in the lower stratum, whose two children would be in it with another one's."""
    old, new = (StratifiedRouter(DIM, experts, top_k=1) for experts in (before, after))
    parents = sorted(i % before for i in range(after))
    offspring = Offspring(parents, 0.0, lambda *key: torch.Generator())
    with pytest.raises(OptionError, match="twice as many experts") as raised:
        new.inherit(old, offspring)
    assert raised.value.option == "spawn_update"
