"""Somebody else's plugin, registered for a while: see ``plugin_router``."""

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.utils import import_user_module
from hydra.core.config_store import ConfigStore

from fairseq_evomoe.models.feed_forward import MoEModel
from fairseq_evomoe.moe import ROUTERS

PLUGIN = Path(__file__).parent / "plugin_router"


@contextlib.contextmanager
def registered_for_a_while():
    """Whatever routers are registered, afterwards the models have the options that they had."""
    routers = dict(ROUTERS)
    options = {
        name: MODEL_DATACLASS_REGISTRY[name]
        for name, model in MODEL_REGISTRY.items()
        if issubclass(model, MoEModel)
    }
    try:
        yield
    finally:
        ROUTERS.clear()
        ROUTERS.update(routers)
        for name, dataclass in options.items():
            MODEL_REGISTRY[name].__dataclass = dataclass
            MODEL_DATACLASS_REGISTRY[name] = dataclass
            node = dataclass()
            node._name = name
            ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq")


def import_plugin():
    """What ``--user-dir`` does, again if it was done before."""
    sys.modules.pop(PLUGIN.name, None)
    memo = getattr(import_user_module, "memo", None)
    if memo is not None:
        memo.discard(str(PLUGIN))
    import_user_module(Namespace(user_dir=str(PLUGIN)))
