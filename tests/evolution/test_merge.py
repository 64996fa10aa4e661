"""The groups that experts are merged in, and their means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from fairseq_evomoe.evolution.merge import (
    Merge,
    MergeError,
    average_linkage,
    group_experts,
    match_units,
    output_products,
    plan_merge,
    weight_similarity,
)
from fairseq_evomoe.moe import ROUTERS, Experts, RoutingContext, Vocabulary
from fairseq_evomoe.moe.dispatch.local import dispatch
from fairseq_evomoe.moe.merge_rule import MergeRule
from fairseq_evomoe.moe.routers.dts import DenseToSparseRouter
from fairseq_evomoe.moe.routers.hash import HashRouter
from support.experts import experts_of, tensors_of

GROUPS = [[0, 2, 5], [1, 3], [4]]
MERGED = sorted(name for name, cls in ROUTERS.items() if cls.merge_rules is not None)


def near_copies(groups, width=4, gated=False, permuted=False, noise=1e-12):
    """Experts that are the same in a group but for noise, and for the order of their hidden units."""
    experts = experts_of([width] * sum(map(len, groups)), gated=gated)
    with torch.no_grad():
        for group in groups:
            for e in group[1:]:
                order = torch.randperm(width) if permuted else torch.arange(width)
                for name, p in experts.named_parameters(recurse=False):
                    if name == "b2":
                        p[e] = p[group[0]]
                    else:
                        p[e * width : (e + 1) * width] = p[group[0] * width + order]
        for p in experts.parameters():
            p += noise * torch.randn_like(p)
    return experts


def merged_experts(experts, plan):
    new = Experts(experts.dim, plan.widths, gated=experts.gated).double()
    state = {name: plan.tensor("experts." + name, p) for name, p in tensors_of(experts).items()}
    new.load_state_dict(state)
    return new


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_copies_are_found_and_their_mean_is_the_same_function(gated, permuted):
    experts = near_copies(GROUPS, gated=gated, permuted=permuted)
    tensors, widths = tensors_of(experts), experts.widths
    similarity = weight_similarity(tensors, widths, align=permuted)
    plan = plan_merge(tensors, widths, similarity, 3, align=permuted)
    assert plan.groups == GROUPS
    new = merged_experts(experts, plan)
    x = torch.randn(7, 5, dtype=torch.float64)
    for m, group in enumerate(GROUPS):
        found = new(x, [7 * (i == m) for i in range(3)])
        for e in group:
            expected = experts(x, [7 * (i == e) for i in range(6)])
            assert torch.allclose(found, expected, atol=1e-10)


def test_permuted_copies_are_not_found_without_alignment():
    experts = near_copies([[0, 1], [2, 3]], width=16, permuted=True)
    aligned, plain = (weight_similarity(tensors_of(experts), experts.widths, a) for a in (True, False))
    assert aligned[0, 1] > 1 - 1e-9 and aligned[2, 3] > 1 - 1e-9
    assert plain[0, 1] < 0.9


def test_the_order_of_permuted_units_is_found():
    rows = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows[order][match_units(rows, rows[order])], rows)


def test_means_are_those_of_a_slow_reference():
    experts = experts_of([3] * 5, gated=True)
    tensors = tensors_of(experts)
    groups, load = [[0, 3, 4], [1], [2]], torch.tensor([1.0, 0.0, 5.0, 3.0, 4.0])
    similarity = torch.full((5, 5), -1.0)
    similarity[0, 3] = similarity[3, 0] = similarity[0, 4] = similarity[4, 0] = similarity[3, 4] = 1.0
    similarity[4, 3] = 1.0
    rules = {"weight": MergeRule.mean}
    plan = plan_merge(tensors, [3] * 5, similarity, 3, load, router_rules=rules)
    assert plan.groups == groups
    share = {0: 1 / 8, 3: 3 / 8, 4: 4 / 8, 1: 1.0, 2: 1.0}  # without any load: equal
    gate = torch.randn(5, 4, dtype=torch.float64)
    for name, old in {**tensors, "gate": gate}.items():
        rows = 3 if name in ("w1", "b1", "w2", "w3") else 1
        found = plan.tensor("router.weight" if name == "gate" else "experts." + name, old)
        for m, group in enumerate(groups):
            for row in range(rows):
                expected = sum(share[e] * old[e * rows + row] for e in group)
                assert (found[m * rows + row] - expected).abs().max() < 1e-10
    assert torch.equal(plan.renumbered(torch.tensor([4, 1, -1, 2, 0, 3])), torch.tensor([0, 1, -1, 2, 0, 0]))
    assert torch.equal(plan.total(torch.arange(5.0)), torch.tensor([7.0, 1.0, 2.0]))


def test_similarities_by_hand():
    tensors = tensors_of(experts_of([3, 3, 2]))
    flat = [
        torch.cat(
            [tensors["w1"][r].flatten(), tensors["b1"][r], tensors["w2"][r].flatten(), tensors["b2"][e]]
        )
        for e, r in enumerate((slice(0, 3), slice(3, 6), slice(6, 8)))
    ]
    found = weight_similarity(tensors, [3, 3, 2])
    expected = flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()
    assert (found[0, 1] - expected).abs() < 1e-10 and found[0, 1] == found[1, 0]
    assert found[0, 2] == 0 and torch.allclose(found.diagonal(), torch.ones(3, dtype=torch.float64))
    y = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = sum(torch.cosine_similarity(y[0, t], y[2, t], dim=0) for t in range(4))
    assert (output_products(y)[0, 2] - expected).abs() < 1e-10
    assert torch.equal(output_products(y[:, :0]), torch.zeros(3, 3, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.data())
def test_clusters_are_those_of_average_linkage(points, data):
    clusters = data.draw(st.integers(1, points))
    seed = data.draw(st.integers(0, 999))
    similarity = torch.rand(points, points, generator=torch.Generator().manual_seed(seed)).double()
    similarity = (similarity + similarity.t()) / 2
    tree = linkage(squareform((1 - similarity).numpy(), checks=False), "average")
    labels = cut_tree(tree, clusters)[:, 0]
    expected = {frozenset(np.flatnonzero(labels == c)) for c in range(clusters)}
    assert {frozenset(group) for group in average_linkage(similarity, clusters)} == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=9), st.data())
def test_groups_are_a_partition_into_experts_of_equal_widths(widths, data):
    fewest = len(set(widths))
    similarity = torch.zeros(len(widths), len(widths))  # all ties
    for experts in range(fewest, len(widths)):
        groups = group_experts(similarity, widths, experts)
        assert len(groups) == experts
        assert sorted(e for group in groups for e in group) == list(range(len(widths)))
        assert all(len({widths[e] for e in group}) == 1 for group in groups)
    bad = data.draw(st.sampled_from([0, -1, len(widths), fewest - 1]))
    with pytest.raises(MergeError, match="`experts`"):
        group_experts(similarity, widths, bad)


def merged_router(router, plan, make):
    new = make(len(plan.groups))
    if hasattr(new, "allocate"):
        new.allocate(len(plan.groups))
    new.load_state_dict({name: plan.tensor("router." + name, x) for name, x in router.state_dict().items()})
    return new


def test_a_gate_of_equal_rows_loses_nothing_in_groups_of_one_size():
    groups = [[0, 4], [1, 2], [3, 5]]
    experts = near_copies(groups, noise=0)
    make = lambda e: DenseToSparseRouter(5, e, threshold=0.0, eval_routing="adaptive").double().eval()  # noqa: E731
    router = make(6)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        for one, other in groups:
            router.weight[other] = router.weight[one]
    similarity = weight_similarity(tensors_of(experts), experts.widths)
    rules = router.merge_rules
    plan = plan_merge(tensors_of(experts), experts.widths, similarity, 3, router_rules=rules)
    assert plan.groups == groups
    new, x = merged_router(router, plan, make), torch.randn(20, 5, dtype=torch.float64)
    before = dispatch(x, router(x, RoutingContext()), experts)
    after = dispatch(x, new(x, RoutingContext()), merged_experts(experts, plan))
    assert torch.allclose(before, after, atol=1e-10)


def merge_of(router=None):
    share_E = torch.tensor([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1, 1 / 3])
    rules = {} if router is None else router.merge_rules
    return Merge(GROUPS, share_E, list(torch.arange(24).split(4)), rules)


def test_a_table_loses_nothing_in_any_groups():
    experts = near_copies(GROUPS, noise=0)
    make = lambda e: HashRouter(5, e, Vocabulary(30, torch.ones(30)))  # noqa: E731
    router = make(6)
    router.initialize(torch.Generator())
    plan = merge_of(router)
    new, x = merged_router(router, plan, make), torch.randn(30, 5, dtype=torch.float64)
    context = RoutingContext(token_T=torch.arange(30))
    before = dispatch(x, router(x, context), experts)
    after = dispatch(x, new(x, context), merged_experts(experts, plan))
    assert torch.allclose(before, after, atol=1e-10)


@pytest.mark.parametrize("name", MERGED)
def test_every_router_is_merged(name):
    make = lambda e: ROUTERS[name](8, e, vocabulary=Vocabulary(30, torch.ones(30)))  # noqa: E731
    router = make(6)
    router.initialize(torch.Generator().manual_seed(1))
    plan = merge_of(router)
    new = merged_router(router, plan, make).eval()
    context = RoutingContext(token_T=torch.arange(30), sequence_T=torch.zeros(30, dtype=torch.long))
    routing = new(torch.randn(30, 8), context)
    assert routing.experts == 3 and int(routing.expert_N.max()) < 3


@pytest.mark.parametrize("name", MERGED)
def test_every_rule_is_that_of_a_tensor(name):
    """A name that is misspelt would be found only with a checkpoint that has the tensor."""
    seen = "gate_input" in ROUTERS[name].Options.declared()
    found = set()
    declared = ROUTERS[name].Options.declared()
    balanced = {"balance": "bias"} if "balance" in declared else {}
    balanced.update({"constant_experts": 1} if "constant_experts" in declared else {})
    for options in [{"gate_input": kind} for kind in ("hidden", "both", "table")] if seen else [{}]:
        router = ROUTERS[name](8, 6, vocabulary=Vocabulary(30, torch.ones(30), 5), **options, **balanced)
        found |= {key if key in router.merge_rules else key.split(".")[0] for key in router.state_dict()}
    inherited = set() if seen else {"token_weight"}  # of a gate that sees the layer's input alone
    inherited |= {"balancing"} - ({"balancing"} if "balance" in declared else set())
    inherited |= {"free"} - ({"free"} if "constant_experts" in declared else set())
    assert found == set(ROUTERS[name].merge_rules) - inherited


def test_a_tensor_without_a_rule_is_refused():
    assert ROUTERS["comet"].merge_rules is None
    for name, tensor in ROUTERS["comet"](8, 6).state_dict().items():
        with pytest.raises(MergeError, match=f"a tensor {name} .* merge_rules"):
            merge_of().tensor("router." + name, tensor)


def test_a_token_s_experts_do_not_become_one():
    router = HashRouter(8, 6, Vocabulary(30, torch.ones(30)), hashes=2)
    with pytest.raises(MergeError, match="to 2 different experts"):
        merge_of(router).tensor("router.table_V", router.table_V)


def test_hyper_adapter_s_embeddings_are_summed():
    """A token that gets no member of a group lacks the sum of their embeddings."""
    plan = merge_of()
    old = torch.randn(6, 7)
    found = plan.tensor("hyper_adapter.expert_embedding", old)
    assert torch.allclose(found, torch.stack([old[group].sum(0) for group in GROUPS]))
    assert plan.tensor("shared.w1", old) is old and plan.tensor("hyper_adapter.layer_embedding", old) is old
