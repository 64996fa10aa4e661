"""Options that contradict each other across groups, found before a model is built."""

from typing import Any, Iterator, List, Optional, Tuple

from ..evolution.spawn import SpawnMethod
from ..moe.balancing import Balance
from ..moe.options import OptionError
from ..moe.routers.router import GateInput, Renormalize
from . import spawn_rules
from .config import Compression, MoEConfig, TransportType

UNSUPPORTED = {
    "quant_noise_pq": "quantization noise is not made for experts",
    "quant_noise_scalar": "quantization noise is not made for experts",
    "base_layers": "BASE layers would stand beside the MoE layers",
    "ffn_reg_scale_factor": "pruning of feed-forward units is not made for experts",
    "ffn_blocks_to_remove": "pruning of feed-forward units is not made for experts",
}

SCHEDULE = (
    "temperature_start",
    "temperature_end",
    "temperature_schedule",
    "anneal_updates",
    "hard_update",
    "stage_temperature",
)
PLATEAU = ("spawn_window", "spawn_plateau")
SPAWNING = ("spawn_statistics", "spawn_rescale", "gate_warmup")
STAGES = ("spawn_select", "spawn_gate_noise", "stage_temperature")
DISTILLATION = ("module_alpha", "module_temperature", "stitch")


def unsupported(model: Any) -> Iterator[OptionError]:
    """Options of fairseq's models that do not work with MoE layers.

    Args:
        model: fairseq's configuration of the model.
    """
    for name, reason in UNSUPPORTED.items():
        if (getattr(model, name, None) or 0) > 0:
            flag = "--" + name.replace("_", "-")
            yield OptionError(
                name, f"{flag} does not work in a model with MoE layers ({reason}): leave it out."
            )


def contradictions(config: MoEConfig) -> Iterator[OptionError]:
    """All that the options have against each other, whatever ranks the model is trained on."""
    for options in config.groups:
        yield from options.contradictions(config.experts)
    yield from spawn_rules.contradictions(config)
    yield from _stable(config)
    yield from _layer(config)
    yield from _low_rank(config)
    yield from _distillation(config)
    if config.latest_spawn != 0 and set(config.frozen_parts) == {"experts", "backbone"}:
        yield OptionError(
            "freeze",
            f"`freeze` {config.training.freeze} leaves nothing to train before the experts spawn and have a "
            "router: add `spawn_update` 0, or leave one of them out.",
        )


def _stable(config: MoEConfig) -> Iterator[OptionError]:
    if config.router != "stable":
        return
    update = getattr(config.router_options, "stable_update")  # noqa: B009
    if update is None:
        if config.max_update <= 0:
            yield OptionError(
                "stable_update",
                "`router` stable freezes its assignment after a tenth of --max-update, which is not given: "
                "give `stable_update`.",
            )
    elif not config.spawns_by_itself and update < config.latest_spawn:
        yield OptionError(
            "stable_update",
            f"`stable_update` ({update}) is before `spawn_update` ({config.schedule.spawn_update}), when "
            "there is nothing to freeze yet: raise it.",
        )
    elif update < config.latest_spawn:
        yield OptionError(
            "stable_update",
            f"`stable_update` ({update}) may be before the spawn, which `spawn_update` auto leaves until "
            f"half of --max-update ({config.max_update}; 0: no limit): raise it, or leave it out and give "
            "--max-update.",
        )


def _layer(config: MoEConfig) -> Iterator[OptionError]:
    router, layer = config.router_class, config.layer
    if layer.mutual_distillation_weight > 0:
        compares = "`mutual_distillation_weight` compares the experts of a token, "
        if router.one_expert and getattr(config.router_options, "hashes", 1) == 1:
            yield OptionError(
                "mutual_distillation_weight",
                f"{compares}of which `router` {config.router} gives only one: choose another router or "
                "leave it out.",
            )
        if config.router == "soft":
            yield OptionError(
                "mutual_distillation_weight",
                f"{compares}but those of `router` soft work on mixtures of tokens: choose another router or "
                "leave it out.",
            )
        if config.router == "default-moe":
            yield OptionError(
                "mutual_distillation_weight",
                f"{compares}but `router` default-moe lets means of others stand beside them: choose another "
                "router or leave it out.",
            )
    if config.router == "soft" and layer.output_masking > 0:
        yield OptionError(
            "output_masking",
            "`output_masking` leaves out outputs for single tokens, but the experts of `router` soft work on "
            "mixtures of tokens: leave it out or choose another router.",
        )
    for name, given in (
        ("shared_expert", layer.shared_expert),
        ("hyper_adapter", layer.hyper_adapter),
        ("heads", layer.heads > 1),
    ):
        if router.passes and given:
            yield OptionError(
                name,
                f"`{name}` is made for tokens that pass the experts once, and with `router` {config.router} "
                "they do so several times: leave one of them out.",
            )
    if layer.hyper_adapter:
        if config.experts == 1 or config.router == "soft":
            yield OptionError(
                "hyper_adapter",
                "`hyper_adapter` adds what the experts that a token was not sent to have to say, and with "
                f"`router` {config.router} and `experts` {config.experts} there are none: leave it out.",
            )
        if router.resizes and getattr(config.router_options, "dynmoe_window", 0) > 0:
            yield OptionError(
                "hyper_adapter",
                f"`hyper_adapter` has an embedding of each expert, but with `router` {config.router} "
                "experts come and go: leave it out or set `dynmoe_window` 0.",
            )


