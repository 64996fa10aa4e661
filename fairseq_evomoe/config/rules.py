"""Options that contradict themselves or each other, found before a model is built."""

import logging
from dataclasses import fields
from typing import Any, Callable, List, Tuple

from ..models.make import LAYER_LOSSES, latest_spawn, router_class, router_options, spawns_by_itself
from ..moe import ROUTERS
from .options import MoEOptions, flag

logger = logging.getLogger(__name__)

# what belongs to the gate whose temperature falls
_ANNEAL = {
    "moe_temperature_start",
    "moe_temperature_end",
    "moe_temperature_schedule",
    "moe_anneal_updates",
    "moe_hard_update",
}

# what tells a plateau of the loss
_PLATEAU = {"moe_spawn_window", "moe_spawn_plateau"}

# what happens at a spawn inside a run
_SPAWN = {"moe_spawn_statistics"}

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
        lambda o: spawns_by_itself(o) or (type(o.moe_spawn_update) is int and o.moe_spawn_update >= 0),
        "--moe-spawn-update must be at least 0 (0: experts from the start) and a whole number, or auto, but "
        "is {0.moe_spawn_update}.",
    ),
    (
        lambda o: o.moe_spawn_window is None or o.moe_spawn_window >= 1,
        "--moe-spawn-window must be at least 1, but is {0.moe_spawn_window}.",
    ),
    (
        lambda o: 0 <= o.moe_spawn_plateau < 1,
        "--moe-spawn-plateau must be at least 0 and less than 1, but is {0.moe_spawn_plateau}.",
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
        lambda o: o.moe_spawn_strength is None or str(o.moe_spawn_method) not in ("copy", "split"),
        "--moe-spawn-strength has no effect with --moe-spawn-method {0.moe_spawn_method}: leave it out or "
        "choose mask, noise, reinit or slice.",
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
    (lambda o: 0 < o.moe_top_p <= 1, "--moe-top-p must be over 0 and at most 1, but is {0.moe_top_p}."),
    (
        lambda o: 0 <= o.moe_jitter < 1,
        "--moe-jitter must be at least 0 and less than 1, but is {0.moe_jitter}.",
    ),
    (
        lambda o: o.moe_capacity_factor >= 0,
        "--moe-capacity-factor must be at least 0 (0: no limit), but is {0.moe_capacity_factor}.",
    ),
    (
        lambda o: o.moe_heads >= 1,
        "--moe-heads must be at least 1 (1: tokens are not split), but is {0.moe_heads}.",
    ),
    (
        lambda o: o.moe_total_ffn_dim is None or o.moe_total_ffn_dim > 0,
        "--moe-total-ffn-dim must be greater than 0, but is {0.moe_total_ffn_dim}.",
    ),
    (
        lambda o: not (o.moe_random_second and (o.moe_top_k != 2 or str(o.moe_renormalize) == "never")),
        "--moe-random-second draws one of two experts by its share of their weights: it needs --moe-top-k 2 "
        "and --moe-renormalize always or auto.",
    ),
    (
        lambda o: not (str(o.moe_router) == "stable" and o.moe_stable_update is None and o.max_update <= 0),
        "--moe-router stable freezes its assignment after a tenth of --max-update, which is not given: give "
        "--moe-stable-update.",
    ),
    (
        lambda o: (
            str(o.moe_router) != "stable"
            or o.moe_stable_update is None
            or spawns_by_itself(o)
            or o.moe_stable_update >= o.moe_spawn_update
        ),
        "--moe-stable-update ({0.moe_stable_update}) is before --moe-spawn-update ({0.moe_spawn_update}), "
        "when there is nothing to freeze yet: raise it.",
    ),
    (
        lambda o: (
            str(o.moe_router) != "stable"
            or o.moe_stable_update is None
            or o.moe_stable_update >= latest_spawn(o)
        ),
        "--moe-stable-update ({0.moe_stable_update}) may be before the spawn, which --moe-spawn-update auto "
        "leaves until half of --max-update ({0.max_update}; 0: no limit): raise it, or leave it out and give "
        "--max-update.",
    ),
    (
        lambda o: o.moe_scaling_factor > 0,
        "--moe-scaling-factor must be greater than 0, but is {0.moe_scaling_factor}.",
    ),
    (
        lambda o: not (o.moe_mutual_distillation_weight > 0 and router_class(o).one_expert),
        "--moe-mutual-distillation-weight compares the experts of a token, of which --moe-router "
        "{0.moe_router} gives only one: choose another router or leave it out.",
    ),
    (
        lambda o: not (o.moe_mutual_distillation_weight > 0 and str(o.moe_router) == "soft"),
        "--moe-mutual-distillation-weight compares the experts of a token, but those of --moe-router soft "
        "work on mixtures of tokens: choose another router or leave it out.",
    ),
    (
        lambda o: not (o.moe_hyper_adapter and (o.moe_experts == 1 or router_class(o).needs_whole_sequence)),
        "--moe-hyper-adapter adds what the experts that a token was not sent to have to say, and with "
        "--moe-router {0.moe_router} and --moe-experts {0.moe_experts} there are none: leave it out.",
    ),
    (
        lambda o: not (o.moe_hyper_adapter and router_class(o).resizes and o.moe_dynmoe_window > 0),
        "--moe-hyper-adapter has an embedding of each expert, but with --moe-router {0.moe_router} experts "
        "come and go: leave it out or set --moe-dynmoe-window 0.",
    ),
]


