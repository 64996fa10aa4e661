"""`evomoe report` on checkpoints of every kind."""

import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser

import pytest
import torch
from tqdm import tqdm

from fairseq_evomoe.checkpoints.files import CommandError
from fairseq_evomoe.moe import ROUTERS
from fairseq_evomoe.report import domains, measure, traces
from fairseq_evomoe.report.command import runs_of
from fairseq_evomoe.report.figures import Pictures
from fairseq_evomoe.report.page import render
from fairseq_evomoe.report.reading import Reader
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, build, call, evomoe
from support.malicious import infect
from support.plugin import PLUGIN, import_plugin, registered_for_a_while
from support.tasks import DATA, PLAIN, TASKS, dense


def report(*arguments, out, data, **options):
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    evomoe("report", *arguments, "--data", data, "--out", out, "--tokens", 400, *flags)
    return json.loads((out / "report.json").read_text(encoding="utf-8")), (out / "report.html").read_text(
        encoding="utf-8"
    )


class Parts(HTMLParser):
    """Sections, names and what is loaded, of a page whose elements must all be closed."""

    VOID = {"meta", "link", "br", "wbr", "image", "path", "use", "rect", "stop"}

    def __init__(self, page):
        super().__init__()
        self.sections, self.ids, self.loaded, self.pictures, self.stack = [], [], [], [], []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sections += [attributes["id"]] if tag == "section" else []
        self.pictures += [attributes["aria-label"]] if tag == "svg" else []
        for name in ("src", "href", "xlink:href"):
            self.loaded += [attributes[name]] if name in attributes else []
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, pairs):
        self.handle_starttag(tag, pairs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def check_page(page):
    parts = Parts(page)
    assert len(set(parts.ids)) == len(parts.ids)
    assert all(link.startswith(("#", "data:")) for link in parts.loaded)  # nothing from the network
    assert {link[1:] for link in parts.loaded if link.startswith("#")} <= set(parts.ids)
    assert parts.pictures and all(label.endswith(".") for label in parts.pictures)
    assert "url(http" not in page and "@import" not in page and len(page) < 900_000
    return parts.sections


@pytest.fixture(scope="module")
def lm_run(trained):
    return trained(LM)


@pytest.fixture(scope="module")
def of_run(lm_run, lm_data, tmp_path_factory):
    """The report of several checkpoints of a run, with its log."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "log").write_text(lm_run.result.output)
    checkpoints = [lm_run.at(12), lm_run.at(3), lm_run.at(9), lm_run.last]
    return report(*checkpoints, data=lm_data, out=folder / "out", log=folder / "log")


def test_a_run_from_one_expert_to_all(of_run):
    found, page = of_run
    (run,) = found["runs"]
    assert [checkpoint["update"] for checkpoint in run["checkpoints"]] == [3, 9, 12, 14]
    (layer,), (history,) = run["layers"], run["history"]
    assert sum(layer["load"]) == pytest.approx(1) and layer["experts_per_token"] == 1
    assert [one["experts"] for one in history["family"]] == [1, 4, 4, 4]
    assert history["family"][1]["parents"] == [0] * 4 and history["family"][2]["parents"] == [0, 1, 2, 3]
    assert history["saturation"][0] is None and history["saturation"][-1] == 1
    assert history["drift"][0] is None and 0 <= history["drift"][1] <= 1
    assert run["curves"]["update"] == list(range(1, 15)) and run["curves"]["spawns"]
    assert check_page(page) == [
        f"run0{end}"
        for end in ("", "-layers", "-experts", "-specialisation", "-together", "-history", "-training")
    ]


def test_the_page_says_what_the_numbers_say(of_run):
    found, page = of_run
    layer = found["runs"][0]["layers"][0]
    assert f">{layer['busiest']:.2f}×<" in page and f">{layer['evenness']:.3f}<" in page
    token = next(one for seen in layer["seen"] for one in seen["tokens"])
    assert token["text"] in page and f"<small>{token['lift']:.1f}×</small>" in page
    example = next(one for seen in layer["seen"] for one in seen["examples"])
    assert f"<mark>{example['token'].strip()}</mark>" in page


def test_loads_are_those_of_the_model(lm_run, lm_data, of_run):
    """Counted by a second, plain look at the model's routing."""
    from fairseq import checkpoint_utils

    from fairseq_evomoe.moe import MoELayer, record

    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(lm_run.last)], {"data": str(lm_data)}
    )
    model = models[0].eval()
    (layer,) = [module for module in model.modules() if isinstance(module, MoELayer)]
    task.load_dataset("valid")
    load = torch.zeros(4)
    for batch in task.get_batch_iterator(task.dataset("valid"), max_sentences=8).next_epoch_itr(
        shuffle=False
    ):
        with record() as routings, torch.no_grad():
            model(**batch["net_input"])
        load += routings[layer].load_E()
    found = of_run[0]["runs"][0]["layers"][0]
    assert found["rows"] == load.sum()  # all of the small set was read
    assert found["load"] == pytest.approx((load / load.sum()).tolist(), abs=1e-5)


