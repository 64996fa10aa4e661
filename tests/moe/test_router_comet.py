"""COMET's tree gate against a recursion over its trees in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import RoutingContext, noise
from fairseq_evomoe.moe.routers.comet import leaf_shares
from support.router_checks import (
    check_precision,
    close,
    dense,
    dot,
    end_update,
    entropy,
    gradients_are_right,
    is_deterministic,
    make,
)


def smooth_step(t, gamma):
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5


def shares(values, gamma):
    """Share of each leaf of one tree, by walking down from node 0; ``values`` are w_n . x."""
    experts = len(values) + 1
    result = [0.0] * experts

    def walk(node, share):
        if node >= experts - 1:
            result[node - (experts - 1)] = share
        else:
            left = smooth_step(values[node], gamma)
            walk(2 * node + 1, share * left)
            walk(2 * node + 2, share * (1 - left))

    walk(0, 1.0)
    return result


def reference(router, x):
    """Weights (T x E) and the entropy of the trees, one token at a time."""
    weights, total = [], 0.0
    for x_t in x.tolist():
        score = [0.0] * router.experts
        for node, leaf in zip(router.node.tolist(), router.leaf.tolist()):
            q = shares([dot(x_t, w) for w in node], router.options.gamma)
            total += entropy(q)
            score = [s + q_e * math.exp(dot(x_t, a)) for s, q_e, a in zip(score, q, leaf)]
        weights.append([s / sum(score) for s in score])
    return torch.tensor(weights, dtype=torch.float64), total / len(x)


def scaled(router, node=1.0, leaf=1.0):
    router.node.data.mul_(node)
    router.leaf.data.mul_(leaf)
    return router


@pytest.mark.parametrize("experts, k", [(1, 1), (2, 1), (3, 2), (5, 3), (8, 2)])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_equals_the_reference(experts, k, gamma):
    torch.manual_seed(1)
    # nodes so great that some are on each of the three pieces of the smooth step
    router = scaled(make("comet", 6, experts, top_k=k, gamma=gamma), node=40, leaf=20)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, tree_entropy = reference(router, x)
    assert torch.equal(mask, expected > 0)
    assert close(weight, expected)
    assert close(routing.probability_TE, expected)
    assert close(routing.losses["entropy"], tree_entropy)
    assert close(routing.gate_entropy, sum(entropy(row) for row in expected.tolist()))
    share = mask.double().sum(0) / mask.sum()
    assert close(routing.losses["balance"], experts * (share * expected.mean(0)).sum())


def test_the_smooth_step_has_three_pieces():
    t = torch.tensor([-9, -1, -0.5, 0, 0.5, 1, 9], dtype=torch.float64).view(-1, 1, 1)
    left = leaf_shares(t, gamma=2.0)[:, 0, 0].tolist()
    assert left == [0, 0, pytest.approx(0.03125 - 0.375 + 0.5), 0.5, pytest.approx(0.84375), 1, 1]


@pytest.mark.parametrize("experts", range(1, 18))
def test_no_share_is_lost_on_leaves_that_are_no_experts(experts):
    torch.manual_seed(2)
    node = torch.randn(50, 3, experts - 1, dtype=torch.float64)
    q = leaf_shares(node, 2.0)
    assert q.shape == (50, 3, experts)
    assert close(q.sum(-1), torch.ones(50, 3))
    for row, values in zip(q.flatten(0, 1).tolist(), node.flatten(0, 1).tolist()):
        assert row == pytest.approx(shares(values, 2.0), abs=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 5, 7])
def test_nodes_that_have_decided_lead_to_one_leaf(experts):
    every = torch.tensor(list(itertools.product([-9.0, 9.0], repeat=experts - 1)))
    q = leaf_shares(every.unsqueeze(1), 2.0)
    assert set(q.unique().tolist()) == {0.0, 1.0}
    assert (q.sum(-1) == 1).all() and (q.sum(0) > 0).all()


def test_three_tokens_and_two_experts_by_hand():
    """One tree: shares (1, 0), (1/2, 1/2), (0, 1); leaves that double the second expert's part."""
    router = make("comet", 2, 2, top_k=1)
    router.node.data.copy_(torch.tensor([[[1.0, 0.0]]]))
    router.leaf.data.copy_(torch.tensor([[[0.0, 0.0], [0.0, math.log(2)]]], dtype=torch.float64))
    x = torch.tensor([[3.0, 1.0], [0.0, 1.0], [-3.0, 1.0]], dtype=torch.float64)
    routing = router(x, RoutingContext())
    assert routing.token_N.tolist() == [0, 1, 1, 2] and routing.expert_N.tolist() == [0, 0, 1, 1]
    assert close(routing.weight_N, [1.0, 1 / 3, 2 / 3, 1.0])
    assert routing.losses["entropy"].item() == pytest.approx(math.log(2) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts, k", [(2, 1), (6, 2), (16, 3)])
def test_exact_zeros_outside_k_leaves_when_the_nodes_have_decided(experts, k, dtype):
    torch.manual_seed(3)
    router = scaled(make("comet", 8, experts, top_k=k), node=1e6).to(dtype)
    routing = router(torch.randn(200, 8).to(dtype), RoutingContext())
    weight, mask = dense(routing)
    assert (mask.sum(1) <= k).all() and (mask.sum(1) >= 1).all()
    assert (mask.sum(0) > 0).all()
    assert torch.equal(routing.probability_TE > 0, mask)
    assert torch.allclose(weight.sum(1), torch.ones(200, dtype=torch.float64), atol=1e-6)
    assert routing.losses["entropy"].item() == 0


def test_training_decides_the_nodes():
    """A few steps on the entropy loss: dense at first, at most k experts for nearly every token later."""
    torch.manual_seed(4)
    router = make("comet", 8, 6, top_k=2).float()
    x = torch.randn(128, 8)
    assert router(x, RoutingContext()).token_N.shape[0] == 128 * 6
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        routing = router(x, RoutingContext())
        optimizer.zero_grad()
        routing.losses["entropy"].backward()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in router.parameters())
    count = (router(x, RoutingContext()).probability_TE > 0).sum(1)
    assert (count <= 2).float().mean() > 0.9


