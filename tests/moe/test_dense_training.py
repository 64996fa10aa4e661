"""DS-MoE: all experts in training, few in evaluation, and the loss that lets few be enough."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.losses import mutual_information_loss
from support.router_checks import close, dense, entropy, make, softmax

OPTIONS = resolve({"preset": "ds_moe", "experts": 4}).router_options


def tokens(count=40):
    torch.manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64)


def reference(rows):
    """The loss of lists of probabilities."""
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    return sum(map(entropy, rows)) / len(rows) - entropy(mean)


@pytest.mark.parametrize("name", ["dts", "switch", "topk", "top-p", "dtop-p", "laplace", "xmoe"])
def test_the_loss_is_that_of_the_gate(name):
    x, router = tokens(), make(name, 6, 5).eval()
    rows = [softmax(row) for row in router.logits(x, RoutingContext()).tolist()]
    assert close(router(x, RoutingContext()).losses["mutual_information"], reference(rows))
    assert "mutual_information" not in router(x, RoutingContext(losses={"balance"})).losses


def test_what_it_is_of_known_distributions():
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)  # each token has an expert, and each expert three
    assert close(mutual_information_loss(even), -math.log(4))
    same = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).expand(5, 3)
    assert close(mutual_information_loss(same), 0.0)
    assert close(mutual_information_loss(even[:2]), -math.log(2))  # two experts without any
    assert close(mutual_information_loss(even[:0]), 0.0)


def test_its_gradient():
    logits = tokens(7).requires_grad_()
    loss = lambda z: mutual_information_loss(z.softmax(1))  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logits,))
    for _ in range(200):  # it makes the gate confident and even at once
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        logits = (logits - 5 * gradient).detach().requires_grad_()
    assert logits.softmax(1).amax(1).min() > 0.9
    assert loss(logits) < -0.8 * math.log(6)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 9), experts=st.integers(1, 6), scale=st.sampled_from([0.0, 1.0, 100.0, 1e6]))
def test_it_is_between_minus_log_e_and_0(rows, experts, scale):
    logits = (scale * torch.randn(rows, experts, dtype=torch.float64)).requires_grad_()
    loss = mutual_information_loss(logits.softmax(1))
    assert -math.log(experts) - 1e-9 <= loss.item() <= 1e-9
    loss.backward()
    assert torch.isfinite(logits.grad).all()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9),
    experts=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    temperature=st.sampled_from([0.05, 1.0]),
    data=st.data(),
)
def test_all_experts_in_training_and_k_in_evaluation(rows, experts, scale, temperature, data):
    k = data.draw(st.integers(1, experts))
    router = make("dts", 3, experts, threshold=0.0, hard_experts=k).float()
    x, context = scale * torch.randn(rows, 3), RoutingContext(temperature=temperature)
    p = router.logits(x, context).softmax(1).double()
    weight, mask = dense(router.train()(x, context))
    assert mask.all() and mask.shape == (rows, experts)  # probabilities that are rounded to 0, too
    assert torch.equal(weight, p.detach())  # without noise or temperature
    weight, mask = dense(router.eval()(x, context))
    assert (mask.sum(1) == k).all()
    assert torch.equal(weight.sort(1, descending=True).values[:, :k], p.detach().topk(k).values)


def test_the_preset_is_a_dense_soft_stage_without_an_end():
    config = resolve({"preset": "ds_moe", "experts": 4}, max_update=100)
    schedule = config.make_schedule()
    assert math.isinf(schedule.hard_after) and config.latest_spawn == 0
    assert {schedule.temperature(update) for update in (0, 50, 10**6)} == {1.0}
    router = make("dts", 6, 4, **vars(OPTIONS))
    assert router.loss_weights["mutual_information"] == 0.01
    context = RoutingContext(temperature=1.0)
    assert dense(router.train()(tokens(), context))[1].all()
    assert (dense(router.eval()(tokens(), context))[1].sum(1) == 2).all()


def test_inference_by_a_threshold():
    x, router = tokens(), make("dts", 6, 5, threshold=0.2, eval_routing="adaptive").eval()
    p = router.logits(x, RoutingContext()).softmax(1)
    mask = dense(router(x, RoutingContext()))[1]
    assert torch.equal(mask, (p > 0.2).scatter(1, p.argmax(1, keepdim=True), True))
    assert 1 < mask.double().sum(1).mean() < 5
