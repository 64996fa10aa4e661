"""A task, a criterion or a batch that does not fit a model is refused in a sentence, before training."""

import inspect
from argparse import Namespace

import pytest
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMTask

from fairseq_evomoe.models.feed_forward import MoEModel
from fairseq_evomoe.models.requirements import (
    REQUIREMENTS,
    check_batch,
    check_task,
    positions_of,
    requirement_of,
)
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRAINING, TRANSLATION, build
from support.refusals import refused

TASKS = {
    "language_modeling": ("lm_data", {"tokens_per_sample": 16}),
    "masked_lm": ("lm_data", {"tokens_per_sample": 48}),
    "multilingual_masked_lm": ("lm_data", {"tokens_per_sample": 48}),
    "denoising": ("lm_data", {"tokens_per_sample": 48}),
    "translation": ("translation_data", {"source_lang": "de", "target_lang": "en"}),
    "multilingual_translation": ("translation_data", {"lang_pairs": "de-en"}),
    "sentence_prediction": ("classification_data", {"num_classes": 2}),
}


def settings(task, arch, criterion="cross_entropy", **changes):
    return {**TRAINING, **TASKS[task][1], "task": task, "arch": arch, "criterion": criterion, **changes}


def data_of(task, request):
    return request.getfixturevalue(TASKS[task][0])


@pytest.mark.parametrize(
    "task, arch, parts",
    [
        # an AttributeError, since roberta looks for --tokens-per-sample in vain
        (
            "language_modeling",
            "evomoe_roberta_tiny",
            ["--task language_modeling", "future", "--arch evomoe_roberta_tiny", "--task masked_lm"],
        ),
        (
            "language_modeling",
            "evomoe_transformer_tiny",
            ["future", "--task translation", "--arch evomoe_lm"],
        ),
        # errors of omegaconf's, since transformer_lm takes options from its task
        (
            "masked_lm",
            "evomoe_lm_tiny",
            ["--arch evomoe_lm_tiny takes max_target_positions from the task", "--task masked_lm"],
        ),
        ("translation", "evomoe_lm_tiny", ["tokens_per_sample", "--task translation has no such option"]),
        ("multilingual_masked_lm", "evomoe_lm_tiny", ["--task multilingual_masked_lm has no such option"]),
        ("sentence_prediction", "evomoe_lm_tiny", ["--task sentence_prediction has no such option"]),
        *(
            (
                "multilingual_translation",
                f"evomoe_{kind}_tiny",
                ["a model for each pair of languages", way_out],
            )
            for kind, way_out in (
                ("transformer", "--task translation"),
                ("lm", "--task language_modeling"),
                ("roberta", "--task masked_lm"),
            )
        ),
        (
            "sentence_prediction",
            "evomoe_roberta_tiny",
            ["from the criterion", "--criterion cross_entropy", "--criterion evomoe_sentence_prediction"],
        ),
        # a TypeError of the positional embeddings
        (
            "translation",
            "evomoe_roberta_tiny",
            ["--arch evomoe_roberta_tiny works on single sequences", "--task translation has pairs"],
        ),
        # a TypeError in the first update, of the decoder
        ("denoising", "evomoe_lm_tiny", ["works on single sequences", "--task denoising has pairs"]),
    ],
    ids=str,
)
def test_a_task_that_does_not_fit(task, arch, parts, request):
    with pytest.raises(ValueError) as error:
        build(data_of(task, request), **settings(task, arch))
    refused(error, *parts)
    assert error.value.option in ("task", "criterion")


def test_a_task_that_classifies(classification_data):
    changed = settings("sentence_prediction", "evomoe_transformer_tiny", "evomoe_sentence_prediction")
    with pytest.raises(ValueError) as error:
        build(classification_data, **changed)
    refused(error, "--arch evomoe_transformer_tiny has no heads", "--arch evomoe_roberta")


@pytest.mark.parametrize(
    "given, criterion, parts",
    [
        (
            LM,
            "evomoe_masked_lm",
            ["--criterion evomoe_masked_lm", "--arch evomoe_lm_tiny masks none", "evomoe_cross_entropy"],
        ),
        (LM, "masked_lm", ["--criterion masked_lm", "--criterion evomoe_cross_entropy"]),
        (TRANSLATION, "evomoe_masked_lm", ["--criterion evomoe_label_smoothed_cross_entropy"]),
    ],
    ids=str,
)
def test_a_criterion_that_does_not_fit(given, criterion, parts, lm_data, translation_data):
    data = translation_data if given is TRANSLATION else lm_data
    changes = {"criterion": criterion, "label_smoothing": None}
    setup = build(data, **{**given, **changes})
    with pytest.raises(ValueError) as error:
        setup.trainer()
    refused(error, *parts)
    assert error.value.option == "criterion"


