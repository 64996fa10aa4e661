"""Write ``data/``: what models, checkpoints and flags were before the package was rearranged.

It was run with the code of that time, and is kept so that one can see how the data came about::

    OMP_NUM_THREADS=1 PYTHONPATH=tests:. python tests/golden/make.py

Run again, it would pin the code that it is run with, which is not what the data is for.
"""

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from support import golden
from support.data import sentences, translated


def write_text():
    """The corpus, as the tests' grammar makes it."""
    folder = golden.DATA / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for split, number, seed in (("train", 40, 1), ("valid", 5, 2)):
        lines = sentences(number, seed)
        (folder / split).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        pairs = sentences(number, seed + 10)
        for language, text in (("en", pairs), ("de", [translated(line) for line in pairs])):
            path = folder / "pair.{}.{}".format(split, language)
            path.write_text("".join(line + "\n" for line in text), encoding="utf-8")


def make_case(name, case):
    """The checkpoint of a case, and what becomes of it."""
    made = Path("made") / name
    last = case.updates + case.further
    golden.train(case.made, case.ranks, made, max_update=last, save_interval_updates=case.updates)
    (first,) = made.glob("checkpoint_*_{}.pt".format(case.updates))
    for path in sorted(made.glob(first.stem + "*.pt")):
        part = path.stem[len(first.stem) :]
        state = torch.load(path, weights_only=False)
        scrub(state)
        target = Path("{}{}.pt".format(name, part))
        torch.save(state, target)
        golden.pack(target, golden.DATA / "{}{}.pt.xz".format(name, part))
    path = golden.unpack_checkpoint(name, Path.cwd())
    expected = {"evaluation": golden.evaluate(path)}
    if case.base["task"] != "masked_lm":
        expected["printed"] = golden.printed(path)
    for ranks in case.resumed_by:
        after = golden.resume(case, path, ranks, Path("after") / "{}{}".format(name, ranks))
        expected["after{}".format(ranks)] = golden.digest(after)
        if ranks == case.ranks and "fp16" not in name:  # fairseq does not save the float32 copies of those
            found = golden.state_of(made / "checkpoint_last.pt")
            different = [key for key in after if not torch.equal(found[key], after[key])]
            assert found.keys() == after.keys() and not different, (name, different)
    return expected


def scrub(state):
    """Take out what names this machine."""
    if "cfg" not in state:  # the experts of a further rank
        return
    common = state["cfg"]["common"]
    for key in ("plasma_path", "user_dir"):
        if key in common:
            common[key] = None if key == "user_dir" else "plasma"
    distributed = state["cfg"]["distributed_training"]
    distributed["distributed_init_method"] = None
    if state.get("args") is not None:
        raise ValueError("arguments beside the configuration")


def main():
    torch.set_num_threads(1)
    random.seed(1)
    only = sys.argv[1:]
    if not only:
        shutil.rmtree(golden.DATA, ignore_errors=True)
        write_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        golden.prepare(Path.cwd())
        if not only:
            golden.save_json("flags.json", {model: golden.flags_of(model) for model in golden.MODELS})
            golden.save_json("state_keys.json", state_keys())
        expected = {"platform": golden.platform_of(), "cases": {}}
        if only:  # the others were made before
            expected = golden.load_json("expected.json.xz")
        for name, case in golden.CASES.items():
            if not only or name in only:
                expected["cases"][name] = make_case(name, case)
                golden.save_json("expected.json.xz", expected)
                print(name, flush=True)
        os.chdir("/")
    size = sum(path.stat().st_size for path in golden.DATA.rglob("*") if path.is_file())
    print("{} bytes".format(size))


def state_keys():
    """Keys of the states of all combinations that can be built; what all of a model have, only once."""
    result = {}
    for model, settings in golden.MODELS.items():
        builder, common, found = golden.Builder(settings), None, {}
        for name, moe in golden.combinations(model):
            try:
                built = builder.build(**moe)
            except ValueError as error:
                print("{}: {}: {}".format(model, name, error))
                continue
            found[name], rest = golden.keys(built)
            assert common in (None, rest), name
            common = rest
        lines = sorted({line for each in found.values() for line in each})
        numbers = {name: " ".join(str(lines.index(line)) for line in each) for name, each in found.items()}
        result[model] = {"common": common, "lines": lines, "combinations": numbers}
    return result


if __name__ == "__main__":
    main()
