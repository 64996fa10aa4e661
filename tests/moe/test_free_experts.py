"""Zero, copy and constant experts beside those that work: a layer against a loop over tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.free_experts import FreeExperts
from support.cli import LM, call, evomoe
from support.refusals import refused
from support.router_checks import (
    close,
    dense,
    dot,
    gradients_are_right,
    is_causal,
    is_deterministic,
    make,
    softmax,
)
from support.tasks import PLAIN

DIM, EXPERTS = 6, 4
FREE = {"zero_experts": 1, "copy_experts": 2, "constant_experts": 2}
CASES = {
    "switch": {"jitter": 0.0},
    "topk": {"top_k": 2, "renormalize": "never"},
    "topk normalised": {"top_k": 3},
    "top-p": {"top_p": 0.6},
    "dts": {"threshold": 0.1, "eval_routing": "adaptive"},
}
NAME = pytest.mark.parametrize("name", CASES)


def layer_of(name, **more):
    options = {**CASES[name], **FREE, **more}
    layer = MoELayer(DIM, 5, EXPERTS, name.split()[0], spawned=True, **options).double()
    layer.router.initialize(torch.Generator().manual_seed(1))
    for parameter in (layer.router.weight, layer.router.free.weight):
        parameter.data.mul_(3)
    layer.router.free.constant_CD.data.mul_(30)
    return layer.eval()


def chosen(name, p):
    """Numbers of the experts of a token, out of all nine."""
    order = sorted(range(len(p)), key=lambda e: -p[e])
    if name == "dts":
        return [e for e in order if e == order[0] or p[e] > 0.1]
    if name == "top-p":
        return next(order[: n + 1] for n in range(len(p)) if sum(p[e] for e in order[: n + 1]) >= 0.6)
    return order[: {"switch": 1, "topk": 2, "topk normalised": 3}[name]]


def free_output(free, x_t, number):
    """Of a zero expert, two copies, or two constant ones, as lists."""
    x_t = x_t.tolist()
    if number == 0:
        return [0.0] * DIM
    if number < 3:
        return x_t
    constant = number - 3
    rows = free.mixing.tolist()[2 * constant : 2 * constant + 2]
    a, b = softmax([dot(row, x_t) for row in rows])
    return [a * x_i + b * v_i for x_i, v_i in zip(x_t, free.constant_CD.tolist()[constant])]


def reference(name, layer, x):
    """Outputs, the mask and the probabilities of all nine, one token at a time."""
    rows = [*layer.router.weight.tolist(), *layer.router.free.weight.tolist()]
    outputs, masks, probabilities = [], [], []
    for x_t in x:
        p = softmax([dot(x_t.tolist(), w_e) for w_e in rows])
        found = chosen(name, p)
        scale = sum(p[e] for e in found) if name == "topk normalised" else 1.0
        y_t = torch.zeros(DIM, dtype=torch.float64)
        for e in found:
            if e < EXPERTS:
                counts = [int(e == i) for i in range(EXPERTS)]
                out = layer.experts(x_t.unsqueeze(0), counts)[0]
            else:
                out = torch.tensor(free_output(layer.router.free, x_t, e - EXPERTS), dtype=torch.float64)
            y_t = y_t + p[e] / scale * out
        outputs.append(y_t)
        masks.append([e in found for e in range(len(p))])
        probabilities.append(p)
    return torch.stack(outputs), torch.tensor(masks), torch.tensor(probabilities, dtype=torch.float64)


@NAME
def test_a_layer_equals_the_reference_and_counts_only_what_works(name):
    torch.manual_seed(2)
    layer = layer_of(name)
    x = torch.randn(150, DIM, dtype=torch.float64)
    with torch.no_grad(), record() as routings:
        y = layer(x)
        expected, mask, p = reference(name, layer, x)
    assert close(y, expected)
    assert mask[:, :EXPERTS].any(0).sum() >= 3 and mask[:, EXPERTS:].any(0).all()
    routing = routings[layer]
    assert torch.equal(dense(routing)[1], mask[:, :EXPERTS]) and routing.experts == EXPERTS
    assert close(routing.probability_TE, p[:, :EXPERTS])
    assert routing.report().assignments == mask[:, :EXPERTS].sum()


@NAME
def test_the_balance_loss_weighs_them_less(name):
    """``sum_e eta_e f_e P_e`` times what each router's form has, eta 1 or 1/2."""
    torch.manual_seed(3)
    layer = layer_of(name, free_balance=0.5)
    x = torch.randn(60, DIM, dtype=torch.float64)
    _, mask, p = reference(name, layer, x)
    router = layer.router.train(name == "dts")  # whose published loss is another one in training
    context = RoutingContext(noise_key=("gate", 1), temperature=0.8)
    routing = router(x, context)
    eta = torch.tensor([1.0] * EXPERTS + [0.5] * 5, dtype=torch.float64)
    share, mean, columns = mask.double().mean(0), p.mean(0), EXPERTS + 5
    if name == "top-p":
        share = share / share.sum()
    elif name == "dts":
        weight, mask = dense(routing)
        share, mean = mask.double().mean(0), weight.mean(0)
    assert close(routing.losses["balance"], columns * (eta * share * mean).sum())


