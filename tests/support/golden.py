"""What ``golden/make.py`` writes down of a model and ``test_golden.py`` compares with it: the same functions.

Only public ways in are used: fairseq's command lines and loaders, and ``--moe-*`` options by their names.
What is imported from the tests' own helpers is imported here, but for the grammar in ``make.py``.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import lzma
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY

from support.cli import call
from support.rank_jobs import train_on_ranks

DATA = Path(__file__).resolve().parents[1] / "golden" / "data"

TRAINING = {
    "optimizer": "adam",
    # where a gradient is 0 but for rounding, as that of a key's bias, Adam would make a step of its sign
    "adam_eps": 1e-4,
    "lr": 0.01,
    "batch_size": 4,
    "required_batch_size_multiple": 1,  # with more, some versions of fairseq lose the last batch
    "seed": 1,
    "log_format": "json",
    "log_interval": 1,
    "no_epoch_checkpoints": True,
    "disable_validation": True,
    "num_workers": 0,
}
LM = {
    **TRAINING,
    "task": "language_modeling",
    "arch": "evomoe_lm_tiny",
    "criterion": "evomoe_cross_entropy",
    "tokens_per_sample": 16,
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 8,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "share_decoder_input_output_embed": True,
    "moe_experts": 4,
    "moe_freq": 1,
}
MASKED_LM = {
    **TRAINING,
    "task": "masked_lm",
    "arch": "evomoe_roberta_tiny",
    "criterion": "evomoe_masked_lm",
    "tokens_per_sample": 48,
    "sample_break_mode": "eos",
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "moe_experts": 4,
    "moe_freq": 1,
}
TRANSLATION = {
    **TRAINING,
    "lr": 0.02,
    "batch_size": 16,
    "task": "translation",
    "arch": "evomoe_transformer_tiny",
    "criterion": "evomoe_label_smoothed_cross_entropy",
    "label_smoothing": 0.1,
    "source_lang": "de",
    "target_lang": "en",
    "share_all_embeddings": True,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "moe_experts": 4,
    "moe_freq": 1,
}

# All that a later default may decide otherwise is said.
SPAWN = {
    "moe_spawn_update": 3,
    "moe_spawn_method": "mask",
    "moe_spawn_strength": 0.1,
    "moe_spawn_statistics": "all",
}
STAGES = {
    "moe_temperature_start": 2.0,
    "moe_temperature_end": 0.5,
    "moe_temperature_schedule": "linear",
    "moe_anneal_updates": 6,
    "moe_hard_update": 8,
}
DTS = {
    **SPAWN,
    **STAGES,
    "moe_router": "dts",
    "moe_gate_input": "table",
    "moe_table_std": 3.0,
    "moe_gate_lr_scale": 1.0,
    "moe_renormalize": "straight-through",
    "moe_gate_noise": "soft",
    "moe_gate_weight": "softmax",
    "moe_threshold": 0.001,
    "moe_eval_routing": "top1",
    "moe_hard_experts": 1,
    "moe_balance_weight": 0.0,
    "moe_entropy_weight": 0.0,
}
HIDDEN = {"moe_gate_input": "hidden", "moe_table_std": None}
NO_LOSS = {"moe_balance_weight": 0.0, "moe_entropy_weight": 0.0}


def without(settings, *names):
    """Settings without some of them, which then are at their defaults."""
    return {name: value for name, value in settings.items() if name not in names}


@dataclass
class Case:
    """A checkpoint, and how it is trained on.

    Attributes:
        base: what is not about experts.
        explicit: all options of experts that matter, as given to train on.
        updates: that the checkpoint has made.
        further: updates that are made when it is trained on.
        implied: names of ``explicit`` that were not given to make the checkpoint: today's defaults.
        ranks: processes that train it.
        resumed_by: numbers of processes that train it on.
        tolerance: of numbers after that, on another machine than that of the data.
    """

    base: dict
    explicit: dict
    updates: int
    further: int = 1
    implied: tuple = ()
    ranks: int = 1
    resumed_by: tuple = (1,)
    tolerance: float = field(default=1e-5)

    @property
    def made(self):
        return {**self.base, **without(self.explicit, *self.implied)}

    @property
    def resumed(self):
        return {**self.base, **self.explicit}


def _of_router(name, updates=5, **explicit):
    """A router other than EvoMoE's, with its published weights as its default said them."""
    return Case(LM, {**SPAWN, "moe_router": name, **explicit}, updates, implied=("moe_renormalize",))


