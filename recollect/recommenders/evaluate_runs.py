"""One row of an evaluation, fitted and evaluated once: a (model, seed, order of ties), in a folder of its own.

    rows/MODEL/[point-HASH/] once | seed-N [-shuffle-S]/        (HASH: of the options of a point of a grid)
        cases.parquet     one line per test case: user, targets, recommended items, every metric
        result.json       options, validation, list metrics, leak check, times; written last: the row is finished
        metrics.jsonl     the learning curve of a trained model
        model/            the fitted model (`--save-models`)
        training/         checkpoints while it is being trained

A finished row is never computed again, so the test set is opened once per (model, seed).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.config import to_dict
from recollect.data.splits import refit_mask
from recollect.errors import ConfigError, InputError, ResumeRefused
from recollect.io import atomic_open, disk_errors, read_json, sha256_file, sha256_text, write_json
from recollect.progress import Progress
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.recommenders.models import MODELS, ModelSpec, load_recommender, model_spec
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    from recollect.eval.case_table import CaseTable

CASES_FILE = "cases.parquet"
RESULT_FILE = "result.json"
SAVED = "path:"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a model with options under a label, or a saved model's folder.

    point: the options that a grid chose from, as pairs; empty without a grid.
    """

    label: str
    spec: ModelSpec | None
    options: Any = None
    saved: Path | None = None
    point: tuple[tuple[str, Any], ...] = ()

    @property
    def is_seeded(self) -> bool:
        """Several seeds give several models."""
        return self.spec is not None and self.spec.is_trained

    @property
    def reads_text(self) -> bool:
        """Its scores depend on what is said of the items; a saved model brings its own vectors."""
        return self.spec is not None and self.spec.reads_text

    @property
    def slug(self) -> str:
        """The label as a folder name; points of a grid are told apart by all their options."""
        if self.saved is not None:
            return f"saved-{sha256_text(self.label)[:12]}"
        if self.point:
            return f"{self.label}/point-{sha256_text(json.dumps(self.describe(), sort_keys=True))[:12]}"
        return self.label

    def describe(self) -> dict[str, Any]:
        """What must be equal for a finished row to be kept, JSON-ready."""
        if self.spec is None:
            assert self.saved is not None
            # config.json holds the hash of the weights: another model in the same folder is another row.
            found = sha256_file(self.saved / "config.json")
            return {"model": "saved", "folder": str(self.saved), "config_sha256": found}
        options = to_dict(self.options)
        options.pop("seed", None)
        return {"model": self.spec.name, "options": options}


def options_text(options: Iterable[tuple[str, Any]]) -> str:
    """Options for people, e.g. "hidden=64, dropout=0.1"."""
    return ", ".join(f"{name}={value}" for name, value in options)


