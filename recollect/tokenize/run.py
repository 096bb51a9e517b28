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

from recollect.config import build, check_run_folder, options_of, run_manifest
from recollect.errors import ConfigError, ResumeRefused
from recollect.io import check_out, prepare_out, read_json, sha256_file, write_json
from recollect.journal.lock import WriterLock
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.artefact import MANIFEST, TokenizedItems
from recollect.tokenize.checkpoint import array_sha256
from recollect.tokenize.collisions import CollisionConfig, Resolution, check_strategy, resolve_collisions
from recollect.tokenize.embeddings import ABOUT_FILE, Items
from recollect.tokenize.fit_inputs import check_fit_inputs, fit_inputs
from recollect.tokenize.measure import semantic_ids
from recollect.tokenize.methods import Entry, assignments, make_entries, method_spec
from recollect.tokenize.peak_memory import PeakMemory
from recollect.tokenize.protocol import ItemTokenizer
from recollect.tokenize.run_config import TokenizeConfig
from recollect.tokenize.run_report import make_report
from recollect.tokenize.source import Source, check_vectors, keep_vectors, open_items, open_source
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
    check_combination(entry, config, collisions, source)
    if config.dry_run:
        return _plan(config, entry, source.n_items)
    # Whatever can be refused is refused here: until then nothing is written, and nothing replaced.
    out = check_out(config.out or free_folder(source.name), resume=config.resume, overwrite=config.overwrite)
    identity = _identity(config, entry, collisions, source.fingerprint)
    check_run_folder(out, "tokenize", identity, overwrite=config.overwrite)
    prepare_out(out, resume=config.resume, overwrite=config.overwrite)
    lock = WriterLock(out / "run.json")
    try:
        check_run_folder(out, "tokenize", identity, overwrite=config.overwrite)
        if config.overwrite:
            (out / ABOUT_FILE).unlink(missing_ok=True)  # so that texts are embedded anew
        items = open_items(source, config, out, progress=progress)
        manifest = _open_run(config, entry, identity, out)
        finished = _finished(items, out)
        keep_vectors(manifest, items, out)
        made, notes = finished or _made(config, entry, collisions, items, out, progress)
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

    --device is that of a method which has one, unless its own options name another.

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
    entries = make_entries(
        [spec.name],
        {spec.name: values},
        levels=config.levels,
        codebook_size=config.codebook_size,
        device=config.device,
    )
    return entries[0]


def check_combination(entry: Entry, config: TokenizeConfig, collisions: CollisionConfig, source: Source) -> None:
    """Refuse what method, collision strategy and data cannot do together, before anything is embedded or written.

    Raises:
        ConfigError, InputError: a search, weights, behaviour vectors or a collision strategy that must fail later.
    """
    tokenizer = entry.spec.open(entry.options, seed=config.seed)
    has_log = source.dataset is not None
    tokenizer.check_search(beam=config.beam)
    check_fit_inputs(tokenizer, config, source.n_items, has_log=has_log, collaborative=config.collaborative)
    if config.collisions == "hash_last" and not has_log:
        raise ConfigError("--collisions hash_last takes domain and categories of a catalogue; an .npy file has none")
    check_strategy(config.collisions, tokenizer, entry.codebook_sizes, collisions)
    check_vectors(source, config, max(entry.codebook_sizes))


def _identity(config: TokenizeConfig, entry: Entry, collisions: CollisionConfig, fingerprint: str) -> dict[str, Any]:
    """What a run continues with only where it is equal."""
    identity = {
        **config.identity(),
        **entry.describe(),
        "collision_options": dict(vars(collisions)),
        "data_fingerprint": fingerprint,
    }
    if config.collaborative is not None:
        identity["collaborative_sha256"] = sha256_file(config.collaborative)
    return identity


def _open_run(config: TokenizeConfig, entry: Entry, identity: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Clear what is to be replaced and write `run.json`; its content."""
    path = out / "run.json"
    held: dict[str, Any] = {}
    if config.overwrite:
        for name in (MANIFEST, "made.json", "report.json", "report.html"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "fit", ignore_errors=True)
    elif path.is_file():
        held = read_json(path)
    fingerprint = identity["data_fingerprint"]
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    manifest = run_manifest("tokenize", options, fingerprint, {"tokenizer": entry.describe()}, config.seed)
    manifest["identity"] = identity
    manifest["vectors_sha256"] = held.get("vectors_sha256")
    write_json(path, manifest)
    return manifest


def _finished(items: Items, out: Path) -> tuple[TokenizedItems, dict[str, Any]] | None:
    """The artefact that the folder holds and how it was made, see `_made`; None where it is not whole.

    Raises:
        ResumeRefused: it is of other vectors or ids.
    """
    if not ((out / MANIFEST).is_file() and (out / "made.json").is_file()):
        return None
    held = TokenizedItems.load(out)
    made_of = held.details["embeddings_sha256"], tuple(held.ids.item_ids)
    if made_of != (array_sha256(items.embeddings), items.item_ids):
        raise ResumeRefused(
            f"the semantic IDs in {out} are of other item vectors or ids; give the same vectors, ids, texts and "
            "embedder, or another --out"
        )
    return held, read_json(out / "made.json")


def _made(
    config: TokenizeConfig, entry: Entry, collisions: CollisionConfig, items: Items, out: Path, progress: Progress
) -> tuple[TokenizedItems, dict[str, Any]]:
    """The artefact, and how it was made (times, collisions, fit report)."""
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
            "embeddings_sha256": array_sha256(items.embeddings),
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
        assert items.dataset is not None  # `check_combination` refused it
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
    sizes = entry.codebook_sizes
    numbers = {
        "items": n_items,
        "levels": len(sizes),
        "bits_per_item": round(sum(math.log2(size) for size in sizes), 3),
        "possible_codes": math.prod(sizes),
        "texts_to_embed": 0 if config.is_file or config.vectors else n_items,
    }
    panel = {
        "kind": "table",
        "title": f"What would be fitted: {entry.spec.name}, {entry.spec.summary}",
        "columns": ["option", "value"],
        "rows": [[key, str(value)] for key, value in entry.describe()["options"].items()],
    }
    protocol = {"data": config.data, "method": config.method, "dry_run": True}
    return Report("tokenize-plan", protocol, {}, ledger=numbers, sections={"panels": [panel]})


__all__ = ["TokenizeConfig", "free_folder", "tokenize"]
