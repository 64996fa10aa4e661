"""Raw text to fairseq's binary format: SentencePiece, a dictionary, ``fairseq-preprocess``."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import sentencepiece
from corpora.corpus import Kind
from stages import PrepareError, Settings, building, is_finished, say
from tqdm import tqdm

MODEL, DICTIONARY = "spm.model", "dict.txt"
SEED = 1
SENTENCES_TO_LEARN_FROM = 1_000_000
CHUNK = 10_000
SENTENCEPIECE_SPECIALS, FAIRSEQ_SPECIALS = 3, 4
"""<unk> <s> </s> there; <s> <pad> </s> <unk> here."""


def text_file(folder: Path, split: str, column: str) -> Path:
    """The file of one column of one split; monolingual text has one column, named ``""``."""
    return folder / (f"{split}.{column}" if column else split)


class Vocabulary:
    """A SentencePiece model and the fairseq dictionary of its pieces, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / MODEL
        self.dictionary = folder / DICTIONARY
        if not (self.model.is_file() and self.dictionary.is_file()):
            raise PrepareError(f"{folder.parent} is not a finished output folder of this command.")

    def fingerprint(self) -> str:
        """Changes when the model or the dictionary does."""
        return hashlib.sha256(self.model.read_bytes() + self.dictionary.read_bytes()).hexdigest()

    def __len__(self) -> int:
        """Entries of the dictionary as fairseq counts them, its four special symbols included."""
        return self.dictionary.read_text(encoding="utf-8").count("\n") + FAIRSEQ_SPECIALS


def lines_of(files: Sequence[Path]) -> Iterator[str]:
    """Lines of the files, one file after the other."""
    for file in files:
        with file.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\n")


def character_coverage(files: Sequence[Path], size: int) -> float:
    """Share of the text's characters that must be in a vocabulary of ``size`` pieces.

    All of them where they are few: SentencePiece's own default would make ``K`` and ``V`` unknown
    in Shakespeare, and capital umlauts in German. Its default where they are many, as in Chinese.
    """
    characters: set[str] = set()
    for line in lines_of(files):
        characters.update(line)
    return 1.0 if len(characters) <= size // 4 else 0.9995


def train_model(files: Sequence[Path], size: int, destination: Path) -> sentencepiece.SentencePieceProcessor:
    """Train a unigram SentencePiece model that gives a fairseq dictionary of ``size`` entries.

    Where the text cannot support that many pieces, the model has as many as it can. The same text
    gives the same model on every machine.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines_of(files),  # with file names, the model would hold their paths
            model_writer=model,
            vocab_size=size - FAIRSEQ_SPECIALS + SENTENCEPIECE_SPECIALS,
            hard_vocab_limit=False,
            input_sentence_size=SENTENCES_TO_LEARN_FROM,
            max_sentence_length=1 << 16,
            character_coverage=character_coverage(files, size),
            num_threads=4,  # constant, as it decides the order of floating-point sums
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2].rpartition("] ")[2]
        raise PrepareError(
            f"SentencePiece cannot learn --vocab-size {size} from this text; "
            f"try another size or more text ({reason})."
        ) from None
    destination.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model."""
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


def encode_file(
    model: sentencepiece.SentencePieceProcessor,
    source: Path,
    destination: Path,
    counts: Counter | None,
) -> None:
    """Write the pieces of each line, separated by spaces, and add their numbers to ``counts``."""
    progress = tqdm(desc=f"  {source.name}", unit=" lines", leave=False, disable=None)
    lines = source.open(encoding="utf-8", newline="\n")
    output = destination.open("w", encoding="utf-8", newline="\n")
    with progress, lines, output:
        for chunk in iter(lambda: list(islice(lines, CHUNK)), []):
            for pieces in model.encode([line.rstrip("\n") for line in chunk], out_type=str):
                output.write(" ".join(pieces) + "\n")
                if counts is not None:
                    counts.update(pieces)
            progress.update(len(chunk))


def dictionary_lines(model: sentencepiece.SentencePieceProcessor, counts: Counter) -> Iterator[str]:
    """``piece count`` of each piece that is not special, the most frequent in train first.

    fairseq adds its own special symbols, and its adaptive softmax relies on this order.
    """
    ids = range(model.get_piece_size())
    pieces = [model.id_to_piece(i) for i in ids if not (model.is_unknown(i) or model.is_control(i))]
    for piece in sorted(pieces, key=lambda piece: (-counts[piece], piece)):
        yield f"{piece} {counts[piece]}\n"


