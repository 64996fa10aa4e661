"""Under ``torch.use_deterministic_algorithms`` nothing is asked of a GPU that it refuses then."""

import pytest
import torch
from torch.utils import _python_dispatch as python_dispatch

from fairseq_evomoe.moe import ROUTERS, MoELayer, RoutingContext, Vocabulary, record
from fairseq_evomoe.moe.dispatch import local
from fairseq_evomoe.moe.running_sums import running_sums

pytestmark = pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason="PyTorch before 2.1, whose modes are others"
)
aten = torch.ops.aten
DIM, EXPERTS, TOKENS, V = 8, 4, 48, 17
OPTIONS = {
    "switch": [{"balance": "bias"}],
    "topk": [{"balance": "quantile"}, {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}],
    "top-p": [{"balance": "bias"}],
    "comet": [{"leaf_search": 1000}],
}
CASES = [(name, options) for name in ROUTERS for options in ({}, *OPTIONS.get(name, ()))]


class Refuse(getattr(python_dispatch, "TorchDispatchMode", object)):
    """Fails at what PyTorch's documentation says it refuses on a GPU, of what could be met here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_floats = bool(args) and torch.is_tensor(args[0]) and args[0].dtype.is_floating_point
        weighted = len(args) > 1 and args[1] is not None or kwargs.get("weights") is not None
        refused = {
            aten.cumsum: of_floats,
            aten.bincount: weighted,
            aten.scatter_reduce: "prod" in args,
            **dict.fromkeys((aten.put_, aten.histc, aten.kthvalue, aten.nll_loss2d_forward), True),
        }
        packet = function.overloadpacket
        assert not refused.get(packet, False) and function is not aten.median.dim, function
        return function(*args, **kwargs)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def step(layer, update):
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(TOKENS, DIM, generator=generator).requires_grad_()
    sequence, token = torch.arange(TOKENS) // 12, torch.arange(TOKENS) % V
    context = RoutingContext(noise_key=("gate", update), hard=update > 0)
    with record() as routings:
        y = layer(x, context, tokens=token, sequences=sequence, residual=x)
    layer.zero_grad()
    (layer.finish(y + x).square().sum() + routings.auxiliary_loss()).backward()
    for module in layer.modules():
        if hasattr(module, "drain"):
            module.commit(module.drain())
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_a_step_of_any_router(name, options, deterministic, monkeypatch):
    """By PyTorch's operations, as on a GPU without Triton; twice the same."""
    monkeypatch.setattr(local, "_can_fuse", lambda x, experts: False)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        vocabulary = Vocabulary(V, torch.ones(V))
        layer = MoELayer(DIM, 16, EXPERTS, name, spawned=True, vocabulary=vocabulary, **options).train()
        with Refuse():
            runs.append(step(layer, 0) + step(layer, 1))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_what_would_be_refused_is_noticed():
    with Refuse(), pytest.raises(AssertionError, match="cumsum"):
        torch.rand(3).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_sums_are_those_of_floating_point(dtype, deterministic):
    torch.manual_seed(0)
    share_TE = torch.randn(50, 7).to(dtype).softmax(-1)
    assert torch.allclose(running_sums(share_TE), share_TE.cumsum(-1), rtol=0, atol=2e-7)
    assert running_sums(share_TE).dtype == dtype
    fourths = torch.full((1, 4), 0.25, dtype=dtype)
    assert running_sums(fourths).tolist() == [[0.25, 0.5, 0.75, 1.0]]
