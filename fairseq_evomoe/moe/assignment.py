"""Balanced assignment of tokens to experts: a transportation problem with few destinations.

Suffixes: see ``routing.py``.
"""

import heapq
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

# Random numbers up to this size break ties.  The unit is the mean distance of a score from what the means of
# its row and of its column make of it.
NOISE = 1e-4
# A gain below this is one of rounding, in the same unit.
TOLERANCE = 1e-9
# Scores beyond this count as not finite, so that sums of them are.
LIMIT = 1e30


@torch.no_grad()
def balanced_assignment(score_TE: Tensor) -> Tensor:
    """The assignment of tokens to equally loaded experts with the highest sum of scores.

    Every expert gets floor(T / E) or ceil(T / E) tokens.  The sum is the highest possible but for ``NOISE``,
    and the result depends on nothing but the scores.  There are two steps:

    1. Prices.  Each token takes the expert of its highest score minus the expert's price.  Whatever loads
       this gives, no other assignment with these loads has a higher sum.  Newton's method on the dual of the
       assignment problem, smoothed less and less, finds prices at which the loads are nearly even.
    2. Repair.  The few tokens that an expert has too many move on, each along the cheapest chain of moves
       between experts (successive shortest paths), which leaves the sum the highest for the new loads.

    The first step decides only how many moves the second one has to make.

    Args:
        score_TE: scores, shape (T, E), of any floating-point type.  Those that are not finite, or beyond
            1e30, count as 0.

    Returns:
        int64, shape (T,), on the device of the scores: the expert of each token.  The repair runs on the CPU.
    """
    tokens, experts = score_TE.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.long, device=score_TE.device)
    score_TE = _in_units(score_TE)
    expert_T = (score_TE - _prices(score_TE)).argmax(-1)
    return _repair(score_TE.cpu(), expert_T.cpu()).to(score_TE.device)


def _in_units(score_TE: Tensor) -> Tensor:
    """The scores, float64, in the unit of ``NOISE``, without ties; each row's mean is 0 but for the noise."""
    score_TE = score_TE.double()
    score_TE = score_TE.masked_fill(~(score_TE.abs() < LIMIT), 0.0)
    score_TE = score_TE - score_TE.mean(-1, keepdim=True)
    unit = (score_TE - score_TE.mean(0)).abs().mean()
    # identical tokens: nothing is left but rounding errors
    unit = torch.maximum(unit, 1e-6 * score_TE.abs().mean())
    score_TE = score_TE / unit.masked_fill(unit == 0, 1.0)
    noise_TE = torch.rand(score_TE.shape, generator=torch.Generator().manual_seed(0))
    return score_TE + NOISE * noise_TE.to(score_TE)


def _prices(score_TE: Tensor, max_steps: int = 50) -> Tensor:
    """A price for each expert, shape (E,), at which about E tokens or fewer are with a wrong expert.

    The smoothed dual is ``width * sum_t logsumexp((s_t - p) / width) + T / E * sum_e p_e``.  Its gradient is
    T / E minus the loads of a softmax routing, its Hessian the covariance of that routing over ``width``.
    """
    tokens, experts = score_TE.shape
    even = tokens / experts
    price_E = best_E = score_TE.mean(0)
    width = 2 * (score_TE - price_E).abs().mean()
    fewest = float("inf")
    # a price that is added for all experts alike makes no difference: the Hessian is singular without this
    ridge_EE = even * (1e-9 * torch.eye(experts).to(score_TE) + 1 / experts)
    for _ in range(max_steps):
        share_TE = ((score_TE - price_E) / width).softmax(-1)
        load_E = torch.bincount(share_TE.argmax(-1), minlength=experts)
        excess = (load_E - even).clamp(min=0).sum().item()
        if excess < fewest:
            fewest, best_E = excess, price_E
        if excess <= experts:
            break
        soft_E = share_TE.sum(0)
        covariance_EE = soft_E.diag() - share_TE.t() @ share_TE
        step_E = torch.linalg.solve(covariance_EE + ridge_EE, soft_E - even)
        # the quadratic model of the dual holds for price changes of a few widths
        price_E = price_E + width * step_E / (step_E.abs().max() / 3).clamp(min=1)
        error = (soft_E - even).abs().sum().item() / tokens
        width = width / (4 if error < 0.02 else 2 if error < 0.2 else 1)
    return best_E


