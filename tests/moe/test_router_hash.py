"""The hash router against tables made by hand and by a slow reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.routers.hash import HashKind, HashRouter, balanced_table
from fairseq_evomoe.moe.routing import Vocabulary


def make(count, experts, hash="random", dim=3, seed=0):
    count_V = torch.tensor(count, dtype=torch.float32)
    router = HashRouter(dim, experts, vocabulary=Vocabulary(len(count), count_V), hash=hash)
    router.initialize(torch.Generator().manual_seed(seed))
    return router


def reference_table(count, experts):
    """One entry after another, by the definition."""
    load, entries, table, turn = [0.0] * experts, [0] * experts, [None] * len(count), 0
    for v in sorted(range(len(count)), key=lambda v: (-count[v], v)):
        if count[v] == 0:
            table[v] = turn % experts
            turn += 1
            continue
        best = min(range(experts), key=lambda e: (load[e], entries[e], e))
        table[v] = best
        load[best] += count[v]
        entries[best] += 1
    return table


def test_a_balanced_table_by_hand():
    """Counts 2, 9, 4, 4, 0, 0 for two experts: 9 | 4; 4 to the second; 2 to the second; then in turn."""
    assert balanced_table(torch.tensor([2.0, 9.0, 4.0, 4.0, 0.0, 0.0]), 2).tolist() == [1, 0, 1, 1, 0, 1]


def test_without_counts_the_entries_are_dealt_out_in_the_order_of_the_dictionary():
    assert make([0.0] * 7, 3, "balanced").table_V.tolist() == [0, 1, 2, 0, 1, 2, 0]


@settings(deadline=None, max_examples=100)
@given(count=st.lists(st.integers(0, 50), max_size=40), experts=st.integers(1, 6))
def test_a_balanced_table_matches_the_reference(count, experts):
    table = balanced_table(torch.tensor(count, dtype=torch.float32), experts)
    assert table.dtype == torch.int64 and table.tolist() == reference_table(count, experts)
    load = torch.zeros(experts).index_add(0, table, torch.tensor(count, dtype=torch.float32))
    # greedy: the most loaded expert was the least loaded one before its last entry
    assert load.max() - load.min() <= max(count, default=0)


def test_zipf_counts_are_even_when_balanced():
    count = (1e6 / torch.arange(1, 1001, dtype=torch.float64)).round().float()
    load = torch.zeros(4).index_add(0, balanced_table(count, 4), count)
    assert load.max() / load.mean() < 1.001
    load = torch.zeros(4).index_add(0, make(count.tolist(), 4).table_V, count)
    assert load.max() / load.mean() > 1.1


def test_a_random_table_depends_on_the_generator_alone():
    torch.manual_seed(1)
    first = make([1.0] * 1000, 8).table_V
    torch.manual_seed(2)
    assert torch.equal(make([1.0] * 1000, 8).table_V, first)
    assert not torch.equal(make([1.0] * 1000, 8, seed=1).table_V, first)
    # 125 expected, standard deviation 10.5
    assert torch.bincount(first, minlength=8).sub(125).abs().max() < 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hash", list(HashKind))
def test_tokens_go_where_the_table_says(dtype, training, hash):
    router = make([3.0, 1.0, 4.0, 1.0, 5.0], 2, hash).to(dtype).train(training)
    assert router.table_V.dtype == torch.int64
    token = torch.tensor([4, 0, 4, 2, 1, 3, 4])
    routing = router(torch.randn(7, 3).to(dtype), RoutingContext(token_T=token))
    assert routing.expert_N.tolist() == [router.table_V.tolist()[t] for t in token.tolist()]
    assert routing.token_N.tolist() == list(range(7))
    assert routing.weight_N.tolist() == [1.0] * 7
    assert routing.weight_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.losses == {} and (routing.tokens, routing.experts) == (7, 2)


def test_the_table_is_in_the_checkpoint():
    first, second = make([1.0] * 50, 4), make([1.0] * 50, 4, seed=1)
    assert list(first.state_dict()) == ["table_V"] and list(first.parameters()) == []
    second.load_state_dict(first.state_dict())
    context = RoutingContext(token_T=torch.arange(50))
    x = torch.randn(50, 3)
    assert torch.equal(first(x, context).expert_N, second(x, context).expert_N)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="router hash needs the vocabulary index of each token"):
        make([1.0] * 5, 2)(torch.randn(4, 3), RoutingContext())
    with pytest.raises(ValueError, match="router hash needs the vocabulary of its tokens"):
        HashRouter(3, 2)
    with pytest.raises(ValueError, match="md5"):
        make([1.0], 2, "md5")


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.lists(st.integers(0, 9), max_size=20),
    experts=st.integers(1, 12),
    hash=st.sampled_from(list(HashKind)),
    same=st.booleans(),
)
def test_every_token_is_routed(tokens, experts, hash, same):
    router = make(list(range(10)), experts, hash)
    if same:
        tokens = [7] * len(tokens)
    token_T = torch.tensor(tokens, dtype=torch.long)
    routing = router(torch.randn(len(tokens), 3), RoutingContext(token_T=token_T))
    assert routing.token_N.tolist() == list(range(len(tokens)))
    assert routing.load_E().sum() == len(tokens)
    assert ((routing.expert_N >= 0) & (routing.expert_N < experts)).all()
    if same and tokens:
        assert len(set(routing.expert_N.tolist())) == 1
