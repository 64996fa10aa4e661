"""``evomoe info``: what a checkpoint is, from the file alone."""

import json
import time

import pytest
import torch
from fairseq import checkpoint_utils

import fairseq_evomoe
from fairseq_evomoe.checkpoints import versions
from fairseq_evomoe.checkpoints.flop import experts_of_token
from fairseq_evomoe.checkpoints.info import info_of
from fairseq_evomoe.checkpoints.info_text import text
from fairseq_evomoe.checkpoints.saved_options import SavedOptions
from fairseq_evomoe.moe import ROUTERS
from support import golden
from support.cli import LM, MASKED_LM, TRANSLATION, call, evomoe
from support.tasks import DENSE, PLAIN, dense

TASKS = {settings["task"]: settings for settings in (LM, MASKED_LM, TRANSLATION)}


@pytest.fixture(params=TASKS)
def run(request, trained):
    """A run of a task, whose experts spawn before update 7."""
    return TASKS[request.param], trained(TASKS[request.param])


def loaded(path):
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model


def test_figures_are_those_of_the_model(run):
    settings, run = run
    info, model = info_of(str(run.last)), loaded(run.last)
    assert (info.architecture, info.task) == (
        settings["arch"].replace("_tiny", "") + "_tiny",
        settings["task"],
    )
    assert info.criterion == settings["criterion"] and (info.router, info.preset) == ("dts", None)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    logged = run.log("valid")[-1]["valid_moe_active_params"]
    assert info.active_parameters.expected == pytest.approx(logged, abs=0.6)
    assert [layer.widths for layer in info.layers] == [[48] * 4] * len(info.layers)
    assert all(layer.name in dict(model.named_modules()) for layer in info.layers)
    assert (info.update, info.stage) == (14, "top-1 routing") and info.temperature == 0.5
    assert info.options["experts"] == 4 and "experts" in info.not_defaults and info.unresolved is None
    assert info.obstacles == [] and info.saved_with == info.here == versions.here()
    assert info.saved_with["fairseq_evomoe"] == fairseq_evomoe.__version__


def test_optimizer_and_parts_are_what_the_file_has(run):
    path = run[1].last
    info, state = info_of(str(path)), torch.load(path, weights_only=False)
    statistics = [x for each in state["last_optimizer_state"]["state"].values() for x in each.values()]
    size = sum(x.numel() * x.element_size() for x in statistics if torch.is_tensor(x) and x.dim() > 0)
    assert info.optimizer == "FairseqAdam" and info.optimizer_bytes == size == info.parts["optimizer"]
    # two moments of 4 bytes, and what is no parameter has none
    assert size == 8 * info.parameters
    model = sum(x.numel() * x.element_size() for x in state["model"].values())
    assert sum(info.parts[part] for part in ("experts", "routers", "rest of the model")) == model
    assert info.bytes == path.stat().st_size


