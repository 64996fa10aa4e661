"""A router in somebody else's ``--user-dir``: one file, and everything knows it.

``tests/support/plugin_router`` is that folder; ``fairseq_evomoe/README.md`` shows it.
"""

from dataclasses import dataclass

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.options import like, option
from fairseq_evomoe.moe.routers import SwitchRouter, register_router
from support.cli import LM, MASKED_LM, TRANSLATION, build, call, call_hydra, evomoe, help_of, parameters, run
from support.evaluation import hypotheses, perplexity
from support.hydra import write_yaml
from support.plugin import PLUGIN, import_plugin, registered_for_a_while
from support.resume import check_resume
from support.router_checks import close, is_deterministic, make
from support.tasks import TASKS

ROUTER = {"user_dir": PLUGIN, "moe_router": "nearest", "moe_nearest_strength": 0.5, "moe_spread_weight": 0.1}
NO_GATE = {"moe_anneal_updates": None, "moe_hard_update": None}
PLUGIN_LM = {**LM, **NO_GATE, **ROUTER}


@pytest.fixture(scope="module", autouse=True)
def plugin():
    with registered_for_a_while():
        import_plugin()
        yield


@pytest.fixture(scope="module")
def trained(lm_data, tmp_path_factory):
    """A run that spawns and resumes bit for bit."""
    return check_resume(lm_data, tmp_path_factory.mktemp("plugin"), PLUGIN_LM, (3, 6, 9))


def test_it_trains_and_spawns_and_resumes(trained):
    steps = trained.log("train_inner")
    assert [step["moe_phase"] for step in steps] == [0] * 6 + [2] * 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(step["moe_experts"] == 1 for step in steps)
    assert len(trained.result.lines("spawned experts before update 6: 1 -> 4")) == 1
    state = torch.load(trained.last, weights_only=False)
    assert state["model"]["decoder.layers.1.moe.router.weight"].shape == (4, 32)
    options = state["cfg"]["model"]
    assert options["moe_nearest_strength"] == 0.5 and options["moe_spread_weight"] == 0.1


def test_a_new_process_needs_nothing_but_the_user_dir(trained, lm_data, tmp_path):
    """Which imports this package itself; it goes on from a checkpoint and ends where that run ended."""
    result = run(
        "fairseq-train", lm_data, save_dir=tmp_path, restore_file=trained.at(12), **PLUGIN_LM, cpu=True
    )
    assert [step["num_updates"] for step in result.log("train_inner")] == [13, 14]
    ours, theirs = parameters(tmp_path / "checkpoint_last.pt"), parameters(trained.last)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_loss_is_added_with_its_weight(lm_data):
    gradients = []
    for weight in (0.0, 1000.0):
        setup = build(lm_data, **{**PLUGIN_LM, "moe_spawn_update": 0, "moe_spread_weight": weight})
        loss, _, _ = setup.criterion(setup.model.train(), setup.batches()[0])
        loss.backward()
        gradients.append(setup.model.decoder.layers[1].moe.router.weight.grad)
    assert gradients[1].abs().sum() > 10 * gradients[0].abs().sum()


@pytest.mark.parametrize("settings", TASKS)
def test_help_has_its_options(settings):
    settings = {name: value for name, value in settings.items() if not name.startswith("moe_")}
    text = help_of("data", **{**settings, "user_dir": PLUGIN})
    assert "--moe-nearest-strength" in text and "Weight of the nearest expert's output. Default: 1.0." in text
    assert "--moe-spread-weight" in text and ",nearest}" in text


def test_a_masked_model_and_yaml(lm_data, tmp_path):
    """The same options in YAML make the same model as flags."""
    settings = {**MASKED_LM, **NO_GATE, **ROUTER, "max_update": 8}
    call("fairseq-train", lm_data, save_dir=tmp_path / "flags", **settings)
    write_yaml(tmp_path / "train.yaml", lm_data, {**settings, "save_dir": str(tmp_path / "yaml")})
    result = call_hydra(tmp_path / "train.yaml")
    assert len(result.lines("spawned experts")) == 1
    flags, yaml = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("flags", "yaml"))
    assert flags.keys() == yaml.keys() and all(torch.equal(flags[name], yaml[name]) for name in flags)


def test_a_translation_model_generates(translation_data, tmp_path):
    settings = {**TRANSLATION, **NO_GATE, **ROUTER, "max_update": 14}
    call("fairseq-train", translation_data, save_dir=tmp_path, **settings)
    options = {"user_dir": PLUGIN, "beam": 2, "max_len_b": 12, "num_workers": 0, "gen_subset": "valid"}
    options.update(path=tmp_path / "checkpoint_last.pt", required_batch_size_multiple=1)
    one, many = (
        hypotheses(call("fairseq-generate", translation_data, batch_size=size, **options).output)
        for size in (1, 16)
    )
    assert len(one) == 12 and any(one.values()) and one == many


