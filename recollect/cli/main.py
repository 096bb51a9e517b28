"""Entry point: pick the sub-command, run it, and turn every ending into the exit code people rely on.

0 done, 2 bad input, 1 internal failure, 130 interrupted, 143 terminated, 74 the disk refused, 75 a server stayed away;
after the last four `--resume` continues a run. A failure is one line on stderr; the traceback of an internal one goes
into a file (or to stderr with RECOLLECT_DEBUG=1).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect import __version__
from recollect.cli.options import Parser
from recollect.errors import ConfigError, RecollectError

if TYPE_CHECKING:
    from recollect.types import Report

COMMANDS = {
    "simulate": "simulate users of a log and check them against what the real users did",
    "evaluate": "fit recommenders and compare them on held-out events",
    "distill": "let a language model and a conventional recommender teach each other",
    "tokenize": "turn items into semantic IDs: short tuples of codes",
    "tokenize-bench": "compare tokenizers of items on one catalogue",
    "continual": "tune a language model on task after task, and measure what it forgets",
    "prompt-rank": "rank candidates by prompting, and measure accuracy and popularity bias",
    "data": "list, describe, import and fetch data sets",
    "models": "list, pull and serve the embedded models",
    "report": "draw report.html of a finished run again",
    "doctor": "check this installation: versions, models, servers, disk",
}

EXAMPLES = """examples:
  recollect simulate                       a first report, on the bundled world
  recollect simulate ml-1m --users 200     agents of 200 real users
  recollect evaluate ml-100k               recommenders, ranked on held-out events
  recollect COMMAND --help                 options and examples of a command

exit codes: 0 done, 2 bad input, 1 internal failure, 130 interrupted, 143 terminated,
74 the disk refused, 75 a server stayed away (after the last four, --resume continues a run)
"""

INTERRUPTED, TERMINATED, DISK_REFUSED, SERVER_AWAY = 130, 143, 74, 75
RUNS = ("simulate", "evaluate", "distill", "tokenize", "tokenize-bench", "continual", "prompt-rank")
RESUMABLE = (INTERRUPTED, TERMINATED, DISK_REFUSED, SERVER_AWAY)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like an interrupt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace()
    try:
        with _terminable(), _warnings_on_stderr():
            return _run(words, arguments)
    except RecollectError as error:
        return _fail(str(error) + _how_to_continue(error.exit_code, arguments), error.exit_code)
    except KeyboardInterrupt as error:
        word, code = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        return _fail(word + _how_to_continue(code, arguments), code)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        return _fail(f"{error.filename}: {error.strerror}; choose a place you may use", ConfigError.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            message = f"the disk refused a write: {error}; free some space"
            return _fail(message + _how_to_continue(DISK_REFUSED, arguments), DISK_REFUSED)
        return _internal_failure(error, arguments)


def build_parser(words: Sequence[str]) -> Parser:
    """The parser for `words`: every command is listed, only the one asked for is loaded."""
    parser = Parser(prog="recollect", description="Simulated users for recommenders, validated against real logs.")
    parser.epilog = EXAMPLES
    parser.add_argument("--version", action="version", version=f"recollect {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == asked:
            importlib.import_module(f"recollect.cli.{name.replace('-', '_')}").configure(command)
    return parser


def _run(words: list[str], arguments: argparse.Namespace) -> int:
    try:
        build_parser(words).parse_args(words, namespace=arguments)
    except SystemExit as finished:  # --help and --version end here, with 0
        return int(finished.code or 0)
    report = arguments.run(arguments)
    if report is None:
        return 0
    _show(report, as_json=arguments.json)
    return 1 if report.sections.get("failed") else 0


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        from rich.console import Console

        from recollect.eval.report import summary_table

        width = None if sys.stdout.isatty() else 160
        Console(file=sys.stdout, width=width, highlight=False).print(summary_table(report))
    sys.stdout.flush()


def _fail(message: str, code: int) -> int:
    from recollect.eval.formats import clean

    text = " ".join(clean(message).split())
    with contextlib.suppress(OSError):  # stderr may be gone; the code still says what happened
        sys.stderr.write(f"recollect: {text}\n")
    return code


def _how_to_continue(code: int, arguments: argparse.Namespace) -> str:
    out = getattr(arguments, "out", None)
    is_run = getattr(arguments, "command", "") in RUNS
    if code not in RESUMABLE or not is_run or not out or not Path(out).is_dir():
        return ""
    return f"; to continue: the same command with --resume --out {out}"


def _internal_failure(error: Exception, arguments: argparse.Namespace) -> int:
    if os.environ.get("RECOLLECT_DEBUG"):
        traceback.print_exception(error)
        return 1
    text = "".join(traceback.format_exception(error))
    path = _error_log(getattr(arguments, "out", None), text)
    return _fail(f"internal failure: {type(error).__name__}: {str(error)[:200]}; the traceback is in {path}", 1)


def _error_log(out: str | None, text: str) -> str:
    """Write a traceback beside the run, else to a temporary file; its path, or advice where no disk takes it."""
    try:
        if out and Path(out).is_dir():
            path = Path(out) / "error.log"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(path)
        with tempfile.NamedTemporaryFile(
            "w", prefix="recollect-error-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as handle:
            handle.write(text)
        return handle.name
    except OSError:
        return "no file (the disk refused it); run again with RECOLLECT_DEBUG=1"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`; a second one kills as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """The library's warnings go to stderr, a line each, while a command runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("recollect: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("recollect")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
