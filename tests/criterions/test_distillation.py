"""Learning from a teacher, against formulas in float64, fairseq's own criterions, and stock fairseq."""

import math
import re

import pytest
import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.criterions.distillation import DistillationConfig, EvoMoEDistillation, divergence
from fairseq_evomoe.models.feed_forward import moe_layers
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, Run, build, call, evomoe, parameters
from support.refusals import refused
from support.resume import check_resume
from support.stock import stock
from support.tasks import DATA, TASKS, dense

USER_DIR = LM["user_dir"]


def student(settings, teacher, **options):
    """The settings of fairseq's own model that learns from a checkpoint."""
    settings = {**dense(settings), "user_dir": USER_DIR, "criterion": "evomoe_distillation"}
    return {**settings, "distillation_teacher": teacher, **options}


def test_the_divergence_is_that_of_the_formula():
    torch.manual_seed(1)
    teacher, model = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    expected = []
    for t, s in zip(teacher.tolist(), model.tolist()):
        p, q = ([math.exp(v / 3) for v in row] for row in (t, s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
    found = divergence(teacher, model, 3.0)
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-12) and (found > 0).all()
    assert divergence(teacher, teacher).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: divergence(teacher, x, 2.0), model.requires_grad_())
    assert divergence(teacher.half(), model.detach().half()).dtype == torch.float32


