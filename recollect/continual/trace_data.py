"""Task folders of TRACE: strict reading, what is repeated or leaks, official and clean modes, seeded subsets.

DATA_DIR/<task>/{train,eval,test}.json, each a JSON list of {"prompt": str, "answer": str}.  The files of the release
repeat prompts (the 5000-row training file of NumGLUE-cm holds 282 different questions) and share some between splits,
so the facts are part of what is loaded.  Official mode takes every row; clean mode keeps one row a prompt and drops
the rows whose prompt a later split also holds.  Text is never executed, rendered or used as a path.
Source: trace_benchmark 2.1, 2.3 (the report and the modes are [our design]).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recollect.continual.trace_prompts import has_task_form
from recollect.continual.trace_tasks import STANDARD_ORDER, TraceTask, trace_tasks
from recollect.errors import ConfigError, DataError
from recollect.io import confined, sha256_text
from recollect.rng import stream

SplitName = Literal["train", "eval", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
_FIELDS = ("prompt", "answer")


class TraceRecord(NamedTuple):
    """One example; `where` names its file and row (counted from 1), for messages."""

    prompt: str
    answer: str
    where: str

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of the prompt, what predictions are stored under."""
        return sha256_text(self.prompt)


@dataclass(frozen=True)
class SplitFacts:
    """What a file holds before anything is dropped.

    n: rows.  n_distinct_prompts: prompts that differ in any character.  n_conflicting_prompts: prompts that occur with
    more than one answer.  n_other_form: rows without the task's instruction or cue.  n_used: rows after mode and
    subset.
    """

    n: int
    n_distinct_prompts: int
    n_conflicting_prompts: int
    n_other_form: int
    n_used: int


@dataclass(frozen=True)
class TaskFacts:
    """Facts of one task; leaks count rows of the second split whose prompt the first holds, too.

    Prompts are equal there whatever their white space and case.
    """

    train: SplitFacts
    eval: SplitFacts
    test: SplitFacts
    test_in_train: int
    test_in_eval: int
    eval_in_train: int

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass(frozen=True)
class TraceData:
    """One task with its records, in file order."""

    task: TraceTask
    train: tuple[TraceRecord, ...]
    eval: tuple[TraceRecord, ...]
    test: tuple[TraceRecord, ...]
    facts: TaskFacts


def leak_key(prompt: str) -> str:
    """The prompt without regard to white space and case."""
    return " ".join(prompt.split()).casefold()


def load_trace(
    root: str | Path,
    tasks: Sequence[str] = STANDARD_ORDER,
    *,
    clean: bool = False,
    dedup: bool | None = None,
    drop_leaks: bool | None = None,
    train_examples: int = 0,
    eval_examples: int = 0,
    test_examples: int = 0,
    seed: int = 0,
) -> dict[str, TraceData]:
    """Read the tasks, in the order given.

    Args:
        root: folder of task folders.
        clean: False takes the files as they are ("official"); True is dedup and drop_leaks, where those are None.
        dedup: keep the first row of each prompt, in every split.
        drop_leaks: drop training rows whose prompt occurs in eval or test, and eval rows whose prompt occurs in test;
            the test rows stay as they are, and eval may become empty.
        train_examples, eval_examples, test_examples: rows at most, drawn without regard to the other tasks; 0 = all.
            A smaller draw of the same seed is part of a larger one.
        seed: of the draws.

    Raises:
        UnknownName: a name that is no task.
        ConfigError: a negative number of examples.
        DataError: a folder or file is missing or malformed; the message names file, row and field.
    """
    sizes: dict[SplitName, int] = {"train": train_examples, "eval": eval_examples, "test": test_examples}
    for split, size in sizes.items():
        if size < 0:
            raise ConfigError(f"{split}_examples must be 0 (all) or more, got {size!r}")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the one that holds the task folders ({', '.join(tasks)})")
    chosen = trace_tasks(tasks)
    use_dedup = clean if dedup is None else dedup
    use_drop = clean if drop_leaks is None else drop_leaks
    return {task.name: _load_task(folder, task, use_dedup, use_drop, sizes, seed) for task in chosen}


def load_replay_buffer(root: str | Path) -> tuple[TraceRecord, ...]:
    """The alignment pairs of `Lima/train.json`, which the replay baseline adds to every task.

    Raises:
        DataError: the file is missing or malformed.
    """
    if not (Path(root) / "Lima" / "train.json").is_file():
        raise DataError(
            f"{Path(root) / 'Lima' / 'train.json'} does not exist, and general instructions are replayed from it; "
            "leave --general-examples out to replay earlier tasks alone"
        )
    return read_records(Path(root), "Lima/train.json")


