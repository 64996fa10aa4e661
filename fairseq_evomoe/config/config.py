"""What a model with MoE layers is made of: one typed, frozen object out of many flat options."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from torch.nn import functional as F

from ..evolution import stages
from ..evolution.module_distillation import DistillationOptions
from ..evolution.plateau import Plateau, PlateauOptions
from ..evolution.schedule import Phase, Schedule, ScheduleOptions, StageTemperature, TemperatureSchedule
from ..evolution.sizes import SizeOptions
from ..evolution.spawn import Spawn, SpawnMethod, SpawnOptions
from ..moe.dispatch.compression import LSH
from ..moe.dispatch.exchange import Transport
from ..moe.low_rank import LowRankOptions
from ..moe.options import Declaration, OptionError, Options, loss_weight, option
from ..moe.routers import ROUTERS, Router


class ExpertActivation(str, Enum):
    """The activation function of the experts."""

    model = "model"
    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    swiglu = "swiglu"
    geglu = "geglu"
    reglu = "reglu"


GATED: Dict[str, Callable] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
PLAIN: Dict[str, Callable] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class ExpertBias(str, Enum):
    """Whether experts have biases."""

    model = "model"
    none = "none"


class TransportType(str, Enum):
    """The precision in which tokens travel."""

    model = "model"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


DTYPES = {"model": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Compression(str, Enum):
    """What is sent instead of tokens."""

    none = "none"
    lsh = "lsh"


@dataclass(frozen=True)
class LayerOptions(Options):
    """What an MoE layer has, whatever its router."""

    experts: int = option(
        16, "Number of experts in each MoE layer once the experts have spawned.", at_least=1
    )
    freq: int = option(
        2,
        "Layer i, counted from 0, is an MoE layer when (i + 1) % moe-freq is 0, in the encoder and in the "
        "decoder.",
        at_least=1,
    )
    expert_activation: ExpertActivation = option(
        "model",
        "Activation function of the experts; model is that of the other layers, and the gated ones (swiglu, "
        "geglu, reglu) have a third matrix.",
    )
    expert_bias: ExpertBias = option(
        "model",
        "Biases of the experts, and of the feed-forward network that they come from: model has those of the "
        "model's other layers; none leaves them out.",
    )
    scaling_factor: float = option(
        1.0,
        "Factor of the routed experts' output, as in DeepSeek-V2; the number of narrow experts that are as "
        "wide as the feed-forward layer makes up for weights that sum to 1.",
        above=0,
    )
    output_masking: float = option(
        0.0,
        "While training, leave out the output of a token's expert with this probability, and in evaluation "
        "multiply it by what is left: expert output masking (EOM), published with 0.1.",
        at_least=0,
        below=1,
    )
    shared_expert: bool = option(
        False,
        "Add one expert of width ffn-embed-dim that is always on, beside those that the router chooses.",
    )
    heads: int = option(
        1, "Split each token into this many sub-tokens, each routed for itself (MH-MoE).", at_least=1
    )
    hyper_adapter: bool = option(
        False, "Add an adapter generated from the experts that a token was not sent to (HyperMoE)."
    )
    penalty_weight: float = loss_weight(
        0.0,
        "Weight of HMoE's P-Penalty, the load-balance loss that counts an expert by its width; published "
        "with 0.1.",
    )
    mutual_distillation_weight: float = loss_weight(
        0.0,
        "Weight of MoDE's loss, the mean squared distance of each active expert's output to the mean of "
        "those that the token gets.",
    )


@dataclass(frozen=True)
class RankOptions(Options):
    """How ranks share the experts of a layer."""

    expert_parallel: int = option(
        1,
        "Number of ranks that share the experts of a layer, each holding its part of them and sending "
        "tokens to the others; a divisor of the number of ranks; 1: every rank holds all experts.",
        at_least=1,
    )
    a2a_dtype: TransportType = option(
        "model", "Precision in which tokens and gradients travel between ranks; model is their own."
    )
    a2a_compress: Compression = option(
        "none",
        "Send means of similar tokens instead of tokens while training: lsh finds them by cross-polytope "
        "hashing (LSH-MoE). Later tokens are part of such a mean, in a decoder too; in evaluation there is "
        "none.",
    )
    lsh_hashes: int = option(
        6,
        "Hashes that tokens must share to be similar, with moe-a2a-compress lsh; fewer compress more.",
        at_least=1,
    )
    lsh_dim: int = option(
        0,
        "Dimensions of each hash, with moe-a2a-compress lsh; fewer compress more; 0: the width of a token.",
        at_least=0,
    )
    timeout: int = option(
        600,
        "Seconds that a rank waits for the others, in any exchange, before the run ends with an error that "
        "names the one that did not come; more than the slowest checkpoint takes to be written.",
        at_least=1,
    )
    sharded_checkpoint: bool = option(
        False,
        "Write a checkpoint as one file for each of the ranks that share the experts; needs "
        "moe-expert-parallel.",
    )


PARTS = ("router", "experts", "backbone")


@dataclass(frozen=True)
class TrainingOptions(Options):
    """What is trained, and what is written down of it."""

    freeze: Optional[str] = option(
        None,
        "Parts of the model that are not trained, before and after the spawn, with commas between: router; "
        "experts, with what stands beside them (the shared expert, MH-MoE's heads, HyperMoE's adapter); "
        "backbone, which is all the rest, but for a classification head.",
    )
    trace: int = option(
        0,
        "Write the load of each expert, and how a fixed batch is routed, into moe_trace.jsonl beside the "
        "checkpoints, every so many updates, for evomoe report; 0: never.",
        at_least=0,
    )

    @property
    def parts(self) -> List[str]:
        """The parts that are frozen."""
        return [part.strip() for part in (self.freeze or "").split(",") if part.strip()]

    def contradictions(self, experts: int) -> Iterator[OptionError]:
        """See the parent."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or (self.freeze is not None and not self.parts):
            yield OptionError(
                "freeze",
                f"`freeze` must be one or several of {', '.join(PARTS)}, with commas between, but is "
                f"{self.freeze!r}.",
            )
        elif set(self.parts) == set(PARTS):
            yield OptionError(
                "freeze", f"`freeze` {self.freeze} leaves nothing to train: leave one of them out."
            )


