"""The cost of the layer in its quick form (ratios, never seconds), and parts of the benchmark."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmark"


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules, which are no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [file.stem for file in FOLDER.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    import layer
    import peers
    import report

    yield layer, peers, report
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)  # of other examples, which have some of these names


def test_ratios_are_near_their_targets():
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--threads", "1", "--repeats", "5"]
    done = subprocess.run(
        [*command, "--limit", "1.5"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("|\n") == 5


def test_only_what_is_slow_by_every_measure_is_too_slow(parts):
    run = importlib.import_module("run")
    rows = [
        {"case": "slow", "target": 1.1, "ratio": {"median": 1.8, "minimum": 1.7}},
        {"case": "noisy", "target": 1.1, "ratio": {"median": 1.8, "minimum": 1.1}},
        {"case": "for information", "target": None, "ratio": {"median": 9.0, "minimum": 9.0}},
    ]
    assert run.too_slow(rows, 1.5) == ["slow"]
    assert run.too_slow(rows, 2.0) == []


def test_a_limit_needs_the_part_that_has_one(parts, capsys):
    run = importlib.import_module("run")
    assert (
        run.parse(["--limit", "1.5"]).limit == run.parse(["routers", "layer", "--limit", "1.5"]).limit == 1.5
    )
    assert run.parse(["routers", "--quick", "--limit", "1.5"]).quick  # which is of the layer
    with pytest.raises(SystemExit):
        run.parse(["routers", "--limit", "1.5"])
    assert "--limit is of the part layer: name it, too" in capsys.readouterr().err


def test_each_part_says_how_it_was_measured(parts, tmp_path, monkeypatch, capsys):
    """Parts that were measured together say so once, and what was measured before keeps what it says."""
    run, timing = importlib.import_module("run"), importlib.import_module("timing")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    found = {"note": "a note", "series": [], "cases": [], "rows": [], "errors": {}}

    def measure(cpu, *names):
        for name in names:
            monkeypatch.setattr(importlib.import_module(name), "run", lambda repeats: found)
        monkeypatch.setattr(importlib.import_module("scaling"), "plot", lambda found, path: None)
        machine = {"cpu": cpu, "cores": 2, "load": 0.0, "python": "3", "torch": "2", "gpu": None}
        monkeypatch.setattr(timing, "machine", lambda threads: {**machine, "threads": threads})
        monkeypatch.setattr(sys, "argv", ["run.py", *names, "--out", str(tmp_path)])
        assert run.main() == 0
        page = (tmp_path / "results.md").read_text()
        return [line[:20] for line in page.splitlines() if line.startswith(("Machine: ", "## "))]

    old, new = "Machine: an old CPU,", "Machine: a new CPU, "
    assert measure("an old CPU", "peers", "scaling") == [old, "## Other implementat", "## Scaling"]
    assert measure("a new CPU", "scaling") == [old, "## Other implementat", new, "## Scaling"]


def test_masks_for_peers_hold_the_routing(parts):
    layer, peers, _ = parts
    torch.manual_seed(0)
    problem = peers.Problem.make(layer.Size(20, 4, 8), 5, 2)
    mask, k = problem.masks()
    assert mask.sum(0).max() == 1  # no place is taken twice
    expected = torch.zeros(20, 5).scatter(1, problem.expert_TK, problem.weight_TK)
    assert torch.equal(problem.combine(mask, k).sum(2), expected)


def test_what_cannot_run_is_listed(parts):
    layer, peers, report = parts
    problem = peers.Problem.make(layer.Size(8, 4, 8), 2, 1)

    def broken(problem):
        raise RuntimeError("no such thing\nand more")

    def speechless(problem):
        raise MemoryError

    group = {"ours": lambda p: peers.ours(p, False), "a loop": peers.mask_loop, "broken": broken}
    group["speechless"] = speechless
    rows = peers.compare(problem, group, 1)
    assert [row["name"] for row in rows] == list(group)
    assert rows[0]["ratio"]["median"] == 1 and rows[1]["ratio"]["median"] > 0
    assert [row["error"] for row in rows[2:]] == ["RuntimeError: no such thing", "MemoryError"]
    text = report.peers({"note": "a note", "cases": [{"case": "a case", "rows": rows}]})
    assert "| broken | RuntimeError: no such thing |" in text and "| ours | 1.00 | 1.00 | 1.00 |" in text


def test_layer_and_floor_have_the_same_rows(parts):
    layer, _, _ = parts
    size = layer.Size(64, 8, 16)
    assert layer.balanced(size, 8).sum(0).tolist() == [8] * 8
    assert layer.top(size, 8, 2).sum(1).tolist() == [2] * 64
    load = layer.zipf(layer.Size(4000, 8, 16), 4).sum(0)
    assert load.sum() == 4000 and load[0] > 1.5 * load[1] > 1.5 * load[3]
    mean = layer.soft(layer.Size(4000, 8, 16), 8, 4.0).sum(1).float()
    assert mean.min() >= 1 and abs(mean.mean() - 4) < 0.2
    widths = layer.arithmetic(layer.Size(), 8)
    assert widths == sorted(widths) and len(set(widths)) == 8 and abs(sum(widths) - 8 * 2048) <= 32


def test_ranks_exchange_the_bytes_that_the_layer_reports(tmp_path):
    """The script asserts it in each step; the model of the cost says how many they are."""
    command = [sys.executable, str(FOLDER / "ranks.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    check = [sys.executable, str(FOLDER / "cost_model.py"), "--check", str(tmp_path / "ranks.jsonl")]
    done = subprocess.run(check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 2, ")]
    ratios = [float(row.split("|")[2].split("(")[1].rstrip(") ")) for row in rows if "one expert" not in row]
    assert len(ratios) == 3 and all(0.9 < ratio < 1.1 for ratio in ratios)


def test_plots_name_their_lines_at_the_lines(parts, tmp_path):
    scaling, cost_model = importlib.import_module("scaling"), importlib.import_module("cost_model")
    series = [{"axis": name, "x": [1, 2], "layer": [3.0, 4.0], "floor": [2.0, 3.0]} for name in "abc"]
    scaling.plot({"series": series}, tmp_path / "scaling.svg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cost_model.py", "--plot", str(tmp_path / "cost.svg")])
        cost_model.main()
    for file, names in {
        "scaling.svg": ["MoE layer", "dense FFN, same rows"],
        "cost.svg": ["P = 2", "P = 16", "compute", "exchange of tokens", "sum of gradients"],
    }.items():
        picture = (tmp_path / file).read_text()
        assert all(f">{name}</text>" in picture for name in names)
        assert "legend" not in picture
