"""Merge the experts of a fairseq checkpoint: model, configuration, optimizer and EMA.

How experts are merged is ``evolution/merge.py``.
"""

from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Optional, Set, Type

import torch
from torch import Tensor

from ..evolution import stages
from ..evolution.merge import Merge, MergeError, plan_merge, weight_similarity
from ..evolution.sizes import expert_widths, size_ratios
from ..moe.balancing import Balance
from ..moe.loading import STAGE
from ..moe.options import OptionError
from ..moe.routers import ROUTERS, Router
from .index import is_low_rank
from .saved_optimizer import LAYOUT, Layout, find_layout, replace_rows
from .saved_options import SavedOptions

_END = ".moe.experts.b2"


@dataclass
class Layer:
    """An MoE layer of a checkpoint.

    Attributes:
        name: of fairseq's layer, such as ``decoder.layers.1``.
        tensors: its tensors under the names that they have in ``MoELayer``.
        widths: hidden units of each expert.
    """

    name: str
    tensors: Dict[str, Tensor]
    widths: List[int]

    @property
    def alone(self) -> bool:
        """Whether there is one expert and no router, as before the spawn: a dense feed-forward network."""
        return len(self.widths) == 1 and not any(key.startswith("router.") for key in self.tensors)

    @property
    def expert_tensors(self) -> Dict[str, Tensor]:
        """``w1``, ``b1``, ``w2``, ``b2`` and perhaps ``w3``."""
        return {
            key[8:]: x
            for key, x in self.tensors.items()
            if key.startswith("experts.") and key.count(".") == 1
        }


@dataclass
class Observed:
    """What a layer's experts did with some data.

    Attributes:
        tokens: how many tokens the layer got.
        load_E: how many of them each expert got.
        similarity_EE: of their outputs on all the tokens; see ``merge.output_products``.
    """

    tokens: int
    load_E: Tensor
    similarity_EE: Tensor


@dataclass
class LayerMerge:
    """What is done to a layer.

    Attributes:
        layer: the layer.
        similarity_EE: of its experts.
        merge: what becomes of them; ``None``: they stay as they are.
    """

    layer: Layer
    similarity_EE: Tensor
    merge: Optional[Merge] = None


def moe_layers_of(state: Dict[str, Any], one_expert: bool = False) -> List[Layer]:
    """The MoE layers of a checkpoint.

    Args:
        state: the checkpoint.
        one_expert: whether there may be one, as before the spawn.

    Raises:
        MergeError: it is no checkpoint of a model with MoE layers, or its experts have not spawned yet.
    """
    model, options = state.get("model") or {}, SavedOptions(state)
    names = [key[: -len(_END)] for key in model if key.endswith(_END)]
    if not names or not options.found:
        if any(map(is_low_rank, model)):
            raise MergeError(
                "The checkpoint has low-rank experts beside the linear layers of a dense model, and no MoE "
                "layers: take them off with evomoe detach for the dense model."
            )
        raise MergeError("The file is no checkpoint of an EvoMoE model: it has no MoE layers.")
    layers = []
    for name in names:
        prefix = name + ".moe."
        tensors = {key[len(prefix) :]: x for key, x in model.items() if key.startswith(prefix)}
        experts, units = tensors["experts.b2"].shape[0], tensors["experts.w1"].shape[0]
        sizes = "uniform" if experts == 1 else options["expert_sizes"]
        layer = Layer(name, tensors, _widths(sizes, experts, units))
        if layer.alone and not one_expert:
            raise MergeError(
                f"The checkpoint has one expert in {name}, as before the spawn, so that there is nothing to "
                "merge: give one from after `spawn_update`."
            )
        layers.append(layer)
    return layers


