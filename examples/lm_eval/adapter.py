"""Language models of fairseq and exported ones for lm-evaluation-harness: text in, log probabilities out."""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

try:
    from lm_eval.api.model import LM
except ImportError:  # the three methods work without the harness
    LM = object

END = "</s>"


class FairseqModel:
    """A checkpoint of fairseq's.

    Args:
        path: the checkpoint.
        data: folder of its dictionary.
        sentencepiece: SentencePiece's model; empty: tokens are what is between spaces.
    """

    def __init__(self, path: str, data: str, sentencepiece: str = "") -> None:
        from fairseq.checkpoint_utils import load_model_ensemble_and_task

        import fairseq_evomoe  # noqa: F401  (registers the models)

        models, cfg, task = load_model_ensemble_and_task([path], arg_overrides={"data": data})
        self.model, self.dictionary = models[0].eval(), task.source_dictionary
        self.longest = self.model.max_positions()
        self.end = self.dictionary.eos()
        self.first = self.dictionary.bos() if cfg.task.add_bos_token else self.end
        self.pieces = None
        if sentencepiece:
            from sentencepiece import SentencePieceProcessor

            self.pieces = SentencePieceProcessor(model_file=sentencepiece)

    def encode(self, text: str) -> List[int]:
        """The numbers of a text's tokens."""
        words = text.split() if self.pieces is None else self.pieces.encode(text, out_type=str)
        return [self.dictionary.index(word) for word in words]

    def decode(self, tokens: List[int]) -> str:
        """The text of some tokens."""
        words = [self.dictionary[token] for token in tokens]
        return " ".join(words) if self.pieces is None else self.pieces.decode(words)

    def logits(self, tokens_1L: Tensor) -> Tensor:
        """(1, L, vocabulary)."""
        return self.model(tokens_1L)[0]


class ExportedModel:
    """A folder that ``evomoe export --to hf`` has written.

    Args:
        path: the folder, with a tokenizer in it.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        config = self.model.config
        self.longest = config.max_position_embeddings
        self.first, self.end = config.bos_token_id, config.eos_token_id

    def encode(self, text: str) -> List[int]:
        """The numbers of a text's tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: List[int]) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(tokens)

    def logits(self, tokens_1L: Tensor) -> Tensor:
        """(1, L, vocabulary)."""
        return self.model(tokens_1L).logits


class EvoMoELM(LM):
    """What the harness asks a language model for, one text after the other.

    Args:
        model: either of the above.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: List[Any], **unused: Any) -> List[Tuple[float, bool]]:
        """For each (context, continuation) the latter's log probability, and whether it is greedy's."""
        found = []
        for request in requests:
            context, continuation = request.args
            tokens = self.model.encode(context + continuation)
            start = min(len(self.model.encode(context)), len(tokens))
            score_L, best_L = self._scores(tokens)
            score_L, best_L = score_L[start - len(tokens) :], best_L[start - len(tokens) :]
            found.append((score_L.sum().item(), bool(best_L.all())) if start < len(tokens) else (0.0, True))
        return found

    def loglikelihood_rolling(self, requests: List[Any], **unused: Any) -> List[float]:
        """The log probability of each text, in stretches as long as the model takes."""
        found = []
        for request in requests:
            tokens, longest = self.model.encode(request.args[0]), self.model.longest
            parts = [tokens[i : i + longest] for i in range(0, len(tokens), longest)]
            found.append(sum(self._scores(part)[0].sum().item() for part in parts))
        return found

    def generate_until(self, requests: List[Any], **unused: Any) -> List[str]:
        """What the model says after each (context, options), greedily, up to a text of ``until``."""
        return [self._generate(*request.args) for request in requests]

    @torch.no_grad()
    def _scores(self, tokens: List[int]) -> Tuple[Tensor, Tensor]:
        """Of the last tokens, as many as the model takes: log probability, and whether no other had more."""
        tokens = tokens[-self.model.longest :]
        inputs_1L = torch.tensor([[self.model.first, *tokens[:-1]]])
        target_L1 = torch.tensor(tokens, dtype=torch.long).unsqueeze(1)
        log_LV = self.model.logits(inputs_1L)[0, : len(tokens)].float().log_softmax(-1)
        return log_LV.gather(1, target_L1).squeeze(1), log_LV.argmax(-1) == target_L1.squeeze(1)

    @torch.no_grad()
    def _generate(self, context: str, options: Dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        tokens, made = [self.model.first, *self.model.encode(context)], []
        for _ in range(options.get("max_gen_toks", 64)):
            token = int(
                self.model.logits(torch.tensor([(tokens + made)[-self.model.longest :]]))[0, -1].argmax()
            )
            if token == self.model.end:
                break
            made.append(token)
            text = self.model.decode(made)
            if any(stop in text for stop in until):
                return text[: min(text.index(stop) for stop in until if stop in text)]
        return self.model.decode(made)
