"""Switch and top-k against their formulas, and how they are related."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import ROUTERS, Routing, RoutingContext
from fairseq_evomoe.moe.capacity import limit_load
from fairseq_evomoe.moe.losses import active_balance_loss, penalty_loss, top1_balance_loss, z_loss
from support.router_checks import close, dense, dot, entropy, gradients_are_right, make, softmax


def tokens(count=40, dim=6, seed=1):
    torch.manual_seed(seed)
    return torch.randn(count, dim, dtype=torch.float64)


def reference(x, w, k, renormalize, choices="all"):
    """Weights, losses and entropy by the formulas, one token at a time."""
    experts, rows, chosen, probabilities, z = len(w), [], [], [], 0.0
    for x_t in x.tolist():
        logits = [dot(x_t, w_e) for w_e in w.tolist()]
        p = softmax(logits)
        best = sorted(range(experts), key=lambda e: -p[e])[:k]
        scale = sum(p[e] for e in best) if renormalize else 1.0
        rows.append([p[e] / scale if e in best else 0.0 for e in range(experts)])
        chosen.extend(best if choices == "all" else best[:1])
        probabilities.append(p)
        z += math.log(sum(map(math.exp, logits))) ** 2
    n = len(rows)
    f = [chosen.count(e) / n for e in range(experts)]  # sums to k, or to 1
    mean = [sum(p[e] for p in probabilities) / n for e in range(experts)]
    losses = {
        "balance": experts * dot(f, mean),
        "z": z / n,
        "entropy": sum(map(entropy, probabilities)) / n,
        "mutual_information": sum(map(entropy, probabilities)) / n - entropy(mean),
    }
    return torch.tensor(rows, dtype=torch.float64), losses


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("k, renormalize", [(1, False), (1, True), (2, True), (3, False), (5, True)])
def test_topk_matches_the_formulas(k, renormalize, choices):
    x = tokens()
    how = "always" if renormalize else "never"
    router = make("topk", 6, 5, top_k=k, renormalize=how, balance_choices=choices)
    routing = router(x, RoutingContext())
    expected, losses = reference(x, router.weight, k, renormalize, choices)
    assert close(dense(routing)[0], expected)
    assert routing.losses.keys() == losses.keys() == router.loss_weights.keys()
    for name, value in losses.items():
        assert close(routing.losses[name], value), name
    assert close(routing.gate_entropy, losses["entropy"] * 40)


def test_switch_matches_the_formulas():
    x = tokens()
    router = make("switch", 6, 5).eval()
    routing = router(x, RoutingContext())
    expected, losses = reference(x, router.weight, 1, renormalize=False)
    assert close(dense(routing)[0], expected)
    assert routing.losses.keys() == losses.keys() == router.loss_weights.keys()
    for name, value in routing.losses.items():
        assert close(value, losses[name]), name


def test_topk_of_one_is_switch_up_to_the_scale_of_the_gate():
    x = tokens()
    switch = make("switch", 6, 5).eval()(x, RoutingContext())
    plain = make("topk", 6, 5, top_k=1, renormalize="never")(x, RoutingContext())
    scaled = make("topk", 6, 5, top_k=1)(x, RoutingContext())
    for other in (plain, scaled):
        assert torch.equal(other.token_N, switch.token_N) and torch.equal(other.expert_N, switch.expert_N)
    assert torch.equal(plain.weight_N, switch.weight_N)
    assert torch.equal(scaled.weight_N, torch.ones(40, dtype=torch.float64))
    assert switch.losses["balance"] == plain.losses["balance"]


def uneven_later_choices():
    """A gate of eight experts: first choices are even, the three others are not."""
    order = {0: (0, 1, 2, 3), 1: (1, 0, 2, 3), 2: (2, 0, 1, 3), 3: (3, 0, 1, 2)}
    order.update({e: (e, 0, 1, 2) for e in range(4, 8)})
    logits = torch.zeros(64, 8, dtype=torch.float64)
    for t in range(64):
        for rank, e in enumerate(order[t % 8]):
            logits[t, e] = 0.4 - 0.1 * rank
    return logits


def test_the_balance_loss_of_all_choices_sees_what_that_of_first_ones_does_not():
    """Mixtral's counts all of a token's experts, GShard's the first: even here, where later ones crowd."""
    gradients = {}
    for choices in ("first", "all"):
        router = make("topk", 8, 8, top_k=4, balance_choices=choices)
        with torch.no_grad():
            router.weight.copy_(torch.eye(8))
        loss = router(uneven_later_choices(), RoutingContext()).losses["balance"]
        loss.backward()
        gradients[choices] = router.weight.grad.abs().max().item()
        assert loss.item() == pytest.approx(1.0, abs=1e-9) if choices == "first" else loss.item() > 4.1
    assert gradients["first"] < 1e-12 < 1e-3 < gradients["all"]