def encode(
    raw: Path,
    folder: Path,
    splits: Sequence[str],
    columns: Sequence[str],
    size: int,
    borrowed: Vocabulary | None,
    settings: Settings,
) -> Vocabulary:
    """The stage from raw text to pieces: learn or borrow a vocabulary, and encode with it.

    Args:
        raw: folder of the raw text.
        folder: folder of this stage; the vocabulary is in it too.
        splits: splits there are.
        columns: columns to encode.
        size: entries wanted in the dictionary.
        borrowed: another folder's vocabulary, to use instead of learning one.
        settings: everything the result depends on.
    """
    if is_finished(folder, settings):
        say("[2/3] vocabulary and pieces: already done")
        return Vocabulary(folder)
    say("[2/3] vocabulary and pieces")
    with building(folder, settings) as partial:
        if borrowed:
            shutil.copyfile(borrowed.model, partial / MODEL)
            shutil.copyfile(borrowed.dictionary, partial / DICTIONARY)
            model = load_model(partial / MODEL)
        else:
            files = [text_file(raw, "train", column) for column in columns]
            model = train_model(files, size, partial / MODEL)
        counts: Counter = Counter()
        for split in splits:
            for column in columns:
                source, encoded = (text_file(place, split, column) for place in (raw, partial))
                encode_file(model, source, encoded, counts if split == "train" else None)
        if not borrowed:
            lines = list(dictionary_lines(model, counts))
            with (partial / DICTIONARY).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            found = len(lines) + FAIRSEQ_SPECIALS
            if found < size:
                say(f"  this text supports {found} of the {size} entries asked for")
    return Vocabulary(folder)


def write_label_dictionary(raw: Path, splits: Sequence[str], destination: Path) -> int:
    """Write fairseq's dictionary of the labels, in alphabetical order: class 0 is the first.

    Returns:
        the number of classes.

    Raises:
        PrepareError: a held-out split has a label that train does not have.
    """
    counts = {
        split: Counter(text_file(raw, split, "label").read_text(encoding="utf-8").split("\n")[:-1])
        for split in splits
    }
    for split in splits:
        unknown = sorted(counts[split].keys() - counts["train"].keys())
        if unknown:
            raise PrepareError(f"The label {unknown[0]!r} is in {split} but not in train.")
    lines = [f"{label} {number}\n" for label, number in sorted(counts["train"].items())]
    destination.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def fairseq_preprocess(
    dictionary: Path, prefixes: Sequence[str], destination: Path, workers: int, options: list[str]
) -> None:
    """Run ``fairseq-preprocess``; what it logs goes to ``preprocess.log`` in the destination.

    Args:
        dictionary: passed as ``--srcdict``.
        prefixes: of train, valid and perhaps test; of further test sets after that.
        destination: passed as ``--destdir``.
        workers: processes to use.
        options: further options.
    """
    # Takes seconds to import, which an error found earlier should not cost.
    root = logging.getLogger("fairseq")
    level = root.level
    root.setLevel(logging.WARNING)  # optional packages that we do not need
    try:
        from fairseq.options import get_preprocessing_parser
        from fairseq_cli import preprocess
    finally:
        root.setLevel(level)

    arguments = [*options, "--workers", str(workers)]
    arguments += ["--srcdict", str(dictionary), "--destdir", str(destination)]
    for option, prefix in zip(("--trainpref", "--validpref"), prefixes):
        arguments += [option, prefix]
    if prefixes[2:]:
        arguments += ["--testpref", ",".join(prefixes[2:])]
    preprocess.logger.propagate = False
    try:
        preprocess.main(get_preprocessing_parser().parse_args(arguments))
    finally:
        preprocess.logger.propagate = True
        for handler in list(preprocess.logger.handlers):  # each run adds one
            preprocess.logger.removeHandler(handler)
            handler.close()
    for number, prefix in enumerate(prefixes[3:], start=1):
        for file in destination.glob(f"test{number}.*"):  # fairseq numbers them: give them their names
            file.rename(file.with_name(Path(prefix).name + file.name[len(f"test{number}") :]))


def binarize(
    kind: Kind,
    raw: Path,
    encoded: Path,
    folder: Path,
    splits: Sequence[str],
    columns: Sequence[str],
    workers: int,
    settings: Settings,
) -> None:
    """The stage from pieces to fairseq's binary format, in the layout of the task that reads it.

    Args:
        kind: what the corpus is for.
        raw: folder of the raw text, for the labels.
        encoded: folder of the pieces and the dictionary.
        folder: folder of this stage.
        splits: splits there are.
        columns: ``("",)``, ``(source, target)`` or ``("label", "input0")``.
        workers: processes to use.
        settings: everything the result depends on.
    """
    if is_finished(folder, settings):
        say("[3/3] fairseq-preprocess: already done")
        return
    say("[3/3] fairseq-preprocess")
    dictionary = encoded / DICTIONARY
    with building(folder, settings) as partial:
        if kind is Kind.LABELLED:
            labels = partial / "labels.txt"
            write_label_dictionary(raw, splits, labels)
            for column, place, words in (("label", raw, labels), ("input0", encoded, dictionary)):
                prefixes = [str(text_file(place, split, column)) for split in splits]
                fairseq_preprocess(words, prefixes, partial / column, workers, ["--only-source"])
            labels.unlink()
            return
        options = ["--only-source"]
        if kind is Kind.BITEXT:
            source, target = columns
            options = ["--source-lang", source, "--target-lang", target, "--joined-dictionary"]
        prefixes = [str(encoded / split) for split in splits]
        fairseq_preprocess(dictionary, prefixes, partial, workers, options)