@pytest.mark.parametrize("settings", [LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_flop_of_a_dense_model_are_those_that_torch_counts(settings, trained):
    """In a sentence of 12 tokens, or a pair of them; not all that attention is made of is counted."""
    counting = pytest.importorskip("torch.utils.flop_counter")
    path = trained(dense(settings), max_update=2).last
    model, tokens = loaded(path).eval(), torch.randint(4, 20, (1, 12))
    inputs = [tokens] if settings is LM else [tokens, torch.tensor([12]), tokens]
    with torch.no_grad(), counting.FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = counter.get_flop_counts()["Global"]
    of_matrices = sum(n for operation, n in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    flop = info_of(str(path)).flop_per_token
    assert of_matrices == 12 * flop.forward.expected and flop.training.expected == 3 * flop.forward.expected
    layers = 2 if settings is LM else 6  # with attention of width 32
    assert flop.per_attended == layers * 2 * 2 * 32


def test_a_top_1_model_costs_what_the_dense_one_does_and_its_router(trained):
    sparse = info_of(str(trained(LM).last)).flop_per_token
    one = info_of(str(trained(dense(LM), max_update=2).last)).flop_per_token
    weight = loaded(trained(LM).last).decoder.layers[1].moe.router.weight
    assert sparse.forward.expected == one.forward.expected + 2 * weight.numel()
    assert sparse.per_attended == one.per_attended


@pytest.mark.parametrize("update, stage, temperature", [(6, "one expert", None), (9, "dense gate", 0.5)])
def test_stages(update, stage, temperature, trained):
    info = info_of(str(trained(LM).at(update)))
    assert (info.update, info.stage, info.temperature) == (update, stage, temperature)
    assert len(info.layers[0].widths) == (1 if update == 6 else 4)
    if update == 6:
        assert info.parameters == info.active_parameters.expected


def test_experts_that_have_spawned_twice(lm_data, tmp_path):
    settings = {**LM, "moe_spawn_update": "2:2,6:4", "max_update": 8, "disable_validation": True}
    settings.update(save_interval_updates=3, moe_hard_update=9)
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    (early,) = tmp_path.glob("checkpoint_*_3.pt")
    assert info_of(str(early)).stage == "dense gate, stage 1 of 2"
    info = info_of(str(tmp_path / "checkpoint_last.pt"))
    assert info.stage == "dense gate, stage 2 of 2" and info.layers[0].experts == 4


@pytest.mark.parametrize("auto", [True, False], ids=["auto", "given"])
def test_experts_that_have_spawned_at_a_plateau(auto, lm_data, tmp_path):
    settings = {**LM, "moe_spawn_update": "auto" if auto else 3, "max_update": 8, "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)  # half of 8, at the latest
    told = ", spawned at a plateau before update 4" if auto else ""
    assert info_of(str(tmp_path / "checkpoint_last.pt")).stage == "top-1 routing" + told


@pytest.mark.parametrize("settings", [LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_a_dense_model_has_no_experts(settings, trained):
    run = trained(dense(settings), max_update=2)
    info, model = info_of(str(run.last)), loaded(run.last)
    assert info.architecture == DENSE[settings["task"]]["arch"] and info.router is None
    total = sum(p.numel() for p in model.parameters())
    assert (info.parameters, info.active_parameters.expected, info.layers) == (total, total, [])
    assert info.stage == "dense model" and info.options == {} and info.obstacles == []
    assert "layer " not in text(info)


def test_a_set_of_files_is_what_one_file_is(trained, tmp_path):
    whole = trained(LM).last
    evomoe("reshard", whole, "--parts", 3, "--out", tmp_path / "parts.pt")
    one, several = info_of(str(whole)), info_of(str(tmp_path / "parts.pt"))
    assert (one.files, several.files) == (1, 3)
    assert several.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    for name in vars(one):
        if name not in ("path", "files", "bytes"):
            assert getattr(one, name) == getattr(several, name), name


@pytest.mark.parametrize("name", golden.CASES)
def test_checkpoints_of_version_0_1(name, tmp_path):
    path = golden.unpack_checkpoint(name, tmp_path)
    info = info_of(str(path))
    state = torch.load(path, weights_only=False)
    assert info.update == state["optimizer_history"][-1]["num_updates"]
    assert info.layers and info.unresolved is None and info.saved_with == {} and info.obstacles == []
    assert 0 < info.active_parameters.least <= info.active_parameters.most <= info.parameters
    assert "not told" not in text(info) and info.options["experts"] >= 1
    if name == "plateau":
        assert "plateau" in info.stage or info.stage == "one expert"


@pytest.mark.parametrize(
    "options, experts",
    [
        ({"moe_router": "switch"}, (1, 1, 1)),
        ({"moe_router": "topk"}, (2, 2, 2)),
        ({"moe_router": "top-p"}, (1, 4, None)),
        ({"moe_router": "remoe", "moe_mean_experts": 1.5}, (0, 4, 1.5)),
        ({"moe_router": "hash", "moe_hashes": 2}, (2, 2, 2)),
        ({"moe_router": "topk", "moe_zero_experts": 1}, (1, 2, None)),
        ({"moe_router": "dts", "moe_eval_routing": "adaptive"}, (1, 4, None)),
        ({"moe_router": "comet"}, (1, 2, None)),
        ({"moe_router": "stable", "moe_stable_update": 9}, (1, 1, 1)),
    ],
    ids=str,
)
def test_experts_of_a_token(options, experts, lm_data, tmp_path):
    settings = {**LM, **PLAIN, **options, "max_update": 1, "disable_validation": True}
    settings["max_update"] = 10 if "moe_stable_update" in options else 1
    if options["moe_router"] != "dts":
        settings["moe_anneal_updates"] = None
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    info = info_of(str(tmp_path / "checkpoint_last.pt"))
    active = info.experts_per_token
    assert (active.least, active.most, active.expected) == experts
    model = loaded(tmp_path / "checkpoint_last.pt")
    assert info.parameters == sum(p.numel() for p in model.parameters())
    if options["moe_router"] == "stable":
        assert info.table_parameters == model.decoder.layers[1].moe.router.embedding_VL.numel()


def test_a_run_whose_defaults_could_not_be_had(lm_data, tmp_path):
    """Without --max-update the router asks for --moe-stable-update, which was given."""
    settings = {**LM, **PLAIN, "moe_router": "stable", "moe_stable_update": 2, "moe_anneal_updates": None}
    settings.update(max_update=None, max_epoch=1, disable_validation=True)
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    info = info_of(str(tmp_path / "checkpoint_last.pt"))
    assert info.options["stable_update"] == 2 and "stable_update" in info.not_defaults
    assert info.unresolved is None and info.obstacles == []


def test_frozen_parameters_count(lm_data, tmp_path):
    """An optimizer knows nothing of them."""
    settings = {**LM, "moe_freeze": "backbone", "max_update": 7, "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    path = tmp_path / "checkpoint_last.pt"
    assert info_of(str(path)).parameters == sum(p.numel() for p in loaded(path).parameters())


def test_what_is_printed(trained, capsys):
    path = trained(LM).last
    evomoe("info", path)
    printed = capsys.readouterr().out
    for line in (
        "model         evomoe_lm_tiny, task language_modeling, criterion evomoe_cross_entropy",
        "stage         top-1 routing, temperature 0.5",
        "resumes here  yes, as far as the file tells",
        "decoder.layers.1  4        48                    12,608",
        "--moe-experts",
    ):
        assert line in printed
    evomoe("info", path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["widths"] == [48] * 4 and found["experts_per_token"]["expected"] == 1


def test_our_own_work_takes_no_two_seconds(trained):
    start = time.process_time()
    text(info_of(str(trained(TRANSLATION).last)))
    assert time.process_time() - start < 2


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        evomoe("info", *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda path: None, "There is no checkpoint"),
        (lambda path: path.mkdir(), "is a folder: give a file"),
        (lambda path: path.write_bytes(b""), "truncated or damaged, or no checkpoint"),
        (lambda path: path.write_text("some text"), "truncated or damaged, or no checkpoint"),
        (lambda path: torch.save({"weight": torch.zeros(1)}, path), "no checkpoint of fairseq's"),
        (lambda path: torch.save([1], path), "no checkpoint of fairseq's"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(make, sentence, tmp_path, capsys):
    make(tmp_path / "x.pt")
    line = refused(capsys, tmp_path / "x.pt")
    assert line.startswith("evomoe info: ") and sentence in line


def test_the_second_file_of_a_set_is_refused(trained, tmp_path, capsys):
    evomoe("reshard", trained(LM).last, "--parts", 2, "--out", tmp_path / "parts.pt")
    assert "give its first file" in refused(capsys, tmp_path / "parts-experts1.pt")
    (tmp_path / "parts-experts1.pt").unlink()
    assert "parts-experts1.pt is missing" in refused(capsys, tmp_path / "parts.pt")


def test_a_truncated_checkpoint_is_named(trained, tmp_path, capsys):
    content = trained(LM).last.read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    assert "x.pt cannot be read" in refused(capsys, tmp_path / "x.pt")


def test_what_keeps_a_run_from_going_on_is_told(trained, tmp_path):
    state = torch.load(trained(LM).last, weights_only=False)
    state["cfg"]["model"].update(_name="of_somebody_else", moe_router="theirs")
    state["last_optimizer_state"] = None
    torch.save(state, tmp_path / "x.pt")
    info = info_of(str(tmp_path / "x.pt"))
    told = " ".join(info.obstacles)
    for part in ("no architecture of_somebody_else", "no router theirs", "--user-dir", "--reset-optimizer"):
        assert part in told
    assert info.optimizer is None and info.experts_per_token.most == 4 and "theirs" in text(info)


@pytest.mark.parametrize("strata, passes", [(None, 2), ("1,1,2", 3), ("4", 1)])
def test_who_passes_strata_has_experts_in_each(strata, passes):
    state = {"cfg": {"model": {"moe_router": "stratified", "moe_strata": strata, "moe_experts": 4}}}
    found = experts_of_token(ROUTERS["stratified"], SavedOptions(state), 4)
    assert (found.least, found.most, found.expected) == (2, 2 * passes, None)
