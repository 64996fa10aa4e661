"""Feed-forward experts of any widths, stored together: the one place that knows where whose rows are."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

BIASES = ("b1", "b2")
"""The tensors of ``Experts`` that are zero where there are no biases."""

ROWS_BY_EXPERT = "b2"
"""The tensor of ``Experts`` with one row for each expert; the others have one for each hidden unit."""

_OF_DENSE = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
_DENSE_OF = {name: dense for dense, name in _OF_DENSE.items()}


class Hidden(nn.Module):
    """What happens between the two products of an expert, on rows of its hidden units.

    Args:
        activation: the activation function.
        dropout: a dropout module with a probability ``p``, if any.
        norm: a normalisation, shared by the experts, if any.
    """

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: Optional[nn.Module] = None,
        norm: Optional[nn.Module] = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.norm = norm

    @property
    def only_activation(self) -> bool:
        """Whether the activation function is all that happens now."""
        dropout = self.dropout
        idle = dropout is None or dropout.p == 0 or not dropout.training
        return self.norm is None and idle and not getattr(dropout, "apply_during_inference", False)

    def forward(self, x: Tensor, factor: Optional[Tensor] = None) -> Tensor:
        """Apply activation, multiplication by ``factor`` if given, dropout and normalisation."""
        x = self.activation(x)
        x = x if factor is None else x * factor
        x = x if self.dropout is None else self.dropout(x)
        return x if self.norm is None else self.norm(x)


class Experts(nn.Module):
    """E feed-forward networks ``W2_e f(W1_e x + b1_e) + b2_e``, their hidden units laid end to end.

    Gated ones, such as SwiGLU (arXiv 2002.05202), are ``W2_e (f(W1_e x + b1_e) * W3_e x) + b2_e``.  Experts
    without biases have zeros in their place, which nothing adds and nothing trains, so that states have the
    same tensors.

    Expert ``e`` owns rows ``sum(widths[:e]) .. sum(widths[:e+1])`` of ``w1``, ``b1`` and ``w2`` and row
    ``e`` of ``b2``, so experts of any widths lie in four tensors and one expert is a dense FFN:
    ``w1 = fc1.weight``, ``b1 = fc1.bias``, ``w2 = fc2.weight.T``, ``b2 = fc2.bias``.

    With expert parallelism a rank has the rows of some experts only, and everything that computes takes them
    for all there are, numbered from 0.

    Attributes:
        widths: hidden units of each expert, on whatever rank it is.
        local: numbers of the experts that are here, ascending; all without expert parallelism.
        local_widths: hidden units of those; H is their sum.
        sharded: whether other ranks have other experts.
        w1: (H, D).  b1: (H,).  w2: (H, D).  b2: (E, D).  w3: (H, D), or ``None`` if not gated.

    Args:
        dim: D, width of a token.
        widths: hidden units of each expert.
        hidden: what happens between the two products; ReLU if not given.
        gated: whether there is a third matrix.
        bias: whether there are biases.
    """

    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    w3: Optional[nn.Parameter]

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        hidden: Optional[Hidden] = None,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.gated = gated
        self.bias = bias
        self.hidden = Hidden() if hidden is None else hidden
        self.widths: List[int] = []
        self.allocate(widths)

    def allocate(self, widths: Sequence[int], local: Optional[Sequence[int]] = None) -> None:
        """Make room for experts of these widths.  The contents are undefined until they are filled.

        Args:
            widths: hidden units of each expert.
            local: numbers of those that shall be here, ascending, if other ranks have others.
        """
        self.widths = list(widths)
        self.sharded = local is not None
        self.local = list(range(len(widths)) if local is None else local)
        self.local_widths = [self.widths[e] for e in self.local]
        total = sum(self.local_widths)
        shapes: Dict[str, Tuple[int, ...]] = {
            "w1": (total, self.dim),
            "b1": (total,),
            "w2": (total, self.dim),
            "b2": (len(self.local), self.dim),
        }
        if self.gated:
            shapes["w3"] = (total, self.dim)
        else:
            self.w3 = None
        for name, shape in shapes.items():
            old = self._parameters.get(name)
            new = nn.Parameter(torch.empty(shape) if old is None else old.new_empty(shape))
            if not self.bias and name in BIASES:
                new.requires_grad_(False).zero_()
            if old is not None:
                take_settings(new, old)
                new.__dict__.pop("expert", None)
            if self.sharded:
                new.expert = True  # type: ignore[attr-defined]  # tells fairseq that other ranks have others
            self.register_parameter(name, new)

    @property
    def biases(self) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """``b1`` and ``b2``, or what stands for them in a product without a bias."""
        return (self.b1, self.b2) if self.bias else (None, None)

    def tensors(self) -> Dict[str, Tensor]:
        """The tensors of the experts that are here, by name, without gradient; not copied."""
        return {name: p.detach() for name, p in self.named_parameters(recurse=False)}

    @torch.no_grad()
    def fill(self, tensors: Dict[str, Tensor]) -> None:
        """Copy tensors of the experts that are here, by name, of any dtype and device."""
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)

    def rows_of(self, index: int) -> slice:
        """The rows of ``w1``, ``b1``, ``w2`` and ``w3`` that belong to one of the experts that are here."""
        start = sum(self.local_widths[:index])
        return slice(start, start + self.local_widths[index])

    @torch.no_grad()
    def set_expert(self, index: int, fc1: nn.Linear, fc2: nn.Linear, fc3: Optional[nn.Linear] = None) -> None:
        """Copy a dense FFN, given as its linear layers, into expert ``index``; biases if it has any."""
        rows = self.rows_of(index)
        self.w1[rows] = fc1.weight
        self.w2[rows] = fc2.weight.t()
        if self.bias:
            self.b1[rows] = fc1.bias
            self.b2[index] = fc2.bias
        if self.w3 is not None and fc3 is not None:
            self.w3[rows] = fc3.weight

    def initialize(self, index: int) -> None:
        """Give expert ``index`` the initial weights of ``nn.Linear``, from the default generator."""
        dim, width = self.dim, self.local_widths[index]
        fc1, fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
        self.set_expert(index, fc1, fc2, nn.Linear(dim, width, bias=False) if self.gated else None)

    def parameters_of_each(self, widths: Optional[Sequence[int]] = None) -> List[int]:
        """Number of parameters of each expert, on whatever rank it is, or of one of each width given."""
        matrices, bias = 3 if self.gated else 2, int(self.bias)
        widths = self.widths if widths is None else widths
        return [width * (matrices * self.dim + bias) + self.dim * bias for width in widths]

    def forward(self, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply each expert to its own rows.

        Args:
            x_ND: rows sorted by expert, shape (N, D).
            counts: rows of each expert; they sum to N.

        Returns:
            shape (N, D).
        """
        if len(self.local) == 1:
            return self._expert(x_ND, self.w1, self.b1, self.w2, self.b2[0], self.w3)
        no_w3: Sequence[Optional[Tensor]] = [None] * len(self.local)
        parts = zip(
            x_ND.split(list(counts)),
            self.w1.split(self.local_widths),
            self.b1.split(self.local_widths),
            self.w2.split(self.local_widths),
            self.b2.unbind(0),
            no_w3 if self.w3 is None else self.w3.split(self.local_widths),
        )
        return torch.cat([x_ND[:0]] + [self._expert(*part) for part in parts])

    def _expert(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Optional[Tensor]
    ) -> Tensor:
        factor = None if w3 is None else x @ w3.t()
        if not self.bias:
            return self.hidden(x @ w1.t(), factor) @ w2
        return torch.addmm(b2, self.hidden(torch.addmm(b1, x, w1.t()), factor), w2)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        more = f", local={self.local}" * self.sharded + ", bias=False" * (not self.bias)
        return f"dim={self.dim}, widths={self.widths}{more}"


