"""Options that say what they are: types, ranges and words of every declaration, and of constructors."""

import math
from dataclasses import dataclass
from enum import Enum

import pytest

from fairseq_evomoe.config.config import GROUPS
from fairseq_evomoe.moe.options import OptionError, Options, like, loss_weight, option
from fairseq_evomoe.moe.routers import ROUTERS

CLASSES = {**GROUPS, **{name: router.Options for name, router in ROUTERS.items()}}
EVERY = [
    pytest.param(cls, declaration, id=f"{where}-{declaration.name}")
    for where, cls in CLASSES.items()
    for declaration in cls.declared().values()
]
NUMBERS = [param for param in EVERY if param.values[1].type in (int, float)]
CHOICES = [param for param in EVERY if param.values[1].choices]
TRUTHS = [param for param in EVERY if param.values[1].type is bool]


def outside(declaration):
    """Numbers just outside of the declared range, and the limits that it leaves out."""
    limits, step = declaration.range, 1 if declaration.type is int else 1e-6
    for limit, sign in ((limits.at_least, -1), (limits.at_most, 1)):
        if limit is not None:
            yield limit + sign * step
    yield from (limit for limit in (limits.above, limits.below) if limit is not None)


def inside(declaration):
    """Numbers at the ends of the declared range and beyond the open ones."""
    limits, step = declaration.range, 1 if declaration.type is int else 1e-6
    low = limits.at_least if limits.above is None else limits.above + step
    high = limits.at_most if limits.below is None else limits.below - step
    yield low
    yield 10**6 if high is None else high


def refusal(cls, name, value):
    """The error of an option's value, which must name it, and only it."""
    with pytest.raises(OptionError) as raised:
        cls(**{name: value})
    text = str(raised.value)
    assert raised.value.option == name
    assert text.startswith(f"`{name}` must be ") and text.endswith(".") and "\n" not in text
    assert "--" not in text, "flags are for the command line alone"
    return text


@pytest.mark.parametrize("cls, declaration", EVERY)
def test_every_option_has_a_sentence_of_help_and_a_default_that_it_may_have(cls, declaration):
    assert declaration.help.endswith(".") and declaration.help[0].isupper()
    assert getattr(cls(), declaration.name) == declaration.convert(declaration.default)


@pytest.mark.parametrize("cls, declaration", NUMBERS)
def test_every_number_has_a_lower_limit_and_is_refused_outside_of_its_range(cls, declaration):
    values = list(outside(declaration))
    assert values, "a number without any limit"
    for value in values:
        text = refusal(cls, declaration.name, value)
        assert str(declaration.range) in text and f"but is {value}" in text
    for value in inside(declaration):
        assert getattr(cls(**{declaration.name: value}), declaration.name) == value


@pytest.mark.parametrize("cls, declaration", NUMBERS)
def test_what_is_no_finite_number_is_refused(cls, declaration):
    for value in (math.nan, math.inf, -math.inf, "nan", "inf", "-Infinity", "many", "", "1,5", True, [1]):
        text = refusal(cls, declaration.name, value)
        assert ("a whole number" if declaration.type is int else "a finite number") in text
        assert ("such as 10%" in text) == declaration.duration


@pytest.mark.parametrize("cls, declaration", [p for p in NUMBERS if p.values[1].type is int])
def test_whole_numbers_are_whole(cls, declaration):
    refusal(cls, declaration.name, 2.5)
    refusal(cls, declaration.name, "2.5")
    value = getattr(cls(**{declaration.name: 3.0}), declaration.name)
    assert value == 3 and type(value) is int
    assert getattr(cls(**{declaration.name: "3"}), declaration.name) == 3


@pytest.mark.parametrize("cls, declaration", CHOICES)
def test_words_are_those_that_there_are(cls, declaration):
    name = declaration.name
    for value in ("Hidden ", "", "auto", 3, True, math.nan):
        text = refusal(cls, name, value)
        assert ", ".join(declaration.choices) in text and repr(str(value)) in text
    for word in declaration.choices:
        value = getattr(cls(**{name: word}), name)
        assert isinstance(value, Enum) and value.value == word
        assert getattr(cls(**{name: value}), name) is value


@pytest.mark.parametrize("cls, declaration", TRUTHS)
def test_truths_are_true_or_false(cls, declaration):
    for value in ("maybe", 2, "", "1"):
        refusal(cls, declaration.name, value)
    assert getattr(cls(**{declaration.name: "True"}), declaration.name) is True
    assert getattr(cls(**{declaration.name: "false"}), declaration.name) is False


def test_an_unknown_option_is_refused_and_the_known_ones_are_named():
    with pytest.raises(OptionError, match="^`top_k` is no option here: there are `gate_input`, .*`jitter`"):
        ROUTERS["switch"].Options.given({"top_k": 2})
    with pytest.raises(OptionError, match="there are none"):
        Options.given({"top_k": 2})