def test_two_runs_side_by_side(lm_run, lm_data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    settings = {**LM, "moe_router": "hash", **PLAIN, "max_update": 2}
    call("fairseq-train", lm_data, save_dir=other, **settings)
    found, page = report(lm_run.last, other / "checkpoint_last.pt", data=lm_data, out=tmp_path / "out")
    assert [run["router"] for run in found["runs"]] == ["dts", "hash"]
    assert found["runs"][1]["layers"][0]["explained"]["id"] == 1
    differing = {one["option"]: one["values"] for one in found["differences"]}
    assert differing["moe_router"] == ["dts", "hash"] and "moe_experts" not in differing
    assert check_page(page)[:2] == ["side-by-side", "run0"] and "Options that differ" in page


def test_checkpoints_of_other_models_in_one_folder_are_runs_of_their_own(lm_run, lm_data, tmp_path, capsys):
    evomoe("merge", lm_run.last, "--experts", 2, "--out", tmp_path / "small.pt")
    for path in (lm_run.last, lm_run.at(12)):
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(lm_run.last, tmp_path / "same.pt")
    names = ["checkpoint_last.pt", lm_run.at(12).name, "small.pt", "same.pt"]
    first, second = runs_of([str(tmp_path / name) for name in names])
    assert [update for _, update in first.checkpoints] == [12, 14] and first.name != second.name
    assert (
        f"{tmp_path}/checkpoint_last.pt is left out: {tmp_path}/same.pt is of the same"
        in capsys.readouterr().out
    )


CLASSES = pytest.param(CLASSIFICATION, id=CLASSIFICATION["task"])


@pytest.mark.parametrize("settings", [*TASKS, CLASSES])
def test_tasks(settings, request, trained, tmp_path):
    data = request.getfixturevalue(DATA[settings["task"]])
    found, page = report(trained(settings).last, data=data, out=tmp_path / "out")
    (run,) = found["runs"]
    sides = {
        "translation": ["encoder", "decoder"],
        "masked_lm": ["encoder"],
        "language_modeling": ["decoder"],
    }
    assert list(run["texts"]) == sides.get(settings["task"], ["encoder"])
    if settings["task"] == "translation":
        assert "Source and target side" in page
        words = {one["text"] for layer in run["layers"] for seen in layer["seen"] for one in seen["words"]}
        assert {"king", "gnik"} & words  # whole words, of both languages
    check_page(page)


def test_a_sharded_set(lm_run, lm_data, tmp_path):
    evomoe("reshard", lm_run.last, "--parts", 2, "--out", tmp_path / "parts.pt")
    found, _ = report(tmp_path / "parts.pt", data=lm_data, out=tmp_path / "out")
    whole, _ = report(lm_run.last, data=lm_data, out=tmp_path / "whole")
    assert found["runs"][0]["layers"] == whole["runs"][0]["layers"]


@pytest.mark.parametrize("settings", TASKS[:2])
def test_domains(settings, trained, lm_data, tmp_path):
    (tmp_path / "kings.txt").write_text("the king loves the crown\n" * 30)
    (tmp_path / "fools.txt").write_text("a servant forgets an old song at dawn\n" * 30)
    kings, fools = (f"{name}={tmp_path / name}.txt" for name in ("kings", "fools"))
    last = trained(settings).last
    found, page = report(last, "--domain", kings, data=lm_data, out=tmp_path / "out", domain=fools)
    layer = found["runs"][0]["layers"][0]
    domains = layer["domains"]
    assert domains["counts"] == [30 * 6, 30 * 9] or settings["task"] != "language_modeling"
    assert domains["names"] == ["kings", "fools"] and len(domains["share"]) == 2
    assert [sum(row) for row in domains["share"]] == pytest.approx([1, 1]) and 0 <= domains[
        "information"
    ] <= 1
    assert f"Domain, {layer['name']}" in page


def test_sets_of_one_domain_each_are_found(lm_run, lm_data, tmp_path):
    data = tmp_path / "bin"
    shutil.copytree(lm_data, data)
    for end in ("bin", "idx"):
        for domain, split in (("plays", "valid"), ("manuals", "test")):
            shutil.copy(data / f"{split}.{end}", data / f"test_{domain}.{end}")
    found, _ = report(lm_run.last, data=data, out=tmp_path / "out")
    assert found["data"]["domains"] == {"manuals": "test_manuals", "plays": "test_plays"}
    assert found["runs"][0]["layers"][0]["domains"]["names"] == ["manuals", "plays"]


def test_domains_of_a_translation_are_of_its_source(trained, translation_data, tmp_path):
    (tmp_path / "a.txt").write_text("eht gnik sevol eht nworc\n" * 9)
    (tmp_path / "b.txt").write_text("a loof sraef eht thgin ta nwad\n" * 9)
    given = [f"--domain={name}={tmp_path / name}.txt" for name in "ab"]
    found, _ = report(trained(TRANSLATION).last, *given, data=translation_data, out=tmp_path / "out")
    known = {layer["side"]: layer["domains"] for layer in found["runs"][0]["layers"]}
    assert known["encoder"]["names"] == ["a", "b"] and known["decoder"] is None


ROUTER_OPTIONS = {"topk": {"moe_top_k": 2}, "stable": {"moe_stable_update": 1}}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router, lm_data):
    masked = ROUTERS[router].needs_whole_sequence
    settings = {
        **(MASKED_LM if masked else LM),
        **PLAIN,
        "moe_router": router,
        **ROUTER_OPTIONS.get(router, {}),
    }
    parts = build(lm_data, **settings)
    sample = Reader("x.pt", str(lm_data), parts.cfg, parts.task, parts.model).read(
        "valid", 200, tqdm(disable=True)
    )
    run = {"name": "x", **measure.run([sample])}
    layer = run["layers"][0]
    assert sum(layer["load"]) == pytest.approx(layer["experts_per_token"] if not layer_is_dense(layer) else 1)
    if router == "hash":
        assert layer["explained"]["id"] == 1
    if router == "soft":
        assert "mixtures" in layer["notes"][0] and layer["flops"] is None and layer["pairs"] is None
    if router == "topk":
        assert layer["pairs"] is not None and layer["experts_per_token"] == 2
    if router in ("soft", "topk"):
        check_page(page_of(run))


