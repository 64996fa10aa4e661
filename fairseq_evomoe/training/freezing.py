"""What of a model a training leaves as it is: what the log says of it, and an optimizer that fits."""

import logging
from collections import Counter
from typing import Any, Dict, Iterable, List

from fairseq.optim import FairseqOptimizer
from torch import nn

from ..config.config import MoEConfig
from ..config.errors import ConfigError
from ..models.feed_forward import MoEModel, moe_layers, parameters_of
from ..moe.experts import BIASES
from ..moe.options import OptionError

logger = logging.getLogger(__name__)


def tell(model: nn.Module) -> None:
    """Say what ``--moe-freeze`` freezes, and how much that is."""
    config = getattr(model, "moe_config", None)
    if not isinstance(model, MoEModel) or not isinstance(config, MoEConfig) or not config.frozen_parts:
        return
    counts = [
        f"{part} ({sum(p.numel() for p in parameters_of(model, part)):,} parameters)"
        for part in config.frozen_parts
    ]
    logger.info(f"not trained, by --moe-freeze: {', '.join(counts)}")


def in_words(model: nn.Module) -> str:
    """``", frozen: experts"``: what of the MoE layers is not trained; nothing if all of it is."""
    layers = [layer.moe for _, layer in moe_layers(model)]
    found = Counter(name for moe in layers for name in _frozen(moe))
    names = [name if found[name] == len(layers) else f"{name} (not in all layers)" for name in found]
    return f", frozen: {', '.join(names)}" if names else ""


def warn_of_drawn_routers(model: nn.Module) -> None:
    """Say that routers that nobody has trained, and that have just been drawn, will not learn."""
    if any("router" in layer.moe.frozen and layer.moe.router is not None for _, layer in moe_layers(model)):
        logger.warning("with --moe-freeze router, a router that a spawn makes stays as it is drawn")


def check_state(optimizer: FairseqOptimizer, state_dict: Dict[str, Any]) -> None:
    """Refuse an optimizer's state that is of other parameters than those which are trained now.

    Raises:
        ConfigError: a sentence with the way out.
    """
    groups: Iterable[Dict[str, Any]] = state_dict.get("param_groups") or []
    found = sum(len(group["params"]) for group in groups)
    own = sum(len(group["params"]) for group in optimizer.optimizer.param_groups)
    if groups and found != own:
        text = (
            f"The checkpoint's optimizer knows {found} parameters, and {own} are trained now: give the "
            "`freeze` and `expert_bias` that it was trained with, or add --reset-optimizer."
        )
        raise ConfigError([OptionError("freeze", text)])


def _frozen(moe: nn.Module) -> List[str]:
    """The modules of a layer that are not trained, or else the parameters, by their names in the layer."""
    names: List[str] = []
    for module_name, module in moe.named_children():
        absent = () if getattr(module, "bias", True) else BIASES
        parameters = {name: p for name, p in module.named_parameters() if name not in absent}
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        whole = len(frozen) == len(parameters) > 0
        names += [module_name] if whole else [f"{module_name}.{name}" for name in frozen]
    return names
