"""Statistics that are summed up over the tokens of each update, in every process.

Suffixes: see ``routing.py``.
"""

from typing import TYPE_CHECKING, Any, Dict, Optional, Union

import torch
from torch import Tensor, nn

from .experts import Experts

if TYPE_CHECKING:
    from .plan import Spawner


class Collector(nn.Module):
    """Base of modules that keep statistics of training in buffers.

    A forward pass only adds to sums of its own process.  After each update, whoever drives the training
    adds up what ``take`` returns over all processes and hands the result to ``fold``; sums of a step that
    made no update are thrown away.  So the buffers are the same in every process, and a run that is resumed
    from them goes on as it would have.

    The module's own buffers stay in float32, whatever the model is converted to.
    """

    _sums_K: Optional[Tensor] = None

    def add(self, sums_K: Tensor) -> None:
        """Add sums over some tokens."""
        sums_K = sums_K.detach().float()
        self._sums_K = sums_K if self._sums_K is None else self._sums_K + sums_K

    def drain(self) -> Tensor:
        """The sums since the last call: float32, shape (K,); zeros if nothing was collected."""
        sums_K, self._sums_K = self._sums_K, None
        return self.no_sums() if sums_K is None else sums_K

    def no_sums(self) -> Tensor:
        """Zeros in the shape of the sums: float32, shape (K,)."""
        raise NotImplementedError

    def commit(self, sums_K: Tensor) -> None:
        """Take the sums of one update, over all processes, into the buffers."""
        raise NotImplementedError

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "Collector":
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class MeanExperts(Collector):
    """Base of what is adapted, after each update, to the mean number of experts that its tokens had."""

    def watch(self, pairs: int, tokens: int) -> None:
        """Count the active pairs of some tokens."""
        sums_K = self.no_sums()  # filled number by number, for which a GPU need not wait
        sums_K[0], sums_K[1] = pairs, tokens
        self.add(sums_K)

    def no_sums(self) -> Tensor:
        """See ``Collector``: the number of pairs and that of tokens."""
        return torch.zeros(2, device=next(self.buffers()).device)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an update without tokens changes nothing."""
        pairs, tokens = sums_K
        if tokens > 0:
            self.adapt(pairs / tokens)

    def adapt(self, mean: Tensor) -> None:
        """Change the buffers by the mean number of experts, a float32 scalar."""
        raise NotImplementedError


class Demand(Collector):
    """How much experts are in demand, by which they multiply: a running mean of their shares in a measure.

    The measure is counted in each update: the tokens of each expert, say.  The mean starts at 0 and is not
    corrected for it: only comparisons between experts make sense.

    Attributes:
        share_E: float32, the running mean.

    Args:
        experts: E.
    """

    DECAY = 0.99

    share_E: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("share_E", torch.zeros(experts))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the sums of the measure."""
        return torch.zeros_like(self.share_E)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an update without anything measured changes nothing."""
        total = sums_K.sum()
        if total > 0 and torch.isfinite(total):
            self.share_E.lerp_(sums_K / total, 1 - self.DECAY)


class Activity(Collector):
    """How active each hidden unit of a layer's single expert is: a running mean of ``|f(W1 x + b1)|``.

    It is measured on every 16th token, without gradient and without random numbers, which costs about 1% of
    the expert's own products.  The mean starts at 0 and is not corrected for it: only comparisons between
    units make sense.

    Attributes:
        magnitude_H: float32, the running mean.

    Args:
        units: H.
    """

    STRIDE = 16
    DECAY = 0.99

    magnitude_H: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        self.register_buffer("magnitude_H", torch.zeros(units))

    @property
    def measured(self) -> Tensor:
        """The running mean."""
        return self.magnitude_H

    @torch.no_grad()
    def watch(self, experts: Experts, x_TD: Tensor, first: int) -> None:
        """Measure the only expert's hidden units on tokens, the first of which has this number."""
        hidden_TH = experts.hidden.activation(torch.addmm(experts.b1, x_TD, experts.w1.t()))
        if experts.w3 is not None:
            hidden_TH = hidden_TH * (x_TD @ experts.w3.t())
        sum_H = hidden_TH.abs().sum(0, dtype=torch.float32)
        self.add(torch.cat([sum_H, sum_H.new_full((1,), x_TD.shape[0])]))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the H sums of magnitudes and the number of tokens."""
        return self.magnitude_H.new_zeros(len(self.magnitude_H) + 1)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``."""
        tokens = sums_K[-1]
        if tokens > 0:
            self.magnitude_H.lerp_(sums_K[:-1] / tokens, 1 - self.DECAY)


class Sample(Collector):
    """Some of the tokens that a layer's single expert has seen last, the same on all ranks.

    Of each update it keeps the first ``ROWS`` of every 16th token of all ranks.

    Attributes:
        row_SD: float32, the tokens, of which the oldest is replaced by the newest.
        seen: float32 scalar, how many there have been.

    Args:
        dim: D.
        size: S, how many are kept.
    """

    STRIDE = 16
    ROWS = 64

    row_SD: Tensor
    seen: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("row_SD", torch.zeros(size, dim))
        self.register_buffer("seen", torch.zeros(()))

    @property
    def measured(self) -> Tensor:
        """The tokens that there are."""
        return self.row_SD[: int(self.seen)]

    @torch.no_grad()
    def watch(self, experts: Experts, x_TD: Tensor, first: int) -> None:
        """Keep some of the tokens, the first of which has this number among those of all ranks."""
        x_TD = x_TD[: max(self.ROWS - first, 0)].float()
        sums = self.row_SD.new_zeros(self.ROWS, self.row_SD.shape[1] + 1)
        sums[first : first + len(x_TD), :-1] = x_TD
        sums[first : first + len(x_TD), -1] = 1
        self.add(sums.flatten())

    def no_sums(self) -> Tensor:
        """See ``Collector``: a row for each token that is kept, and whether there is one."""
        return self.row_SD.new_zeros(self.ROWS * (self.row_SD.shape[1] + 1))

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``."""
        sums = sums_K.view(self.ROWS, -1)
        sums = sums[sums[:, -1] > 0]  # a pass that was made twice counts twice
        place = (self.seen.long() + torch.arange(len(sums), device=sums.device)) % len(self.row_SD)
        self.row_SD[place] = sums[:, :-1] / sums[:, -1:]
        self.seen += len(sums)


def measured_of(state: Dict[str, Tensor], spawner: "Spawner") -> Optional[Tensor]:
    """What a state of ``Activity``, or of ``Sample``, has for a spawn; ``None``: nothing."""
    if not spawner.needs_sample:
        return state.get("magnitude_H")
    return state["row_SD"][: int(state["seen"])] if "row_SD" in state else None


def make_measure(spawner: "Spawner", experts: Experts) -> Union[Activity, Sample, None]:
    """What measures a single expert for a spawn; ``None``: that needs nothing.

    A sample has 32 tokens for each expert that there will be, and at least 512.
    """
    if spawner.needs_sample:
        return Sample(experts.dim, max(32 * spawner.experts, 512))
    return Activity(experts.widths[0]) if spawner.needs_activity else None
