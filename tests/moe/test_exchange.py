"""What experts on several ranks are made of: placement, noise by place, similar tokens, one rank alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import RoutingContext, noise
from fairseq_evomoe.moe.capacity import limit_load
from fairseq_evomoe.moe.dispatch.compression import LSH
from fairseq_evomoe.moe.ranks import ALONE, Ranks
from fairseq_evomoe.moe.routers.router import topk_routing
from fairseq_evomoe.moe.sharding import concat_experts, deal_experts, take_experts

WIDTHS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(widths=WIDTHS, ranks=st.integers(1, 9))
def test_every_expert_is_on_one_rank_and_no_rank_is_idle(widths, ranks):
    experts_of = deal_experts(widths, ranks)
    assert sorted(e for own in experts_of for e in own) == list(range(len(widths)))
    assert all(own == sorted(own) for own in experts_of)
    assert sum(bool(own) for own in experts_of) == min(ranks, len(widths))
    if len(set(widths)) == 1:  # the remainder is spread
        sizes = [len(own) for own in experts_of]
        assert max(sizes) - min(sizes) <= 1


def test_wide_experts_are_dealt_out_first():
    assert deal_experts([9, 11, 13, 15, 17, 19, 21, 23], 2) == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert deal_experts([4] * 5, 2) == [[0, 2, 4], [1, 3]]


@given(widths=WIDTHS, ranks=st.integers(1, 4), name=st.sampled_from(["w1", "b1", "b2"]))
def test_joining_undoes_taking(widths, ranks, name):
    experts_of = deal_experts(widths, ranks)
    rows = len(widths) if name == "b2" else sum(widths)
    whole = torch.arange(rows * 2.0).view(rows, 2)
    parts = [take_experts(name, whole, widths, own) for own in experts_of]
    assert torch.equal(concat_experts(name, parts, widths, experts_of), whole)
    some = list(range(0, len(widths), 2))
    taken = concat_experts(name, parts, widths, experts_of, some)
    assert torch.equal(taken, take_experts(name, whole, widths, some))


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 3 * noise.BLOCK), rows=st.integers(0, 2 * noise.BLOCK), seed=st.integers(0, 9))
def test_noise_belongs_to_its_row(first, rows, seed):
    cpu = torch.device("cpu")
    table = noise.uniform(("gate", seed), 0, 6 * noise.BLOCK, 3, cpu)
    assert torch.equal(noise.uniform(("gate", seed), first, rows, 3, cpu), table[first : first + rows])


@pytest.mark.parametrize("columns", [8, 1024])
def test_a_gpu_draws_noise_in_few_launches(columns):
    """A block for 256 rows made 64 of the noise of 16384 tokens."""
    assert 16384 / noise.block_rows(columns, torch.device("cuda")) <= 4


def test_noise_is_uniform_and_depends_on_the_key():
    cpu = torch.device("cpu")
    draw = noise.uniform((1, "a"), 0, 20000, 4, cpu)
    assert abs(draw.mean().item() - 0.5) < 0.01 and abs(draw.var().item() - 1 / 12) < 0.01
    assert 0 <= draw.min() and draw.max() < 1
    assert len(draw.flatten().unique()) > 0.95 * draw.numel()  # blocks are not alike
    for other in ((2, "a"), (1, "b")):
        correlation = torch.corrcoef(
            torch.stack([draw.flatten(), noise.uniform(other, 0, 20000, 4, cpu).flatten()])
        )
        assert abs(correlation[0, 1].item()) < 0.02


def beside(rank, other):
    """One of two ranks, which is told the counts that the other one has."""

    class Pretended(Ranks):
        def gather_counts(self, count_K):
            return torch.stack([count_K, other] if rank == 0 else [other, count_K])

    return Pretended(size=2, rank=rank)


def test_noise_is_that_of_the_batch_of_all_ranks():
    key = ("gate", 1, 2, 3)
    everything = RoutingContext(noise_key=key).uniform(torch.empty(305, 4))
    first = RoutingContext(noise_key=key, ranks=beside(0, torch.tensor([300])))
    second = RoutingContext(noise_key=key, ranks=beside(1, torch.tensor([5])))
    parts = [first.uniform(torch.empty(5, 4)), second.uniform(torch.empty(300, 4))]
    assert torch.equal(torch.cat(parts), everything)
    later = RoutingContext(noise_key=key, first_row=5).uniform(torch.empty(300, 4))
    assert torch.equal(later, parts[1])  # a second batch of one rank


def test_capacity_is_shared_by_ranks():
    torch.manual_seed(0)
    expert_TK = torch.stack([torch.randperm(3)[:2] for _ in range(12)])
    weight_TK = torch.rand(12, 2)
    whole = topk_routing(expert_TK, weight_TK, 3)
    limit_load(whole, 0.7, 2)
    assert whole.dropped > 0

    parts = [topk_routing(expert_TK[rows], weight_TK[rows], 3) for rows in (slice(0, 5), slice(5, 12))]
    counts = [
        torch.cat([torch.bincount(choice, minlength=3) for choice in part.expert_N.view(2, -1)])
        for part in parts
    ]
    counts = [torch.cat([count, torch.tensor([part.tokens])]) for count, part in zip(counts, parts)]
    limit_load(parts[0], 0.7, 2, beside(0, counts[1]))
    limit_load(parts[1], 0.7, 2, beside(1, counts[0]))
    pairs = lambda routing, start: {  # noqa: E731
        (t + start, e) for t, e in zip(routing.token_N.tolist(), routing.expert_N.tolist())
    }
    assert pairs(parts[0], 0) | pairs(parts[1], 5) == pairs(whole, 0)
    assert parts[0].dropped + parts[1].dropped == whole.dropped


def test_a_rank_alone_adds_nothing_up():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total, count = ALONE.total(x, 3)
    assert total is x and count.item() == 3
    assert ALONE.gather_rows(x)[0] is x


def slow_hash(x, random):
    """The signed index of the largest coordinate, one token and hash after another, in float64."""
    rows = random.shape[1]
    result = []
    for R in random.double():
        for_token = []
        for token in x.double():
            rotated = R @ token
            index = max(range(rows), key=lambda i: abs(rotated[i].item()))
            for_token.append(index + rows * (rotated[index].item() < 0))
        result.append(for_token)
    return torch.tensor(result)


def test_the_hash_is_the_signed_index_of_the_largest_coordinate():
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    for dim in (0, 3):
        lsh = LSH(hashes=4, dim=dim, key=(1, 2))
        random = lsh._projection(4 * (dim or 6), 6).view(4, -1, 6)
        assert torch.equal(lsh.hash(x), slow_hash(x, random))
    assert not torch.equal(LSH(4, 0, (1, 2)).hash(x), LSH(4, 0, (1, 3)).hash(x))


def test_buckets_are_tokens_of_one_expert_with_the_same_hashes():
    torch.manual_seed(1)
    centers = torch.randn(5, 8)
    x = (centers.repeat(12, 1) + 1e-3 * torch.randn(60, 8)).double()
    group = torch.arange(60) // 30
    lsh = LSH(hashes=3)
    buckets = lsh.buckets(x, group)
    hashes = [(g, *h) for g, h in zip(group.tolist(), lsh.hash(x).t().tolist())]
    named = {}
    for n, bucket in enumerate(buckets.bucket_N.tolist()):
        named.setdefault(bucket, set()).add(hashes[n])
    assert all(len(found) == 1 for found in named.values()) and len(named) == len(set(hashes))
    assert len(named) == 10  # each center in each group
    assert torch.equal(buckets.group_B, buckets.group_B.sort().values)
    for bucket in named:
        rows = buckets.bucket_N == bucket
        assert torch.allclose(buckets.mean_BD[bucket], x[rows].mean(0))
        assert (group[rows] == buckets.group_B[bucket]).all()


def test_outputs_of_means_get_the_rest_of_the_token():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.0, -5.0]], dtype=torch.float64, requires_grad=True)

    def output(x):
        buckets = LSH(hashes=1, dim=1).buckets(x, torch.zeros(3, dtype=torch.long))
        return buckets.spread(buckets.mean_BD.square())

    buckets = LSH(hashes=1, dim=1).buckets(x, torch.zeros(3, dtype=torch.long))
    for n, bucket in enumerate(buckets.bucket_N.tolist()):
        mean = x[buckets.bucket_N == bucket].mean(0)
        assert torch.allclose(output(x)[n], mean**2 + x[n] - mean)
    assert torch.autograd.gradcheck(output, x)
    empty = LSH().buckets(x[:0], torch.zeros(0, dtype=torch.long))
    assert empty.spread(empty.mean_BD).shape == (0, 2)


@pytest.mark.parametrize("parallel", [0, 2, 3])
def test_a_group_is_divided_evenly(parallel, tmp_path):
    store = "file://{}".format(tmp_path / "store")
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="must divide the number of ranks 1"):
            Ranks.of_group(torch.distributed.group.WORLD, parallel)
        assert Ranks.of_group(torch.distributed.group.WORLD).parallel == 1
    finally:
        torch.distributed.destroy_process_group()