FP16 = {"fp16_init_scale": 4}
CASES = {
    "one_expert": Case(LM, DTS, 2, further=3),
    "dts_hidden": Case(
        LM, {**DTS, **HIDDEN, "moe_gate_noise": "always", "moe_renormalize": "never"}, 5, further=2
    ),
    "dts_token": Case(
        LM,
        {
            **without(DTS, "moe_table_std"),
            "moe_gate_input": "token",
            "moe_balance_weight": 0.1,
            "moe_balance_form": "normalized",
            "moe_entropy_weight": 0.03,
        },
        5,
    ),
    "dts_both": Case(
        LM,
        {
            **without(DTS, "moe_table_std"),
            "moe_gate_input": "both",
            "moe_gate_weight": "gumbel",
            "moe_eval_routing": "adaptive",
            "moe_threshold": 0.2,
        },
        5,
    ),
    "dts_table": Case(LM, {**DTS, "moe_balance_weight": 0.1, "moe_balance_form": "published"}, 5),
    "dts_hard": Case({**LM, "decoder_layers": 2}, {**DTS, "moe_hard_experts": 2}, 12),
    # every option of the gate at the defaults of the version that made the checkpoint
    "auto": Case(LM, DTS, 5, implied=tuple(without(DTS, *SPAWN, *STAGES))),
    "plateau": Case(
        LM,
        {**DTS, "moe_spawn_update": "auto", "moe_spawn_window": 2, "moe_spawn_plateau": 0.5},
        3,
        further=6,
    ),
    "stable": Case(
        LM,
        {
            **SPAWN,
            "moe_router": "stable",
            "moe_stable_update": 6,
            "moe_light_dim": 6,
            "moe_balance_weight": 0.3,
            "moe_distillation_weight": 0.3,
        },
        8,
    ),
    "dynmoe": Case(
        LM,
        {
            "moe_router": "dynmoe",
            "moe_spawn_update": 0,
            "moe_dynmoe_window": 3,
            "moe_max_experts": 7,
            "moe_diversity_weight": 0.0,
            "moe_simplicity_weight": 0.0,
        },
        8,
        further=3,
    ),
    "hmoe": Case(
        LM,
        {
            **SPAWN,
            **NO_LOSS,
            "moe_router": "topk",
            "moe_gate_input": "hidden",
            "moe_top_k": 2,
            "moe_renormalize": "always",
            "moe_expert_sizes": "arithmetic",
            "moe_total_ffn_dim": 64,
            "moe_expert_activation": "swiglu",
            "moe_spawn_method": "slice",
            "moe_penalty_weight": 0.1,
        },
        5,
    ),
    "kinds": Case(LM, {**DTS, **HIDDEN, "moe_shared_expert": True, "moe_heads": 2}, 5),
    "sharded": Case(
        LM,
        {**DTS, "moe_expert_parallel": 2, "moe_sharded_checkpoint": True},
        6,
        ranks=2,
        resumed_by=(1, 2),
    ),
    "fp16": Case({**LM, **FP16, "fp16": True, "fp16_no_flatten_grads": True}, DTS, 5, tolerance=4e-3),
    "fp16_flat": Case({**LM, **FP16, "fp16": True}, DTS, 5, tolerance=4e-3),
    "fp16_memory_efficient": Case({**LM, **FP16, "memory_efficient_fp16": True}, DTS, 5, tolerance=4e-3),
    "ema": Case({**LM, "store_ema": True, "ema_fp32": True, "ema_decay": 0.9}, DTS, 5),
    "translation": Case(TRANSLATION, {**DTS, "moe_spawn_update": 20, "moe_anneal_updates": 20}, 61),
    "masked_lm": Case(
        MASKED_LM,
        {
            **DTS,
            **HIDDEN,
            "moe_entropy_weight": 0.03,
            "moe_balance_weight": 0.1,
            "moe_balance_form": "normalized",
        },
        5,
        implied=(*without(DTS, *SPAWN, *STAGES), "moe_balance_form"),
    ),
    "soft": Case(MASKED_LM, {**SPAWN, "moe_router": "soft", "moe_slots": 2}, 5),
    "switch": _of_router(
        "switch",
        moe_gate_input="hidden",
        moe_renormalize="never",
        moe_jitter=0.01,
        moe_balance_weight=0.01,
        moe_z_weight=0.001,
    ),
    "top_p": _of_router(
        "top-p", moe_gate_input="hidden", moe_renormalize="never", moe_top_p=0.4, moe_balance_weight=0.0
    ),
    "hash": _of_router("hash", moe_hash="balanced", moe_hashes=1),
    "base": _of_router("base"),
    "comet": _of_router("comet", moe_top_k=2, moe_gamma=1.0, **NO_LOSS),
    "laplace": _of_router("laplace", moe_top_k=2, **NO_LOSS),
    "recurrent": _of_router(
        "recurrent", moe_top_k=2, moe_renormalize="always", moe_recurrent_dim=8, **NO_LOSS
    ),
}
CASES["recurrent"].base = {**LM, "decoder_layers": 2}  # which share the state's parameters

