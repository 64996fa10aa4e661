"""What fairseq's commands say of a checkpoint."""

import re

from support.cli import LM, call

EVALUATION = {"user_dir": LM["user_dir"], "num_workers": 0}


def perplexity(data, path, **options):
    """That of the validation set."""
    options = {"gen_subset": "valid", "tokens_per_sample": 16, "batch_size": 8, **EVALUATION, **options}
    result = call("fairseq-eval-lm", data, path=path, **options)
    return float(re.search(r"Perplexity: ([\d.]+)", result.output).group(1))


def hypotheses(output):
    """Sentence number -> hypothesis."""
    return dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, flags=re.MULTILINE))


def scores(output):
    """Sentence number -> the hypothesis' log-probability of a token, to base 2."""
    return {i: float(x) for i, x in re.findall(r"^D-(\d+)\t(\S+)\t", output, flags=re.MULTILINE)}
