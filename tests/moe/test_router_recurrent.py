"""RMoE's recurrent router: a chain of layers against a loop over tokens in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fairseq_evomoe.moe import RoutingContext
from support.router_checks import (
    check_precision,
    close,
    dense,
    dot,
    gradients_are_right,
    is_deterministic,
    make,
    softmax,
)


def chain(layers, dim=6, experts=5, **options):
    """The routers of a stack of layers, each initialised from a generator of its own."""
    shared = {}
    options.setdefault("recurrent_dim", 4)
    return [make("recurrent", dim, experts, seed=i, shared=shared, **options) for i in range(layers)]


def run(routers, xs, memory=None):
    """Route through the chain, in one forward pass."""
    context = RoutingContext(memory={} if memory is None else memory)
    return [router(x, context) for router, x in zip(routers, xs)]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def gru(cell, x, h):
    """One token: r, z = sigmoid(...); n = tanh(W x + b + r (U h + c)); h' = (1 - z) n + z h."""
    w, u = cell.weight_ih.tolist(), cell.weight_hh.tolist()
    b, c = cell.bias_ih.tolist(), cell.bias_hh.tolist()
    p, new = len(h), []
    for i in range(p):
        a = [dot(w[i + g * p], x) + b[i + g * p] for g in range(3)]
        s = [dot(u[i + g * p], h) + c[i + g * p] for g in range(3)]
        r, z = sigmoid(a[0] + s[0]), sigmoid(a[1] + s[1])
        new.append((1 - z) * math.tanh(a[2] + r * s[2]) + z * h[i])
    return new


def reference(routers, xs, k, renormalize=True):
    """Weights of each layer, (T x E); the state goes from layer to layer, token by token."""
    weights = [torch.zeros(len(xs[0]), routers[0].experts, dtype=torch.float64) for _ in routers]
    for t in range(len(xs[0])):
        h = [0.0] * routers[0].recurrent_dim
        for router, x, weight in zip(routers, xs, weights):
            h = gru(router.gru, [dot(row, x[t].tolist()) for row in router.projection.tolist()], h)
            p = softmax([dot(row, h) for row in router.weight.tolist()])
            best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
            for e in best:
                weight[t, e] = p[e] / (sum(p[b] for b in best) if renormalize else 1)
    return weights


def tokens(layers, number, dim=6, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(number, dim, dtype=torch.float64) for _ in range(layers)]


@pytest.mark.parametrize("k, renormalize", [(1, False), (2, True), (2, False), (5, True)])
def test_two_layers_equal_the_reference(k, renormalize):
    routers, xs = chain(2, top_k=k, renormalize="always" if renormalize else "never"), tokens(2, 20)
    for routing, expected in zip(run(routers, xs), reference(routers, xs, k, renormalize)):
        weight, mask = dense(routing)
        assert torch.equal(mask, expected > 0)
        assert close(weight, expected)
        assert set(routing.losses) == {"balance", "entropy", "z", "mutual_information"}


def test_the_second_layer_depends_on_the_first():
    routers, xs = chain(2), tokens(2, 20)
    together = run(routers, xs)[1].probability_TE
    alone = run(routers[1:], xs[1:])[0].probability_TE
    assert (together - alone).abs().max() > 1e-3


def test_a_new_memory_knows_nothing_of_the_last_batch():
    routers, xs = chain(3), tokens(3, 20)
    first = [r.probability_TE for r in run(routers, xs)]
    run(routers, tokens(3, 20, seed=2))
    run(routers, tokens(3, 9, seed=3))
    again = [r.probability_TE for r in run(routers, xs)]
    assert all(map(torch.equal, first, again))


def test_a_skipped_layer_passes_the_state_on():
    routers, xs = chain(3), tokens(3, 8)
    skipped = run([routers[0], routers[2]], [xs[0], xs[2]])
    expected = reference([routers[0], routers[2]], [xs[0], xs[2]], 2)
    assert all(close(dense(routing)[0], e) for routing, e in zip(skipped, expected))


def test_one_gru_for_all_layers_filled_by_the_first():
    routers = chain(3)
    assert routers[0].gru is routers[1].gru is routers[2].gru
    names = {n for r in routers for n, _ in torch.nn.ModuleList(routers).named_parameters()}
    assert sum("gru" in n for n in names) == 4
    alone = make("recurrent", 6, 5, seed=0, recurrent_dim=4)
    # layer 0 is what it would be without the others, and so are the others but for the GRU
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in routers[0].state_dict().items())
    second = make("recurrent", 6, 5, seed=1, recurrent_dim=4)
    assert torch.equal(second.weight, routers[1].weight)
    assert torch.equal(second.projection, routers[1].projection)
    assert not torch.equal(second.gru.weight_ih, routers[1].gru.weight_ih)
    before = copy.deepcopy(routers[0].gru.state_dict())
    routers[1].initialize(torch.Generator().manual_seed(5))
    assert all(torch.equal(v, before[k]) for k, v in routers[0].gru.state_dict().items())


