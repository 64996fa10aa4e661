"""Carry an optimizer's statistics over to the parameters that new experts have.

fairseq keeps the statistics of a parameter in one of three places: in the torch optimizer, under the
parameter itself; under a float32 copy of it (``--fp16``, ``--bf16``); or as a stretch of one flat float32
tensor for all parameters (``--fp16`` without ``--fp16-no-flatten-grads``).  ``read`` and ``write`` hide
which.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.optim import FairseqOptimizer
from torch import Tensor

from .saved_optimizer import has_rows

Change = Callable[[Tensor], Tensor]


@dataclass
class ParameterState:
    """What an optimizer holds for one parameter.

    Attributes:
        statistics: the entries of the torch optimizer's state, such as Adam's ``exp_avg``.
        master: the float32 copy of the parameter, if there is one.
    """

    statistics: Dict[str, Any] = field(default_factory=dict)
    master: Optional[Tensor] = None

    def apply(self, weights: Change, statistics: Optional[Change]) -> "ParameterState":
        """The state of a parameter that was made from this one.

        Args:
            weights: what was done to the parameter.
            statistics: what to do to statistics that have a row for each row of the parameter; ``None``: the
                new parameter has none.
        """
        inherited = {}
        if statistics is not None:
            for name, value in self.statistics.items():
                inherited[name] = statistics(value) if has_rows(name, value) else value
        return ParameterState(inherited, None if self.master is None else weights(self.master))


def _masters(optimizer: FairseqOptimizer) -> Any:
    # fairseq/optim/fp16_optimizer.py: a list of tensors, or a dict from device to one flat tensor
    return getattr(optimizer, "fp32_params", None)


def _flat_slices(optimizer: FairseqOptimizer) -> Iterator[Tuple[Tensor, Tensor, slice]]:
    """Parameter, flat tensor and the stretch of it that belongs to the parameter."""
    offsets: Dict[Any, int] = {}
    for parameter in optimizer.fp16_params:
        device = parameter.device.index
        flat = _masters(optimizer)[device]
        start = offsets.get(device, 0)
        offsets[device] = start + parameter.numel()
        yield parameter, flat, slice(start, offsets[device])


def read(optimizer: FairseqOptimizer) -> Dict[Tensor, ParameterState]:
    """The state of each of the model's parameters."""
    masters, state = _masters(optimizer), optimizer.optimizer.state
    if masters is None:
        return {
            p: ParameterState(dict(state.get(p, {})))
            for group in optimizer.optimizer.param_groups
            for p in group["params"]
        }
    if not isinstance(masters, dict):
        return {
            p: ParameterState(dict(state.get(master, {})), master.detach().clone())
            for p, master in zip(optimizer.fp16_params, masters)
        }
    result = {}
    for parameter, flat, part in _flat_slices(optimizer):
        statistics = {
            name: value[part].view_as(parameter).clone()
            if torch.is_tensor(value) and value.shape == flat.shape
            else value
            for name, value in state.get(flat, {}).items()
        }
        master = flat.detach()[part].view_as(parameter).clone()
        result[parameter] = ParameterState(statistics, master)
    return result


@torch.no_grad()
def write(optimizer: FairseqOptimizer, states: Dict[Tensor, ParameterState]) -> None:
    """Give a newly built optimizer the states of its parameters.

    A parameter without a state, such as a new router's, starts with the optimizer's initial one; under
    a flat float32 tensor it starts with zeros and the update count of the others.
    """
    masters, state = _masters(optimizer), optimizer.optimizer.state
    if masters is None or not isinstance(masters, dict):
        pairs = optimizer.fp16_params if masters is not None else _parameters(optimizer)
        for parameter, holder in zip(pairs, pairs if masters is None else masters):
            found = states.get(parameter)
            if found is None:
                continue
            if found.statistics:
                state[holder] = found.statistics
            if found.master is not None:
                holder.copy_(found.master)
    else:
        for parameter, flat, part in _flat_slices(optimizer):
            found = states.get(parameter)
            if found is None:
                continue
            for name, value in found.statistics.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    whole = state[flat].setdefault(name, flat.new_zeros(flat.shape, dtype=value.dtype))
                    whole[part] = value.reshape(-1)
                else:
                    state[flat][name] = value
            if found.master is not None:
                flat[part] = found.master.reshape(-1)
    if masters is not None:
        optimizer._sync_fp32_params_to_fp16()


def _parameters(optimizer: FairseqOptimizer) -> List[Tensor]:
    return [p for group in optimizer.optimizer.param_groups for p in group["params"]]


def take_over_settings(old: FairseqOptimizer, new: FairseqOptimizer) -> None:
    """Give a rebuilt optimizer the learning rate, other group settings and loss scaler of the old one."""
    for old_group, new_group in zip(old.optimizer.param_groups, new.optimizer.param_groups):
        new_group.update({name: value for name, value in old_group.items() if name != "params"})
    for name in ("scaler", "_grad_scaler"):  # of --fp16, and of --amp, where ``scaler`` is a property of it
        if name in vars(old):
            setattr(new, name, getattr(old, name))


def repoint(scheduler: Any, old: FairseqOptimizer, new: FairseqOptimizer) -> None:
    """Let a learning-rate schedule, at its position, drive another optimizer."""
    for name, value in vars(scheduler).items():
        if value is old:
            setattr(scheduler, name, new)
        elif getattr(value, "optimizer", None) is old.optimizer:
            value.optimizer = new.optimizer  # reduce_lr_on_plateau wraps one of torch's schedulers


def gradients(optimizer: FairseqOptimizer) -> Iterator[Tuple[Tensor, Tensor]]:
    """Each of the model's parameters and the gradient that is clipped; those without one are left out."""
    masters = _masters(optimizer)
    if isinstance(masters, dict):
        for parameter, flat, part in _flat_slices(optimizer):
            if flat.grad is not None:
                yield parameter, flat.grad[part]
        return
    parameters = _parameters(optimizer) if masters is None else optimizer.fp16_params
    for parameter, holder in zip(parameters, parameters if masters is None else masters):
        if holder.grad is not None:
            yield parameter, holder.grad


def is_flat(optimizer: FairseqOptimizer) -> bool:
    """Whether the state is that of one flat tensor for all parameters."""
    return isinstance(_masters(optimizer), dict)


def in_order(optimizer: FairseqOptimizer) -> List[Tensor]:
    """The model's parameters in the order of the numbers that ``state_dict()`` has for them.

    With one flat tensor for all of them: in the order in which they lie in it.
    """
    masters = _masters(optimizer)
    if masters is None:
        return _parameters(optimizer)
    if isinstance(masters, dict):
        return [parameter for parameter, _, _ in _flat_slices(optimizer)]
    parameter_of = {id(master): p for master, p in zip(masters, optimizer.fp16_params)}
    return [parameter_of[id(master)] for master in _parameters(optimizer)]
