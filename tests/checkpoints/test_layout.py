"""A checkpoint says itself which part of the optimizer's state belongs to which parameter."""

from unittest import mock

import pytest
import torch

from fairseq_evomoe.checkpoints import optimizer_state
from fairseq_evomoe.checkpoints.saved_optimizer import LAYOUT, Layout
from support.cli import LM, build, evomoe

GROWN = {**LM, "moe_spawn_update": 0}
EMA = {"store_ema": True, "ema_fp32": True}
PRECISIONS = {
    "float32": {},
    "fp16": {"fp16": True, "fp16_init_scale": 4},  # one flat tensor for all parameters
    "fp16-no-flatten-grads": {"fp16": True, "fp16_init_scale": 4, "fp16_no_flatten_grads": True},
}
# of layers without experts, of one shape, and nothing that a layout is guessed by tells them apart
EQUAL = ["decoder.layers.0.self_attn.k_proj.weight", "decoder.layers.0.self_attn.v_proj.weight"]


def save(trainer, path):
    """As checkpoint_utils.py does."""
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}})


@pytest.fixture(params=PRECISIONS)
def trained(request, lm_data, tmp_path):
    """A Trainer with two parameters of equal values, and a checkpoint of it."""
    with mock.patch("torch.cuda.current_device", return_value=None):  # as in test_growth.py
        trainer = build(lm_data, **{**GROWN, **EMA, **PRECISIONS[request.param]}).train(updates=3)
        parameters = dict(trainer.get_model().named_parameters())
        with torch.no_grad():
            parameters[EQUAL[1]].copy_(parameters[EQUAL[0]])
        save(trainer, tmp_path / "trained.pt")
        yield trainer, tmp_path / "trained.pt"


def statistics(trainer):
    """Statistics of each parameter by its name, of a Trainer."""
    states = optimizer_state.read(trainer.optimizer)
    return {name: states[p].statistics for name, p in trainer.get_model().named_parameters()}


def saved_statistics(path):
    """The same, of a checkpoint, by the layout that it has."""
    state = torch.load(path)
    layout, saved = Layout.from_dict(state[LAYOUT]), state["last_optimizer_state"]["state"]
    if not layout.flat:
        return {key: saved.get(number, {}) for number, key in enumerate(layout.keys)}
    (number,) = saved
    found = {key: {} for key in layout.keys}
    for name, value in saved[number].items():
        tensor = torch.is_tensor(value) and value.dim() > 0
        parts = value.split(layout.sizes) if tensor else [value] * len(layout.keys)
        for key, part in zip(layout.keys, parts):
            found[key][name] = part.view(state["model"][key].shape) if tensor else part
    return found


def assert_close(found, expected, name):
    assert found.keys() == expected.keys()
    for key in {"exp_avg", "exp_avg_sq"} & found.keys():  # none yet, if there was no gradient
        assert torch.allclose(found[key], expected[key].cpu(), atol=1e-12), name


def test_equal_parameters_are_told_apart(trained):
    """Merged without loss: each expert with a copy of itself, so that statistics stay what they were."""
    trainer, path = trained
    evomoe("merge", path, "--experts", 2, "--out", path.with_name("small.pt"))
    small = torch.load(path.with_name("small.pt"))
    layout = Layout.from_dict(small[LAYOUT])
    assert layout.keys == [name for name, _ in trainer.get_model().named_parameters()]
    assert layout.sizes == [small["model"][key].numel() for key in layout.keys]
    found, before = saved_statistics(path.with_name("small.pt")), statistics(trainer)
    assert not torch.equal(before[EQUAL[0]]["exp_avg"], before[EQUAL[1]]["exp_avg"])
    for name, expected in before.items():
        if ".moe." not in name:
            assert_close(found[name], expected, name)
        elif expected:
            assert found[name]["exp_avg"].shape == small["model"][name].shape
    for of_ema in ("ema", "ema_fp32_params"):
        tensors = small["extra_state"][of_ema]
        names = [name for name in layout.keys if ".moe." in name]  # fairseq's float32 copies lack some others
        assert names and all(tensors[name].shape == small["model"][name].shape for name in names)


def test_what_was_merged_trains_on(trained, lm_data, request):
    trainer, path = trained
    evomoe("merge", path, "--experts", 2, "--out", path.with_name("small.pt"))
    precision = PRECISIONS[request.node.callspec.params["trained"]]
    other = build(lm_data, **{**GROWN, **EMA, **precision, "moe_experts": 2})
    resumed = other.trainer()
    resumed.load_checkpoint(str(path.with_name("small.pt")))
    found, before = statistics(resumed), statistics(trainer)
    for name in EQUAL:
        assert_close(found[name], before[name], name)
    resumed.begin_epoch(1)
    resumed.train_step([other.batches()[4]])
    assert resumed.get_num_updates() == 4


def test_reshard_keeps_them_apart(trained):
    trainer, path = trained
    evomoe("reshard", path, "--parts", 2, "--out", path.with_name("parts.pt"))
    first = torch.load(path.with_name("parts.pt"))
    assert LAYOUT not in first  # the index of the set has it
    assert first["moe_shards"]["layout"]["keys"] == [n for n, _ in trainer.get_model().named_parameters()]


def test_a_frozen_parameter_and_unknown_buffers_do_no_harm(lm_data, tmp_path):
    setup = build(lm_data, **GROWN)
    parameters = dict(setup.model.named_parameters())
    parameters[EQUAL[0]].requires_grad_(False)
    setup.model.decoder.register_buffer("of_somebody_else", torch.randn(3))
    trainer = setup.train(updates=2)
    save(trainer, tmp_path / "frozen.pt")
    evomoe("merge", tmp_path / "frozen.pt", "--experts", 2, "--out", tmp_path / "small.pt")
    found = saved_statistics(tmp_path / "small.pt")
    assert EQUAL[0] not in found and len(found) == len(parameters) - 1
    states = optimizer_state.read(trainer.optimizer)
    assert_close(found[EQUAL[1]], states[parameters[EQUAL[1]]].statistics, EQUAL[1])


@pytest.mark.parametrize("saved", [True, False], ids=["with the optimizer's state", "without"])
def test_every_checkpoint_has_its_layout(saved, lm_data, tmp_path):
    """Plain values that torch loads without trusting the file, before the spawn and after it."""
    trainer = build(lm_data, **{**LM, "moe_spawn_update": 1, "no_save_optimizer_state": not saved}).train(1)
    for updates in (1, 2):
        path = tmp_path / f"{updates}.pt"
        save(trainer, path)
        state = torch.load(path, weights_only=True)
        named = dict(trainer.get_model().named_parameters())
        sizes = [p.numel() for p in named.values()]
        assert state[LAYOUT] == {"keys": list(named), "sizes": sizes, "flat": False}
        trainer.begin_epoch(1)
        trainer.train_step([build(lm_data, **LM).batches()[1]])
    assert "decoder.layers.1.moe.router.weight" in state[LAYOUT]["keys"]


def test_a_dense_model_is_saved_as_by_fairseq(lm_data, tmp_path):
    dense = {
        **{name: value for name, value in LM.items() if not name.startswith("moe_")},
        "arch": "transformer_lm",
        "criterion": "cross_entropy",
    }
    trainer = build(lm_data, **dense).train(updates=1)
    save(trainer, tmp_path / "dense.pt")
    assert LAYOUT not in torch.load(tmp_path / "dense.pt")