@pytest.mark.parametrize("experts", [2, 5])
def test_gradients(experts):
    torch.manual_seed(5)
    router = scaled(make("comet", 4, experts), node=40, leaf=10)
    x = torch.randn(6, 4, dtype=torch.float64)
    values = x @ router.node.flatten(0, 1).t()
    assert (values.abs() < 0.5).any() and (values.abs() > 0.5).any()
    # at a pair of weight 0 there is nothing to differentiate, which is why the tokens differ in pairs
    assert gradients_are_right(router, x)


def test_gradients_stay_finite_where_a_share_is_hardly_a_number():
    router = make("comet", 1, 8, top_k=1).float()
    router.node.data.fill_(1.0)
    router.leaf.data.copy_(torch.linspace(-50, 50, 8).view(1, 8, 1))
    # a ramp of about 1e-7 has a share of about 1e-14 at one node and its cube, a subnormal, at three
    x = torch.tensor([[-0.5 + 1e-7], [-0.5 + 3e-7], [0.5 - 1e-7], [-0.5], [0.5]], requires_grad=True)
    routing = router(x, RoutingContext())
    share = leaf_shares((x @ router.node[0].t()).unsqueeze(1), 1.0)
    assert 0 < share[share > 0].min() < torch.finfo(torch.float32).tiny
    (routing.weight_N.square().sum() + routing.losses["entropy"]).backward()
    for p in (x, router.node, router.leaf):
        assert torch.isfinite(p.grad).all()
    assert (routing.weight_N > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("comet", dtype)


def test_initialisation():
    assert is_deterministic("comet", 4, 3)
    router = make("comet", 50, 9, gamma=5.0)
    assert 0.04 < router.node.abs().max() <= 0.05 and 0.04 < router.leaf.abs().max() <= 0.05


def test_refused():
    with pytest.raises(ValueError, match="`gamma` must be greater than 0, but is 0"):
        make("comet", 4, 3, gamma=0)
    with pytest.raises(ValueError, match="`top_k` must be from 1 to the 3 experts, but is 4"):
        make("comet", 4, 3, top_k=4)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e8]),
    gamma=st.sampled_from([0.01, 1.0, 10.0]),
    same=st.booleans(),
    data=st.data(),
)
def test_weights_are_a_distribution(tokens, experts, scale, gamma, same, data):
    k = data.draw(st.integers(1, experts))
    router = scaled(make("comet", 3, experts, top_k=k, gamma=gamma), node=scale)
    x = (torch.randn(1, 3).repeat(tokens, 1) if same else torch.randn(tokens, 3)).double().requires_grad_()
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    assert (routing.weight_N > 0).all()
    assert close(weight.sum(1), torch.ones(tokens))
    assert mask.any(1).all()
    assert 0 <= routing.losses["entropy"] <= k * math.log(experts) + 1e-9
    (routing.weight_N.square().sum() + sum(routing.losses.values())).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(router.leaf.grad).all()
    assert experts == 1 or torch.isfinite(router.node.grad).all()