# state-dict keys: variants of routers, kinds of experts, and the update of the spawn
ROUTERS = {
    **{"dts " + x: {"moe_router": "dts", "moe_gate_input": x} for x in ("hidden", "token", "both", "table")},
    **{name + " token": {"moe_router": name, "moe_gate_input": "token"} for name in ("switch", "top-p")},
    **{name: {"moe_router": name, "moe_gate_input": "hidden"} for name in ("switch", "topk", "top-p")},
    **{name: {"moe_router": name} for name in ("base", "hash", "comet", "laplace", "soft")},
    "recurrent": {"moe_router": "recurrent", "moe_recurrent_dim": 8},
    "stable": {"moe_router": "stable", "moe_stable_update": 8, "moe_light_dim": 6},
    "dynmoe": {"moe_router": "dynmoe", "moe_dynmoe_window": 0},
}
KINDS = {
    "plain": {},
    "swiglu": {"moe_expert_activation": "swiglu"},
    "shared": {"moe_shared_expert": True},
    "heads": {"moe_heads": 2},
    "hyper": {"moe_hyper_adapter": True},
    "sizes": {"moe_expert_sizes": "arithmetic", "moe_total_ffn_dim": 64, "moe_spawn_method": "slice"},
    "split": {"moe_spawn_method": "split"},
    "all": {
        "moe_expert_activation": "swiglu",
        "moe_shared_expert": True,
        "moe_heads": 2,
        "moe_expert_sizes": "arithmetic",
        "moe_total_ffn_dim": 64,
        "moe_spawn_method": "slice",
    },
}
STATES = {"one expert": {"moe_spawn_update": 5}, "spawned": {"moe_spawn_update": 0}}
MODELS = {"evomoe_lm": LM, "evomoe_roberta": MASKED_LM, "evomoe_transformer": TRANSLATION}


def platform_of():
    """What equal numbers can be expected of."""
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text() if cpuinfo.exists() else ""
    vendor = re.search(r"vendor_id\s*: (\S+)", words)
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "vendor": vendor.group(1) if vendor else "",
        "capability": capability,
        "avx512": "avx512f" in words,
    }


def prepare(folder):
    """Binarise the text of ``data/`` into ``folder``: ``lm`` and ``translation``."""
    text = DATA / "text"
    lm = {split + "pref": text / split for split in ("train", "valid")}
    call("fairseq-preprocess", workers=1, only_source=True, destdir=folder / "lm", **lm)
    pairs = {split + "pref": text / ("pair." + split) for split in ("train", "valid")}
    langs = {"source_lang": "de", "target_lang": "en", "joined_dictionary": True}
    call("fairseq-preprocess", workers=1, destdir=folder / "translation", **langs, **pairs)


def data_of(settings):
    """A model's data, relative to the folder that ``prepare`` fills: its checkpoint names no machine's."""
    return "translation" if settings["task"] == "translation" else "lm"


