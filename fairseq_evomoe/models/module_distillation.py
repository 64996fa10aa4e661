"""The models of m2mKD (arXiv 2402.16918): a teacher, a meta model, and a student's modules in its place.

A module is the layers of the student up to and with an MoE layer; the teacher's layers are as many modules.
The meta model has the teacher's sizes and one layer for each of them.  Module i is learnt where layer i of
the trained meta model is, between the others, which stay as they are.
"""

import copy
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from ..evolution.module_distillation import (
    DistillationOptions,
    DistillationPhase,
    cost,
    split_at,
    split_evenly,
)
from ..moe import MoELayer

PHASE = "phase"
"""Key of the phase in the state of a model that still has its meta model."""


class Kind(NamedTuple):
    """Where a kind of model has its one stack of layers.

    Attributes:
        path: names of the modules on the way to the stack.
        layers: the option that says how many layers there are.
        dense: fairseq's own model of the kind.
        returns_tuple: whether a layer returns a tuple of which its output is the first.
    """

    path: Tuple[str, ...]
    layers: str
    dense: str
    returns_tuple: bool


KINDS = {
    TransformerLanguageModel: Kind(("decoder",), "decoder_layers", "transformer_lm", True),
    RobertaModel: Kind(("encoder", "sentence_encoder"), "encoder_layers", "roberta", False),
}
"""By the class of fairseq's that a model of ours extends; with two stacks there is no one place."""


class Outputs(NamedTuple):
    """What comes out where one module is learnt.

    Attributes:
        student: what the meta model with the student's module returns, as a model of fairseq's does.
        teacher: logits of the meta model with the teacher's module; ``None`` in evaluation.
    """

    student: Any
    teacher: Optional[Tensor]


