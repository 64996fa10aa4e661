"""The options of a model that fairseq is building."""

from typing import Any, Sequence

from .config import MoEConfig
from .resolve import given_options, resolve, write_back


def resolve_model(
    cfg: Any, *, ffn_dims: Sequence[int] = (), experts: int = 16, masked: bool = False
) -> MoEConfig:
    """Resolve the options in a model's configuration, and let it say what was decided.

    Args:
        cfg: fairseq's configuration of the model, with the fields of ``MoEOptions``; changed in place.
        ffn_dims: hidden units of the feed-forward networks that become base experts.
        experts: the number of experts of the model by default.
        masked: whether it is a masked LM.

    Raises:
        ConfigError: all contradictions that were found.
    """
    config = resolve(
        given_options(cfg),
        experts=experts,
        masked=masked,
        ffn_dims=[int(dim) for dim in ffn_dims],
        seed=int(cfg.seed),
        max_update=int(cfg.max_update or 0),
        model=cfg,
    )
    write_back(cfg, config)
    return config
