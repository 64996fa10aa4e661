"""What a training step costs on many ranks: FLOP, bytes between ranks, seconds.  A model, not a measurement.

Symbols: W ranks, G of them in a node; P consecutive ranks share the E experts of a layer; T tokens of a
rank, width d, h hidden units of an expert, k active experts of a token; b bytes of a number on the way.

- A step of a layer computes ``T (6 k m d h + 6 d E)`` FLOP on each rank: the experts (m = 2 matrices, 3 if
  gated) and the router, 2 FLOP for a weight in the forward pass and 4 in the backward pass.
- A token travels once to each rank that has any of its experts: to ``r(k)`` other ranks, see
  ``other_ranks``.  A rank sends ``4 T r d b`` bytes (there and back, and their gradients), 16 for each pair
  of a token and an expert elsewhere (weight and number of the row, and their gradients), and the counts.
- An exchange takes ``latency + max(bytes within the node / bandwidth, bytes to other nodes / bandwidth)``.
  There are 5 one after the other: counts, rows there and back, and the gradients' two.
- Before the spawn there is no exchange: the one expert is on every rank and its gradient is added up over
  W ranks.  Afterwards those of a rank's E / P experts are added up over the W / P ranks that have the same.
- An all-reduce of n bytes by R ranks takes ``2 (R - 1) / R n / bandwidth`` (a ring), inside the nodes first,
  then between them with n / G bytes of each rank; latency counts ``2 log2 R`` times.

Left out: uneven loads, sorting and gathering rows, the small sums of the router's losses, contention on the
network, the optimizer, and that latency grows with the number of messages.  Gradients are added up after the
backward pass, as ``legacy_ddp`` does, and hide behind nothing.
"""

import math
from dataclasses import dataclass

TRIPS = 4
"""Exchanges of rows in a step: there and back, in the forward and the backward pass."""

BYTES_OF_PARAMETER = 16
"""Weight, gradient and Adam's two moments in float32; or the first two in 16 bits beside float32 weights."""