def setup_of(settings, data, **options):
    """A student in float64, without dropout, its criterion, and a batch."""
    made = build(data, **{**settings, "dropout": 0.0, "attention_dropout": 0.0, **options})
    return made.model.double(), made.criterion, made.batches()[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("settings", TASKS)
def test_without_weight_it_is_fairseq_s_own(settings, trained, request):
    """Loss, gradient, sample size and what is logged; label smoothing with translation."""
    data, teacher = request.getfixturevalue(DATA[settings["task"]]), trained(settings).last
    options = student(settings, teacher, distillation_weight=0.0)
    model, criterion, batch = setup_of(options, data)
    _, theirs, _ = setup_of(dense(settings), data)
    results = [each(model.train(), batch) for each in (criterion.double(), theirs)]
    (loss, size, log), (expected, their_size, their_log) = results
    assert torch.allclose(loss.float(), expected.float(), rtol=1e-5) and int(size) == int(their_size)
    assert float(log["loss"]) == pytest.approx(float(their_log["loss"]), rel=1e-5)
    both = [gradients(model, each(model.train(), batch)[0]) for each in (criterion, theirs)]
    assert torch.allclose(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", TASKS)
def test_equals_the_reference(settings, trained, request):
    """Logits of both models, word by word that counts."""
    data, teacher = request.getfixturevalue(DATA[settings["task"]]), trained(settings).last
    options = student(settings, teacher, distillation_weight=0.3, distillation_temperature=2.0)
    model, criterion, batch = setup_of(options, data)
    criterion = criterion.double()
    loss, size, log = criterion(model.train(), batch)
    expert = build(data, **settings).model.double()
    expert.load_state_dict(parameters(teacher), strict=False)
    inputs, target = batch["net_input"], batch["target"]
    with torch.no_grad():
        logits, taught = model(**inputs)[0], expert.eval()(**inputs)[0]
    smoothing = 0.1 if settings is TRANSLATION else 0.0
    task_loss = kl = count = 0
    for s, t, word in zip(logits.flatten(0, 1), taught.flatten(0, 1), target.flatten().tolist()):
        if word == 1:
            continue
        log_q = s.log_softmax(0)
        each = smoothing / (len(s) - 1)
        task_loss += -(1 - smoothing - each) * log_q[word].item() - each * log_q.sum().item()
        p, log_p = (t / 2).softmax(0), (t / 2).log_softmax(0)
        kl += (p * (log_p - (s / 2).log_softmax(0))).sum().item()
        count += 1
    assert loss.item() == pytest.approx(0.7 * task_loss + 0.3 * 4 * kl, rel=1e-6)
    assert float(log["loss"]) == pytest.approx(task_loss) and float(log["distillation"]) == pytest.approx(kl)
    assert int(log["counted"]) == count == int(size) and kl > 0.01
    evaluated, _, log = criterion(model.eval(), batch)
    assert evaluated.item() == pytest.approx(task_loss) and log["distillation"] == 0


@pytest.mark.parametrize("settings", TASKS)
def test_a_student_becomes_like_its_teacher(settings, trained, request):
    """On one batch, with nothing to learn but its predictions."""
    data, teacher = request.getfixturevalue(DATA[settings["task"]]), trained(settings).last
    model, criterion, batch = setup_of(student(settings, teacher, distillation_weight=1.0), data)
    criterion, optimizer = criterion.double(), torch.optim.Adam(model.parameters(), lr=0.003)
    divergences = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, size, log = criterion(model.train(), batch)
        (loss / size).backward()
        optimizer.step()
        divergences.append(float(log["distillation"]))
    assert divergences[-1] < 0.5 * divergences[0]


@pytest.fixture(scope="module", params=[LM, MASKED_LM, TRANSLATION], ids=lambda settings: settings["task"])
def refined(request, trained, tmp_path_factory):
    """A dense model of MoE experts, and the run that refines it; with the settings of that, and the data."""
    settings = request.param
    folder = tmp_path_factory.mktemp("refined")
    data, teacher = request.getfixturevalue(DATA[settings["task"]]), trained(settings).last
    evomoe("densify", teacher, "--method", "topk", "--out", folder / "dense.pt")
    options = student(settings, teacher, finetune_from_model=folder / "dense.pt", max_update=6, lr=0.002)
    options.update(distillation_weight=1.0)
    run = Run(folder, call("fairseq-train", data, save_dir=folder, save_interval_updates=3, **options))
    return settings, options, data, run


def test_a_refined_model_is_one_of_stock_fairseq(refined, tmp_path):
    """It is used without the plugin: evaluated, or asked for translations."""
    settings, _, data, run = refined
    if settings is LM:
        more = ["--path", run.last, "--gen-subset", "valid", "--tokens-per-sample", "16"]
        assert re.search(r"Perplexity: [\d.]+", stock("eval_lm", data, *more, cwd=tmp_path))
    elif settings is MASKED_LM:
        more = ["--path", run.last, "--task", "masked_lm", "--valid-subset", "valid"]
        assert re.search(r"\| loss [\d.]+", stock("validate", data, *more, cwd=tmp_path))
    else:
        printed = stock("generate", data, "--path", run.last, "--max-len-b", "20", cwd=tmp_path)
        assert len(re.findall(r"^H-\d+", printed, flags=re.MULTILINE)) == 40


def test_it_has_nothing_of_its_teacher(refined):
    settings, options, _, run = refined
    assert all(step["distillation"] > 0 for step in run.log("train_inner"))
    assert "valid_loss" in run.log("valid")[-1] and "valid_distillation" not in run.log("valid")[-1]
    state = load_checkpoint_to_cpu(str(run.last))
    teacher = load_checkpoint_to_cpu(str(options["distillation_teacher"]))["model"]
    assert not [key for key in state["model"] if "moe" in key] and not state.get("criterion")
    assert any(".moe." in key for key in teacher)
    number = sum(len(group["params"]) for group in state["last_optimizer_state"]["param_groups"])
    assert number <= len(state["model"])


def test_a_refinement_resumes_bit_equal(refined, tmp_path):
    settings, options, data, run = refined
    options = {**options, "finetune_from_model": None}
    check_resume(data, tmp_path, options, (3,), run)


def test_experts_may_learn_and_their_losses_are_their_own(trained, lm_data):
    """A teacher with experts adds nothing to the losses and statistics of a student with experts."""
    alone, taught = (
        build(lm_data, **{**LM, "moe_spawn_update": 0, "moe_balance_weight": 0.1, **more})
        for more in ({}, {"criterion": "evomoe_distillation", "distillation_teacher": trained(LM).last})
    )
    batch = alone.batches()[0]
    logs = []
    for each in (alone, taught):
        each.model.load_state_dict(alone.model.state_dict())
        torch.manual_seed(0)
        loss, size, log = each.criterion(each.model.train(), batch)
        logs.append({key: value for key, value in log.items() if key.startswith("moe_")})
    assert logs[0].keys() == logs[1].keys()
    assert all(torch.equal(torch.as_tensor(logs[0][key]), torch.as_tensor(logs[1][key])) for key in logs[0])


def test_the_teacher_may_be_dense_and_goes_where_the_criterion_goes(lm_data, tmp_path):
    settings = {**dense(LM), "max_update": 1, "user_dir": USER_DIR, "dropout": 0.0, "attention_dropout": 0.0}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    path = tmp_path / "checkpoint_last.pt"
    _, criterion, batch = setup_of(student(LM, path), lm_data)
    (teacher,) = criterion._teacher
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not list(criterion.parameters()) and not criterion.state_dict()
    criterion.double()
    assert next(teacher.parameters()).dtype == torch.float64
    loss, _, log = criterion(teacher.train(), batch)  # of itself it has nothing to learn
    assert log["distillation"] < 1e-9


def changed(trained, path, change):
    state = torch.load(trained(LM).last)
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "change, parts",
    [
        (
            lambda s: s["cfg"]["task"].update(_name="translation"),
            ["--task translation", "same task"],
        ),
        (
            lambda s: s["model"].update({"decoder.embed_tokens.weight": torch.zeros(7, 32)}),
            ["knows 7 words", "has "],
        ),
        (lambda s: s["cfg"]["model"].update(_name="of_somebody"), ["model of_somebody", "--user-dir"]),
        (lambda s: s.pop("cfg"), ["no checkpoint of fairseq"]),
    ],
)
def test_a_teacher_that_is_none_is_refused_in_a_sentence(change, parts, trained, lm_data, tmp_path):
    path = changed(trained, tmp_path / "teacher.pt", change)
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path / "run", **student(LM, path))
    refused(error, f"--distillation-teacher {path}", *parts)
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"distillation_teacher": "nowhere.pt"}, ["--distillation-teacher nowhere.pt does not exist"]),
        ({"distillation_teacher": "."}, ["--distillation-teacher . is a folder"]),
        ({"distillation_teacher": None}, ["learns from a checkpoint"]),
        ({"distillation_weight": 1.5}, ["--distillation-weight from 0 to 1", "1.5"]),
        ({"distillation_temperature": 0.0}, ["--distillation-temperature above 0"]),
        ({"label_smoothing": 1.0}, ["--label-smoothing from 0 to below 1"]),
        ({"adaptive_softmax_cutoff": "20,40"}, ["--adaptive-softmax-cutoff", "leave that out"]),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, parts, trained, lm_data, tmp_path):
    settings = student(LM, trained(LM).last, save_dir=tmp_path, max_update=1)
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, **{**settings, **options})
    refused(error, *parts)


def test_other_tasks_are_refused(classification_data, trained, lm_data):
    task = build(classification_data, **CLASSIFICATION).task
    with pytest.raises(ConfigError) as error:
        EvoMoEDistillation(DistillationConfig(distillation_teacher=str(trained(LM).last)), task)
    refused(error, "compares predictions of tokens", "--task language_modeling")
    with pytest.raises(ConfigError) as error:
        build(lm_data, **student(MASKED_LM, trained(MASKED_LM).last, label_smoothing=0.1))
    refused(error, "no --label-smoothing for masked language models")


def test_a_teacher_gates_at_the_temperature_of_its_update(trained, lm_data):
    teacher = trained({**LM, "moe_eval_routing": "adaptive", "max_update": 8}).last
    model = build(lm_data, **student(LM, teacher)).criterion._teacher[0]
    (layer,) = [layer for _, layer in moe_layers(model)]
    assert layer.num_updates == 8 and layer.schedule.temperature(layer.num_updates) == 1.0
