"""The file of ``--moe-trace N``: what experts did while they trained, a JSON object a line.

``moe_trace.jsonl`` lies beside the checkpoints.  Each line says in ``kind`` what it is.  Updates are counted
from 1; layers are named as in the model, such as ``decoder.layers.1``.

``run``, the first line, once:

=============  ==========================================================================================
``format``     1
``layers``     names of the MoE layers, in the order of the model
``probe``      the batch whose routing is told at each record; ``null`` if there is none
=============  ==========================================================================================

``probe`` has ``net_input``, what the model is given (nested lists), and ``tokens``: by stack (``encoder``,
``decoder``), the vocabulary indices that its layers route, sentence after sentence and without padding.

``update``, every N updates, once that update is made:

=============  ==========================================================================================
``update``     its number
``phase``      0: one expert; 1: the gate is dense; 2: the router's last stage
``temperature``  of the gate
``layers``     by name, see below
=============  ==========================================================================================

and of each layer, of the last batch of that update, over all ranks:

================  =======================================================================================
``load``          tokens of each expert; a token with several experts counts for each
``tokens``        tokens that were routed; with ``--moe-heads`` each is several
``assignments``   active pairs of a token and an expert, ``sum(load)``
``dropped``       pairs that a capacity left out
``gate_entropy``  nats, mean over tokens
``widths``        hidden units of each expert
``probe``         ``null`` with one expert or with slots instead of tokens
================  =======================================================================================

``probe`` of a layer says how it routes the probe batch, as in evaluation: ``expert``, the first choice of
each token in the order of the stack's ``tokens`` (-1: none), ``weight``, the mean weight of these, and
``drift``, the share of tokens whose first choice is another one than in the record before (``null`` in the
first one after experts have changed).

``experts``, when experts spawn, or come and go:

=============  ==========================================================================================
``update``     number of updates that had been made
``layers``     by name: ``parents``, the old expert that each new one comes from; ``widths``;
               ``generations``, how often the line of each expert has branched since the run began
=============  ==========================================================================================

A run that is resumed cuts off what was written after its checkpoint, and goes on.
"""

import json
import os
from typing import Any, Dict, Iterator, List

from .storage import TEMPORARY

NAME = "moe_trace.jsonl"
"""Of the file, in the folder of the checkpoints."""

FORMAT = 1

Record = Dict[str, Any]


def read(path: str) -> List[Record]:
    """The records of a file, in order; a last line that was not written to its end is left out.

    Args:
        path: of the file, or of the folder that it is in.

    Raises:
        OSError: there is none.
        ValueError: it is no such file, or of a later format.
    """
    path = os.path.join(path, NAME) if os.path.isdir(path) else path
    records = list(_whole_lines(path))
    if not records or records[0].get("kind") != "run":
        raise ValueError(f"{path} is no file of --moe-trace: its first line is not that of a run.")
    if records[0].get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {records[0].get('format')}, and this version of fairseq_evomoe reads "
            f"{FORMAT}: take a newer one."
        )
    return records


def _whole_lines(path: str) -> Iterator[Record]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):  # the process was killed
                    return
                raise ValueError(f"{path} is damaged: line {number} is no JSON.") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path} is damaged: line {number} is no JSON object.")
            yield record


class TraceFile:
    """Appends records to a file.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, NAME)

    def go_on(self, update: int) -> List[Record]:
        """Begin a file, or cut off what a run that goes on will write again.

        Args:
            update: number of updates that the run has made; 0: it begins.

        Returns:
            the records that are kept, the first of which is that of the run.

        Raises:
            OSError: it cannot be written.
            ValueError: there is another file of that name.
        """
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        there = update > 0 and os.path.exists(self.path)
        kept = [record for record in read(self.path) if _is_before(record, update)] if there else []
        temporary = self.path + TEMPORARY
        self._write(kept, temporary, "w")
        os.replace(temporary, self.path)
        return kept

    def append(self, record: Record) -> None:
        """Write a record, which other programs can read at once.

        Raises:
            OSError: it cannot be written.
        """
        self._write([record], self.path, "a")

    def _write(self, records: List[Record], path: str, mode: str) -> None:
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)


def _is_before(record: Record, update: int) -> bool:
    """Whether a run that goes on after an update does not write a record again."""
    if record["kind"] == "experts":  # which happens before the next update
        return record["update"] < update
    return record.get("update", 0) <= update
