"""Tokens as text: words out of pieces, parts of a sentence, and an occurrence with what stands around it."""

from typing import Dict, List, Sequence, Tuple

import numpy as np

from .lift import Lifted
from .sample import Array, Choices, Text

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece puts where a word begins."""
MORE = "@@"
"""What subword-nmt puts where a word goes on."""
PARTS = ("first", "early", "middle", "late", "last")
"""Parts of a sentence: its first and last token, and the thirds between."""
AROUND = 8


def marks_words(symbols: Sequence[str]) -> str:
    """How a dictionary's entries say where words are: ``SPACE``, ``MORE`` or, if they do not, nothing."""
    if sum(symbol.startswith(SPACE) for symbol in symbols) > len(symbols) // 20:
        return SPACE
    return MORE if any(symbol.endswith(MORE) for symbol in symbols) else ""


def words(text: Text) -> Tuple[Array, List[str]]:
    """The word that each token is a part of.

    Returns:
        number of each token's word, -1 for what stands between sentences; the words.
    """
    marks, boundaries = marks_words(text.symbols), set(text.boundaries)
    numbers: Dict[str, int] = {}
    word_T = np.full(len(text), -1, dtype=np.int64)
    begin, open_word = 0, ""

    def close(end: int) -> None:
        if open_word:
            word_T[begin:end] = numbers.setdefault(open_word, len(numbers))

    before = -1
    for t, (token, sequence) in enumerate(zip(text.token_T.tolist(), text.sequence_T.tolist())):
        symbol = text.symbols[token]
        if token in boundaries:
            close(t)
            open_word = ""
        elif sequence != before or not open_word or _begins(symbol, text.symbols[text.token_T[t - 1]], marks):
            close(t)
            begin, open_word = t, _bare(symbol, marks)
        else:
            open_word += _bare(symbol, marks)
        before = sequence
    close(len(text))
    return word_T, list(numbers)


def _begins(symbol: str, before: str, marks: str) -> bool:
    if marks == SPACE:
        return symbol.startswith(SPACE)
    return marks != MORE or not before.endswith(MORE)


def _bare(symbol: str, marks: str) -> str:
    if marks == SPACE:
        return symbol.lstrip(SPACE)
    return symbol[: -len(MORE)] if marks == MORE and symbol.endswith(MORE) else symbol


def parts(text: Text) -> Array:
    """Which of ``PARTS`` of its sentence each token is in; -1 for what stands between sentences."""
    between_T = np.isin(text.token_T, list(text.boundaries))
    new_T = np.ones(len(text), dtype=bool)
    new_T[1:] = (text.sequence_T[1:] != text.sequence_T[:-1]) | between_T[:-1] | between_T[1:]
    sentence_T = np.cumsum(new_T) - 1
    length_T = np.bincount(sentence_T)[sentence_T]
    place_T = np.arange(len(text)) - np.flatnonzero(new_T)[sentence_T]
    inner_T = 1 + (place_T - 1) * 3 // np.maximum(length_T - 2, 1)
    part_T = np.where(place_T == 0, 0, np.where(place_T == length_T - 1, 4, inner_T))
    result: Array = np.where(between_T, -1, part_T)
    return result


def shown(symbols: Sequence[str], marks: str) -> str:
    """Entries of the dictionary as text to read."""
    if marks == SPACE:
        return "".join(symbols).replace(SPACE, " ")
    text = " ".join(symbols) + " " if symbols else ""
    return text.replace(MORE + " ", "") if marks == MORE else text


def examples(
    text: Text, choices: Choices, heads: int, tops: Sequence[Sequence[Lifted]], most: int = 4
) -> List[List[Dict[str, object]]]:
    """For each expert occurrences of its most telling tokens, with what stands around them.

    The occurrence of a token is the one with the greatest weight that is in no sequence shown before.

    Args:
        text: what was read.
        choices: who got what, of which ``text`` has every ``heads``-th row.
        heads: rows of each token.
        tops: the most telling tokens of each expert.
        most: how many for each expert.
    """
    token_N = choices.row_N // heads
    marks, found = marks_words(text.symbols), []
    for expert, tokens in enumerate(tops):
        of_expert_K = np.flatnonzero(choices.expert_N == expert)
        row_K, weight_K = token_N[of_expert_K], choices.weight_N[of_expert_K]
        anywhere_K = row_K.astype(np.int64) * 2654435761 % (1 << 32)  # not all from the first page
        best_first_K = np.lexsort((anywhere_K, -weight_K))
        row_K, weight_K = row_K[best_first_K], weight_K[best_first_K]
        value_K, used, of_this = text.token_T[row_K], set(), []
        for lifted in tokens:
            for k in np.flatnonzero(value_K == lifted.value)[:20]:
                if text.sequence_T[row_K[k]] not in used:
                    used.add(text.sequence_T[row_K[k]])
                    of_this.append(_occurrence(text, int(row_K[k]), float(weight_K[k]), marks))
                    break
            if len(of_this) == most:
                break
        found.append(of_this)
    return found


def _occurrence(text: Text, t: int, weight: float, marks: str) -> Dict[str, object]:
    first = t - min(AROUND, int(text.position_T[t]))
    end = t + 1
    while end < min(t + 1 + AROUND, len(text)) and text.sequence_T[end] == text.sequence_T[t]:
        end += 1
    symbols = [text.symbols[token] for token in text.token_T[first:end]]
    here = t - first
    return {
        "before": shown(symbols[:here], marks),
        "token": shown(symbols[here : here + 1], marks),
        "after": shown(symbols[here + 1 :], marks),
        "weight": weight,
    }
