"""The agents' own work, cut to the size of a benchmark: training steps, slates, and models that look on.

Agents, prompts, writers and plans are the package's; embeddings are hashed words, because no figure here is about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.agents.agentcf import AgentCF
from recollect.agents.config import SimulateConfig
from recollect.agents.groups import GroupViews
from recollect.agents.item_features import ItemFeatures
from recollect.agents.memory_index import ExactIndex
from recollect.agents.plan import Plan, make_plan
from recollect.agents.population import in_time_order
from recollect.agents.questions import Questions
from recollect.agents.recall import Recall
from recollect.agents.scheduler import Step
from recollect.agents.writers import LlmWriter, StructuredWriter
from recollect.backbones.protocol import Answer, Call, Choice, Completion, Request, Scored, Scoring
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data import load_dataset
from recollect.io import canonical_json
from recollect.journal import Journal
from recollect.prompts.render import Renderer
from recollect.types import Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from recollect.backbones.server import ServerBackbone

SHORT_TEXT_TOKENS = 16
SHORT_JSON_TOKENS = 80
SHORT_STRING = 32  # characters of a string in a short JSON answer


@dataclass(frozen=True)
class World:
    """A data set with a plan and fresh agents."""

    dataset: Dataset
    plan: Plan
    agents: AgentCF

    def training_steps(self, most: int | None = None) -> list[Step]:
        """The training interactions in the run's order, numbered from 0; rebuilds of groups are left out."""
        rows = self.plan.population.training.tolist()[:most]
        return [
            self.agents.training_step(number, row, self.plan.negatives[row], "train") for number, row in enumerate(rows)
        ]


def open_world(
    data: str,
    *,
    fingerprint: str,
    control_tokens: Sequence[str],
    seed: int,
    users: int,
    interactions: int,
    **options: Any,
) -> World:
    """Agents that have read their plain history and taken no step.

    Args:
        fingerprint, control_tokens: of the model that will be asked.
        options: further fields of `SimulateConfig`.
    """
    config = SimulateConfig(
        data=data, users=users, interactions_per_user=interactions, held_out=1, seed=seed, recall=False
    )
    config = replace(config, **options)
    dataset = load_dataset(data, seed=seed)
    plan = make_plan(dataset, config)
    log = dataset.interactions
    features = ItemFeatures.of(dataset.catalog, len(dataset.domains))
    questions = Questions(dataset, Renderer(control_tokens, seed))
    population = plan.population
    shown = np.isin(log.user, population.users)
    items = np.unique(
        np.concatenate([log.item[shown], plan.test.candidates.ravel(), plan.calibration.candidates.ravel()])
    )
    embed = ScriptedBackbone().embed
    vectors = embed([questions.item_text(int(item)) for item in items])
    history = np.concatenate([population.history, population.training])
    agents = AgentCF(
        dataset,
        config,
        questions=questions,
        writer=LlmWriter(questions, fingerprint, seed=seed, temperature=config.temperature)
        if config.writer == "llm"
        else StructuredWriter(features),
        features=features,
        views=GroupViews(log, in_time_order(dataset, np.arange(len(log))), len(dataset.domains)),
        embed=embed,
        recall=Recall(
            {int(item): row for row, item in enumerate(items)},
            vectors,
            lambda item: (questions.item_text(item), dataset.domains[int(dataset.catalog.domain[item])]),
            lambda source: ExactIndex(),
            embed,
        ),
        fingerprint=fingerprint,
        history_rows={int(user): history[log.user[history] == user] for user in population.users},
    )
    agents.warm_start(population.history)
    return World(dataset, plan, agents)


@dataclass(frozen=True)
class Shopper:
    """A user before a slate of ten: `memory` as prompts take it, the slate's items, the one that was taken first."""

    user: int
    domain: int
    memory: dict[str, Any]
    items: tuple[int, ...]


def shoppers(world: World, n: int) -> list[Shopper]:
    """The first `n` test slates, each with its user's memory after the plain history."""
    agents, slates = world.agents, world.plan.test
    found = []
    for case in range(min(n, len(slates))):
        user, domain = int(slates.user[case]), int(slates.domain[case])
        memory = {
            "private": agents.private(user, domain).text,
            "fused": agents.fused(user, domain).text,
            "groups": agents.group_lines(user, domain, int(slates.time[case])),
        }
        target = int(slates.target[case])
        slate = slates.candidates[case].tolist()
        found.append(Shopper(user, domain, memory, (slate[target], *slate[:target], *slate[target + 1 :])))
    return found


@contextmanager
def scratch_journal() -> Iterator[Journal]:
    """A new journal that is deleted afterwards."""
    with TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / "journal.sqlite", config={}, resume=False)
        try:
            yield journal
        finally:
            journal.close()


class Brief:
    """A server whose texts are kept short: free text is cut early, JSON gets a schema with short strings.

    The agents' code runs unchanged; only the time spent on writing shrinks, so that many calls fit into a benchmark.
    """

    def __init__(self, server: ServerBackbone) -> None:
        self._server = server
        self.fingerprint = f"brief/{server.fingerprint}"
        self.control_tokens = server.control_tokens

    def submit(self, call: Call) -> Future[Answer]:
        """Ask the server for a shorter answer."""
        return self._server.submit(shortened(call))

    def stats(self) -> dict[str, float]:
        """The server's counters."""
        return self._server.stats()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """As the server, shorter."""
        return self._server.generate([shortened(request) for request in requests])

    def choose(self, choices: Sequence[Choice]) -> list[Any]:
        """As the server."""
        return self._server.choose(choices)

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """As the server."""
        return self._server.score(scorings)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As the server."""
        return self._server.embed(texts)

    def close(self) -> None:
        """Closes the server's connections."""
        self._server.close()


def shortened(call: Any) -> Any:
    """A request with few tokens; any other call as it is."""
    if not isinstance(call, Request):
        return call
    if not call.schema:
        return replace(call, max_tokens=min(call.max_tokens, SHORT_TEXT_TOKENS))
    schema = _with_short_strings(json.loads(call.schema))
    return replace(call, max_tokens=min(call.max_tokens, SHORT_JSON_TOKENS), schema=canonical_json(schema))


def _with_short_strings(schema: Any) -> Any:
    if isinstance(schema, dict):
        changed = {name: _with_short_strings(value) for name, value in schema.items()}
        if changed.get("type") == "string" and "enum" not in changed:
            changed["maxLength"] = min(SHORT_STRING, changed.get("maxLength", SHORT_STRING))
        return changed
    return schema


class Batches:
    """A model seen without `submit`: the scheduler fills batches for it, as for an in-process model."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self.fingerprint: str = backbone.fingerprint
        self.control_tokens: tuple[str, ...] = backbone.control_tokens
        self.generate: Callable[..., Any] = backbone.generate
        self.choose: Callable[..., Any] = backbone.choose
        self.score: Callable[..., Any] = backbone.score
        self.embed: Callable[..., Any] = backbone.embed
        self.close: Callable[[], None] = backbone.close
