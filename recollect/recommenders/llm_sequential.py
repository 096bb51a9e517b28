"""An LLM-centric next-item recommender in the form of E4SRec (arXiv 2312.02443), the LLM side of LLMD4Rec.

A decoder reads the item vectors of a conventional model in place of words and one linear layer turns its last hidden
state into scores of all items; LoRA adapters and the two linear maps are trained (`recollect.recommenders.llm_module`).

Ours, beside the paper: dense supervision (every position of a history predicts the next item in one pass, no response
marker), a decoder cut to its first blocks, an added text vector per item, an output layer that starts from text.
Not covered: quantised bases, adapters other than LoRA.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recollect.backbones.resolve import decoder_folder
from recollect.config import to_dict
from recollect.data.examples import Sequences, held_out_cases, training_sequences
from recollect.errors import ConfigError, InputError, ModelFileError
from recollect.eval.protocol import data_fingerprint
from recollect.io import atomic_open, canonical_json, disk_errors, read_json, sha256_file, sha256_text, write_json
from recollect.loop import LoopResult, train
from recollect.progress import Progress
from recollect.recommenders.closed_form import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_question,
    fitted_rows,
    load_folder,
    of_candidates,
)
from recollect.recommenders.layers import Dropout
from recollect.recommenders.llm_batches import (
    LlmBatch,
    LlmTrainingBatches,
    left_padded,
)
from recollect.recommenders.llm_config import LlmConfig
from recollect.recommenders.llm_module import (
    LlmModule,
    best_precision,
    load_trunk,
    semantic_head,
    token_ids,
)
from recollect.recommenders.losses import cross_entropy
from recollect.recommenders.neural import SCORE_CELLS, training_identity, validation_ndcg
from recollect.rng import call_seed
from recollect.types import Dataset, Split

ADAPTER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
SCORE_POSITIONS = 4096  # history positions read at a time
SCORE_POSITIONS_ON_CPU = 1600  # more leave the cache


class LlmSequential:
    """The LLM recommender; see the module's text.

    Args:
        config: options.
        item_embedding: (n_items, d) vectors of a fitted conventional model; None fits a SASRec first, as E4SRec does.

    Attributes:
        module: the network; None before `build`, `fit` or `from_pretrained`.
        result: how training went; None for a loaded model.
    """

    name: ClassVar[str] = "llm"

    def __init__(self, config: LlmConfig | None = None, *, item_embedding: np.ndarray | None = None) -> None:
        self.config = LlmConfig() if config is None else config
        self.n_items = 0
        self.data = ""
        self.base_fingerprint = ""
        self.module: LlmModule | None = None
        self.result: LoopResult | None = None
        self._item_embedding = item_embedding

    def build(self, dataset: Dataset, item_embedding: np.ndarray) -> Self:
        """Give this model fresh weights (of the config's seed) over a data set's items, without training.

        Raises:
            InputError: the item vectors are not one per item of the data set.
            ModelFileError: the base cannot be had or loaded.
        """
        if item_embedding.ndim != 2 or len(item_embedding) != dataset.n_items:
            raise InputError(
                f"item vectors are {item_embedding.shape} where {dataset.name!r} has {dataset.n_items} items; "
                "they must come from a model of the same data"
            )
        texts = {name: _text_vectors(dataset, name) for name in {self.config.text, self.config.semantic_init} - {None}}
        embedding = torch.from_numpy(np.array(item_embedding, dtype=np.float32))
        text = texts.get(self.config.text)
        self._assemble(embedding, text, decoder_folder(self.config.base), None)
        assert self.module is not None
        if self.config.semantic_init is not None:
            generator = torch.Generator().manual_seed(call_seed(self.config.seed, "llm", "semantic head"))
            head = semantic_head(texts[self.config.semantic_init], self.module.head.in_features, generator)
            with torch.no_grad():
                self.module.head.weight.copy_(head)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def _assemble(self, embedding: Tensor, text: Tensor | None, base: Path, adapter: Path | None) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(call_seed(self.config.seed, "llm", "initial weights"))
            trunk, _ = load_trunk(base, self.config.keep_layers)
            if adapter is None:
                adapted = _with_adapter(trunk, self.config)
            else:
                adapted = PeftModel.from_pretrained(trunk, str(adapter), is_trainable=True)
            for layer in adapted.modules():
                if isinstance(layer, LoraLayer):
                    # Cheaper on a CPU, the same function: dropout by random bytes, and no copy to float32 that
                    # autocast would undo at once (together a fifth of a step's time).
                    layer.lora_dropout["default"] = Dropout(self.config.lora_dropout)
                    layer.cast_input_dtype_enabled = False
            if best_precision(self.config.precision, torch.device("cpu")) == "bf16":
                _keep_in_bf16(adapted)
            self.base_fingerprint = _fingerprint(base)
            self.module = LlmModule(
                adapted, *token_ids(base), embedding, text, self.config.supervision, self.config.precision
            )
        self.module.eval()

    def to(self, device: str | torch.device) -> Self:
        """This model on another device."""
        assert self.module is not None
        torch.nn.Module.to(self.module, device)  # in place
        return self

    def batches(self, sequences: Sequences, seed: int | None = None) -> LlmTrainingBatches:
        """The training batches of some sequences."""
        return LlmTrainingBatches(
            sequences,
            supervision=self.config.supervision,
            max_length=self.config.max_length,
            batch_size=self.config.batch_size,
            seed=self.config.seed if seed is None else seed,
        )

    def fit(
        self,
        dataset: Dataset,
        split: Split | None = None,
        *,
        rows: np.ndarray | None = None,
        folder: Path | None = None,
        checkpoint_every: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train with cross-entropy alone; with a split, keep the epoch best on validation NDCG@10.

        Args:
            folder: where checkpoints live; a run found there is continued.
            checkpoint_every: optimiser steps between checkpoints inside an epoch.

        Raises:
            InputError: no sequence is long enough.  TrainingDiverged: a loss became NaN or infinite.
        """
        rows = fitted_rows(dataset, split, rows)
        sequences = training_sequences(dataset, rows)
        batches = self.batches(sequences)
        if self._item_embedding is None:
            from recollect.recommenders.configs import SASRecConfig
            from recollect.recommenders.sasrec import SASRec

            own = None if folder is None else folder / "sasrec"
            first = SASRec(SASRecConfig(seed=self.config.seed)).fit(
                dataset, split, rows=rows, folder=own, progress=progress
            )
            self._item_embedding = first.module.item_vectors().detach().cpu().numpy()
        self.build(dataset, self._item_embedding)
        module: LlmModule = self.module  # type: ignore[assignment]  # build made it
        cases = None if split is None else held_out_cases(dataset, split, "valid")

        def loss(batch: LlmBatch) -> Tensor:
            assert batch.targets is not None
            return cross_entropy(module.states(batch), module.head.weight, batch.targets)

        self.result = train(
            module,
            batches=batches,
            loss=loss,
            config=self.config.loop(),
            validate=None if cases is None or not len(cases) else lambda: validation_ndcg(self, cases),  # type: ignore[arg-type]
            folder=folder,
            checkpoint_every=checkpoint_every,
            progress=progress,
            identity={
                **training_identity(self, sequences, cases, self._item_embedding),
                "base_fingerprint": self.base_fingerprint,
            },
        )
        return self

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """h (B, D) float32 of each history, which is cut to its last `max_length` items; eval mode, no gradient."""
        assert self.module is not None
        module = self.module.eval()
        head = module.head.weight
        states = head.new_zeros((len(histories), head.shape[1]))
        cut = [np.asarray(history)[-self.config.max_length :] for history in histories]
        order = sorted(range(len(cut)), key=lambda row: -len(cut[row]))
        at_once = SCORE_POSITIONS_ON_CPU if head.device.type == "cpu" else SCORE_POSITIONS
        low = 0
        with torch.inference_mode():
            while low < len(order):
                high = low + max(1, at_once // max(1, len(cut[order[low]])))
                rows = order[low:high]
                items, real = left_padded([cut[row] for row in rows])
                states[rows] = module.states(LlmBatch(items, real, None, None, None).to(head.device))
                low = high
        return states

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32 logits.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        check_question(self.name, self.n_items, histories, candidates)
        assert self.module is not None
        with torch.inference_mode():
            scores = (self.user_states(histories) @ self.module.head.weight.T).cpu().numpy()
        return of_candidates(scores, candidates)

    def score_batches(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
        """Full-catalogue scores (C, n_items) of consecutive histories, never all at once, as (rows, scores)."""
        assert self.module is not None
        states = self.user_states(histories)
        rows = max(1, SCORE_CELLS // self.n_items)
        for low in range(0, len(histories), rows):
            part = slice(low, min(low + rows, len(histories)))
            with torch.inference_mode():
                scores = (states[part] @ self.module.head.weight.T).cpu().numpy()
            yield part, scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, the heads and item vectors as `model.safetensors`, and `adapter/` in PEFT's format.

        `config.json` is written last and holds the hashes of the rest and of the base; the base itself is not copied.

        Raises:
            InputError: the model is not fitted.  StorageRefused: the disk refused.
        """
        from safetensors.torch import save

        if self.module is None:
            raise InputError(f"the model {self.name!r} is not fitted; there is nothing to save")
        folder = Path(folder)
        heads = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.module.state_dict().items()
            if not name.startswith("trunk.")
        }
        with disk_errors(folder):
            (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".adapter.", dir=folder) as scratch:
                trunk: Any = self.module.trunk
                trunk.peft_config["default"].base_model_name_or_path = self.config.base
                trunk.save_pretrained(scratch, save_embedding_layers=False)
                for name in ("adapter_config.json", ADAPTER_FILE):
                    os.replace(Path(scratch) / name, folder / ADAPTER / name)
        with atomic_open(folder / WEIGHTS_FILE, "wb") as handle:
            handle.write(save(heads))
        content = {
            "kind": self.name,
            "options": to_dict(self.config),
            "n_items": self.n_items,
            "data_fingerprint": self.data,
            "base": {"name": self.config.base, "fingerprint": self.base_fingerprint},
            "weights_sha256": sha256_file(folder / WEIGHTS_FILE),
            "adapter_sha256": sha256_file(folder / ADAPTER / ADAPTER_FILE),
        }
        write_json(folder / CONFIG_FILE, content)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: str | None = None) -> Self:
        """The inverse of `save_pretrained`; scores are identical after the round trip.

        Args:
            base: where the base is now, if not where the saved configuration says.

        Raises:
            ModelFileError: a file is missing or changed, or the adapter was trained on another base.
        """
        folder = Path(folder)
        config, content, arrays = load_folder(folder, cls.name, LlmConfig)
        adapter = folder / ADAPTER
        if not (adapter / ADAPTER_FILE).is_file() or sha256_file(adapter / ADAPTER_FILE) != content["adapter_sha256"]:
            raise ModelFileError(
                f"{adapter} is missing or is not what {folder / CONFIG_FILE} was written with; fit again"
            )
        where = base or content["base"]["name"]
        found = decoder_folder(where)
        if _fingerprint(found) != content["base"]["fingerprint"]:
            raise ModelFileError(
                f"the adapter in {folder} was trained on the base {content['base']['name']!r} "
                f"({content['base']['fingerprint'][:12]}…), not on {where!r} ({_fingerprint(found)[:12]}…); "
                "give its own base"
            )
        _require_adapter_fits(adapter, config)
        model = cls(config)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        model._assemble(tensors["embedding"], tensors.get("text"), found, adapter)
        assert model.module is not None
        missing, unexpected = model.module.load_state_dict(tensors, strict=False)
        lost = [name for name in missing if not name.startswith("trunk.")]
        if lost or unexpected:
            raise ModelFileError(
                f"{folder} does not hold the weights its config.json describes: {(lost or unexpected)[0]!r}"
            )
        model.n_items, model.data = int(content["n_items"]), str(content["data_fingerprint"])
        return model


def _keep_in_bf16(trunk: torch.nn.Module) -> None:
    """Round frozen linear weights to bfloat16 once, as autocast would at every pass (a quarter of a step's time).

    So are the blocks' other weights (norms) where nothing is lost by it, which saves the products after them a copy.
    Scores and gradients stay the same to the last bit; the last norm and word vectors stay in float32.
    """
    for layer in trunk.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    for name, weight in trunk.named_parameters():
        rounded = weight.data.to(torch.bfloat16)
        if weight.ndim == 1 and ".layers." in name and not weight.requires_grad and torch.equal(rounded, weight.data):
            weight.data = rounded


def _with_adapter(trunk: Any, config: LlmConfig) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    options = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
    )
    try:
        return get_peft_model(trunk, options)
    except ValueError as error:
        kinds = sorted(
            {name.rpartition(".")[2] for name, layer in trunk.named_modules() if isinstance(layer, torch.nn.Linear)}
        )
        raise ConfigError(
            f"lora_targets {', '.join(config.lora_targets)!r} do not fit this base; its linear layers are: "
            f"{', '.join(kinds) or 'none'}"
        ) from error


def _require_adapter_fits(adapter: Path, config: LlmConfig) -> None:
    content = read_json(adapter / "adapter_config.json")
    if content.get("peft_type") != "LORA" or content.get("base_model_name_or_path") != config.base:
        raise ModelFileError(
            f"{adapter} is a {content.get('peft_type')!r} adapter of {content.get('base_model_name_or_path')!r} where "
            f"a LoRA adapter of {config.base!r} is expected"
        )


def _fingerprint(base: Path) -> str:
    from recollect.backbones.store import check_folder

    return sha256_text(canonical_json(check_folder(base)))


def _text_vectors(dataset: Dataset, embedder: str | None) -> Tensor:
    from recollect.recommenders.text import item_vectors

    assert embedder is not None
    return torch.from_numpy(np.array(item_vectors(dataset, embedder), dtype=np.float32))
