"""The moe_* statistics, and what the auxiliary loss does and does not touch."""

import math

import pytest
import torch
from fairseq.logging import metrics

from fairseq_evomoe.moe import record
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.tasks import PLAIN

NAMES = (
    "experts",
    "temperature",
    "phase",
    "balance",
    "load_entropy",
    "load_max",
    "gate_entropy",
    "dropped",
    "active_params",
)
GROWN = {**LM, "moe_spawn_update": 0, "dropout": 0.0}


def forward(setup, batch, update=0):
    """One training batch at an update: loss, sample size, logging output."""
    setup.model.train().set_num_updates(update)
    return setup.criterion(setup.model, batch)


def reduced(setup, logs):
    """What fairseq reports of some logging outputs."""
    with metrics.aggregate(new_root=True) as meters:
        setup.criterion.reduce_metrics(logs)
    return {name: meter.val for name, meter in meters.items() if hasattr(meter, "val")}


@pytest.mark.parametrize("settings", [LM, MASKED_LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_every_log_has_them(settings, trained, request):
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    result = trained(settings)
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        for line in result.log(tag):
            assert all(f"{prefix}moe_{name}" in line for name in NAMES)
    first = result.log("train_inner")[0]
    dense = build(data, **settings).model  # as it is before the spawn
    expected = {
        "dropped": 0,
        "active_params": sum(p.numel() for p in dense.parameters()),
        "experts": 1,
        "temperature": 2,
        "phase": 0,
        "balance": 1,
        "load_entropy": 1,
        "load_max": 1,
        "gate_entropy": 0,
    }
    assert {name: first["moe_" + name] for name in NAMES} == expected


def test_exact_values(lm_data):
    """Against the formulas, in plain loops, for one batch in the soft stage."""
    options = {
        "moe_temperature_end": 0.1,
        "moe_anneal_updates": 10,
        "moe_hard_update": -1,
        "moe_threshold": 0.05,
    }
    setup = build(lm_data, **{**GROWN, **options})
    batch = setup.batches()[-1]
    with record() as routings:
        _, _, log = forward(setup, batch, update=5)
    values = reduced(setup, [log])

    moe = setup.model.decoder.layers[1].moe
    routing, tokens = routings[moe], int(batch["ntokens"])
    pairs = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist()))
    assert len({pair[0] for pair in pairs}) == tokens and len(pairs) > tokens
    share = [sum(e == expert for _, e, _ in pairs) / len(pairs) for expert in range(4)]
    gate = [sum(w for _, e, w in pairs if e == expert) / tokens for expert in range(4)]
    mask = [sum(e == expert for _, e, _ in pairs) / tokens for expert in range(4)]
    expected = {
        "moe_experts": len(pairs) / tokens,
        "moe_temperature": 2.0 - 0.5 * 1.9,
        "moe_phase": 1,
        "moe_balance": 16 * sum(g * m for g, m in zip(gate, mask)) / 4,
        "moe_load_entropy": -sum(s * math.log(s) for s in share if s) / math.log(4),
        "moe_load_max": max(share),
    }
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(value, rel=1e-5), name
    assert 0 < values["moe_gate_entropy"] < math.log(4)

    routed = setup.model.decoder.layers[1].moe.experts
    expert = 2 * 32 * 48 + 48 + 32
    assert sum(p.numel() for p in routed.parameters()) == 4 * expert
    others = sum(p.numel() for p in setup.model.parameters()) - 4 * expert
    assert float(values["moe_active_params"]) == pytest.approx(others + expert * len(pairs) / tokens)


@pytest.mark.parametrize(
    "options, table",
    [
        ({"moe_gate_input": "table"}, "token_weight"),
        ({"moe_router": "switch", "moe_gate_input": "table"}, "token_weight"),
        ({"moe_router": "stable", "moe_stable_update": 1, "moe_light_dim": 7}, "embedding_VL"),
        ({"moe_gate_input": "token"}, None),
        ({"moe_router": "hash"}, None),
    ],
    ids=str,
)
def test_a_table_that_is_looked_up_is_not_active(options, table, lm_data):
    """A token takes a row of it, and multiplies it with nothing; its size is told beside."""
    setup = build(lm_data, **{**LM, **PLAIN, **options})
    router = setup.model.decoder.layers[1].moe.router
    parameters = dict(router.named_parameters())
    size = parameters[table].numel() if table else 0
    values = reduced(setup, [forward(setup, batch)[2] for batch in setup.batches()[:2]])
    expert = 2 * 32 * 48 + 48 + 32
    others = sum(p.numel() for p in setup.model.parameters()) - 4 * expert - size
    active = others + expert * float(values["moe_experts"])
    assert float(values["moe_active_params"]) == pytest.approx(active)
    assert ("moe_table_params" in values) == (size > 0)
    assert size == 0 or float(values["moe_table_params"]) == size


def test_gate_entropy_is_that_of_the_plain_logits(lm_data):
    setup = build(lm_data, **GROWN, moe_gate_input="hidden")
    moe = setup.model.decoder.layers[1].moe
    seen = []
    moe.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[2])))
    _, _, log = forward(setup, setup.batches()[0])
    ((x, padding),) = seen
    x = x[~padding] if padding is not None else x.reshape(-1, x.shape[-1])
    probability = (x.double() @ moe.router.weight.double().t()).softmax(-1)
    expected = -(probability * probability.log()).sum(-1).mean()
    assert float(reduced(setup, [log])["moe_gate_entropy"]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [GROWN, {**TRANSLATION, "moe_spawn_update": 0}], ids=lambda s: s["task"])
