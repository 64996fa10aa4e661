"""What the commands of ``evomoe`` do with checkpoints; ``bin/evomoe`` has their arguments."""

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from fairseq.utils import import_user_module

from ..config.errors import as_flags, flag
from ..evolution.merge import MergeError
from ..moe.options import OptionError
from . import adapter, info, recovery, shards
from .densify import densify_checkpoint
from .files import CommandError, check_outputs, is_in_several_files, load, save
from .index import path_of
from .merge import LayerMerge, Observed, check_merge, merge_checkpoint, moe_layers_of, plan_checkpoint
from .saved_optimizer import UnknownLayout, parameter_keys
from .saved_options import SavedOptions


def run(args: argparse.Namespace, action: Optional[Callable[[argparse.Namespace], None]] = None) -> None:
    """Carry out the command ``args.command``.

    Args:
        args: its arguments.
        action: what carries it out; one of ``COMMANDS`` if not given.

    Raises:
        SystemExit: it cannot be carried out; one sentence is printed that says why, with status 2.
    """
    fairseq = logging.getLogger("fairseq")
    level = fairseq.level
    fairseq.setLevel(logging.WARNING)  # it would report what it loads
    try:
        (action or COMMANDS[args.command])(args)
    except (CommandError, MergeError, OptionError, UnknownLayout, *recovery.UNUSABLE) as error:
        print(f"evomoe {args.command}: {_with_flags(str(error), vars(args))}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        fairseq.setLevel(level)


def _with_flags(text: str, own: Dict[str, Any]) -> str:
    """A sentence in which names of options, in backticks, are flags: the command's own or those of models."""
    text = re.sub(r"`(\w+)`", lambda name: flag(name[1]) if name[1] in own else name[0], text)
    return as_flags(text)


def merge(args: argparse.Namespace) -> None:
    """``evomoe merge``: write a checkpoint in which groups of similar experts have become one each."""
    _check_merge_arguments(args)
    import_plugin(args)
    state = load(args.checkpoint)
    layers = moe_layers_of(state)
    check_merge(layers, SavedOptions(state), args.experts, args.align)  # before much is computed
    observed = _observe(args) if args.data is not None else None
    plans = plan_checkpoint(layers, SavedOptions(state), args.experts, observed, args.align)
    print(table(plans))
    if args.dry_run:
        return
    before = _count_parameters(state)
    had_optimizer = state.get("last_optimizer_state") is not None
    kept = merge_checkpoint(state, plans)
    save([(args.out, state)], args.out)
    most = max(len(layer.widths) for layer in layers)
    print(
        f"MoE layers {len(layers)}, experts {most} -> {args.experts}, parameters {before:,} -> "
        f"{_count_parameters(state):,}: {args.out}"
    )
    print("to train on, give " + " ".join(_changed_flags(SavedOptions(state))))
    if had_optimizer and not kept:
        print(
            "the optimizer's state could not be matched with the parameters and was left out: train on with "
            "--finetune-from-model, or with --restore-file and --reset-optimizer --reset-lr-scheduler"
        )


def _check_merge_arguments(args: argparse.Namespace) -> None:
    if args.experts < 1:
        raise CommandError(f"`experts` must be at least 1, but is {args.experts}.")
    for name in ("subset", "tokens"):
        if getattr(args, name) is not None and args.data is None:
            raise CommandError(f"`{name}` has no effect without `data`: give `data` or leave it out.")
    if args.tokens is not None and args.tokens < 1:
        raise CommandError(f"`tokens` must be at least 1, but is {args.tokens}.")
    if not Path(args.checkpoint).is_file():
        raise CommandError(f"There is no checkpoint {args.checkpoint}.")
    if args.dry_run:
        return
    if args.out is None:
        raise CommandError("Give `out`, the file to write, or `dry_run` to write nothing.")
    check_outputs([args.out], args.checkpoint, args.force)


def import_plugin(args: argparse.Namespace) -> None:
    """Import the folder that ``--user-dir`` names, if it does.

    Raises:
        CommandError: it cannot be imported.
    """
    try:
        import_user_module(args)
    except (FileNotFoundError, ImportError) as error:
        raise CommandError(f"`user_dir` {args.user_dir} cannot be imported: {error}.") from error


def _observe(args: argparse.Namespace) -> Dict[str, Observed]:
    from .observe import observe

    for folder in args.data.split(os.pathsep):  # fairseq takes several
        if not Path(folder).is_dir():
            raise CommandError(f"`data` {folder} is not a folder.")
    try:
        observed = observe(args.checkpoint, args.data, args.subset or "valid", args.tokens or 4096)
    except (OSError, RuntimeError, ValueError) as error:  # a missing file, another dictionary
        text = " ".join(str(error).split()).rstrip(".")
        raise CommandError(f"The model cannot be run on `data` {args.data}: {text}.") from error
    tokens = [seen.tokens for seen in observed.values()]
    if min(tokens) == 0:
        raise CommandError(f"`data` {args.data} gave a layer no tokens: choose another `subset`.")
    print(f"outputs of all experts compared on {min(tokens):,} tokens of each layer")
    return observed


def densify(args: argparse.Namespace) -> None:
    """``evomoe densify``: write a checkpoint of fairseq's own dense model."""
    if args.rank is not None and args.method != "svd":
        raise CommandError(f"`rank` has no effect with `method` {args.method}: leave it out, or use svd.")
    check_outputs([args.out], args.checkpoint, args.force)
    state = load(args.checkpoint)
    layers, before = moe_layers_of(state, one_expert=True), _count_parameters(state)
    dense = densify_checkpoint(state, layers, args.method, args.rank)
    save([(args.out, dense)], args.out)
    most = max(len(layer.widths) for layer in layers)
    print(
        f"MoE layers {len(layers)}, experts {most} -> 1, parameters {before:,} -> "
        f"{_count_parameters(dense):,}: {args.out}"
    )
    print(
        "fairseq loads it without --user-dir; the optimizer's state and the EMA were left out: train on with "
        "--finetune-from-model"
    )


def detach(args: argparse.Namespace) -> None:
    """``evomoe detach``: write the low-rank experts of a checkpoint alone."""
    check_outputs([args.out], args.checkpoint, args.force)
    state = load(args.checkpoint)
    experts = adapter.detach(state)
    save([(args.out, experts)], args.out)
    print(f"parameters {_count_parameters(state):,} -> {_count_parameters(experts):,}: {args.out}")


def attach(args: argparse.Namespace) -> None:
    """``evomoe attach``: write the checkpoint that low-rank experts were taken from."""
    for given in (args.adapter, args.checkpoint):
        check_outputs([args.out], given, args.force)
    experts, state = load(args.adapter), load(args.checkpoint)
    whole = adapter.attach(experts, state)
    save([(args.out, whole)], args.out)
    print(f"parameters {_count_parameters(state):,} -> {_count_parameters(whole):,}: {args.out}")


def consolidate(args: argparse.Namespace) -> None:
    """``evomoe consolidate``: write a checkpoint in several files as one in one file."""
    if not is_in_several_files(args.checkpoint):
        raise CommandError(f"{args.checkpoint} has all experts already: there is nothing to do.")
    check_outputs([args.out], args.checkpoint, args.force)
    state = load(args.checkpoint)
    save([(args.out, state)], args.out)
    print(f"{_count_parameters(state):,} parameters: {args.out}")


def reshard(args: argparse.Namespace) -> None:
    """``evomoe reshard``: write a checkpoint in another number of files."""
    if not args.out.endswith(".pt"):
        raise CommandError(f"`out` {args.out} must end in .pt, as fairseq's checkpoints do.")
    outputs = [path_of(args.out, number) for number in range(max(args.parts, 1))]
    check_outputs(outputs, args.checkpoint, args.force)
    state = load(args.checkpoint)
    layers = moe_layers_of(state)
    fewest = min(len(layer.widths) for layer in layers)
    if not 1 < args.parts <= fewest:
        raise CommandError(f"`parts` must be from 2 to the {fewest} experts of a layer, but is {args.parts}.")
    files = shards.files_of(state, {layer.name: layer.widths for layer in layers}, args.parts, args.out)
    print("\n".join(save(files, args.out)))


def export(args: argparse.Namespace) -> None:
    """``evomoe export``: write what is used outside of fairseq."""
    from .hf.export import export_model, export_nllb_moe, export_tensors
    from .hf.folder import check_folder

    if args.to != "hf":
        for name in ("data", "sentencepiece"):
            if getattr(args, name) is not None:
                raise CommandError(f"`{name}` has no effect with `to` {args.to}: leave it out.")
    check_folder(args.out, args.force)
    state = load(args.checkpoint)
    if args.to == "safetensors":
        print(f"{export_tensors(state, args.out, args.force)} tensors: {args.out}")
        return
    if args.to == "nllb_moe":
        export_nllb_moe(state, args.out, args.force)
        print(f"{_count_parameters(state):,} parameters: {args.out}")
        print("load it with AutoModelForSeq2SeqLM of transformers 4: that of 5.24 asks other experts")
        return
    lines = export_model(state, args.out, args.force, args.data, args.sentencepiece)
    print(f"{_count_parameters(state):,} parameters: {args.out}")
    print("\n".join(lines))


def import_(args: argparse.Namespace) -> None:
    """``evomoe import``: write a checkpoint of what is from elsewhere."""
    from .foreign import read_fairseq_moe
    from .hf.read import read_folder

    if args.origin == "hf" and len(args.sources) > 1:
        raise CommandError("Give one folder, which evomoe export --to hf has written.")
    check_outputs([args.out], None, args.force)
    for path in args.sources:
        if not Path(path).exists():
            raise CommandError(f"There is no {path}.")
        if Path(path).resolve() == Path(args.out).resolve():
            raise CommandError(f"`out` {path} is what is to be read: give another name.")
    if args.origin == "hf":
        state = read_folder(args.sources[0])
    else:
        state = read_fairseq_moe(args.sources)
    save([(args.out, state)], args.out)
    print(f"{_count_parameters(state):,} parameters: {args.out}")
    print("without an optimizer's state: train on with --finetune-from-model")


def check(args: argparse.Namespace) -> None:
    """``evomoe check``: whether checkpoints are whole, to the last bit."""
    faults = 0
    for path in args.checkpoints:
        fault = recovery.fault(path) if Path(path).is_file() else f"There is no checkpoint {path}."
        print(fault or f"{path} is whole.")
        faults += fault is not None
    if faults:
        raise CommandError(f"{faults} of {len(args.checkpoints)} checkpoints are not whole.")


def info_of_one(args: argparse.Namespace) -> None:
    """``evomoe info``."""
    import_plugin(args)
    info.run(args)


COMMANDS: Dict[str, Callable[[argparse.Namespace], None]] = {
    "merge": merge,
    "densify": densify,
    "detach": detach,
    "attach": attach,
    "consolidate": consolidate,
    "reshard": reshard,
    "check": check,
    "info": info_of_one,
    "export": export,
    "import": import_,
}
"""What carries each command out."""


def table(plans: List[LayerMerge]) -> str:
    """The groups of each layer, with the least similarity in a group and the greatest between two groups."""
    rows = [("layer", "experts", "least within", "most between", "groups")]
    for plan in plans:
        found = len(plan.layer.widths)
        if plan.merge is None:
            rows.append((plan.layer.name, f"{found} as before", "", "", ""))
            continue
        groups = plan.merge.groups
        number = {e: m for m, group in enumerate(groups) for e in group}
        pairs = [(i, j) for i in range(found) for j in range(i)]
        within = [plan.similarity_EE[i, j].item() for i, j in pairs if number[i] == number[j]]
        between = [plan.similarity_EE[i, j].item() for i, j in pairs if number[i] != number[j]]
        rows.append(
            (
                plan.layer.name,
                f"{found} -> {len(groups)}",
                f"{min(within):.3f}",
                f"{max(between):.3f}" if between else "",
                " | ".join(" ".join(map(str, group)) for group in groups),
            )
        )
    lengths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(length) for cell, length in zip(row, lengths)).rstrip() for row in rows]
    return "\n".join(lines)


def _count_parameters(state: Dict[str, Any]) -> int:
    return sum(state["model"][key].numel() for key in parameter_keys(state))


def _changed_flags(options: SavedOptions) -> List[str]:
    """The flags that the merged model needs besides those that it was trained with."""
    flags = ["--moe-experts", str(options["experts"])]
    for name in ("expert_sizes", "total_ffn_dim"):
        if options[name] not in (None, "uniform"):
            flags += [flag("moe_" + name), str(options[name])]
    return flags