OF_FEED_FORWARD = {
    "layer": (
        "expert_activation expert_bias scaling_factor shared_expert heads hyper_adapter penalty_weight "
        "mutual_distillation_weight"
    ),
    "training": "trace",
    "spawning": "spawn_strength spawn_statistics",
    "sizes": "expert_sizes total_ffn_dim",
}
"""Options of feed-forward experts, by group, which low-rank ones have no use for."""


def _low_rank(config: MoEConfig) -> Iterator[OptionError]:
    """Low-rank experts are there from the start, beside feed-forward networks that stay what they are."""
    rank = config.low_rank.rank
    if rank == 0:
        return
    if config.router != "soft":
        yield OptionError(
            "rank",
            f"`rank` {rank} asks for experts that are softly mixed, which `router` {config.router} does not: "
            "choose soft, or leave it out.",
        )
    if config.latest_spawns[-1] != 0:
        yield OptionError(
            "spawn_update",
            f"`spawn_update` {config.schedule.spawn_update} has no effect with `rank` {rank}, whose experts "
            "are there from the start: leave it out.",
        )
    if config.spawning.spawn_method not in (None, SpawnMethod.mask):
        yield OptionError(
            "spawn_method",
            f"`spawn_method` has no effect with `rank` {rank}, whose experts come from no other: leave it "
            "out.",
        )
    for group, names in OF_FEED_FORWARD.items():
        options = getattr(config, group)
        for name in names.split():
            if getattr(options, name) != options.declared()[name].convert(options.declared()[name].default):
                yield OptionError(
                    name,
                    f"`{name}` is about feed-forward experts, and with `rank` {rank} there are low-rank ones "
                    "instead: leave one of them out.",
                )


def _distillation(config: MoEConfig) -> Iterator[OptionError]:
    """Modules that learn from a teacher's have all their parts by then, or none but their base expert."""
    options, router = config.distillation, config.router_class
    if options.teacher is None:
        return
    if min(options.meta_updates, options.module_updates) == 0:
        yield OptionError(
            "teacher",
            f"`teacher` {options.teacher} needs `meta_updates` and `module_updates` of at least 1: give "
            "numbers of updates, percentages, or `preset` m2mkd, or leave it out.",
        )
    spawn, last = config.schedule.spawn_update, options.student_update
    there = config.latest_spawns[-1] == 0
    early = config.spawns_by_itself or (not there and config.latest_spawn < last)
    if early or (there and router.stages):
        staged = "experts would spawn" if early else f"the stages of `router` {config.router} would pass"
        yield OptionError(
            "spawn_update",
            f"With `spawn_update` {spawn} {staged} while modules learn from `teacher`, until update {last}: "
            f"give `spawn_update` {last} or later{', or 0' if early and not router.stages else ''}.",
        )
    if router.resizes:
        yield OptionError(
            "teacher",
            f"With `router` {config.router} experts come and go, which modules that learn from `teacher` "
            "must not: choose another router, or leave it out.",
        )
    if config.low_rank.rank > 0:
        yield OptionError(
            "teacher",
            f"`rank` {config.low_rank.rank} leaves the model its layers, and there are no modules to learn "
            "from `teacher`: leave one of them out.",
        )
    if 0 < config.max_update <= last:
        yield OptionError(
            "module_updates",
            f"`meta_updates` and `module_updates`, together {last}, are not before --max-update "
            f"{config.max_update}, so that the model itself would never be trained: lower them.",
        )


def widths(config: MoEConfig, ffn_dims: List[int]) -> Iterator[OptionError]:
    """What keeps the experts from having the widths that they are to have.

    Args:
        config: the options.
        ffn_dims: hidden units of the feed-forward networks that become base experts.
    """
    for ffn_dim in sorted(set(ffn_dims)):
        try:
            widths = config.first_widths(ffn_dim)
            if config.experts > 1 and config.latest_spawn > 0:
                config.make_spawn(0, widths).widths_from(ffn_dim)
        except OptionError as error:
            yield error


