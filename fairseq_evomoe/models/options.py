"""The ``--moe-*`` options that the models share: the one source of flags, YAML and documentation."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_hasattr
from omegaconf import II, OmegaConf, open_dict

from .. import compat
from ..evolution.schedule import Schedule, TemperatureSchedule
from ..evolution.spawn import Spawn, SpawnMethod
from ..moe import ROUTERS
from ..moe.routers.dts import EvalRouting, GateWeight


def _choices(enum) -> ChoiceEnum:
    return ChoiceEnum([member.value for member in enum])


def option(default: Any, text: str) -> Any:
    """A field with a default and a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class MoEOptions(FairseqDataclass):
    """Options of every EvoMoE model; see README.md for the table made from them."""

    moe_experts: int = option(16, "Number of experts in each MoE layer once the experts have spawned.")
    moe_freq: int = option(
        2,
        "Layer i, counted from 0, is an MoE layer when (i + 1) % moe-freq is 0, in the encoder and in "
        "the decoder.",
    )
    moe_router: ChoiceEnum(list(ROUTERS)) = option(
        "dts", "Router that sends tokens to experts; dts is EvoMoE's Dense-To-Sparse gate."
    )
    moe_spawn_update: int = option(
        0,
        "Update before which the single expert becomes moe-experts experts; with 0 the experts are "
        "there from the start, each with initial weights of its own.",
    )
    moe_spawn_method: _choices(SpawnMethod) = option(
        "mask",
        "What is done to each copy of the base expert when the experts spawn: mask sets random weights "
        "to zero, noise adds Gaussian noise, reinit draws random hidden units anew, copy does nothing.",
    )
    moe_spawn_strength: Optional[float] = option(
        None,
        "Probability of a weight to be masked (0.1 if not given), standard deviation of the noise in "
        "units of the weights' own (0.1), or share of the hidden units that are drawn anew (0.5).",
    )
    moe_temperature_start: float = option(
        2.0, "Temperature of the Gumbel-softmax gate when the experts have spawned."
    )
    moe_temperature_end: float = option(
        0.5, "Temperature of the Gumbel-softmax gate at the end of the anneal."
    )
    moe_temperature_schedule: _choices(TemperatureSchedule) = option(
        "linear",
        "How the temperature falls from start to end; constant keeps it at the start.",
    )
    moe_anneal_updates: int = option(5000, "Length of the anneal in updates, counted from the spawn.")
    moe_hard_update: Optional[int] = option(
        None,
        "Updates after the spawn from which each token goes to one expert only; 1.2 times "
        "moe-anneal-updates if not given, and -1 for never.",
    )
    moe_threshold: float = option(
        0.001,
        "An expert is active for a token when its gate probability is over this threshold; the best "
        "expert is always active.",
    )
    moe_gate_weight: _choices(GateWeight) = option(
        "softmax",
        "Probability that weighs an expert's output while training: softmax is that of the plain "
        "logits, gumbel that of the logits with noise and temperature.",
    )
    moe_balance_weight: float = option(
        0.0,
        "Weight of the load-balance loss of each MoE layer, for each unit of the sample size; it needs "
        "one of the evomoe criterions.",
    )
    # the seed of the spawn; not an option of its own
    seed: int = II("common.seed")
    moe_eval_routing: _choices(EvalRouting) = option(
        "top1",
        "Routing in evaluation, which has no noise: top1 sends a token to its best expert, adaptive to "
        "every expert over the threshold at the temperature reached.",
    )


def set_defaults(args: Any, **defaults: Any) -> None:
    """Set those attributes that are absent or None, as fairseq's architecture functions do."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def complete(cfg: Any, config: type) -> Any:
    """Fill in what a configuration lacks from the defaults of its dataclass.

    fairseq does this for a model's own name but not for its other architectures, which can also be
    named under Hydra (``model: {_name: evomoe_lm_tiny}``).
    """
    with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
        compat.drop_absent(cfg, config)
        for name, default in vars(config()).items():
            if not safe_hasattr(cfg, name):
                setattr(cfg, name, default)
    return cfg


def flag(name: str) -> str:
    """The command-line spelling of an option's name."""
    return "--" + name.replace("_", "-")


_UNSUPPORTED = {
    "quant_noise_pq": "quantization noise is not made for experts",
    "quant_noise_scalar": "quantization noise is not made for experts",
    "base_layers": "BASE layers would stand beside the MoE layers",
    "ffn_reg_scale_factor": "pruning of feed-forward units is not made for experts",
    "ffn_blocks_to_remove": "pruning of feed-forward units is not made for experts",
}