def _repair(score_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Even out the loads of an assignment that is optimal for its own loads, at the least cost.

    Changes ``expert_T`` and returns it.
    """
    tokens, experts = score_TE.shape
    low, high = tokens // experts, -(-tokens // experts)
    load_E = torch.bincount(expert_T, minlength=experts)
    cost_EE = score_TE.new_zeros(experts, experts)
    token_EE = torch.zeros(experts, experts, dtype=torch.long)
    changed: Sequence[int] = range(experts)
    while True:
        for expert in changed:
            _price_moves(score_TE, expert_T, expert, cost_EE, token_EE)
        worth = float("inf")
        if (load_E > high).any():
            from_E, to_E = load_E > high, load_E < high
        elif (load_E < low).any():
            from_E, to_E = load_E > low, load_E < low
        else:
            # loads are as they should; perhaps others of the experts should have one token more
            from_E, to_E, worth = load_E > low, load_E < high, -TOLERANCE
        if not (from_E.any() and to_E.any()):
            return expert_T
        path, cost = _cheapest_path(cost_EE, from_E, to_E)
        if not cost < worth:
            return expert_T
        for here, there in zip(path, path[1:]):
            expert_T[token_EE[here, there]] = there
        load_E[path[0]] -= 1
        load_E[path[-1]] += 1
        changed = path


def _price_moves(score_TE: Tensor, expert_T: Tensor, expert: int, cost_EE: Tensor, token_EE: Tensor) -> None:
    """Fill in what the cheapest move from an expert to each other one costs, and which token it moves."""
    token_N = (expert_T == expert).nonzero().squeeze(1)
    cost_EE[expert] = float("inf")
    if token_N.shape[0] > 0:
        score_NE = score_TE[token_N]
        cost_EE[expert], index_E = (score_NE[:, expert, None] - score_NE).min(0)
        token_EE[expert] = token_N[index_E]
    cost_EE[expert, expert] = 0


def _cheapest_path(cost_EE: Tensor, from_E: Tensor, to_E: Tensor) -> Tuple[List[int], float]:
    """The cheapest path from any of some experts to any of others (Bellman-Ford), and its cost.

    Costs may be negative, but not those of cycles.
    """
    experts = cost_EE.shape[0]
    distance_E = torch.zeros_like(cost_EE[0]).masked_fill(~from_E, float("inf"))
    previous_E = torch.arange(experts)
    for _ in range(experts):
        shortest_E, through_E = (distance_E[:, None] + cost_EE).min(0)
        better_E = shortest_E < distance_E - TOLERANCE / experts
        if not better_E.any():
            break
        distance_E = torch.where(better_E, shortest_E, distance_E)
        previous_E = torch.where(better_E, through_E, previous_E)
    distance_E = distance_E.masked_fill(~to_E, float("inf"))
    end = int(distance_E.argmin())
    path, previous = [end], previous_E.tolist()
    while previous[path[-1]] != path[-1]:
        path.append(previous[path[-1]])
    return path[::-1], distance_E[end].item()


def balanced_table(count_V: Tensor, experts: int) -> Tensor:
    """An expert for each entry of the vocabulary: the most frequent entry to the least loaded expert.

    Args:
        count_V: how often each entry occurs, at least 0.
        experts: E.

    Returns:
        int64, shape (V,).  Entries of the same frequency are in the order of the vocabulary, experts of the
        same load in that of their number of entries; entries that do not occur are dealt out in turn.
    """
    counts = count_V.tolist()
    table = [0] * len(counts)
    # the load, the number of entries and the number of each expert
    heap = [(0.0, 0, expert) for expert in range(experts)]
    turn = 0
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
        if counts[index] > 0:
            load, entries, expert = heap[0]
            heapq.heapreplace(heap, (load + counts[index], entries + 1, expert))
        else:
            expert = turn % experts
            turn += 1
        table[index] = expert
    return torch.tensor(table, dtype=torch.long)
