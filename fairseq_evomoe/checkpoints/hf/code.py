"""The files that transformers executes for an exported model: ours, and those of ``moe/`` that they need.

transformers copies the files that a modeling file imports out of the same folder, and knows no packages:
``moe/routers/topk.py`` becomes ``moe_routers_topk.py``, and ``from ..losses import x``, ``from .moe_losses
import x``.  Nothing else is changed, so that an exported router is the one that was trained.
"""

import ast
import hashlib
import re
from pathlib import Path
from typing import Dict, List, Tuple

from ...moe.routers import ROUTERS

_PACKAGE = Path(__file__).parents[2]
_HERE = ("checkpoints", "hf")
_ROUTERS = ("moe", "routers")
_SEAL = '''
CODE = "{}"
"""A digest of this model's code: transformers finds the code of a model by its configuration's."""
'''
_IMPORT = re.compile(r"from\s+\.+[\w.]*\s+import")


def files_of_model(router: str) -> Dict[str, str]:
    """Name and text of each file that a model with this router needs.

    Args:
        router: the name of one of this package's routers.
    """
    texts: Dict[str, str] = {}
    waiting: List[Tuple[str, ...]] = [(*_HERE, "modeling_evomoe")]
    while waiting:
        module = waiting.pop()
        if _flat(module) + ".py" in texts:
            continue
        text, imported = _registry(router) if module == _ROUTERS else _flattened(module)
        texts[_flat(module) + ".py"] = text
        waiting += imported
    texts["configuration_evomoe.py"] += _SEAL.format(_digest(texts))
    return texts


def _digest(texts: Dict[str, str]) -> str:
    return hashlib.sha256("\0".join(sorted(texts.values())).encode()).hexdigest()[:16]


def text_of(name: str) -> str:
    """The text of a file of this folder that imports nothing of the package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _flat(module: Tuple[str, ...]) -> str:
    """The name that a module has in a folder without packages."""
    return module[-1] if module[:-1] == _HERE else "_".join(module)


def _registry(router: str) -> Tuple[str, List[Tuple[str, ...]]]:
    """In place of the package of all routers, a file that knows one."""
    cls = ROUTERS[router]
    module = (*_ROUTERS, cls.__module__.rsplit(".", 1)[-1])
    registry = (*_ROUTERS, "registry")
    text = (
        '"""The router of this model by its name."""\n\n'
        f"from .{_flat(module)} import {cls.__name__}\n"
        f"from .{_flat(registry)} import ROUTERS\n\n"
        f'__all__ = ["ROUTERS", "{cls.__name__}"]\n'
    )
    return text, [module, registry]


def _flattened(module: Tuple[str, ...]) -> Tuple[str, List[Tuple[str, ...]]]:
    """The text of a module that finds the others beside it, and those that it imports."""
    lines = (
        _PACKAGE.joinpath(*module).with_suffix(".py").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    imported: List[Tuple[str, ...]] = []
    for node in ast.walk(ast.parse("".join(lines))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        assert node.module is not None, f"{module}: transformers does not see what `from . import` imports"
        target = module[: -node.level] + tuple(node.module.split("."))
        imported.append(target)
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = _IMPORT.sub(f"from .{_flat(target)} import", line, count=1)
    return "".join(lines), imported
