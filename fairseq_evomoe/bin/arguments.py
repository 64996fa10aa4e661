"""The arguments of the ``evomoe`` commands, without the package, whose import takes seconds."""

import argparse
from pathlib import Path
from typing import List, Sequence


def add_merge(commands: argparse._SubParsersAction) -> None:
    """``evomoe merge``."""
    parser = commands.add_parser(
        "merge",
        help="merge similar experts of a checkpoint",
        description="Merge similar experts of a checkpoint (arXiv 2407.09590).",
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
    add_force(parser)
    add_user_dir(parser)


def add_densify(commands: argparse._SubParsersAction) -> None:
    """``evomoe densify``."""
    parser = commands.add_parser(
        "densify",
        help="make a checkpoint one of fairseq's own dense model",
        description="Make a checkpoint one of fairseq's own dense model (transformer, transformer_lm or "
        "roberta), which needs no --user-dir: the experts of each layer become one feed-forward network "
        "(OneS, arXiv 2201.10890).  Each expert counts as it is, without the gate's weights and without "
        "--moe-scaling-factor.  The optimizer's state and the EMA are left out.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file, or the first of several")
    parser.add_argument(
        "--method",
        required=True,
        choices=("sum", "average", "topk", "svd"),
        help="the sum or the mean of the experts' matrices; the hidden units with the greatest norm; or the "
        "mean of the experts' truncated singular value decompositions",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="rank of each expert's matrices with --method svd; the ffn-embed-dim divided by the number of "
        "experts if not given",
    )
    add_force(parser)


def add_detach(commands: argparse._SubParsersAction) -> None:
    """``evomoe detach``."""
    parser = commands.add_parser(
        "detach",
        help="write low-rank experts without their backbone",
        description="Write the low-rank experts of a checkpoint that was trained with --moe-rank and "
        "--moe-freeze backbone, and a classification head if it has one, without the model that they stand "
        "beside, which is what it was before.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write them")
    add_force(parser)


def add_attach(commands: argparse._SubParsersAction) -> None:
    """``evomoe attach``."""
    parser = commands.add_parser(
        "attach",
        help="put low-rank experts on their backbone again",
        description="Write the checkpoint that evomoe detach has taken low-rank experts from, bit for bit, "
        "but for the optimizer's state.",
    )
    parser.add_argument("adapter", help="what evomoe detach has written")
    parser.add_argument("checkpoint", help="of the model that they stand beside, such as the dense one")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """What each command that writes has."""
    parser.add_argument("--force", action="store_true", help="replace what --out names, if it is there")


def add_consolidate(commands: argparse._SubParsersAction) -> None:
    """``evomoe consolidate``."""
    parser = commands.add_parser(
        "consolidate",
        help="write a checkpoint of several files as one",
        description="Write a checkpoint that --moe-sharded-checkpoint has made as one file.",
    )
    parser.add_argument("checkpoint", help="the first file of the checkpoint, such as checkpoint_last.pt")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    add_force(parser)


def add_reshard(commands: argparse._SubParsersAction) -> None:
    """``evomoe reshard``."""
    parser = commands.add_parser(
        "reshard",
        help="write a checkpoint in another number of files",
        description="Write a checkpoint as several files, as --moe-sharded-checkpoint does.  Each of P ranks "
        "with --moe-expert-parallel P reads what it needs of any number of files; with as many files as "
        "ranks, that is one file.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file, or the first of several")
    parser.add_argument("--parts", type=int, required=True, metavar="N", help="number of files")
    parser.add_argument(
        "--out", required=True, metavar="FILE.pt", help="the first file; the others are FILE-experts1.pt, ..."
    )
    add_force(parser)


def add_check(commands: argparse._SubParsersAction) -> None:
    """``evomoe check``."""
    parser = commands.add_parser(
        "check",
        help="tell whether checkpoints are whole",
        description="Tell whether checkpoints are whole: all files are there and belong together, and each "
        "bit is what was written.  The exit status is 2 if one is not.",
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoints in one file, or the first of several")


def add_report(commands: argparse._SubParsersAction) -> None:
    """``evomoe report``."""
    parser = commands.add_parser(
        "report",
        help="show on one page what the experts do",
        description="Show on one page what the experts of checkpoints do with text: report.html, which needs "
        "no network, and report.json.  Checkpoints in one folder are of one run; those of several runs are "
        "set side by side.  Needs matplotlib and scipy.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="in one file, or the first of several"
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="binarised data for the checkpoints' task"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--subset",
        default="valid",
        metavar="NAME",
        help="the part of the data to use: train, valid (the default), test, ...",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=100000,
        metavar="T",
        help="number of tokens of each layer that are enough (100000)",
    )
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a known part of the text, as a file of text or as the name of a set of the data; give "
        "several; without it, sets of the data that are called SUBSET_NAME, test_NAME or valid_NAME",
    )
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="FILE",
        help="what fairseq-train has printed, for the curves; one of each run, in their order, where "
        "there are several; files of one run with commas between them",
    )
    add_force(parser)
    add_user_dir(parser)


