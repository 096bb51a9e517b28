"""`recollect doctor`: can this installation do what it promises? A check says ok, warning, failed or skipped."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recollect.cli.options import add_common, describe
from recollect.errors import ConfigError, RecollectError
from recollect.types import Report

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENOUGH_BYTES = 2 * 1024**3
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SERVER_SECONDS = 20.0

Check = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    describe(
        parser,
        "Check this installation: versions, CPU, disk, the embedded models (one generate, choose, score and embed),\n"
        "model servers, and the journal of a run.",
        "recollect doctor",
        "recollect doctor --server http://127.0.0.1:8000/v1 --json",
        "recollect doctor runs/simulate-harbor-1 --skip-models",
    )
    parser.add_argument("folder", metavar="RUN", nargs="?", help="also check the files of this run folder")
    parser.add_argument(
        "--server", action="append", default=[], metavar="URL", help="also check this model server; may be repeated"
    )
    parser.add_argument("--skip-models", action="store_true", help="do not load the embedded models")
    add_common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Report:
    """Run the checks; `failed` in the report makes the command exit 1."""
    from recollect.cli.storing import prepare, store
    from recollect.config import versions

    for url in arguments.server:
        _host(url)
    if arguments.folder is not None and not Path(arguments.folder).is_dir():
        raise ConfigError(f"{arguments.folder} is not a folder; give the folder of a run")
    plan: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("python", check_python),
        ("sqlite", check_sqlite),
        ("cpu", check_cpu),
        ("disk", check_disk),
    ]
    if not arguments.skip_models:
        seed = getattr(arguments, "seed", 0)
        plan += [("model smollm2", lambda: check_generation("smollm2", seed))]
        plan += [("model minilm", lambda: check_embedding("minilm"))]
    plan += [(f"server {url}", lambda url=url: check_server(url)) for url in arguments.server]  # type: ignore[misc]
    if arguments.folder is not None:
        plan += [("run files", lambda: check_run(Path(arguments.folder)))]
    if getattr(arguments, "dry_run", False):
        checks = [{"check": name, "state": "skipped", "detail": "would run", "seconds": 0.0} for name, _ in plan]
        return _report(checks, versions())
    out = prepare(arguments)
    return store(_report([perform(name, check) for name, check in plan], versions()), "doctor", arguments, out)


def perform(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    """Run one check; what it raises is its finding."""
    started = time.perf_counter()
    try:
        state, detail = check()
    except (RecollectError, ImportError, OSError, RuntimeError, sqlite3.Error) as error:
        state, detail = "failed", " ".join(f"{type(error).__name__}: {error}".split())
    return {"check": name, "state": state, "detail": detail, "seconds": round(time.perf_counter() - started, 2)}


def _report(checks: Sequence[Check], versions: dict[str, str]) -> Report:
    warnings = [f"{check['check']}: {check['detail']}" for check in checks if check["state"] == "warning"]
    panels = [
        {
            "kind": "table",
            "title": "Checks",
            "columns": ["check", "state", "detail", "seconds"],
            "rows": [[check[column] for column in ("check", "state", "detail", "seconds")] for check in checks],
        },
        {"kind": "table", "title": "Versions", "columns": ["package", "version"], "rows": sorted(versions.items())},
    ]
    return Report(
        kind="doctor",
        protocol={},
        metrics={},
        warnings=warnings,
        sections={
            "checks": list(checks),
            "versions": versions,
            "failed": any(check["state"] == "failed" for check in checks),
            "panels": [{**panel, "rows": [list(row) for row in panel["rows"]]} for panel in panels],
        },
    )


def check_python() -> tuple[str, str]:
    """The interpreter and the platform."""
    return "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def check_sqlite() -> tuple[str, str]:
    """The journal needs upserts with RETURNING (3.35) in its SQLite."""
    if sqlite3.sqlite_version_info < (3, 35):
        return "failed", f"SQLite {sqlite3.sqlite_version}; 3.35 or newer is needed"
    return "ok", f"SQLite {sqlite3.sqlite_version}"


def check_cpu() -> tuple[str, str]:
    """Cores this process may use, and the instructions that make bfloat16 fast."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return "ok", f"{cores} cores; features unknown on {platform.system()}"
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    flags = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    found = [feature for feature in CPU_FEATURES if feature in flags]
    return "ok", f"{cores} cores; {', '.join(found) or 'none of ' + ', '.join(CPU_FEATURES)}"


