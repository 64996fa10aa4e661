"""The records of finished runs, one JSON line each, which are all that a table is made of.

A record says what was run, with every option as it was resolved, and with what code. One of other options is
not taken for what is asked; one of other code of the router is, unless it shall not be, and is marked.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import json_lines
from logs import Run
from systems import PLUGIN, Settings, System

from fairseq_evomoe.config.config import declarations
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe.routers import ROUTERS, Router

RECORDS, SETTINGS = "records.jsonl", "settings.json"
_PATHS = ("--user-dir", "--save-dir", "--seed", "--moe-preset", "--finetune-from-model")


class OtherSettings(ValueError):
    """A folder has a table of other settings."""


def described(system: System, settings: Settings) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for its seed and its machine."""
    command = _command(system, settings)[2:]
    return {
        "system": system.id,
        "arguments": [a for a, before in zip(command, ["", *command]) if not {a, before} & {*_PATHS}],
        "dense_updates": system.dense_updates,
        "options": {} if system.dense else _resolved(system, settings),
        "code": "" if system.dense else _code(system, settings),
    }


def key(asked: dict[str, Any], settings: dict[str, Any], seed: int) -> str:
    """A name for a run that no other one has."""
    text = json.dumps([asked, settings], sort_keys=True)
    return f"{asked['system']}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def differences(record: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What of a record is not as it is asked now, each in some words.

    An option that there was not then is no difference as long as it is left at its default.
    """
    found = []
    if record["arguments"] != asked["arguments"] or record["dense_updates"] != asked["dense_updates"]:
        found.append("other flags")
    then, now = record["options"], asked["options"]
    for name in sorted({*then, *now}):
        default = declarations()[name][0].default if name in declarations() else None
        before, after = then.get(name, _plain(default)), now.get(name, _plain(default))
        if before != after:
            found.append(f"{name} {before}, now {after}")
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, the oldest first."""
    return json_lines.read(folder / RECORDS)


def of(records: list[dict[str, Any]], system: str, seed: int) -> list[dict[str, Any]]:
    """The records of a system with a seed, the newest first."""
    return [r for r in reversed(records) if (r["system"], r["seed"]) == (system, seed)]


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record."""
    json_lines.append(folder / RECORDS, record)


def record_of(
    asked: dict[str, Any], seed: int, run: Run, before: Run | None, peak_mib: int, bleu: float | None
) -> dict[str, Any]:
    """The record of a run that has ended.

    Args:
        asked: see `described`.
        seed: its seed.
        run: what its log tells.
        before: the same of the dense run that its experts were made of.
        peak_mib: largest memory of its process.
        bleu: on the test set, for translation.
    """
    curve = [[p.update, p.flops, p.loss] for p in (before.curve if before else [])]
    update, flops = (curve[-1][0], before.flops) if before else (0, 0.0)
    curve += [[p.update + update, p.flops + flops, p.loss] for p in run.curve]
    return {
        **asked,
        "seed": seed,
        "perplexity": float(run.last["valid_ppl"]),
        **({} if bleu is None else {"bleu": bleu}),
        "experts": run.experts,
        "active_parameters": run.active_parameters,
        "parameters": run.parameters,
        "flops": curve[-1][1],
        "drift": run.drift,
        "curve": curve,
        "peak_mib": peak_mib,
        **made_with(),
    }


def made_with() -> dict[str, Any]:
    """Commit, versions and processor."""
    import fairseq
    import torch

    import fairseq_evomoe

    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fairseq": fairseq.__version__,
            "fairseq_evomoe": fairseq_evomoe.__version__,
        },
        "processor": _processor(),
    }


def settings_of(settings: Settings) -> dict[str, Any]:
    """What all records of a folder have in common."""
    return {
        "task": settings.task,
        "updates": settings.updates,
        "flags": list(settings.more),
        "data": _fingerprint(settings.data),
    }


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """See that a folder has no table of other settings.

    Raises:
        OtherSettings: it has.
    """
    path = folder / SETTINGS
    before = json.loads(path.read_text()) if path.exists() else settings
    other = [name for name in settings if before.get(name) != settings[name]]
    if other:
        names = " and ".join(other)
        raise OtherSettings(
            f"{folder} has the table of other {names} ({SETTINGS} says which): use another --out."
        )


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a folder's table is of.

    Raises:
        OtherSettings: it is a table of other settings.
    """
    check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _command(system: System, settings: Settings) -> list[str]:
    dense = Path("dense.pt") if system.dense_updates else None
    return settings.train(system, 1, Path("checkpoints"), dense)


def _resolved(system: System, settings: Settings) -> dict[str, Any]:
    """Every option of a system, by its name without `moe_`."""
    command = _command(system, settings)
    given = {}
    for word, after in zip(command, [*command[1:], "--"]):
        if word.startswith("--moe-"):
            given[word[len("--moe-") :].replace("-", "_")] = True if after.startswith("--") else after
    width = next(v for f, v in zip(command[::-1][1:], command[::-1]) if f.endswith("-ffn-embed-dim"))
    masked = settings.task == "masked_lm"
    length = int(command[command.index("--max-update") + 1])
    options = resolve(given, masked=masked, ffn_dims=[int(width)], max_update=length).flat()
    return {name: value for name, value in options.items() if name != "preset"}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _code(system: System, settings: Settings) -> str:
    """A sum over the code of a system's router, without comments and docstrings."""
    router = ROUTERS[_resolved(system, settings)["router"]]
    own = [c for c in router.__mro__ if issubclass(c, Router) and c is not Router]
    text = ""
    for module in dict.fromkeys(inspect.getsourcefile(cls) for cls in own):
        tree = ast.parse(Path(module).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant):
                    body[0].value.value = ""
        text += ast.unparse(tree)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fingerprint(data: Path) -> str:
    """A sum over what fairseq reads."""
    total = hashlib.sha256()
    for path in sorted(p for p in data.iterdir() if p.suffix in (".bin", ".idx", ".txt")):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _commit() -> str:
    """The commit of the code, with `+` if it has been changed since; empty outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PLUGIN.parent), *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "fairseq_evomoe", "examples/systems/*.py")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except OSError:  # there is no git
        return ""


def _processor() -> str:
    """The processor's model, as Linux calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
