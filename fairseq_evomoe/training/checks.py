"""Contradictions that only the configuration of the whole run shows, found before training starts."""

import inspect
import logging
import math
import os
from typing import Any, Iterator, List

from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim import FairseqOptimizer
from torch import nn

from ..config.config import MoEConfig
from ..config.errors import PREFIX, ConfigError
from ..config.resolve import former_defaults, warn_of_idle_options, write_back
from ..config.rules import rank_contradictions
from ..criterions.moe import MoECriterion
from ..models.feed_forward import MoEFeedForward, MoEModel, moe_layers
from ..models.requirements import advice, architecture_of, has_adaptive_softmax
from ..moe.options import OptionError

logger = logging.getLogger(__name__)

Contradictions = Iterator[OptionError]


def check_before_trainer(cfg: FairseqConfig) -> None:
    """Refuse ways to train that experts cannot spawn in.

    Raises:
        ConfigError: all contradictions, one sentence each.
    """
    _refuse([*_ways_to_parallelise(cfg), *_sharding(cfg)])


def settle_options(cfg: FairseqConfig, config: MoEConfig) -> None:
    """Refuse options that do not fit many ranks, tell what was decided, and let the configuration say it.

    Args:
        cfg: of the run; that of the model is changed in place, so that checkpoints say what was meant.
        config: what the model's options were resolved to.

    Raises:
        ConfigError: contradictions.
    """
    _refuse(list(rank_contradictions(config)))
    warn_of_idle_options(config)
    line = former_defaults(config)
    if line is not None:
        logger.info(line)
    write_back(cfg.model, config)


def check_optimizer(cfg: FairseqConfig, optimizer: FairseqOptimizer) -> None:
    """Refuse an optimizer that cannot do what the options ask for.

    With ``--moe-gate-lr-scale``, steps must not depend on how large gradients and weights are; with experts
    sharded among ranks, the update of an expert must not depend on the others of its rank.

    Raises:
        ConfigError: all contradictions, one sentence each.
    """
    _refuse(list(_optimizer(cfg, optimizer)))


def check_run(
    cfg: FairseqConfig, model: nn.Module, layers: List[MoEFeedForward], criterion: FairseqCriterion
) -> None:
    """Refuse a spawn that would never come, and a criterion that the model or its losses do not go with.

    Args:
        cfg: of the run.
        model: the model.
        layers: its layers with MoE.
        criterion: the criterion.

    Raises:
        ConfigError: all contradictions, one sentence each.
    """
    if layers and math.isinf(layers[0].schedule.spawn_updates[-1]):
        logger.warning(
            "without --max-update, nothing limits how long --moe-spawn-update auto waits for a plateau of "
            "the training loss"
        )
    _refuse(
        [*_spawn(cfg, model, layers), *_criterion(cfg, model, criterion), *_losses(model, layers, criterion)]
    )


def check_length(cfg: FairseqConfig, model: nn.Module, updates: int, epochs: Any) -> None:
    """Refuse a spawn, or a stage, that the epochs of the run would end before.

    Args:
        cfg: of the run.
        model: the model.
        updates: how many there have been.
        epochs: the batches of an epoch; nothing is said of those whose number is not known.

    Raises:
        ConfigError: all contradictions, one sentence each.
    """
    layers = [layer for _, layer in moe_layers(model)]
    last_epoch, epoch = cfg.optimization.max_epoch or 0, getattr(epochs, "next_epoch_idx", None)
    if not layers or last_epoch <= 0 or epoch is None or not hasattr(epochs, "__len__"):
        return
    each = cfg.optimization.update_freq
    frequencies = (each[min(e - 1, len(each) - 1)] for e in range(epoch, last_epoch + 1))
    last = updates + sum(math.ceil(len(epochs) / frequency) for frequency in frequencies)
    limit = f"the end of --max-epoch {last_epoch}, after {last} updates at most"
    _refuse(list(_never(model, layers, last, limit)))


def _refuse(errors: List[OptionError]) -> None:
    if errors:
        raise ConfigError(errors)


def _option(cfg: FairseqConfig, name: str, default: Any) -> Any:
    """An option of the model's, which a model of somebody else's may lack."""
    value = getattr(cfg.model, PREFIX + name, None)
    return default if value is None else value