GROUPS: Dict[str, Type[Options]] = {
    "layer": LayerOptions,
    "low_rank": LowRankOptions,
    "training": TrainingOptions,
    "schedule": ScheduleOptions,
    "plateau": PlateauOptions,
    "spawning": SpawnOptions,
    "distillation": DistillationOptions,
    "sizes": SizeOptions,
    "ranks": RankOptions,
}
"""The options that every model has, whatever its router, by the attribute of ``MoEConfig`` that has them."""


@dataclass(frozen=True)
class MoEConfig:
    """Everything that the options say of a model's MoE layers, decided and without contradictions.

    Attributes:
        router: name of the router.
        router_options: its options.
        layer: what the layers have.
        low_rank: low-rank experts beside linear layers, in place of feed-forward ones.
        training: what is trained.
        schedule: when the experts spawn and the gate becomes sparse; all durations are counted in updates.
        plateau: what tells that they spawn by themselves.
        spawning: what happens to the copies of the base expert.
        distillation: how modules learn from a teacher's first.
        sizes: how wide the experts are.
        ranks: how ranks share them.
        preset: where options come from that were not given; a name or a path.
        seed: of the spawn.
        max_update: length of the run in updates; 0: no limit.
        given: names of the options that somebody gave, and neither a preset nor a default decided; no part of
            what the configuration means.
    """

    router: str = "dts"
    router_options: Options = field(default_factory=Options)
    layer: LayerOptions = field(default_factory=LayerOptions)
    low_rank: LowRankOptions = field(default_factory=LowRankOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    plateau: PlateauOptions = field(default_factory=PlateauOptions)
    spawning: SpawnOptions = field(default_factory=SpawnOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    ranks: RankOptions = field(default_factory=RankOptions)
    preset: Optional[str] = None
    seed: int = 1
    max_update: int = 0
    given: FrozenSet[str] = field(default=frozenset(), compare=False)

    @property
    def router_class(self) -> Type[Router]:
        """The class of the router."""
        return ROUTERS[self.router]

    @property
    def experts(self) -> int:
        """E, the number of experts in each layer once they have spawned."""
        return self.layer.experts

    @property
    def frozen_parts(self) -> List[str]:
        """The parts of the model that are not trained; see ``PARTS``."""
        return self.training.parts

    @property
    def groups(self) -> Iterator[Options]:
        """All options, group by group, those of the router last."""
        yield from (getattr(self, name) for name in GROUPS)
        yield self.router_options

    def flat(self) -> Dict[str, Any]:
        """All options by their flat names, enumerations as words."""
        result: Dict[str, Any] = {"preset": self.preset, "router": self.router}
        for options in self.groups:
            for name in options.declared():
                value = getattr(options, name)
                result[name] = value.value if isinstance(value, Enum) else value
        return result

    @property
    def stages(self) -> Tuple[stages.Stage, ...]:
        """The spawns, of which there is at least one."""
        return stages.read(self.schedule.spawn_update, self.experts)

    def in_words(self, phase: Phase) -> str:
        """What routing does in a phase: ``one expert``, ``dense gate``, ``top-1 routing``, or ``experts``."""
        if phase == Phase.DIVERSIFY:
            return "one expert"
        if not self.router_class.stages:
            return "experts"
        if not self.router_class.anneals:
            return f"{'last' if phase == Phase.HARD else 'first'} stage of {self.router}"
        hard = getattr(self.router_options, "hard_experts", 1)
        return f"top-{hard} routing" if phase == Phase.HARD else "dense gate"

    @property
    def spawns_by_itself(self) -> bool:
        """Whether the training loss decides when the experts spawn."""
        return self.stages[0].update is None

    @property
    def latest_spawns(self) -> Tuple[float, ...]:
        """The update before which each stage spawns, or does so at the latest, by half of the run."""
        return stages.latest(self.stages, self.max_update)

    @property
    def latest_spawn(self) -> float:
        """The update before which the experts spawn first, at the latest if they do it by themselves."""
        return self.latest_spawns[0]

    def make_plateau(self) -> Optional[Plateau]:
        """What finds out when the experts spawn; ``None`` if the options say it."""
        if not self.spawns_by_itself or self.experts == 1:
            return None
        window = self.plateau.spawn_window
        if window is None:
            window = max(self.max_update // 40, 10) if self.max_update > 0 else 500
        return Plateau(window, self.plateau.spawn_plateau, len(self.stages))

    def make_schedule(self, spawned: Sequence[float] = ()) -> Schedule:
        """When the experts spawn, and when the router is in which stage from then on.

        Args:
            spawned: when the first stages did, instead of when the options say or the latest that they may.
        """
        spawns = (*spawned, *self.latest_spawns[len(spawned) :])
        router, options = self.router_class, self.schedule
        if not router.anneals:
            last_stage = max(self.stable_update(spawns[-1]) - spawns[0], 0) if router.stages else 0
            # an infinite one, of a spawn that may never come, is not asked for before the spawn
            after = int(last_stage) if math.isfinite(last_stage) else -1
            constant = TemperatureSchedule.constant
            made = Schedule(spawns[0], 1.0, 1.0, constant, 0, after, spawns[1:], restarts=False)
            return replace(made, gate_warmup=options.gate_warmup)
        return Schedule(
            spawn_update=spawns[0],
            temperature_start=options.temperature_start,
            temperature_end=options.temperature_end,
            kind=options.temperature_schedule,
            anneal_updates=options.anneal_updates,
            hard_update=options.hard_update,
            later_spawns=spawns[1:],
            restarts=options.stage_temperature == StageTemperature.restart,
            gate_warmup=options.gate_warmup,
        )

    def stable_update(self, spawn_update: float) -> float:
        """The update from which a router with a last stage is in it: by default after a tenth of the run."""
        given = getattr(self.router_options, "stable_update", None)
        if given is not None:
            return float(given)
        return spawn_update + max((self.max_update - spawn_update) // 10, 1)

    def widths(self, ffn_dim: int) -> List[int]:
        """Hidden units of each expert, out of a base with ``ffn_dim``.

        Raises:
            OptionError: sizes or totals that make no such experts.
        """
        split = self.spawning.spawn_method == SpawnMethod.split
        return self.sizes.widths(self.experts, ffn_dim, split)

    def activation(self, of_model: Callable) -> Tuple[Callable, bool]:
        """The experts' activation function, and whether it is a gated one."""
        name = self.layer.expert_activation.value
        if name == "model":
            return of_model, False
        return (GATED[name], True) if name in GATED else (PLAIN[name], False)

    def first_widths(self, ffn_dim: int) -> List[int]:
        """Hidden units of each expert after the first of all spawns; see ``widths``."""
        return self.widths(ffn_dim)[: self.stages[0].experts]

    def make_spawn(self, layer: int, widths: List[int]) -> Spawn:
        """The spawn of one layer, whose experts have these widths after the first."""
        return Spawn(
            experts=self.stages[0].experts,
            layer=layer,
            method=self.spawning.spawn_method or SpawnMethod.mask,
            strength=self.spawning.spawn_strength,
            seed=self.seed,
            widths=widths,
            inherit=self.spawning.spawn_statistics,
            gate_noise=self.spawning.spawn_gate_noise,
            select=self.spawning.spawn_select,
        )

    def make_transport(self, layer: int) -> Transport:
        """How the tokens of one layer travel to experts on other ranks."""
        ranks = self.ranks
        lsh = None
        if ranks.a2a_compress == Compression.lsh:
            lsh = LSH(ranks.lsh_hashes, ranks.lsh_dim, (self.seed, layer))
        return Transport(DTYPES[ranks.a2a_dtype.value], lsh)

    def router_arguments(self) -> Dict[str, Any]:
        """The router's options as keyword arguments of its class."""
        return {name: getattr(self.router_options, name) for name in self.router_options.declared()}

    def loss_weights(self) -> Dict[str, float]:
        """Weight of each auxiliary loss of a layer."""
        return {**self.router_options.loss_weights(), **self.layer.loss_weights()}


def declarations() -> Dict[str, List[Declaration]]:
    """Every option by its flat name, with each of its declarations: several routers may have one."""
    found: Dict[str, List[Declaration]] = {}
    groups: List[Type[Options]] = [*GROUPS.values(), *(router.Options for router in ROUTERS.values())]
    for group in groups:
        for name, declaration in group.declared().items():
            found.setdefault(name, []).append(declaration)
    return found


def routers_with(name: str) -> List[str]:
    """The routers that have an option."""
    return [router for router, cls in ROUTERS.items() if name in cls.Options.declared()]


def owner(name: str) -> Optional[str]:
    """The group of an option that every model has; ``None`` for an option of routers alone."""
    return next((group for group, cls in GROUPS.items() if name in cls.declared()), None)


def unknown_router(name: str) -> OptionError:
    """What is wrong with a name that no router has."""
    return OptionError("router", f"`router` must be one of {', '.join(ROUTERS)}, but is {name!r}.")
