"""``fairseq-hydra-train`` with YAML files: the same options and the same results as flags."""

import pytest
import torch

from support.cli import LM, call, call_hydra, parameters, run
from support.hydra import MODEL_NAMES, write_yaml
from support.tasks import DATA, TASKS


@pytest.mark.parametrize("settings", TASKS)
def test_yaml_trains_like_flags(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    settings = {
        **settings,
        "moe_balance_weight": 0.01,
        "moe_spawn_method": "noise",
        "moe_eval_routing": "adaptive",
    }
    call("fairseq-train", data, save_dir=tmp_path / "flags", **settings)
    write_yaml(tmp_path / "train.yaml", data, {**settings, "save_dir": str(tmp_path / "yaml")})
    result = call_hydra(tmp_path / "train.yaml")
    assert len(result.lines("spawned experts")) == 1
    flags, yaml = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("flags", "yaml"))
    assert flags.keys() == yaml.keys()
    assert all(torch.equal(flags[name], yaml[name]) for name in flags)


@pytest.mark.parametrize("settings", TASKS)
def test_a_model_s_own_name_has_its_defaults(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    small = {
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
    }
    settings = {**settings, **small, "max_update": 8}
    path = tmp_path / "train.yaml"
    write_yaml(path, data, {**settings, "save_dir": str(tmp_path)}, name=MODEL_NAMES[settings["arch"]])
    assert len(call_hydra(path).lines("spawned experts")) == 1


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_bf16(memory_efficient, lm_data, tmp_path):
    path = tmp_path / "train.yaml"
    settings = {**LM, "save_dir": str(tmp_path), "save_interval_updates": 6}
    write_yaml(path, lm_data, settings, bf16=True, memory_efficient_bf16=memory_efficient)
    call_hydra(path)
    whole = parameters(tmp_path / "checkpoint_last.pt")
    assert all(torch.equal(t, t.bfloat16().float()) for t in whole.values())  # saved as float32
    write_yaml(
        path,
        lm_data,
        {**settings, "save_dir": str(tmp_path / "r"), "restore_file": str(tmp_path / "checkpoint_1_6.pt")},
        bf16=True,
        memory_efficient_bf16=memory_efficient,
    )
    call_hydra(path)
    resumed = parameters(tmp_path / "r/checkpoint_last.pt")
    for name, tensor in whole.items():  # fairseq saves no float32 copies, see test_growth.py
        assert torch.allclose(tensor, resumed[name], atol=0 if memory_efficient else 0.1), name


def test_the_console_script(lm_data, tmp_path):
    write_yaml(tmp_path / "train.yaml", lm_data, {**LM, "save_dir": str(tmp_path / "checkpoints")})
    result = run("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "train", cwd=tmp_path)
    logs = "".join(path.read_text() for path in tmp_path.rglob("hydra_train.log")) + result.output
    assert "spawned experts before update 6: 1 -> 4" in logs
    evaluated = call(
        "fairseq-eval-lm", lm_data, path=tmp_path / "checkpoints/checkpoint_last.pt", user_dir=LM["user_dir"]
    )
    assert "Perplexity" in evaluated.output


@pytest.mark.parametrize("settings", TASKS)
def test_expert_sizes_as_a_list(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    options = {"moe_experts": 2, "moe_expert_sizes": [1, 3], "moe_spawn_method": "slice", "max_update": 7}
    settings = {**settings, **options, "save_dir": str(tmp_path)}
    write_yaml(tmp_path / "train.yaml", data, settings)
    assert call_hydra(tmp_path / "train.yaml").lines("2 experts of 24, 72 hidden units")
    weights = [
        t
        for name, t in parameters(tmp_path / "checkpoint_last.pt").items()
        if name.endswith("moe.experts.w1")
    ]
    assert weights and all(w.shape == (96, 32) for w in weights)
