"""`recollect.tokenize(...)`: item vectors to semantic IDs, from data to the folder everything else reads.

Vectors are embedded once and kept, finished levels of a fit are kept, and a finished artefact is read back: a killed
run continues with `resume` and gives what an uninterrupted one gives.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recollect.config import build, check_same_run, options_of, run_manifest
from recollect.errors import ConfigError
from recollect.io import prepare_out, read_json, write_json
from recollect.journal.lock import WriterLock
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.artefact import MANIFEST, TokenizedItems
from recollect.tokenize.checkpoint import array_sha256
from recollect.tokenize.collisions import CollisionConfig, Resolution, resolve_collisions
from recollect.tokenize.embeddings import Items
from recollect.tokenize.fit_inputs import fit_inputs
from recollect.tokenize.measure import semantic_ids
from recollect.tokenize.methods import Entry, assignments, make_entries, method_spec
from recollect.tokenize.peak_memory import PeakMemory
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.run_config import TokenizeConfig
from recollect.tokenize.run_report import make_report
from recollect.tokenize.source import open_items, open_source
from recollect.types import Dataset, Report

_INPUT_STEPS = ("preprocess", "pca_dimension", "whiten")


def tokenize(
    data: str | Path | Dataset = "harbor",
    *,
    method_options: Mapping[str, Any] | None = None,
    collision_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Turn the items of a catalogue, or the rows of an .npy file, into semantic IDs.

    Args:
        data: bundled world, registered name, path, an .npy file of item vectors, or a `Dataset`.
        method_options: options of the method, {name: value}.
        collision_options: fields of `recollect.tokenize.collisions.CollisionConfig`.
        progress: where to say how far the run is; silent by default.
        options: fields of `TokenizeConfig`.

    Returns:
        The report that was also written to the run folder (`out`, by default the first free runs/tokenize-DATA-N),
        beside codes.npy, codebooks.safetensors, item_ids.txt and manifest.json (`TokenizedItems.load` reads them).

    Raises:
        InputError: bad data, vectors or options.
        ResumeRefused: the run in `out` was made with other options or data.
        JournalLocked: another process writes to `out`.
    """
    given = {"data": data.name if isinstance(data, Dataset) else str(data)}
    named = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    config = build(TokenizeConfig, {**given, **named}, "the options of tokenize")
    entry = chosen_entry(config, method_options or {})
    collisions = build(CollisionConfig, collision_options or {}, "the options of the collision strategy")
    progress = progress or SilentProgress()
    progress.stage("reading the data")
    source = open_source(data, config, core=config.core, seed=config.seed)
    if config.dry_run:
        return _plan(config, entry, source.n_items)
    out = prepare_out(config.out or free_folder(source.name), resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        manifest = _open_run(config, entry, collisions, source.fingerprint, out)
        items = open_items(source, config, out, progress=progress)
        made, notes = _made(config, entry, collisions, items, out, progress)
        progress.stage("measuring")
        report = make_report(config, entry, items, made, notes, manifest)
        report.save(out)
    finally:
        lock.release()
    return report


def free_folder(data: str) -> Path:
    """The first of runs/tokenize-DATA-1, -2, … that does not exist."""
    stem = Path(data).stem if data.endswith(".npy") else Path(data).name
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in stem)
    number = 1
    while (folder := Path("runs") / f"tokenize-{name}-{number}").exists():
        number += 1
    return folder


def chosen_entry(config: TokenizeConfig, method_options: Mapping[str, Any]) -> Entry:
    """The method with its options: `method_options`, then --set, then --preprocess and its like where given.

    Raises:
        UnknownName: no such method.
        ConfigError: an illegal option, or preprocessing of a method that has none.
    """
    spec = method_spec(config.method)
    values = {**method_options, **assignments(spec, config.set)}
    known = {option.name for option in options_of(spec.config_class)}
    if config.preprocess:
        if not known.issuperset(_INPUT_STEPS):
            raise ConfigError(f"{spec.name} reads vectors as they are; leave --preprocess out or prepare the .npy file")
        values |= {name: getattr(config, name) for name in _INPUT_STEPS}
    return make_entries([spec.name], {spec.name: values}, levels=config.levels, codebook_size=config.codebook_size)[0]


def _open_run(
    config: TokenizeConfig, entry: Entry, collisions: CollisionConfig, fingerprint: str, out: Path
) -> dict[str, Any]:
    """Write `run.json`, or check that the run found there is this one; its content.

    Raises:
        ResumeRefused: the run in `out` is another one; the message names the first difference.
    """
    identity = {
        **config.identity(),
        **entry.describe(),
        "collision_options": dict(vars(collisions)),
        "data_fingerprint": fingerprint,
    }
    path = out / "run.json"
    if config.overwrite:
        for name in (MANIFEST, "made.json", "report.json", "report.html", "embeddings.json"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "fit", ignore_errors=True)
    elif path.is_file():
        check_same_run(read_json(path), "tokenize", identity, out)
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    manifest = run_manifest("tokenize", options, fingerprint, {"tokenizer": entry.describe()}, config.seed)
    manifest["identity"] = identity
    write_json(path, manifest)
    return manifest