def _ways_to_parallelise(cfg: FairseqConfig) -> Contradictions:
    parallel = cfg.distributed_training
    if parallel.ddp_backend not in ("c10d", "pytorch_ddp", "legacy_ddp", "no_c10d"):
        yield OptionError(
            "ddp_backend",
            f"--ddp-backend {parallel.ddp_backend} cannot rebuild its wrapper when experts spawn: use "
            "legacy_ddp or pytorch_ddp.",
        )
    if getattr(parallel, "zero_sharding", "none") != "none":
        yield OptionError(
            "zero_sharding",
            f"--zero-sharding {parallel.zero_sharding} does not keep optimizer state where a spawn could "
            "carry it over: leave it out.",
        )
    for name, used in (
        ("use_bmuf", cfg.optimization.use_bmuf),
        ("pipeline_model_parallel", parallel.pipeline_model_parallel),
        ("model_parallel_size", cfg.common.model_parallel_size > 1),
    ):
        if used:
            flag = "--" + name.replace("_", "-")
            yield OptionError(name, f"{flag} does not work in a model with MoE layers: leave it out.")
    if getattr(cfg.optimizer, "_name", None) == "composite":
        yield OptionError(
            "optimizer",
            "--optimizer composite splits the optimizer's state in a way that a spawn cannot carry over: use "
            "a single optimizer, such as adam.",
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ and launched != parallel.distributed_world_size:
        yield OptionError(
            "distributed_world_size",
            f"{launched} processes were launched, but --distributed-world-size is "
            f"{parallel.distributed_world_size}, so each would train a model of its own into the same "
            f"folder: add --distributed-world-size {launched}.",
        )


def _sharding(cfg: FairseqConfig) -> Contradictions:
    """What does not work with experts that are sharded among ranks."""
    parallel = _option(cfg, "expert_parallel", 1)
    ranks = cfg.distributed_training.distributed_world_size
    if ranks % parallel:
        yield OptionError(
            "expert_parallel",
            f"`expert_parallel` {parallel} does not divide the number of ranks, {ranks}: give a divisor of "
            "it, or start another number of processes.",
        )
    if parallel == 1:
        return
    if _option(cfg, "sharded_checkpoint", False) and cfg.checkpoint.write_checkpoints_asynchronously:
        yield OptionError(
            "sharded_checkpoint",
            "With `sharded_checkpoint` ranks wait until all files are written, which "
            "--write-checkpoints-asynchronously does not: leave one of them out.",
        )
    if cfg.common.amp:
        yield OptionError(
            "expert_parallel",
            "--amp scales the loss by what happens on each rank alone, but with `expert_parallel` "
            f"{parallel} their gradients differ: use --fp16 or --bf16.",
        )
    if getattr(cfg.task, "eval_bleu", False):
        yield OptionError(
            "expert_parallel",
            "--eval-bleu generates another number of words on each rank, but with `expert_parallel` "
            f"{parallel} they need each other for each word: leave it out and use fairseq-generate, or set "
            "`expert_parallel` 1.",
        )


def _optimizer(cfg: FairseqConfig, optimizer: FairseqOptimizer) -> Contradictions:
    scale = _option(cfg, "gate_lr_scale", 1)
    if scale != 1 and cfg.optimizer._name not in ("adam", "adamax", "adagrad"):
        yield OptionError(
            "gate_lr_scale",
            f"`gate_lr_scale` {scale} needs steps that do not depend on the size of gradients and weights, "
            f"as those of --optimizer {cfg.optimizer._name} do: use adam, adamax or adagrad, or leave it "
            "out.",
        )
    parallel = _option(cfg, "expert_parallel", 1)
    if parallel > 1 and not optimizer.supports_flat_params:
        yield OptionError(
            "expert_parallel",
            f"--optimizer {cfg.optimizer._name} takes all experts of a rank as one, so that the result would "
            f"depend on `expert_parallel` {parallel}: use one that updates each number for itself, such as "
            "adam.",
        )


def _spawn(cfg: FairseqConfig, model: nn.Module, layers: List[MoEFeedForward]) -> Contradictions:
    max_update = cfg.optimization.max_update
    if max_update > 0 and layers:
        yield from _never(model, layers, max_update, f"--max-update {max_update}")


def _never(model: nn.Module, layers: List[MoEFeedForward], last: int, limit: str) -> Contradictions:
    """What would come after the last update; a plateau may let experts spawn before the latest moment."""
    schedule, config = layers[0].schedule, getattr(model, "moe_config", None)
    by_itself = config is not None and config.spawns_by_itself
    spawn_update = schedule.spawn_updates[-1]
    if layers[0].moe.stage < len(layers[0].moe.stages) and not by_itself and last <= spawn_update:
        yield OptionError(
            "spawn_update",
            f"`spawn_update` {spawn_update} is not before {limit}, so the experts would never "
            "spawn: lower the one or raise the other.",
        )
    if config is not None and "stable_update" in config.given:
        update = config.router_options.stable_update
        if last <= update:
            yield OptionError(
                "stable_update",
                f"`stable_update` {update} is not before {limit}, so the assignment would never be "
                "frozen: lower the one or raise the other.",
            )


def _criterion(cfg: FairseqConfig, model: nn.Module, criterion: FairseqCriterion) -> Contradictions:
    """A criterion asks a model for more than its output."""
    if not isinstance(model, MoEModel):  # somebody else's may do as they like
        return
    architecture = architecture_of(cfg.model)
    if isinstance(criterion, MaskedLmLoss) and not _takes_masked_tokens(model):
        yield OptionError(
            "criterion",
            f"--criterion {_name(criterion)} asks for the tokens that are masked, and --arch {architecture} "
            f"masks none: {advice(model, criterion=True)}.",
        )
    adaptive = has_adaptive_softmax(model)
    if isinstance(criterion, AdaptiveLoss) and not adaptive:
        yield OptionError(
            "criterion",
            f"--criterion {_name(criterion)} needs an adaptive softmax, and --arch {architecture} has none "
            f"without --adaptive-softmax-cutoff: give it, or {advice(model, criterion=True)}.",
        )
    if isinstance(criterion, (CrossEntropyCriterion, LabelSmoothedCrossEntropyCriterion)) and adaptive:
        yield OptionError(
            "criterion",
            f"--criterion {_name(criterion)} needs the logits of all words, which a model with "
            f"--adaptive-softmax-cutoff does not give: {advice(model, criterion=True)}, or leave that out.",
        )
    if isinstance(criterion, SentencePredictionCriterion):
        head = criterion.classification_head_name
        if head not in getattr(model, "classification_heads", {}):
            yield OptionError(
                "criterion",
                f"--criterion {_name(criterion)} needs a classification head {head!r} on the model, and "
                f"--arch {architecture} has none with --task {cfg.task._name}: "
                f"{advice(model, criterion=True)}.",
            )


def _takes_masked_tokens(model: nn.Module) -> bool:
    parts = [model, getattr(model, "encoder", None)]
    return any(part and "masked_tokens" in inspect.signature(part.forward).parameters for part in parts)


def _losses(model: nn.Module, layers: List[MoEFeedForward], criterion: FairseqCriterion) -> Contradictions:
    """Auxiliary losses that nobody would add."""
    weights = {name: weight for layer in layers for name, weight in layer.loss_weights.items() if weight > 0}
    if weights and not isinstance(criterion, MoECriterion):
        name, weight = next(iter(weights.items()))
        yield OptionError(
            f"{name}_weight",
            f"--criterion {_name(criterion)} would drop the auxiliary losses of the MoE layers, but "
            f"`{name}_weight` is {weight}: {_replacement(model, criterion)}, or set the weight to 0.",
        )


def _name(criterion: FairseqCriterion) -> str:
    names = [name for name, cls in CRITERION_REGISTRY.items() if cls is type(criterion)]
    return names[0] if names else type(criterion).__name__


def _replacement(model: nn.Module, criterion: FairseqCriterion) -> str:
    """What adds the losses: that which extends the given criterion, or else what fits the model."""
    names = [
        name
        for name, cls in CRITERION_REGISTRY.items()
        if issubclass(cls, MoECriterion) and issubclass(cls, type(criterion))
    ]
    return f"use --criterion {names[0]}" if names else advice(model, criterion=True)
