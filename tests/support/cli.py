"""Run fairseq's command lines on the small data of ``conftest.py``.

``run`` starts the console script as a user does; ``call`` runs the same main function in this process, which
saves the seconds that importing torch takes.  Options are keywords, so that settings can be shared and
changed as dictionaries::

    result = call("fairseq-train", data, **{**LM, "save_dir": tmp_path, "max_update": 8})
    result.log("train_inner")[-1]["loss"]
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import hydra
import numpy as np
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.initialize import hydra_init
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import fairseq_evomoe
from support import composing

composing.install()  # without it, half of the time of a small training goes there

USER_DIR = Path(fairseq_evomoe.__file__).parent

# Eight updates in each epoch; the experts spawn before the seventh, routing is top-1 from the eleventh.
TRAINING = {
    "user_dir": USER_DIR,
    "optimizer": "adam",
    "lr": 0.005,
    "batch_size": 8,
    "max_update": 14,
    "seed": 1,
    "log_format": "json",
    "log_interval": 1,
    "no_epoch_checkpoints": True,
    "num_workers": 0,
}
EVOLUTION = {"moe_experts": 4, "moe_spawn_update": 6, "moe_anneal_updates": 3, "moe_hard_update": 4}

LM = dict(
    **TRAINING,
    **EVOLUTION,
    task="language_modeling",
    arch="evomoe_lm_tiny",
    criterion="evomoe_cross_entropy",
    tokens_per_sample=16,
    decoder_embed_dim=32,
    decoder_ffn_embed_dim=48,
)
MASKED_LM = dict(
    **TRAINING,
    **EVOLUTION,
    task="masked_lm",
    arch="evomoe_roberta_tiny",
    criterion="evomoe_masked_lm",
    tokens_per_sample=48,
    sample_break_mode="eos",
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=48,
)
CLASSIFICATION = dict(
    **TRAINING,
    **EVOLUTION,
    task="sentence_prediction",
    arch="evomoe_roberta_tiny",
    criterion="evomoe_sentence_prediction",
    num_classes=2,
    max_positions=48,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=48,
)
TRANSLATION = dict(
    **TRAINING,
    **EVOLUTION,
    task="translation",
    arch="evomoe_transformer_tiny",
    criterion="evomoe_label_smoothed_cross_entropy",
    label_smoothing=0.1,
    source_lang="de",
    target_lang="en",
    share_all_embeddings=True,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=48,
)


@dataclass
class Result:
    """What a command has printed, and its exit status."""

    output: str
    returncode: int = 0

    def log(self, tag):
        """The JSON lines of ``train_inner``, ``train`` or ``valid``, numbers as numbers."""
        lines = re.findall(rf"\| {tag} \| (\{{.*\}})$", self.output, flags=re.MULTILINE)
        return [{key: _number(value) for key, value in json.loads(line).items()} for line in lines]

    def lines(self, text):
        """The lines that hold a text."""
        return [line for line in self.output.splitlines() if text in line]


@dataclass
class Run:
    """A training that has ended: the folder of its checkpoints, and what it printed."""

    folder: Path
    result: Result

    @property
    def last(self):
        """The last checkpoint."""
        return self.folder / "checkpoint_last.pt"

    def at(self, update):
        """The checkpoint of an update."""
        (path,) = self.folder.glob(f"checkpoint_*_{update}.pt")
        return path

    def log(self, tag):
        """As that of the result."""
        return self.result.log(tag)


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def flags(*values, **options):
    """``flags(data, max_update=8, fp16=True, user_dir=None)`` -> [data, --max-update, 8, --fp16]."""
    result = [str(value) for value in values]
    for name, value in options.items():
        if value is None or value is False:
            continue
        result.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            result.extend(map(str, value))
        elif value is not True:
            result.append(str(value))
    return result


def _module(script):
    return "fairseq_cli." + script.replace("fairseq-", "").replace("-", "_")


def command(script):
    """The console script of this interpreter's environment."""
    path = Path(sys.executable).parent / script
    if path.exists():
        return [str(path)]
    own = USER_DIR / "bin" / script  # the package need not be installed
    return [sys.executable, str(own)] if own.exists() else [sys.executable, "-m", _module(script)]


