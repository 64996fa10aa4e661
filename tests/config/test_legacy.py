"""Configurations of old checkpoints, which have a value for every option, mean what they meant."""

import pytest

from fairseq_evomoe.config.config import GROUPS, declarations
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe.routers import ROUTERS

AUTO = {"gate_input": "auto", "renormalize": "auto", "balance_form": "auto"}
WEIGHTS = [name for name, declared in declarations().items() if declared[0].loss]
NEW = ("preset", "balance_choices", "activity_weight")

# the routers of 0.1 beside EvoMoE's
RIVALS = [
    "base",
    "comet",
    "dynmoe",
    "hash",
    "laplace",
    "recurrent",
    "soft",
    "stable",
    "switch",
    "top-p",
    "topk",
]


def old(router="dts", **changes):
    """The options that version 0.1 wrote: all, with weights that are None and three that are auto."""
    options = {}
    for cls in (*GROUPS.values(), *(router.Options for router in ROUTERS.values())):
        for name, declaration in cls.declared().items():
            options.setdefault(name, getattr(declaration.default, "value", declaration.default))
    options.update(dict.fromkeys(WEIGHTS), **AUTO, spawn_update=6, spawn_method="mask", router=router)
    options.update(penalty_weight=0.0, mutual_distillation_weight=0.0)
    for name in NEW:
        options.pop(name, None)
    return {**options, **changes}


@pytest.mark.parametrize(
    "changes, masked, expected",
    [
        ({}, False, ("table", "straight-through", "published", 0.0, 0.0)),
        ({"spawn_method": "split"}, False, ("hidden", "straight-through", "published", 0.0, 0.0)),
        ({"gate_input": "hidden"}, False, ("hidden", "straight-through", "published", 0.0, 0.0)),
        ({"renormalize": "never"}, False, ("table", "never", "published", 0.0, 0.0)),
        ({"balance_form": "normalized"}, False, ("table", "straight-through", "normalized", 0.0, 0.0)),
        ({"balance_weight": 0.2}, False, ("table", "straight-through", "published", 0.2, 0.0)),
        ({}, True, ("hidden", "straight-through", "normalized", 0.1, 0.03)),
        ({"spawn_method": "split"}, True, ("hidden", "straight-through", "normalized", 0.1, 0.03)),
        (
            {"entropy_weight": 0.0, "balance_weight": 0.2},
            True,
            ("hidden", "straight-through", "normalized", 0.2, 0.0),
        ),
        ({"balance_form": "published"}, True, ("hidden", "straight-through", "published", 0.1, 0.03)),
        ({"gate_input": "hidden"}, True, ("hidden", "straight-through", "published", 0.0, 0.0)),
        ({"gate_input": "table", "renormalize": "always"}, True, ("table", "always", "published", 0.0, 0.0)),
    ],
    ids=str,
)
def test_auto_is_what_it_was(changes, masked, expected):
    options = resolve(old(**changes), masked=masked, ffn_dims=[64]).router_options
    found = [options.gate_input, options.renormalize, options.balance_form]
    assert (*(x.value for x in found), options.balance_weight, options.entropy_weight) == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("router", RIVALS)
def test_rivals_are_what_they_were(router, masked):
    """As published, whatever auto was for EvoMoE's gate; options of other routers do not count."""
    config = resolve(old(router), masked=masked, max_update=100, ffn_dims=[40])
    options = {**config.router_arguments()}
    expected = {name: d.convert(d.default) for name, d in ROUTERS[router].Options.declared().items()}
    if router == "stable":
        expected["stable_update"] = 6 + 94 // 10
    assert options == expected and config.schedule.spawn_update == 6


def test_the_former_default_has_its_experts_from_the_start():
    config = resolve(old(spawn_update=0), max_update=1000)
    assert config.schedule.spawn_update == 0


def test_the_former_default_of_the_spawn_method_is_mask():
    options = old()
    del options["spawn_method"]  # sizes that are not equal would be sliced by now
    config = resolve({**options, "expert_sizes": "arithmetic", "spawn_update": 0}, ffn_dims=[64])
    assert config.spawning.spawn_method.value == "mask"


@pytest.mark.parametrize("value, means", [("6", 6), ("auto", "auto"), (6, 6)])
def test_the_spawn_update_was_a_word(value, means):
    assert resolve(old(spawn_update=value), max_update=100).schedule.spawn_update == means


def test_auto_can_be_given_by_hand():
    options = resolve({"gate_input": "auto"}).router_options
    assert options.gate_input.value == "table" and options.renormalize.value == "never"
    assert resolve({"router": "switch", "gate_input": "auto"}).router_options.gate_input.value == "hidden"
    assert (
        resolve({"preset": "evomoe_context", "gate_input": "auto"}).router_options.gate_input.value == "both"
    )