# What must hold, and what to say if it does not.
_RULES = [
    (lambda o: o.moe_experts >= 1, "--moe-experts must be at least 1, but is {0.moe_experts}."),
    (lambda o: o.moe_freq >= 1, "--moe-freq must be at least 1, but is {0.moe_freq}."),
    (
        lambda o: o.moe_spawn_update >= 0,
        "--moe-spawn-update must be at least 0 (0: experts from the start), but is {0.moe_spawn_update}.",
    ),
    (
        lambda o: o.moe_spawn_strength is None or 0 <= o.moe_spawn_strength,
        "--moe-spawn-strength must not be negative, but is {0.moe_spawn_strength}.",
    ),
    (
        lambda o: (
            o.moe_spawn_strength is None or o.moe_spawn_strength <= 1 or str(o.moe_spawn_method) == "noise"
        ),
        "--moe-spawn-strength is a share between 0 and 1 for --moe-spawn-method "
        "{0.moe_spawn_method}, but is {0.moe_spawn_strength}.",
    ),
    (
        lambda o: o.moe_spawn_strength is None or str(o.moe_spawn_method) != "copy",
        "--moe-spawn-strength has no effect with --moe-spawn-method copy: leave it out or choose "
        "mask, noise or reinit.",
    ),
    (
        lambda o: o.moe_temperature_start > 0 and o.moe_temperature_end > 0,
        "--moe-temperature-start and --moe-temperature-end must be greater than 0, but are "
        "{0.moe_temperature_start} and {0.moe_temperature_end}.",
    ),
    (
        lambda o: o.moe_temperature_end <= o.moe_temperature_start,
        "--moe-temperature-end ({0.moe_temperature_end}) must not be greater than "
        "--moe-temperature-start ({0.moe_temperature_start}), since the gate goes from dense to "
        "sparse.",
    ),
    (
        lambda o: o.moe_anneal_updates >= 0,
        "--moe-anneal-updates must be at least 0, but is {0.moe_anneal_updates}.",
    ),
    (
        lambda o: o.moe_hard_update is None or o.moe_hard_update >= -1,
        "--moe-hard-update ({0.moe_hard_update}) is before the spawn: it counts updates after "
        "--moe-spawn-update, from 0, or is -1 for never.",
    ),
    (
        lambda o: 0 <= o.moe_threshold < 1,
        "--moe-threshold must be at least 0 and less than 1, but is {0.moe_threshold}.",
    ),
    (
        lambda o: o.moe_balance_weight >= 0,
        "--moe-balance-weight must not be negative, but is {0.moe_balance_weight}.",
    ),
]


def check_options(cfg: Any) -> None:
    """Refuse options that contradict themselves or each other.

    Args:
        cfg: anything with the attributes of ``MoEOptions``.

    Raises:
        ValueError: one sentence that names the settings and the way out.
    """
    for name, reason in _UNSUPPORTED.items():
        if (getattr(cfg, name, None) or 0) > 0:
            raise ValueError(
                "{} does not work in a model with MoE layers ({}): leave it out.".format(flag(name), reason)
            )
    for holds, message in _RULES:
        if not holds(cfg):
            raise ValueError(message.format(cfg))


def make_schedule(cfg: Any) -> Schedule:
    """The schedule that the options describe."""
    return Schedule(
        spawn_update=cfg.moe_spawn_update,
        temperature_start=cfg.moe_temperature_start,
        temperature_end=cfg.moe_temperature_end,
        kind=TemperatureSchedule(str(cfg.moe_temperature_schedule)),
        anneal_updates=cfg.moe_anneal_updates,
        hard_update=cfg.moe_hard_update,
    )


def make_spawn(cfg: Any, layer: int, seed: int) -> Spawn:
    """The spawn of one layer that the options describe."""
    return Spawn(
        experts=cfg.moe_experts,
        layer=layer,
        method=SpawnMethod(str(cfg.moe_spawn_method)),
        strength=cfg.moe_spawn_strength,
        seed=seed,
    )


def make_router(cfg: Any, dim: int, spawn: Spawn):
    """The router of one layer that the options describe, initialised."""
    router = ROUTERS[str(cfg.moe_router)](
        dim,
        cfg.moe_experts,
        threshold=cfg.moe_threshold,
        gate_weight=GateWeight(str(cfg.moe_gate_weight)),
        eval_routing=EvalRouting(str(cfg.moe_eval_routing)),
    )
    router.initialize(spawn.generator("router"))
    return router