def run(script, *values, check=True, stdin=None, cwd=None, **options):
    """Run a console script in a process of its own; fail with its output if ``check`` and it fails."""
    done = subprocess.run(
        command(script) + flags(*values, **options),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=stdin,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return Result(done.stdout, done.returncode)


def call(script, *values, stdin="", **options):
    """Run the main function of a console script in this process; errors come as exceptions."""
    module = importlib.import_module(_module(script))
    with _fresh_process() as output, mock.patch("sys.stdin", io.StringIO(stdin)):
        with mock.patch("sys.argv", [script] + flags(*values, **options)):
            module.cli_main()
    return Result(output.getvalue())


def call_hydra(path, *overrides):
    """Train in this process as ``fairseq-hydra-train`` does with a YAML file and what replaces some of it."""
    module = importlib.import_module("fairseq_cli.hydra_train")
    hydra_init(path.stem)
    api = hydra if hasattr(hydra, "compose") else importlib.import_module("hydra.experimental")  # 1.0
    with api.initialize_config_dir(str(path.parent)):
        cfg = api.compose(path.stem, overrides=list(overrides))
    with _fresh_process() as output:
        module._hydra_main(cfg)
    return Result(output.getvalue())


def evomoe(*arguments):
    """Run the ``evomoe`` script in this process."""
    loader = importlib.machinery.SourceFileLoader("evomoe_script", str(USER_DIR / "bin" / "evomoe"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@contextlib.contextmanager
def _fresh_process():
    """The state that a new process has, and everything as it was afterwards; yields what is printed."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.get_num_threads()
    torch.set_num_threads(1)
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    metrics.reset()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(output):
            yield output
    finally:
        root.setLevel(level)
        root.handlers = handlers
        metrics.reset()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        torch.set_num_threads(states[3])


@dataclass
class Setup:
    """The parts that ``fairseq-train`` builds from its options."""

    cfg: object
    task: object
    model: object
    criterion: object

    def trainer(self):
        """fairseq's Trainer for them."""
        return Trainer(self.cfg, self.task, self.model, self.criterion)

    def train(self, updates):
        """A Trainer that has made some updates."""
        trainer = self.trainer()
        trainer.begin_epoch(1)
        for batch in self.batches()[:updates]:
            trainer.train_step([batch])
        return trainer

    def batches(self, split="train"):
        """The batches of the first epoch, in order, as dictionaries of tensors."""
        self.task.load_dataset(split)
        return list(
            self.task.get_batch_iterator(
                self.task.dataset(split), max_sentences=self.cfg.dataset.batch_size, seed=self.cfg.common.seed
            ).next_epoch_itr(shuffle=False)
        )


def build(*values, common=None, **settings):
    """Build task, model and criterion as ``fairseq-train`` does.

    Args:
        common: settings that only YAML can give, such as ``common.bf16`` without a TPU.
    """
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, flags(*values, **settings))
    cfg = convert_namespace_to_omegaconf(args)
    cfg.common.update(common or {})
    np.random.seed(cfg.common.seed)
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return Setup(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def help_of(*values, **settings):
    """What ``--help`` would print of all options, if fairseq did not answer it before it adds the model's."""
    parser = options.get_training_parser()
    options.parse_args_and_arch(parser, flags(*values, **settings))
    return " ".join(parser.format_help().split())


def parameters(path):
    """The model's tensors of a checkpoint, without one that fairseq 0.12.2 saves uninitialised."""
    state = torch.load(path)["model"]
    return {name: tensor for name, tensor in state.items() if not name.endswith("_float_tensor")}


def assert_equal(a, b):
    """Two nests of dictionaries, lists and tensors are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b
