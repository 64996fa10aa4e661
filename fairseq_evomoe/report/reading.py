"""Run a checkpoint's model on text, as in evaluation and on the CPU, and write down what its layers do."""

import re
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.models import FairseqEncoderDecoderModel
from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints import recovery
from ..checkpoints.files import CommandError, load
from ..checkpoints.observe import batches
from ..evolution.merge import output_products, weight_similarity
from ..models.layers import moe_layers
from ..moe import MoELayer, Router, Routing, record
from ..moe.recorder import open_records
from .sample import Array, Choices, LayerSample, Sample, Text

ROWS_OF_ALL = 1024
"""Rows that all experts of a layer are applied to, to compare their outputs."""
_CHUNK = 64


class _Watch:
    """Writes down what a layer reads and how it routes it, until there are enough tokens."""

    def __init__(self, name: str, moe: MoELayer) -> None:
        self.name, self.moe = name, moe
        self.side = name.split(".")[0]
        self.heads = 1 if moe.heads is None else moe.heads.heads
        self.reset()
        self.compared = torch.zeros(moe.num_experts, moe.num_experts, dtype=torch.float64)
        self.compared_rows = 0
        moe.register_forward_hook(self._read)
        if moe.router is not None and not moe.router.passes:
            moe.router.register_forward_hook(self._route)

    def reset(self) -> None:
        """Forget what was seen, but for the experts' outputs."""
        self.tokens = self.rows = self.sequences = self.dropped = 0
        self.text: List[Tuple[Array, Array]] = []
        self.pairs: List[Tuple[Array, Array, Array]] = []
        self.confidence: List[Array] = []
        self.entropy = 0.0
        self.has_entropy = self.soft = False

    def _read(self, moe: MoELayer, inputs: Tuple[Any, ...], output: Tensor) -> None:
        x, _, padding_mask, tokens, sequences, *_ = inputs
        if tokens is None:
            raise CommandError(
                "The layers of the checkpoint's model do not see tokens: nothing can be said of them."
            )
        kept = slice(None) if padding_mask is None else ~padding_mask
        token_T, sequence_T = tokens[kept].flatten(), sequences[kept].flatten()
        self.text.append(
            (token_T.numpy().astype(np.int32), (sequence_T + self.sequences).numpy().astype(np.int32))
        )
        self.sequences += tokens.shape[0]
        self.tokens += len(token_T)
        if moe.router is not None and moe.router.passes:  # what its passes were together is in the record
            self._route(moe.router, (x[kept].reshape(-1, x.shape[-1]),), open_records()[-1][moe])

    def _route(self, router: Router, inputs: Tuple[Any, ...], routing: Routing) -> None:
        x_TD = inputs[0]
        row_N, expert_N, weight_N = routing.token_N, routing.expert_N, routing.weight_N
        if routing.slots is not None:
            self.soft = True
            assert routing.probability_TE is not None
            weight_N = routing.probability_TE.flatten()
            row_N = torch.arange(x_TD.shape[0]).repeat_interleave(routing.experts)
            expert_N = torch.arange(routing.experts).repeat(x_TD.shape[0])
        first = self.rows
        self.rows += x_TD.shape[0]
        pair = (first + row_N).numpy().astype(np.int32), expert_N.numpy().astype(np.int32)
        self.pairs.append((*pair, weight_N.float().numpy().copy()))
        self.dropped += int(routing.dropped)
        if routing.probability_TE is not None:
            self.confidence.append(routing.probability_TE.max(1).values.float().numpy())
        if routing.gate_entropy is not None:
            self.has_entropy = True
            self.entropy += float(routing.gate_entropy)
        self._compare(x_TD if routing.slots is None else routing.slots.mix(x_TD))

    def _compare(self, x_TD: Tensor) -> None:
        experts = self.moe.num_experts
        for part_TD in x_TD[: max(ROWS_OF_ALL - self.compared_rows, 0)].split(_CHUNK):
            rows = part_TD.shape[0]
            y_ETD = self.moe.experts(part_TD.repeat(experts, 1), [rows] * experts).view(
                experts, rows, part_TD.shape[1]
            )
            self.compared += output_products(y_ETD)
            self.compared_rows += rows

    def choices(self) -> Choices:
        assert self.moe.router is not None
        row_N, expert_N, weight_N = (np.concatenate(part) for part in zip(*self.pairs))
        return Choices.of(self.rows, self.moe.router.experts, row_N, expert_N, weight_N)

    def sample(self) -> LayerSample:
        moe, router = self.moe, self.moe.router
        free = 0 if router is None else router.free_experts
        sample = LayerSample(
            name=self.name,
            side=self.side,
            names=[str(e) for e in range(moe.num_experts if router is not None else 1)] + _free_names(router),
            widths=list(moe.experts.widths) + [0] * free,
            parameters=moe.experts.parameters_of_each() + [0] * free,
            parameters_of_all=_parameters_of_all(moe),
            heads=self.heads,
            tensors=moe.experts.tensors(),
        )
        if router is None:
            return sample
        sample.choices, sample.soft, sample.dropped = self.choices(), self.soft, self.dropped
        if self.confidence:
            sample.confidence_T = np.concatenate(self.confidence)
        if self.has_entropy:
            sample.gate_entropy = self.entropy / max(self.rows, 1)
        sample.similarity_of_weights = weight_similarity(sample.tensors, moe.experts.widths).numpy()
        sample.similarity_of_outputs = (self.compared / max(self.compared_rows, 1)).numpy()
        return sample


