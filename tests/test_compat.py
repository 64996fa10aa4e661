"""Each mend of compat.py is needed where it applies, and the plugin can be loaded in any way."""

import argparse
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import LanguagePairDataset, TokenBlockDataset, data_utils, token_block_dataset
from fairseq.dataclass.configs import DistributedTrainingConfig
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from omegaconf import OmegaConf
from torch import nn

import fairseq_evomoe
from fairseq_evomoe import compat
from fairseq_evomoe.config.options import MoEOptions
from support.cli import LM, MASKED_LM, TRANSLATION, USER_DIR, call

ROOT = Path(fairseq_evomoe.__file__).parent.parent


def python(code, *args, cwd=None, path=(), **env):
    """Run Python code in a process of its own and return what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**variables, "PYTHONPATH": os.pathsep.join(map(str, path)), **env},
        cwd=str(cwd or "/"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_checkpoints_may_hold_namespaces_and_numpy_scalars(tmp_path):
    if not hasattr(torch.serialization, "add_safe_globals"):
        pytest.skip("this torch loads everything")
    state = {"args": argparse.Namespace(arch="evomoe_lm"), "best": np.float64(1.5), "n": np.int64(3)}
    torch.save(state, tmp_path / "checkpoint.pt")
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(Exception, match="Unsupported global"):
            torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        compat.allow_fairseq_checkpoints()
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == state
    finally:
        torch.serialization.add_safe_globals(allowed)


def test_scalars_of_numpy_1_26_are_allowed(monkeypatch):
    """Its ``numpy._core`` is there, and empty."""
    multiarray = getattr(np, "_core", None) or np.core

    class Numpy126:
        _core = SimpleNamespace()
        core = SimpleNamespace(multiarray=multiarray.multiarray)

        def __getattr__(self, name):
            return getattr(np, name)

    allowed = []
    monkeypatch.setattr(compat, "np", Numpy126())
    monkeypatch.setattr(torch.serialization, "add_safe_globals", allowed.extend, raising=False)
    compat.allow_fairseq_checkpoints()
    assert multiarray.multiarray.scalar in allowed


def test_torchrun_needs_no_gpu(monkeypatch, no_gpu):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    infer = distributed_utils._infer_torch_distributed_launch_init
    original = inspect.unwrap(infer)
    divides = "device_count" in inspect.getsource(original)
    if divides:
        with pytest.raises(ZeroDivisionError):
            original(DistributedTrainingConfig())
    for gpus, device in ((0, 0), (2, 1 if divides else 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        cfg = DistributedTrainingConfig()
        infer(cfg)
        assert (cfg.distributed_world_size, cfg.distributed_rank, cfg.device_id) == (4, 3, device)
        assert cfg.distributed_no_spawn and cfg.distributed_init_method == "env://"


@pytest.mark.parametrize(
    "restarts, in_node, method", [("0", "4", "env://"), ("2", "4", "attempt://"), ("2", "2", "env://")]
)
def test_attempts_of_one_node_are_kept_apart(restarts, in_node, method, monkeypatch, no_gpu):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_WORLD_SIZE", in_node)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    cfg = DistributedTrainingConfig()
    distributed_utils._infer_torch_distributed_launch_init(cfg)
    assert cfg.distributed_init_method == method


def test_a_slurm_task_needs_no_gpu(monkeypatch, no_gpu):
    monkeypatch.setattr("subprocess.check_output", lambda *_: b"localhost\n")
    job = {"NODELIST": "x", "NNODES": "1", "NTASKS_PER_NODE": "2", "PROCID": "1", "LOCALID": "1"}
    for name, value in job.items():
        monkeypatch.setenv("SLURM_STEP_" + name if name == "NODELIST" else "SLURM_" + name, value)
    cfg = DistributedTrainingConfig(distributed_world_size=2, distributed_port=1)
    distributed_utils._infer_slurm_init(cfg, None)
    assert (cfg.distributed_rank, cfg.device_id, cfg.distributed_no_spawn) == (1, 0, True)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_legacy_ddp_adds_up_no_experts(process_group):
    """Its buffer has one size on all ranks, of which each has other experts."""
    module = torch.nn.ParameterDict({"shared": torch.nn.Parameter(torch.ones(5))})
    module["own"] = torch.nn.Parameter(torch.ones(100))
    module["own"].expert = True
    wrapper = LegacyDistributedDataParallel(module, process_group)
    assert wrapper.buffer_size == 5
    (module["shared"].sum() + module["own"].sum()).backward()
    wrapper.all_reduce_grads()
    assert wrapper.buffer.numel() == 5


def test_pytorch_ddp_wraps_modules_on_the_cpu(process_group):
    cfg = DistributedTrainingConfig(distributed_world_size=1, ddp_backend="pytorch_ddp", device_id=0)
    model = nn.Linear(2, 2)
    wrapped = distributed_fairseq_model.DistributedFairseqModel(
        cfg, model, process_group, torch.device("cpu")
    )
    assert wrapped(torch.zeros(1, 2)).shape == (1, 2)
    with pytest.raises((ValueError, AssertionError, RuntimeError)):
        nn.parallel.DistributedDataParallel(model, device_ids=[0], output_device=0)


def test_a_configuration_can_be_broadcast(process_group, monkeypatch):
    """What rank 0 sends when a checkpoint is resumed; the receiver's side is in test_shards.py."""
    sent = {"cfg": OmegaConf.create({"model": {"moe_experts": 4}}), "weight": torch.ones(2)}
    received = distributed_utils.broadcast_object(sent, 0, process_group)
    assert received["cfg"] == sent["cfg"] and torch.equal(received["weight"], sent["weight"])


