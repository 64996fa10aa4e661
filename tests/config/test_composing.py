"""What the tests compose in place of hydra is what hydra composes."""

from dataclasses import make_dataclass

import pytest
from fairseq import options
from fairseq.dataclass import utils
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from support import composing
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, flags
from support.tasks import dense

CHANGED = {"moe_spawn_update": "auto", "moe_expert_sizes": "1,2,3,4", "amp": True}


def arguments(**settings):
    return options.parse_args_and_arch(options.get_training_parser(), flags("a/b=c", **settings))


def composed(compose, args, monkeypatch):
    monkeypatch.setattr(utils, "compose", compose)
    return utils.convert_namespace_to_omegaconf(args)


@pytest.mark.parametrize(
    "settings",
    [LM, MASKED_LM, TRANSLATION, CLASSIFICATION, {**LM, **CHANGED}, dense(LM), dense(TRANSLATION)],
    ids=lambda settings: settings["arch"],
)
def test_it_is_what_hydra_composes(settings, monkeypatch):
    args = arguments(**settings)
    expected = composed(composing.compose_with_hydra, args, monkeypatch)
    for _ in range(2):  # from what is composed, and from what was
        found = composed(composing.compose, args, monkeypatch)
        assert found == expected and str(found) == str(expected)
        found.common.seed = 99


def test_what_hydra_refuses_is_refused(monkeypatch):
    args = arguments(**LM)
    args.ddp_backend = "none"
    with pytest.raises(HydraException, match="ddp_backend"):
        composed(composing.compose, args, monkeypatch)


def test_fields_that_are_added_later_are_there(monkeypatch):
    """As those of a router that is registered when a model has been composed."""
    composed(composing.compose, arguments(**LM), monkeypatch)
    store = ConfigStore.instance()
    entry = store.repo["model"]["evomoe_lm.yaml"]
    more = make_dataclass("More", [("added_later", int, 3)], bases=(OmegaConf.get_type(entry.node),))
    node = more()
    node._name = "evomoe_lm"
    try:
        store.store(name="evomoe_lm", group="model", node=node, provider="fairseq")
        assert composed(composing.compose, arguments(**LM), monkeypatch).model.added_later == 3
    finally:
        store.repo["model"]["evomoe_lm.yaml"] = entry
    assert "added_later" not in composed(composing.compose, arguments(**LM), monkeypatch).model
