"""Experts that become one: against what each method says, one expert and one unit at a time, in float64."""

import numpy as np
import pytest
import torch

from fairseq_evomoe.evolution.densify import METHODS, gather_experts
from fairseq_evomoe.evolution.merge import MergeError
from fairseq_evomoe.moe import Experts
from support.experts import experts_of, tensors_of

WIDTH, EXPERTS = 6, 3


def each_of(tensors, widths):
    """The tensors of each expert."""
    starts = [sum(widths[:e]) for e in range(len(widths))]
    rows = [slice(start, start + width) for start, width in zip(starts, widths)]
    return [
        {name: x[e : e + 1] if name == "b2" else x[rows[e]] for name, x in tensors.items()}
        for e in range(len(widths))
    ]


def output(tensors, x):
    """What one expert makes of tokens, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    return torch.relu(x @ tensors["w1"].t() + tensors["b1"]) @ tensors["w2"] + tensors["b2"]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.allclose(found[name], tensor, atol=1e-12), name


@pytest.mark.parametrize("method, divisor", [("sum", 1), ("average", EXPERTS)])
def test_sum_and_average(method, divisor):
    tensors = tensors_of(experts_of([WIDTH] * EXPERTS))
    expected = {name: torch.zeros_like(x) for name, x in each_of(tensors, [WIDTH] * EXPERTS)[0].items()}
    for expert in each_of(tensors, [WIDTH] * EXPERTS):
        for name, x in expert.items():
            expected[name] += x / divisor
    assert_close(gather_experts(tensors, [WIDTH] * EXPERTS, WIDTH, method), expected)


@pytest.mark.parametrize("rank, kept", [(None, 2), (1, 1), (4, 4)])
def test_truncated_decompositions_are_averaged(rank, kept):
    tensors = tensors_of(experts_of([WIDTH] * EXPERTS))
    expected = {}
    for name in ("w1", "w2"):
        total = np.zeros((WIDTH, 5))
        for expert in each_of(tensors, [WIDTH] * EXPERTS):
            u, values, v = np.linalg.svd(expert[name].numpy(), full_matrices=False)
            for r in range(kept):
                total += values[r] * np.outer(u[:, r], v[r])
        expected[name] = torch.from_numpy(total / EXPERTS)
    for name in ("b1", "b2"):
        expected[name] = sum(expert[name] for expert in each_of(tensors, [WIDTH] * EXPERTS)) / EXPERTS
    assert_close(gather_experts(tensors, [WIDTH] * EXPERTS, WIDTH, "svd", rank), expected)


def test_a_full_rank_is_the_average():
    tensors = tensors_of(experts_of([WIDTH] * EXPERTS))
    found = gather_experts(tensors, [WIDTH] * EXPERTS, WIDTH, "svd", 5)
    assert_close(found, gather_experts(tensors, [WIDTH] * EXPERTS, WIDTH, "average"))


def test_the_strongest_units_stay_in_their_order():
    widths, hidden = [3, 5, 2], 4
    tensors = tensors_of(experts_of(widths))
    units = []
    for e, expert in enumerate(each_of(tensors, widths)):
        for k in range(widths[e]):
            norm = sum(x.item() ** 2 for name in ("w1", "w2") for x in expert[name][k]) ** 0.5
            units.append((norm, e, k))
    kept = sorted(sorted(units, reverse=True)[:hidden], key=lambda unit: unit[1:])
    each = each_of(tensors, widths)
    expected = {name: torch.stack([each[e][name][k] for _, e, k in kept]) for name in ("w1", "b1", "w2")}
    expected["b2"] = torch.zeros(1, 5, dtype=torch.float64)
    for _, e, _ in kept:
        expected["b2"] += each[e]["b2"] / widths[e]
    assert len({e for _, e, _ in kept}) > 1  # or the test would not tell one expert's bias from another's
    assert_close(gather_experts(tensors, widths, hidden, "topk"), expected)


def test_a_network_that_was_split_becomes_itself_again():
    """With room to spare, too: then there are units that do nothing."""
    x = torch.randn(7, 5, dtype=torch.float64)
    whole = tensors_of(experts_of([WIDTH]))
    parts = {**whole, "b2": whole["b2"].repeat(3, 1) / 3}
    for hidden in (WIDTH, WIDTH + 2):
        found = gather_experts(parts, [1, 2, 3], hidden, "topk")
        assert found["w1"].shape == (hidden, 5) and found["b1"].shape == (hidden,)
        assert torch.allclose(output(found, x), output(whole, x))


@pytest.mark.parametrize("method, rank", [("average", None), ("svd", 5)])
def test_equal_experts_are_each_of_them(method, rank):
    one = tensors_of(experts_of([WIDTH]))
    copies = {name: x.repeat([EXPERTS] + [1] * (x.dim() - 1)) for name, x in one.items()}
    assert_close(
        gather_experts(copies, [WIDTH] * EXPERTS, WIDTH, method, 5 if method == "svd" else None), one
    )


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_stay_and_sums_are_exact(method):
    half = {name: x.half() for name, x in tensors_of(experts_of([WIDTH] * 40)).items()}
    found = gather_experts(half, [WIDTH] * 40, WIDTH, method)
    exact = gather_experts({name: x.double() for name, x in half.items()}, [WIDTH] * 40, WIDTH, method)
    for name, x in found.items():
        assert x.dtype == torch.half and torch.equal(x, exact[name].half())
    experts = Experts(5, [WIDTH])
    experts.fill(found)  # which has one expert's shapes


@pytest.mark.parametrize("method", ["sum", "average", "svd"])
@pytest.mark.parametrize("widths", [[6, 6, 4], [4, 4, 4]])
def test_other_widths_than_the_dense_one_are_refused(method, widths):
    with pytest.raises(MergeError, match=rf"`method` {method} .* 6 hidden units, .* 4.*: use topk\.$"):
        gather_experts(tensors_of(experts_of(widths)), widths, 6, method)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_there_cannot_be_is_refused(rank):
    with pytest.raises(MergeError, match=rf"`rank` must be from 1 to 5, .* is {rank}\."):
        gather_experts(tensors_of(experts_of([WIDTH] * 2)), [WIDTH] * 2, WIDTH, "svd", rank)


def test_the_default_rank_is_one_that_there_can_be():
    tensors = tensors_of(experts_of([20, 20]))
    found = gather_experts(tensors, [20, 20], 20, "svd")  # 20 / 2 is more than the width of a token
    assert_close(found, gather_experts(tensors, [20, 20], 20, "average"))