def test_a_criterion_without_a_task_that_classifies(lm_data):
    with pytest.raises(ValueError) as error:
        build(lm_data, **{**MASKED_LM, "criterion": "evomoe_sentence_prediction"})
    refused(error, "--criterion evomoe_sentence_prediction", "--task sentence_prediction")


def test_a_criterion_without_its_head(classification_data):
    setup = build(classification_data, **CLASSIFICATION)
    setup.criterion.classification_head_name = "other"
    with pytest.raises(ValueError) as error:
        setup.trainer()
    refused(error, "classification head 'other'", "--arch evomoe_roberta_tiny", "--task sentence_prediction")


def test_data_that_do_not_fit(lm_data, translation_data):
    """The task does not say what is in its batches, so that they are looked at before the first update."""
    trainer = build(lm_data, **settings("masked_lm", "evomoe_transformer_tiny")).trainer()
    with pytest.raises(ValueError) as error:
        trainer.get_train_iterator(epoch=1)
    refused(error, "--task masked_lm has single sequences", "--arch evomoe_transformer_tiny reads pairs")

    pairs = build(translation_data, **TRANSLATION)
    batch = pairs.batches()[0]
    for given in (LM, MASKED_LM):
        setup = build(lm_data, **given)
        with pytest.raises(ValueError) as error:
            check_batch(setup.model, setup.cfg.model, pairs.task, batch)
        refused(error, "--task translation has a second sequence", f"--arch {given['arch']}")


@pytest.mark.parametrize("given", [LM, MASKED_LM, CLASSIFICATION, TRANSLATION], ids=lambda x: x["task"])
def test_what_fits_is_let_through(given, lm_data, translation_data, classification_data):
    data = {"translation": translation_data, "sentence_prediction": classification_data}
    setup = build(data.get(given["task"], lm_data), **given)
    iterator = setup.trainer().get_train_iterator(epoch=1)
    for batch in (iterator.first_batch, {}, None, "DUMMY", {"id": 1}):
        check_batch(setup.model, setup.cfg.model, setup.task, batch)


class SomebodysTask(MaskedLMTask):
    """Has another name and class, and tells less of itself than fairseq's."""

    targets = None

    def max_positions(self):
        return None

    @property
    def target_dictionary(self):
        raise NotImplementedError


def test_a_task_of_somebody_elses_that_provides_what_is_needed(lm_data):
    setup = build(lm_data, **MASKED_LM)
    task = SomebodysTask(setup.task.cfg, setup.task.dictionary)
    check_task(type(setup.model), setup.cfg.model, task)
    assert positions_of(setup.cfg.model, task) == 48
    # an older one, whose options have another name
    task.cfg, task.args = None, Namespace(tokens_per_sample=32)
    check_task(type(setup.model), setup.cfg.model, task)
    assert positions_of(setup.cfg.model, task) == 32


@pytest.mark.parametrize("side, given", [("source", MASKED_LM), ("target", LM)])
def test_a_task_without_a_dictionary(side, given, lm_data):
    setup = build(lm_data, **given)
    for nothing in (property(lambda self: None), property(lambda self: self.there_is_none)):
        task = setup.task
        task.__class__ = type("NoDictionary", (type(task),), {f"{side}_dictionary": nothing})
        with pytest.raises(ValueError) as error:
            check_task(type(setup.model), setup.cfg.model, task)
        refused(error, f"needs a {side} dictionary", "--task NoDictionary has none")


def test_a_task_that_does_not_tell_lengths(lm_data):
    setup = build(lm_data, **MASKED_LM)
    task = SomebodysTask(setup.task.cfg, setup.task.dictionary)
    task.cfg = None
    with pytest.raises(ValueError) as error:
        positions_of(setup.cfg.model, task)
    refused(error, "--task SomebodysTask", "give --max-positions")


