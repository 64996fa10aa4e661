"""What a model's layers were seen to do with a sample of text: plain arrays, to be measured."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Text:
    """What one stack of layers has read, one sentence or block after the other, without padding.

    Attributes:
        symbols: entries of the dictionary.
        count_V: how often the dictionary says that each occurs in the training data; 0 if it does not.
        boundaries: entries that stand between sentences.
        token_T: index in the dictionary, int32.
        sequence_T: number of the sequence, ascending, int32.
        position_T: place in the sequence, from 0, int32.
    """

    symbols: Sequence[str]
    count_V: Array
    boundaries: Sequence[int]
    token_T: Array
    sequence_T: Array
    position_T: Array

    def __len__(self) -> int:
        return len(self.token_T)


@dataclass
class Choices:
    """Which experts the rows of a layer got: pairs in the order of the rows, a row's greatest weight first.

    Attributes:
        rows: T, how many were routed.
        experts: E.
        row_N: int32.
        expert_N: int32.
        share_N: float32, what a pair counts: 1, or where every row has all experts, its share in the output.
        weight_N: float32, factor of the expert's output.
    """

    rows: int
    experts: int
    row_N: Array
    expert_N: Array
    share_N: Array
    weight_N: Array

    @classmethod
    def of(cls, rows: int, experts: int, row_N: Array, expert_N: Array, weight_N: Array) -> "Choices":
        """From pairs in any order.  Where every row has all of several experts, what counts is the weight."""
        order_N = np.lexsort((-weight_N, row_N))
        row_N, expert_N = row_N[order_N].astype(np.int32), expert_N[order_N].astype(np.int32)
        weight_N = weight_N[order_N].astype(np.float32)
        if experts > 1 and len(row_N) == rows * experts:
            total_T = np.bincount(row_N, weight_N, rows)
            share_N = weight_N / np.maximum(total_T, 1e-30)[row_N]
        else:
            share_N = np.ones(len(row_N))
        return cls(rows, experts, row_N, expert_N, share_N.astype(np.float32), weight_N)

    @property
    def dense(self) -> bool:
        """Whether every row has all of several experts, so that there is no choice to count."""
        return self.experts > 1 and len(self.row_N) == self.rows * self.experts

    @property
    def load_E(self) -> Array:
        """What the pairs of each expert count: float64."""
        return np.bincount(self.expert_N, self.share_N.astype(np.float64), self.experts)

    @property
    def best_T(self) -> Array:
        """The expert with the greatest weight of each row; -1: it has none."""
        best_T = np.full(self.rows, -1, dtype=np.int32)
        first_N = np.ones(len(self.row_N), dtype=bool)
        first_N[1:] = self.row_N[1:] != self.row_N[:-1]
        best_T[self.row_N[first_N]] = self.expert_N[first_N]
        return best_T


@dataclass
class LayerSample:
    """What was seen of an MoE layer.

    Attributes:
        name: of fairseq's layer, such as ``decoder.layers.1``.
        side: name of its stack: ``encoder`` or ``decoder``.
        names: what each of the E experts is called: its number, or the kind of a free one.
        widths: hidden units of each; 0 for free ones.
        parameters: of each; 0 for free ones.
        parameters_of_all: of what every token uses beside: router without its tables, shared expert, ...
        heads: rows that each token becomes.
        choices: what its router chose; ``None`` before the spawn.
        soft: whether experts work on mixtures of tokens, and ``choices`` are their shares in the outputs.
        confidence_T: float32, the gate's greatest probability for each row; ``None``: it has none.
        gate_entropy: nats, mean over rows; ``None``: there is no gate with a distribution.
        dropped: pairs that a capacity left out.
        similarity_of_weights: cosine of each two experts' weights, (E, E) without free experts.
        similarity_of_outputs: mean cosine of their outputs for the same tokens.
        tensors: weights of the experts, by name.
    """

    name: str
    side: str
    names: List[str]
    widths: List[int]
    parameters: List[int]
    parameters_of_all: int
    heads: int = 1
    choices: Optional[Choices] = None
    soft: bool = False
    confidence_T: Optional[Array] = None
    gate_entropy: Optional[float] = None
    dropped: int = 0
    similarity_of_weights: Optional[Array] = None
    similarity_of_outputs: Optional[Array] = None
    tensors: Dict[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.names)

    def of_rows(self, value_T: Array) -> Array:
        """What holds for each token of the text, for each of the rows."""
        return value_T if self.heads == 1 else np.repeat(value_T, self.heads)


@dataclass
class Sample:
    """What was seen of a checkpoint.

    Attributes:
        path: of the checkpoint.
        update: number of updates that it has made.
        task: fairseq's.
        router: its name.
        options: what the model was made with, as in the checkpoint, fairseq's options too.
        texts: what each stack has read, by its name.
        layers: in the order of the model.
        parameters: of the model.
        domains: load of each layer's experts on known parts of the text, by name of the part and the layer.
    """

    path: str
    update: int
    task: str
    router: str
    options: Dict[str, Any]
    texts: Dict[str, Text]
    layers: List[LayerSample]
    parameters: int = 0
    domains: Dict[str, Dict[str, Array]] = field(default_factory=dict)