def add_info(commands: argparse._SubParsersAction) -> None:
    """``evomoe info``."""
    parser = commands.add_parser(
        "info",
        help="tell what a checkpoint is and what its model costs",
        description="Tell what a checkpoint is, of a dense model too, without any data: options, stage, "
        "experts, parameters, memory, FLOP for a token, and whether a run can go on from it here.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file, or the first of several")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    add_user_dir(parser)


def add_plan(commands: argparse._SubParsersAction) -> None:
    """``evomoe plan``."""
    parser = commands.add_parser(
        "plan",
        help="tell what schedules of spawns cost beside experts that are there from the start",
        usage="evomoe plan --experts N --max-update U [options] [-- DATA flags of fairseq-train]",
        description="Time updates with each number of experts that a schedule has, and tell what a run "
        "costs: hours, memory, bytes between GPUs.  Without flags of fairseq-train after --, a causal "
        "language model of these sizes is timed, on random text.",
    )
    add = parser.add_argument
    add("--experts", type=int, required=True, metavar="N", help="of each layer, at the end")
    add("--max-update", type=int, required=True, metavar="U", help="length of the run")
    add(
        "--spawn-update",
        action="append",
        metavar="SCHEDULE",
        help="as --moe-spawn-update has it, 10%% or 5%%:4,15%%:16,40%%:64; give several to compare them "
        "(10%% and three stages)",
    )
    add("--preset", metavar="NAME", help="--moe-preset of the run")
    add("--seconds", type=float, default=60, metavar="S", help="time that is measured, in all (60)")
    sizes = parser.add_argument_group("the model, where no flags of fairseq-train are given").add_argument
    for flag, size, what in (
        ("--layers", 6, "layers, of which every second has experts"),
        ("--dim", 512, "width of a token"),
        ("--ffn-dim", 2048, "hidden units of a feed-forward network"),
        ("--vocabulary", 8000, "entries of the dictionary"),
        ("--tokens", 4096, "tokens of an update on a GPU"),
        ("--sequence", 128, "tokens of a sequence"),
    ):
        sizes(flag, type=int, default=size, metavar="N", help=f"{what} ({size})")
    ranks = parser.add_argument_group("more than one GPU, estimated").add_argument
    ranks("--gpus", type=int, default=1, metavar="W", help="how many there are (1)")
    ranks(
        "--parallel",
        type=int,
        metavar="P",
        help="how many share the experts; all, if they divide N, or else 1",
    )
    ranks("--ranks-per-node", type=int, default=8, metavar="G", help="GPUs of a node (8)")
    ranks("--bandwidth", type=float, default=50, metavar="GB/S", help="of a GPU between nodes (50)")
    ranks("--inside", type=float, default=450, metavar="GB/S", help="of a GPU inside a node (450)")
    ranks("--latency", type=float, default=20e-6, metavar="S", help="of an exchange, in seconds (20e-6)")
    ranks("--bytes", type=int, default=2, metavar="B", help="of a number on the way (2)")