def test_aggregation_over_batches_is_that_of_all_tokens(settings, request):
    """--update-freq and workers: token means are means over all tokens, however they are split."""
    data = request.getfixturevalue("translation_data" if settings["task"] == "translation" else "lm_data")
    setup = build(data, **settings)
    logs = [forward(setup, batch)[2] for batch in setup.batches()[-3:]]
    each = [reduced(setup, [log]) for log in logs]
    whole = reduced(setup, logs)
    tokens = [float(log["moe_tokens"]) for log in logs]
    for name in ("moe_experts", "moe_balance", "moe_gate_entropy"):
        mean = sum(n * float(values[name]) for n, values in zip(tokens, each)) / sum(tokens)
        assert float(whole[name]) == pytest.approx(mean, rel=1e-5), name
    load = sum(log["moe_load"] for log in logs)
    share = load / load.sum(1, keepdim=True)
    assert float(whole["moe_load_max"]) == pytest.approx(share.max(1).values.mean().item(), rel=1e-5)
    assert whole["moe_phase"] == 1 and whole["moe_temperature"] == 2

    # as the workers of a data-parallel run add them up
    summed = {key: sum(log[key] for log in logs) for key in logs[0]}
    for name in NAMES:
        assert float(reduced(setup, [summed])["moe_" + name]) == pytest.approx(
            float(whole["moe_" + name]), rel=1e-5
        )


def test_what_a_capacity_drops(lm_data):
    settings = {**GROWN, "moe_router": "switch", "moe_capacity_factor": 0.5}
    setup = build(lm_data, **settings)
    _, _, log = forward(setup, setup.batches()[-1])
    tokens, kept = log["moe_tokens"], log["moe_assignments"]
    assert 0 < kept <= 4 * math.ceil(0.5 * tokens / 4)
    values = reduced(setup, [log])
    assert values["moe_dropped"] == tokens - kept
    assert reduced(setup, [log, log])["moe_dropped"] == 2 * (tokens - kept)


def test_update_freq_reports_the_whole_update(lm_data, tmp_path):
    one = call("fairseq-train", lm_data, save_dir=tmp_path / "1", **{**LM, "dropout": 0.0, "batch_size": 16})
    two = call("fairseq-train", lm_data, save_dir=tmp_path / "2", update_freq=2, **{**LM, "dropout": 0.0})
    ours, theirs = (each.log("train_inner") for each in (two, one))
    assert [step["moe_phase"] for step in ours] == [step["moe_phase"] for step in theirs]
    # with one expert everything else is exact, too
    assert all(step["moe_experts"] == step["moe_load_max"] == 1 for step in ours[:6])
    assert 3.9 < ours[6]["moe_experts"] <= 4


def test_the_reported_loss_has_no_auxiliary_loss(lm_data, tmp_path):
    settings = {**LM, "moe_spawn_update": 0, "moe_hard_update": 0, "max_update": 1}
    settings.update(moe_gate_input="hidden", moe_renormalize="never")  # whose gradient is large
    results = [
        call("fairseq-train", lm_data, save_dir=tmp_path / str(weight), moe_balance_weight=weight, **settings)
        for weight in (0.0, 1000.0)
    ]
    plain, heavy = (result.log("train_inner")[0] for result in results)
    for name in ("loss", "ppl", "moe_balance", "wpb"):
        assert plain[name] == heavy[name], name
    assert heavy["gnorm"] > 100 * plain["gnorm"]


@pytest.mark.parametrize(
    "task", [GROWN, {**TRANSLATION, "moe_spawn_update": 0, "dropout": 0.0}], ids=lambda s: s["task"]
)
def test_the_auxiliary_loss_has_its_weight_in_the_gradient(task, request):
    """gradient(w) - gradient(0) = w * sample_size * gradient of the sum of the layers' losses."""
    data = request.getfixturevalue("translation_data" if task["task"] == "translation" else "lm_data")

    def gradients(weight, auxiliary_only=False):
        # not in the dense stage, in which the loss is constant
        setup = build(data, moe_balance_weight=weight, **{**task, "moe_freq": 1, "moe_hard_update": 0})
        torch.manual_seed(3)
        with record() as routings:
            loss, sample_size, log = forward(setup, setup.batches()[0])
        if auxiliary_only:
            loss = 0.5 * sample_size * sum(routing.losses["balance"] for routing in routings.values())
        loss.backward()
        zero = torch.zeros(())
        found = {name: zero if p.grad is None else p.grad for name, p in setup.model.named_parameters()}
        return found, float(log["loss"])

    heavy, loss = gradients(0.5)
    plain, plain_loss = gradients(0.0)
    auxiliary, _ = gradients(0.0, auxiliary_only=True)
    assert loss == plain_loss
    for name in plain:
        assert torch.allclose(heavy[name], plain[name] + auxiliary[name], rtol=1e-3, atol=1e-3), name
    assert any(grad.abs().max() > 0.01 for grad in auxiliary.values())


def test_evaluation_adds_no_auxiliary_loss(lm_data):
    setup = build(lm_data, **{**GROWN, "moe_balance_weight": 100.0})
    setup.model.eval()
    loss, _, log = setup.criterion(setup.model, setup.batches()[0])
    assert loss.item() == log["loss"].item()


def test_a_layer_that_layerdrop_skips_reports_nothing(lm_data):
    setup = build(lm_data, **{**GROWN, "moe_freq": 1, "decoder_layers": 6, "decoder_layerdrop": 0.5})
    torch.manual_seed(1)
    _, _, log = forward(setup, setup.batches()[0])
    used = (log["moe_load"].sum(1) > 0).sum().item()
    assert 0 < used < 6
    assert float(log["moe_tokens"]) == used * int(log["ntokens"])
    values = reduced(setup, [log])
    assert 1 <= values["moe_experts"] <= 4 and values["moe_load_entropy"] > 0.5
