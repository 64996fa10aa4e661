"""The layer as a PyTorch library: made by one call, spawned by another, without fairseq."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq_evomoe.moe import MoELayer, Vocabulary, record
from fairseq_evomoe.moe import plan as plans
from fairseq_evomoe.moe.options import OptionError

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments, **options):
    torch.manual_seed(0)
    return MoELayer(6, 10, 4, *arguments, **options)


def test_the_example_learns_without_fairseq():
    code = """
import runpy, sys
sys.modules["fairseq"] = None  # as if it were not installed
runpy.run_path("examples/python/layer.py", run_name="__main__")
print([name for name in sys.modules if name.startswith("fairseq.")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    found = [re.fullmatch(r"update (\d+): loss ([\d.]+), ([\d.]+) experts a token", line) for line in lines]
    losses = {int(match[1]): float(match[2]) for match in found}
    experts = {int(match[1]): float(match[3]) for match in found}
    assert experts[200] == 1 and experts[300] > 2 and experts[600] == 1
    assert losses[600] < 0.75 * losses[200]


def test_the_first_expert_begins_as_linear_layers():
    layer = make()
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
    x = torch.randn(5, 6)
    assert torch.allclose(layer(x), fc2(torch.relu(fc1(x))), atol=1e-6)
    assert [p.shape for p in layer.parameters()] == [(10, 6), (10,), (10, 6), (1, 6)]


@pytest.mark.parametrize("gated", [False, True])
def test_experts_from_the_start_have_weights_of_their_own(gated):
    layer = make(spawned=True, gated=gated)
    for name, tensor in layer.experts.tensors().items():
        rows = tensor.split(1 if name == "b2" else 10)
        bound = 10**-0.5 if name in ("w2", "b2") else 6**-0.5
        assert len({row.sum().item() for row in rows}) == 4 and 0.7 * bound < tensor.abs().max() <= bound
    y = layer(torch.randn(2, 3, 6))
    assert y.shape == (2, 3, 6) and layer.spawned


def test_a_spawn_depends_on_its_arguments_and_the_layers_number_alone():
    def spawned(*arguments, number=0, **options):
        layer = make(number=number)
        torch.manual_seed(len(arguments) + 5)
        layer.spawn(*arguments, **options)
        return layer.state_dict()

    def equal(one, other):
        return {key for key in one if torch.equal(one[key], other[key])}

    plain = spawned()
    keys = set(plain)
    assert equal(plain, spawned("mask")) == equal(plain, spawned("mask", 0.1)) == keys
    assert equal(plain, spawned(seed=1)) == keys
    for other in (spawned(seed=2), spawned(number=1)):
        assert "experts.w1" not in equal(plain, other) and "router.weight" not in equal(plain, other)
    for other in (spawned("mask", 0.5), spawned("noise")):
        assert "experts.w1" not in equal(plain, other) and "router.weight" in equal(plain, other)
    base = make().experts.w1
    assert torch.equal(spawned("copy")["experts.w1"], base.repeat(4, 1))


def test_experts_of_other_widths_are_slices_unless_another_method_is_named():
    layer = make(widths=[5, 10, 10, 15])
    layer.spawn()
    assert layer.experts.widths == [5, 10, 10, 15] and layer.spawner.method_name == "slice"
    with pytest.raises(OptionError, match="`spawn_method` copy makes experts of 10"):
        make(widths=[5, 10, 10, 15]).spawn("copy")


def test_a_plan_can_be_made_before():
    layer, other = make(), make()
    plan = layer.plan_spawn()
    layer.spawn(plan=plan)
    other.spawn()
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values()))


def test_a_layer_without_a_context_computes_the_losses_that_have_a_weight():
    layer = make("topk", spawned=True, z_weight=0.5)
    with record() as routings:
        layer(torch.randn(5, 6))
    assert routings[layer].losses.keys() == {"balance", "z"}
    others = {"entropy": 0.0, "mutual_information": 0.0}
    assert layer.loss_weights == {"balance": 0.01, "z": 0.5, **others}


def test_dtype_device_and_mode_carry_over_to_what_spawns():
    layer = make(shared_expert=True, hyper_adapter=True).double().eval()
    layer.requires_grad_(False)
    layer.spawn()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in layer.named_parameters() if n.startswith(("experts.", "shared."))}
    assert not layer.router.training  # which is new, so that it can be trained, in a layer that is
    assert layer(torch.randn(5, 6).double()).dtype == torch.float64


def test_layers_of_a_stack_share_what_their_routers_share():
    shared = {}
    layers = [make("recurrent", number=i, shared=shared) for i in range(2)]
    for layer in layers:
        layer.spawn()
    assert layers[0].router.gru is layers[1].router.gru
    assert not torch.equal(layers[0].router.weight, layers[1].router.weight)


@pytest.mark.parametrize(
    "arguments, options, option, text",
    [
        (["no"], {}, "router", "There is no `router` no: choose one of base, "),
        ([], {"heads": 4}, "heads", "`heads` must divide the width 6, but is 4."),
        ([], {"jitter": -5.0, "spawned": True}, "jitter", "`jitter` must be "),
        ([], {"no": 1, "spawned": True}, "no", "`no` is no option here"),
        (["dts"], {"gate_input": "table", "spawned": True}, "gate_input", "needs the size of the vocabulary"),
    ],
)
def test_refused(arguments, options, option, text):
    with pytest.raises(OptionError, match=text) as error:
        make(*arguments, **options)
    assert error.value.option == option


def test_options_are_checked_before_the_experts_spawn():
    with pytest.raises(OptionError, match="`jitter`"):
        make(jitter=-5.0)
    with pytest.raises(OptionError, match="`top_k`"):
        make("topk", top_k=5)


def test_a_table_of_tokens():
    layer = make("hash", spawned=True, vocabulary=Vocabulary(11, torch.ones(11)))
    tokens = torch.tensor([3, 3, 7])
    with record() as routings:
        layer(torch.randn(3, 6), tokens=tokens)
    assert torch.equal(routings[layer].expert_N, layer.router.table_V[tokens])


def test_without_a_spawner_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(plans, "_spawners", {})
    with pytest.raises(RuntimeError, match="import fairseq_evomoe"):
        make()
