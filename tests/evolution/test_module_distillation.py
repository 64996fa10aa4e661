"""m2mKD's formulas against loops in float64, and its phases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_evomoe.evolution.module_distillation import (
    DistillationOptions,
    DistillationPhase,
    cost,
    divergence,
    split_at,
    split_evenly,
)
from support.router_checks import close, softmax


def reference(student, teacher, temperature):
    """temperature^2 KL(teacher || student), token by token and class by class."""
    total = 0.0
    for own, other in zip(student.tolist(), teacher.tolist()):
        p = softmax([v / temperature for v in other])
        q = softmax([v / temperature for v in own])
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature):
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    assert close(divergence(student, teacher, temperature), reference(student, teacher, temperature))
    assert close(divergence(teacher, teacher, temperature), 0.0)
    assert divergence(student[:0], teacher[:0], temperature) == 0
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, temperature), (student,))


def test_divergence_of_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(2, 6, 500).bfloat16()
    apart = divergence(student, teacher, 1.0)
    assert apart.dtype == torch.float32
    assert torch.allclose(apart.double(), divergence(student.double(), teacher.double(), 1.0), rtol=1e-4)


@given(st.integers(1, 20), st.integers(1, 20))
def test_layers_are_split_evenly(modules, more):
    layers = list(range(modules + more - 1))
    found = split_evenly(layers, modules)
    assert len(found) == modules and sum(found, []) == layers
    lengths = [len(module) for module in found]
    assert max(lengths) - min(lengths) <= 1 <= min(lengths)


@pytest.mark.parametrize(
    "layers, last, modules",
    [
        (4, [1, 3], [[0, 1], [2, 3]]),
        (5, [1, 3], [[0, 1], [2, 3, 4]]),
        (3, [0, 1, 2], [[0], [1], [2]]),
        (3, [2], [[0, 1, 2]]),
    ],
)
def test_a_module_ends_with_an_moe_layer(layers, last, modules):
    assert split_at(range(layers), last) == modules


def test_phases():
    options = DistillationOptions(meta_updates=2, module_updates=3)
    meta, modules, student = DistillationPhase
    expected = [meta] * 2 + [modules] * 3 + [student] * 2
    assert [options.phase(update) for update in range(7)] == expected
    assert DistillationOptions().phase(0) == student


def test_cost():
    """One layer of 10 in each of two places, modules of 20 and 30, an output of 100."""
    meta, modules = cost([10, 10], [20, 20], [30, 30], 100)
    assert meta == 120
    first = 6 * 30 + 4 * 110 + 2 * 20 + 2 * 110
    second = 2 * 10 + 6 * 30 + 4 * 100 + 2 * 10 + 2 * 20 + 2 * 100
    assert modules == pytest.approx((first + second) / 6)