NEEDS_ALIASES = {
    "np.compat.long in token_block_dataset": (
        token_block_dataset,
        lambda: TokenBlockDataset([torch.ones(3)], [3], None, pad=1, eos=2, break_mode="eos"),
    ),
    "np.compat.long in language_pair_dataset": (
        sys.modules[LanguagePairDataset.__module__],
        lambda: LanguagePairDataset(Sentences(), [2, 3], Symbols(), num_buckets=2),
    ),
    "np.percentile(interpolation=) in data_utils": (
        data_utils,
        lambda: data_utils.get_buckets(np.arange(9), 2),
    ),
}


def _version(module):
    return tuple(int(number) for number in module.__version__.split(".")[:2])


class Sentences(list):
    sizes = np.array([2, 3])

    def __init__(self):
        super().__init__([torch.ones(2).long(), torch.ones(3).long()])


class Symbols:
    pad, eos, unk = (lambda self: 1), (lambda self: 2), (lambda self: 3)


@pytest.mark.parametrize("name", NEEDS_ALIASES)
def test_numpy_aliases_that_fairseq_uses(name, monkeypatch):
    module, use = NEEDS_ALIASES[name]
    use()
    monkeypatch.setattr(module, "np", np)
    if _version(np) >= (2, 4):
        with pytest.raises((AttributeError, TypeError)):
            use()
    compat.restore_numpy_aliases()
    use()
    assert module.np.int is int
    assert not hasattr(np, "compat") or np.compat is not compat._NumpyWithAliases.compat