def make_entries(models: Sequence[str], sections: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The rows that names and sections of options describe.

    Args:
        models: names of models, of sections that hold `model: NAME`, or path:DIR.
        sections: {label: options}.

    Raises:
        UnknownName: a name is neither a model nor a section.
        ConfigError: a section is not a mapping, holds an illegal option, or belongs to no row.
    """
    entries = []
    for label in models:
        if label.startswith(SAVED):
            folder = Path(label.removeprefix(SAVED)).expanduser()
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{label!r}: {folder} holds no saved model; give the folder of save_pretrained")
            entries.append(Entry(label, None, saved=folder))
            continue
        section = dict(sections.get(label, {}))
        name = section.pop("model", label)
        if not isinstance(name, str):
            raise ConfigError(f"'model' in section {label!r} must be the name of a model, got {name!r}")
        if name != label and (not label.replace("-", "").replace("_", "").isalnum() or not label.isascii()):
            raise ConfigError(f"the section {label!r} must be named by letters, digits, '-' and '_'")
        if name != label and label in MODELS:
            raise ConfigError(f"the section {label!r} has the name of a model but holds model: {name}; rename it")
        spec = model_spec(name)
        entries.append(Entry(label, spec, spec.options(section, f"the options of {label!r}")))
    unused = sorted(set(sections) - set(models))
    if unused:
        raise ConfigError(f"options are given for {', '.join(map(repr, unused))}, which --models does not name")
    return entries


@dataclass(frozen=True)
class Unit:
    """One fit and one test: an entry, its seed (None where it draws no random number), the order of tied events
    (None = as in the file, n = the n-th shuffle)."""

    entry: Entry
    seed: int | None
    shuffle: int | None = None

    @property
    def folder(self) -> str:
        """Below the run folder."""
        part = "once" if self.seed is None else f"seed-{self.seed}"
        return f"rows/{self.entry.slug}/{part}" + ("" if self.shuffle is None else f"-shuffle-{self.shuffle}")

    @property
    def title(self) -> str:
        """For people."""
        words = [self.entry.label]
        if self.entry.point:
            words[0] += f" ({options_text(self.entry.point)})"
        if self.seed is not None:
            words.append(f"seed {self.seed}")
        if self.shuffle is not None:
            words.append(f"tie shuffle {self.shuffle}")
        return ", ".join(words)


def make_units(entries: Sequence[Entry], config: EvaluateConfig) -> list[Unit]:
    """Every unit of a run; shuffled orders take the first seed only, and no saved model."""
    units = []
    for entry in entries:
        seeds = range(config.seed, config.seed + config.seeds) if entry.is_seeded else [None]
        units += [Unit(entry, seed) for seed in seeds]
    for shuffle in range(1, config.tie_shuffles + 1):
        units += [
            Unit(entry, config.seed if entry.is_seeded else None, shuffle) for entry in entries if entry.saved is None
        ]
    return units


def is_finished(unit: Unit, out: Path) -> bool:
    """Whether the run folder holds the unit's result.

    Raises:
        ResumeRefused: it was made with other options of the model.
    """
    path = out / unit.folder / RESULT_FILE
    if not path.is_file():
        return False
    held = read_json(path).get("entry")
    if held != unit.entry.describe():
        raise ResumeRefused(
            f"{path} was made with {held!r}, not {unit.entry.describe()!r}; use the same options or another --out"
        )
    return True


def require_same_texts(unit: Unit, out: Path, texts: str) -> None:
    """Refuse a finished row of a model that reads text where the items' texts (a fingerprint) are no longer the same.

    Raises:
        ResumeRefused: they are not.
    """
    path = out / unit.folder / RESULT_FILE
    held = read_json(path)["protocol"].get("text_fingerprint")
    if unit.entry.reads_text and held not in (None, texts):
        raise ResumeRefused(
            f"{path} was made when the items had other titles, categories or texts, which {unit.entry.label!r} reads; "
            "use the catalogue it had, or another --out"
        )


def run_unit(
    unit: Unit, title: str, dataset: Dataset, split: Split, config: EvaluateConfig, out: Path, progress: Progress
) -> None:
    """Fit, validate, test and store one unit, called `title` in messages.

    Raises:
        InputError: the model gives NaN scores, or a saved model is of other data.
    """
    from recollect.eval.class_calibration import category_classes
    from recollect.eval.list_metrics import with_list_metrics
    from recollect.eval.ranking import evaluate_ranker

    folder = out / unit.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "history": config.history,
        "mask": config.mask,
        "ks": config.k,
        "tie": config.tie,
        "batch_size": config.batch_size,
        "seed": unit.seed,
        "name": unit.entry.label,
    }
    seconds = {}
    progress.stage(f"fitting {title}")
    started = time.perf_counter()
    model, training = fit(unit, dataset, split, out, progress)
    seconds["fit"] = time.perf_counter() - started
    progress.stage(f"testing {title}")
    validation = None
    if len(split.valid_row):
        table = evaluate_ranker(model, dataset, split, part="valid", **{**options, "history": "train+val"})
        validation = {metric: table.mean(metric) for metric in table.metrics}
    rows = split.train
    if config.refit and unit.entry.saved is None:
        progress.stage(f"refitting {title}")
        started = time.perf_counter()
        rows = refit_mask(dataset, split)
        model = refit(unit, dataset, rows, training, out, progress)
        seconds["refit"] = time.perf_counter() - started
    started = time.perf_counter()
    table = evaluate_ranker(model, dataset, split, rows=rows, **options)
    seconds["test"] = time.perf_counter() - started
    classes, names = category_classes(dataset.catalog)
    table, totals = with_list_metrics(
        table,
        dataset,
        split,
        ks=(config.primary_cut,),
        classes={"category": classes} if len(names) > 1 else None,
        seed=config.seed,
    )
    other_mask = None
    if unit.entry.reads_text:
        other = {**options, "mask": "none" if config.mask == "history" else "history"}
        repeated = evaluate_ranker(model, dataset, split, rows=rows, **other)
        own, found = (one.aggregate([config.primary_metric], seed=config.seed) for one in (table, repeated))
        other_mask = {
            "mask": other["mask"],
            "own": own[config.primary_metric],
            "other": found[config.primary_metric],
        }
    write_cases(folder / CASES_FILE, table, dataset, split)
    if config.save_models and unit.entry.saved is None:
        model.save_pretrained(folder / "model")
    leak, protocol = table.leak, dict(table.protocol)
    if unit.entry.saved is not None:  # what it was fitted on is not in its files
        leak = leak and dataclasses.replace(leak, leaking_cases=None)
        protocol["trained_on"] = "unknown"
    result = {
        "entry": unit.entry.describe(),
        "seed": unit.seed,
        "shuffle": unit.shuffle,
        "fitted_on": "unknown" if unit.entry.saved else "train+val" if config.refit else "train",
        "validation": validation,
        "totals": totals,
        "other_mask": other_mask,
        "leak": None if leak is None else dataclasses.asdict(leak),
        "warnings": list(table.warnings),
        "seconds": seconds,
        "training": training,
        "protocol": protocol,
    }
    write_json(folder / RESULT_FILE, result)
    shutil.rmtree(folder / "training", ignore_errors=True)


def fit(unit: Unit, dataset: Dataset, split: Split, out: Path, progress: Progress) -> tuple[Any, dict[str, Any] | None]:
    """The unit's model fitted on the training rows, and how training went (None without gradient steps)."""
    from recollect.tracking import Tracker

    entry = unit.entry
    if entry.saved is not None:
        return open_saved(entry.saved, dataset), None
    assert entry.spec is not None
    model: Any = entry.spec.open(entry.options, seed=unit.seed or 0, cache=out / "vectors")
    if not entry.spec.is_trained:
        return model.fit(dataset, split), None
    folder = out / unit.folder
    model.fit(dataset, split, folder=folder / "training", tracker=Tracker(folder), progress=progress)
    result = dataclasses.asdict(model.result)
    return model, {key: value for key, value in result.items() if key != "history"}


def refit(
    unit: Unit, dataset: Dataset, rows: np.ndarray, training: Mapping[str, Any] | None, out: Path, progress: Progress
) -> Any:
    """A fresh model fitted on `rows`; a trained one for as many epochs as validation found best."""
    spec, options = unit.entry.spec, unit.entry.options
    assert spec is not None
    if training is None:
        return spec.open(options, cache=out / "vectors").fit(dataset, rows=rows)
    options = dataclasses.replace(options, epochs=max(1, int(training["best_epoch"])), patience=None)
    model: Any = spec.open(options, seed=unit.seed or 0, cache=out / "vectors")
    return model.fit(dataset, rows=rows, folder=out / unit.folder / "training" / "refit", progress=progress)


def open_saved(folder: Path, dataset: Dataset) -> Any:
    """A saved model, if it is of this data.

    Raises:
        InputError: it was fitted on other data; its items would be other items.
    """
    from recollect.eval.protocol import data_fingerprint

    model: Any = load_recommender(folder)
    found = data_fingerprint(dataset)
    if (model.n_items, model.data) != (dataset.n_items, found):
        raise InputError(
            f"the model in {folder} was saved on other data ({model.n_items} items, fingerprint {model.data[:12]}…) "
            f"than {dataset.name!r} as filtered here ({dataset.n_items} items, {found[:12]}…); fit it on this data, or "
            "use the data and --core it was fitted on"
        )
    return model


def write_cases(path: Path, table: CaseTable, dataset: Dataset, split: Split) -> None:
    """Store a test table with outward ids, so that any library can check the numbers.

    Columns: user_id, targets and items (lists of item ids, best first), one float64 per metric.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = pa.array(dataset.catalog.item_ids.astype(str).tolist(), pa.string())
    users = pa.array(dataset.users.user_ids.astype(str).tolist(), pa.string())

    def ids(values: np.ndarray, starts: np.ndarray) -> pa.Array:
        chosen = pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int32)), items)
        return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), chosen)

    last = split.test_row + 1 if split.test_end is None else split.test_end
    count = last - split.test_row
    starts = np.r_[0, np.cumsum(count)]
    rows = np.repeat(split.test_row - starts[:-1], count) + np.arange(starts[-1])
    is_item = table.lists >= 0
    columns = {
        "user_id": pa.DictionaryArray.from_arrays(pa.array(table.user.astype(np.int32)), users),
        "targets": ids(dataset.interactions.item[rows], starts),
        "items": ids(table.lists[is_item], np.r_[0, np.cumsum(is_item.sum(axis=1))]),
        **{name: pa.array(column) for name, column in table.metrics.items()},
    }
    with atomic_open(path, "wb") as handle:
        pq.write_table(pa.table(columns), handle)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The metric columns {name: (C,) float64} of a stored test table.

    Raises:
        InputError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error}); remove its folder and resume the run") from error
    names = [name for name in table.column_names if name not in ("user_id", "targets", "items")]
    return {name: table[name].to_numpy() for name in names}
