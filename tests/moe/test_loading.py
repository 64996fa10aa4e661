"""A state makes room and is copied; what does not fit is refused with the option that is to blame."""

import re
import time

import pytest
import torch

from fairseq_evomoe.evolution.spawn import Spawn
from fairseq_evomoe.moe import ROUTERS, MoELayer, RoutingContext, Vocabulary
from fairseq_evomoe.moe.gate_warmup import GateWarmup
from fairseq_evomoe.moe.loading import StateMismatch
from fairseq_evomoe.moe.plan import make_spawner
from fairseq_evomoe.moe.ranks import Ranks

VOCABULARY = Vocabulary(11, torch.ones(11), 5)


def make(router="dts", experts=4, spawned=False, dim=6, hidden=8, **options):
    torch.manual_seed(0)
    return MoELayer(dim, hidden, experts, router, spawned=spawned, vocabulary=VOCABULARY, **options)


def forbid(*_, **__):
    raise AssertionError("loading has drawn random numbers")


@pytest.mark.parametrize("kind", [{}, {"shared_expert": True, "hyper_adapter": True}, {"heads": 2}])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_with_one_expert_takes_the_state_of_many_and_draws_nothing(router, kind, monkeypatch):
    source = make(router, **kind)
    source.spawn("noise")
    state, layer = source.state_dict(), make(router, **kind)
    monkeypatch.setattr(type(source.router), "initialize", forbid)
    monkeypatch.setattr(Spawn, "plan", forbid)
    before = torch.get_rng_state()
    layer.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.spawned and state.keys() == layer.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in layer.state_dict().items())
    tokens, sequences = torch.arange(10).view(2, 5), torch.zeros(2, 5, dtype=torch.long)
    of_tokens = {"tokens": tokens, "sequences": sequences, "embeddings": torch.randn(2, 5, 5)}
    x = torch.randn(2, 5, 6)
    ours, theirs = (
        each.eval()(x, RoutingContext(hard=True, statistics=False), **of_tokens) for each in (layer, source)
    )
    assert torch.equal(ours, theirs)


def test_loading_takes_about_as_long_as_copying():
    """Spawning 16 experts takes several times as long."""
    source = make(experts=16, spawned=True, dim=512, hidden=2048)
    state, layer = source.state_dict(), make(experts=16, dim=512, hidden=2048)
    start = time.perf_counter()
    for tensor in state.values():
        tensor.clone()
    copying = time.perf_counter() - start
    start = time.perf_counter()
    layer.load_state_dict(state)
    loading = time.perf_counter() - start
    start = time.perf_counter()
    make(experts=16, dim=512, hidden=2048).spawn()
    spawning = time.perf_counter() - start
    assert loading < 8 * copying + 0.1 and loading < spawning


def refusal(source, layer):
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(StateMismatch) as error:
        layer.load_state_dict(source.state_dict())
    after = layer.state_dict()
    assert after.keys() == before.keys(), "a layer that refuses a state stays what it was"
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    return error.value.option, str(error.value)


@pytest.mark.parametrize("spawned", [False, True])
@pytest.mark.parametrize("theirs", ["hidden", "token", "both", "table"])
@pytest.mark.parametrize("ours", ["hidden", "token", "both", "table"])
def test_another_gate_input_is_named(ours, theirs, spawned):
    source = make(spawned=True, gate_input=theirs)
    layer = make(spawned=spawned, gate_input=ours)
    if ours == theirs:
        layer.load_state_dict(source.state_dict())
        return
    option, text = refusal(source, layer)
    assert option == "gate_input"
    assert f"`gate_input` {theirs}, but the model's {ours}: give `gate_input` {theirs}." in text
    assert "`router`" not in text


@pytest.mark.parametrize("spawned", [False, True])
@pytest.mark.parametrize(
    "theirs, ours, option, words",
    [
        ({"experts": 8}, {}, "experts", "8 experts in the layer, but `experts` is 4: give `experts` 8"),
        ({"router": "base"}, {}, "router", "give the `router` that it was trained with"),
        ({"widths": [16] * 4}, {}, "widths", "64 hidden units in all, but the model's 32"),
        ({"shared_expert": True}, {}, "shared_expert", "has a module shared in the layer, .*: give"),
        ({}, {"hyper_adapter": True}, "hyper_adapter", "has no module hyper_adapter in .*: leave out"),
    ],
)
def test_what_does_not_fit_is_named(theirs, ours, option, words, spawned):
    found, text = refusal(make(spawned=True, **theirs), make(spawned=spawned, **ours))
    assert found == option
    assert re.search(words, text), text


@pytest.mark.parametrize("spawned", [False, True])
def test_a_base_of_another_width_is_refused(spawned):
    option, text = refusal(make(hidden=16), make(spawned=spawned))
    assert option == "widths" and "16 hidden units in all, but the model's 8" in text


@pytest.mark.parametrize("method", ["mask", "cluster"])
def test_what_was_measured_for_other_experts_is_measured_anew(method, caplog):
    """The gate that warms up, and the tokens that are kept to be clustered."""

    def make(experts):
        spawner = make_spawner(experts=experts, method=method)
        layer = MoELayer(8, 16, experts, "switch", spawner=spawner)
        layer.warmup = GateWarmup(layer) if method == "mask" else None
        return layer

    small, same, large = make(16), make(16), make(32)
    with torch.no_grad():
        for buffer in small.buffers():
            buffer.add_(1)
    own = {key: x.clone() for key, x in large.state_dict().items()}
    same.load_state_dict(small.state_dict())
    assert not caplog.records and torch.equal(*(next(iter(x.buffers())) for x in (small, same)))
    large.load_state_dict(small.state_dict())
    (line,) = caplog.messages
    assert "measured anew" in line
    assert torch.equal(large.experts.w1, small.experts.w1)
    for key, tensor in large.state_dict().items():
        assert key.startswith("experts.") or torch.equal(tensor, own[key]), key


@pytest.mark.parametrize("router", ["hash", "switch"])
def test_all_experts_of_a_smaller_model_are_no_rank_s_own(router):
    """Of 4 experts a rank has 2, as many as the other model has in all."""
    vocabulary = Vocabulary(12, torch.ones(12))
    layer, small = (MoELayer(8, 16, n, router, spawned=True, vocabulary=vocabulary) for n in (4, 2))
    layer.attach_ranks(Ranks(2, 0, parallel=2))
    assert layer.experts.b2.shape[0] == 2
    own = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(own)
    with pytest.raises((StateMismatch, RuntimeError), match="2 experts|size mismatch"):
        layer.load_state_dict(small.state_dict())
