"""Default MoE against a loop over tokens in float64, and its means against all outputs of an update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.config.rules import rank_contradictions
from fairseq_evomoe.evolution.merge import plan_merge
from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.default_outputs import DefaultOutputs
from support.router_checks import close, dot, end_update, is_causal, is_deterministic, make, softmax

OPTIONS = {"top_k": 2}


def a_layer(**options):
    """A layer in float64 with default outputs that are not zero."""
    torch.manual_seed(1)
    layer = MoELayer(6, 8, 5, "default-moe", spawned=True, **{**OPTIONS, **options}).double()
    layer.router.defaults.output_ED.copy_(torch.randn(5, 6))
    return layer


def output_of(layer, e, x_t):
    """What expert e makes of a token, by its formula."""
    experts, units = layer.experts, layer.experts.rows_of(e)
    hidden = (experts.w1[units] @ x_t + experts.b1[units]).relu()
    return hidden @ experts.w2[units] + experts.b2[e]


def reference(layer, x):
    """Outputs (T x D), one token at a time, and the experts of each."""
    rows, found = [], []
    for x_t in x:
        p = softmax([dot(x_t.tolist(), w_e) for w_e in layer.router.weight.tolist()])
        best = sorted(range(5), key=lambda e: -p[e])[: layer.router.options.top_k]
        default = layer.router.defaults.output_ED.double()
        parts = [p[e] * (output_of(layer, e, x_t) if e in best else default[e]) for e in range(5)]
        rows.append(sum(parts))
        found.append(best)
    return torch.stack(rows), found


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_reference(training, top_k):
    layer = a_layer(top_k=top_k).train(training)
    x = torch.randn(30, 6, dtype=torch.float64)
    expected, found = reference(layer, x)
    with record() as routings:
        assert close(layer(x), expected)
    assert routings[layer].token_N.shape[0] == 30 * top_k
    assert len({tuple(sorted(best)) for best in found}) > 1 or top_k == 5


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    """Of the layer's output by x, the gate and the experts."""
    layer = a_layer().train(training)
    parameters = [layer.router.weight, *layer.expert_tensors().values()]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *parameters))


def test_the_gate_learns_of_experts_that_no_token_has():
    """By the logit of each, ``p (v - y)``, with the output y and what the expert would give, v."""
    layer = a_layer(balance_weight=0.0)
    x_t = torch.randn(1, 6, dtype=torch.float64)
    p = (x_t @ layer.router.weight.t()).softmax(-1)[0]
    absent = p.argsort()[:3]
    for value in (0.0, 1.0):
        layer.router.defaults.output_ED[absent] = value
        layer.router.weight.grad = None
        layer(x_t).sum().backward()
        by_logit = (layer.router.weight.grad @ x_t[0]) / (x_t @ x_t.t())[0]
        mean = layer(x_t).sum().item()
        expected = [p[e].item() * (6 * value - mean) for e in absent.tolist()]
        assert torch.allclose(by_logit[absent], torch.tensor(expected).double(), atol=1e-6)


def test_the_means_are_those_of_all_outputs_of_an_update():
    """Of two batches as one; the first updates count alike, until one has 1 - decay anyway."""
    layer = MoELayer(6, 8, 5, "default-moe", spawned=True, default_decay=0.6, **OPTIONS).double().train()
    defaults, mean_ED = layer.router.defaults, torch.zeros(5, 6).double()
    for update in range(4):
        batches = [torch.randn(n, 6, dtype=torch.float64) for n in (20, 9)]
        expected = torch.zeros(5, 6).double()
        count = torch.zeros(5).double()
        for x in batches:
            for x_t, best in zip(x, reference(layer, x)[1]):
                for e in best:
                    expected[e] += output_of(layer, e, x_t).detach()
                    count[e] += 1
            layer(x)
        assert (count > 0).all()
        end_update(layer)
        step = max(1 / (update + 1), 0.4)
        mean_ED += step * (expected / count.unsqueeze(1) - mean_ED)
        assert torch.allclose(defaults.output_ED.double(), mean_ED, atol=1e-6)
    assert (defaults.updates_E == 4).all() and defaults.output_ED.abs().max() > 0.01


def test_an_expert_without_tokens_keeps_its_mean():
    defaults = DefaultOutputs(3, 2, 0.5)
    defaults.output_ED.fill_(7.0)
    defaults.watch(torch.tensor([[1.0, 3], [3, 5]]), torch.tensor([1, 1]))
    defaults.commit(defaults.drain())
    assert defaults.output_ED.tolist() == [[7, 7], [2, 4], [7, 7]]
    assert defaults.updates_E.tolist() == [0, 1, 0]
    defaults.commit(defaults.drain())  # an update without tokens
    assert defaults.updates_E.tolist() == [0, 1, 0]