def check_disk() -> tuple[str, str]:
    """Room for runs here and for models in the cache."""
    from recollect.backbones.store import cache_folder

    parts, is_low = [], False
    for purpose, folder in (("runs", Path.cwd()), ("models", cache_folder())):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        is_low |= free < ENOUGH_BYTES
        parts.append(f"{free / 1024**3:.1f} GiB free for {purpose} in {folder}")
    return ("warning" if is_low else "ok"), "; ".join(parts)


def check_generation(name: str, seed: int) -> tuple[str, str]:
    """One generate, one choose and one score with a language model."""
    from recollect.backbones.protocol import Choice, Message, Request, Scoring
    from recollect.backbones.resolve import open_backbone

    messages = (Message("user", "Which is an animal? Answer with one word."),)
    backbone = open_backbone(name)
    try:
        text = backbone.generate([Request(messages, max_tokens=8, seed=seed)])[0].text
        chosen = backbone.choose([Choice(messages, ("horse", "table"))])[0].log_probs
        scored = backbone.score([Scoring(messages, ("horse", "table"))])[0].log_probs
    finally:
        backbone.close()
    if not text.strip() or len(chosen) != 2 or not all(value <= 0 for value in (*chosen, *scored)):
        return "failed", f"unusable answers: {text!r}, {chosen}, {scored}"
    return (
        "ok",
        f"generate {text.strip()[:40]!r}; choose {chosen[0]:.2f}, {chosen[1]:.2f} nats; score {scored[0]:.2f} nats",
    )


def check_embedding(name: str) -> tuple[str, str]:
    """One embed: unit rows, and a paraphrase nearer than an unrelated text."""
    from recollect.backbones.resolve import open_embedder

    embedder = open_embedder(name)
    try:
        rows = embedder.embed(["a boat on the sea", "a ship on the ocean", "a recipe for bread"])
    finally:
        embedder.close()
    near, far = float(rows[0] @ rows[1]), float(rows[0] @ rows[2])
    state = "ok" if near > far and abs(float(rows[0] @ rows[0]) - 1) < 1e-3 else "failed"
    return state, f"{rows.shape[1]} dimensions; cosine {near:.2f} to a paraphrase, {far:.2f} to another subject"


def check_server(url: str) -> tuple[str, str]:
    """Health, the models served, and one generated token: a server can be healthy and hang."""
    import httpx

    host = _host(url)
    root = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("RECOLLECT_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=SERVER_SECONDS, headers=headers, follow_redirects=False) as client:
            health = client.get(f"{root}/health").status_code
            listing = client.get(f"{root}/v1/models")
            if listing.status_code != 200:
                return "failed", f"/v1/models answers {listing.status_code}, /health {health}"
            names = [str(model["id"]) for model in listing.json()["data"]]
            question = {"model": names[0], "max_tokens": 1, "messages": [{"role": "user", "content": "Say yes."}]}
            answer = client.post(f"{root}/v1/chat/completions", json=question)
    except httpx.HTTPError as error:
        return "failed", f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return "failed", f"/v1/models gives no list of models ({type(error).__name__})"
    if answer.status_code != 200:
        return "failed", f"/health {health}, but generating answers {answer.status_code}"
    detail = f"serves {', '.join(names)}; generates"
    if health != 200:
        return "warning", f"{detail}; /health answers {health}"
    if host not in LOOPBACK:
        return "warning", f"{detail}; {host} is not loopback: vLLM's API key guards only part of its routes"
    return "ok", detail


def _host(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--server must be an http or https URL, got {url!r}")
    return parts.hostname


def check_run(folder: Path) -> tuple[str, str]:
    """Integrity of every SQLite file of a run, and whether its JSON can be read."""
    from recollect.io import read_json

    findings = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        with path.open("rb") as handle:
            is_sqlite = handle.read(16) == b"SQLite format 3\x00"
        if is_sqlite:
            with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
                verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
            if verdict != "ok":
                return "failed", f"{path.name}: {verdict}"
            findings.append(f"{path.name} intact")
        elif path.suffix == ".json":
            read_json(path)
    if not findings:
        return "warning", f"{folder} holds no journal"
    return "ok", "; ".join(findings)