def _made(
    config: TokenizeConfig, entry: Entry, collisions: CollisionConfig, items: Items, out: Path, progress: Progress
) -> tuple[TokenizedItems, dict[str, Any]]:
    """The artefact, and how it was made (times, collisions, fit report); read back where the folder holds it."""
    vectors_sha256 = array_sha256(items.embeddings)
    if (out / MANIFEST).is_file() and (out / "made.json").is_file():
        held = TokenizedItems.load(out)
        if held.details.get("embeddings_sha256") == vectors_sha256:
            return held, read_json(out / "made.json")
    tokenizer = entry.spec.open(entry.options, seed=config.seed)
    inputs = fit_inputs(tokenizer, items, config, config.collaborative)
    mask = inputs["mask"]
    progress.stage(f"fitting {entry.spec.name}")
    was_interrupted = (out / "fit").is_dir()
    started = time.perf_counter()
    with PeakMemory() as memory:
        tokenizer.fit(items.embeddings, **inputs, checkpoint=out / "fit", progress=progress)
    fitted = time.perf_counter()
    progress.stage("encoding")
    encoding = tokenizer.encode(items.embeddings, beam=config.beam, return_posterior=True)
    encoded = time.perf_counter()
    resolution = _resolved(config, collisions, tokenizer, items, encoding.codes)
    notes = {
        "collisions": resolution.summary(),
        "levels": tokenizer.report.levels,
        "warnings": [*tokenizer.report.warnings, *resolution.notes],
        "fit_seconds": None if was_interrupted else fitted - started,  # a continued fit was timed in part only
        "encode_seconds": encoded - fitted,
        "peak_mb": None if was_interrupted else memory.mb,
        "emitted_distinct": len(np.unique(encoding.codes, axis=0)),
        "decodable_levels": resolution.decodable_levels,
    }
    made = TokenizedItems(
        semantic_ids(items, resolution.codes, resolution.codebook_sizes),
        tokenizer,
        encoding,
        {
            "seed": config.seed,
            "source": items.source,
            "embeddings_sha256": vectors_sha256,
            "fit_mask_sha256": None if mask is None else array_sha256(mask),
            "fitted_items": len(items) if mask is None else int(mask.sum()),
            "beam": config.beam,
            "collisions": resolution.summary(),
            "levels": tokenizer.report.levels,
        },
    )
    progress.stage("writing")
    made.save(out)
    write_json(out / "made.json", notes)
    shutil.rmtree(out / "fit", ignore_errors=True)
    return made, notes


def _resolved(
    config: TokenizeConfig, collisions: CollisionConfig, tokenizer: ItemTokenizer, items: Items, codes: np.ndarray
) -> Resolution:
    attributes = None
    if config.collisions == "hash_last":
        if items.dataset is None:
            raise ConfigError(
                "--collisions hash_last takes domain and categories of a catalogue; an .npy file has none"
            )
        catalog = items.dataset.catalog
        attributes = [catalog.domain.tolist(), ["|".join(names) for names in catalog.categories]]
    return resolve_collisions(
        codes,
        config.collisions,
        tokenizer=tokenizer,
        embeddings=items.embeddings,
        item_ids=items.item_ids,
        attributes=attributes,
        config=collisions,
    )


def _plan(config: TokenizeConfig, entry: Entry, n_items: int) -> Report:
    """What a run would do; nothing is embedded, fitted or written."""
    described = entry.describe()["options"]
    counts = described.get("counts") or [described.get("codebook_size", config.codebook_size)] * int(
        described.get("levels", 1)
    )
    numbers = {
        "items": n_items,
        "levels": len(counts),
        "bits_per_item": round(sum(math.log2(count) for count in counts), 3),
        "possible_codes": math.prod(counts),
        "texts_to_embed": 0 if config.is_file or config.vectors else n_items,
    }
    panel = {
        "kind": "table",
        "title": f"What would be fitted: {entry.spec.name}, {entry.spec.summary}",
        "columns": ["option", "value"],
        "rows": [[key, str(value)] for key, value in described.items()],
    }
    protocol = {"data": config.data, "method": config.method, "dry_run": True}
    return Report("tokenize-plan", protocol, {}, ledger=numbers, sections={"panels": [panel]})


__all__ = ["TokenizeConfig", "free_folder", "tokenize"]
