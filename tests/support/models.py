"""Models with experts in all layers, and a batch with padding."""

from fairseq_evomoe.moe import ROUTERS
from support.cli import LM, MASKED_LM, TRANSLATION, build
from support.tasks import PLAIN


def make_model(request, settings, **options):
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    return build(data, **{**settings, **PLAIN, "moe_freq": 1, "dropout": 0.0, **options})


def padded_batch(setup):
    return max(setup.batches(), key=lambda batch: int(batch["net_input"]["src_tokens"].eq(1).sum()))


def layers(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".moe")}


def with_router(router):
    """Settings of a model that grows before its fourth update, with experts in all its layers."""
    base = MASKED_LM if ROUTERS[router].needs_whole_sequence else LM
    settings = {**base, "moe_router": router, "moe_freq": 1, "moe_spawn_update": 3, "moe_hard_update": None}
    return {**settings, "moe_stable_update": 5} if router == "stable" else settings