def test_the_balance_loss_of_an_even_load_is_the_number_of_choices():
    """k for all of them, whatever the probabilities are, and 1 for the first ones."""
    x = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    for k in (1, 2, 4):
        for choices, even in (("all", k), ("first", 1)):
            router = make("topk", 4, 4, top_k=k, balance_choices=choices)
            with torch.no_grad():  # the best expert of token t is t, the next t + 1, ...
                circle = torch.stack([torch.roll(torch.arange(4.0, 0, -1), t) for t in range(4)])
                router.weight.copy_(circle.t())
            assert router(x, RoutingContext()).losses["balance"].item() == pytest.approx(even)


def test_dropped_choices_count_in_the_balance_loss():
    """It is of what the gate wants, so that it can want something else."""
    x = tokens()
    found = [make("topk", 6, 5, capacity_factor=c)(x, RoutingContext()) for c in (0.0, 0.5)]
    assert found[1].dropped > 0 and found[0].losses["balance"] == found[1].losses["balance"]


def test_jitter_multiplies_the_input_while_training():
    x = tokens(2000)
    router = make("switch", 6, 5, jitter=0.3).train()
    seen = []
    router.logits = lambda x, context: (seen.append(x), x[:, :5])[1]
    router(x, RoutingContext())
    factor = seen[0] / x
    assert factor.min() > 0.7 and factor.max() < 1.3
    assert factor.min() < 0.71 and factor.max() > 1.29 and abs(factor.mean() - 1) < 0.01
    router.eval()(x, RoutingContext())
    assert torch.equal(seen[1], x)


def test_random_second_expert_is_kept_with_twice_its_weight():
    x = tokens(1).expand(20000, 6)
    router = make("topk", 6, 5, random_second=True).train()
    routing = router(x, RoutingContext())
    both = make("topk", 6, 5)(x[:1], RoutingContext())
    second = both.weight_N[1].item()
    assert torch.equal(routing.token_N[:20000], torch.arange(20000))  # every first one is kept
    assert 2 * second == pytest.approx((routing.token_N.numel() - 20000) / 20000, abs=0.02)
    assert router.eval()(x, RoutingContext()).token_N.numel() == 40000


def test_capacity_keeps_the_first_pairs_of_each_expert():
    expert = torch.tensor([0, 0, 1, 0, 2, 0])
    routing = Routing(torch.arange(6), expert, torch.arange(6.0), tokens=6, experts=3)
    limit_load(routing, 1.0)  # two each
    assert routing.token_N.tolist() == [0, 1, 2, 4]
    assert routing.expert_N.tolist() == [0, 0, 1, 2]
    assert routing.weight_N.tolist() == [0, 1, 2, 4]
    assert routing.dropped == 2


@pytest.mark.parametrize("name, k", [("switch", 1), ("topk", 2), ("topk", 3)])
@pytest.mark.parametrize("count", [1, 7, 8, 30])
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.25, 2.0])
def test_an_expert_has_room_as_in_fairseq(name, k, count, factor):
    """For ``floor(c k ceil(T / E))`` pairs: the even share is rounded up first, and all of it down."""
    options = {"capacity_factor": 0.1, "eval_capacity_factor": factor, **({"top_k": k} if k > 1 else {})}
    router = make(name, 6, 4, **options).eval()
    with torch.no_grad():
        router.weight.copy_(torch.arange(4.0, 0, -1).unsqueeze(1).expand(4, 6))
    routing = router(torch.ones(count, 6, dtype=torch.float64), RoutingContext())  # all to the same k
    room = min(math.floor(factor * k * math.ceil(count / 4)), count)
    assert routing.load_E().tolist() == [room] * k + [0] * (4 - k)
    assert routing.dropped == k * (count - room)