def page_of(run):
    data = {"folder": "d", "subset": "valid", "tokens": 1}
    return render({"version": "0", "data": data, "runs": [run], "differences": []}, Pictures())


def layer_is_dense(layer):
    return layer["notes"] and layer["pairs"] is None and layer["experts_per_token"] == len(layer["experts"])


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_heads": 2},
        {"moe_expert_sizes": "arithmetic", "moe_shared_expert": True},
        {"moe_router": "topk", "moe_zero_experts": 1, "moe_copy_experts": 2},
        {"moe_eval_routing": "adaptive", "moe_threshold": 0.0},
    ],
    ids=["heads", "widths", "free", "dense"],
)
def test_parts_of_layers(changes, lm_data):
    parts = build(lm_data, **{**LM, **PLAIN, **changes, "moe_experts": 4})
    sample = Reader("x.pt", str(lm_data), parts.cfg, parts.task, parts.model).read(
        "valid", 200, tqdm(disable=True)
    )
    run = {"name": "x", **measure.run([sample])}
    layer = run["layers"][0]
    if "moe_heads" in changes:
        assert layer["rows"] == 2 * run["texts"]["decoder"]
    if "moe_expert_sizes" in changes:
        assert len(set(layer["widths"])) > 1
    if "moe_zero_experts" in changes:
        assert layer["experts"][4:] == ["zero", "copy 0", "copy 1"] and layer["widths"][4:] == [0] * 3
        assert sum(layer["load"]) == pytest.approx(2) and len(layer["similarity_of_weights"]) == 4
    if "moe_threshold" in changes:
        assert "all experts" in layer["notes"][0] and sum(layer["load"]) == pytest.approx(1)
    check_page(page_of(run))


