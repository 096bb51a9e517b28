"""From DATA to items with vectors: the log and catalogue as filtered, or an .npy file, then the vectors themselves.

Two steps, because the second may cost minutes of embedding: a plan and the check of a run folder need only the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recollect.data import fingerprint as data_fingerprint
from recollect.data import k_core, leave_one_out, load_dataset
from recollect.errors import ConfigError, InputError, ResumeRefused
from recollect.io import canonical_json, sha256_file, sha256_text, write_json
from recollect.progress import Progress
from recollect.tokenize.embeddings import (
    Items,
    catalogue_rows,
    items_of_dataset,
    items_of_file,
    read_item_ids,
    read_vectors,
)
from recollect.tokenize.fit_inputs import fit_mask, fit_weight
from recollect.tokenize.protocol import check_embeddings, fit_rows
from recollect.tokenize.run_config import BenchConfig, ItemOptions, TokenizeConfig
from recollect.tokenize.tables import written_table
from recollect.types import Dataset, Split

_BLOCK = 16384


@dataclass(frozen=True)
class Source:
    """Where items come from: a data set with its leave-one-out split, or an .npy file.

    fingerprint: of the log's triples, or of the file's bytes.
    """

    name: str
    n_items: int
    fingerprint: str
    dataset: Dataset | None = None
    split: Split | None = None
    file: Path | None = None


def open_source(data: str | Path | Dataset, config: ItemOptions, *, core: int, seed: int) -> Source:
    """Read and filter the data; vectors are not looked at, but an .npy file must be one.

    Raises:
        InputError: the data cannot be read, or nothing is left.
    """
    if not isinstance(data, Dataset) and config.is_file:
        path = Path(config.data)
        vectors = read_vectors(path)
        return Source(path.stem, len(vectors), sha256_file(path), file=path)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, seed=seed)
    if core > 1:
        dataset = k_core(dataset, core)
    print_of = data_fingerprint(dataset)
    dataset = replace(dataset, meta={**dataset.meta, "fingerprint": print_of})
    return Source(dataset.name, dataset.n_items, print_of, dataset=dataset, split=leave_one_out(dataset))


def open_items(
    source: Source,
    config: TokenizeConfig | BenchConfig,
    out: Path,
    *,
    progress: Progress,
) -> Items:
    """The items with their vectors; embeds what `out` does not hold yet.

    Raises:
        InputError: no text to embed, or vectors that do not fit the items.
    """
    if source.file is not None:
        return items_of_file(source.file, config.item_ids)
    assert source.dataset is not None
    assert source.split is not None
    return items_of_dataset(
        source.dataset,
        source.split,
        out,
        embedder=config.embedder,
        vectors=config.vectors,
        vector_ids=config.item_ids,
        progress=progress,
    )


def check_vectors(source: Source, config: TokenizeConfig | BenchConfig, codes: int) -> None:
    """Refuse items that no codebook of `codes` codes can be fitted on, before anything is embedded or written.

    Of texts only their number is known yet; vectors that are given are read.

    Raises:
        InputError: fewer items than codes; bad vectors or ids; the message names the file.
    """
    if source.n_items < codes:
        raise InputError(
            f"{source.n_items} items cannot fill a codebook of {codes} codes; use --codebook-size {source.n_items} or "
            "fewer"
        )
    file = source.file or config.vectors
    if file is None:
        return
    vectors = read_vectors(file)
    names = None if config.item_ids is None else read_item_ids(config.item_ids, len(vectors))
    if source.dataset is not None:
        catalogue_rows(source.dataset, len(vectors), names, file)
    try:
        check_embeddings(vectors, 1, names=names)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def keep_vectors(manifest: dict[str, Any], items: Items, out: Path) -> None:
    """Write into the `run.json` of `out`, whose content `manifest` is, which vectors the run is made of.

    Raises:
        ResumeRefused: what `out` holds was made of other vectors, or of items with other ids.
    """
    if manifest.get("vectors_sha256") not in (None, items.fingerprint):
        raise ResumeRefused(
            f"the run in {out} was made of other item vectors or ids; give the same vectors, ids, texts and embedder, "
            "or another --out"
        )
    manifest["vectors_sha256"] = items.fingerprint
    write_json(out / "run.json", manifest)


def preprocessed(items: Items, config: ItemOptions, out: Path) -> Items:
    """The items with `config.preprocess` done to their vectors once, for every method of a comparison alike.

    The steps learn from the items and by the weights the methods are fitted with. The result lies in `out` and is
    memory-mapped; errors are then of the space after the steps.

    Raises:
        ConfigError: an illegal chain of steps.
        InputError: steps these vectors do not allow.
        StorageRefused: the disk refused.
    """
    if not config.preprocess:
        return items
    from recollect.tokenize.preprocess import Preprocess, PreprocessConfig

    steps = PreprocessConfig(preprocess=config.preprocess, pca_dimension=config.pca_dimension, whiten=config.whiten)
    parts = [items.fingerprint, list(config.preprocess), config.pca_dimension, config.whiten]
    if config.hold_out_cold or config.weight != "none":  # without them folders hold results under the shorter key
        parts += [config.hold_out_cold, config.weight]
    key = sha256_text(canonical_json(parts))
    path = out / f"preprocessed-{key[:16]}.npy"
    if not path.is_file():
        mask, weight = fit_mask(items, config.hold_out_cold), fit_weight(items, config.weight)
        chain = Preprocess(steps).fit(items.embeddings, *fit_rows(items.embeddings, mask, weight))
        if chain.output_dimension is None:
            raise ConfigError(f"preprocess {config.preprocess!r} leaves no dimension")
        with written_table(path, np.float32, (len(items), chain.output_dimension)) as whole:
            for start in range(0, len(items), _BLOCK):
                whole[start : start + _BLOCK] = chain.apply(np.asarray(items.embeddings[start : start + _BLOCK]))
    return replace(items, embeddings=read_vectors(path), fingerprint=key)