def rank_contradictions(config: MoEConfig) -> Iterator[OptionError]:
    """The same for training on many ranks; a model that is only used may come from any number of them."""
    ranks, parallel = config.ranks, config.ranks.expert_parallel
    if parallel > config.stages[0].experts:
        first = config.stages[0].experts
        several = " of the first stage in `spawn_update`" if len(config.stages) > 1 else ""
        yield OptionError(
            "expert_parallel",
            f"`expert_parallel` must be from 1 to the `experts` ({first}){several}, so that every rank has "
            f"an expert, but is {parallel}.",
        )
    if parallel > 1 and config.layer.mutual_distillation_weight > 0:
        yield OptionError(
            "mutual_distillation_weight",
            "`mutual_distillation_weight` compares all outputs of a token, which with `expert_parallel` "
            f"{parallel} are added up where they are computed: leave one of them out.",
        )
    if parallel > 1 and config.router == "default-moe":
        yield OptionError(
            "router",
            "`router` default-moe needs the mean of all outputs of an expert, which with `expert_parallel` "
            f"{parallel} are added up where they are computed: choose another router or leave that out.",
        )
    learn = config.distillation
    if learn.teacher is None and learn.student_update > 0:
        yield OptionError(
            "teacher",
            "`meta_updates` and `module_updates` are about modules that learn from a teacher's: give "
            "`teacher`, a dense checkpoint, or leave them out.",
        )
    if parallel > 1 and config.low_rank.rank > 0:
        yield OptionError(
            "expert_parallel",
            f"`expert_parallel` {parallel} shares feed-forward experts out among ranks, and with `rank` "
            f"{config.low_rank.rank} there are small ones that every rank has: leave it out.",
        )
    alone = parallel == 1
    if alone and (ranks.a2a_dtype, ranks.a2a_compress) != (TransportType.model, Compression.none):
        yield OptionError(
            "a2a_dtype",
            "`a2a_dtype` and `a2a_compress` are about tokens that travel between ranks, which none does with "
            "`expert_parallel` 1: leave them out or raise it.",
        )
    if alone and ranks.sharded_checkpoint:
        yield OptionError(
            "sharded_checkpoint",
            "`sharded_checkpoint` writes a file for each of the ranks that share the experts, and with "
            "`expert_parallel` 1 they are not shared: leave it out or raise that.",
        )
    if ranks.a2a_compress != Compression.lsh and (ranks.lsh_hashes, ranks.lsh_dim) != (6, 0):
        yield OptionError(
            "lsh_hashes",
            "`lsh_hashes` and `lsh_dim` have no effect without `a2a_compress` lsh: give it or leave them "
            "out.",
        )


def gate_that_learns_nothing(config: MoEConfig) -> Optional[str]:
    """A sentence about a gate that gets no gradient of the task's loss; ``None``: it gets one.

    The weight of a single expert, divided by itself, is 1 whatever its gate says.
    """
    router, options = config.router_class, config.router_options
    number = 1 if router.one_expert else getattr(options, router.experts_per_token or "top_k", None)
    always = getattr(options, "renormalize", None) == Renormalize.always
    if not always or number != 1 or config.experts == 1:
        return None
    way_out = "`renormalize` straight-through or never"
    if "renormalize" not in options.declared():
        way_out = "`top_k` 2 or more"
    return (
        "the gate learns nothing from the task while a token has one expert, since the weight of that is "
        f"divided by itself and always 1: give {way_out}"
    )


def idle(config: MoEConfig) -> Iterator[Tuple[str, List[str]]]:
    """Options of stages that do not come: where, and which of those that were given.

    That is no error, so that rivals stay one flag away: ``--moe-router``, ``--moe-spawn-update``.
    """
    given = config.router_options
    gate, balance = getattr(given, "gate_input", None), getattr(given, "balance", Balance.loss)
    seen, kept_even = f"with `gate_input` {getattr(gate, 'value', '')}", f"with `balance` {balance.value}"
    for applies, names, where in (
        (gate in (None, GateInput.table), ("table_std",), seen),
        (gate in (None, GateInput.hidden, GateInput.both), ("jitter",), seen),
        (balance == Balance.loss, ("balance_choices", "free_balance"), kept_even),
        (config.router_class.anneals, SCHEDULE, f"with `router` {config.router}"),
        (config.spawns_by_itself, PLATEAU, "without `spawn_update` auto"),
        (config.latest_spawns[-1] != 0, SPAWNING, "with `spawn_update` 0"),
        (len(config.stages) > 1, STAGES, "without several stages in `spawn_update`"),
        (config.low_rank.rank > 0, ("beside",), "without `rank`"),
        (config.distillation.teacher is not None, DISTILLATION, "without `teacher`"),
    ):
        found = [name for name in names if name in config.given]
        if found and not applies:
            yield where, found
