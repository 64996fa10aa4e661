"""DynMoE's gate against a loop over tokens in float64, and its decisions about experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.routers.dynmoe import DynMoERouter, Resize
from support.router_checks import close, dense, dot, is_deterministic, make


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def cosine(a, b):
    lengths = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / lengths if lengths > 0 else 0.0


def reference(x, w, g, training):
    """Weights (T x E) by the formulas, one token at a time."""
    rows = []
    for x_t in x.tolist():
        score = [sigmoid(cosine(x_t, w_e)) for w_e in w.tolist()]
        active = [s > sigmoid(g_e) for s, g_e in zip(score, g.tolist())]
        if not any(active) and not training:
            active = [e == max(range(len(score)), key=score.__getitem__) for e in range(len(score))]
        rows.append([1 / sum(active) if a else 0.0 for a in active])
    return torch.tensor(rows, dtype=torch.float64)


def router_with_thresholds(dim=6, experts=5, high=0.3, **options):
    router = make("dynmoe", dim, experts, **options)
    with torch.no_grad():
        router.weight.mul_(torch.arange(1.0, experts + 1).unsqueeze(1))
        router.threshold_E.copy_(torch.linspace(-high, high, experts))
    return router


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("high", [0.2, 0.45])
def test_equals_the_reference(training, high):
    torch.manual_seed(1)
    router = router_with_thresholds(high=high).train(training)
    router.threshold_E.data.add_(0.2)
    x = torch.randn(60, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected = reference(x, router.weight, router.threshold_E, training)
    assert torch.equal(mask, expected > 0) and close(weight, expected)
    alone = (expected == 0).all(1).sum()
    assert alone > 0 if training else alone == 0
    assert len(set(mask.sum(1).tolist())) >= 3

    w = router.weight.tolist()
    squares = [(cosine(a, b) - (i == j)) ** 2 for i, a in enumerate(w) for j, b in enumerate(w)]
    assert close(routing.losses["diversity"], math.sqrt(sum(squares)))
    assert close(routing.losses["simplicity"], sum(math.sqrt(dot(a, a)) for a in w) / 5)


@pytest.mark.parametrize("training", [True, False])
def test_the_two_losses_of_the_authors_code(training):
    """``E^2 mean_e(me_e ce_e)`` of gates divided by their sum, and the mean of the gates."""
    torch.manual_seed(3)
    router = router_with_thresholds(high=0.3, balance_weight=0.01, activity_weight=0.01).train(training)
    x = torch.randn(50, 6, dtype=torch.float64)
    losses = router(x, RoutingContext()).losses
    active = (reference(x, router.weight, router.threshold_E, training) > 0).tolist()
    gates = [[sigmoid(cosine(x_t, w_e)) for w_e in router.weight.tolist()] for x_t in x.tolist()]
    me = [sum(row[e] / sum(row) for row in gates) / 50 for e in range(5)]
    ce = [sum(row[e] for row in active) / 50 for e in range(5)]
    assert close(losses["balance"], 5**2 * sum(m * c for m, c in zip(me, ce)) / 5)
    assert close(losses["activity"], sum(map(sum, gates)) / (50 * 5))
    assert losses.keys() == router.loss_weights.keys()


def test_the_balance_loss_is_left_out_where_nobody_adds_it():
    """As in the paper; it is the only one that statistics ask for in any case."""
    torch.manual_seed(3)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert "balance" not in router_with_thresholds()(x, RoutingContext()).losses
    wanted = RoutingContext(losses={"balance"})
    found = router_with_thresholds(balance_weight=0.1, activity_weight=0.1)(x, wanted).losses
    assert set(found) == {"balance", "diversity", "simplicity"}


def test_losses_worked_by_hand():
    router = make("dynmoe", 2, 2)
    router.weight.data.copy_(torch.tensor([[3.0, 0.0], [4.0, 4.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    routing = router.train()(x, RoutingContext())
    # cosines: (1, .71), (0, .71), (-.71, -1); G = 0, so an expert is active where they are positive
    assert dense(routing)[0].tolist() == [[0.5, 0.5], [0, 1], [0, 0]]
    # W W^T - I of rows at length 1 is [[0, .71], [.71, 0]]
    assert close(routing.losses["diversity"], 1.0)
    assert close(routing.losses["simplicity"], (3 + math.sqrt(32)) / 2)
    assert dense(router.eval()(x, RoutingContext()))[0].tolist() == [[0.5, 0.5], [0, 1], [1, 0]]


def test_the_gradient_is_that_of_the_margins_of_active_experts():
    torch.manual_seed(2)
    router = router_with_thresholds().train()
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    routing = router(x, RoutingContext())
    factor = torch.randn(30, 5, dtype=torch.float64)
    parameters = (x, router.weight, router.threshold_E)
    found = torch.autograd.grad(
        (routing.weight_N * factor[routing.token_N, routing.expert_N]).sum(), parameters
    )
    total = 0
    for t, row in enumerate(reference(x, router.weight, router.threshold_E, True).tolist()):
        for e, weight in enumerate(row):
            if weight > 0:
                w = router.weight[e]
                cos = (x[t] * w).sum() / (x[t].square().sum() * w.square().sum()).sqrt()
                margin = torch.sigmoid(cos) - torch.sigmoid(router.threshold_E[e])
                total = total + factor[t, e] * weight * margin
    for ours, theirs in zip(found, torch.autograd.grad(total, parameters)):
        assert close(ours, theirs) and ours.abs().max() > 0


@pytest.mark.parametrize("loss", ["diversity", "simplicity", "balance", "activity"])
def test_gradients_of_the_losses(loss):
    router = router_with_thresholds(balance_weight=0.01, activity_weight=0.01)
    router.weight.data.add_(0.3 * torch.randn(5, 6).double())
    x = torch.randn(7, 6).double()

    def run(weight):  # gradcheck changes the parameter in place
        return router(x, RoutingContext()).losses[loss]

    assert torch.autograd.gradcheck(run, (router.weight,))


@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    dim=st.integers(1, 5),
    same=st.booleans(),
    zero=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shapes(tokens, experts, dim, same, zero, training, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator).double()
    x = x[:1].expand_as(x) if same else x
    x = torch.zeros_like(x) if zero else x
    router = make("dynmoe", dim, experts).train(training)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    assert close(weight, reference(x, router.weight, router.threshold_E, training).view(tokens, experts))
    assert close(weight.sum(1), mask.any(1).double())
    sum(routing.losses.values(), routing.weight_N.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())
    if training:
        sums = router.drain()
        assert sums[:experts].tolist() == mask.sum(0).tolist()
        assert torch.allclose(sums[experts:], x[~mask.any(1)].sum(0).float(), atol=1e-5)


def test_initial_values():
    assert is_deterministic("dynmoe", 6, 4)
    for experts in (4, 9):
        router = make("dynmoe", 6, experts)
        gram = router.weight @ router.weight.t() if experts < 6 else router.weight.t() @ router.weight
        assert torch.allclose(gram, torch.eye(len(gram)).double(), atol=1e-6)
        assert not router.threshold_E.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    torch.manual_seed(3)
    router = make("dynmoe", 16, 4).to(dtype)
    x = torch.randn(50, 16).to(dtype)
    routing = router(x, RoutingContext())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = router(x, RoutingContext())
    assert torch.equal(routing.expert_N, again.expert_N) and routing.weight_N.dtype == torch.float32
    exact = router.double()(x.double(), RoutingContext())
    assert torch.equal(routing.expert_N, exact.expert_N) and torch.equal(routing.token_N, exact.token_N)
    assert router.used_E.dtype == router.rejected_D.dtype == torch.float32


def updates(router, *batches):
    """What a trainer does around updates."""
    for x in batches:
        router(x, RoutingContext())
        router.commit(router.drain())


def test_a_window_counts_what_happens_in_training():
    torch.manual_seed(4)
    router = router_with_thresholds(dynmoe_window=2).train()
    router.threshold_E.data.add_(0.3)
    x, y = torch.randn(2, 40, 6).double()
    updates(router, x)
    assert not router.due
    router.eval()
    router(y, RoutingContext())
    router.train()
    updates(router, y)
    assert router.due
    expected = reference(torch.cat([x, y]), router.weight, router.threshold_E, True)
    assert router.used_E.tolist() == (expected > 0).sum(0).tolist()
    alone = (expected == 0).all(1)
    assert alone.any()
    assert torch.allclose(router.rejected_D.double(), torch.cat([x, y])[alone].sum(0), atol=1e-4)
    router.restart()
    assert not router.due and not router.used_E.any() and not router.rejected_D.any()
    assert not make("dynmoe", 6, 5, dynmoe_window=0).due


@pytest.mark.parametrize(
    "used, rejected, most, expected",
    [
        ([3, 2, 1], [0, 0], 0, None),
        ([3, 0, 4], [0, 0], 0, ([0, 2], None)),
        ([3, 0, 4], [3, 4], 0, ([0, 2], 2)),
        ([3, 2, 4], [3, 4], 0, None),  # no room
        ([3, 2, 4], [3, 4], 4, ([0, 1, 2], 2)),
        ([0, 0, 0], [3, 4], 0, ([0], 0)),
        ([0, 0, 0], [0, 0], 0, ([0], None)),
    ],
)
def test_decisions(used, rejected, most, expected):
    router = make("dynmoe", 2, 3, max_experts=most)
    router.commit(torch.tensor(used + rejected).float())
    change = router.decide()
    if expected is None:
        assert change is None
        return
    assert (change.kept, change.copied) == expected
    if change.copied is not None:
        assert torch.allclose(change.direction_D, torch.tensor([0.6, 0.8]))


def test_a_change_keeps_rows_and_starts_the_new_one_where_the_rejected_tokens_are():
    router = router_with_thresholds(dim=4, experts=3)
    router.weight.param_group = "gate"
    weight, threshold = router.weight.detach().clone(), router.threshold_E.detach().clone()
    direction = torch.tensor([0, 0, 0.6, 0.8]).double()
    router.resize(Resize([0, 2], 2, direction))
    assert torch.equal(router.weight, torch.stack([weight[0], weight[2], direction]))
    assert torch.equal(
        router.threshold_E, torch.stack([threshold[0], threshold[2], torch.zeros(()).double()])
    )
    assert router.origin_E.tolist() == [0, 2, 2] and router.experts == 3
    assert router.weight.param_group == "gate" and router.used_E.shape == (3,)
    router.resize(Resize([1]))
    assert router.origin_E.tolist() == [2] and router.weight.shape == (1, 4)
    assert router(torch.randn(5, 4).double(), RoutingContext()).experts == 1


def fill(experts):
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)


def layer_with(widths):
    layer = MoELayer(4, 8, len(widths), "dynmoe", widths=widths, spawned=True)
    fill(layer.experts)
    return layer.eval()


def test_a_layer_takes_the_state_of_one_with_other_experts():
    torch.manual_seed(5)
    changed, layer = layer_with([8, 16, 24]), layer_with([8, 16, 24])
    for change, widths in (
        (Resize([0, 2], 2, torch.ones(4)), [8, 24, 24]),
        (Resize([0, 1]), [8, 24]),
        (Resize([1]), [24]),
    ):
        changed.router.resize(change)
        changed.experts.allocate(widths)
        fill(changed.experts)
        layer.load_state_dict(changed.state_dict())
        assert layer.experts.widths == widths and layer.num_experts == len(widths) and layer.spawned
        x = torch.randn(7, 4)
        assert torch.equal(layer(x, RoutingContext()), changed(x, RoutingContext()))
    before = [id(p) for p in layer.parameters()]
    layer.load_state_dict(layer.state_dict())
    assert [id(p) for p in layer.parameters()] == before


@pytest.mark.parametrize("options", [{"dynmoe_window": -1}, {"max_experts": 3}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DynMoERouter(8, 4, **options)
