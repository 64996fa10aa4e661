"""Other implementations of experts on the same tokens, routing and sizes, with nothing dropped.

The layers that come with a gate of their own are given one that answers with the routing; their T x E x C
masks are made before the clock starts, which is in their favour.  Mixtral's experts have a third matrix
(SwiGLU), and are compared with ours that have one.  The experts of transformers and mixture-of-experts have
no biases; ours do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Callable, Iterator

import torch
from layer import Size, ffn_of, top
from timing import clean_up, in_words, interleave, peak_memory, ratios, step
from torch import nn

from fairseq_evomoe.moe import Experts, Hidden, Routing
from fairseq_evomoe.moe.dispatch.local import dispatch

PACKAGES = ["transformers", "st-moe-pytorch", "mixture-of-experts", "fairscale"]


@dataclass
class Problem:
    """Tokens with k experts each, and what the gradient of the output is.

    ``expert_TK`` and ``weight_TK`` are the routing as the peers want it.
    """

    size: Size
    experts: int
    x: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def make(cls, size: Size, experts: int, k: int) -> Problem:
        """Random top-k routing."""
        expert_TK = top(size, experts, k).nonzero()[:, 1].view(size.tokens, k)
        x = torch.randn(size.tokens, size.dim, **size.like, requires_grad=True)
        weight = torch.rand(size.tokens, k, **size.like, requires_grad=True)
        grad = torch.randn(size.tokens, size.dim, **size.like)
        return cls(size, experts, x, expert_TK.to(size.device), weight, grad)

    def step(self, forward: Callable[[], torch.Tensor], module: nn.Module) -> Callable[[], None]:
        """Forward and backward with the gradients of tokens, weights and parameters."""
        return step(forward, [self.x, self.weight_TK, *module.parameters()], self.grad)

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs as a T x E x C mask, C the greatest load, and the pair's number k at each place."""
        token = torch.arange(self.size.tokens).repeat_interleave(self.expert_TK.shape[1])
        expert = self.expert_TK.flatten()
        hot = nn.functional.one_hot(expert, self.experts)
        place = (hot.cumsum(0) - 1).gather(1, expert.unsqueeze(1)).squeeze(1)
        mask = torch.zeros(self.size.tokens, self.experts, int(hot.sum(0).max()))
        mask[token, expert, place] = 1.0
        k = torch.zeros_like(mask, dtype=torch.long)
        k[token, expert, place] = torch.arange(self.expert_TK.shape[1]).repeat(self.size.tokens)
        return mask, k

    def combine(self, mask: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The mask with each pair's weight, with gradient."""
        tokens, experts, capacity = mask.shape
        return self.weight_TK.gather(1, k.view(tokens, -1)).view_as(mask) * mask


def ours(p: Problem, gated: bool, bias: bool = True) -> Callable[[], None]:
    hidden = Hidden(nn.functional.silu) if gated else None
    experts = Experts(p.size.dim, [p.size.hidden] * p.experts, hidden, gated, bias).to(**p.size.like)
    for parameter in experts.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    token_N = torch.arange(p.size.tokens).repeat_interleave(p.expert_TK.shape[1]).to(p.size.device)

    def forward() -> torch.Tensor:
        routing = Routing(token_N, p.expert_TK.flatten(), p.weight_TK.flatten(), p.size.tokens, p.experts)
        return dispatch(p.x, routing, experts)

    return p.step(forward, experts)


def mask_loop(p: Problem) -> Callable[[], None]:
    """What is often written by hand: one dense FFN after another on its own tokens."""
    experts = nn.ModuleList(ffn_of(p.size) for _ in range(p.experts))

    def forward() -> torch.Tensor:
        y = torch.zeros_like(p.x)
        for e, ffn in enumerate(experts):
            token, k = (p.expert_TK == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, ffn(p.x[token]) * p.weight_TK[token, k].unsqueeze(1))
        return y

    return p.step(forward, experts)


def switch(p: Problem) -> Callable[[], None]:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    config = SwitchTransformersConfig(
        d_model=p.size.dim, d_ff=p.size.hidden, num_experts=p.experts, dropout_rate=0.0
    )
    experts = modeling.SwitchTransformersExperts(config).to(**p.size.like)
    if p.expert_TK.shape[1] != 1:
        raise NotImplementedError("one expert a token only")
    selected = nn.functional.one_hot(p.expert_TK, p.experts)
    return p.step(lambda: experts(p.x, selected, p.weight_TK), experts)


def mixtral(p: Problem, implementation: str) -> Callable[[], None]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    pairs, width = p.expert_TK.numel(), 3 * p.size.dim * p.size.hidden
    # a copy of the weights, and of their gradient, for each pair
    needed = 2 * p.x.element_size() * pairs * width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if p.x.is_cuda:
        memory = torch.cuda.get_device_properties(p.x.device).total_memory
    if implementation == "batched_mm" and needed > 0.4 * memory:
        raise MemoryError(f"not run, it would need {needed / 1e9:.0f} GB")
    config = MixtralConfig(
        hidden_size=p.size.dim, intermediate_size=p.size.hidden, num_local_experts=p.experts
    )
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(**p.size.like)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return p.step(lambda: experts(p.x, p.expert_TK, p.weight_TK), experts)


class _Answer(nn.Module):
    """In place of a gate: what ``answer`` returns."""

    def __init__(self, answer: Callable[[], tuple]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args, **kwargs) -> tuple:
        return self.answer()


def st_moe(p: Problem) -> Callable[[], None]:
    from st_moe_pytorch import MoE

    moe = MoE(dim=p.size.dim, num_experts=p.experts, experts=nn.ModuleList(_ffns(p)))
    mask, k = p.masks()
    zero = torch.zeros(())
    moe.gate = _Answer(lambda: (mask[None], p.combine(mask, k)[None], zero, zero))
    return p.step(lambda: moe(p.x[None])[0][0], moe)


def lucidrains(p: Problem) -> Callable[[], None]:
    from mixture_of_experts import MoE

    moe = MoE(dim=p.size.dim, num_experts=p.experts, hidden_dim=p.size.hidden, activation=nn.ReLU)
    mask, k = p.masks()
    zero = torch.zeros(())
    moe.gate = _Answer(lambda: (mask[None], p.combine(mask, k)[None], zero))
    return p.step(lambda: moe(p.x[None])[0][0], moe)


def fairscale(p: Problem) -> Callable[[], None]:
    from fairscale.nn.moe import MOELayer
    from torch import distributed

    if not distributed.is_initialized():
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mask, k = p.masks()
    zero = torch.zeros(())
    moe = MOELayer(_Answer(lambda: (zero, p.combine(mask, k), mask.bool())), nn.ModuleList(_ffns(p)))
    return p.step(lambda: moe(p.x.unsqueeze(1)).squeeze(1), moe)


def _ffns(p: Problem) -> Iterator[nn.Module]:
    return (ffn_of(p.size) for _ in range(p.experts))


# name -> contender; the first of each group is ours, with which the others are compared
GROUPS: list[dict[str, Callable[[Problem], Callable[[], None]]]] = [
    {
        "fairseq_evomoe, ReLU": lambda p: ours(p, gated=False),
        "loop over masks": mask_loop,
        "transformers, Switch": switch,
        "st-moe-pytorch": st_moe,
        "mixture-of-experts": lucidrains,
        "fairscale MOELayer": fairscale,
    },
    {
        "fairseq_evomoe, SwiGLU": lambda p: ours(p, gated=True),
        "transformers, Mixtral eager": lambda p: mixtral(p, "eager"),
        "transformers, Mixtral batched_mm": lambda p: mixtral(p, "batched_mm"),
        "transformers, Mixtral grouped_mm": lambda p: mixtral(p, "grouped_mm"),
    },
]

CASES = [(2048, 8, 1), (2048, 8, 2), (2048, 32, 1), (2048, 32, 2), (16, 8, 2)]


def compare(p: Problem, group: dict, repeats: int) -> list[dict]:
    """The rows of a table: ours first, then its peers, in units of ours."""
    functions, errors = {}, {}
    for name, build in group.items():
        try:
            functions[name] = build(p)
            functions[name]()  # what cannot run fails here
        except Exception as error:  # whatever it is, it belongs into the table
            functions.pop(name, None)
            errors[name] = in_words(error)
    times = interleave(functions, repeats)
    first = next(iter(group))
    rows = []
    for name in group:
        if name in errors:
            rows.append({"name": name, "error": errors[name]})
            continue
        figures = {"ratio": ratios(times, name, first), "ms": 1000 * times[name]["median"]}
        rows.append({"name": name, **figures, "mib": peak_memory(functions[name]), "times": times[name]})
    return rows


def run(repeats: int) -> dict:
    """All cases and groups."""
    cases = []
    for tokens, experts, k in CASES:
        for group in GROUPS:
            p = Problem.make(Size(tokens, 512, 1024), experts, k)
            rows = compare(p, group, repeats if tokens > 100 else 3 * repeats)
            cases.append({"case": f"T = {tokens}, E = {experts}, top-{k}", "rows": rows})
            for row in rows:
                figures = row.get("error") or {k: round(v, 2) for k, v in row["ratio"].items()}
                print("  {}, {}: {}".format(cases[-1]["case"], row["name"], figures), flush=True)
            clean_up()
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} is not installed")
    note = "d = 512, h = 1024, forward and backward; times in units of the first row's; {}".format(
        ", ".join(versions)
    )
    return {"note": note, "cases": cases}
