"""A student's modules in a meta model, against the layers called one after another in float64."""

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.evolution.module_distillation import DistillationPhase
from fairseq_evomoe.training.module_distillation import begin
from support.cli import LM, MASKED_LM, build, call
from support.tasks import PLAIN, dense

LAYERS = {"language_modeling": "decoder", "masked_lm": "encoder"}
QUIET = {"disable_validation": True, "max_update": 1}
MODULES = DistillationPhase.MODULES


def student_settings(settings):
    kept = {name: value for name, value in settings.items() if name not in PLAIN}
    phases = {"moe_meta_updates": 1, "moe_module_updates": 1, "moe_freq": 1, "max_update": 3}
    return {**kept, "moe_preset": "m2mkd", **phases, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module", params=[LM, MASKED_LM], ids=["lm", "masked_lm"])
def task(request, lm_data, tmp_path_factory):
    """Settings of a student, with a teacher of four layers of its width."""
    side = LAYERS[request.param["task"]]
    folder = tmp_path_factory.mktemp("teacher")
    settings = {**dense(request.param), **QUIET, f"{side}_layers": 4}
    call("fairseq-train", lm_data, save_dir=folder, **settings)
    return {**student_settings(request.param), "moe_teacher": folder / "checkpoint_last.pt"}


def learning(data, settings, stitched=False):
    """A setup whose modules are being learnt, in float64."""
    if stitched:
        side = LAYERS[settings["task"]]
        settings = {**settings, f"{side}_embed_dim": 24, "moe_stitch": True}
        if side == "decoder":
            settings.update(decoder_input_dim=24, decoder_output_dim=24)
    setup = build(data, **settings)
    begin(setup.cfg, setup.task, setup.model, setup.criterion)
    setup.model.double().distillation.enter(MODULES)
    return setup


def stack(model, settings):
    return model.decoder if settings["task"] == "language_modeling" else model.encoder.sentence_encoder


def place_by_place(distillation, settings, tokens, modules):
    """Logits with a module in each place, layer by layer; without padding."""
    meta = distillation.meta
    of_meta, causal = stack(meta, settings), settings["task"] == "language_modeling"
    found = []
    for place, module in enumerate(modules):
        layers = list(of_meta.layers)
        layers[place : place + 1] = module
        # no layers: what fairseq does before and after them
        if causal:
            x = of_meta.embed_scale * of_meta.embed_tokens(tokens) + of_meta.embed_positions(tokens)
            x = x.transpose(0, 1)
            for layer in layers:
                x = layer(x, self_attn_mask=of_meta.buffered_future_mask(x))[0]
            x = of_meta.layer_norm(x).transpose(0, 1)
            found.append(of_meta.output_layer(x))
        else:
            x = of_meta.forward_embedding(tokens)[0].transpose(0, 1)
            for layer in layers:
                x = layer(x, encoder_padding_mask=None)
            x = x if of_meta.layer_norm is None else of_meta.layer_norm(x)
            found.append(meta.encoder.lm_head(x.transpose(0, 1)))
    return found


@pytest.mark.parametrize("stitched", [False, True], ids=["equal widths", "stitched"])
def test_each_place_is_the_layers_one_after_another(task, stitched, lm_data):
    distillation = learning(lm_data, task, stitched).model.distillation
    distillation.train()
    torch.manual_seed(1)
    tokens = torch.randint(4, 20, (3, 7))
    outputs = distillation(tokens)
    modules = distillation.modules_to_learn
    assert [len(module) for module in modules] == [1, 1]
    if stitched:
        modules = [[a, *module, b] for module, (a, b) in zip(modules, distillation.stitches)]
    teacher = list(stack(distillation._teacher, task).layers)
    with torch.no_grad():
        students = place_by_place(distillation, task, tokens, modules)
        teachers = place_by_place(distillation, task, tokens, [teacher[:2], teacher[2:]])
    for output, own, other in zip(outputs, students, teachers):
        assert torch.allclose(output.student[0], own, atol=1e-9)
        assert torch.allclose(output.teacher, other, atol=1e-9)
        assert output.student[0].requires_grad and not output.teacher.requires_grad
    distillation.eval()
    assert all(output.teacher is None for output in distillation(tokens))


def test_the_loss_and_that_each_module_learns_for_itself(task, lm_data):
    """The gradient of a module is that of its own loss, weighted by alpha, and nothing else has one."""
    setup = learning(lm_data, {**task, "moe_module_alpha": 0.3, "moe_module_temperature": 2.0})
    model, batch = setup.model.train(), setup.batches()[0]
    for module in model.modules():
        if hasattr(module, "moe"):
            module.moe.loss_weights = dict.fromkeys(module.moe.loss_weights, 0.0)
    loss, _, log = setup.criterion(model, batch)
    loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert own and all(".layers." in name and not name.startswith("distillation.") for name in own)

    target, padding = batch["target"], setup.task.source_dictionary.pad()
    keep = target.ne(padding)
    apart = 0.0
    for place, output in enumerate(model.distillation(**batch["net_input"])):
        model.zero_grad()
        student, teacher = (x[keep] for x in (output.student[0], output.teacher))
        of_task = F.cross_entropy(student, target[keep], reduction="sum")
        p = (teacher / 2).softmax(-1)
        of_teacher = 4 * (p * (p.log() - (student / 2).log_softmax(-1))).sum()
        (0.7 * of_task + 0.3 * of_teacher).backward(retain_graph=True)
        apart += float(of_teacher.detach()) / 2
        alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert alone and all(f".layers.{place}." in name for name in alone)
        assert all(torch.allclose(own[name], grad, atol=1e-4) for name, grad in alone.items())
    assert float(log["moe_divergence"]) == pytest.approx(apart, rel=1e-4)


def test_a_meta_model_is_drawn_from_the_seed(task, lm_data):
    metas = [learning(lm_data, {**task, "seed": seed}).model.distillation.meta for seed in (1, 1, 2)]
    one, same, other = (torch.cat([p.flatten() for p in meta.parameters()]) for meta in metas)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_routers_are_told_of_tokens_and_embeddings(task, lm_data):
    """Though it is the meta model that looks them up."""
    setup = learning(lm_data, {**task, "moe_router": "dts", "moe_gate_input": "both", "moe_spawn_update": 2})
    setup.model.distillation(torch.randint(4, 20, (2, 5)))
    layers = stack(setup.model, task).layers
    looked_up = layers[0].stack.lookup
    assert looked_up.tokens.shape == (2, 5) and looked_up.embeddings.shape == (2, 5, 32)
