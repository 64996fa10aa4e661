"""``--moe-trace``, TensorBoard and Weights & Biases: what is told of the experts while they train."""

import importlib.util
import types
from unittest import mock

import pytest
import torch
from fairseq.logging import progress_bar

from fairseq_evomoe.checkpoints import trace_file
from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.moe import record
from fairseq_evomoe.training.probe import Probe, drift
from fairseq_evomoe.training.trace import Trace
from support.cli import LM, MASKED_LM, TRANSLATION, Run, assert_equal, build, call, parameters

SETTINGS = {**LM, "moe_trace": 2, "moe_freq": 1, "disable_validation": True, "save_interval_updates": 3}


@pytest.fixture(scope="module")
def traced(lm_data, tmp_path_factory):
    """A run whose experts spawn after 6 updates, and the records of its 14."""
    folder = tmp_path_factory.mktemp("traced")
    run = Run(folder, call("fairseq-train", lm_data, save_dir=folder, **SETTINGS))
    return run, trace_file.read(folder)


def updates(records):
    return [record for record in records if record["kind"] == "update"]


def test_records_come_in_order(traced):
    _, (first, *records) = traced
    layers = ["decoder.layers.0", "decoder.layers.1"]
    assert (first["kind"], first["format"], first["layers"]) == ("run", 1, layers)
    assert [(x["kind"], x["update"]) for x in records] == [
        *(("update", n) for n in (2, 4, 6)),
        ("experts", 6),
        *(("update", n) for n in (8, 10, 12, 14)),
    ]
    assert all(list(x["layers"]) == layers for x in records)
    assert [x["phase"] for x in updates(records)] == [0, 0, 0, 1, 1, 2, 2]
    temperatures = [x["moe_temperature"] for x in traced[0].log("train_inner")]
    assert [x["temperature"] for x in updates(records)] == temperatures[1::2]


def test_the_family_tree_is_told(traced):
    (spawn,) = [x for x in traced[1] if x["kind"] == "experts"]
    expected = {"parents": [0] * 4, "widths": [48] * 4, "generations": [1] * 4}
    assert spawn["layers"] == {"decoder.layers.0": expected, "decoder.layers.1": expected}
    (line,) = traced[0].result.lines("spawned experts before update 6: 1 -> 4 experts")
    assert "method mask" in line


def test_the_family_tree_has_several_generations(lm_data, tmp_path):
    options = {**SETTINGS, "moe_freq": 2, "moe_spawn_update": "2:2,6:4", "moe_trace": 7, "no_save": True}
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**options, "max_update": 8})
    spawns = [x for x in trace_file.read(tmp_path) if x["kind"] == "experts"]
    assert [x["update"] for x in spawns] == [2, 6]
    first, second = (x["layers"]["decoder.layers.1"] for x in spawns)
    assert (first["parents"], first["generations"]) == ([0, 0], [1, 1])
    assert sorted(second["parents"]) == [0, 0, 1, 1] and second["generations"] == [2] * 4


@pytest.mark.parametrize(
    "preset", [{"moe_preset": "moe_plus_plus"}, {"moe_router": "topk", "moe_zero_experts": 2}]
)
def test_experts_that_compute_nothing_are_left_out(preset, lm_data, tmp_path):
    options = {**SETTINGS, **preset, "moe_trace": 1, "moe_anneal_updates": None, "moe_hard_update": None}
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**options, "moe_spawn_update": 0, "max_update": 2})
    seen = [layer for record in updates(trace_file.read(tmp_path)) for layer in record["layers"].values()]
    assert len(seen) == 4
    for layer in seen:
        assert len(layer["load"]) == len(layer["widths"]) == 4
        assert 0 < layer["assignments"] < 2 * layer["tokens"]


def test_loads_are_those_of_the_log(traced):
    """The log has means over layers of the same batch."""
    for record_, log in zip(updates(traced[1]), traced[0].log("train_inner")[1::2]):
        layers = list(record_["layers"].values())
        tokens = layers[0]["tokens"]
        assert all(sum(x["load"]) == x["assignments"] and x["tokens"] == tokens for x in layers)
        experts = sum(x["assignments"] for x in layers) / sum(x["tokens"] for x in layers)
        assert experts == pytest.approx(log["moe_experts"], abs=1e-3)
        entropy = sum(x["gate_entropy"] for x in layers) / 2
        assert entropy == pytest.approx(log["moe_gate_entropy"], abs=2e-3)
        assert [len(x["load"]) for x in layers] == [len(x["widths"]) for x in layers]