def test_it_is_merged(trained, lm_data, tmp_path):
    """By the rules that stand in its file: a merged expert's vector is the mean of theirs."""
    merged = tmp_path / "merged.pt"
    evomoe("merge", trained.last, "--out", merged, "--experts", 2, "--user-dir", PLUGIN)
    name = "decoder.layers.1.moe.router.weight"
    before, after = (torch.load(path, weights_only=False)["model"][name] for path in (trained.last, merged))
    assert after.shape == (2, 32)
    assert torch.allclose(after.mean(0), before.mean(0), atol=1) and perplexity(
        lm_data, merged, user_dir=PLUGIN
    )


@pytest.mark.parametrize(
    "given, option, words",
    [
        ({"router": "nearest", "top_k": 2}, "top_k", "--moe-top-k 2 has no effect with --moe-router nearest"),
        ({"router": "switch", "nearest_strength": 1.0}, "nearest_strength", "the routers nearest."),
        ({"nearest_strength": 1.0}, "nearest_strength", "no effect with --moe-router dts"),
        ({"router": "nearest", "nearest_strength": 0.0}, "nearest_strength", "must be greater than 0"),
        ({"router": "nearest", "nearest_strength": "nan"}, "nearest_strength", "must be a finite number"),
        (
            {"router": "nearest", "spread_weight": -1},
            "spread_weight",
            "--moe-spread-weight must be at least 0",
        ),
        (
            {"router": "nearest", "mutual_distillation_weight": 0.1},
            "mutual_distillation_weight",
            "--moe-router nearest gives only one",
        ),
        ({"router": "nearst"}, "router", ", nearest, but is 'nearst'"),
    ],
    ids=str,
)
def test_its_options_are_checked_like_all_others(given, option, words):
    with pytest.raises(ConfigError) as refused:
        resolve(given, max_update=100)
    assert refused.value.option == option and words in str(refused.value)


def test_flags_are_refused_too(lm_data):
    with pytest.raises(ConfigError, match="--moe-top-k 2 has no effect with --moe-router nearest"):
        build(lm_data, **PLUGIN_LM, moe_top_k=2)
    with pytest.raises(ConfigError, match="--moe-nearest-strength 0.5 has no effect with --moe-router hash"):
        build(
            lm_data,
            **{**LM, **NO_GATE, "user_dir": PLUGIN, "moe_router": "hash", "moe_nearest_strength": 0.5},
        )


def test_the_router_itself():
    """Against its formula, and as every router: gradients, and nothing random but from the generator."""
    router = make("nearest", 4, 3, nearest_strength=0.5)
    x = torch.randn(7, 4, dtype=torch.float64)
    routing = router(x, RoutingContext())
    w = router.weight.detach().float()
    score = torch.sigmoid(x @ (w / w.norm(dim=1, keepdim=True)).t().double())
    assert torch.equal(routing.expert_N, score.argmax(1))
    assert close(routing.weight_N, 0.5 * score.max(1).values)
    assert is_deterministic("nearest", 4, 3)


def test_a_second_router_of_somebody_s(lm_data):
    """One more registration, with an option that other routers have and a default of its own."""

    @register_router("calm")
    class CalmRouter(SwitchRouter):
        @dataclass(frozen=True)
        class Options(SwitchRouter.Options):
            jitter: float = like(SwitchRouter.Options, "jitter", 0.0)
            calmness: float = option(0.5, "How calm it is.", at_least=0)

    moe = build(lm_data, **{**LM, **NO_GATE, "user_dir": PLUGIN, "moe_router": "calm", "moe_calmness": 0.75})
    options = moe.model.moe_config.router_options
    assert (options.calmness, options.jitter, options.balance_weight) == (0.75, 0.0, 0.01)
    build(lm_data, **PLUGIN_LM)  # the first one is still there
    text = help_of("data", user_dir=PLUGIN, arch=LM["arch"], task=LM["task"])
    assert "Default: 0.01 (switch), 0.0 (calm)." in text and "nearest,calm}" in text
    for settings in (MASKED_LM, TRANSLATION):
        text = help_of("data", **{**settings, "user_dir": PLUGIN})
        assert "--moe-calmness" in text
    assert "spawned. Default: 4." in text  # a translation model's own