# What must hold for training on many ranks; a model that is only used may come from any number of them.
_RANK_RULES = [
    (
        lambda o: 1 <= o.moe_expert_parallel <= max(o.moe_experts, 1),
        "--moe-expert-parallel must be from 1 to the --moe-experts ({0.moe_experts}), so that every rank has "
        "an expert, but is {0.moe_expert_parallel}.",
    ),
    (
        lambda o: not (o.moe_mutual_distillation_weight > 0 and o.moe_expert_parallel > 1),
        "--moe-mutual-distillation-weight compares all outputs of a token, which with --moe-expert-parallel "
        "{0.moe_expert_parallel} are added up where they are computed: leave one of them out.",
    ),
    (
        lambda o: (
            o.moe_expert_parallel > 1 or (str(o.moe_a2a_dtype), str(o.moe_a2a_compress)) == ("model", "none")
        ),
        "--moe-a2a-dtype and --moe-a2a-compress are about tokens that travel between ranks, which none does "
        "with --moe-expert-parallel 1: leave them out or raise it.",
    ),
    (
        lambda o: o.moe_expert_parallel > 1 or not o.moe_sharded_checkpoint,
        "--moe-sharded-checkpoint writes a file for each of the ranks that share the experts, and with "
        "--moe-expert-parallel 1 they are not shared: leave it out or raise that.",
    ),
    (
        lambda o: o.moe_lsh_hashes >= 1 and o.moe_lsh_dim >= 0,
        "--moe-lsh-hashes must be at least 1 and --moe-lsh-dim at least 0, but are {0.moe_lsh_hashes} and "
        "{0.moe_lsh_dim}.",
    ),
    (
        lambda o: str(o.moe_a2a_compress) == "lsh" or (o.moe_lsh_hashes, o.moe_lsh_dim) == (6, 0),
        "--moe-lsh-hashes and --moe-lsh-dim have no effect without --moe-a2a-compress lsh: give it or leave "
        "them out.",
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
                f"{flag(name)} does not work in a model with MoE layers ({reason}): leave it out."
            )
    _check(_RULES, cfg)
    _check_weights(cfg)
    _check_router_options(cfg)


def check_rank_options(cfg: Any) -> None:
    """As ``check_options``, for the options that only training on many ranks has to do with."""
    _check(_RANK_RULES, cfg)


def _check(rules: List[Tuple[Callable[[Any], bool], str]], cfg: Any) -> None:
    for holds, message in rules:
        if not holds(cfg):
            raise ValueError(message.format(cfg))


def warn_of_idle_options(cfg: Any) -> None:
    """Warn of a schedule for another router's gate, and of a plateau or a spawn that nothing waits for.

    That is no error, so that rivals stay one flag away: ``--moe-router``, ``--moe-spawn-update``.

    Args:
        cfg: anything with the attributes of ``MoEOptions``.
    """
    for idle, where in (
        (_ANNEAL if not router_class(cfg).anneals else (), f"with --moe-router {cfg.moe_router}"),
        (_PLATEAU if not spawns_by_itself(cfg) else (), "without --moe-spawn-update auto"),
        (_SPAWN if cfg.moe_spawn_update == 0 else (), "with --moe-spawn-update 0"),
    ):
        given = [
            flag(option.name)
            for option in fields(MoEOptions)
            if option.name in idle and str(getattr(cfg, option.name)) != str(option.default)
        ]
        if given:
            logger.warning("no effect {}: {}".format(where, ", ".join(given)))


def _check_weights(cfg: Any) -> None:
    known = {**router_class(cfg).loss_weights, **dict.fromkeys(LAYER_LOSSES)}
    for option in fields(MoEOptions):
        value = getattr(cfg, option.name)
        if not option.name.endswith("_weight") or not isinstance(value, (int, float)):
            continue
        if value < 0:
            raise ValueError(f"{flag(option.name)} must not be negative, but is {value}.")
        name = option.name[len("moe_") : -len("_weight")]
        if value > 0 and name not in known:
            raise ValueError(
                "{} {} has no effect with --moe-router {}, which has no such loss: leave it out or choose "
                "one of the routers {}.".format(
                    flag(option.name),
                    value,
                    cfg.moe_router,
                    ", ".join(n for n, router in ROUTERS.items() if name in router.loss_weights),
                )
            )


def _check_router_options(cfg: Any) -> None:
    """Refuse a router's option beside another router."""
    mine = router_options(router_class(cfg))
    of_routers = {name for router in ROUTERS.values() for name in router_options(router)}
    for option in fields(MoEOptions):
        name, value = option.name[len("moe_") :], getattr(cfg, option.name)
        if name in of_routers and name not in mine and str(value) != str(option.default):
            raise ValueError(
                "{} {} has no effect with --moe-router {}: leave it out or choose one of the routers "
                "{}.".format(
                    flag(option.name),
                    value,
                    cfg.moe_router,
                    ", ".join(n for n, router in ROUTERS.items() if name in router_options(router)),
                )
            )