def test_overflow_in_token_block_dataset_is_harmless():
    """fairseq computes 1 - 2 in uint16 for blocks of one token; sources and targets are right."""
    sentences = [torch.tensor([4, 2]), torch.tensor([2]), torch.tensor([5, 6, 2])]
    dataset = TokenBlockDataset(
        sentences, [2, 1, 3], None, pad=1, eos=2, break_mode="eos", include_targets=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.silence_harmless_overflow()
        items = [dataset[i] for i in range(3)]
    assert [source.tolist() for source, _, _ in items] == [[2, 4], [2], [2, 5, 6]]
    assert [target.tolist() for _, target, _ in items] == [[4, 2], [2], [5, 6, 2]]


@pytest.mark.parametrize(
    "changes",
    [{"sample_break_mode": "eos"}, {"mask_multiple_length": 3}],
    ids=str,
)
def test_masked_lm_data_options(lm_data, tmp_path, changes):
    settings = {
        **MASKED_LM,
        "max_update": 1,
        "moe_spawn_update": 0,
        "no_save": True,
        "disable_validation": True,
    }
    result = call("fairseq-train", lm_data, **{**settings, **changes}, cpu=True, save_dir=tmp_path)
    assert [log["num_updates"] for log in result.log("train_inner")] == [1]


def test_absent_keys_of_omegaconf_2_0_are_dropped():
    cfg = OmegaConf.create({"moe_hard_update": None, "decoder_input_dim": None, "decoder_layers": 2})
    compat.drop_absent(cfg, MoEOptions)
    assert dict(cfg) == {"moe_hard_update": None, "decoder_layers": 2}
    namespace = argparse.Namespace(decoder_input_dim=None)
    compat.drop_absent(namespace, MoEOptions)
    assert namespace.decoder_input_dim is None


def test_encoder_fast_path_of_fairseq_0_12_2_is_removed():
    layer = TransformerEncoderLayerBase.__new__(TransformerEncoderLayerBase)
    nn.Module.__init__(layer)
    layer.can_use_fastpath = True
    layer.keep = nn.Parameter(torch.ones(1))
    for name in (
        "in_proj_weight",
        "in_proj_bias",
        "out_proj_weight",
        "out_proj_bias",
        "fc1_weight",
        "fc2_bias",
    ):
        layer.register_parameter(name, nn.Parameter(torch.zeros(1)))
    compat.remove_encoder_fast_path(nn.ModuleList([layer, nn.Linear(1, 1)]))
    assert [name for name, _ in layer.named_parameters()] == ["keep"]
    assert not layer.can_use_fastpath
    layer.load_state_dict({"keep": torch.zeros(1)})

    state = {
        "encoder.layers.0.in_proj_weight": 1,
        "encoder.sentence_encoder.layers.11.fc2_bias": 2,
        "encoder.layers.0.self_attn.in_proj_weight": 3,
        "encoder.layers.0.fc1.weight": 4,
    }
    compat.drop_fast_path_copies(state)
    assert sorted(state.values()) == [3, 4]


def test_applying_twice_changes_nothing():
    def state():
        return (
            distributed_utils.call_main,
            distributed_utils._infer_torch_distributed_launch_init,
            distributed_utils._broadcast_object_slow,
            distributed_fairseq_model.DistributedDataParallel,
            data_utils.np,
        )

    before = state()
    compat.apply()
    assert all(a is b for a, b in zip(before, state()))


LOAD = """
import sys
from argparse import Namespace
from fairseq import utils
for name in sys.argv[1:]:
    if name == "import":
        import fairseq_evomoe
    else:
        utils.import_user_module(Namespace(user_dir=name))
from fairseq.models import MODEL_REGISTRY
from fairseq.trainer import Trainer
function, wrappers = Trainer.clip_grad_norm, 0
while function is not None:
    wrappers += "evomoe" in function.__code__.co_filename
    function = getattr(function, "__wrapped__", None)
modules = [name for name in sys.modules if name.endswith("models.causal_lm")]
print(modules, MODEL_REGISTRY["evomoe_lm"].__module__, wrappers)
"""


@pytest.mark.parametrize(
    "ways",
    [
        ["import", USER_DIR, USER_DIR],
        [os.path.relpath(str(USER_DIR), "/"), USER_DIR, "import"],
        ["LINK", "import", "LINK", USER_DIR],
        ["import", "LINK"],
    ],
    ids=["import-first", "relative", "link", "link-later"],
)
def test_loading_in_any_way_gives_one_module(ways, tmp_path):
    (tmp_path / "fairseq_evomoe").symlink_to(USER_DIR)
    ways = [tmp_path / "fairseq_evomoe" if way == "LINK" else way for way in ways]
    module = "fairseq_evomoe.models.causal_lm"
    printed = python(LOAD, *ways, path=[ROOT] if ways[0] == "import" else [])
    assert printed == f"['{module}'] {module} 1"


def test_bucketed_translation_data(translation_data, tmp_path):
    settings = {
        **TRANSLATION,
        "max_update": 1,
        "moe_spawn_update": 0,
        "no_save": True,
        "disable_validation": True,
    }
    result = call(
        "fairseq-train",
        translation_data,
        **{**settings, "batch_size": None, "max_tokens": 200},
        num_batch_buckets=2,
        cpu=True,
        save_dir=tmp_path,
    )
    assert [log["num_updates"] for log in result.log("train_inner")] == [1]


def test_workers_that_load_data(lm_data, tmp_path):
    settings = {**LM, "max_update": 8, "num_workers": 1}
    result = call("fairseq-train", lm_data, **settings, cpu=True, save_dir=tmp_path)
    assert len(result.log("train_inner")) == 8
    assert len(result.lines("spawned experts")) == 1


def test_user_dir_command_prints_the_folder(tmp_path):
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert python(code, USER_DIR / "bin" / "evomoe", "user-dir", path=[ROOT], cwd=tmp_path) == str(USER_DIR)


def test_the_mathematics_need_no_fairseq():
    code = """
import sys
sys.modules["fairseq"] = None  # as if it were not installed
import torch
from fairseq_evomoe.moe import MoELayer
layer = MoELayer(4, 8, experts=2, router="dts")
layer.spawn()
output = layer(torch.ones(3, 4))
print(output.shape == (3, 4), [name for name in sys.modules if name.startswith("fairseq.")])
"""
    assert python(code, path=[ROOT]) == "True []"
