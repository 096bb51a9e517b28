"""What the recommenders without gradient training share: checks of what they are asked, and their files.

A model folder holds `config.json` (kind, options, n_items, fingerprint of the data, SHA-256 of the weights) and
`model.safetensors`. The weights are written first, so a folder with a matching `config.json` is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from recollect.config import build, to_dict
from recollect.errors import InputError, ModelFileError
from recollect.io import read_json, sha256_file, write_arrays, write_json
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    import scipy.sparse

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def fitted_rows(dataset: Dataset, split: Split | None, rows: np.ndarray | None) -> np.ndarray | None:
    """The row mask (N,) a model is fitted on: `rows`, else the split's training rows, else None (every row)."""
    if rows is not None:
        return rows
    return None if split is None else split.train


def check_question(
    name: str, n_items: int, histories: Sequence[np.ndarray], candidates: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The histories in one array: items (E,) int64 and starts (B + 1,) int64.

    Raises:
        InputError: the model is not fitted (n_items 0), an item is not in 0..n_items-1, or `candidates` is not (B, C).
    """
    if n_items == 0:
        raise InputError(f"the model {name!r} is not fitted; call fit or from_pretrained first")
    lengths = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    items = np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64, copy=False)
    unknown = np.flatnonzero((items < 0) | (items >= n_items))
    if len(unknown):
        case = int(np.searchsorted(starts, unknown[0], side="right")) - 1
        raise InputError(
            f"history {case} holds item {int(items[unknown[0]])}, which the model {name!r} does not know: "
            f"it was fitted on items 0..{n_items - 1}; fit it on this data"
        )
    if candidates is not None:
        if candidates.ndim != 2 or len(candidates) != len(histories):
            raise InputError(f"candidates are {candidates.shape} where there are {len(histories)} histories")
        if candidates.size and (candidates.min() < 0 or candidates.max() >= n_items):
            raise InputError(
                f"candidates range over {candidates.min()}..{candidates.max()}, but the model {name!r} "
                f"was fitted on items 0..{n_items - 1}"
            )
    return items, starts


def distinct_rows(items: np.ndarray, starts: np.ndarray, n_items: int) -> scipy.sparse.csr_array:
    """Sparse (B, n_items) float32 with a 1 for each distinct item of a history."""
    import scipy.sparse

    rows = scipy.sparse.csr_array(
        (np.ones(len(items), dtype=np.float32), items, starts), shape=(len(starts) - 1, n_items)
    )
    rows.sum_duplicates()
    rows.data[:] = 1.0
    return rows


def train_matrix(dataset: Dataset, rows: np.ndarray | None, dtype: Any = np.float32) -> scipy.sparse.csr_array:
    """The binary training matrix (n_users, n_items): 1 where the user has the item, however often."""
    import scipy.sparse

    log = dataset.interactions if rows is None else dataset.interactions.take(rows)
    matrix = scipy.sparse.csr_array(
        (np.ones(len(log), dtype=dtype), (log.user, log.item)), shape=(dataset.n_users, dataset.n_items)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def of_candidates(scores: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
    """The candidates' columns (B, C) of scores (B, n_items), or all of them."""
    return scores if candidates is None else np.take_along_axis(scores, candidates, axis=1)


def save_folder(
    folder: str | Path, *, kind: str, options: Any, n_items: int, data: str, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a model folder (see the module's text).

    Raises:
        InputError: the model is not fitted.
        StorageRefused: the disk refused; `config.json` is as it was.
    """
    if n_items == 0:
        raise InputError(f"the model {kind!r} is not fitted; there is nothing to save")
    folder = Path(folder)
    write_arrays(folder / WEIGHTS_FILE, arrays)
    content = {
        "kind": kind,
        "options": to_dict(options),
        "n_items": n_items,
        "data_fingerprint": data,
        "weights_sha256": sha256_file(folder / WEIGHTS_FILE),
    }
    write_json(folder / CONFIG_FILE, content)


def load_folder(folder: str | Path, kind: str, config: type[Any]) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """Read a model folder of `kind`: its options as a `config`, the content of `config.json`, the arrays.

    Raises:
        ModelFileError: a file is missing, of another kind, malformed or not the one that was saved.
        ConfigError: its options are not legal ones of this version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    try:
        content = read_json(folder / CONFIG_FILE)
    except InputError as error:
        raise ModelFileError(f"{folder} holds no model: {error}") from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise ModelFileError(f"{folder} holds a model of kind {found!r} where {kind!r} is expected")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or sha256_file(weights) != content.get("weights_sha256"):
        raise ModelFileError(f"{weights} is missing or is not what {folder / CONFIG_FILE} was written with; fit again")
    try:
        arrays = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{weights} cannot be read: {error}") from error
    return build(config, content.get("options") or {}, str(folder / CONFIG_FILE)), content, arrays


class ClosedForm:
    """A recommender fitted without gradient steps; a model's file adds `fit`, `score` and its arrays.

    n_items: 0 until fitted.  data: fingerprint of what it was fitted on.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Any]]

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.n_items = 0
        self.data = ""

    def arrays(self) -> Mapping[str, np.ndarray]:
        """What fitting found, as it is stored."""
        raise NotImplementedError

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`; `n_items` is known."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (see the module's text).

        Raises:
            InputError: the model is not fitted.
        """
        arrays = self.arrays() if self.n_items else {}
        save_folder(folder, kind=self.name, options=self.config, n_items=self.n_items, data=self.data, arrays=arrays)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Inverse of `save_pretrained`."""
        config, content, arrays = load_folder(folder, cls.name, cls.config_class)
        model = cls(config)
        model.n_items, model.data = int(content["n_items"]), content["data_fingerprint"]
        model.take_arrays(arrays)
        return model


def sparse_arrays(matrix: scipy.sparse.csr_array) -> dict[str, np.ndarray]:
    """A sparse matrix as it is stored: data, indices, indptr."""
    return {
        "data": matrix.data,
        "indices": matrix.indices.astype(np.int32),
        "indptr": matrix.indptr.astype(np.int64),
    }


def square_of_arrays(arrays: Mapping[str, np.ndarray], n_items: int) -> scipy.sparse.csr_array:
    """Inverse of `sparse_arrays` for an item-item matrix."""
    import scipy.sparse

    return scipy.sparse.csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(n_items, n_items))