def test_two_ranks_learn_what_one_does():
    one, first, second = (a_layer().train() for _ in range(3))
    x = torch.randn(24, 6, dtype=torch.float64)
    one(x), first(x[:10]), second(x[10:])
    end_update(one), end_update(first, second)
    for layer in (first, second):
        assert torch.allclose(layer.router.defaults.output_ED, one.router.defaults.output_ED, atol=1e-6)


def test_only_training_changes_it():
    layer = a_layer().eval()
    layer(torch.randn(9, 6, dtype=torch.float64))
    assert layer.router.defaults.drain().eq(0).all()


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    torch.manual_seed(2)
    router = make("default-moe", 6, 5, **OPTIONS).train(training)
    assert is_causal(router, torch.randn(9, 6, dtype=torch.float64))


def test_a_spawn_begins_without_defaults_and_a_state_has_them():
    layer, other = (MoELayer(6, 8, 5, "default-moe", **OPTIONS).train() for _ in range(2))
    layer.spawn()
    x = torch.randn(9, 6)
    with record() as routings:
        y = layer(x)
    sum_T = torch.zeros(9).index_add(0, routings[layer].token_N, routings[layer].weight_N)
    assert layer.router.defaults.output_ED.eq(0).all() and (sum_T < 1).all() and torch.isfinite(y).all()
    end_update(layer)
    other.load_state_dict(layer.state_dict())
    assert layer.router.defaults.output_ED.ne(0).any()
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_merged_experts_have_the_mean_of_their_defaults():
    layer = a_layer(top_k=1)
    tensors = {name: x.detach() for name, x in layer.expert_tensors().items()}
    similarity = torch.eye(5).double()
    similarity[0, 3] = similarity[3, 0] = 0.9
    merge = plan_merge(tensors, [8] * 5, similarity, 4, torch.ones(5), False, type(layer.router).merge_rules)
    rows = {f"router.{key}": x for key, x in layer.router.state_dict().items()}
    new = merge.tensor("router.defaults.output_ED", rows["router.defaults.output_ED"])
    expected = layer.router.defaults.output_ED[[0, 3]].mean(0)
    assert new.shape == (4, 6) and any(torch.allclose(row, expected) for row in new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision(dtype):
    layer = a_layer().float()
    exact = a_layer()
    layer = layer.to(dtype) if dtype == torch.bfloat16 else layer
    assert layer.router.defaults.output_ED.dtype == torch.float32
    x = torch.randn(20, 6).to(dtype if dtype == torch.bfloat16 else torch.float32)
    exact.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer.train()(x)
    end_update(layer)
    assert torch.allclose(y.double(), exact(x.double()), atol=0.1) and y.dtype == x.dtype


def test_initialisation():
    assert is_deterministic("default-moe", 4, 3, **OPTIONS)
    router = make("default-moe", 4, 3, **OPTIONS)
    routing = router(torch.randn(5, 4, dtype=torch.float64), RoutingContext())
    assert router.defaults(routing).eq(0).all()


@pytest.mark.parametrize(
    "options, option",
    [
        ({"mutual_distillation_weight": 0.1}, "mutual_distillation_weight"),
        ({"top_k": 9}, "top_k"),
        ({"balance": "bias", "balance_weight": 0.1}, "balance_weight"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, option):
    with pytest.raises(ConfigError) as raised:
        resolve({"router": "default-moe", "experts": 8, **options}, max_update=100)
    assert raised.value.option == option and "\n" not in str(raised.value)


def test_the_experts_of_other_ranks_have_no_means_here():
    (error,) = rank_contradictions(resolve({"router": "default-moe", "expert_parallel": 2}))
    assert error.option == "router" and "`expert_parallel` 2" in str(error)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 5),
    free=st.integers(0, 2),
    capacity=st.sampled_from([0.0, 0.5]),
)
def test_what_stands_in_is_what_the_weights_leave(tokens, experts, top_k, free, capacity):
    """With default outputs of one, the weights and what stands in sum to what free experts leave."""
    torch.manual_seed(tokens)
    top_k = min(top_k, experts)
    zero = free if experts > 1 else 0
    layer = MoELayer(
        4, 3, experts, "default-moe", spawned=True, top_k=top_k, zero_experts=zero, capacity_factor=capacity
    ).train()
    if layer.router is None:  # of one expert
        return
    layer.router.defaults.output_ED.fill_(1.0)
    x = torch.randn(tokens, 4)
    with record() as routings:
        assert layer(x).shape == x.shape
    routing = routings[layer]
    sum_T = torch.zeros(tokens).index_add(0, routing.token_N, routing.weight_N)
    total_T = sum_T + layer.router.defaults(routing)[:, 0]
    assert torch.allclose(total_T, routing.probability_TE.sum(1), atol=1e-6)
