"""Score a language model with lm-evaluation-harness: a checkpoint of fairseq's, or an exported folder.

python examples/lm_eval/run.py MODEL --tasks kings_choice,kings_text
"""

import argparse
from pathlib import Path

from adapter import EvoMoELM, ExportedModel, FairseqModel

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint, or a folder that evomoe export --to hf has written")
    parser.add_argument("--data", help="of a checkpoint: folder of its dictionary")
    parser.add_argument("--sentencepiece", default="", help="of a checkpoint: SentencePiece's model")
    parser.add_argument("--tasks", default="kings_choice", help="tasks, with commas between")
    parser.add_argument("--include", default=str(HERE / "tasks"), help="folder of tasks of your own")
    parser.add_argument("--limit", type=int, help="use so many documents of each task")
    args = parser.parse_args()
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit("lm-evaluation-harness is not installed: pip install lm_eval.") from error
    if not Path(args.model).exists():
        parser.error(f"{args.model} does not exist: give a checkpoint, or a folder of evomoe export --to hf")
    if Path(args.model).is_dir():
        model = ExportedModel(args.model)
    elif args.data is None:
        parser.error("give --data, the folder of the checkpoint's dictionary")
    else:
        model = FairseqModel(args.model, args.data, args.sentencepiece)
    tasks = TaskManager(include_path=args.include)
    found = simple_evaluate(
        EvoMoELM(model), tasks=args.tasks.split(","), task_manager=tasks, limit=args.limit, bootstrap_iters=0
    )
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:16} {name:28} {value:.6f}")


if __name__ == "__main__":
    main()
