"""The adapter for lm-evaluation-harness, without the harness: a checkpoint is scored as what it says."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.cli import LM

FOLDER = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def adapter():
    spec = importlib.util.spec_from_file_location("lm_eval_adapter", FOLDER / "adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(adapter, trained, lm_data):
    return adapter.FairseqModel(str(trained(LM).last), str(lm_data))


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def probabilities(model, text):
    """Log probability of each token of a text, by another way: one pass for each token."""
    tokens, found = model.encode(text), []
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[model.first, *tokens[:i]]]))
        found.append(logits[0, -1].log_softmax(-1)[token].item())
    return found


def test_loglikelihood(adapter, model):
    text = "the king loves the crown"
    (one, two) = adapter.EvoMoELM(model).loglikelihood([asked("the king", text[8:]), asked("", text)])
    expected = probabilities(model, text)
    assert one[0] == pytest.approx(sum(expected[2:]), abs=1e-4)
    assert two[0] == pytest.approx(sum(expected), abs=1e-4) and not two[1]


@pytest.fixture(scope="module")
def context(adapter, model):
    """A beginning that the model goes on from by two words at least."""
    lm = adapter.EvoMoELM(model)
    found = sorted({"the", "my", "my lord", "a", "in", "with great", "and", "his", "an old song", "for"})
    made = lm.generate_until([asked(text, {"until": [], "max_gen_toks": 6}) for text in found])
    return max(zip(made, found), key=lambda pair: len(pair[0].split()))[1]


def test_what_is_greedy_is_said_to_be(adapter, model, context):
    lm = adapter.EvoMoELM(model)
    (text,) = lm.generate_until([asked(context, {"until": [], "max_gen_toks": 3})])
    ((_, greedy), (_, other)) = lm.loglikelihood(
        [asked(context, " " + text), asked(context, " silence dawn")]
    )
    assert greedy and text and not other


def test_rolling(adapter, model):
    """A text that is longer than the model takes, in two parts."""
    text = " and ".join(["the king loves the crown at dawn"] * 3)
    words = text.split()
    assert model.longest == 16 < len(words)
    (found,) = adapter.EvoMoELM(model).loglikelihood_rolling([asked(text)])
    parts = [" ".join(words[i : i + 16]) for i in range(0, len(words), 16)]
    assert found == pytest.approx(sum(sum(probabilities(model, part)) for part in parts), abs=1e-3)


def test_generation_stops(adapter, model, context):
    lm = adapter.EvoMoELM(model)
    (whole,) = lm.generate_until([asked(context, {"until": [], "max_gen_toks": 6})])
    second = whole.split()[1]
    (part,) = lm.generate_until([asked(context, {"until": [second], "max_gen_toks": 6})])
    assert part == whole[: whole.index(second)]