class Colour(str, Enum):
    red = "red"
    dark_blue = "dark-blue"


@dataclass(frozen=True)
class Paint(Options):
    colour: Colour = option("dark-blue", "Colour.")
    layers: int = option(1, "Layers.", at_least=1, at_most=9)
    shine_weight: float = loss_weight(0.5, "Shine.")
    dry_weight: float = loss_weight(0.0, "Dry.")
    name: str = option("plain", "Name.")


@dataclass(frozen=True)
class Varnish(Paint):
    layers: int = like(Paint, "layers", 2)


def test_declarations_are_inherited_with_another_default():
    assert Varnish().layers == 2 and Paint().layers == 1
    assert Varnish().colour is Colour.dark_blue
    with pytest.raises(OptionError, match="`layers` must be at least 1 and at most 9, but is 10."):
        Varnish(layers=10)
    assert list(Varnish.declared()) == ["colour", "layers", "shine_weight", "dry_weight", "name"]


def test_an_option_that_ends_in_weight_weighs_the_loss_before_it():
    assert Paint(dry_weight=2).loss_weights() == {"shine": 0.5, "dry": 2.0}


def test_values_cannot_be_changed_and_are_of_their_type():
    paint = Paint(shine_weight=1, name=3)
    assert type(paint.shine_weight) is float and paint.name == "3"
    with pytest.raises(AttributeError):
        paint.layers = 3


BAD = [
    ("switch", {"jitter": -5.0}, "jitter"),
    ("switch", {"jitter": math.nan}, "jitter"),
    ("switch", {"balance_weight": math.inf}, "balance_weight"),
    ("switch", {"renormalize": "sometimes"}, "renormalize"),
    ("dts", {"threshold": 1.0}, "threshold"),
    ("dts", {"hard_experts": 5}, "hard_experts"),
    ("dts", {"gate_input": "table"}, "gate_input"),
    ("topk", {"top_k": 5}, "top_k"),
    ("topk", {"random_second": True, "top_k": 3}, "random_second"),
    ("topk", {"random_second": True, "renormalize": "never"}, "random_second"),
    ("laplace", {"capacity_factor": 1.0}, "capacity_factor"),
    ("recurrent", {"recurrent_dim": 0}, "recurrent_dim"),
    ("comet", {"gamma": 0.0}, "gamma"),
    ("dynmoe", {"max_experts": 3}, "max_experts"),
    ("soft", {"slots": 0}, "slots"),
    ("top-p", {"top_p": 0.0}, "top_p"),
    ("base", {"top_k": 1}, "top_k"),
    ("remoe", {"mean_experts": 4.5}, "mean_experts"),
    ("remoe", {"l1_factor": 1.0}, "l1_factor"),
    ("switch", {"balance": "bias", "balance_weight": 0.01}, "balance_weight"),
    ("topk", {"balance": "quantile", "balance_weight": 0.5}, "balance_weight"),
    ("dts", {"balance": "even"}, "balance"),
    ("top-p", {"balance_rate": 0.5}, "balance_rate"),
    ("laplace", {"balance": "bias"}, "balance"),
    ("xmoe", {"routing_dim": 0}, "routing_dim"),
    ("dtop-p", {"mean_experts": 5.0}, "mean_experts"),
    ("expert-choice", {"mean_experts": 5.0}, "mean_experts"),
    ("expert-threshold", {"mean_experts": 5.0}, "mean_experts"),
    ("dtop-p", {"mean_experts": 0.5}, "mean_experts"),
    ("xmoe", {"gate_input": "table"}, "gate_input"),
    ("topk", {"free_balance": 0.5}, "free_balance"),
    ("switch", {"copy_experts": -1}, "copy_experts"),
    ("laplace", {"zero_experts": 1}, "zero_experts"),
    ("dtop-p", {"zero_experts": 1}, "zero_experts"),
    ("remoe", {"gate_activation": "gelu"}, "gate_activation"),
    ("expert-threshold", {"gate_activation": "relu"}, "gate_activation"),
    ("xmoe", {"gate_input_activation": "tanh"}, "gate_input_activation"),
    ("laplace", {"gate_activation": "tanh"}, "gate_activation"),
    ("switch", {"gate_activation": "silu"}, "gate_activation"),
    ("remoe", {"mutual_information_weight": 0.1}, "mutual_information_weight"),
]


@pytest.mark.parametrize("router, options, name", BAD, ids=str)
def test_constructors_refuse_what_the_command_line_refuses(router, options, name):
    with pytest.raises(OptionError) as raised:
        ROUTERS[router](8, 4, **options)
    assert raised.value.option == name and f"`{name}`" in str(raised.value)