def rows_per_expert(name: str, widths: Sequence[int]) -> List[int]:
    """Number of rows that each expert has in a tensor of ``Experts``.

    Args:
        name: ``w1``, ``b1``, ``w2``, ``b2`` or ``w3``.
        widths: hidden units of each expert.
    """
    return [1] * len(widths) if name == ROWS_BY_EXPERT else list(widths)


def from_dense(name: str, tensor: Tensor) -> Tuple[str, Tensor]:
    """Name and value that a tensor of a dense feed-forward network has as the only one of ``Experts``.

    Args:
        name: ``fc1.weight``, ``fc1.bias``, ``fc2.weight`` or ``fc2.bias``.
        tensor: of ``nn.Linear``.
    """
    name = _OF_DENSE[name]
    if name == "w2":
        tensor = tensor.t().contiguous()
    return name, tensor.unsqueeze(0) if name == ROWS_BY_EXPERT else tensor


def to_dense(name: str, tensor: Tensor) -> Tuple[str, Tensor]:
    """Name and value that a tensor of a single expert has in a dense feed-forward network.

    The inverse of ``from_dense``.

    Args:
        name: ``w1``, ``b1``, ``w2`` or ``b2``; there is no ``w3`` in such a network.
        tensor: of ``Experts`` with one expert.
    """
    if name == "w2":
        tensor = tensor.t().contiguous()
    return _DENSE_OF[name], tensor.squeeze(0) if name == ROWS_BY_EXPERT else tensor


def take_settings(new: nn.Parameter, old: nn.Parameter) -> None:
    """Let a parameter that replaces another have what others have noted on it: its group, its overrides."""
    new.requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
