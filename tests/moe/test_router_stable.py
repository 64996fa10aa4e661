"""The StableMoE router against a slow reference in float64, written from the formulas."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import Routing, RoutingContext
from fairseq_evomoe.moe.routers.stable import StableRouter, stable_balance_loss
from fairseq_evomoe.moe.routing import Vocabulary

V = 20


def make(dim=6, experts=5, light_dim=4, seed=0, **options):
    vocabulary = Vocabulary(V, torch.zeros(V))
    router = StableRouter(dim, experts, vocabulary=vocabulary, light_dim=light_dim, **options)
    router.initialize(torch.Generator().manual_seed(seed))
    return router.double()


def batch(tokens=40, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return x, torch.randint(V, (tokens,), generator=generator)


def products(rows, columns):
    return [[sum(a * b for a, b in zip(r, c)) for c in columns.tolist()] for r in rows.tolist()]


def argmax(row):
    return max(range(len(row)), key=row.__getitem__)


def sigmoid(s):
    return 1 / (1 + math.exp(-s))


def reference(router, x, token, stage):
    """Expert, weight and losses by the formulas, one token at a time."""
    score = products(x, router.centroid_ED)
    light = products(router.embedding_VL[token], router.light_centroid_EL)
    expert = [argmax(row) for row in (score if stage == 1 else light)]
    weight = [sigmoid(row[e]) for row, e in zip(score, expert)]
    if stage == 2:
        return expert, weight, 0.0, 0.0
    tokens, experts = len(score), len(score[0])
    n = tokens / experts
    balance = 0.0
    for i in range(experts):
        members = [t for t in range(tokens) if expert[t] == i]
        balance += (len(members) - n) / n * sum(weight[t] for t in members)
    distillation = 0.0
    for row, e in zip(light, expert):
        distillation -= row[e] - math.log(sum(math.exp(z) for z in row))
    return expert, weight, balance / tokens, distillation / tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_routing_and_losses_match_the_formulas(stage, training):
    router, (x, token) = make(), batch()
    context = RoutingContext(hard=stage == 2, token_T=token)
    router.train()(x, context)  # freezes in stage 2
    routing = router.train(training)(x, context)
    expert, weight, balance, distillation = reference(router, x, token, stage)
    assert routing.expert_N.tolist() == expert and routing.token_N.tolist() == list(range(40))
    assert routing.weight_N.tolist() == pytest.approx(weight, abs=1e-10)
    assert routing.losses["balance"].item() == pytest.approx(balance, abs=1e-10)
    assert routing.losses["distillation"].item() == pytest.approx(distillation, abs=1e-10)
    assert set(routing.losses) == set(router.loss_weights)
    score = torch.tensor(products(x, router.centroid_ED), dtype=torch.float64)
    entropy = -(score.softmax(-1) * score.log_softmax(-1)).sum()
    assert routing.gate_entropy.item() == pytest.approx(entropy.item(), abs=1e-10)


def test_the_balance_loss_by_hand():
    """Three tokens, two experts: 0 and 1 to expert 0 with .8 and .6, 2 to expert 1 with .5; n = 1.5."""
    routing = Routing(torch.arange(3), torch.tensor([0, 0, 1]), torch.tensor([0.8, 0.6, 0.5]), 3, 2)
    expected = ((2 - 1.5) / 1.5 * (0.8 + 0.6) + (1 - 1.5) / 1.5 * 0.5) / 3
    assert stable_balance_loss(routing).item() == pytest.approx(expected)
    even = Routing(torch.arange(4), torch.tensor([0, 1, 1, 0]), torch.rand(4), 4, 2)
    assert stable_balance_loss(even).item() == pytest.approx(0.0)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_an_expert_takes_no_more_than_its_share(factor, hard):
    """Published with a capacity factor of 2, in both stages: the first tokens of each expert stay."""
    whole, limited, (x, token) = make(), make(capacity_factor=factor), batch()
    context = RoutingContext(hard=hard, token_T=token)
    free, routing = whole.train()(x, context), limited.train()(x, context)
    room = math.floor(factor * math.ceil(40 / whole.experts))
    kept = [t for t, e in enumerate(free.expert_N.tolist()) if (free.expert_N[:t] == e).sum().item() < room]
    assert routing.token_N.tolist() == kept and routing.dropped == 40 - len(kept)
    assert torch.equal(routing.expert_N, free.expert_N[kept])
    assert torch.equal(routing.weight_N, free.weight_N[kept])
    assert (routing.dropped > 0) == (max(free.load_E().tolist()) > room)
    # the losses are of what the gate wants
    assert all(torch.equal(routing.losses[name], free.losses[name]) for name in free.losses)


@pytest.mark.parametrize("hard", [False, True])
def test_gradients(hard):
    router, (x, token) = make(4, 3, 2).train(), batch(7, 4)
    names = ["centroid_ED", "embedding_VL", "light_centroid_EL"]
    values = [getattr(router, name).detach().clone().requires_grad_() for name in names]

    def run(x, *values):
        for name, value in zip(names, values):
            router._parameters[name] = value
        routing = router(x, RoutingContext(hard=hard, token_T=token))
        return routing.weight_N, routing.losses["distillation"], routing.losses["balance"]

    if hard:  # a balance loss that is not there has no gradient to check
        assert torch.autograd.gradcheck(lambda *v: run(*v)[:2], (x.requires_grad_(), *values))
    else:
        assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values))


def loss_of(router, routing):
    weighted = (w * routing.losses[name] for name, w in router.loss_weights.items())
    return routing.weight_N.sum() + sum(weighted)


def test_in_stage_2_the_light_router_has_gradients_that_are_0_even_if_it_is_not_finite():
    router, (x, token) = make().train(), batch()
    with torch.no_grad():
        router.embedding_VL[3] = float("inf")
    loss_of(router, router(x, RoutingContext(hard=True, token_T=token))).backward()
    assert (router.embedding_VL.grad == 0).all() and (router.light_centroid_EL.grad == 0).all()
    assert (router.centroid_ED.grad != 0).any()


def step(router, optimizer, number, hard):
    x, token = batch(seed=number)
    routing = router.train()(x, RoutingContext(hard=hard, token_T=token))
    optimizer.zero_grad()
    loss_of(router, routing).backward()
    optimizer.step()
    return routing.expert_N, token


def optimizer_of(router):
    return torch.optim.SGD(router.parameters(), lr=3.0, momentum=0.99, weight_decay=1e-3)


def test_in_stage_2_a_token_always_goes_to_the_same_expert():
    router = make()
    optimizer = optimizer_of(router)
    for number in range(5):
        step(router, optimizer, number, hard=False)
        assert (router.table_V == -1).all()
    expert_of = router._light_expert(router.embedding_VL).tolist()
    for number in range(5, 25):
        expert, token = step(router, optimizer, number, hard=True)
        assert expert.tolist() == [expert_of[t] for t in token.tolist()]
        x, token = batch(seed=100 + number)
        routing = router.eval()(x, RoutingContext(hard=True, token_T=token))
        assert routing.expert_N.tolist() == [expert_of[t] for t in token.tolist()]
    # it is the table that keeps them there: momentum has moved the light router on
    assert router._light_expert(router.embedding_VL).tolist() != expert_of


@pytest.mark.parametrize("saved", [3, 5, 8])
def test_a_state_resumes_where_it_was(saved):
    """Stage 2 starts with step 5; saved before, at and after that."""
    router = make()
    optimizer = optimizer_of(router)
    for number in range(saved):
        step(router, optimizer, number, hard=number >= 5)
    # the model that takes it over has been in stage 2 with other parameters
    other = make(seed=1)
    step(other, optimizer_of(other), 0, hard=True)
    assert (other.table_V >= 0).all()
    other.load_state_dict(router.state_dict())
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(saved, 12):
        expected, _ = step(router, optimizer, number, hard=number >= 5)
        expert, _ = step(other, resumed, number, hard=number >= 5)
        assert torch.equal(expert, expected)
    for name, tensor in router.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert (router.table_V >= 0).all()


def test_evaluation_writes_no_table_and_stage_1_forgets_it():
    router, (x, token) = make(), batch()
    hard = RoutingContext(hard=True, token_T=token)
    in_evaluation = router.eval()(x, hard)
    assert (router.table_V == -1).all()
    in_stage_1 = router.train()(x, RoutingContext(token_T=token))
    assert torch.equal(in_stage_1.expert_N, in_evaluation.expert_N)
    in_training = router.train()(x, hard)
    in_evaluation = router.eval()(x, hard)
    assert torch.equal(in_training.expert_N, in_evaluation.expert_N)
    assert not torch.equal(in_training.expert_N, in_stage_1.expert_N)
    assert torch.equal(router.table_V, router._light_expert(router.embedding_VL))
    router.eval()(x, RoutingContext(token_T=token))
    assert (router.table_V >= 0).all()
    router.train()(x, RoutingContext(token_T=token))
    assert (router.table_V == -1).all()


def test_the_light_router_learns_the_assignment():
    """Scores that depend on the token alone are distilled: both stages route alike then."""
    router = make(light_dim=10)
    embedding = torch.randn(V, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context = RoutingContext(token_T=torch.arange(V))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(100):
        loss = router.train()(embedding, context).losses["distillation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = router.eval()(embedding, context).expert_N
    assert len(set(expected.tolist())) > 1
    context = RoutingContext(token_T=torch.arange(V), hard=True)
    assert torch.equal(router(embedding, context).expert_N, expected)


def test_initialisation_depends_on_the_generator_alone():
    torch.manual_seed(1)
    first = make().state_dict()
    torch.manual_seed(2)
    second, third = make().state_dict(), make(seed=1).state_dict()
    assert set(first) == {"centroid_ED", "embedding_VL", "light_centroid_EL", "table_V"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in set(first) - {"table_V"})


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_computed_in_float32(dtype, hard):
    router, (x, token) = make().to(dtype).train(), batch()
    assert router.table_V.dtype == torch.int64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x.to(dtype), RoutingContext(hard=hard, token_T=token))
    assert routing.weight_N.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in routing.losses.values())
    score = x.to(dtype).double() @ router.centroid_ED.double().t()
    expected = score[routing.token_N, routing.expert_N].sigmoid()
    assert torch.allclose(routing.weight_N.double(), expected, atol=1e-6)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="router stable needs the vocabulary index of each token"):
        make()(batch()[0], RoutingContext())
    with pytest.raises(ValueError, match="router stable needs the vocabulary of its tokens"):
        StableRouter(3, 2)
    with pytest.raises(ValueError, match="`light_dim` must be at least 1, but is 0"):
        make(light_dim=0)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    training=st.booleans(),
    hard=st.booleans(),
    same=st.booleans(),
)
def test_every_token_is_routed(tokens, experts, training, hard, same):
    router, (x, token) = make(6, experts).train(training), batch(tokens)
    if same:
        x, token = torch.zeros_like(x), torch.full_like(token, 7)
    routing = router(x, RoutingContext(hard=hard, token_T=token))
    assert routing.token_N.tolist() == list(range(tokens))
    assert routing.load_E().sum() == tokens
    assert (routing.weight_N > 0).all() and (routing.weight_N < 1).all()
    assert not same or len(set(routing.expert_N.tolist())) <= 1
    loss = loss_of(router, routing)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())