def test_gradient_of_the_second_layer_reaches_the_first():
    routers, xs = chain(2), tokens(2, 12)
    second = run(routers, xs)[1]
    grads = torch.autograd.grad(
        second.probability_TE.square().sum(),
        [routers[0].projection, routers[1].projection, routers[0].gru.weight_hh],
    )
    assert all(g.abs().max() > 1e-6 for g in grads)
    with pytest.raises(RuntimeError, match="unused|not have been used"):
        torch.autograd.grad(run(routers, xs)[1].weight_N.sum(), [routers[0].weight])


def test_gradients():
    torch.manual_seed(3)
    assert gradients_are_right(chain(1, dim=4, experts=3)[0], torch.randn(5, 4, dtype=torch.float64))


def test_gradients_through_two_layers():
    routers, (x, y) = chain(2, dim=3, experts=3, recurrent_dim=2), tokens(2, 4, dim=3)
    inputs = [x.requires_grad_(), y.requires_grad_(), *torch.nn.ModuleList(routers).parameters()]
    assert torch.autograd.gradcheck(lambda *_: tuple(r.probability_TE for r in run(routers, [x, y])), inputs)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_activation_checkpointing(checkpointed):
    """Layers that are run again in the backward pass, with a copy of the memory as it was before them."""
    routers, xs = chain(3), tokens(3, 10)
    memory, outputs = {}, []
    for router, x in zip(routers, xs):
        before = dict(memory)

        def layer(x, router=router, before=before):
            context = RoutingContext(memory=dict(before))
            y = router(x, context).probability_TE.square()
            memory.update(context.memory)
            return y

        x.requires_grad_()
        outputs.append(checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x))
    parameters = [*xs, *torch.nn.ModuleList(routers).parameters()]
    grads = torch.autograd.grad(sum(map(torch.sum, outputs)), parameters, allow_unused=True)
    plain = sum(r.probability_TE.square().sum() for r in run(routers, xs))
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    assert all(close(g, e) for g, e in zip(grads, expected))


def pooled_balance(weights, probabilities):
    """``E sum_e f_e P_e`` over the tokens of all layers, one after another, by the formula."""
    rows = [row for layer in weights for row in layer.tolist()]
    gates = [row for layer in probabilities for row in layer.tolist()]
    experts, n = len(rows[0]), len(rows)
    f = [sum(row[e] > 0 for row in rows) / n for e in range(experts)]
    mean = [sum(p[e] for p in gates) / n for e in range(experts)]
    return experts * dot(f, mean)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_balance_loss_is_that_of_all_layers_together(layers, k):
    """As published; each layer's part is what it adds, so that any first layers have the loss of theirs."""
    routers, xs = chain(layers, top_k=k), tokens(layers, 20)
    routings, expected = run(routers, xs), reference(routers, xs, k)
    probabilities = [routing.probability_TE.detach() for routing in routings]
    for count in range(1, layers + 1):
        parts = sum(routing.losses["balance"] for routing in routings[:count])
        assert close(parts, pooled_balance(expected[:count], probabilities[:count]))


def test_layers_that_crowd_in_turn_are_balanced_together():
    """Two layers that each send all tokens to one expert, another one, are as good as even."""
    routers = chain(2, experts=2, top_k=1)
    with torch.no_grad():
        for router, sign in zip(routers, (1, -1)):
            router.projection.zero_()
            router.weight.copy_(100.0 * sign * torch.tensor([[1.0], [-1.0]]).expand(2, 4))
        for parameter in routers[0].gru.parameters():
            parameter.fill_(0.1)
    routings = run(routers, tokens(2, 8))
    losses = [routing.losses["balance"].item() for routing in routings]
    assert losses[0] == pytest.approx(2, abs=1e-3)
    assert sum(losses) == pytest.approx(1, abs=1e-3)


def test_the_reported_balance_is_that_of_the_layers_so_far():
    """The losses of layers are differences, the mean of which would tell nothing of the balance."""
    routings = run(chain(4), tokens(4, 10))
    losses = torch.stack([routing.losses["balance"].detach() for routing in routings])
    reported = torch.stack([routing.report().balance for routing in routings])
    assert close(reported, losses.cumsum(0)) and reported.min() > 0.5