def test_the_last_record_routes_the_probe_as_the_checkpoint_does(traced, lm_data):
    run, records = traced
    model = build(lm_data, **SETTINGS).model
    model.load_state_dict(parameters(run.last))
    model.set_num_updates(14)
    probe = records[0]["probe"]
    tokens = torch.tensor(probe["net_input"]["src_tokens"])
    assert tokens[tokens.ne(1)].tolist() == probe["tokens"]["decoder"] and 64 < tokens.numel() <= 128
    with torch.no_grad(), record() as routings:
        model.eval()(tokens)
    for name, layer in moe_layers(model):
        seen = records[-1]["layers"][name]["probe"]
        routing = routings[layer.moe]  # top-1: one pair for each token
        assert seen["expert"] == routing.expert_N[routing.token_N.argsort()].tolist()
        assert seen["weight"] == pytest.approx(routing.weight_N.mean().item(), abs=1e-3)


def test_drift_is_what_has_changed_since_the_record_before(traced):
    probes = [x["layers"]["decoder.layers.1"]["probe"] for x in updates(traced[1])]
    assert probes[:3] == [None] * 3
    assert probes[3]["drift"] is None
    for before, now in zip(probes[3:], probes[4:]):
        different = sum(a != b for a, b in zip(before["expert"], now["expert"]))
        assert now["drift"] == different / len(now["expert"])
    assert (
        drift([0, 1, 2, 3], [0, 1, 3, 2]) == 0.5 and drift(None, [1]) is None and drift([1], [1, 2]) is None
    )


def test_it_changes_nothing(traced, lm_data, tmp_path):
    call(
        "fairseq-train",
        lm_data,
        save_dir=tmp_path,
        **{**SETTINGS, "moe_trace": None, "no_save_optimizer_state": True},
    )
    assert_equal(parameters(tmp_path / "checkpoint_last.pt"), parameters(traced[0].last))
    assert not (tmp_path / trace_file.NAME).exists()


@pytest.mark.parametrize("end", ["", '{"kind":"upd'], ids=["whole", "killed while it wrote"])
def test_a_run_that_goes_on_writes_nothing_twice(end, traced, lm_data, tmp_path):
    """It has written up to update 14, and goes on from the checkpoint of 9, after the spawn."""
    run, records = traced
    (tmp_path / trace_file.NAME).write_text((run.folder / trace_file.NAME).read_text() + end)
    assert trace_file.read(tmp_path) == records
    resumed = {**SETTINGS, "save_dir": tmp_path, "restore_file": run.at(9)}
    call("fairseq-train", lm_data, **resumed)
    assert trace_file.read(tmp_path) == records


def test_a_run_that_begins_anew_begins_the_file_anew(traced, lm_data, tmp_path):
    (tmp_path / trace_file.NAME).write_text("of another run\n")
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**SETTINGS, "max_update": 8, "no_save": True})
    assert trace_file.read(tmp_path) == traced[1][:6]


def test_a_file_that_cannot_be_written_ends_no_run(lm_data, tmp_path):
    (tmp_path / trace_file.NAME).mkdir()
    result = call(
        "fairseq-train", lm_data, save_dir=tmp_path, **{**SETTINGS, "max_update": 8, "no_save": True}
    )
    (line,) = result.lines("--moe-trace writes nothing")
    assert "irectory" in line and result.lines("done training")


