"""Everything that ``report.json`` says of a run, measured on what was seen of its checkpoints."""

from typing import Any, Dict, Iterable, List, Optional, Sequence

import numpy as np

from . import history, passages, together
from .explained import explained
from .lift import table, top_values
from .loads import information, load_of
from .sample import Array, LayerSample, Sample, Text

RANKS = (10, 100, 1000, 10000)
"""Ranks of frequency after which a new bin of tokens begins."""


def layer(sample: LayerSample, text: Text, domains: Dict[str, Dict[str, Array]], most: int) -> Dict[str, Any]:
    """What is said of a layer.

    Args:
        sample: what was seen of it.
        text: what its stack has read.
        domains: loads on known parts of the text; see ``Sample``.
        most: how many tokens are listed for each expert.
    """
    found: Dict[str, Any] = {
        "name": sample.name,
        "side": sample.side,
        "experts": sample.names,
        "widths": sample.widths,
        "notes": notes(sample),
    }
    choices = sample.choices
    if choices is None:
        return found
    token_T = sample.of_rows(text.token_T.astype(np.int64))
    head_T = np.arange(choices.rows) % sample.heads
    found.update(load_of(sample))
    found["explained"] = explained(
        choices, token_T * sample.heads + head_T, sample.of_rows(text.position_T).astype(np.int64)
    )
    found["frequency"] = _bins(choices, sample.of_rows(_frequency(text)), _rank_names(len(text.symbols)))
    found["parts"] = _bins(choices, sample.of_rows(passages.parts(text)), list(passages.PARTS))
    found["domains"] = _domains(sample, domains)
    pairs = together.within(choices)
    found["pairs"] = None if pairs is None else pairs.tolist()
    for name in ("similarity_of_weights", "similarity_of_outputs"):
        value = getattr(sample, name)
        found[name] = None if value is None else value.tolist()
    found["seen"] = _seen(sample, text, most)
    return found


def notes(sample: LayerSample) -> List[str]:
    """What cannot be shown of a layer, a sentence each."""
    if sample.choices is None:
        return ["It has one expert, as before the spawn: there is no routing yet."]
    if sample.soft:
        return [
            "Its experts work on mixtures of all tokens of a sequence, so that no token has an expert of its "
            "own: shown are the experts' shares in the tokens' outputs; there are no pairs, and its cost "
            "depends on slots."
        ]
    if sample.choices.dense:
        return [
            "Each token gets all experts, so that there is no choice to count: what counts here is an "
            "expert's weight, and there are no pairs."
        ]
    found = []
    if sample.confidence_T is None:
        found.append("Its router has no probabilities, so that there is no confidence of a gate to show.")
    if sample.heads > 1:
        found.append(
            f"Each token is {sample.heads} sub-tokens, which are routed for themselves and counted here."
        )
    return found


def _seen(sample: LayerSample, text: Text, most: int) -> List[Dict[str, Any]]:
    """What each expert sees: tokens, words, examples."""
    choices = sample.choices
    assert choices is not None
    tokens = top_values(choices, sample.of_rows(text.token_T), len(text.symbols), most)
    word_T, names = passages.words(text)
    words = top_values(choices, sample.of_rows(word_T), len(names), most)
    lines = passages.examples(text, choices, sample.heads, tokens)
    marked = bool(passages.marks_words(text.symbols))
    return [
        {
            "expert": name,
            "tokens": [
                {"text": text.symbols[x.value], "count": x.count, "share": x.share, "lift": x.lift}
                for x in top
            ],
            "words": [
                {"text": names[x.value], "count": x.count, "share": x.share, "lift": x.lift}
                for x in top_words
            ]
            if marked
            else [],
            "examples": shown,
        }
        for name, top, top_words, shown in zip(sample.names, tokens, words, lines)
    ]


def _bins(choices: Any, bin_T: Array, names: Sequence[str]) -> Dict[str, Any]:
    """How the rows of each bin are shared out: for each bin that has any, the experts' part of its pairs."""
    count_BE = table(choices, bin_T, len(names)).toarray()
    return _shared_out(count_BE, names)


