"""The tasks that are trained, fairseq's own dense models for them, and what a run through all phases logs."""

import pytest

from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION

# of each task, the fixture that is its data
DATA = {
    LM["task"]: "lm_data",
    MASKED_LM["task"]: "lm_data",
    TRANSLATION["task"]: "translation_data",
    CLASSIFICATION["task"]: "classification_data",
}
TASKS = [pytest.param(settings, id=settings["task"]) for settings in (LM, MASKED_LM, TRANSLATION)]
# without what only the Dense-To-Sparse gate has
PLAIN = {"moe_spawn_update": 0, "moe_anneal_updates": 5000, "moe_hard_update": None}

# what fairseq's own models need, to be as large
DENSE = {
    "language_modeling": {
        "arch": "transformer_lm",
        "criterion": "cross_entropy",
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_input_dim": 32,
        "decoder_output_dim": 32,
        "decoder_normalize_before": True,
    },
    "masked_lm": {
        "arch": "roberta",
        "criterion": "masked_lm",
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
    },
    "translation": {
        "arch": "transformer",
        "criterion": "label_smoothed_cross_entropy",
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
    },
}


def dense(settings):
    """The settings of fairseq's own model and criterion."""
    kept = {name: value for name, value in settings.items() if not name.startswith("moe_")}
    return {**kept, **DENSE[settings["task"]], "user_dir": None}


# per update, with the experts spawning before the seventh
PHASES = [0] * 6 + [1] * 4 + [2] * 4
TEMPERATURES = [2.0] * 7 + [1.5, 1.0] + [0.5] * 5


def check_phases(result, key="loss"):
    """The training logs show every phase, and the last validation is that of a spawned model."""
    steps = result.log("train_inner")
    assert [step["moe_phase"] for step in steps] == PHASES
    assert [step["moe_temperature"] for step in steps] == TEMPERATURES
    experts = [step["moe_experts"] for step in steps]
    assert experts[:6] == [1] * 6 and experts[10:] == [1] * 4
    assert experts[6] > 3.9 and 1 < experts[9] < experts[6]
    assert steps[-1][key] < steps[0][key]
    assert result.log("valid")[-1]["valid_moe_phase"] == 2
    assert len(result.lines("spawned experts")) == 1
