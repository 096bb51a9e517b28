"""Small worlds, readers of prompts and ways to run agents, for the tests of `recollect.agents`.

A reader is a scripted model whose answers are pure functions of the request: it parses what a prompt shows (taste,
other shops' taste, fellow fans' purchases, two items) and follows a rule, so that a test knows what a perfect model
would do.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from recollect.agents import simulate as pipeline
from recollect.agents.agentcf import AgentCF
from recollect.agents.config import SimulateConfig
from recollect.agents.plan import Plan, make_plan
from recollect.agents.scheduler import Step
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Answer, Call, Choice, Chosen, Completion, Request, Scored, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.journal import Journal, StepCommit
from recollect.progress import SilentProgress
from recollect.types import Catalog, Dataset, Interactions, Users

# ---- worlds ------------------------------------------------------------------------------------------------------


def objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = list(values)
    return array


def tiny_dataset(
    events: Sequence[tuple[str, str, int] | tuple[str, str, int, float]],
    items: Sequence[tuple[str, str, str, tuple[str, ...], str | None]],
    *,
    clock: str = "unix",
    name: str = "tiny",
) -> Dataset:
    """A log from (user, item, time[, rating]) and items (id, title, domain, categories, text)."""
    users = sorted({event[0] for event in events})
    item_ids = [item[0] for item in items]
    domains = tuple(dict.fromkeys(item[2] for item in items))
    user_of = {value: at for at, value in enumerate(users)}
    item_of = {value: at for at, value in enumerate(item_ids)}
    listed = sorted(range(len(events)), key=lambda at: (user_of[events[at][0]], events[at][2], at))
    rows = [events[at] for at in listed]
    item_domain = np.array([domains.index(item[2]) for item in items], dtype=np.int16)
    item = np.array([item_of[row[1]] for row in rows], dtype=np.int64)
    rated = any(len(row) == 4 for row in rows)
    return Dataset(
        name=name,
        interactions=Interactions(
            user=np.array([user_of[row[0]] for row in rows], dtype=np.int64),
            item=item,
            time=np.array([row[2] for row in rows], dtype=np.int64),
            rating=np.array([row[3] if len(row) == 4 else np.nan for row in rows], dtype=np.float32) if rated else None,
            domain=item_domain[item],
            row=np.arange(len(rows), dtype=np.int64),
        ),
        catalog=Catalog(
            item_ids=objects(item_ids),
            titles=objects([entry[1] for entry in items]),
            domain=item_domain,
            categories=tuple(entry[3] for entry in items),
            texts=objects([entry[4] for entry in items]),
        ),
        users=Users(objects(users)),
        domains=domains,
        meta={"name": name, "version": "1", "source": "made by a test", "licence": "Apache-2.0", "clock": clock},
    )


def with_log(dataset: Dataset, **columns: np.ndarray) -> Dataset:
    """The same data set with other columns of the log."""
    log = dataset.interactions
    kept = {name: getattr(log, name) for name in ("user", "item", "time", "rating", "domain", "row")}
    meta = {key: value for key, value in dataset.meta.items() if key != "world"}
    return Dataset(
        dataset.name, Interactions(**{**kept, **columns}), dataset.catalog, dataset.users, dataset.domains, meta
    )


def with_titles(dataset: Dataset, titles: Sequence[str], texts: Sequence[str | None] | None = None) -> Dataset:
    """The same data set with other item texts."""
    catalog = dataset.catalog
    changed = Catalog(
        catalog.item_ids,
        objects(titles),
        catalog.domain,
        catalog.categories,
        catalog.texts if texts is None else objects(texts),
    )
    return Dataset(dataset.name, dataset.interactions, changed, dataset.users, dataset.domains, dataset.meta)


# ---- backbones ---------------------------------------------------------------------------------------------------


class InProcess:
    """A backbone that answers batches only, as in-process models do."""

    def __init__(self, scripted: ScriptedBackbone) -> None:
        self._scripted = scripted
        self.fingerprint = scripted.fingerprint
        self.control_tokens = scripted.control_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self._scripted.generate(requests)

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        return self._scripted.choose(choices)

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        return self._scripted.score(scorings)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self._scripted.embed(texts)

    def close(self) -> None:
        self._scripted.close()


# ---- reading prompts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the data block of a prompt shows.

    fields: every "Name: value" line by name.  items: (title, memory) of lines A and B or 1, 2, …, in order.
    fans: titles that fellow fans lately bought.
    """

    fields: dict[str, str]
    items: tuple[tuple[str, str], ...]
    fans: tuple[str, ...]

    @property
    def likes(self) -> tuple[str, ...]:
        return liked_terms(self.fields.get("Your taste", "")) + liked_terms(
            self.fields.get("Your taste as other shops tell it", "")
        )

    @property
    def dislikes(self) -> tuple[str, ...]:
        return disliked_terms(self.fields.get("Your taste", "")) + disliked_terms(
            self.fields.get("Your taste as other shops tell it", "")
        )