def test_gradients_of_the_pooled_balance_loss():
    """They reach the gates of all layers: what one layer's probabilities should be depends on the others."""
    routers, xs = chain(3, dim=3, experts=3, recurrent_dim=2), tokens(3, 4, dim=3)
    inputs = [x.requires_grad_() for x in xs] + list(torch.nn.ModuleList(routers).parameters())

    def loss(*_):
        return sum(routing.losses["balance"] for routing in run(routers, xs))

    assert torch.autograd.gradcheck(loss, inputs)
    last = run(routers, xs)[2].losses["balance"]
    assert torch.autograd.grad(last, routers[0].weight)[0].abs().max() > 1e-6


@pytest.mark.parametrize("skipped", [(), (0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_pooled_balance_loss_of_layers_that_are_skipped_or_run_again(checkpointed, skipped):
    """LayerDrop leaves layers out; activation checkpointing runs them again with the memory as it was."""
    routers, xs = chain(4), tokens(4, 10)
    kept = [i for i in range(4) if i not in skipped]
    memory, parts, runs = {}, [], []
    for i in kept:
        before = dict(memory)

        def layer(x, i=i, before=before):
            runs.append(i)
            context = RoutingContext(memory=dict(before))
            loss = routers[i](x, context).losses["balance"]
            memory.update(context.memory)
            return loss

        xs[i].requires_grad_()
        parts.append(checkpoint(layer, xs[i], use_reentrant=False) if checkpointed else layer(xs[i]))
    inputs = [*(xs[i] for i in kept), *torch.nn.ModuleList([routers[i] for i in kept]).parameters()]
    grads = torch.autograd.grad(sum(parts), inputs)
    assert sorted(runs) == sorted(kept * 2 if checkpointed else kept)

    routings = run([routers[i] for i in kept], [xs[i] for i in kept])
    expected = reference([routers[i] for i in kept], [xs[i] for i in kept], 2)
    whole = pooled_balance(expected, [routing.probability_TE for routing in routings])
    assert close(sum(parts), whole)
    plain = torch.autograd.grad(sum(routing.losses["balance"] for routing in routings), inputs)
    assert all(close(g, e) for g, e in zip(grads, plain))


def test_states_are_not_changed_in_place():
    routers, xs = chain(3), tokens(3, 10)
    context, states = RoutingContext(), []
    for router, x in zip(routers, xs):
        router(x, context)
        states.append((context.memory["recurrent"], context.memory["recurrent"].detach().clone()))
    assert all(torch.equal(now, then) for now, then in states)
    assert len({id(now) for now, _ in states}) == 3


def test_another_number_of_tokens_is_refused():
    routers = chain(2)
    with pytest.raises(ValueError, match="state of 7 tokens from the layer before, but routes 8 here"):
        run(routers, [torch.zeros(7, 6).double(), torch.zeros(8, 6).double()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("recurrent", dtype, recurrent_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_float32_in_any_model(dtype):
    routers = [router.to(dtype) for router in chain(2)]
    context = RoutingContext()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        for router in routers:
            routing = router(torch.randn(9, 6).to(dtype), context)
            assert context.memory["recurrent"].dtype == routing.weight_N.dtype == torch.float32


def test_initialisation():
    assert is_deterministic("recurrent", 6, 5, recurrent_dim=4)
    assert make("recurrent", 6, 5).projection.shape == (128, 6)


def test_refused():
    with pytest.raises(ValueError, match="`recurrent_dim` must be at least 1, but is 0"):
        make("recurrent", 6, 5, recurrent_dim=0)
    with pytest.raises(ValueError, match="`top_k` must be from 1 to the 1 experts, but is 2"):
        make("recurrent", 6, 1)


@settings(deadline=None, max_examples=50)
@given(
    number=st.integers(0, 12),
    experts=st.integers(1, 7),
    layers=st.integers(1, 4),
    same=st.booleans(),
    data=st.data(),
)
def test_random_shapes(number, experts, layers, same, data):
    k = data.draw(st.integers(1, experts))
    routers = chain(layers, dim=3, experts=experts, top_k=k)
    xs = [x[:1].expand(number, 3) if same and number else x for x in tokens(layers, number, dim=3)]
    routings = run(routers, xs)
    for routing, expected in zip(routings, reference(routers, xs, k)):
        weight, mask = dense(routing)
        assert (mask.sum(1) == k).all()
        assert close(weight, expected)
        assert all(torch.isfinite(loss) for loss in routing.losses.values())
