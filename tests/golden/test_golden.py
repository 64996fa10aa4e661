"""What must not change while the package is rearranged: see ``make.py`` and ``support/golden.py``.

Checkpoints of version 0.1 load by their own configuration and say the same.  Trained on with all options
given, their next update is the same: bit for bit on a machine like that of the data, and nearly elsewhere.
"""

import importlib

import pytest
import torch

from support import golden

EXPECTED = golden.load_json("expected.json.xz")
EXACT = EXPECTED["platform"] == golden.platform_of()
FLAGS, KEYS = golden.load_json("flags.json"), golden.load_json("state_keys.json")

# What README.md and examples/ import, and where tests and users of the library may have found it.
IMPORTS = [
    "fairseq_evomoe.__version__",
    "fairseq_evomoe.evolution.schedule.Schedule",
    "fairseq_evomoe.evolution.spawn.Spawn",
    "fairseq_evomoe.evolution.spawn.SpawnMethod",
    "fairseq_evomoe.models.feed_forward.moe_layers",
    "fairseq_evomoe.moe.Experts",
    "fairseq_evomoe.moe.Hidden",
    "fairseq_evomoe.moe.MoELayer",
    "fairseq_evomoe.moe.ROUTERS",
    "fairseq_evomoe.moe.Router",
    "fairseq_evomoe.moe.Routing",
    "fairseq_evomoe.moe.RoutingContext",
    "fairseq_evomoe.moe.Vocabulary",
    "fairseq_evomoe.moe.dispatch.dispatch",
    "fairseq_evomoe.moe.memory.release",
    "fairseq_evomoe.moe.ranks.Ranks",
    "fairseq_evomoe.moe.routers.DenseToSparseRouter",
    "fairseq_evomoe.moe.routers.ROUTERS",
    "fairseq_evomoe.moe.routers.Router",
    "fairseq_evomoe.moe.routers.dts.DenseToSparseRouter",
    "fairseq_evomoe.moe.routers.router.GateInput",
    "fairseq_evomoe.moe.routers.router.LinearRouter",
    "fairseq_evomoe.moe.routers.router.Renormalize",
    "fairseq_evomoe.moe.routers.router.Router",
    "fairseq_evomoe.moe.routers.stable.StableRouter",
    "fairseq_evomoe.moe.routing.Routing",
    "fairseq_evomoe.moe.routing.RoutingContext",
    "fairseq_evomoe.moe.routing.Vocabulary",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the data and of all checkpoints."""
    path = tmp_path_factory.mktemp("golden")
    golden.prepare(path)
    for name in golden.CASES:
        assert golden.unpack_checkpoint(name, path).exists()
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """A sum has the same order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_cases_were_made():
    assert EXPECTED["cases"].keys() == golden.CASES.keys()


@pytest.mark.parametrize("name", golden.CASES)
def test_a_checkpoint_says_the_same_by_its_own_configuration(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected, found = EXPECTED["cases"][name]["evaluation"], golden.evaluate(folder / (name + ".pt"))
    if EXACT:
        assert found == expected
    assert found["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert found["best"] == expected["best"]


# fairseq takes a second to understand a command line: not for each of them
@pytest.mark.parametrize("name", ["auto", "sharded", "translation"])
def test_console_commands_print_the_same(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected, found = EXPECTED["cases"][name]["printed"], golden.printed(folder / (name + ".pt"))
    if name == "translation":
        assert {n: h for n, (h, _) in found.items()} == {n: h for n, (h, _) in expected.items()}
        found, expected = ({n: score for n, (_, score) in each.items()} for each in (found, expected))
    assert found == pytest.approx(expected, abs=0 if EXACT else 0.011)


@pytest.mark.parametrize(
    "name, ranks", [(name, ranks) for name, case in golden.CASES.items() for ranks in case.resumed_by]
)
def test_a_checkpoint_is_trained_on_as_before(name, ranks, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    case, expected = golden.CASES[name], EXPECTED["cases"][name]["after{}".format(ranks)]
    check_digest(golden.resume(case, folder / (name + ".pt"), ranks, tmp_path), expected, case.tolerance)


def check_digest(state, expected, tolerance):
    """A state is what was written down of it."""
    found = golden.digest(state)
    assert found.keys() == expected.keys()
    assert {n: each[1] for n, each in found.items()} == {n: each[1] for n, each in expected.items()}
    for name, (_, _, *numbers) in found.items():
        _, _, *others = expected[name]
        # the sum of n numbers, then the sum of their sizes, then some of them
        bounds = [tolerance * max(state[name].numel(), 1)] * 2 + [tolerance] * len(others[2:])
        assert len(numbers) == len(others)
        for number, other, bound in zip(numbers, others, bounds):
            assert number == pytest.approx(other, rel=tolerance, abs=bound), name
    if EXACT:
        assert [n for n, each in found.items() if each[0] != expected[n][0]] == []


def test_a_small_difference_is_found(folder, monkeypatch):
    """The check above can fail: numbers one part in a thousand off, a bit, a shape, a key."""
    state = golden.state_of(folder / "auto.pt")
    expected = golden.digest(state)
    check_digest(state, expected, 1e-5)
    name = next(key for key in state if key.endswith("moe.experts.w1"))
    for changed in (
        {**state, name: state[name] * 1.001 + 1e-3},
        {**state, name: state[name][1:]},
        {**state, "more": state[name]},
        {key: value for key, value in state.items() if key != name},
    ):
        with pytest.raises(AssertionError):
            check_digest(changed, expected, 1e-5)
    monkeypatch.setitem(globals(), "EXACT", True)
    bit = state[name].clone()
    bit[-1, -1] = torch.nextafter(bit[-1, -1], torch.tensor(9.0))
    with pytest.raises(AssertionError):
        check_digest({**state, name: bit}, expected, 1e-5)


@pytest.mark.parametrize("model", golden.MODELS)
def test_the_keys_of_a_state_are_the_same(model, folder, monkeypatch):
    monkeypatch.chdir(folder)
    builder, combinations = golden.Builder(golden.MODELS[model]), dict(golden.combinations(model))
    assert len(KEYS[model]["combinations"]) > 5
    for name, numbers in KEYS[model]["combinations"].items():
        layers, rest = golden.keys(builder.build(**combinations[name]))
        # the order of parameters matters to the optimizer, and is tested by training on
        expected = [KEYS[model]["lines"][int(number)] for number in numbers.split()]
        assert sorted(layers) == sorted(expected), name
        assert sorted(rest) == sorted(KEYS[model]["common"]), name


@pytest.mark.parametrize("model", golden.MODELS)
def test_every_flag_takes_what_it_took(model):
    parser, flags = golden.parser_of(model), golden.flags_of(model)
    assert len(FLAGS[model]) > 40
    for flag, old in FLAGS[model].items():
        new = flags[flag]
        assert set(old["options"]) <= set(new["options"]) and old["nargs"] == new["nargs"], flag
        if new["choices"] is not None:
            assert old["choices"] is not None and set(old["choices"]) <= set(new["choices"]), flag
        for words in values_of(flag, old):
            given = vars(parser.parse_args(words))  # an error ends the process
            assert flag[2:].replace("-", "_") in given, flag


def values_of(flag, old):
    """Command lines with a flag, of which there is one for each kind of value that it takes."""
    if old["nargs"] == 0:
        return [[flag]]
    values = old["choices"] or {"int": ["3"], "float": ["0.5"]}.get(old["type"], [])
    more = {
        "--moe-spawn-update": ["auto", "0", "100"],
        "--moe-expert-sizes": ["arithmetic", "geometric", "hybrid", "uniform", "1,2,4,1"],
        "--moe-hard-update": ["-1", "0"],
    }
    default = [] if old["default"] is None else [old["default"]]
    return [[flag, value] for value in [*default, *values, *more.get(flag, [])]]


@pytest.mark.parametrize("path", IMPORTS)
def test_an_old_import_still_works(path):
    module, name = path.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), name)