def test_first_choices_come_before_second_ones():
    """Expert 0 is the first choice of tokens 2 and 3 and the second of 0 and 1; it has room for two."""
    router = make("topk", 2, 2, capacity_factor=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    routing = router(x, RoutingContext())
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist())
    assert sorted(pairs) == [(0, 1), (1, 1), (2, 0), (3, 0)]
    assert routing.dropped == 4


def test_no_token_loses_its_expert_to_a_later_one_where_there_must_be_no_later_one():
    """As above, but in a decoder: the second choices of tokens 0 and 1 are there before tokens 2 and 3."""
    router = make("topk", 2, 2, capacity_factor=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    routing = router(x, RoutingContext(causal=True))
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist())
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert routing.dropped == 4


def test_no_capacity_factor_drops_nothing():
    assert make("switch", 6, 5).train()(tokens().abs(), RoutingContext()).dropped == 0
    for name in ("switch", "topk"):  # whatever that of training is
        assert make(name, 6, 5, capacity_factor=0.1).eval()(tokens(), RoutingContext()).dropped == 0


def test_losses_by_hand():
    """Three tokens, two experts, probabilities 0.75/0.25, 0.5/0.5 (a tie: the first), 0.25/0.75."""
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    # f = (2/3, 1/3), P = (1/2, 1/2): 2 * (1/3 + 1/6)
    assert close(top1_balance_loss(p), 1.0)
    # all pairs but (0, 1): f = (3/5, 2/5)
    token, expert = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 0, 1])
    routing = Routing(token, expert, p[token, expert], 3, 2, probability_TE=p)
    assert close(active_balance_loss(routing), 2 * (3 / 5 * 1 / 2 + 2 / 5 * 1 / 2))
    # widths 8 and 24, mean 16: M = (1 * 0.5, 2/3 * 1.5)
    assert close(penalty_loss(routing, torch.tensor([8, 24])), 2 * (0.5 * 0.5 + 1.0 * 0.5))
    # equal widths: the classical loss, 2 * (1 * 0.5 + 2/3 * 0.5)
    assert close(penalty_loss(routing, torch.tensor([16, 16])), 2 * (0.5 + 1 / 3))
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert close(z_loss(logits), (2 * math.log(2) ** 2 + math.log(4) ** 2) / 3)


@pytest.mark.parametrize(
    "name, options",
    [("switch", {}), ("topk", {}), ("topk", {"top_k": 3}), ("topk", {"balance_choices": "first"})],
)
def test_gradients(name, options):
    assert gradients_are_right(make(name, 4, 3, **options).eval(), tokens(7, 4))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 4}, {"random_second": True, "top_k": 1}])
def test_refused(options):
    with pytest.raises(ValueError, match="top_k"):
        ROUTERS["topk"](4, 3, **options)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["switch", "topk"]),
    count=st.integers(0, 9),
    experts=st.integers(1, 5),
    factor=st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    same=st.booleans(),
    train=st.booleans(),
)
def test_any_shape(name, count, experts, factor, same, train):
    options = {"top_k": min(2, experts)} if name == "topk" else {}
    phase = "capacity_factor" if train else "eval_capacity_factor"
    router = make(name, 3, experts, **{phase: factor}, **options).train(train)
    x = torch.zeros(count, 3, dtype=torch.float64) if same else tokens(count, 3)
    routing = router(x, RoutingContext())
    k = options.get("top_k", 1)
    load = routing.load_E()
    assert int(routing.dropped) + routing.token_N.numel() == k * count
    assert (routing.weight_N > 0).all() and (routing.weight_N <= 1).all()
    assert len(set(zip(routing.token_N.tolist(), routing.expert_N.tolist()))) == routing.token_N.numel()
    if factor:
        assert (load <= math.floor(factor * k * math.ceil(count / experts))).all()
    else:
        assert routing.dropped == 0
    assert all(torch.isfinite(loss) for loss in routing.losses.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_is_float32(dtype):
    x = tokens().to(dtype)
    router = make("topk", 6, 5).to(dtype)
    routing = router(x, RoutingContext())
    expected = make("topk", 6, 5).to(dtype).float()(x.float(), RoutingContext())
    assert routing.weight_N.dtype == torch.float32
    assert torch.equal(routing.weight_N, expected.weight_N)