class Stitch(nn.Module):
    """What takes tokens from the width of one model to that of another, in place of a layer.

    Args:
        dim: width of the input.
        out_dim: width of the output.
        returns_tuple: see ``Kind``.
    """

    def __init__(self, dim: int, out_dim: int, returns_tuple: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.returns_tuple = returns_tuple

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """As a layer of fairseq's: x is (seq, batch, dim)."""
        y = self.linear(self.norm(x))
        return (y, None, None) if self.returns_tuple else y


class ModuleDistillation(nn.Module):
    """What a student has besides its own parameters until its modules have learnt.

    Attributes:
        meta: the meta model.
        stitches: of each module, one before and one after it; empty if the widths are equal.
        phase: what is trained.
        alpha: weight of the divergence from the teacher's module.
        temperature: see ``divergence``.

    Args:
        student: the model whose child this becomes.
        teacher: the teacher; its parameters are no part of the state.
        meta: the meta model, drawn.
        kind: of all three.
        options: how modules learn.
    """

    _student: Any
    _teacher: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        meta: nn.Module,
        kind: Kind,
        options: DistillationOptions,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.meta = meta
        self.alpha, self.temperature = options.module_alpha, options.module_temperature
        self.phase = DistillationPhase.META
        stack = stack_of(student, kind)
        width, own = stack_of(meta, kind).layers[0].embed_dim, stack.layers[0].embed_dim
        pairs = len(modules_of(student, kind)) if width != own else 0
        self.stitches = nn.ModuleList(
            nn.ModuleList([Stitch(a, b, kind.returns_tuple) for a, b in ((width, own), (own, width))])
            for _ in range(pairs)
        )
        # no children and not in the state: the one is the parent, the other has a checkpoint of its own
        vars(self).update(_student=student, _teacher=teacher)
        self._trained = {name for name, p in student.named_parameters() if p.requires_grad}
        teacher.requires_grad_(False)
        # routers that ask for tokens or their embeddings get those of the student
        stack_of(meta, kind).embed_tokens.register_forward_hook(_LookUp(stack.embed_tokens))

    @property
    def modules_to_learn(self) -> List[List[nn.Module]]:
        """The student's modules."""
        return modules_of(self._student, self.kind)

    @property
    def learning(self) -> bool:
        """Whether modules are being learnt."""
        return self.phase == DistillationPhase.MODULES

    def enter(self, phase: DistillationPhase) -> None:
        """Let a phase begin: its parameters, and no others, are trained."""
        self.phase = phase
        self._student.requires_grad_(False)
        for name, parameter in self._student.named_parameters():
            within = phase == DistillationPhase.STUDENT or (self.learning and _is_inside(name))
            parameter.requires_grad_(within and name in self._trained)
        self.meta.requires_grad_(phase == DistillationPhase.META)
        self.stitches.requires_grad_(self.learning)

    @torch.no_grad()
    def give_outside(self) -> Tuple[int, int]:
        """Give the student what is around the meta model's layers, where it has the same: embeddings, output.

        Returns:
            how many tensors it has got, and how many it has.
        """
        own = {name: p for name, p in self._student.named_parameters() if not _is_inside(name)}
        own = {name: p for name, p in own.items() if not name.startswith("distillation.")}
        found = dict(self.meta.named_parameters())
        given = [
            (p, found[name]) for name, p in own.items() if name in found and found[name].shape == p.shape
        ]
        for parameter, learnt in given:
            parameter.copy_(learnt)
        return len(given), len(own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the meta model returns, or while modules learn, the ``Outputs`` of each place."""
        if not self.learning:
            return self.meta(*args, **kwargs)
        layers, teacher = self._layers(self.meta), self._modules_of_teacher()
        found = []
        for i, module in enumerate(self.modules_to_learn):
            pairs: Any = self.stitches
            stitched = [pairs[i][0], *module, pairs[i][1]] if pairs else module
            student = self._at(layers, i, stitched)(*args, **kwargs)
            logits = None
            if self.training:
                with torch.no_grad():
                    logits = self._at(layers, i, teacher[i])(*args, **kwargs)[0]
            found.append(Outputs(student, logits))
        return found

    def _layers(self, model: nn.Module) -> List[nn.Module]:
        return list(stack_of(model, self.kind).layers.children())

    def _modules_of_teacher(self) -> List[List[nn.Module]]:
        return split_evenly(self._layers(self._teacher), len(self._layers(self.meta)))

    def _at(self, layers: List[nn.Module], place: int, module: Sequence[nn.Module]) -> nn.Module:
        """The meta model with a module in the place of one of its layers."""
        return with_layers(self.meta, self.kind.path, [*layers[:place], *module, *layers[place + 1 :]])

    def cost(self) -> float:
        """Cost of an update, in parameters of a model that is trained, without the routed experts."""
        layers, teacher = self._layers(self.meta), self._modules_of_teacher()
        meta = [_count([layer]) for layer in layers]
        stitches = [_count(pair) for pair in self.stitches] or [0] * len(layers)
        student = [_count(m) - _routed(m) + s for m, s in zip(self.modules_to_learn, stitches)]
        rest = _count([self.meta]) - sum(meta)
        return cost(meta, [_count(module) for module in teacher], student, rest)[int(self.learning)]

    def train(self, mode: bool = True) -> "ModuleDistillation":
        """See ``torch.nn.Module``; what is not trained has no dropout."""
        super().train(mode)
        self._teacher.eval()
        if self.learning:
            self.meta.eval()
        return self

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "ModuleDistillation":
        self._teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PHASE] = torch.tensor(int(self.phase))

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        self.enter(DistillationPhase(int(state_dict.pop(prefix + PHASE))))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _LookUp:
    """A forward hook by which embeddings look up what others do, for the sake of their own hooks."""

    def __init__(self, embeddings: nn.Module) -> None:
        self.embeddings = embeddings

    @torch.no_grad()
    def __call__(self, _: nn.Module, inputs: Sequence[Tensor], __: Tensor) -> None:
        self.embeddings(inputs[0])


def fit(student: Any, state_dict: Dict[str, Any], prefix: str) -> None:
    """Let a student have a meta model if the state has one, and whoever trains the student has made one.

    Args:
        student: the model that is to load the state.
        state_dict: the state, and perhaps others; what the student has no use for is taken out.
        prefix: of the student's keys.
    """
    prefix += "distillation."
    if prefix + PHASE not in state_dict and student.distillation is not None:
        student.distillation.enter(DistillationPhase.STUDENT)
        student.distillation = None
    if student.distillation is None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def kind_of(model: nn.Module) -> Optional[Kind]:
    """Where a model has its one stack; ``None``: it has none, or several."""
    return next((kind for base, kind in KINDS.items() if isinstance(model, base)), None)


def stack_of(model: Any, kind: Kind) -> Any:
    """The stack of a model of fairseq's."""
    for name in kind.path:
        model = getattr(model, name)
    return model


def modules_of(student: nn.Module, kind: Kind) -> List[List[nn.Module]]:
    """The layers of a model as modules, each up to and with an MoE layer; the last takes what is left."""
    layers = list(stack_of(student, kind).layers.children())
    return split_at(layers, [i for i, layer in enumerate(layers) if hasattr(layer, "moe")])


def with_layers(model: nn.Module, path: Sequence[str], layers: Sequence[nn.Module]) -> nn.Module:
    """A model that shares all of its parts with another one, but for the layers of its stack."""
    made = copy.copy(model)
    vars(made)["_modules"] = modules = dict(model._modules)
    if path:
        modules[path[0]] = with_layers(modules[path[0]], path[1:], layers)  # type: ignore[arg-type]
    else:
        modules["layers"] = nn.ModuleList(layers)
    return made


def _is_inside(name: str) -> bool:
    return ".layers." in name


def _count(modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _routed(layers: Sequence[nn.Module]) -> int:
    found: Iterator[nn.Module] = (module for layer in layers for module in layer.modules())
    moe = [module for module in found if isinstance(module, MoELayer)]
    return sum(each.experts.parameters_of_each()[e] for each in moe for e in each.experts.local)
