"""``evomoe report``: what experts do, as ``report.json`` and on one page."""

import argparse
import contextlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from .. import __version__
from ..checkpoints import recovery
from ..checkpoints.commands import import_plugin
from ..checkpoints.files import CommandError
from ..checkpoints.saved_options import SavedOptions
from . import curves, domains, measure, traces
from .figures import Pictures
from .page import render
from .reading import Reader, update_of
from .sample import Sample
from .sparse import sparse

FORMAT = 1
"""Of ``report.json``; another number, other keys."""
FILES = ("report.html", "report.json")


def report(args: argparse.Namespace) -> None:
    """Write the report of some checkpoints.

    Raises:
        CommandError: something is missing, or in the way.
    """
    _check(args)
    import_plugin(args)
    sparse()  # before minutes are spent on what it is needed for
    with _quiet():
        pictures = Pictures()
    known = domains.find(args.data, args.domain, args.subset)
    given = runs_of(args.checkpoints)
    _check_logs(given, args.log)
    written = [traces.read(os.path.dirname(run.checkpoints[-1][0])) for run in given]
    logs = [curves.read(log.split(",")) for log in args.log]
    with _quiet():
        runs = [{"name": run.name, **measure.run(_samples(run, args, known))} for run in given]
    for run, found_curves in zip(runs, logs):
        run["curves"] = found_curves
    for run, found_trace in zip(runs, written):
        if found_trace is not None:
            run["trace"] = found_trace
    options = {run["name"]: run["options"] for run in runs}
    found = {
        "format": FORMAT,
        "version": __version__,
        "data": {
            "folder": args.data,
            "subset": args.subset,
            "tokens": max(max(run["texts"].values()) for run in runs),
            "domains": known,
        },
        "differences": measure.differences(options) if len(runs) > 1 else [],
        "runs": runs,
    }
    with _quiet():
        page = render(found, pictures)
    _write(
        Path(args.out),
        {"report.html": page, "report.json": json.dumps(_rounded(found), ensure_ascii=False, indent=1)},
    )
    print(Path(args.out) / "report.html")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nobody asks for what models say when they are built, torch's warnings, or the fonts that there are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be read or written, before time goes into it."""
    for path in args.checkpoints:
        if not Path(path).is_file():
            raise CommandError(f"There is no checkpoint {path}.")
    if not Path(args.data).is_dir():
        raise CommandError(f"`data` {args.data} is not a folder.")
    if args.tokens < 1:
        raise CommandError(f"`tokens` must be at least 1, but is {args.tokens}.")
    for log in args.log:
        for path in log.split(","):
            if not Path(path).is_file():
                raise CommandError(f"There is no `log` {path}.")
    out = Path(args.out)
    if not out.resolve().parent.is_dir():
        raise CommandError(f"The folder that `out` {out} is to be in does not exist: create it.")
    if not os.access(out.resolve().parent, os.W_OK | os.X_OK):
        raise CommandError(f"The folder that `out` {out} is to be in cannot be written to: give another.")
    if not os.path.lexists(out):
        return
    if not args.force:
        raise CommandError(f"`out` {out} is there already: give another name, or `force` to replace it.")
    if not out.is_dir() or out.is_symlink() or {path.name for path in out.iterdir()} - set(FILES):
        raise CommandError(
            f"`out` {out} has other things than a report, which would be lost: give another name."
        )


@dataclass
class Run:
    """Checkpoints of one run.

    Attributes:
        name: short, unlike those of the others.
        checkpoints: path and number of updates of each, by these; none has as many as another.
    """

    name: str
    checkpoints: List[Tuple[str, int]]


def runs_of(paths: List[str]) -> List[Run]:
    """The runs, in the order in which they are first given: checkpoints in one folder of equal model options.

    Of several checkpoints of one update the last is taken, which is said.
    """
    found: Dict[Tuple[Path, str], Dict[int, str]] = {}
    for path in dict.fromkeys(paths):
        state = recovery.peek(path)
        model = SavedOptions(state).all_of_model
        key = Path(path).resolve().parent, repr(sorted(model.items(), key=str))
        of_run = found.setdefault(key, {})
        update = update_of(state)
        if update in of_run:
            print(f"{of_run[update]} is left out: {path} is of the same update.")
        of_run[update] = path
    folders = [folder for folder, _ in found]
    names = _short(
        [f"{folder}/{max(run.items())[1].rpartition('/')[2]}" for folder, run in zip(folders, found.values())]
    )
    return [
        Run(name, [(run[update], update) for update in sorted(run)])
        for name, run in zip(names, found.values())
    ]


def _short(paths: List[str]) -> List[str]:
    """The name of each file's folder, with as much around it as is needed to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for first, end in ((-2, -1), (-2, None), (-3, -1), (-3, None)):
        names = ["/".join(part[first:end]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _samples(run: Run, args: argparse.Namespace, known: Dict[str, str]) -> Iterator[Sample]:
    """What is seen of each checkpoint of a run, by its updates."""
    for path, update in run.checkpoints:
        reader = Reader.of_checkpoint(path, args.data)
        with progress(Path(path).name, args.tokens) as bar:
            sample = reader.read(args.subset, args.tokens, bar, update)
        if path == run.checkpoints[-1][0]:
            if all(layer.choices is None for layer in sample.layers):
                raise CommandError(
                    f"{path} has one expert in each layer, as before the spawn: there is nothing to report "
                    "on until after --moe-spawn-update."
                )
            for name, what in known.items():
                tokens = max(args.tokens // len(known), 1)
                with progress(name, tokens) as bar:
                    sample.domains[name] = reader.loads(domains.inputs(reader, what), tokens, bar)
        yield sample


def progress(name: str, tokens: int) -> Any:
    """A bar that counts tokens, where somebody looks on."""
    from tqdm import tqdm

    return tqdm(desc=name, total=tokens, unit=" tokens", leave=False, disable=None)


def _check_logs(runs: List[Run], logs: List[str]) -> None:
    if logs and len(logs) != len(runs):
        raise CommandError(
            f"There are {len(runs)} runs and {len(logs)} `log`: give one for each run, in the order of the "
            "runs, and several files of a run with commas between them."
        )


def _rounded(value: Any) -> Any:
    """Numbers with six digits, which are more than a sample can tell."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _write(out: Path, texts: Dict[str, str]) -> None:
    """Write the folder: it is whole at the end, or what was there before still is."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.resolve().parent))
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        if out.exists():
            old = temporary.with_name(temporary.name + "-old")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except OSError as error:
        raise CommandError(f"The report cannot be written to `out` {out}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
