"""A batch whose routing is looked at again and again while a model trains: how far it drifts."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq import utils
from torch import Tensor, nn

from ..models.feed_forward import moe_layers
from ..moe import Routing, record

_TOKENS = 128

Choices = Dict[str, Optional[Dict[str, Any]]]
"""By layer, the first choice of each token and the mean weight of these; ``None``: it has no such thing."""


class Probe:
    """The first sentences of a batch.

    Attributes:
        net_input: what the model is given.
        tokens: by stack, the tokens that its layers route: without padding, sentence after sentence.

    Args:
        net_input: of a batch of fairseq's.
        pad: the index of padding.
    """

    def __init__(self, net_input: Dict[str, Any], pad: int) -> None:
        self.net_input = beginning(net_input, _TOKENS)
        looked_up = {name: self.net_input.get(name) for name in ("src_tokens", "prev_output_tokens")}
        self.tokens = {name: x[x.ne(pad)].tolist() for name, x in looked_up.items() if torch.is_tensor(x)}

    @classmethod
    def of_record(cls, saved: Dict[str, Any], pad: int) -> "Probe":
        """The inverse of ``as_record``."""
        return cls(
            {
                name: torch.tensor(value) if isinstance(value, list) else value
                for name, value in saved["net_input"].items()
            },
            pad,
        )

    def as_record(self, model: nn.Module) -> Dict[str, Any]:
        """Plain values, and the tokens by the names of the model's stacks."""
        net_input = {
            name: value.tolist() if torch.is_tensor(value) else value
            for name, value in self.net_input.items()
        }
        stacks = {name.partition(".")[0] for name, _ in moe_layers(model)}
        decoded = self.tokens.get("prev_output_tokens", self.tokens["src_tokens"])
        tokens = {stack: self.tokens["src_tokens"] if stack == "encoder" else decoded for stack in stacks}
        return {"net_input": net_input, "tokens": tokens}

    @torch.no_grad()
    def choices(self, model: nn.Module) -> Choices:
        """How the model routes it, as in evaluation; nothing of the model or of random numbers changes.

        All ranks that share experts must call this.
        """
        batch = utils.move_to_cuda(self.net_input) if next(model.parameters()).is_cuda else self.net_input
        with evaluated(model), record() as routings:
            model(**batch)
        return {
            name: _choices(routings[layer.moe]) if layer.moe in routings else None
            for name, layer in moe_layers(model)
        }


def is_batch(sample: Any) -> bool:
    """Whether a probe can be made of something: a batch of tokens, and nothing that JSON cannot say."""
    net_input = sample.get("net_input") if isinstance(sample, dict) else None
    if not isinstance(net_input, dict) or not torch.is_tensor(net_input.get("src_tokens")):
        return False
    if net_input["src_tokens"].dim() != 2 or net_input["src_tokens"].is_floating_point():
        return False
    return all(x is None or isinstance(x, (bool, int)) or torch.is_tensor(x) for x in net_input.values())


def drift(before: Optional[List[int]], now: List[int]) -> Optional[float]:
    """The share of tokens whose first choice has changed; ``None`` if there is nothing to compare with."""
    if before is None or len(before) != len(now) or not now:
        return None
    return sum(a != b for a, b in zip(before, now)) / len(now)


def beginning(inputs: Dict[str, Any], tokens: int) -> Dict[str, Any]:
    """The first sequences of a batch, on the CPU: of so many tokens at most, but at least one.

    Args:
        inputs: ``net_input`` of a batch of fairseq's.
        tokens: padding counts.
    """
    batch, length = inputs["src_tokens"].shape[:2]
    kept = min(batch, max(tokens // length, 1))
    return {
        # copies, since a view would be saved with all that it is a view of
        name: value[:kept].cpu().clone() if torch.is_tensor(value) and value.shape[:1] == (batch,) else value
        for name, value in inputs.items()
    }


def first_choices(routing: Routing) -> Tuple[Tensor, Tensor]:
    """The expert with the greatest weight for each token, the first of several, and that weight.

    Args:
        routing: whose weights are at least 0.

    Returns:
        float32, shape (T,): the weight, -1 where a token has no expert; int64, (T,): the expert, or -1.
    """
    weight_TE = torch.full((routing.tokens, routing.experts), -1.0, device=routing.weight_N.device)
    weight_TE.view(-1)[routing.token_N * routing.experts + routing.expert_N] = routing.weight_N.float()
    weight_T, expert_T = weight_TE.max(1)
    return weight_T, expert_T.masked_fill(weight_T < 0, -1)


def _choices(routing: Routing) -> Optional[Dict[str, Any]]:
    if routing.phase == 0 or routing.slots is not None:
        return None
    weight_T, expert_T = first_choices(routing)
    some_T = weight_T >= 0
    mean = weight_T[some_T].mean().item() if some_T.any() else 0.0
    return {"expert": _numbers(expert_T), "weight": round(mean, 4)}


def _numbers(x: Tensor) -> List[int]:
    return [int(number) for number in x.tolist()]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
