"""fairseq's EMA of a model with experts (``models/ema/ema.py``): a copy of it, and float32 parameters."""

from typing import Any, Callable, Dict, Optional

from fairseq.models.ema.ema import EMA
from torch import Tensor

from ..checkpoints import whole as checkpoints
from ..evolution.plateau import Plateau
from ..models.feed_forward import moe_layers
from ..moe.multiplying import child_tensor
from ..patching import wrap
from .change import Change


def change(ema: EMA, changes: Dict[str, Change]) -> None:
    """Let experts change as those of the model do.

    Args:
        ema: fairseq's.
        changes: the change of each layer, by its name in the model.
    """
    layers = dict(moe_layers(ema.get_model()))
    for layer_name, (plan, carry_out) in changes.items():
        moe, prefix = layers[layer_name].moe, layer_name + ".moe."
        for name, _ in moe.experts.named_parameters(recurse=False):
            key = prefix + "experts." + name
            if key in ema.fp32_params:
                ema.fp32_params[key] = moe.gather_rows(name, ema.fp32_params[key])
        carry_out(moe)
        if not ema.fp32_params:
            continue
        own = plan.only(moe.experts.local)
        parameters, state = dict(moe.named_parameters()), moe.state_dict()
        for key in [key for key in ema.fp32_params if key.startswith(prefix)]:
            if key[len(prefix) :] not in state:
                del ema.fp32_params[key]
        for key, tensor in state.items():
            base = ema.fp32_params.get(prefix + key)
            module, _, name = key.partition(".")
            if not tensor.is_floating_point():
                tensor = tensor.clone()
            elif base is None or key not in parameters:
                tensor = tensor.float().clone()
            elif module == "experts" and "." not in name:
                tensor = own.weights(name, base)
            elif plan.offspring is not None and tensor.shape != base.shape:
                tensor = child_tensor(moe, plan, key, base, tensor.shape, gate=True)
            elif plan.offspring is None and module == "router":
                tensor = plan.per_expert(base, tensor.float())
            else:
                continue
            ema.fp32_params[prefix + key] = tensor


def copy_integers(ema: EMA) -> None:
    """Let fairseq's EMA copy the tensors that have no mean, such as a table of experts."""
    state = ema.get_model().state_dict()
    ema.skip_keys.update(key for key, tensor in state.items() if not tensor.is_floating_point())
    ema.skip_keys.update(Plateau.KEYS)


def keep_versions(ema: EMA) -> None:
    """Let a decoder's copy keep its version: without, fairseq takes it for old, and drops its last norm."""

    def restore(
        original: Callable[..., None], state_dict: Dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """``ema.py`` leaves versions out of what it puts together."""
        state = ema.get_model().state_dict()
        versions = {key: x for key, x in state.items() if key.endswith("version") and key not in state_dict}
        original({**state_dict, **versions}, *args, **kwargs)

    wrap(ema, "restore", restore)


def freeze(ema: EMA) -> None:
    """Let what a spawn makes in the copy be without gradient, as all of it is."""
    for _, layer in moe_layers(ema.get_model()):
        layer.moe.freeze("experts", "router", "shared", "hyper_adapter")


def fit_saved(ema: EMA) -> None:
    """Let it take of a checkpoint's float32 parameters, which ``trainer.py`` hands to it, what fits.

    They have all experts, of which this rank has some.  Those of one expert that was spawned when the
    checkpoint was loaded are the copy's own.
    """

    def build_fp32_params(
        original: Callable[..., None], state_dict: Optional[Dict[str, Tensor]] = None
    ) -> None:
        """See ``fit_saved``."""
        if state_dict is None:
            return original(None)
        own = ema.get_model().state_dict()
        saved = checkpoints.local_tensors(ema.get_model(), state_dict)
        other = {key for key, tensor in saved.items() if key in own and own[key].shape != tensor.shape}
        if other:  # one expert's, and there are more keys besides
            saved = {**own, **saved, **{key: own[key] for key in other}}
            ema.fp32_params = {}
        original(saved)

    wrap(ema, "build_fp32_params", build_fp32_params)