@pytest.fixture(scope="module")
def dense_checkpoint(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    call("fairseq-train", lm_data, save_dir=folder, **{**dense(LM), "max_update": 1})
    return folder / "checkpoint_last.pt"


def refusal(*arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        evomoe("report", *arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("evomoe report: ") and said.count("\n") == 1
    return said


def test_bad_input_is_refused_in_a_sentence(
    lm_run, lm_data, translation_data, dense_checkpoint, tmp_path, capsys
):
    out = tmp_path / "out"
    good = ["--data", lm_data, "--out", out]
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "foreign.txt").write_text("Ἐν ἀρχῇ ἦν ὁ λόγος\n")
    (tmp_path / "latin.txt").write_bytes("über\n".encode("latin-1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    last = lm_run.last
    for arguments, sentence in [
        (["none.pt", *good], "There is no checkpoint none.pt"),
        ([tmp_path / "text", *good], "is truncated or damaged, or no checkpoint"),
        ([dense_checkpoint, *good], "has no MoE layers"),
        ([lm_run.at(3), *good], "has one expert in each layer.*--moe-spawn-update"),
        ([last, "--data", "nowhere", "--out", out], "--data nowhere is not a folder"),
        ([last, "--data", translation_data, "--out", out], "cannot be run on --data"),
        ([last, *good, "--subset", "none"], "cannot be run on --data"),
        ([last, "--data", tmp_path, "--out", out], "dict.txt; give the folder that fairseq-preprocess made"),
        ([last, *good, "--tokens", 0], "--tokens must be at least 1"),
        ([last, *good, "--log", "none.log"], "There is no --log none.log"),
        ([last, *good, "--log", tmp_path / "text"], "has no lines"),
        ([last, *good, "--log", tmp_path / "text", "--log", tmp_path / "text"], "1 runs and 2 --log"),
        ([last, *good, "--domain", "x"], "--domain must be NAME=FILE"),
        ([last, *good, "--domain", "x=none"], "none is neither a file nor a set"),
        ([last, *good, "--domain", "x=/nowhere/text.txt"], "/nowhere/text.txt is neither a file nor a set"),
        ([last, *good, "--domain", "x=**"], r"\*\* is neither a file nor a set"),
        ([last, *good, "--subset", "/nowhere"], "cannot be run on --data"),
        ([last, *good, "--domain", f"x={tmp_path / 'latin.txt'}"], "latin.txt cannot be read.*text in UTF-8"),
        ([last, *good, "--domain", f"x={tmp_path / 'foreign.txt'}"], "no text that the dictionary"),
        ([last, "--data", lm_data, "--out", tmp_path / "a" / "b"], "does not exist: create it"),
        ([last, "--data", lm_data, "--out", tmp_path / "full"], "is there already.*--force"),
        ([last, "--data", lm_data, "--out", tmp_path / "full", "--force"], "other things than a report"),
    ]:
        assert re.search(sentence, refusal(*arguments, capsys=capsys)), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "foreign.txt",
        "full",
        "latin.txt",
        "text",
    ]  # nothing half-written
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


def test_nothing_in_a_file_is_executed(lm_run, lm_data, tmp_path, capsys):
    infected, trace = tmp_path / "infected.pt", tmp_path / "executed"
    shutil.copy(lm_run.last, infected)
    infect(infected, "exec", trace)
    arguments = [infected, "--data", lm_data, "--out", tmp_path / "out"]
    assert "infected.pt is refused: it holds objects" in refusal(*arguments, capsys=capsys)
    assert not trace.exists()


def test_a_run_of_several_spawns_is_a_tree(lm_data, tmp_path):
    run = tmp_path / "run"
    stages = {"moe_spawn_update": "2:2,4:4", "moe_gate_warmup": 1, "moe_anneal_updates": 1}
    stages.update(moe_hard_update=1, moe_trace=1, save_interval_updates=2, max_update=6)
    call("fairseq-train", lm_data, save_dir=run, **{**LM, **stages})
    checkpoints = sorted(run.glob("checkpoint_1_*.pt"))
    found, page = report(*checkpoints, data=lm_data, out=tmp_path / "out")
    (seen,), written = found["runs"][0]["history"], found["runs"][0]["trace"]["layers"]["decoder.layers.1"]
    assert [one["experts"] for one in seen["family"]] == [1, 2, 4]
    assert [one["experts"] for one in written["family"]] == [1, 2, 4, 4]
    # what is told by likeness is what the run wrote down
    assert [one["parents"] for one in seen["family"][1:]] == [
        one["parents"] for one in written["family"][1:3]
    ]
    assert sorted(seen["family"][2]["parents"]) == [0, 0, 1, 1]


def test_force_replaces_a_report_and_a_failure_leaves_it(lm_run, lm_data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    _, page = report(lm_run.last, data=lm_data, out=out)
    assert "is there already" in refusal(lm_run.last, "--data", lm_data, "--out", out, capsys=capsys)
    (out / "report.html").write_text("old")
    monkeypatch.setattr("fairseq_evomoe.report.command.json.dumps", fail)
    with pytest.raises(OSError, match="disk"):
        report(lm_run.last, "--force", data=lm_data, out=out)
    assert (out / "report.html").read_text() == "old"
    monkeypatch.undo()
    assert report(lm_run.last, "--force", data=lm_data, out=out)[1] == page  # the same each time
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail(*args, **options):
    raise OSError("disk full")


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_without_a_package_a_sentence_says_so(package, lm_run, lm_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = [lm_run.last, "--data", lm_data, "--out", tmp_path / "out"]
    assert f"pip install {package}" in refusal(*arguments, capsys=capsys)


def test_text_for_sentencepiece_needs_it(tmp_path, monkeypatch):
    (tmp_path / "spm.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CommandError, match="pip install sentencepiece, or give NAME=SET"):
        domains.encoder(str(tmp_path), types.SimpleNamespace(symbols=["\u2581the"]))


def test_a_set_that_cannot_be_read_is_a_sentence(lm_run, lm_data, tmp_path, capsys):
    data = tmp_path / "bin"
    shutil.copytree(lm_data, data)
    (data / "odd.idx").write_bytes(b"no index")
    arguments = [lm_run.last, "--data", data, "--out", tmp_path / "out", "--domain", "x=odd"]
    assert "cannot be run on --data" in refusal(*arguments, capsys=capsys)


def test_a_router_of_a_plugin(lm_data, tmp_path):
    settings = {**LM, **PLAIN, "user_dir": PLUGIN, "moe_router": "nearest", "max_update": 1}
    with registered_for_a_while():
        import_plugin()
        call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
        found, _ = report(
            tmp_path / "checkpoint_last.pt", data=lm_data, out=tmp_path / "out", **{"user-dir": PLUGIN}
        )
    assert found["runs"][0]["router"] == "nearest"


def test_what_the_run_wrote_down_while_it_trained(lm_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    call("fairseq-train", lm_data, save_dir=run, **{**LM, "moe_trace": 2, "max_update": 12})
    found, page = report(run / "checkpoint_last.pt", data=lm_data, out=tmp_path / "out")
    trace = found["runs"][0]["trace"]
    layer = trace["layers"]["decoder.layers.1"]
    assert (
        trace["update"] == [2, 4, 6, 8, 10, 12] and [len(load) for load in layer["load"]] == [1] * 3 + [4] * 3
    )
    assert layer["load"][0] == [1] and layer["drift"][:4] == [None] * 4 and layer["drift"][-1] is not None
    assert [(one["update"], one["experts"]) for one in layer["family"]] == [(2, 1), (6, 4), (12, 4)]
    assert layer["family"][1]["parents"] == [0] * 4
    assert "run0-trace" in check_page(page)
    monkeypatch.chdir(run)
    assert traces.read("")["update"] == trace["update"]  # as beside checkpoint_last.pt
    (run / "moe_trace.jsonl").write_text("no trace")
    with pytest.raises(SystemExit):
        report(run / "checkpoint_last.pt", "--force", data=lm_data, out=tmp_path / "out")


def test_long_traces_are_thinned():
    layer = {"load": [3, 1], "tokens": 4, "assignments": 4, "dropped": 0, "probe": None}
    updates = [
        {"kind": "update", "update": u, "phase": 2, "temperature": 1.0, "layers": {"a": layer}}
        for u in range(1, 1002)
    ]
    kept = traces._thinned(updates)
    assert len(kept) <= traces.MOST and kept[-1]["update"] == 1001
    steps = {b["update"] - a["update"] for a, b in zip(kept, kept[1:])}
    assert len(steps) == 1