def liked_terms(text: str) -> tuple[str, ...]:
    found = re.search(r"Likes ([^.]*)\.", text)
    return tuple(found[1].split(", ")) if found else ()


def disliked_terms(text: str) -> tuple[str, ...]:
    found = re.search(r"Dislikes ([^.]*)\.", text)
    return tuple(found[1].split(", ")) if found else ()


def user_turn(call: Call) -> str:
    return call.messages[-1].content


def prompt_text(call: Call) -> str:
    return "\n".join(message.content for message in call.messages)


def data_block(call: Call) -> str:
    """What stands between the fences of a prompt."""
    text = user_turn(call)
    start = text.index(">\n") + 2
    return text[start : text.rindex("\n</")] if "\n</" in text else ""


def trusted_parts(call: Call) -> str:
    """Everything of a prompt outside the fence."""
    text = user_turn(call)
    return "\n".join([*(m.content for m in call.messages[:-1]), text.replace(data_block(call), "")])


def seen(call: Call) -> Seen:
    """Parse a prompt as a careful reader would."""
    fields: dict[str, str] = {}
    items: list[tuple[str, str]] = []
    fans: list[str] = []
    for line in data_block(call).split("\n"):
        if match := re.match(r"(?:A|B|\d+)\. (.*)", line):
            items.append(title_and_memory(match[1]))
        elif match := re.match(r"Fellow fans of .*? lately bought: (.*)", line):
            fans += match[1].split("; ")
        elif match := re.match(r"([A-Z][^:]*): (.*)", line):
            fields[match[1]] = match[2]
    return Seen(fields, tuple(items), tuple(fans))


def title_and_memory(text: str) -> tuple[str, str]:
    """ "TITLE: MEMORY" at the last ": " before the memory's first lower-case category phrase (harbor's form)."""
    at = text.rfind(": ", 0, text.find(". ") if ". " in text else len(text))
    return (text[:at], text[at + 2 :]) if at >= 0 else (text, "")


def liking(taste: Seen, text: str) -> float:
    """Likes found in a text, minus dislikes found in it; earlier (stronger) terms count more."""
    low = text.lower()
    total = sum(1.0 / (1 + 0.15 * at) for at, term in enumerate(taste.likes) if term and term in low)
    return total - sum(1.0 / (1 + 0.15 * at) for at, term in enumerate(taste.dislikes) if term and term in low)


def inherent(memory: str) -> str:
    """The part of an item's memory that describes the item, without what is said of its buyers."""
    return memory.split("Taken by users who like")[0].split("Passed over by users who like")[0]


def reader(
    *,
    sharpness: float = 4.0,
    fans_weight: float = 0.0,
    name: str = "reader",
    generate: Callable[[Request], str] | None = None,
    **options: Any,
) -> ScriptedBackbone:
    """A model that likes what its prompt's taste likes.

    Args:
        sharpness: nats per matching term.
        fans_weight: nats for a title that fellow fans lately bought.
    """

    def worth(what: Seen, title: str, memory: str) -> float:
        bought = fans_weight if title in what.fans else 0.0
        return sharpness * liking(what, f"{title} {inherent(memory)}") + bought

    def choose(choice: Choice) -> list[float]:
        what = seen(choice)
        if len(choice.options) == 2:
            return [worth(what, title, memory) for title, memory in what.items]
        return [0.0] * len(choice.options)

    def score(scoring: Scoring) -> list[float]:
        what = seen(scoring)
        return [-2.0 * len(title.split()) + worth(what, title, "") for title in scoring.continuations]

    label = f"{name}-{sharpness:g}-{fans_weight:g}"
    return ScriptedBackbone(generate or polite_text, choose, score, name=label, **options)


