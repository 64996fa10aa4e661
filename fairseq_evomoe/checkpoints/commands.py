"""The commands of ``evomoe`` that need more than the standard library; see ``bin/evomoe``."""

import argparse
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from ..evolution.merge import MergeError
from . import shards
from .merge import (
    LayerMerge,
    merge_checkpoint,
    model_options,
    moe_layers_of,
    plan_checkpoint,
)
from .saved_optimizer import UnknownLayout, parameter_keys


def merge(arguments: Optional[Sequence[str]] = None) -> None:
    """``evomoe merge``: write a checkpoint in which groups of similar experts have become one each."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _exit_with_error(parser, lambda: _merge(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evomoe merge", description="Merge similar experts of a checkpoint (arXiv 2407.09590)."
    )
    parser.add_argument("checkpoint", help="checkpoint of a model whose experts have spawned")
    parser.add_argument(
        "--experts", type=int, required=True, metavar="M", help="number of experts that each layer shall have"
    )
    parser.add_argument("--out", metavar="FILE", help="where to write the new checkpoint")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="binarised data for the checkpoint's task: experts are grouped by the mean of their weights' "
        "and their outputs' similarity, and merged in proportion to their load; without it, by their "
        "weights' alone and equally",
    )
    parser.add_argument(
        "--subset", metavar="NAME", help="the part of the data to use: train, valid (the default), test, ..."
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="T",
        help="number of tokens on which all experts of a layer are compared (4096)",
    )
    parser.add_argument(
        "--align",
        action="store_true",
        help="match the hidden units of experts, which may be the same in another order, before they are "
        "compared and merged (needs scipy; slow for wide experts)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the groups and write nothing")
    return parser


def _merge(args: argparse.Namespace) -> None:
    _check_arguments(args)
    state = _load(args.checkpoint)
    layers = moe_layers_of(state)
    observed = _observe(args) if args.data is not None else None
    plans = plan_checkpoint(layers, model_options(state), args.experts, observed, args.align)
    print(table(plans))
    if args.dry_run:
        return
    before = _count_parameters(state)
    had_optimizer = state.get("last_optimizer_state") is not None
    kept = merge_checkpoint(state, plans)
    _save(state, args.out)
    most = max(len(layer.widths) for layer in layers)
    print(
        "MoE layers {}, experts {} -> {}, parameters {:,} -> {:,}: {}".format(
            len(layers), most, args.experts, before, _count_parameters(state), args.out
        )
    )
    print("to train on, give " + " ".join(_options(state)))
    if had_optimizer and not kept:
        print(
            "the optimizer's state could not be matched with the parameters and was left out: train on with "
            "--finetune-from-model, or with --restore-file and --reset-optimizer --reset-lr-scheduler"
        )


def _check_arguments(args: argparse.Namespace) -> None:
    if args.experts < 1:
        raise MergeError(f"--experts must be at least 1, but is {args.experts}.")
    for flag, value in (("--subset", args.subset), ("--tokens", args.tokens)):
        if value is not None and args.data is None:
            raise MergeError(f"{flag} has no effect without --data: give --data or leave it out.")
    if args.tokens is not None and args.tokens < 1:
        raise MergeError(f"--tokens must be at least 1, but is {args.tokens}.")
    if not Path(args.checkpoint).is_file():
        raise MergeError(f"There is no checkpoint {args.checkpoint}.")
    if args.dry_run:
        return
    if args.out is None:
        raise MergeError("Give --out, the file to write, or --dry-run to write nothing.")
    _check_out(args)


def _check_out(args: argparse.Namespace) -> None:
    if not Path(args.out).resolve().parent.is_dir():
        raise MergeError(f"The folder of --out {args.out} does not exist: create it.")
    if Path(args.out).resolve() == Path(args.checkpoint).resolve():
        raise MergeError("--out is the checkpoint itself, which would be lost: give another name.")


def _load(path: str) -> Dict[str, Any]:
    """A checkpoint with all experts, from one file or several."""
    state = _load_file(path)
    if shards.INDEX in state:
        try:
            shards.assemble(state, path)
        except shards.DamagedCheckpoint as error:
            raise MergeError(str(error)) from error
    return state


def _load_file(path: str) -> Dict[str, Any]:
    if not Path(path).is_file():
        raise MergeError(f"There is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu")
    except Exception as error:  # whatever unpickling other bytes leads to
        raise MergeError(f"{path} is not a checkpoint that can be read.") from error
    if not isinstance(state, dict):
        raise MergeError(f"{path} is no checkpoint of fairseq's.")
    return state


def _observe(args: argparse.Namespace) -> Dict[str, Any]:
    from .observe import observe

    for folder in args.data.split(os.pathsep):  # fairseq takes several
        if not Path(folder).is_dir():
            raise MergeError(f"--data {folder} is not a folder.")
    try:
        observed = observe(args.checkpoint, args.data, args.subset or "valid", args.tokens or 4096)
    except (OSError, RuntimeError, ValueError) as error:  # a missing file, another dictionary
        text = " ".join(str(error).split()).rstrip(".")
        raise MergeError(f"The model cannot be run on --data {args.data}: {text}.") from error
    tokens = [seen.tokens for seen in observed.values()]
    if min(tokens) == 0:
        raise MergeError(f"--data {args.data} gave a layer no tokens: choose another --subset.")
    print(f"outputs of all experts compared on {min(tokens):,} tokens of each layer")
    return observed


def _save(state: Dict[str, Any], path: str) -> None:
    try:
        torch.save(state, path)
    except (OSError, RuntimeError) as error:
        raise MergeError(f"The checkpoint cannot be written to {path}: {error}.") from error


def consolidate(arguments: Optional[Sequence[str]] = None) -> None:
    """``evomoe consolidate``: write a checkpoint in several files as one in one file."""
    parser = argparse.ArgumentParser(
        prog="evomoe consolidate",
        description="Write a checkpoint that --moe-sharded-checkpoint has made as one file.",
    )
    parser.add_argument("checkpoint", help="the first file of the checkpoint, such as checkpoint_last.pt")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    args = parser.parse_args(arguments)

    def run() -> None:
        _check_out(args)
        if shards.INDEX not in _load_file(args.checkpoint):
            raise MergeError(f"{args.checkpoint} has all experts already: there is nothing to do.")
        state = _load(args.checkpoint)
        _save(state, args.out)
        print("{:,} parameters: {}".format(_count_parameters(state), args.out))

    _exit_with_error(parser, run)


def reshard(arguments: Optional[Sequence[str]] = None) -> None:
    """``evomoe reshard``: write a checkpoint in another number of files."""
    parser = argparse.ArgumentParser(
        prog="evomoe reshard",
        description="Write a checkpoint as several files, as --moe-sharded-checkpoint does.  Each of P ranks "
        "that share the experts (--moe-expert-parallel P) reads what it needs of any number of files; with "
        "as many files as ranks, that is one file.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file, or the first of several")
    parser.add_argument("--parts", type=int, required=True, metavar="N", help="number of files")
    parser.add_argument(
        "--out", required=True, metavar="FILE.pt", help="the first file; the others are FILE-experts1.pt, ..."
    )
    args = parser.parse_args(arguments)

    def run() -> None:
        _check_out(args)
        if not args.out.endswith(".pt"):
            raise MergeError(f"--out {args.out} must end in .pt, as fairseq's checkpoints do.")
        state = _load(args.checkpoint)
        layers = moe_layers_of(state)
        fewest = min(len(layer.widths) for layer in layers)
        if not 1 < args.parts <= fewest:
            raise MergeError(
                f"--parts must be from 2 to the {fewest} experts of a layer, but is {args.parts}."
            )
        paths = shards.write(state, {layer.name: layer.widths for layer in layers}, args.parts, args.out)
        print("\n".join(paths))

    _exit_with_error(parser, run)


def _exit_with_error(parser: argparse.ArgumentParser, run: Callable[[], None]) -> None:
    try:
        run()
    except (MergeError, shards.DamagedCheckpoint, UnknownLayout) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


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


def _options(state: Dict[str, Any]) -> List[str]:
    """The options that the merged model needs besides those that it was trained with."""
    options = model_options(state)
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    flags = ["--moe-experts", str(options["moe_experts"])]
    for name in ("moe_expert_sizes", "moe_total_ffn_dim"):
        if options.get(name) not in (None, "uniform"):
            flags += ["--" + name.replace("_", "-"), str(options[name])]
    return flags


if __name__ == "__main__":
    merge()
