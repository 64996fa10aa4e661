"""A tokenizer that makes of text what fairseq made of it: pieces or words, by a dictionary."""

import json
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from transformers import PreTrainedTokenizer


class EvoMoETokenizer(PreTrainedTokenizer):
    """Text to the entries of fairseq's dictionary, and back.

    Args:
        vocabulary_file: JSON, the entries in their order.
        target_vocabulary_file: those of the target language, if there is one of its own.
        sentencepiece_file: SentencePiece's model; without one, tokens are what is between spaces.
        begin: what a text begins with, if anything.
        end: what it ends with, if anything.
        kwargs: what all tokenizers have.
    """

    vocab_files_names = {
        "vocabulary_file": "vocabulary.json",
        "target_vocabulary_file": "target_vocabulary.json",
        "sentencepiece_file": "sentencepiece.model",
    }
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocabulary_file: str,
        target_vocabulary_file: Optional[str] = None,
        sentencepiece_file: Optional[str] = None,
        begin: Optional[str] = None,
        end: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        self.files = [vocabulary_file, target_vocabulary_file, sentencepiece_file]
        self.source = _read(vocabulary_file)
        self.target = self.source if target_vocabulary_file is None else _read(target_vocabulary_file)
        self.entries = self.source
        self.index = {entry: index for index, entry in enumerate(self.entries)}
        self.begin, self.end = begin, end
        self.pieces = None
        if sentencepiece_file is not None:
            from sentencepiece import SentencePieceProcessor

            self.pieces = SentencePieceProcessor(model_file=sentencepiece_file)
        super().__init__(begin=begin, end=end, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of entries."""
        return len(self.entries)

    def get_vocab(self) -> Dict[str, int]:
        """The number of each entry."""
        return dict(self.index)

    def _switch_to_input_mode(self) -> None:
        self._use(self.source)

    def _switch_to_target_mode(self) -> None:
        self._use(self.target)

    def _use(self, entries: List[str]) -> None:
        self.entries, self.index = entries, {entry: index for index, entry in enumerate(entries)}

    def _tokenize(self, text: str, **kwargs: Any) -> List[str]:
        return text.split() if self.pieces is None else self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.index.get(token, self.index["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self.target[index] if index < len(self.target) else "<unk>"

    def convert_tokens_to_string(self, tokens: List[str]) -> str:
        """The text of tokens."""
        return " ".join(tokens) if self.pieces is None else self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None
    ) -> List[int]:
        """What goes into the model; of two texts one after the other, each with its own beginning and end."""
        begin, end = ([] if x is None else [self.index[x]] for x in (self.begin, self.end))
        return [x for ids in (token_ids_0, token_ids_1) if ids is not None for x in (*begin, *ids, *end)]

    def get_special_tokens_mask(
        self,
        token_ids_0: List[int],
        token_ids_1: Optional[List[int]] = None,
        already_has_special_tokens: bool = False,
    ) -> List[int]:
        """1 for what is no part of the text."""
        if already_has_special_tokens:
            return [int(x in self.all_special_ids) for x in token_ids_0]
        texts = [ids for ids in (token_ids_0, token_ids_1) if ids is not None]
        begin, end = ([] if x is None else [1] for x in (self.begin, self.end))
        return [x for ids in texts for x in (*begin, *[0] * len(ids), *end)]

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> Tuple[str, ...]:
        """Copy the files."""
        written = []
        for name, path in zip(self.vocab_files_names.values(), self.files):
            if path is not None:
                target = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + name)
                if target.resolve() != Path(path).resolve():
                    shutil.copyfile(path, target)
                written.append(str(target))
        return tuple(written)


def _read(path: str) -> List[str]:
    return json.loads(Path(path).read_text(encoding="utf-8"))