@dataclass(frozen=True)
class Link:
    """How ranks reach each other.

    Attributes:
        bandwidth: B/s that a rank can send while it receives as much.
        latency: seconds of an exchange without content.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """What ranks run on.

    Attributes:
        flops: FLOP/s that a rank reaches in the products of experts.
        inside: between the ranks of a node.
        between: between nodes.
        ranks_per_node: G.
    """

    flops: float
    inside: Link
    between: Link
    ranks_per_node: int


@dataclass(frozen=True)
class Layer:
    """An MoE layer: width d, h hidden units and number E of the experts, matrices of each."""

    dim: int
    hidden: int
    experts: int
    matrices: int = 2

    @property
    def expert_parameters(self) -> int:
        """Of one expert, biases among them."""
        return self.matrices * self.dim * self.hidden + self.hidden + self.dim

    @property
    def router_parameters(self) -> int:
        """Of a linear gate."""
        return self.dim * self.experts


@dataclass(frozen=True)
class Run:
    """How a layer is trained.

    Attributes:
        ranks: W.
        parallel: P, a divisor of W, at most E.
        tokens: T of a rank.
        wire_bytes: b, of a number on the way.
        gradient_bytes: of a number of the gradients that are added up.
    """

    ranks: int
    parallel: int
    tokens: int
    wire_bytes: int = 2
    gradient_bytes: int = 2


@dataclass(frozen=True)
class Phase:
    """A stage of EvoMoE: k experts of a token, all of which are on every rank before the spawn."""

    name: str
    active: int
    spawned: bool = True


@dataclass(frozen=True)
class Seconds:
    """What a step takes."""

    compute: float = 0.0
    exchange: float = 0.0
    gradients: float = 0.0

    @property
    def step(self) -> float:
        """All of it, one after the other."""
        return self.compute + self.exchange + self.gradients


def other_ranks(experts: int, parallel: int, active: int) -> float:
    """How many other ranks have any of a token's k experts: the expected number, r.

    The experts are k different ones at random.  A rank with n of the E experts has none of them with
    probability ``C(E - n, k) / C(E, k)``, and it is another rank than the token's with ``(P - 1) / P``.
    """
    counts = [experts // parallel + (place < experts % parallel) for place in range(parallel)]
    none = [math.comb(experts - n, active) / math.comb(experts, active) for n in counts]
    return sum(1 - p for p in none) * (parallel - 1) / parallel


def exchanged_bytes(layer: Layer, run: Run, phase: Phase) -> float:
    """Bytes that a rank sends to others in a step."""
    if not phase.spawned or run.parallel == 1:
        return 0.0
    others = run.parallel - 1
    rows = run.tokens * other_ranks(layer.experts, run.parallel, phase.active)
    pairs = run.tokens * phase.active * others / run.parallel
    counts = others * (1 + layer.experts / run.parallel)
    return TRIPS * rows * layer.dim * run.wire_bytes + 2 * pairs * 8 + counts * 8


def all_to_all(sent: float, parallel: int, machine: Machine, exchanges: int = 1) -> float:
    """Seconds in which a rank sends so many bytes, evenly to the P - 1 others, in several exchanges."""
    if parallel == 1:
        return 0.0
    near = min(parallel, machine.ranks_per_node) - 1
    far = parallel - 1 - near
    share = sent / (parallel - 1)
    latency = machine.between.latency if far else machine.inside.latency
    inside, between = near * share / machine.inside.bandwidth, far * share / machine.between.bandwidth
    return exchanges * latency + max(inside, between)


def all_reduce(size: float, ranks: int, machine: Machine, stride: int = 1) -> float:
    """Seconds in which R ranks add up so many bytes; every ``stride``-th rank takes part."""
    near = min(ranks, max(machine.ranks_per_node // stride, 1))
    far = math.ceil(ranks / near)
    seconds = 0.0
    for count, link, part in ((near, machine.inside, size), (far, machine.between, size / near)):
        ring = 2 * (count - 1) / count * part / link.bandwidth
        seconds += ring + 2 * math.ceil(math.log2(count)) * link.latency
    return seconds


def flop(layer: Layer, run: Run, phase: Phase) -> float:
    """FLOP of a rank in a step."""
    router = layer.router_parameters if phase.spawned else 0
    experts = phase.active * layer.matrices * layer.dim * layer.hidden
    return 6 * run.tokens * (experts + router)


def own_experts(layer: Layer, run: Run, phase: Phase) -> float:
    """Number of experts that a rank has, in the mean."""
    return layer.experts / run.parallel if phase.spawned else 1


def shared_parameters(layer: Layer, run: Run, phase: Phase) -> float:
    """Parameters of the layer that are on all ranks: the one expert, or the router and experts that are."""
    if not phase.spawned:
        return layer.expert_parameters
    return layer.router_parameters + (run.parallel == 1) * layer.experts * layer.expert_parameters


def reduce_experts(layer: Layer, run: Run, phase: Phase, machine: Machine) -> float:
    """Seconds to add up the gradients of experts over the ranks that have the same ones."""
    if not phase.spawned or run.parallel == 1:
        return 0.0
    size = own_experts(layer, run, phase) * layer.expert_parameters * run.gradient_bytes
    return all_reduce(size, run.ranks // run.parallel, machine, stride=run.parallel)


def layer_seconds(layer: Layer, run: Run, phase: Phase, machine: Machine) -> Seconds:
    """A step of one MoE layer."""
    sent = exchanged_bytes(layer, run, phase)
    shared = shared_parameters(layer, run, phase) * run.gradient_bytes
    return Seconds(
        compute=flop(layer, run, phase) / machine.flops,
        exchange=all_to_all(sent, run.parallel, machine, TRIPS + 1) if sent else 0.0,
        gradients=all_reduce(shared, run.ranks, machine) + reduce_experts(layer, run, phase, machine),
    )


def hidden_share(layer: Layer, run: Run, phase: Phase, machine: Machine) -> float:
    """The part of the exchange that an always-on expert of the same width hides (``--moe-shared-expert``).

    It is computed while the rows go out, and its gradients while those of the outputs do: half of the trips
    at most.
    """
    exchange = layer_seconds(layer, run, phase, machine).exchange
    if not exchange:
        return 0.0
    forward = 2 * run.tokens * layer.matrices * layer.dim * layer.hidden / machine.flops
    trip = all_to_all(exchanged_bytes(layer, run, phase), run.parallel, machine) / TRIPS
    return (min(trip, forward) + min(trip, 2 * forward)) / exchange


@dataclass(frozen=True)
class Model:
    """A Transformer decoder: every ``freq``-th of its layers has experts, the others a dense FFN.

    Attributes:
        layers: L.
        freq: of them have experts.
        vocabulary: V, of embeddings that are the output's too.
        sequence: tokens that a token attends to.
    """

    moe: Layer
    layers: int
    freq: int
    vocabulary: int
    sequence: int

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers // self.freq

    @property
    def other_parameters(self) -> int:
        """Weights of all that is on every rank at all times: attention, dense layers, embeddings."""
        dim, dense = self.moe.dim, self.layers - self.moe_layers
        ffn = self.moe.matrices * dim * self.moe.hidden
        return self.layers * 4 * dim**2 + dense * ffn + self.vocabulary * dim

    def parameters(self, run: Run, phase: Phase) -> float:
        """Parameters of a rank."""
        experts = own_experts(self.moe, run, phase) * self.moe.expert_parameters
        router = self.moe.router_parameters if phase.spawned else 0
        return self.other_parameters + self.moe_layers * (experts + router)


def model_seconds(model: Model, run: Run, phase: Phase, machine: Machine) -> Seconds:
    """A step of a whole model: all gradients that all ranks have are added up in one all-reduce."""
    layer = layer_seconds(model.moe, run, phase, machine)
    attention = 12 * model.layers * model.sequence * model.moe.dim
    others = run.tokens * (6 * model.other_parameters + attention) / machine.flops
    shared = model.other_parameters + model.moe_layers * shared_parameters(model.moe, run, phase)
    experts = reduce_experts(model.moe, run, phase, machine)
    return Seconds(
        compute=model.moe_layers * layer.compute + others,
        exchange=model.moe_layers * layer.exchange,
        gradients=all_reduce(shared * run.gradient_bytes, run.ranks, machine) + model.moe_layers * experts,
    )
