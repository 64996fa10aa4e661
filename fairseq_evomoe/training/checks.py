"""Contradictions that only the configuration of the whole run shows, found before training starts."""

import logging
import math
import os
from typing import Any, List

from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
from fairseq.optim import FairseqOptimizer

from ..config.config import MoEConfig
from ..config.errors import ConfigError
from ..config.resolve import former_defaults, warn_of_idle_options, write_back
from ..config.rules import rank_contradictions
from ..criterions.moe import MoECriterion
from ..models.feed_forward import MoEFeedForward

logger = logging.getLogger(__name__)


def check_before_trainer(cfg: Any) -> None:
    """Refuse ways to train in parallel that experts cannot grow in.

    Raises:
        ValueError: one sentence that names the setting and the way out.
    """
    parallel = cfg.distributed_training
    if parallel.ddp_backend not in ("c10d", "pytorch_ddp", "legacy_ddp", "no_c10d"):
        raise ValueError(
            f"--ddp-backend {parallel.ddp_backend} cannot rebuild its wrapper when experts spawn: use "
            "legacy_ddp or pytorch_ddp."
        )
    if getattr(parallel, "zero_sharding", "none") != "none":
        raise ValueError(
            f"--zero-sharding {parallel.zero_sharding} does not keep optimizer state where a spawn could "
            "carry it over: leave it out."
        )
    for name, used in (
        ("--use-bmuf", cfg.optimization.use_bmuf),
        ("--pipeline-model-parallel", parallel.pipeline_model_parallel),
        ("--model-parallel-size", cfg.common.model_parallel_size > 1),
    ):
        if used:
            raise ValueError(f"{name} does not work in a model with MoE layers: leave it out.")
    _check_sharing(cfg)
    optimizer = getattr(cfg.optimizer, "_name", None)
    if optimizer == "composite":
        raise ValueError(
            "--optimizer composite splits the optimizer's state in a way that a spawn cannot carry "
            "over: use a single optimizer, such as adam."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ and launched != parallel.distributed_world_size:
        raise ValueError(
            f"{launched} processes were launched, but --distributed-world-size is "
            f"{parallel.distributed_world_size}, so each would train a model of its own into the same "
            f"folder: add --distributed-world-size {launched}."
        )


def settle_options(cfg: Any, config: MoEConfig) -> None:
    """Refuse options that do not fit many ranks, tell what was decided, and let the configuration say it.

    Args:
        cfg: fairseq's configuration of the run; that of the model is changed in place, so that checkpoints
            say what was meant.
        config: what the model's options were resolved to.

    Raises:
        ConfigError: contradictions.
    """
    errors = list(rank_contradictions(config))
    if errors:
        raise ConfigError(errors)
    warn_of_idle_options(config)
    line = former_defaults(config)
    if line is not None:
        logger.info(line)
    write_back(cfg.model, config)


def _check_sharing(cfg: Any) -> None:
    """Refuse what does not work with experts that are shared out among ranks."""
    parallel, ranks = (
        getattr(cfg.model, "moe_expert_parallel", None) or 1,
        cfg.distributed_training.distributed_world_size,
    )
    if ranks % parallel:
        raise ValueError(
            f"--moe-expert-parallel {parallel} does not divide the number of ranks, {ranks}: give a divisor "
            "of it, or start another number of processes."
        )
    if parallel == 1:
        return
    if cfg.common.amp:
        raise ValueError(
            "--amp scales the loss by what happens on each rank alone, but with --moe-expert-parallel "
            f"{parallel} their gradients differ: use --fp16 or --bf16."
        )
    if getattr(cfg.task, "eval_bleu", False):
        raise ValueError(
            "--eval-bleu generates another number of words on each rank, but with --moe-expert-parallel "
            f"{parallel} they need each other for each word: leave it out and use fairseq-generate, or set "
            "--moe-expert-parallel 1."
        )


def check_optimizer(cfg: Any, optimizer: FairseqOptimizer) -> None:
    """Refuse an optimizer that cannot do what the options ask for.

    With ``--moe-gate-lr-scale``, steps must not depend on how large gradients and weights are; with experts
    shared out among ranks, the update of an expert must not depend on the others of its rank.

    Raises:
        ValueError: one sentence that names the settings and the way out.
    """
    scale = getattr(cfg.model, "moe_gate_lr_scale", 1)
    if scale != 1 and cfg.optimizer._name not in ("adam", "adamax", "adagrad"):
        raise ValueError(
            f"--moe-gate-lr-scale {scale} needs steps that do not depend on the size of gradients and "
            f"weights, as those of --optimizer {cfg.optimizer._name} do: use adam, adamax or adagrad, or "
            "leave it out."
        )
    parallel = getattr(cfg.model, "moe_expert_parallel", 1)
    if parallel > 1 and not optimizer.supports_flat_params:
        raise ValueError(
            f"--optimizer {cfg.optimizer._name} takes all experts of a rank as one, so that the result would "
            f"depend on --moe-expert-parallel {parallel}: use one that updates each number for itself, such "
            "as adam."
        )


def check_run(cfg: Any, layers: List[MoEFeedForward], criterion: FairseqCriterion) -> None:
    """Refuse a spawn that would never come and auxiliary losses that nobody would add.

    Args:
        cfg: fairseq's configuration of the run.
        layers: the model's layers with MoE.
        criterion: the criterion.

    Raises:
        ValueError: one sentence that names the settings and the way out.
    """
    spawn_update, max_update = layers[0].schedule.spawn_update, cfg.optimization.max_update
    if layers[0].moe.num_experts > 1 and 0 < max_update <= spawn_update:
        raise ValueError(
            f"--moe-spawn-update {spawn_update} is not before --max-update {max_update}, so the experts "
            "would never spawn: lower the one or raise the other."
        )
    if math.isinf(spawn_update):
        logger.warning(
            "without --max-update, nothing limits how long --moe-spawn-update auto waits for a plateau of "
            "the training loss"
        )
    weights = {name: weight for layer in layers for name, weight in layer.loss_weights.items() if weight > 0}
    if weights and not isinstance(criterion, MoECriterion):
        raise ValueError(
            "--criterion {} would drop the auxiliary losses of the MoE layers, but --moe-{}-weight is "
            "{}: use --criterion {}, or set the weight to 0.".format(
                _name(criterion), *next(iter(weights.items())), _replacement(criterion)
            )
        )


def _name(criterion: FairseqCriterion) -> str:
    names = [name for name, cls in CRITERION_REGISTRY.items() if cls is type(criterion)]
    return names[0] if names else type(criterion).__name__


def _replacement(criterion: FairseqCriterion) -> str:
    names = [
        name
        for name, cls in CRITERION_REGISTRY.items()
        if issubclass(cls, MoECriterion) and issubclass(cls, type(criterion))
    ]
    return names[0] if names else "one of the evomoe criterions"
