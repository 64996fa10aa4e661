"""A gate that learns before there are experts."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_evomoe.moe import ROUTERS, MoELayer, RoutingContext, Vocabulary, record
from fairseq_evomoe.moe.gate_warmup import GateWarmup, check_gate
from fairseq_evomoe.moe.losses import mutual_information_loss
from fairseq_evomoe.moe.options import OptionError
from support.rank_threads import on_ranks
from support.router_checks import end_update

DIM, EXPERTS = 6, 4


def make(router="switch", **options):
    torch.manual_seed(0)
    layer = MoELayer(DIM, 10, EXPERTS, router, vocabulary=Vocabulary(9, torch.ones(9), 5), **options)
    layer.warmup = GateWarmup(layer)
    return layer


def batch(seed, tokens=64):
    """Tokens of four kinds, which a gate can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    kinds = 2 * torch.randn(4, DIM, generator=torch.Generator().manual_seed(9))
    kind = torch.randint(4, (tokens,), generator=generator)
    return kinds[kind] + 0.3 * torch.randn(tokens, DIM, generator=generator)


WARM = RoutingContext(warm_up=True)


def test_it_is_adam_on_the_mutual_information_of_every_fourth_token():
    layer = make()
    gate = torch.nn.Parameter(layer.make_router().weight.detach().double())
    adam = torch.optim.Adam([gate], lr=0.003, betas=(0.9, 0.98))
    for update in range(5):
        x = batch(update, 30)
        layer(x, WARM)
        end_update(layer)
        adam.zero_grad()
        mutual_information_loss((x[::4].double() @ gate.t()).softmax(-1)).backward()
        adam.step()
        assert torch.allclose(layer.warmup.gate_K.view(EXPERTS, DIM).double(), gate, atol=1e-5)
    assert layer.warmup.updates == 5


def test_nothing_else_depends_on_it_and_the_spawn_takes_it():
    layer, other = make(), make()
    x = batch(1).requires_grad_()
    state = torch.get_rng_state()
    for _ in range(150):
        y = layer(x, WARM)
        end_update(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, other(x, RoutingContext())) and not list(layer.warmup.parameters())
    end_update(other)
    assert other.warmup.updates == 0
    layer.eval()(x, WARM)
    end_update(layer)
    assert layer.warmup.updates == 150
    learned = layer.warmup.gate_K.view(EXPERTS, DIM).clone()
    layer.train()
    losses = []
    for each in (layer, other):
        each.spawn()
        with record() as routings:
            each(x, RoutingContext())
        losses.append(mutual_information_loss(routings[each].probability_TE))
    assert torch.equal(layer.router.weight, learned) and layer.warmup is None
    assert losses[0] < losses[1] - 0.5  # of log 4 = 1.4 at most


@pytest.mark.parametrize(
    "options",
    [
        {"router": "dts", "gate_input": "both"},
        {"router": "dts", "gate_input": "table"},
        {"router": "topk", "zero_experts": 1, "heads": 2},
        {"router": "dtop-p"},
        {"router": "remoe"},
    ],
    ids=str,
)
def test_whatever_a_gate_sees(options):
    layer = make(**options)
    first = layer.warmup.gate_K.clone()
    x, tokens = torch.randn(2, 9, DIM), torch.randint(9, (2, 9))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 4:] = True
    embeddings = torch.randn(9, 5)[tokens]
    layer(x, WARM, padding, tokens=tokens, embeddings=embeddings)
    end_update(layer)
    assert not torch.equal(layer.warmup.gate_K, first)
    learned = layer.warmup.gate_K.clone()
    state = copy.deepcopy(layer.state_dict())
    again = make(**options)
    again.load_state_dict(state)
    assert torch.equal(again.warmup.gate_K, learned) and again.warmup.updates == 1
    again.spawn()
    assert torch.equal(torch.nn.utils.parameters_to_vector(again.router.parameters()), learned)
    plain = MoELayer(DIM, 10, EXPERTS, vocabulary=Vocabulary(9, torch.ones(9), 5), **options)
    plain.load_state_dict(state)  # it is measured in vain
    spawned = MoELayer(DIM, 10, EXPERTS, vocabulary=Vocabulary(9, torch.ones(9), 5), spawned=True, **options)
    spawned.load_state_dict(state)
    assert torch.equal(torch.nn.utils.parameters_to_vector(spawned.router.parameters()), learned)


def test_ranks_learn_as_one():
    x = batch(3, 40)
    alone = make()
    alone(x, WARM)
    end_update(alone)
    layers = [make(), make()]

    def run(ranks, part):
        layers[ranks.rank].ranks = ranks
        layers[ranks.rank](part, WARM)

    on_ranks(run, [x[:13], x[13:]])
    sums = [layer.warmup._sums_K for layer in layers]
    assert all(part is not None for part in sums)
    end_update(*layers)
    # threads leave out that the gradient of a sum over ranks is added up over them, which Adam does not mind
    for layer in layers:
        assert torch.allclose(layer.warmup.gate_K, alone.warmup.gate_K, atol=1e-5)


LINEAR = "default-moe dtop-p dts expert-choice expert-threshold laplace remoe switch top-p topk".split()


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_only_linear_gates_learn(router):
    if router in LINEAR:
        return check_gate(ROUTERS[router])
    with pytest.raises(OptionError, match=f"`gate_warmup` .* `router` {router} has not: leave it out"):
        check_gate(ROUTERS[router])


def test_checkpointed_activations_are_recomputed_once():
    """Not a second time, for the gate's own gradient within the forward pass."""
    layer, plain, passes = make(), make(), []
    x = batch(1).requires_grad_()

    def run(x):
        passes.append(1)
        return layer(1.0 * x, WARM).relu()

    y = checkpoint(run, x, use_reentrant=False)
    assert len(passes) == 1
    y.sum().backward()
    assert len(passes) == 2
    grad, x.grad = x.grad, None
    plain(1.0 * x, WARM).relu().sum().backward()
    assert torch.equal(grad, x.grad)
