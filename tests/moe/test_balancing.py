"""Loads that a bias keeps even: choices against a loop over tokens in float64, and the rules that move it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import given_options, resolve, write_back
from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.balancing import Balance, LoadBias
from fairseq_evomoe.moe.loading import StateMismatch
from fairseq_evomoe.moe.quantile import Histogram
from support.refusals import refused
from support.router_checks import close, dense, dot, end_update, gradients_are_right, is_causal, make, softmax

EXPERTS = 5
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.2])
PLAIN = {"renormalize": "never"}
CASES = {
    "switch": {**PLAIN, "jitter": 0.0},
    "topk": {**PLAIN, "top_k": 2},
    "top-p": {**PLAIN, "top_p": 0.5},
    "dts": {**PLAIN, "threshold": 0.15},
}
HOW = pytest.mark.parametrize("how", ["bias", "quantile"])
NAME = pytest.mark.parametrize("name", CASES)


def biased(name, how="bias", bias=BIAS, **options):
    router = make(name, 6, EXPERTS, balance=how, **{**CASES[name], **options})
    router.weight.data.mul_(3)
    router.balancing.bias_E.copy_(bias)
    return router


def chosen_by(name, score, choice):
    """Numbers of the experts that a token has, by the rule of each router."""
    order = sorted(range(len(score)), key=lambda e: -choice[e])
    if name == "switch":
        return order[:1]
    if name == "topk":
        return order[:2]
    if name == "dts":
        return [e for e in order if e == order[0] or choice[e] > 0.15]
    found, total = [], 0.0
    for e in order:
        found.append(e)
        total += score[e]
        if total >= 0.5:
            break
    return found


def reference(name, x, w, bias, temperature=1.0):
    """Weights (T x E): chosen by what is biased, weighed by what is not."""
    rows = []
    for x_t in x.tolist():
        logits = [dot(x_t, w_e) for w_e in w.tolist()]
        p, score = softmax(logits), softmax([logit / temperature for logit in logits])
        found = chosen_by(name, score, [s + b for s, b in zip(score, bias.tolist())])
        rows.append([p_e if e in found else 0.0 for e, p_e in enumerate(p)])
    return torch.tensor(rows, dtype=torch.float64)


@HOW
@NAME
def test_choices_are_biased_and_weights_are_not(name, how):
    torch.manual_seed(1)
    router = biased(name, how).eval()
    if name == "dts":  # as in the soft stage, without its noise
        router = biased(name, how, eval_routing="adaptive").eval()
    x = torch.randn(60, 6, dtype=torch.float64)
    weight, _ = dense(router(x, RoutingContext()))
    assert close(weight, reference(name, x, router.weight, BIAS))
    assert not close(weight, reference(name, x, router.weight, 0 * BIAS))


def test_in_evaluation_the_dense_to_sparse_gate_chooses_at_the_temperature_it_was_trained_at():
    torch.manual_seed(2)
    router = biased("dts").eval()
    x = torch.randn(60, 6, dtype=torch.float64)
    weight, _ = dense(router(x, RoutingContext(temperature=0.5, hard=True)))
    expected = []
    for x_t in x.tolist():
        logits = [dot(x_t, w_e) for w_e in router.weight.tolist()]
        choice = [s + b for s, b in zip(softmax([2 * logit for logit in logits]), BIAS.tolist())]
        best = max(range(EXPERTS), key=choice.__getitem__)
        expected.append([p if e == best else 0.0 for e, p in enumerate(softmax(logits))])
    assert close(weight, expected)


@NAME
def test_a_bias_of_zero_changes_nothing(name):
    torch.manual_seed(3)
    x = torch.randn(30, 6, dtype=torch.float64)
    router = biased(name, bias=torch.zeros(EXPERTS)).train()
    plain = make(name, 6, EXPERTS, **CASES[name]).train()
    plain.weight = router.weight
    context = RoutingContext(noise_key=("gate", 1), temperature=0.7)
    one, other = router(x, context), plain(x, context)
    assert torch.equal(dense(one)[0], dense(other)[0])
    assert plain.balancing is None and list(plain.state_dict()) == ["weight"]


@NAME
def test_gradients(name):
    torch.manual_seed(4)
    assert gradients_are_right(biased(name).eval(), torch.randn(7, 6, dtype=torch.float64))


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    """Loads 3, 1, 2 of mean 2: minus, plus and nothing; then 6, 0, 0: minus, plus, plus, less their mean."""
    balancing = LoadBias(3, Balance.bias, 0.01)
    for load, step in (
        ([3.0, 1, 2], [-1.0, 1, 0]),
        ([6.0, 0, 0], [-4 / 3, 2 / 3, 2 / 3]),
        ([0.0, 0, 0], [0.0] * 3),
    ):
        before = balancing.bias_E.clone()
        balancing.commit(torch.tensor(load))
        assert torch.allclose(balancing.bias_E, before + 0.01 * torch.tensor(step), atol=1e-7)


@NAME
def test_the_quantile_is_that_of_the_formula(name):
    """From all numbers of all batches, sorted: the k / E of the tokens over which a score is by the most."""
    torch.manual_seed(5)
    router = biased(name, "quantile").train()
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (300, 40)]
    context = RoutingContext(hard=True, noise_key=("gate", 1), temperature=1e4)  # noise hardly matters
    scores, masks = [], []
    for x in batches:
        routing = router(x, context)
        if name == "dts":
            logits = x @ router.weight.t()
            gumbel = -(-context.uniform(logits).clamp(1e-300).log()).log()
            scores.append(((logits + gumbel) / 1e4).softmax(-1).detach())
        else:
            scores.append(routing.probability_TE.detach())
        masks.append(dense(routing)[1])
    end_update(router)
    score, mask = torch.cat(scores), torch.cat(masks)
    limit = (score + BIAS).masked_fill(mask, -9).max(1).values
    count = mask.sum().item() / EXPERTS
    found = []
    for e in range(EXPERTS):
        ordered = sorted((score[:, e] - limit).tolist(), reverse=True)
        found.append(-ordered[int(count) - 1])
    expected = torch.tensor(found) - sum(found) / EXPERTS
    assert (router.balancing.bias_E - expected).abs().max() < 0.02
    assert router.balancing.bias_E.sum().abs() < 1e-6


@HOW
@NAME
def test_loads_become_even(name, how):
    """The same tokens again and again, which a skewed gate sends to few experts."""
    torch.manual_seed(6)
    options = {"balance_rate": 0.005} if how == "bias" else {}
    router = biased(name, how, bias=torch.zeros(EXPERTS), **options).train()
    x = torch.randn(500, 6, dtype=torch.float64) + 0.8 * router.weight[2].detach()

    def violation():
        context = RoutingContext(hard=True, noise_key=("gate", 1))
        load = router(x, context).load_E()
        end_update(router)
        return float(load.max() / load.mean() - 1)

    found = [violation() for _ in range(150 if how == "bias" else 40)]
    # how many experts top-p takes depends on their order, which the quantile takes to be as it was
    assert found[0] > 0.5 and sum(found[-5:]) / 5 < (0.35 if (name, how) == ("top-p", "quantile") else 0.2)


@HOW
@NAME
def test_only_training_on_tokens_changes_it(name, how):
    router = biased(name, how)
    router.eval()(torch.randn(9, 6, dtype=torch.float64), RoutingContext())
    end_update(router)
    router.train()(torch.zeros(0, 6, dtype=torch.float64), RoutingContext())
    end_update(router)
    assert torch.equal(router.balancing.bias_E, BIAS)


@HOW
@pytest.mark.parametrize("training", [True, False])
@NAME
def test_it_is_causal(name, training, how):
    torch.manual_seed(7)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert is_causal(biased(name, how).train(training), x, temperature=0.7)


def test_the_bias_is_float32_in_a_layer_of_half_precision():
    layer = MoELayer(6, 8, EXPERTS, "switch", spawned=True, balance="bias").to(torch.bfloat16)
    assert layer.router.balancing.bias_E.dtype == torch.float32
    layer(torch.randn(7, 6, dtype=torch.bfloat16))
    end_update(layer)
    assert layer.router.balancing.bias_E.any()


@pytest.mark.parametrize("theirs, ours, option", [("loss", "bias", "loss"), ("quantile", "loss", "bias")])
def test_a_state_with_a_bias_and_one_without_are_told_apart(theirs, ours, option):
    layer, state = (MoELayer(6, 8, 4, "topk", spawned=True, balance=how) for how in (ours, theirs))
    with pytest.raises(StateMismatch) as error:
        layer.load_state_dict(state.state_dict())
    refused(error, f"`balance` {option}, but the model's {ours}", f"give `balance` {option}")


RUN = {"max_update": 1000, "ffn_dims": [64]}


@HOW
@pytest.mark.parametrize("router", CASES)
def test_a_default_weight_is_none_and_a_given_one_is_refused(router, how):
    config = resolve({"router": router, "balance": how}, **RUN)
    assert config.loss_weights()["balance"] == 0
    cfg = type("Model", (), {})()
    write_back(cfg, config)
    assert resolve(given_options(cfg), **RUN).flat() == config.flat()  # what a checkpoint says is taken
    with pytest.raises(ConfigError) as error:
        resolve({"router": router, "balance": how, "balance_weight": 0.01}, **RUN)
    refused(error, f"--moe-balance {how} keeps", "--moe-balance-weight is 0.01: leave one of them out")
    with pytest.raises(ConfigError, match="--moe-balance-weight is 0.1"):
        resolve({"preset": "evomoe_context", "balance": how}, **RUN)


@given(
    values=st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=40),
    share=st.floats(0, 1),
    parts=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_a_quantile_is_within_a_bin_of_that_of_all_values(values, share, parts):
    histogram = Histogram(-1.0, 1.0, 64)
    column = torch.tensor(values).unsqueeze(1)
    counts = sum(histogram.counts(column[part::parts].repeat(1, 2)) for part in range(parts))
    assert counts.shape == (2, 64) and counts.sum() == 2 * len(values)
    found = histogram.exceeded_by(torch.tensor(share), counts)
    assert found[0] == found[1]
    over = [v > found[0].item() + 2 / 64 for v in values if v <= 1]
    under = [v < found[0].item() - 2 / 64 for v in values if v >= -1]
    assert sum(over) <= share * len(values) + 1e-3 and sum(under) <= (1 - share) * len(values) + 1e-3
