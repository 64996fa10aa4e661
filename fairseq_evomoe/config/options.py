"""The ``--moe-*`` options that the models share: the one source of flags, YAML and documentation."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_hasattr
from omegaconf import II, OmegaConf, open_dict

from .. import compat
from ..evolution.schedule import TemperatureSchedule
from ..evolution.spawn import SpawnMethod
from ..moe import ROUTERS
from ..moe.plan import Inherit
from ..moe.routers.dts import BalanceForm, EvalRouting, GateNoise, GateWeight
from ..moe.routers.router import GateInput, Renormalize


def _values(enum) -> List[str]:
    return [member.value for member in enum]


def _choices(enum) -> ChoiceEnum:
    return ChoiceEnum(_values(enum))


def option(default: Any, text: str) -> Any:
    """A field with a default and a help text."""
    return field(default=default, metadata={"help": text})


class ExpertActivation(str, Enum):
    """The activation function of the experts."""

    model = "model"
    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    swiglu = "swiglu"
    geglu = "geglu"
    reglu = "reglu"


class TransportType(str, Enum):
    """The precision in which tokens travel."""

    model = "model"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Compression(str, Enum):
    """What is sent instead of tokens."""

    none = "none"
    lsh = "lsh"


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

    # the spawn
    moe_spawn_update: Any = option(
        0,
        "Update before which the single expert becomes moe-experts experts; with 0 the experts are "
        "there from the start, each with initial weights of its own; with auto they spawn when the training "
        "loss reaches a plateau, or else after half of max-update.",
    )
    moe_spawn_window: Optional[int] = option(
        None,
        "Updates whose losses are averaged to find a plateau, with moe-spawn-update auto; a fortieth of "
        "max-update, but at least 10, if not given, and 500 without max-update.",
    )
    moe_spawn_plateau: float = option(
        0.2,
        "With moe-spawn-update auto, the experts spawn after the first window whose mean loss is lower than "
        "that of the window before by less than this share of the greatest such fall so far, unless the "
        "learning rate has risen.",
    )
    moe_spawn_method: _choices(SpawnMethod) = option(
        "mask",
        "What is done to each copy of the base expert when the experts spawn: mask sets random weights "
        "to zero, noise adds Gaussian noise, reinit draws random hidden units anew, copy does nothing, "
        "slice keeps the most useful hidden units (for experts of different widths), split divides them "
        "among the experts (EMoE).",
    )
    moe_spawn_strength: Optional[float] = option(
        None,
        "Probability of a weight to be masked (0.1 if not given), standard deviation of the noise in "
        "units of the weights' own (0.1), share of the hidden units that are drawn anew (0.5), or share of "
        "those that a slice takes at random (0.1).",
    )
    moe_spawn_statistics: _choices(Inherit) = option(
        "all",
        "Weights for which the optimizer's statistics of the base expert carry over to each of its copies: "
        "all, those that the spawn leaves unchanged (not a masked one, say), or none.",
    )

    # the Dense-To-Sparse gate
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
        "Updates after the spawn from which each token goes to moe-hard-experts experts only; 1.2 times "
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
    moe_gate_noise: _choices(GateNoise) = option(
        "soft",
        "Stages of training in which the Dense-To-Sparse gate has noise: in the soft stage only, or always, "
        "as published.",
    )
    moe_gate_input: ChoiceEnum(["auto", *_values(GateInput)]) = option(
        "auto",
        "What a linear gate sees: the layer's input (hidden), the embedding of the token (token), both, "
        "the token's index alone (table: a logit for each entry of the vocabulary), or auto: hidden, as "
        "published, but with dts it is table, or hidden to spawn by split, or in evomoe_roberta hidden with "
        "moe-entropy-weight 0.03, moe-balance-weight 0.1 and moe-balance-form normalized, unless given.",
    )
    moe_table_std: float = option(
        3.0, "Standard deviation of the logits that a gate with moe-gate-input table starts with."
    )
    moe_gate_lr_scale: float = option(
        1.0,
        "Learning rate of a linear gate, in units of that of the model; for adam, adamax and adagrad. It is "
        "part of the gate: go on from a checkpoint with the value that it was trained with.",
    )
    moe_eval_routing: _choices(EvalRouting) = option(
        "top1",
        "Routing in evaluation, which has no noise: top1 sends a token to its best expert (to its "
        "moe-hard-experts best), adaptive to every expert over the threshold at the temperature reached.",
    )
    moe_hard_experts: int = option(
        1,
        "Experts of each token from the hard update on, and in evaluation: for narrow experts, of which a "
        "token gets several for the cost of one.",
    )

    # the other routers
    moe_top_k: int = option(2, "Number of experts of each token; for comet, number of trees.")
    moe_renormalize: ChoiceEnum(["auto", *_values(Renormalize)]) = option(
        "auto",
        "Whether the weights of a token's experts are divided by their sum: always, never, straight-through "
        "(divided, but with the gradient of undivided ones), or straight-through for dts and as published "
        "for the other routers (auto).",
    )
    moe_random_second: bool = option(
        False,
        "While training, use the second expert with a probability of twice its weight, as GShard does; "
        "needs moe-top-k 2.",
    )
    moe_capacity_factor: float = option(
        0.0,
        "An expert takes at most this many times its even share of a batch's tokens, and the overflow goes "
        "on by the residual connection alone; 0 drops nothing.",
    )
    moe_jitter: float = option(
        0.01,
        "While training, the gate's input is multiplied by random numbers from 1 - jitter to 1 + jitter.",
    )
    moe_top_p: float = option(
        0.4, "Each token goes to the fewest experts whose probabilities sum to at least this."
    )
    moe_hash: ChoiceEnum(["random", "balanced"]) = option(
        "random",
        "How a hash layer assigns the vocabulary: at random, or balanced by the counts of the dictionary.",
    )
    moe_hashes: int = option(
        1,
        "Number of hashes of a hash layer, each with its own part of the experts: MultiHash, for narrow "
        "experts.",
    )
    moe_stable_update: Optional[int] = option(
        None,
        "Update from which StableMoE's assignment of tokens is frozen; if not given, a tenth of the "
        "updates from the spawn to max-update.",
    )
    moe_light_dim: int = option(50, "Width of the word embeddings of StableMoE's light router.")
    moe_gamma: float = option(
        1.0, "Width of the interval in which the smooth steps of COMET's trees are between 0 and 1."
    )
    moe_recurrent_dim: int = option(
        128, "Width of the state that the recurrent router hands from layer to layer."
    )
    moe_slots: int = option(
        1,
        "Slots of each expert for each sequence, with --moe-router soft; about the mean length divided by "
        "moe-experts for the cost of one expert a token.",
    )
    moe_dynmoe_window: int = option(
        100,
        "DynMoE removes and adds experts after each window of this many updates; 0: never.",
    )
    moe_max_experts: int = option(
        0, "Most experts that DynMoE may have in a layer; 0: moe-experts, as at the start."
    )

    # losses
    moe_balance_weight: Optional[float] = option(
        None,
        "Weight of the load-balance loss of each MoE layer, for each unit of the sample size; if not given, "
        "the one that the router was published with, but see moe-gate-input.",
    )
    moe_balance_form: ChoiceEnum(["auto", *_values(BalanceForm)]) = option(
        "auto",
        "Load-balance loss of the Dense-To-Sparse gate: published, of the experts' weights; normalized, of "
        "the gate's probabilities, which is Switch's and 1 for an even load in all stages; auto: "
        "published, but see moe-gate-input.",
    )
    moe_entropy_weight: Optional[float] = option(
        None,
        "Weight of the entropy of the gate's distribution, which makes the gate confident; if not given, "
        "the one that the router was published with, but see moe-gate-input.",
    )
    moe_z_weight: Optional[float] = option(
        None, "Weight of the z-loss, the mean squared logsumexp of the gate's logits; if not given, 0."
    )
    moe_distillation_weight: Optional[float] = option(
        None, "Weight of the distillation of StableMoE's light router; if not given, 0.3."
    )
    moe_diversity_weight: Optional[float] = option(
        None, "Weight of DynMoE's loss against experts with similar gates; if not given, 0.01."
    )
    moe_simplicity_weight: Optional[float] = option(
        None, "Weight of DynMoE's loss against large gate weights; if not given, 0.01."
    )
    moe_penalty_weight: float = option(
        0.0,
        "Weight of HMoE's P-Penalty, the load-balance loss that counts an expert by its width; published "
        "with 0.1.",
    )
    moe_mutual_distillation_weight: float = option(
        0.0,
        "Weight of MoDE's loss, the mean squared distance of each active expert's output to the mean of "
        "those that the token gets.",
    )

    # the experts
    moe_expert_sizes: Any = option(
        "uniform",
        "Relative hidden widths of the experts (HMoE): uniform, arithmetic, geometric, hybrid, or one "
        "number for each expert with commas between.",
    )
    moe_total_ffn_dim: Optional[int] = option(
        None,
        "Hidden units of all experts together; if not given, moe-experts times the ffn-embed-dim, and the "
        "ffn-embed-dim itself with moe-spawn-method split.",
    )
    moe_expert_activation: _choices(ExpertActivation) = option(
        "model",
        "Activation function of the experts; model is that of the other layers, and the gated ones "
        "(swiglu, geglu, reglu) have a third matrix.",
    )
    moe_scaling_factor: float = option(
        1.0,
        "Factor of the routed experts' output, as in DeepSeek-V2; the number of narrow experts that are as "
        "wide as the feed-forward layer makes up for weights that sum to 1.",
    )
    moe_shared_expert: bool = option(
        False,
        "Add one expert of width ffn-embed-dim that is always on, beside those that the router chooses.",
    )
    moe_heads: int = option(1, "Split each token into this many sub-tokens, each routed for itself (MH-MoE).")
    moe_hyper_adapter: bool = option(
        False, "Add an adapter generated from the experts that a token was not sent to (HyperMoE)."
    )

    # many ranks
    moe_expert_parallel: int = option(
        1,
        "Number of ranks that share the experts of a layer, each holding its part of them and sending tokens "
        "to the others; a divisor of the number of ranks; 1: every rank holds all experts.",
    )
    moe_a2a_dtype: _choices(TransportType) = option(
        "model", "Precision in which tokens and gradients travel between ranks; model is their own."
    )
    moe_a2a_compress: _choices(Compression) = option(
        "none",
        "Send means of similar tokens instead of tokens while training: lsh finds them by cross-polytope "
        "hashing (LSH-MoE).",
    )
    moe_lsh_hashes: int = option(
        6, "Hashes that tokens must share to be similar, with moe-a2a-compress lsh; fewer compress more."
    )
    moe_lsh_dim: int = option(
        0,
        "Dimensions of each hash, with moe-a2a-compress lsh; fewer compress more; 0: the width of a token.",
    )
    moe_sharded_checkpoint: bool = option(
        False,
        "Write a checkpoint as one file for each of the ranks that share the experts; needs "
        "moe-expert-parallel.",
    )

    # not options of their own: the seed of the spawn, and what other defaults are counted from
    seed: int = II("common.seed")
    max_update: int = II("optimization.max_update")


def set_defaults(args: Any, **defaults: Any) -> None:
    """Set those attributes that are absent or None, as fairseq's architecture functions do."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def complete(cfg: Any, config: type) -> Any:
    """Fill in what a configuration lacks from the defaults of its dataclass, and let a number be one.

    fairseq does this for a model's own name but not for its other architectures, which can also be
    named under Hydra (``model: {_name: evomoe_lm_tiny}``).
    """
    with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
        compat.drop_absent(cfg, config)
        for name, default in vars(config()).items():
            if not safe_hasattr(cfg, name):
                setattr(cfg, name, default)
        # an option that can be a word, too, comes from the command line as a word
        if str(cfg.moe_spawn_update).isdecimal():
            cfg.moe_spawn_update = int(cfg.moe_spawn_update)
    return cfg


def flag(name: str) -> str:
    """The command-line spelling of an option's name."""
    return "--" + name.replace("_", "-")