def test_gradients():
    torch.manual_seed(4)
    free = FreeExperts(4, 1, 1, 2).double()
    for parameter in free.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    token, expert = torch.tensor([0, 0, 1, 2, 4, 4]), torch.tensor([0, 1, 2, 3, 2, 3])

    def run(x, weight, *_):  # gradcheck changes the parameters in place
        return free(x, token, expert, weight)

    assert torch.autograd.gradcheck(run, (x, weight, free.constant_CD, free.mixing))
    for name in CASES:
        router = make(name.split()[0], 4, 3, **{**CASES[name], **FREE}).eval()
        gates = [p for key, p in router.named_parameters() if key in ("weight", "free.weight")]
        router.parameters = lambda gates=gates: iter(gates)  # the others have no part in a routing
        assert gradients_are_right(router, torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@NAME
def test_it_is_causal(name, training):
    torch.manual_seed(5)
    router = make(name.split()[0], DIM, EXPERTS, **{**CASES[name], **FREE, "balance": "bias"})
    assert is_causal(router.train(training), torch.randn(9, DIM, dtype=torch.float64), temperature=0.7)
    assert is_deterministic(name.split()[0], DIM, EXPERTS, **FREE)


def test_a_layer_spawns_with_them_and_loads_them():
    torch.manual_seed(6)
    layers = [MoELayer(DIM, 8, EXPERTS, "topk", **FREE) for _ in range(2)]
    x = torch.randn(7, DIM)
    assert layers[0].router is None
    for layer in layers:
        layer.spawn(seed=3)
    layers[0].router.free.constant_CD.data.fill_(2.0)
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[0].eval()(x), layers[1].eval()(x))
    loss = layers[0](x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in layers[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    torch.manual_seed(7)
    layer = MoELayer(DIM, 8, EXPERTS, "topk", spawned=True, **FREE).to(dtype)
    x = torch.randn(9, DIM).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    exact = layer.double()(x.double())
    assert torch.allclose(y.double(), exact, atol=0.05)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError) as error:
        resolve({"router": "topk", "experts": 1, "top_k": 1, "zero_experts": 1}, max_update=10)
    refused(error, "--moe-zero-experts", "--moe-experts 1")
    with pytest.raises(ConfigError) as error:
        resolve({"router": "base", "zero_experts": 1}, max_update=10)
    refused(error, "--moe-zero-experts 1 has no effect with --moe-router base")


def test_a_checkpoint_with_them_is_merged_unless_it_has_a_bias_for_them(lm_data, tmp_path, capsys):
    run = {**LM, **PLAIN, "moe_preset": "moe_plus_plus", "max_update": 2, "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path / "loss", **run)
    evomoe("merge", tmp_path / "loss/checkpoint_last.pt", "--experts", "2", "--out", tmp_path / "small.pt")
    state = torch.load(tmp_path / "small.pt")["model"]
    assert state["decoder.layers.1.moe.router.weight"].shape[0] == 2
    assert state["decoder.layers.1.moe.router.free.weight"].shape[0] == 4
    more = {"restore_file": tmp_path / "small.pt", "moe_experts": 2, "max_update": 3}
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "on", **{**run, **more})
    assert [line["num_updates"] for line in result.log("train_inner")] == [3]
    call("fairseq-train", lm_data, save_dir=tmp_path / "bias", moe_balance="bias", **run)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evomoe("merge", tmp_path / "bias/checkpoint_last.pt", "--experts", "2", "--out", tmp_path / "no.pt")
    assert "The bias of --moe-balance bias counts --moe-zero-experts" in capsys.readouterr().err
    assert not (tmp_path / "no.pt").exists()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 6),
    kinds=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    share=st.floats(0, 1),
)
def test_outputs_are_within_what_they_mix(tokens, kinds, share):
    """With constant vectors of 0 no output is longer than the token by its weights; zero experts give 0."""
    count = sum(kinds)
    if count == 0:
        return
    free = FreeExperts(3, *kinds).double()
    for parameter in free.parameters():
        torch.nn.init.normal_(parameter)
    if kinds[2]:
        free.constant_CD.data.zero_()
    x = torch.randn(tokens, 3, dtype=torch.float64)
    mask = torch.rand(tokens, count) < share
    token_N, expert_N = mask.nonzero(as_tuple=True)
    weight_N = torch.rand(len(token_N), dtype=torch.float64)
    y = free(x, token_N, expert_N, weight_N)
    weight = torch.zeros(tokens, count, dtype=torch.float64).index_put((token_N, expert_N), weight_N)
    bound = weight[:, kinds[0] :].sum(1) * x.norm(dim=1)
    assert (y.norm(dim=1) <= bound + 1e-9).all() and math.isfinite(y.sum())
    if not kinds[2]:
        assert close(y, weight[:, kinds[0] :].sum(1, keepdim=True) * x)
