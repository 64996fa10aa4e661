"""What the experts of a checkpoint's model do with data: their load and how similar their outputs are."""

from typing import Any, Dict, Iterator, Tuple

import torch
from fairseq import checkpoint_utils, utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import Tensor

from ..evolution.merge import output_products
from ..models.layers import moe_layers
from ..moe import MoELayer, Router, Routing, RoutingContext
from .merge import Observed

_CHUNK = 256
"""Tokens that all experts are applied to at once."""


class _Watch:
    """Runs all experts of a layer on what its router is given, until there are enough tokens."""

    def __init__(self, moe: MoELayer, router: Router, tokens: int) -> None:
        self.moe = moe
        self.wanted = tokens
        self.rows = 0
        self.load_E = torch.zeros(moe.num_experts, dtype=torch.float64)
        self.similarity_EE = torch.zeros(moe.num_experts, moe.num_experts, dtype=torch.float64)
        router.register_forward_hook(self._see)

    def _see(self, router: Router, inputs: Tuple[Tensor, RoutingContext], routing: Routing) -> None:
        self.load_E += routing.load_E()[: self.moe.num_experts].double()  # others have no weights to merge
        x_TD = inputs[0] if routing.slots is None else routing.slots.mix(inputs[0])
        for part_TD in x_TD[: self.wanted - self.rows].split(_CHUNK):
            self.rows += part_TD.shape[0]
            self.similarity_EE += output_products(self._outputs(part_TD))

    def _outputs(self, x_TD: Tensor) -> Tensor:
        experts, tokens = self.moe.num_experts, x_TD.shape[0]
        return self.moe.experts(x_TD.repeat(experts, 1), [tokens] * experts).view(experts, tokens, -1)

    @property
    def enough(self) -> bool:
        return self.rows >= self.wanted

    def result(self) -> Observed:
        return Observed(self.rows, self.load_E, self.similarity_EE / max(self.rows, 1))


@torch.no_grad()
def observe(path: str, data: str, subset: str = "valid", tokens: int = 4096) -> Dict[str, Observed]:
    """Run a checkpoint's model on some data, as in evaluation, on the CPU.

    Args:
        path: the checkpoint.
        data: folder of data for the task in it.
        subset: ``train``, ``valid``, ``test``, ...
        tokens: how many tokens (slots, with ``--moe-router soft``) of each layer are given to all experts;
            batches come in random order, always the same.

    Returns:
        name of each layer -> what its experts did.
    """
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
    model = models[0].eval()
    watches = {
        name: _Watch(layer.moe, layer.moe.router, tokens)
        for name, layer in moe_layers(model)
        if layer.moe.router is not None
    }
    for batch in batches(cfg, task, model, subset):
        model(**batch["net_input"])
        if all(watch.enough for watch in watches.values()):
            break
    return {name: watch.result() for name, watch in watches.items()}


def batches(
    cfg: FairseqConfig, task: FairseqTask, model: BaseFairseqModel, subset: str
) -> Iterator[Dict[str, Any]]:
    """Batches of a part of a task's data, in an order that is random and always the same."""
    task.load_dataset(subset)
    iterator = task.get_batch_iterator(
        task.dataset(subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=True,
        seed=1,
    )
    return (batch for batch in iterator.next_epoch_itr(shuffle=True) if batch)