def add_user_dir(parser: argparse.ArgumentParser) -> None:
    """What commands have that need to know a router of somebody else's."""
    parser.add_argument(
        "--user-dir", metavar="DIR", help="folder of a plugin that registers the checkpoint's router"
    )


def add_export(commands: argparse._SubParsersAction) -> None:
    """``evomoe export``."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a folder for use outside of fairseq",
        description="Write a checkpoint as a folder for use outside of fairseq.  hf: for transformers' "
        "from_pretrained(FOLDER, trust_remote_code=True), where neither fairseq nor this package is needed; "
        "nllb_moe: for its own NLLB-MoE, where the model is one; safetensors: the weights alone.",
    )
    parser.add_argument("checkpoint", help="a checkpoint in one file, or the first of several")
    parser.add_argument(
        "--to", required=True, choices=("hf", "nllb_moe", "safetensors"), help="what to write"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the dictionary, for the tokenizer; that of the checkpoint's data if it is there",
    )
    parser.add_argument(
        "--sentencepiece", metavar="FILE", help="SentencePiece's model, for the tokenizer; words without one"
    )
    add_force(parser)


def add_import(commands: argparse._SubParsersAction) -> None:
    """``evomoe import``."""
    parser = commands.add_parser(
        "import",
        help="write a checkpoint of what is from elsewhere",
        description="Write a checkpoint of a folder that evomoe export --to hf has written, or of another "
        "fairseq's checkpoint with experts: of the branches moe and nllb, and of the EvoMoE authors' fork.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="the folder; or the shared file and those of the ranks, in their order",
    )
    parser.add_argument(
        "--from",
        dest="origin",
        default="hf",
        choices=("hf", "fairseq-moe"),
        help="what is read: a folder (hf, the default) or files *-shared.pt and *-rank-N.pt",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the checkpoint")
    add_force(parser)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """``evomoe doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="find out whether a training works here",
        description="Find out whether a training works here, and what is in the way, in lines to put into a "
        "bug report.  The exit status is 2 if something is.",
    )
    parser.add_argument("--user-dir", metavar="DIR", help="the one that you give to fairseq-train")
    parser.add_argument(
        "--save-dir", metavar="DIR", default="checkpoints", help="where checkpoints shall be written"
    )


def parse(arguments: Sequence[str], version: str) -> argparse.Namespace:
    """What a command line says; ``rest`` is left to commands that parse their arguments themselves.

    Raises:
        SystemExit: it is wrong, or all that is asked for is help.
    """
    parser = argparse.ArgumentParser(prog="evomoe", description="Command line of fairseq_evomoe.")
    parser.add_argument("--version", action="version", version=f"evomoe {version}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    for add in (
        add_doctor,
        add_merge,
        add_densify,
        add_detach,
        add_attach,
        add_consolidate,
        add_reshard,
        add_check,
        add_info,
        add_report,
        add_export,
        add_import,
        add_plan,
    ):
        add(commands)
    commands.add_parser("presets", add_help=False, help="list the presets of --moe-preset, or show one")
    own, train = list(arguments), []
    if own[:1] == ["plan"] and "--" in own:
        end = own.index("--")
        own, train = own[:end], own[end + 1 :]
    args, rest = parser.parse_known_args(own)
    if rest and args.command != "presets":
        parser.error("unrecognized arguments: " + " ".join(rest))
    args.train, args.rest = train, rest
    _refuse_what_is_not_there(parser, args)
    return args


def _refuse_what_is_not_there(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A wrong name is told before the seconds that importing torch takes."""
    given: List[object] = (
        args.checkpoints if args.command == "report" else [getattr(args, "checkpoint", None)]
    )
    for checkpoint in given:
        if isinstance(checkpoint, str) and not Path(checkpoint).exists():
            parser.exit(2, f"evomoe {args.command}: There is no checkpoint {checkpoint}.\n")