@pytest.mark.parametrize(
    "text, error",
    [
        ("", "first line"),
        ("not JSON\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"kind":"update"}\n', "first line"),
        ('{"kind":"run","format":9}\n', "has format 9"),
    ],
)
def test_what_is_no_trace_is_one_sentence(text, error, tmp_path):
    (tmp_path / trace_file.NAME).write_text(text)
    with pytest.raises(ValueError, match=error):
        trace_file.read(tmp_path)


@pytest.mark.parametrize("settings", [MASKED_LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_other_tasks_have_their_tokens(settings, request, tmp_path):
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    options = {**settings, "moe_trace": 1, "moe_spawn_update": 0, "max_update": 2, "no_save": True}
    options.update(disable_validation=True, moe_heads=2 if settings is MASKED_LM else None)
    call("fairseq-train", data, save_dir=tmp_path, **options)
    first, *_, last = trace_file.read(tmp_path)
    tokens = first["probe"]["tokens"]
    for name, layer in last["layers"].items():
        heads = 2 if settings is MASKED_LM else 1
        assert len(layer["probe"]["expert"]) == heads * len(tokens[name.split(".")[0]])
    assert set(tokens) == ({"encoder", "decoder"} if settings is TRANSLATION else {"encoder"})
    assert all(1 not in x for x in tokens.values())


def test_slots_have_no_first_choice(lm_data, tmp_path):
    options = {**MASKED_LM, "moe_router": "soft", "moe_spawn_update": 0, "moe_trace": 1, "max_update": 1}
    options.update(moe_anneal_updates=None, moe_hard_update=None, no_save=True, disable_validation=True)
    call("fairseq-train", lm_data, save_dir=tmp_path, **options)
    (layer,) = trace_file.read(tmp_path)[-1]["layers"].values()
    assert layer["probe"] is None and sum(layer["load"]) > 0


def test_a_probe_leaves_a_model_as_it_was(lm_data):
    setup = build(lm_data, **{**LM, "moe_spawn_update": 0})
    model = setup.model.train()
    model.decoder.layers[0].eval()  # somebody may have frozen it
    modes = {name: module.training for name, module in model.named_modules()}
    batch = setup.batches()[0]["net_input"]
    random, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    Probe(batch, 1).choices(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(random, torch.get_rng_state())
    assert_equal(state, dict(model.state_dict()))


class Writer:
    """A stand-in for a SummaryWriter, which notes what it is given."""

    made = []

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.made.append(self)

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def of_kind(writer, name):
    return [(args, kwargs) for kind, args, kwargs in writer.calls if kind == name]


def test_tensorboard_shows_single_experts(traced, lm_data, tmp_path):
    Writer.made.clear()
    with (
        mock.patch.object(progress_bar, "SummaryWriter", Writer),
        mock.patch.dict(progress_bar._tensorboard_writers, clear=True),
    ):
        options = {
            **SETTINGS,
            "save_dir": tmp_path,
            "tensorboard_logdir": tmp_path / "board",
            "no_save": True,
        }
        call("fairseq-train", lm_data, **options)
    (writer,) = [x for x in Writer.made if x.folder.endswith("moe")]
    histograms = of_kind(writer, "add_histogram_raw")
    for (tag,), kwargs in histograms:
        (expected,) = [x for x in updates(traced[1]) if x["update"] == kwargs["global_step"]]
        assert kwargs["bucket_counts"] == expected["layers"][tag.partition("/")[2]]["load"]
    assert len(histograms) == 2 * len(updates(traced[1]))
    texts = [args for args, _ in of_kind(writer, "add_text") if args[0] == "experts"]
    assert len(texts) == 1 and "of parents 0 0 0 0" in texts[0][1] and texts[0][2] == 6
    scalars = [args for args, _ in of_kind(writer, "add_scalar")]
    assert ("experts/decoder.layers.1", 4, 6) in scalars and ("generations/decoder.layers.0", 1, 6) in scalars


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_begins_a_file_of_tensorboard(rank, tmp_path):
    """All count the loads as often, which takes every rank."""
    common = types.SimpleNamespace(tensorboard_logdir=str(tmp_path), wandb_project=None, log_interval=7)
    cfg = types.SimpleNamespace(model=types.SimpleNamespace(), common=common)
    trainer = types.SimpleNamespace(cfg=cfg, data_parallel_rank=rank, get_model=lambda: None)
    trace = Trace()
    Writer.made.clear()
    with (
        mock.patch.object(progress_bar, "SummaryWriter", Writer),
        mock.patch.dict(progress_bar._tensorboard_writers, clear=True),
    ):
        trace._start(trainer, [], 0)
    assert trace.every == 7 and len(Writer.made) == len(trace.boards) == (rank == 0)


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is not installed")
def test_a_real_writer_takes_it(lm_data, tmp_path):
    import tensorboardX

    with (
        mock.patch.object(progress_bar, "SummaryWriter", tensorboardX.SummaryWriter),
        mock.patch.dict(progress_bar._tensorboard_writers, clear=True),
    ):
        options = {
            **SETTINGS,
            "save_dir": tmp_path,
            "tensorboard_logdir": tmp_path / "board",
            "no_save": True,
        }
        call("fairseq-train", lm_data, **{**options, "max_update": 8})
        for writer in progress_bar._tensorboard_writers.values():
            writer.close()
    (file,) = (tmp_path / "board" / "moe").iterdir()
    assert b"load/decoder.layers.1" in file.read_bytes()


def test_weights_and_biases_shows_single_experts_without_a_file(lm_data, tmp_path):
    """Without ``--moe-trace`` as often as fairseq logs."""
    logged = []
    wandb = types.SimpleNamespace(
        init=lambda **kwargs: None,
        run=object(),
        log=lambda values, step=None: logged.append((step, values)),
        config=mock.Mock(),
        Histogram=lambda np_histogram: list(np_histogram[0]),
        Html=str,
    )
    options = {**SETTINGS, "save_dir": tmp_path, "wandb_project": "p", "no_save": True, "log_interval": 4}
    with mock.patch.object(progress_bar, "wandb", wandb, create=True):
        call("fairseq-train", lm_data, **{**options, "moe_trace": None, "max_update": 8})
    ours = [(step, x) for step, x in logged if any(key.startswith("moe/") for key in x)]
    assert [step for step, _ in ours] == [4, 7, 8]
    assert "of parents 0 0 0 0" in ours[1][1]["moe/event"] and ours[1][1]["moe/experts/decoder.layers.1"] == 4
    assert len(ours[2][1]["moe/load/decoder.layers.0"]) == 4
    assert [step for step, _ in logged] == sorted(
        step for step, _ in logged
    )  # wandb refuses a step that is over
    assert not (tmp_path / trace_file.NAME).exists()