def polite_text(request: Request) -> str:
    """A usable answer at every generating call site, a pure function of the prompt."""
    text = user_turn(request)
    words = re.findall(r"[a-z]{4,}", data_block(request).lower()) or ["nothing"]
    picked = words[len(text) % len(words)], words[(7 * len(text)) % len(words)]
    match request.site:
        case "choice_explain":
            return json.dumps({"choice": "AB"[len(text) % 2], "explanation": f"it is about {picked[0]}"})
        case "reflect_items":
            return json.dumps(
                {
                    "negative": f"Avoided by users who like {picked[0]}.",
                    "positive": f"Suits users who like {picked[1]}.",
                }
            )
        case "tags":
            return json.dumps(list(dict.fromkeys([words[-1], words[len(words) // 2], picked[0]])))
        case "group_name":
            return f"fans of {picked[0]}"
        case "rank_list":
            return json.dumps(list(range(1, len(seen(request).items) + 1)))
    return f"You like {picked[0]} and {picked[1]}. You avoid nothing so far."


# ---- running -----------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """A run without its report. prompts: (step number, call) in the order asked, of one-by-one runs only."""

    agents: AgentCF
    plan: Plan
    events: list[dict[str, Any]]
    log: bytes
    ledger: dict[str, Any]
    folder: Path
    prompts: list[tuple[int, Call]] = field(default_factory=list)

    def kind_of(self, number: int) -> str:
        return self.plan.steps[number].kind

    def of(self, kind: str, part: str | None = None) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind and (part is None or event["part"] == part)]


def options_of(dataset: Dataset, **options: Any) -> SimulateConfig:
    """Options of a small run; no retrieval index unless asked for."""
    return SimulateConfig(
        **{"data": dataset.name, "backbone": "object", "embedder": "object", "recall": False, **options}
    )


def play(
    dataset: Dataset,
    folder: Path,
    backbone: Any,
    *,
    one_by_one: bool = False,
    before_step: Callable[[AgentCF, Step], None] | None = None,
    after_step: Callable[[AgentCF, Step], None] | None = None,
    warm: Callable[[AgentCF], None] | None = None,
    resume: bool = False,
    **options: Any,
) -> Played:
    """Run the steps of a simulation as `recollect.simulate` does, without validation and report.

    Args:
        one_by_one: run the steps in a plain loop in step order (the reference any schedule must equal), and record
            which step asked what.
        before_step, after_step: looked at around each step of a one-by-one run.
        warm: changes the agents before the first step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = options_of(dataset, **options)
    plan = make_plan(dataset, config)
    journal = Journal.open(folder / "journal.sqlite", config=config.identity(), resume=resume)
    prompts: list[tuple[int, Call]] = []
    held: list[AgentCF] = []
    real_steps = pipeline._steps

    def steps_of(agents: AgentCF, *rest: Any) -> list[Step]:
        held.append(agents)
        if warm is not None:
            warm(agents)
        return real_steps(agents, *rest)

    def in_order(steps: Sequence[Step], model: Any, journal: Journal, **_: Any) -> None:
        for step in sorted(steps, key=lambda step: step.number):
            if before_step is not None:
                before_step(held[-1], step)
            _run_alone(step, model, journal, prompts)
            if after_step is not None:
                after_step(held[-1], step)

    try:
        model = Journaled(backbone, journal, embedder=backbone, batch_size=config.batch_size)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(pipeline, "_steps", steps_of))
            if one_by_one:
                stack.enter_context(mock.patch.object(pipeline, "run_steps", in_order))
            agents = pipeline._simulate(
                config, dataset, plan, model, backbone.control_tokens, journal, folder, SilentProgress()
            )
        journal.export_events(folder / "events.jsonl")
        journal.fold_check()
        log = (folder / "events.jsonl").read_bytes()
        return Played(agents, plan, list(journal.events()), log, journal.ledger(), folder, prompts)
    finally:
        journal.close()


def _run_alone(step: Step, model: Any, journal: Journal, prompts: list[tuple[int, Call]]) -> None:
    generator = step.run()
    try:
        calls = next(generator)
        while True:
            prompts += [(step.number, call) for call in calls]
            answers: list[Answer] = model.answer(calls)
            calls = generator.send(answers)
    except StopIteration as stop:
        result = stop.value
    journal.commit([StepCommit(step.number, result.events, result.memory)])
    result.apply()


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """`recollect.simulate` without the statistics: for tests of what happens before them."""
    from recollect.types import Report

    def empty(*_: Any, **__: Any) -> Report:
        return Report("simulate", {}, {})

    with mock.patch.object(pipeline, "validate", empty):
        yield
