"""Functions before and behind a linear gate's map, against a loop over tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import ROUTERS, RoutingContext
from fairseq_evomoe.moe.gate_activation import GateActivation
from fairseq_evomoe.moe.plan import check_linear_gate
from fairseq_evomoe.moe.routers import dts
from support.gate_inputs import batch, vocabulary
from support.router_checks import (
    check_precision,
    close,
    dense,
    dot,
    gradients_are_right,
    is_causal,
    make,
    softmax,
)

FUNCTIONS = {
    "identity": lambda v: v,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "relu": lambda v: max(v, 0.0),
}
BEFORE = ["dts", "switch", "topk", "top-p", "dtop-p", "expert-choice", "expert-threshold", "remoe"]
BEHIND = ["dts", "switch", "topk", "top-p", "expert-choice"]


def tokens(count=40):
    torch.manual_seed(1)
    return 2 * torch.randn(count, 6, dtype=torch.float64)


def reference(x, w, before, behind):
    """Logits (T x E), one token at a time."""
    rows = []
    for x_t in x.tolist():
        seen = [FUNCTIONS[before](v) for v in x_t]
        rows.append([FUNCTIONS[behind](dot(seen, w_e)) for w_e in w.tolist()])
    return torch.tensor(rows, dtype=torch.float64)


def test_all_functions_are_tried():
    assert list(FUNCTIONS) == [kind.value for kind in GateActivation]


@pytest.mark.parametrize("before", FUNCTIONS)
@pytest.mark.parametrize("behind", FUNCTIONS)
def test_equals_the_reference(before, behind):
    x, names = tokens(), {"gate_activation": behind, "gate_input_activation": before}
    router = make("topk", 6, 5, gate_lr_scale=4.0, **names)
    router.weight.data.mul_(3)
    logits = reference(x, 4 * router.weight, before, behind)
    routing = router(x, RoutingContext())
    probabilities = torch.tensor([softmax(row) for row in logits.tolist()], dtype=torch.float64)
    assert close(routing.probability_TE, probabilities)
    best = probabilities.topk(2)
    if behind != "relu":  # which has ties
        assert torch.equal(routing.expert_N.view(2, -1).t(), best.indices)
    assert close(routing.weight_N.view(2, -1).t(), best.values / best.values.sum(1, keepdim=True))
    assert close(routing.losses["z"], logits.logsumexp(1).square().mean())


@pytest.mark.parametrize("behind", FUNCTIONS)
def test_noise_and_temperature_come_after_the_activation(behind, monkeypatch):
    x, noise = tokens(), torch.randn(40, 5, dtype=torch.float64)
    monkeypatch.setattr(dts, "gumbel", lambda like, context: noise)
    options = {"gate_activation": behind, "gate_weight": "gumbel", "threshold": 0.15}
    router = make("dts", 6, 5, **options).train()
    weight, mask = dense(router(x, RoutingContext(temperature=0.5)))
    y = ((reference(x, router.weight, "identity", behind) + noise) / 0.5).softmax(1)
    expected = (y > 0.15).scatter(1, y.argmax(1, keepdim=True), True)
    assert torch.equal(mask, expected) and close(weight, y * expected)


@pytest.mark.parametrize("name", BEFORE)
def test_any_linear_gate_takes_one_before(name):
    x, context = tokens(), RoutingContext(temperature=0.7)
    plain, modified = (make(name, 6, 5, **each).eval() for each in ({}, {"gate_input_activation": "tanh"}))
    expected, found = plain(x.tanh(), context), modified(x, context)
    assert all(close(a, b) for a, b in zip(dense(found), dense(expected)))
    assert found.losses.keys() == expected.losses.keys()
    assert all(close(found.losses[loss], expected.losses[loss]) for loss in found.losses)
    assert not close(modified.logits(x, context), plain.logits(x, context))


@pytest.mark.parametrize("name", BEHIND)
def test_a_linear_gate_that_is_a_distribution_takes_one_behind(name):
    x, context = tokens(), RoutingContext()
    plain, modified = (make(name, 6, 5, **each).eval() for each in ({}, {"gate_activation": "gelu"}))
    logits = plain.logits(x, context).tolist()
    expected = torch.tensor([softmax([FUNCTIONS["gelu"](v) for v in row]) for row in logits])
    assert torch.allclose(modified(x, context).probability_TE, expected.double(), atol=1e-6)


def test_embeddings_and_free_experts_see_the_same_functions():
    x, e = batch()
    options = {"gate_input": "both", "copy_experts": 2, "vocabulary": vocabulary()}
    router = make("topk", 4, 3, gate_activation="sigmoid", gate_input_activation="gelu", **options)
    gelu, normal = torch.nn.functional.gelu, torch.nn.functional.layer_norm(e, e.shape[-1:])
    columns = [gelu(x) @ router.weight.t() + gelu(normal) @ router.token_weight.t()]
    columns.append(gelu(x) @ router.free.weight.t())
    found = router.logits(x, RoutingContext(embedding_TC=e))
    assert close(found, torch.cat(columns, 1).sigmoid())


@pytest.mark.parametrize("name", ["dts", "topk"])
@pytest.mark.parametrize("how", list(FUNCTIONS)[1:])
def test_gradients(name, how):
    router = make(name, 4, 3, gate_activation=how, gate_input_activation=how).eval()
    torch.manual_seed(3)
    # apart from where relu has a kink
    assert gradients_are_right(router, torch.rand(7, 4, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("topk", dtype, gate_activation="gelu", gate_input_activation="sigmoid")


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    router = make("dts", 6, 5, gate_activation="gelu", gate_input_activation="tanh", threshold=0.1)
    assert is_causal(router.train(training), tokens(9))


def test_a_state_is_that_of_a_gate_without():
    plain, other = (make("dts", 6, 5, seed=s, **o) for s, o in ((0, {}), (1, {"gate_activation": "gelu"})))
    other.load_state_dict(plain.state_dict())
    found = ROUTERS["dts"].options_of_state(other.state_dict())
    assert found == ROUTERS["dts"].options_of_state(plain.state_dict())
    assert plain.options.gate_activation == plain.options.gate_input_activation == "identity"


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9),
    experts=st.integers(2, 6),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    before=st.sampled_from(list(FUNCTIONS)),
    behind=st.sampled_from(list(FUNCTIONS)),
)
def test_probabilities_stay_within_what_a_bounded_function_allows(rows, experts, scale, before, behind):
    router = make("topk", 3, experts, gate_activation=behind, gate_input_activation=before)
    x = (scale * torch.randn(rows, 3, dtype=torch.float64)).requires_grad_()
    routing = router(x, RoutingContext())
    p, most = routing.probability_TE, {"sigmoid": 1, "tanh": 2}.get(behind, math.inf)
    assert close(p.sum(1), torch.ones(rows)) and len(routing.token_N) == 2 * rows
    if rows and most < math.inf:
        assert (p.amax(1) / p.amin(1)).max() <= math.exp(most) * 1.0001
    (routing.weight_N.sum() + sum(routing.losses.values())).backward()
    assert all(torch.isfinite(each.grad).all() for each in (x, router.weight))


def test_a_table_has_no_input_to_transform():
    with pytest.raises(
        ConfigError, match="--moe-gate-input-activation tanh has nothing to transform"
    ) as error:
        resolve({"gate_input": "table", "gate_input_activation": "tanh"})
    assert error.value.option == "gate_input_activation"
    assert resolve({"gate_input": "table", "gate_activation": "tanh"}).flat()["gate_activation"] == "tanh"


@pytest.mark.parametrize("name", ["gate_activation", "gate_input_activation"])
def test_a_split_needs_a_gate_without(name):
    check_linear_gate(make("topk", 4, 3))
    router = make("topk", 4, 3, **{name: "gelu"})
    with pytest.raises(ValueError, match="`spawn_method` split .* a `gate_activation` or a"):
        check_linear_gate(router)