def test_a_language_model_of_the_tokens_themselves_may_see_all(lm_data):
    """As fairseq's own roberta, which knows the target ``self``."""
    lm = build(lm_data, **LM)
    task = LanguageModelingTask(lm.task.cfg, lm.task.dictionary, lm.task.dictionary, targets=["self"])
    masked = build(lm_data, **MASKED_LM)
    check_task(type(masked.model), masked.cfg.model, task)
    with pytest.raises(ValueError, match="--task language_modeling asks for self tokens"):
        check_task(type(lm.model), lm.cfg.model, task)


def test_models_of_somebody_elses_are_left_alone(lm_data):
    setup = build(lm_data, **{**LM, "criterion": "cross_entropy"})
    with pytest.raises(Exception) as error:
        build(lm_data, **settings("masked_lm", "transformer_lm"))
    assert "Interpolation key 'task.max_target_positions' not found" in str(error.value)
    plain = build(lm_data, **settings("language_modeling", "transformer_lm", decoder_layers=1))
    check_batch(plain.model, plain.cfg.model, plain.task, {"net_input": {"prev_output_tokens": 1}})
    assert requirement_of(type("Other", (MoEModel,), {})) is None
    check_task(type("Other", (MoEModel,), {}), setup.cfg.model, None)


def test_the_advice_can_be_followed():
    """All names in it are registered, and each of our models has some."""
    for model in set(ARCH_MODEL_REGISTRY.values()):
        assert not issubclass(model, MoEModel) or requirement_of(model) is not None
    for needed in REQUIREMENTS.values():
        assert any(name in needed.tasks for name in TASK_REGISTRY)
        names = [word.strip(",") for word in needed.criterions.split() if word.startswith("evomoe")]
        assert names and all(name in CRITERION_REGISTRY for name in names)
    assert "masked_tokens" in inspect.getsource(MaskedLmLoss.forward)


EPOCH = 7  # updates in the epochs of these blocks
BY_EPOCHS = {**LM, "max_update": None, "max_epoch": 2}
STABLE = {"moe_router": "stable", "moe_spawn_update": 0, "moe_anneal_updates": None, "moe_hard_update": None}


@pytest.mark.parametrize(
    "settings, parts",
    [
        (
            {**BY_EPOCHS, "moe_spawn_update": 2 * EPOCH},
            ["--moe-spawn-update 14", "--max-epoch 2", "14 updates"],
        ),
        ({**BY_EPOCHS, "moe_spawn_update": 8, "update_freq": 2}, ["--moe-spawn-update 8", "8 updates"]),
        (
            {**BY_EPOCHS, "moe_spawn_update": 11, "update_freq": "1,2"},
            ["--moe-spawn-update 11", "11 updates"],
        ),
        (
            {**BY_EPOCHS, **STABLE, "moe_stable_update": 2 * EPOCH},
            ["--moe-stable-update 14", "--max-epoch 2", "never be frozen"],
        ),
        (
            {**LM, **STABLE, "max_update": 10, "moe_stable_update": 10},
            ["--moe-stable-update 10", "--max-update 10", "never be frozen"],
        ),
    ],
    ids=["spawn", "update_freq", "several", "stable", "max_update"],
)
def test_what_never_comes_is_refused(settings, parts, lm_data):
    with pytest.raises(ValueError) as error:
        build(lm_data, **settings).trainer().get_train_iterator(epoch=1)
    refused(error, *parts)
    assert error.value.option in ("spawn_update", "stable_update")


@pytest.mark.parametrize(
    "settings",
    [
        {**BY_EPOCHS, "moe_spawn_update": 2 * EPOCH - 1},
        {**BY_EPOCHS, "moe_spawn_update": 10, "update_freq": "1,2"},
        {**BY_EPOCHS, "max_update": 100, "moe_spawn_update": "auto"},  # a plateau may come before
        {**BY_EPOCHS, "max_epoch": None, "max_update": 100, "moe_spawn_update": 99},
        {**BY_EPOCHS, **STABLE, "moe_stable_update": 2 * EPOCH - 1},
    ],
    ids=["spawn", "update_freq", "auto", "no_epochs", "stable"],
)
def test_what_comes_in_the_last_update_is_not(settings, lm_data):
    build(lm_data, **settings).trainer().get_train_iterator(epoch=1)


def test_a_run_that_goes_on_counts_what_it_has_done(lm_data):
    trainer = build(lm_data, **{**BY_EPOCHS, "moe_spawn_update": 2 * EPOCH}).trainer()
    trainer.set_num_updates(EPOCH + 1)
    trainer.get_train_iterator(epoch=2)
