"""Known parts of the text: files that the user names, or sets of the data that are of one domain each."""

from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

from fairseq.data import LanguagePairDataset
from torch import Tensor

from ..checkpoints.files import CommandError
from ..checkpoints.observe import batches
from .passages import SPACE
from .reading import Reader

_BATCH = 16
"""Sentences at once."""


def find(data: str, given: Iterable[str], subset: str) -> Dict[str, str]:
    """The domains by name, each a file or the name of a set.

    Args:
        data: folder of the data.
        given: ``NAME=FILE`` or ``NAME=SET``; if there are none, sets of the folder called
            ``SUBSET_NAME``, or else ``test_NAME`` or ``valid_NAME``.
        subset: the set that is read.

    Raises:
        CommandError: what is given is neither a file nor a set.
    """
    found = {}
    for item in given:
        name, equals, what = item.partition("=")
        if not (name and equals and what):
            raise CommandError(f"`domain` must be NAME=FILE or NAME=SET, but is {item}.")
        if not Path(what).is_file() and not _sets(data, f"{what}."):
            raise CommandError(f"`domain` {item}: {what} is neither a file nor a set in {data}.")
        found[name] = what
    for start in () if found else dict.fromkeys((subset, "test", "valid")):
        names = [name[len(start) + 1 :].partition(".")[0] for name in _sets(data, f"{start}_")]
        found = {name: f"{start}_{name}" for name in names if name}
        if len(found) > 1:
            break
        found = {}
    return found


def _sets(data: str, start: str) -> List[str]:
    """Names of the indices in the folder of the data that start like this, in order."""
    names = (path.name for path in Path(data).iterdir())
    return sorted(name for name in names if name.startswith(start) and name.endswith(".idx"))


def inputs(reader: Reader, what: str) -> Iterator[Dict[str, Tensor]]:
    """Batches of a domain for the reader's model.

    Raises:
        CommandError: text that cannot be read, or whose pieces the dictionary does not know.
    """
    if Path(what).is_file():
        yield from _of_file(reader, what)
    else:
        for batch in batches(reader.cfg, reader.task, reader.model, what):
            yield batch["net_input"]


def _of_file(reader: Reader, path: str) -> Iterator[Dict[str, Tensor]]:
    dictionary = reader.task.source_dictionary
    encode = encoder(reader.data, dictionary)
    longest = min(_numbers(reader.model.max_positions()) or [512]) - 2
    sentences, unknown, total = [], 0, 0
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"`domain` {path} cannot be read ({error}): give text in UTF-8 that you may read."
        ) from error
    for line in lines:
        if line.strip():
            sentence = dictionary.encode_line(encode(line), add_if_not_exist=False).long()
            unknown, total = unknown + int((sentence == dictionary.unk()).sum()), total + len(sentence)
            # the end of the sentence stays its last token
            sentences.append(sentence if len(sentence) <= longest else sentence[-longest:])
    if not sentences or unknown > total / 2:
        raise CommandError(
            f"`domain` {path} has no text that the dictionary of the data knows: give text in the same "
            "language and, without spm.model beside the data, in the same pieces."
        )
    lengths = [len(sentence) for sentence in sentences]
    if reader.is_pair:
        dataset: Any = LanguagePairDataset(sentences, lengths, dictionary, shuffle=False)
    else:
        dataset = reader.task.build_dataset_for_inference(sentences, lengths)
    for first in range(0, len(dataset), _BATCH):
        batch = dataset.collater([dataset[i] for i in range(first, min(first + _BATCH, len(dataset)))])
        yield {key: batch["net_input"][key] for key in ("src_tokens", "src_lengths")}


def _numbers(limits: Any) -> List[int]:
    """The numbers in what ``max_positions`` of a model says."""
    if isinstance(limits, (tuple, list)):
        return [number for limit in limits for number in _numbers(limit)]
    return [] if limits is None else [int(limits)]


def encoder(data: str, dictionary: Any) -> Any:
    """What makes pieces of a line, in a string with spaces: SentencePiece's if the dictionary is.

    The model is looked for as ``spm.model``, or the only file that ends so, in the folder of the data and the
    one above.
    """
    if not any(symbol.startswith(SPACE) for symbol in dictionary.symbols):
        return lambda line: line
    folder = Path(data).resolve()
    models = [found for place in (folder, folder.parent) for found in sorted(place.glob("*.model"))]
    if not models:
        raise CommandError(
            f"`domain` needs the SentencePiece model of the data: put it into {data} as spm.model, or give "
            "NAME=SET of binarised data."
        )
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CommandError(
            "`domain` needs sentencepiece for text, which is not installed: pip install sentencepiece, or "
            "give NAME=SET of binarised data."
        ) from error
    model = SentencePieceProcessor(model_file=str(models[0]))
    return lambda line: " ".join(model.encode(line, out_type=str))


def loads(reader: Reader, domains: Dict[str, str], tokens: int, progress: Any) -> Dict[str, Dict[str, Any]]:
    """Load of each layer's experts on each domain, by the names of domain and layer."""
    return {name: reader.loads(inputs(reader, what), tokens, progress) for name, what in domains.items()}