@contextlib.contextmanager
def flat_fp16_on_cpu():
    """fp16_optimizer.py:43 files its one flat tensor under the current GPU; CPU tensors look for None."""
    with mock.patch("torch.cuda.current_device", return_value=None):
        yield


def train(settings, ranks, folder, **more):
    """Train a model in the current folder, which ``prepare`` has filled."""
    settings = {**settings, "save_dir": folder, **more}
    if ranks == 1:
        with flat_fp16_on_cpu():
            return call("fairseq-train", data_of(settings), **settings)
    return train_on_ranks(ranks, [[[data_of(settings)], settings]], Path(folder) / "jobs")[0]


def resume(case, path, ranks, folder):
    """Train on: tensors and numbers of the state then, by name."""
    settings = case.resumed
    if ranks == 1:
        settings = without(settings, "moe_expert_parallel", "moe_sharded_checkpoint")
    train(settings, ranks, folder, restore_file=path, max_update=case.updates + case.further)
    return state_of(Path(folder) / "checkpoint_last.pt")


def state_of(path):
    """Tensors of a checkpoint's model, optimizer and EMA, by name."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    extra = state["extra_state"]
    found = {}
    _flatten("model", state["model"], found)
    _flatten("optimizer", state["last_optimizer_state"]["state"], found)
    for name in ("ema", "ema_fp32_params"):
        _flatten(name, extra.get(name) or {}, found)
    # fairseq 0.12.2 saves these uninitialised
    return {name: tensor for name, tensor in found.items() if not name.endswith("_float_tensor")}


def _flatten(name, value, found):
    if isinstance(value, dict):
        for key, each in value.items():
            _flatten("{}/{}".format(name, key), each, found)
    elif torch.is_tensor(value) or isinstance(value, (int, float)):
        found[name] = torch.as_tensor(value).clone()


def digest(state):
    """What is written down of each tensor: hash, dtype, shape, sum and some of its numbers."""
    result = {}
    for name, tensor in state.items():
        numbers = tensor.double().flatten()
        some = numbers[:: max(len(numbers) // 3, 1)][:4]
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        result[name] = [
            hashlib.sha256(data).hexdigest()[:12],
            " ".join([str(tensor.dtype).replace("torch.", ""), *map(str, tensor.shape)]),
            *(float("{:.9g}".format(x)) for x in (numbers.sum(), numbers.abs().sum(), *some)),
        ]
    return result


def evaluate(path):
    """What a model says of the validation text, loaded by nothing but its own configuration.

    Returns:
        ``nll`` of every token of three sentences, one sentence at a time, and the ``best`` tokens.
    """
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model = models[0].eval()
    nll, best = [], []
    for source, target in _sentences(task):
        with torch.no_grad():
            if cfg.task._name == "translation":
                start = torch.cat([target[-1:], target[:-1]])[None]
                lengths = torch.tensor([len(source)])
                out = model(src_tokens=source[None], src_lengths=lengths, prev_output_tokens=start)
            elif cfg.task._name == "masked_lm":
                masked = source.clone()
                masked[1::3] = task.source_dictionary.index("<mask>")
                out = model(src_tokens=masked[None])
            else:
                out = model(src_tokens=torch.cat([target[-1:], target[:-1]])[None])
            log_probability = model.get_normalized_probs(out, log_probs=True)[0].float()
        nll += [round(-x, 7) for x in log_probability.gather(1, target[:, None].long())[:, 0].tolist()]
        best += log_probability.argmax(1).tolist()
    return {"nll": nll, "best": best}


def _sentences(task):
    """Pairs of source and target indices; the same twice for one language."""
    translation = hasattr(task, "tgt_dict")
    names = ("pair.valid.de", "pair.valid.en") if translation else ("valid", "valid")
    lines = [(DATA / "text" / name).read_text(encoding="utf-8").splitlines()[:3] for name in names]
    encode = task.source_dictionary.encode_line
    for pair in zip(*lines):
        yield tuple(encode(line, add_if_not_exist=False).long() for line in pair)


def printed(path):
    """What fairseq's console command says of a language model's or a translator's checkpoint."""
    task = checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"]["task"]["_name"]
    common = {"gen_subset": "valid", "batch_size": 4, "required_batch_size_multiple": 1, "num_workers": 0}
    if task == "translation":
        result = call("fairseq-generate", "translation", path=path, beam=2, **common)
        found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", result.output, flags=re.MULTILINE)
        return {number: [hypothesis, float(score)] for number, score, hypothesis in found}
    result = call("fairseq-eval-lm", "lm", path=path, tokens_per_sample=16, **common)
    return {"perplexity": float(re.search(r"Perplexity: ([\d.]+)", result.output).group(1))}