def _shared_out(count_BE: Array, names: Sequence[str]) -> Dict[str, Any]:
    kept_B = np.flatnonzero(count_BE.sum(1) > 0).tolist()
    count_BE = count_BE[kept_B]
    return {
        "names": [names[b] for b in kept_B],
        "counts": count_BE.sum(1).round(3).tolist(),
        "share": (count_BE / count_BE.sum(1, keepdims=True)).tolist() if len(kept_B) else [],
        "information": information(count_BE) if len(kept_B) else 0.0,
    }


def _frequency(text: Text) -> Array:
    """The bin of each token's rank by the dictionary's counts, or those of the text if it has none."""
    count_V = text.count_V.copy()
    count_V[list(text.boundaries)] = np.maximum(count_V[list(text.boundaries)], 0)
    if len(np.unique(count_V)) < 3:
        count_V = np.bincount(text.token_T, minlength=len(text.symbols))
    rank_V = np.empty(len(count_V), dtype=np.int64)
    rank_V[np.argsort(-count_V, kind="stable")] = np.arange(len(count_V))
    bin_T: Array = np.searchsorted(RANKS, rank_V[text.token_T], side="right")
    bin_T[np.isin(text.token_T, list(text.boundaries))] = -1
    return bin_T


def _rank_names(entries: int) -> List[str]:
    starts = [1, *(rank + 1 for rank in RANKS)]
    ends = [*map(str, RANKS), ""]
    return [f"{start}–{end}" if end else f"from {start}" for start, end in zip(starts, ends)]


def _domains(sample: LayerSample, domains: Dict[str, Dict[str, Array]]) -> Optional[Dict[str, Any]]:
    loads = {name: layers[sample.name] for name, layers in domains.items() if sample.name in layers}
    if len(loads) < 2:
        return None
    count_BE = np.array(list(loads.values()))
    even_BE = count_BE / np.maximum(count_BE.sum(1, keepdims=True), 1e-30) * count_BE.sum() / len(loads)
    found = _shared_out(count_BE, list(loads))
    found["information"] = information(even_BE)  # as if there were as much text of each
    return found


def run(samples: Iterable[Sample], most: int = 12) -> Dict[str, Any]:
    """What is said of a run.

    Args:
        samples: what was seen of its checkpoints, oldest first; one at a time has its weights in memory.
        most: how many tokens are listed for each expert.
    """
    seen: List[Sample] = []
    families: List[List[Dict[str, Any]]] = []
    for sample in samples:
        before = seen[-1].layers if seen else [None] * len(sample.layers)
        families = families or [[] for _ in sample.layers]
        for one, other, generations in zip(before, sample.layers, families):
            generations.append(history.generation(one, other, sample.update))
            if one is not None:
                one.tensors = {}
        seen.append(sample)
    last = seen[-1]
    layers = [layer(sample, last.texts[sample.side], last.domains, most) for sample in last.layers]
    across = [together.across(one, other) for one, other in zip(last.layers, last.layers[1:])]
    found: Dict[str, Any] = {
        "checkpoint": last.path,
        "update": last.update,
        "task": last.task,
        "router": last.router,
        "parameters": last.parameters,
        "texts": {side: len(text) for side, text in last.texts.items()},
        "layers": layers,
        "across": [one for one in across if one is not None],
        "options": last.options,
    }
    if len(seen) > 1:
        found["checkpoints"] = [{"path": sample.path, "update": sample.update} for sample in seen]
        found["history"] = [
            {
                "name": one.name,
                **history.movement([sample.layers[i] for sample in seen]),
                "family": families[i],
            }
            for i, one in enumerate(last.layers)
        ]
    return found


def differences(runs: Dict[str, Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The options in which runs differ, with the value of each, by name."""
    names = sorted({name for run in runs.values() for name in run})
    return [
        {"option": name, "values": [run.get(name) for run in runs.values()]}
        for name in names
        if len({repr(run.get(name)) for run in runs.values()}) > 1
    ]
