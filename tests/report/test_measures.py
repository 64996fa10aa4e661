"""What a report measures, against slow and obvious references in float64."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.report import history, passages, together
from fairseq_evomoe.report.explained import explained, shares
from fairseq_evomoe.report.lift import PRIOR, top_values
from fairseq_evomoe.report.loads import evenness, information, load_of
from fairseq_evomoe.report.sample import Choices, LayerSample, Text


def routing(sets, experts):
    """Choices of rows that have these experts, the first with the greatest weight."""
    pairs = [(t, e, 1 / (1 + place)) for t, row in enumerate(sets) for place, e in enumerate(row)]
    row_N, expert_N, weight_N = (np.array(x) for x in zip(*pairs)) if pairs else (np.zeros(0, int),) * 3
    return Choices.of(len(sets), experts, row_N, expert_N, np.asarray(weight_N, dtype=np.float64))


def text_of(tokens, sequences=None, symbols=None):
    tokens = np.array(tokens, dtype=np.int32)
    sequences = np.zeros(len(tokens), np.int32) if sequences is None else np.array(sequences, np.int32)
    position = [sum(sequences[:t] == sequences[t]) for t in range(len(tokens))]
    symbols = symbols or [f"t{i}" for i in range(max(tokens.max() + 1, 4))]
    return Text(symbols, np.zeros(len(symbols), int), [0, 2], tokens, sequences, np.array(position, np.int32))


def layer_of(choices, **changes):
    names = [str(e) for e in range(choices.experts)]
    layer = LayerSample("decoder.layers.0", "decoder", names, [4] * len(names), [10] * len(names), 7)
    layer.choices = choices
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


draw_sets = st.integers(2, 4).flatmap(
    lambda experts: st.tuples(
        st.lists(
            st.sets(st.integers(0, experts - 1), max_size=experts - 1).map(sorted), min_size=4, max_size=30
        ),
        st.just(experts),
    )
)


@settings(max_examples=40, deadline=None)
@given(draw_sets, st.integers(0, 2**31))
def test_shares_of_variance_are_those_of_the_definition(drawn, seed):
    sets, experts = drawn
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 3, len(sets))
    fine = coarse * 2 + draw.integers(0, 2, len(sets))
    found = shares(routing(sets, experts), [coarse, fine])

    vectors = np.zeros((len(sets), experts))
    for t, row in enumerate(sets):
        vectors[t, row] = 1
    sizes = Counter(fine.tolist())
    kept = [t for t in range(len(sets)) if sizes[fine[t]] > 1]

    def within(groups):
        members = defaultdict(list)
        for t in kept:
            members[groups[t]].append(vectors[t])
        total = sum(len(m) * np.var(m, axis=0, ddof=1).sum() for m in members.values())
        return total / len(kept)

    if len(kept) < 2 or within(np.zeros(len(sets), int)) < 1e-12:
        assert found is None
        return
    all_, of_coarse, of_fine = within(np.zeros(len(sets), int)), within(coarse), within(fine)
    of_coarse = min(of_coarse, all_)  # chance may make a grouping worse than none
    of_fine = min(of_fine, of_coarse)
    expected = [(all_ - of_coarse) / all_, (of_coarse - of_fine) / all_, of_fine / all_]
    assert found == pytest.approx(expected, abs=1e-9) and sum(found) == pytest.approx(1)


def explained_by(rule, rows=4000, tokens=25, experts=4, length=16):
    draw = np.random.default_rng(1)
    token_T, position_T = draw.integers(0, tokens, rows), np.arange(rows) % length
    return explained(
        routing([[rule(t, p, draw) % experts] for t, p in zip(token_T, position_T)], experts),
        token_T,
        position_T,
    )


def test_a_hash_is_explained_by_the_token_alone():
    found = explained_by(lambda token, place, draw: token * 7 + 3)
    assert (found["id"], found["position"], found["context"]) == (1, 0, 0)
    assert found["position_alone"] < 0.02 and found["covered"] > 0.99


def test_a_rule_by_the_place_is_explained_by_the_place():
    found = explained_by(lambda token, place, draw: int(math.log2(place + 1)))
    assert found["position"] > 0.95 and found["position_alone"] == 1 and found["context"] < 1e-9


def test_chance_is_explained_by_nothing_however_rare_the_tokens_are():
    found = explained_by(lambda token, place, draw: draw.integers(0, 4), rows=3000, tokens=600)
    assert found["context"] > 0.93 and found["position_alone"] < 0.02


def test_rows_that_all_go_to_one_expert_leave_nothing_to_explain():
    assert explained_by(lambda token, place, draw: 1) is None


@settings(max_examples=40, deadline=None)
@given(draw_sets, st.integers(0, 2**31))
def test_lift_is_the_share_of_a_value_over_the_share_of_all(drawn, seed):
    sets, experts = drawn
    value_T = np.random.default_rng(seed).integers(-1, 4, len(sets))
    found = top_values(routing(sets, experts), value_T, 4, most=4, at_least=1)
    rows = [t for t in range(len(sets)) if value_T[t] >= 0]
    for expert, top in enumerate(found):
        of_expert = [t for t in rows if expert in sets[t]]
        expected, rank = {}, {}
        for value in range(4):
            seen = [t for t in rows if value_T[t] == value]
            got = [t for t in seen if expert in sets[t]]
            if got:
                usual = len(of_expert) / len(rows)
                expected[value] = (len(got), len(got) / len(seen), len(got) / len(seen) / usual)
                rank[value] = (len(got) + PRIOR * usual) / (len(seen) + PRIOR) / usual
        wanted = {value: x for value, x in expected.items() if x[2] > 1 + 1e-12}
        assert {x.value for x in top} == set(wanted)
        for x in top:
            assert (x.count, x.share, x.lift) == pytest.approx(wanted[x.value])
        ranks = [rank[x.value] for x in top]
        assert ranks == sorted(ranks, reverse=True)


def test_a_frequent_token_comes_before_one_seen_twice():
    token_T = [1] * 100 + [3] * 2 + [5] * 300
    sets = [[0]] * 102 + [[1]] * 300
    first, second = top_values(routing(sets, 2), np.array(token_T), 6, most=2)[0]
    assert (first.value, second.value) == (1, 3) and first.lift == second.lift


def test_information_is_all_nothing_and_between():
    assert information(np.array([[500, 0], [0, 500]])) == pytest.approx(1, abs=1e-2)
    assert information(np.array([[250, 250], [250, 250]])) == 0
    assert information(np.array([[7, 0]])) == 0
    count = np.array([[300.0, 100.0, 50.0], [20.0, 200.0, 330.0]])
    p = count / count.sum()
    mutual = sum(
        p[b, e] * math.log(p[b, e] / (p[b].sum() * p[:, e].sum())) for b in range(2) for e in range(3)
    )
    of_experts = -sum(x * math.log(x) for x in p.sum(0))
    assert information(count) == pytest.approx((mutual - 2 / (2 * count.sum())) / of_experts)


def test_evenness():
    assert evenness(np.array([3, 3, 3])) == pytest.approx(1)
    assert evenness(np.array([9, 0, 0])) == 0
    assert evenness(np.array([2])) == 1


def test_load_and_cost():
    found = load_of(
        layer_of(routing([[0, 1], [0], [], [2]], 4), heads=2, confidence_T=np.array([0.25, 0.75]))
    )
    assert found["load"] == [0.5, 0.25, 0.25, 0] and found["idle"] == 1
    assert found["experts_per_token"] == 1 and found["without_expert"] == 0.25
    assert found["busiest"] == 2  # two of four pairs, among four experts
    assert found["active_parameters"] == 7 + 4 * 10 / 2 and found["flops"] == 2 * 27  # two heads make a token
    assert found["confidence"] == 0.5 and found["confidence_histogram"][2] == 1


def test_where_all_have_all_experts_weights_count():
    row_N, expert_N = np.repeat(np.arange(3), 2), np.tile([0, 1], 3)
    choices = Choices.of(3, 2, row_N, expert_N, np.array([0.9, 0.3, 0.5, 0.5, 0.1, 0.3]))
    assert choices.dense and choices.load_E.tolist() == pytest.approx([0.75 + 0.5 + 0.25, 1.5])
    assert choices.best_T.tolist() == [0, 0, 1] and together.within(choices) is None


@settings(max_examples=30, deadline=None)
@given(draw_sets)
def test_pairs_are_counted(drawn):
    sets, experts = drawn
    found = together.within(routing(sets, experts))
    if all(len(row) < 2 for row in sets):
        assert found is None
        return
    for i, j in itertools.product(range(experts), repeat=2):
        of_i = [row for row in sets if i in row]
        assert found[i, j] == pytest.approx(sum(j in row for row in of_i) / max(len(of_i), 1))


def test_paths_are_those_of_best_experts():
    first, second = layer_of(routing([[0], [0], [1], [2]], 3)), layer_of(routing([[1, 0], [0], [], [0]], 2))
    found = together.across(first, second)
    assert found["probability"] == [[0.5, 0.5], [0, 0], [1, 0]]
    assert together.across(first, layer_of(second.choices, side="encoder")) is None


@settings(max_examples=30, deadline=None)
@given(draw_sets, st.integers(0, 2**31))
def test_overlap_is_the_share_of_pairs_in_both(drawn, seed):
    sets, experts = drawn
    other = [sorted(row) for row in sets]
    np.random.default_rng(seed).shuffle(other)
    one, two = ({(t, e) for t, row in enumerate(x) for e in row} for x in (sets, other))
    expected = 2 * len(one & two) / (len(one) + len(two)) if one or two else 1
    assert history.overlap(routing(sets, experts), routing(other, experts)) == pytest.approx(expected)
    assert history.overlap(routing(sets, experts), routing(sets, experts)) == 1


def test_movement_is_unknown_where_experts_are_others():
    one, two = layer_of(routing([[0], [1]], 2)), layer_of(routing([[0], [0]], 2))
    grown = layer_of(routing([[0], [3]], 4))
    assert history.movement([one, two]) == {"drift": [0.5], "saturation": [0.5, 1]}
    assert history.movement([one, grown]) == {"drift": [None], "saturation": [None, 1]}


def tensors(widths, dim=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    total = sum(widths)
    shapes = {"w1": (total, dim), "b1": (total,), "w2": (total, dim), "b2": (len(widths), dim)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_parents_are_found_whatever_the_order_and_the_width_of_the_units():
    old = tensors([8, 8, 8])
    units = [torch.randperm(8)[:4] + 8 * parent for parent in (2, 0, 1, 1, 2)]  # slices, shuffled
    new = {name: torch.cat([old[name][unit] for unit in units]) for name in ("w1", "b1", "w2")}
    new = {name: x + 0.05 * torch.randn_like(x) for name, x in new.items()}
    new["b2"] = torch.zeros(5, 6)
    found, likeness = history.parents(old, [8, 8, 8], new, [4] * 5)
    assert found == [2, 0, 1, 1, 2] and min(likeness) > 0.98
    # as many as before: each from the one at its place, however like another it is
    swapped = {name: x.flip(0) for name, x in old.items()}
    found, likeness = history.parents(old, [8, 8, 8], swapped, [8, 8, 8])
    assert found == [0, 1, 2] and likeness[1] == pytest.approx(1) and likeness[0] < 0.9


PIECES = "<s> <pad> </s> <unk> ▁the ▁ki ng ▁is .".split()


def test_words_are_made_of_pieces():
    text = text_of([4, 5, 6, 7, 8, 2, 5, 6], [0] * 6 + [1] * 2, PIECES)
    numbers, found = passages.words(text)
    assert found == ["the", "king", "is."] and numbers.tolist() == [0, 1, 1, 2, 2, -1, 1, 1]
    bpe = text_of([4, 5, 6, 4], symbols="<s> <pad> </s> <unk> the ki@@ ng".split())
    numbers, found = passages.words(bpe)
    assert found == ["the", "king"] and numbers.tolist() == [0, 1, 1, 0]
    plain = text_of([4, 5, 4], symbols="<s> <pad> </s> <unk> a b".split())
    assert passages.words(plain)[0].tolist() == [0, 1, 0]


def test_a_word_does_not_go_on_in_the_next_sequence():
    text = text_of([5, 6], [0, 1], PIECES)
    assert passages.words(text)[1] == ["ki", "ng"]


def test_parts_of_sentences():
    names = lambda text: [passages.PARTS[p] if p >= 0 else None for p in passages.parts(text)]  # noqa: E731
    text = text_of([4] * 8 + [2, 4, 4, 4, 2, 4], [0] * 13 + [1])
    early, middle, late = "early", "middle", "late"
    assert names(text) == [
        *("first", early, early, middle, middle, late, late, "last", None),
        *("first", early, "last", None, "first"),
    ]


def test_examples_mark_the_token_in_its_sequence():
    text = text_of([4, 5, 6, 7, 8, 2, 5, 6, 4], [0] * 6 + [1] * 3, PIECES)
    sets = [[0], [0], [1], [0], [0], [0], [0], [1], [0]]
    choices = routing(sets, 2)
    tops = top_values(choices, text.token_T, len(PIECES), most=3)
    (one,) = passages.examples(text, choices, 1, tops, most=1)[1]
    assert one["token"] == "ng" and one["before"].endswith(" ki")
    assert (one["before"], one["after"]) in [(" the ki", " is.</s>"), (" ki", " the")]


@pytest.mark.parametrize("heads", [1, 2])
def test_examples_are_found_with_sub_tokens(heads):
    text = text_of([4, 5, 7, 4], symbols=PIECES)
    choices = routing([[e] for e in (0, 1, 0, 0) for _ in range(heads)], 2)
    top = top_values(choices, np.repeat(text.token_T, heads), len(PIECES), most=1, at_least=1)
    assert passages.examples(text, choices, heads, top)[1][0]["token"] == " ki"
