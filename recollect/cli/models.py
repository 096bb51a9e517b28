"""`recollect models list | pull | serve`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from recollect.cli.options import Parser, add_common, describe, pairs_report, table_report
from recollect.errors import ConfigError, MissingExtra, UnknownName
from recollect.types import Report

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER_MODULE = "vllm.entrypoints.openai.api_server"

# No hub look-ups and no usage reports; the second number is GiB of key-value cache of vLLM's CPU build.
SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their arguments."""
    describe(parser, "The embedded models: real weights that need no account.", "recollect models list")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    listing = actions.add_parser("list", help="the embedded models and where they are")
    describe(listing, "The embedded models, and whether they are in the local cache.", "recollect models list --json")
    listing.set_defaults(run=run_list)

    pulling = actions.add_parser("pull", help="fetch a model into the local cache")
    describe(pulling, "Fetch an embedded model, check it by SHA-256, convert it once.", "recollect models pull smollm2")
    pulling.add_argument("name", metavar="NAME", help="a name from `recollect models list`")
    pulling.set_defaults(run=run_pull)

    serving = actions.add_parser("serve", help="serve a model with vLLM")
    describe(
        serving,
        "Serve a model with vLLM, OpenAI-compatible, until stopped. vLLM's CPU build lives best in an environment of\n"
        "its own; name its interpreter with --python.",
        "recollect models serve smollm2 --port 8000",
        "recollect simulate --backbone openai:http://127.0.0.1:8000/v1#smollm2",
    )
    serving.add_argument("name", metavar="NAME", help="an embedded model, or the folder of a safetensors model")
    serving.add_argument("--port", type=_port, default=8000, metavar="P", help="port (default: 8000)")
    serving.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    serving.add_argument("--max-model-len", type=_positive, default=4096, metavar="N", help="context (default: 4096)")
    serving.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="bfloat16", help="default: bfloat16"
    )
    serving.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="interpreter that has vLLM (default: this one)"
    )
    serving.set_defaults(run=run_serve)

    for action in (listing, pulling, serving):
        add_common(action)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"--port must be between 1 and 65535, got {text!r}")
    return int(text)


def run_list(arguments: argparse.Namespace) -> Report:
    """One row per embedded model."""
    from recollect.backbones.store import list_models
    from recollect.cli.storing import prepare, store

    out = prepare(arguments)
    rows = list_models()
    return store(table_report("models-list", "Embedded models", rows, models=rows), "models list", arguments, out)


def run_pull(arguments: argparse.Namespace) -> Report:
    """Fetch one model and verify it."""
    from recollect.backbones.store import list_models, pull, verify
    from recollect.cli.storing import prepare, store

    if getattr(arguments, "dry_run", False):
        known = {row["name"]: row for row in list_models()}
        if arguments.name not in known:
            raise UnknownName("model", arguments.name, list(known))
        return pairs_report("plan", "Plan", {"would fetch": arguments.name, "cached": known[arguments.name]["cached"]})
    out = prepare(arguments)
    folder = pull(arguments.name, progress=lambda line: print_line(line))
    hashes = verify(arguments.name)
    facts = {"name": arguments.name, "folder": str(folder), **hashes}
    return store(pairs_report("models-pull", "Model", facts, model=facts), "models pull", arguments, out)


def print_line(line: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(f"recollect: {line}\n")
    sys.stderr.flush()


def run_serve(arguments: argparse.Namespace) -> Report | None:
    """Become the server process; returns only for --dry-run."""
    if getattr(arguments, "dry_run", False):
        words = server_command(arguments, folder=f"<folder of {arguments.name}>", is_embedding=_is_embedding(arguments))
        return pairs_report("plan", "Plan", {"would run": " ".join(words)}, command=words)
    if not _has_vllm(arguments.python):
        raise MissingExtra("vllm", "vllm", f"serving with {arguments.python}")
    from recollect.backbones.store import EMBEDDED, model_folder

    if arguments.name in EMBEDDED:
        folder = str(model_folder(arguments.name, progress=print_line))
    elif (Path(arguments.name) / "config.json").is_file():
        folder = arguments.name
    else:
        raise UnknownName("model", arguments.name, list(EMBEDDED), "or give the folder of a model (with config.json)")
    if arguments.host not in LOOPBACK:
        print_line(
            f"{arguments.host} is not loopback: vLLM's API key guards only part of its routes; "
            "put a proxy with authentication in front"
        )
    words = server_command(arguments, folder, _is_embedding(arguments))
    print_line(f"starting {' '.join(words)}")
    print_line(f"ready when http://{arguments.host}:{arguments.port}/v1/models answers; minutes on a CPU")
    os.execve(words[0], words, {**SERVER_ENVIRONMENT, **os.environ})


def server_command(arguments: argparse.Namespace, folder: str, is_embedding: bool) -> list[str]:
    """The words that start the server. Not `vllm serve`: the CPU build installs no working `vllm` command."""
    words = [
        *(arguments.python, "-m", SERVER_MODULE, "--model", folder, "--served-model-name", Path(arguments.name).name),
        *("--host", arguments.host, "--port", str(arguments.port), "--dtype", arguments.dtype),
        *("--seed", str(getattr(arguments, "seed", 0))),
    ]
    return (
        [*words, "--runner", "pooling"] if is_embedding else [*words, "--max-model-len", str(arguments.max_model_len)]
    )


def _is_embedding(arguments: argparse.Namespace) -> bool:
    from recollect.backbones.store import EMBEDDED

    return arguments.name in EMBEDDED and EMBEDDED[arguments.name].kind == "embedding"


def _has_vllm(python: str) -> bool:
    """Whether an interpreter can find vLLM, without importing it."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", probe], check=False, timeout=60).returncode == 0
    except OSError as error:
        raise ConfigError(f"--python {python} cannot be run: {error.strerror}") from error