def _load_task(
    root: Path, task: TraceTask, dedup: bool, drop_leaks: bool, sizes: Mapping[SplitName, int], seed: int
) -> TraceData:
    whole = {split: read_records(root, f"{task.name}/{split}.json") for split in SPLITS}
    keys = {split: {leak_key(record.prompt) for record in whole[split]} for split in SPLITS}
    later: dict[SplitName, set[str]] = {"train": keys["eval"] | keys["test"], "eval": keys["test"], "test": set()}
    used: dict[SplitName, tuple[TraceRecord, ...]] = {}
    for split in SPLITS:
        rows = whole[split]
        if drop_leaks:
            rows = tuple(record for record in rows if leak_key(record.prompt) not in later[split])
        if dedup:
            rows = _first_of_each_prompt(rows)
        used[split] = _subset(rows, sizes[split], seed, task.name, split)
    if not used["train"]:
        raise DataError(
            f"{root / task.name / 'train.json'}: every prompt also occurs in eval or test; "
            "load the task without drop_leaks or repair its files"
        )
    facts = TaskFacts(
        **{split: _facts(task, whole[split], len(used[split])) for split in SPLITS},
        test_in_train=_shared(whole["test"], keys["train"]),
        test_in_eval=_shared(whole["test"], keys["eval"]),
        eval_in_train=_shared(whole["eval"], keys["train"]),
    )
    return TraceData(task, used["train"], used["eval"], used["test"], facts)


def _first_of_each_prompt(rows: Sequence[TraceRecord]) -> tuple[TraceRecord, ...]:
    first: dict[str, TraceRecord] = {}
    for record in rows:
        first.setdefault(record.prompt, record)
    return tuple(first.values())


def _shared(rows: Sequence[TraceRecord], keys: set[str]) -> int:
    return sum(leak_key(record.prompt) in keys for record in rows)


def _subset(
    rows: tuple[TraceRecord, ...], size: int, seed: int, task: str, split: SplitName
) -> tuple[TraceRecord, ...]:
    if not size or size >= len(rows):
        return rows
    drawn = stream(seed, "trace subset", task, split).permutation(len(rows))[:size]
    return tuple(rows[at] for at in sorted(drawn.tolist()))


def _facts(task: TraceTask, rows: Sequence[TraceRecord], n_used: int) -> SplitFacts:
    answers: dict[str, set[str]] = {}
    for record in rows:
        answers.setdefault(record.prompt, set()).add(record.answer)
    return SplitFacts(
        n=len(rows),
        n_distinct_prompts=len(answers),
        n_conflicting_prompts=sum(len(different) > 1 for different in answers.values()),
        n_other_form=sum(not has_task_form(task, record.prompt) for record in rows),
        n_used=n_used,
    )


def read_records(root: Path, name: str) -> tuple[TraceRecord, ...]:
    """The records of the file `name` ("<task>/<split>.json") under `root`.

    Raises:
        DataError: missing, not UTF-8 JSON, not a list of objects of exactly two text fields, or one of them empty.
    """
    path = confined(root, name)
    if not path.is_file():
        raise DataError(f"{path} does not exist; a task folder holds train.json, eval.json and test.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_kind(rows)}, not a list of objects with 'prompt' and 'answer'")
    if not rows:
        raise DataError(f"{path} holds no rows")
    return tuple(_record(row, path, name, number) for number, row in enumerate(rows, start=1))


def _record(row: Any, path: Path, name: str, number: int) -> TraceRecord:
    where = f"{path}, row {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_kind(row)}, not an object with 'prompt' and 'answer'")
    for key in _FIELDS:
        if key not in row:
            raise DataError(f"{where} has no field {key!r}; fields: {', '.join(map(repr, row)) or 'none'}")
        value = row[key]
        if not isinstance(value, str):
            raise DataError(f"{where}: field {key!r} is {_kind(value)}, not text")
        if not value.strip():
            raise DataError(f"{where}: field {key!r} is empty, got {value[:20]!r}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{where}: field {key!r} holds half of a surrogate pair, which is no text")
    unknown = [key for key in row if key not in _FIELDS]
    if unknown:
        raise DataError(f"{where} has the unknown field {unknown[0]!r}; a row holds 'prompt' and 'answer' alone")
    return TraceRecord(row["prompt"], row["answer"], f"{name}, row {number}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