def _widths(sizes: str, experts: int, units: int) -> List[int]:
    if sizes == "uniform":
        return [units // experts] * experts
    try:
        return expert_widths(size_ratios(sizes, experts), units)
    except ValueError as error:  # a router has changed their number
        raise MergeError(
            f"The checkpoint's `expert_sizes` {sizes} do not tell the widths of its {experts} experts: only "
            "those of equal widths can be merged after their number has changed."
        ) from error


def dense_width(layer: Layer, options: SavedOptions) -> int:
    """Hidden units of the dense feed-forward networks beside a layer."""
    side = "decoder" if "decoder" in layer.name.split(".") else "encoder"
    return int(options.of_model(side + "_ffn_embed_dim", layer.widths[0]))


def plan_checkpoint(
    layers: List[Layer],
    options: SavedOptions,
    experts: int,
    observed: Optional[Dict[str, Observed]] = None,
    align: bool = False,
) -> List[LayerMerge]:
    """Group the experts of each layer.

    Their similarity is that of their weights or, with data, the mean of that and the one of their outputs.

    Args:
        layers: those of a checkpoint.
        options: the model's options in it.
        experts: M.
        observed: what the layers did with data, by their names.
        align: see ``merge.plan_merge``.

    Raises:
        MergeError: a model whose experts cannot be merged, or not into so few.
    """
    check_merge(layers, options, experts, align)
    rules = _router_class(options).merge_rules
    plans = []
    for layer in layers:
        similarity_EE = weight_similarity(layer.expert_tensors, layer.widths, align)
        load_E = None
        if observed is not None:
            seen = observed[layer.name]
            similarity_EE, load_E = (similarity_EE + seen.similarity_EE) / 2, seen.load_E
        plan = LayerMerge(layer, similarity_EE)
        if len(layer.widths) > experts:
            plan.merge = plan_merge(
                layer.expert_tensors, layer.widths, similarity_EE, experts, load_E, align, rules
            )
            for key, tensor in layer.tensors.items():
                plan.merge.tensor(key, tensor)  # to find out before anything is changed
        plans.append(plan)
    return plans


def check_merge(layers: List[Layer], options: SavedOptions, experts: int, align: bool = False) -> None:
    """Refuse a merge that cannot be; see ``plan_checkpoint``.

    Raises:
        MergeError: it cannot.
    """
    _check_number(layers, options, experts)
    if align and any("experts.hidden.norm.weight" in layer.tensors for layer in layers):
        raise MergeError(
            "`align` would reorder hidden units, but scale_fc gives each a factor that all experts have in "
            "common: leave it out."
        )


def _router_class(options: SavedOptions) -> Type[Router]:
    """The class of the checkpoint's router.

    Raises:
        MergeError: it is not known, or its experts cannot be merged.
    """
    if options.router not in ROUTERS:
        raise MergeError(
            f"The checkpoint's `router` {options.router} is none of {', '.join(ROUTERS)}: give the folder of "
            "the plugin that registers it as `user_dir`."
        )
    cls = ROUTERS[options.router]
    if cls.merge_rules is None:
        raise MergeError(
            f"The experts of `router` {options.router} cannot be merged: merge checkpoints of other routers."
        )
    return cls


def _check_number(layers: List[Layer], options: SavedOptions, experts: int) -> None:
    """Refuse a number of experts that the checkpoint's model cannot have."""
    most = max(len(layer.widths) for layer in layers)
    if not 1 <= experts < most:
        raise MergeError(
            f"`experts` must be at least 1 and less than the checkpoint's {most} experts, but is {experts}."
        )
    router = _router_class(options)
    name = router.experts_per_token
    if name is not None and experts < options[name]:
        raise MergeError(
            f"The checkpoint's `{name}` sends each token to {options[name]} experts: `experts` must be at "
            f"least as many, but is {experts}."
        )
    free = sum(options[kind] for kind in ("zero_experts", "copy_experts", "constant_experts"))
    if free and options["balance"] != Balance.loss:
        raise MergeError(
            f"The bias of `balance` {options['balance'].value} counts `zero_experts`, `copy_experts` and "
            "`constant_experts` among the others, and is not merged then: merge checkpoints without them."
        )
    try:
        router_options = router.Options.given({name: options[name] for name in router.Options.declared()})
        refused = next(router_options.contradictions(experts), None)
    except OptionError as error:
        refused = error
    if refused is not None:
        raise MergeError(f"The merged model would be refused, with `experts` {experts}: {refused}")
    if experts > 1:
        return
    for text, found in (
        (f"`router` {options.router}", not router.unit_weight),
        ("`scaling_factor`", options["scaling_factor"] != 1),
        ("`shared_expert`", options["shared_expert"]),
        ("`hyper_adapter`", options["hyper_adapter"]),
        ("`output_masking`", options["output_masking"] > 0),
    ):
        if found:
            raise MergeError(
                f"A model with {text} is another one with a single expert: `experts` must be at least 2."
            )
    for layer in layers:
        width = dense_width(layer, options)
        if len(set(layer.widths)) == 1 and layer.widths[0] != width:
            raise MergeError(
                f"A single expert must be as wide as the model's other layers, but those of {layer.name} "
                f"have {layer.widths[0]} hidden units: `experts` must be at least 2."
            )


def merge_checkpoint(state: Dict[str, Any], plans: List[LayerMerge]) -> bool:
    """Merge a checkpoint's experts, in place: model, EMA, optimizer and configuration.

    The best validation loss so far, which is another model's, is forgotten.

    Returns:
        whether the optimizer's state is still there.  It is left out if it cannot be told which of its parts
        belongs to which parameter.

    Raises:
        MergeError: widths that no options describe.
    """
    experts = max(len(plan.merge.groups) for plan in plans if plan.merge is not None)
    options = SavedOptions(state)
    changed = new_options(options, plans, experts)
    layout = find_layout(state)
    kept = layout is not None and _merge_optimizer(state, layout, plans)
    extra = state.get("extra_state") or {}
    extra.pop("best", None)
    for tensors in (state["model"], extra.get("ema"), extra.get("ema_fp32_params")):
        if tensors is not None:
            _merge_tensors(tensors, plans)
    if layout is None:
        state.pop("last_optimizer_state", None)
        state.pop(LAYOUT, None)
    else:
        state[LAYOUT] = _merged_layout(layout, state["model"], plans).as_dict()
    options.change(changed)
    return kept


def _merge_optimizer(state: Dict[str, Any], layout: Layout, plans: List[LayerMerge]) -> bool:
    """Merge the optimizer's state in a checkpoint whose model is not merged yet, if it has one."""
    if state.get("last_optimizer_state") is None:
        return False
    merged = _merged_keys(layout.keys, plans)

    def change(key: str, rows: Tensor) -> Tensor:
        return _new_tensor(key, rows, merged[key]) if key in merged else rows

    state["last_optimizer_state"] = replace_rows(
        state["last_optimizer_state"], layout, state["model"], change, _dropped_keys(layout.keys, plans)
    )
    return True


def _merged_layout(layout: Layout, model: Dict[str, Tensor], plans: List[LayerMerge]) -> Layout:
    """What a layout becomes once the model's tensors are merged."""
    dropped = _dropped_keys(layout.keys, plans)
    sizes = {key: size for key, size in zip(layout.keys, layout.sizes) if key not in dropped}
    sizes.update({key: model[key].numel() for key in sizes if key in model})
    return Layout(list(sizes), list(sizes.values()), layout.flat)


def _merge_tensors(tensors: Dict[str, Tensor], plans: List[LayerMerge]) -> None:
    for key in _dropped_keys(tensors, plans):
        del tensors[key]
    for key, plan in _merged_keys(tensors, plans).items():
        tensors[key] = _new_tensor(key, tensors[key], plan)


def _dropped_keys(keys: Collection[str], plans: List[LayerMerge]) -> Set[str]:
    """The keys of what is needed no more: a single expert has no router, and merged ones have no stages."""
    alone = tuple(
        f"{plan.layer.name}.moe.router."
        for plan in plans
        if plan.merge is not None and len(plan.merge.groups) == 1
    )
    counters = {f"{plan.layer.name}.moe.{STAGE}" for plan in plans}
    return {key for key in keys if key.startswith(alone) or key in counters}


def _merged_keys(keys: Collection[str], plans: List[LayerMerge]) -> Dict[str, LayerMerge]:
    """The keys of the tensors that belong to merged layers, and what is done to them."""
    found = {}
    for plan in plans:
        prefix = plan.layer.name + ".moe."
        if plan.merge is not None:
            found.update({key: plan for key in keys if key.startswith(prefix)})
        else:
            found.update({key: plan for key in keys if key == prefix + "router.origin_E"})
    return found


def _new_tensor(key: str, old: Tensor, plan: LayerMerge) -> Tensor:
    """A tensor of a merged layer, or a statistic with a row for each of its rows."""
    if plan.merge is None:  # dynmoe's numbers of the first experts, of which there are fewer now
        return torch.arange(len(old)).to(old)
    return plan.merge.tensor(key[len(plan.layer.name + ".moe.") :], old)


def new_options(options: SavedOptions, plans: List[LayerMerge], experts: int) -> Dict[str, Any]:
    """The options of the merged model that are others than before, by name without ``moe_``.

    Raises:
        MergeError: experts whose widths in one layer are not those in another, so that no options do.
    """
    changed: Dict[str, Any] = {"experts": experts}
    if stages.is_list(options["spawn_update"]):  # the spawn that made the experts was the last
        done = int(plans[0].layer.tensors.get(STAGE, 0))
        update = stages.read(options["spawn_update"], experts)[done - 1].update
        changed["spawn_update"] = stages.BY_ITSELF if update is None else update
    sizes, split = options["expert_sizes"], options["spawn_method"] == "split"
    if split:  # which would divide the base's hidden units among fewer
        changed.update(spawn_method="slice", spawn_strength=None)
    if sizes == "uniform" and not split and options["total_ffn_dim"] is None:
        return changed
    widths = {tuple(plan.merge.widths) for plan in plans if plan.merge is not None}
    if len(widths) > 1:
        raise MergeError(
            "The experts' widths would be {} in different layers, which `expert_sizes` and `total_ffn_dim`, "
            "that hold for all, cannot describe: train with the same widths in all layers.".format(
                " and ".join(map(str, sorted(map(list, widths))))
            )
        )
    of_each = widths.pop()
    changed["total_ffn_dim"] = str(sum(of_each))
    if len(set(of_each)) > 1:
        changed["expert_sizes"] = ",".join(map(str, of_each))
    elif sizes != "uniform":
        changed["expert_sizes"] = "uniform"
    return changed