SEARCH = {"leaf_search": 8, "top_k": 2}


def searched(**options):
    """Plain gate and one that has learned an order, with the same trees."""
    plain, router = make("comet", 6, 5, top_k=2), make("comet", 6, 5, **{**SEARCH, **options})
    router.node, router.leaf = plain.node, plain.leaf
    return plain.eval(), router


def test_after_the_search_experts_are_leaves_in_the_order_of_the_scores():
    torch.manual_seed(1)
    plain, router = searched()
    order = [2, 0, 1, 4, 3]  # of all permutations that with the greatest sum of scores
    router.order.score_LE.data = torch.randn(5, 5).double() * 0.1
    router.order.score_LE.data[range(5), order] += 1.0
    router.order.settle()
    best = max(itertools.permutations(range(5)), key=lambda p: router.order.score_LE[range(5), p].sum())
    assert router.order.expert_L.tolist() == list(best) == order
    x = torch.randn(20, 6, dtype=torch.float64)
    leaves, _ = dense(plain(x, RoutingContext()))
    experts, _ = dense(router.eval()(x, RoutingContext()))
    assert close(experts[:, order], leaves)
    router.order.made.fill_(8)
    experts, _ = dense(router.train()(x, RoutingContext()))
    assert close(experts[:, order], leaves)


@pytest.mark.parametrize("made", [0, 5])
def test_while_searching_it_is_the_matrix_of_the_formula(made):
    torch.manual_seed(2)
    plain, router = searched()
    router.train().order.made.fill_(made)
    context = RoutingContext(noise_key=("gate", 3))
    x = torch.randn(20, 6, dtype=torch.float64)
    uniform = noise.uniform(("gate", 3, "leaves"), 0, 5, 5, torch.device("cpu")).double()
    score = router.order.score_LE.detach() - 0.01 * (-uniform.log()).log()
    matrix = ((score - score.max()) / 10 ** (-3 - 4 * made / 8)).exp() if made == 0 else None
    if matrix is not None:
        for _ in range(20):
            matrix = matrix / matrix.sum(1, keepdim=True)
            matrix = matrix / matrix.sum(0, keepdim=True)
        expected = matrix.masked_fill(matrix < 1e-5, 0)
        assert torch.allclose(router.order.matrix(context.noise_key), expected, atol=1e-6)
    found = router.order.matrix(context.noise_key)
    assert torch.allclose(found.sum(0), torch.ones(5).double(), atol=1e-3)
    weight, _ = dense(router(x, context))
    mixed = dense(plain(x, RoutingContext()))[0] @ found
    assert close(weight, mixed / mixed.sum(1, keepdim=True))


def test_the_search_has_a_gradient_and_ends():
    """At a high temperature, where it is smooth; and by the updates that have tokens."""
    torch.manual_seed(3)
    _, router = searched()
    x = torch.randn(6, 6, dtype=torch.float64)
    assert gradients_are_right(router.train(), x, RoutingContext(noise_key=("gate", 1)))
    for update in range(10):
        before = router.order.score_LE.grad = None
        routing = router(x, RoutingContext(noise_key=("gate", update)))
        (routing.weight_N * routing.expert_N.double()).sum().backward()
        assert before is None and router.order.score_LE.grad is not None
        assert (router.order.score_LE.grad.abs().max() > 0) <= (update < 8)
        router.order.score_LE.data += 0.02 * torch.randn(5, 5).double()
        end_update(router)
        assert router.order.made == min(update + 1, 8)
    assert sorted(router.order.expert_L.tolist()) == list(range(5))


def test_an_order_comes_from_the_generator_and_a_gate_without_one_is_as_it_was():
    assert is_deterministic("comet", 4, 3, **SEARCH)
    assert list(make("comet", 4, 3).state_dict()) == ["node", "leaf"]
    names = ["order.score_LE", "order.expert_L", "order.made"]
    assert sorted(make("comet", 4, 3, **SEARCH).state_dict()) == sorted(["node", "leaf", *names])


def test_an_order_is_not_learned_of_leaves_that_become_nodes():
    given = {"router": "comet", "experts": 8, "leaf_search": 10}
    with pytest.raises(ConfigError) as raised:
        resolve({**given, "spawn_update": "0:4,20:8"}, max_update=100)
    assert raised.value.option == "leaf_search" and "give one stage" in str(raised.value)
    assert resolve({**given, "leaf_search": "10%"}, max_update=100).flat()["leaf_search"] == 10