class Builder:
    """Builds models of one task that differ in their ``--moe-*`` options, as Hydra would from YAML."""

    def __init__(self, settings):
        words = [data_of(settings)]
        for name, value in settings.items():
            words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        self.cfg = convert_namespace_to_omegaconf(args)
        self.task = tasks.setup_task(self.cfg.task)

    def build(self, **moe):
        """A model."""
        cfg = copy.deepcopy(self.cfg.model)
        for name, value in moe.items():
            setattr(cfg, name, value)
        torch.manual_seed(1)
        level = logging.root.manager.disable
        logging.disable(logging.INFO)
        try:
            return self.task.build_model(cfg)
        finally:
            logging.disable(level)


def combinations(model):
    """Name -> options of the models whose keys are written down."""
    for router, of_router in ROUTERS.items():
        if router == "soft" and model != "evomoe_roberta":  # a token's output depends on later ones
            continue
        if model != "evomoe_lm" and router not in ("dts hidden", "dts table", "soft", "stable", "recurrent"):
            continue
        for kind, of_kind in KINDS.items():
            # "all" has what the others have one by one, which two routers are enough for
            if kind not in ("plain", "hyper", "all") and router not in ("dts hidden", "topk"):
                continue
            if model != "evomoe_lm" and kind not in ("plain", "all"):
                continue
            for state, of_state in STATES.items():
                yield "{}, {}, {}".format(router, kind, state), {**of_router, **of_kind, **of_state}


def keys(model):
    """Name, dtype and shape of each tensor of a model's state: of its MoE layers, and of the rest.

    MoE layers are found by their attribute ``moe``.
    """
    prefixes = tuple(name + ".moe." for name, module in model.named_modules() if hasattr(module, "moe"))
    assert prefixes
    layers, rest = [], []
    for name, tensor in model.state_dict().items():
        if not name.endswith("_float_tensor"):
            words = [name, str(tensor.dtype).replace("torch.", ""), *map(str, tensor.shape)]
            (layers if name.startswith(prefixes) else rest).append(" ".join(words))
    return layers, rest


def parser_of(model):
    """A parser of a model's options."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    ARCH_MODEL_REGISTRY[model].add_args(parser)
    return parser


def flags_of(model):
    """Each ``--moe-*`` flag of a model: whether it takes a value, its choices, type and default."""
    found = {}
    for action in parser_of(model)._actions:
        if action.option_strings and action.option_strings[0].startswith("--moe-"):
            found[action.option_strings[0]] = {
                "options": action.option_strings,
                "nargs": action.nargs,
                "choices": None if action.choices is None else [str(choice) for choice in action.choices],
                "type": getattr(action.type, "__name__", None),
                "default": None if action.default in (None, argparse.SUPPRESS) else str(action.default),
            }
    return found


def pack(source, target):
    """Compress a file."""
    target.write_bytes(lzma.compress(source.read_bytes(), preset=9 | lzma.PRESET_EXTREME))


def unpack(source, target):
    """The reverse."""
    target.write_bytes(lzma.decompress(source.read_bytes()))
    return target


def save_json(name, value):
    """Write a file of the golden data, compressed if its name says so."""
    data = (json.dumps(value, indent=0, sort_keys=True) + "\n").encode()
    (DATA / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)


def load_json(name):
    """Read one."""
    data = (DATA / name).read_bytes()
    return json.loads(lzma.decompress(data) if name.endswith(".xz") else data)


def unpack_checkpoint(name, folder):
    """Unpack all files of a case's checkpoint: the path of the first."""
    for path in DATA.glob("*.pt.xz"):
        if path.name.split(".")[0].split("-")[0] == name:
            unpack(path, folder / path.name[: -len(".xz")])
    return folder / (name + ".pt")