def _free_names(router: Optional[Router]) -> List[str]:
    free = getattr(router, "free", None)
    if free is None:
        return []
    kinds = [("zero", free.zero), ("copy", free.copy), ("constant", free.constant)]
    return [f"{kind} {i}" if count > 1 else kind for kind, count in kinds for i in range(count)]


def _parameters_of_all(moe: MoELayer) -> int:
    total = sum(p.numel() for p in moe.parameters()) - sum(
        p.numel() for p in moe.experts.parameters(recurse=False)
    )
    return total - sum(table.numel() for table in (moe.router.tables if moe.router is not None else ()))


@contextmanager
def refusals(path: str, data: str) -> Iterator[None]:
    """Let what goes wrong within, for want of a file or with another dictionary, be a sentence."""
    try:
        yield
    except (CommandError, *recovery.UNUSABLE):
        raise
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if "size mismatch" in text:
            text = "its dictionary has another size than that of the data, or the file is of another model"
        if isinstance(error, FileNotFoundError) and re.search(r"dict(\.[^/]+)?\.txt$", str(error.filename)):
            text = f"there is no {error.filename}; give the folder that fairseq-preprocess made for it"
        raise CommandError(f"{path} cannot be run on `data` {data}: {text}.") from error


class Reader:
    """A model, ready to read.

    Args:
        path: of its checkpoint.
        data: folder of binarised data for its task.
        cfg: fairseq's configuration of it.
        task: fairseq's task, with that data.
        model: fairseq's model, which is put into evaluation.

    Raises:
        CommandError: a dense model.
    """

    def __init__(self, path: str, data: str, cfg: Any, task: Any, model: Any) -> None:
        self.path, self.data = path, data
        self.cfg, self.task, self.model = cfg, task, model.eval()
        self.watches = [_Watch(name, layer.moe) for name, layer in moe_layers(model)]
        if not self.watches:
            raise CommandError(
                f"{path} has no MoE layers, only dense ones, perhaps with low-rank experts beside them: "
                "there is no routing to report on."
            )

    @classmethod
    def of_checkpoint(cls, path: str, data: str) -> "Reader":
        """The model of a checkpoint, in one file or the first of several.

        Raises:
            CommandError: no checkpoint, a dense one, or data of another dictionary.
            DamagedCheckpoint: it is not whole, or holds something that no checkpoint needs.
        """
        load(path)  # which executes nothing, as fairseq's own loading does with an old torch
        with refusals(path, data):
            models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
                [path], arg_overrides={"data": data}
            )
        return cls(path, data, cfg, task, models[0])

    def read(self, subset: str, tokens: int, progress: Any, update: int = 0) -> Sample:
        """Run the model on a part of the data.

        Args:
            subset: ``valid``, ``test``, ...
            tokens: how many of each layer are enough.
            progress: told how many tokens were read, by ``update``.
            update: number of updates that the model has made.
        """
        with refusals(self.path, self.data):
            self._run(
                (batch["net_input"] for batch in batches(self.cfg, self.task, self.model, subset)),
                tokens,
                progress,
            )
        texts: Dict[str, Text] = {}
        for watch in self.watches:
            if watch.tokens == 0:
                raise CommandError(f"The data gave {watch.name} no tokens: choose another `subset`.")
            if watch.side not in texts:
                texts[watch.side] = self._text(watch)
        return Sample(
            path=self.path,
            update=update,
            task=str(getattr(self.cfg.task, "_name", "")),
            router=str(getattr(self.cfg.model, "moe_router", "") or "dts"),
            options=_options(self.cfg),
            texts=texts,
            layers=[watch.sample() for watch in self.watches],
            parameters=sum(p.numel() for p in self.model.parameters()),
        )

    def loads(self, inputs: Iterable[Dict[str, Tensor]], tokens: int, progress: Any) -> Dict[str, Array]:
        """Load of the experts of each spawned layer on other text, by the layer's name."""
        for watch in self.watches:
            watch.reset()
        with refusals(self.path, self.data):
            self._run(inputs, tokens, progress)
        return {watch.name: watch.choices().load_E for watch in self.watches if watch.pairs}

    @torch.no_grad()
    def _run(self, inputs: Iterable[Dict[str, Tensor]], tokens: int, progress: Any) -> None:
        for net_input in inputs:
            before = max(watch.tokens for watch in self.watches)
            with record():  # or else routers leave out what only statistics need
                self._forward(net_input)
            progress.update(max(watch.tokens for watch in self.watches) - before)
            if min(watch.tokens for watch in self._reached) >= tokens:
                break

    @property
    def _reached(self) -> List[_Watch]:
        """The layers that read anything: of translation only the encoder's, if there is no target."""
        return [watch for watch in self.watches if watch.tokens] or self.watches

    def _forward(self, net_input: Dict[str, Tensor]) -> None:
        if self.is_pair and "prev_output_tokens" not in net_input:  # text of the source side alone
            self.model.encoder(net_input["src_tokens"], src_lengths=net_input["src_lengths"])
        else:
            self.model(**net_input, features_only=True)  # without the product with the whole vocabulary

    @property
    def is_pair(self) -> bool:
        """Whether the model is a pair of encoder and decoder, as for translation."""
        return isinstance(self.model, FairseqEncoderDecoderModel)

    def _text(self, watch: _Watch) -> Text:
        dictionary = self.dictionary(watch.side)
        token_T, sequence_T = (np.concatenate(part) for part in zip(*watch.text))
        first_T = np.ones(len(token_T), dtype=bool)
        first_T[1:] = sequence_T[1:] != sequence_T[:-1]
        starts = np.flatnonzero(first_T)
        position_T = np.arange(len(token_T)) - starts[np.cumsum(first_T) - 1]
        return Text(
            symbols=list(dictionary.symbols),
            count_V=np.array(dictionary.count, dtype=np.int64),
            boundaries=[dictionary.bos(), dictionary.eos()],
            token_T=token_T,
            sequence_T=sequence_T,
            position_T=position_T.astype(np.int32),
        )

    def dictionary(self, side: str) -> Any:
        """fairseq's dictionary of what a stack reads."""
        target = side == "decoder" and self.is_pair
        return self.task.target_dictionary if target else self.task.source_dictionary


def update_of(state: Dict[str, Any]) -> int:
    """How many updates a checkpoint has made."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def _options(cfg: Any) -> Dict[str, Any]:
    """The options of a run that say what was trained and how, as plain values."""
    found: Dict[str, Any] = {}
    for part in (
        "model",
        "task",
        "criterion",
        "optimizer",
        "lr_scheduler",
        "optimization",
        "dataset",
        "common",
    ):
        values = cfg.get(part) if hasattr(cfg, "get") else None
        values = (
            OmegaConf.to_container(values) if OmegaConf.is_config(values) else vars(values) if values else {}
        )
        for name, value in (values or {}).items():
            value = getattr(value, "value", value)
            if name != "data" and (value is None or isinstance(value, (str, int, float, bool, list))):
                found.setdefault(name, value)
    return found
