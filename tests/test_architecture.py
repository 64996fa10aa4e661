"""The house: floors import only floors under them, and a token crosses few files."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import fairseq_evomoe
from fairseq_evomoe.moe import ROUTERS
from support.cli import LM, build
from support.tasks import PLAIN

PACKAGE = Path(fairseq_evomoe.__file__).parent
FLOORS = ["report", "training", "checkpoints", "models", "criterions", "config", "evolution", "moe"]
"""From the top to the ground."""
BESIDE = {"compat": {"patching"}, "patching": set()}
"""Modules that any floor may import, and what they may import themselves."""


def modules():
    """Path and dotted name within the package of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, parts[:-1] if parts[-1] == "__init__" else parts


def imported(path, name):
    """The first part of the name of each module of the package that a module imports, with its line."""
    package = list(name) if path.name == "__init__.py" else list(name[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = package[: len(package) - node.level + 1]
            full = base + (node.module.split(".") if node.module else [])
            targets = [full] if full else [[alias.name] for alias in node.names]
            for target in targets:
                yield target[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairseq_evomoe"):
            yield (node.module.split(".") + [""])[1], node.lineno


def test_imports_point_down():
    wrong = []
    for path, name in modules():
        if not name or name[0] == "bin":
            continue  # the package itself registers
        for target, line in imported(path, name):
            where = f"{'/'.join(name)}:{line} imports {target}"
            if name[0] in BESIDE:
                wrong += [where] if target not in BESIDE[name[0]] else []
            elif target in FLOORS:
                wrong += [where] if FLOORS.index(target) < FLOORS.index(name[0]) else []
            elif target in BESIDE:
                wrong += [where] if name[0] in ("moe", "evolution") else []
            elif target and target not in ("__version__",):
                wrong.append(where + ", which is no floor")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("floor", ["moe", "evolution"])
def test_low_floors_know_no_flags_and_no_fairseq(floor):
    for path, name in modules():
        if name[:1] != (floor,):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                known = ("--moe-router soft", "--max-update")  # words of help texts
                text = node.value
                for word in known:
                    text = text.replace(word, "")
                assert "--" not in text, f"{'/'.join(name)}:{node.lineno}: {node.value}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(n.split(".")[0] in ("fairseq", "omegaconf", "hydra") for n in names), name


def files_on_the_way(call, dim, tokens):
    """The files of the package whose functions are handed the hidden states of all tokens in a call."""
    seen = set()

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            for value in [frame.f_locals.get(name) for name in names]:
                if torch.is_tensor(value) and value.shape[-1:] == (dim,) and value.numel() == dim * tokens:
                    seen.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("router", [name for name, cls in ROUTERS.items() if not cls.needs_whole_sequence])
def test_a_token_crosses_few_files(router, lm_data):
    """From the model's forward to an expert, whatever the router."""
    settings = {**LM, **PLAIN, "moe_router": router, "decoder_embed_dim": 44, "decoder_ffn_embed_dim": 48}
    model = build(lm_data, **settings, decoder_attention_heads=2).model.eval()
    tokens = torch.randint(4, 20, (3, 7))
    files = files_on_the_way(lambda: model(tokens), 44, 21)
    assert "models/feed_forward.py" in files and "moe/layer.py" in files
    assert len(files) <= 8, sorted(files)


def test_every_router_is_one_file():
    files = [Path(sys.modules[cls.__module__].__file__).name for cls in ROUTERS.values()]
    assert len(set(files)) == len(files)
