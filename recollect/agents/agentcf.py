"""AgentCF++: user and item agents that learn from a log (arXiv 2502.13843; base AgentCF: arXiv 2310.09233).

For each training interaction, in one global time order (§3 of the paper):
    decide between the real item and a negative  ->  update the private memory of the domain  ->  fuse what the other
    domains imply into the fused memory  ->  update both items' memories.
Interest groups are rebuilt at fixed points (`regrouping`); their shared memory is a view over the log. Ranking reads a
frozen state (`ranking`).

Switches for the differences between paper and official code live in `SimulateConfig`. Not covered: the rounds of base
AgentCF that repeat an interaction until the agent is right, and its batches of 20 against one snapshot; dependency
levels (`recollect.agents.scheduler`) give the sequential result instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from recollect.agents.config import SimulateConfig
from recollect.agents.groups import Group, GroupViews, load_groups
from recollect.agents.item_features import ItemFeatures
from recollect.agents.memory import Memory, MemoryStore
from recollect.agents.questions import LABELS, Questions, ShownItem
from recollect.agents.ranking import memory_evidence, rank_slate
from recollect.agents.recall import Recall, Version
from recollect.agents.recorder import Decision, Recorder, Steps
from recollect.agents.regrouping import rebuild
from recollect.agents.scheduler import Step
from recollect.agents.writers import Cost, Outcome, StructuredWriter, Writer
from recollect.backbones.journaled import CALL_FAULTS
from recollect.backbones.protocol import (
    Answer,
    Call,
    Choice,
    Chosen,
    Request,
    answer_tokens,
    call_key,
)
from recollect.eval.slates import Slates
from recollect.journal import Journal
from recollect.prompts.parsing import MalformedAnswer, ask_json
from recollect.rng import call_seed, stream
from recollect.types import Dataset


class AgentCF:
    """The agents of one run: their state and the steps that read and change it.

    `embed` turns texts into unit rows (journaled); it is called at barriers only, where nothing else runs.
    `history_rows` holds, per simulated user, the rows of the plain history and of training, oldest first.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: SimulateConfig,
        *,
        questions: Questions,
        writer: Writer,
        features: ItemFeatures,
        views: GroupViews,
        embed: Callable[[Sequence[str]], np.ndarray],
        recall: Recall,
        fingerprint: str,
        history_rows: dict[int, np.ndarray],
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.variant = config.variant
        self.questions = questions
        self.writer = writer
        self.features = features
        self.views = views
        self.embed = embed
        self.recall = recall
        self.fingerprint = fingerprint
        self.history_rows = history_rows
        self.plain_rows: dict[int, np.ndarray] = {}
        self.memories = MemoryStore()
        self.groups: list[Group] = []
        self._groups_of: dict[int, list[Group]] = {}
        log = dataset.interactions
        self._domain = log.domain if log.domain is not None else np.zeros(len(log), dtype=np.int16)

    # -- names of things

    def user_id(self, user: int) -> str:
        return str(self.dataset.users.user_ids[user])

    def item_id(self, item: int) -> str:
        return str(self.dataset.catalog.item_ids[item])

    def user_key(self, user: int) -> str:
        return f"user:{self.user_id(user)}"

    def _item(self, item: int) -> str:
        return f"item:{self.item_id(item)}"

    def _private_key(self, domain: int) -> str:
        return f"private:{self.dataset.domains[domain]}" if self.variant.dual else "single"

    def _fused_key(self, domain: int) -> str:
        return f"fused:{self.dataset.domains[domain]}"

    def private(self, user: int, domain: int) -> Memory:
        """The user's private memory of a domain (or the single memory of base AgentCF)."""
        return self.memories.get(self.user_key(user), self._private_key(domain)) or Memory()

    def fused(self, user: int, domain: int) -> Memory:
        """What the user's other domains imply for this one."""
        return self.memories.get(self.user_key(user), self._fused_key(domain)) or Memory()

    def privates(self, user: int) -> dict[int, Memory]:
        """Private memories by domain, only of domains the user has been active in."""
        held = self.memories.of(self.user_key(user), "private:")
        return {d: held[key] for d, name in enumerate(self.dataset.domains) if (key := f"private:{name}") in held}

    def item_memory(self, item: int) -> Memory:
        """The item's memory; before any update its side information in one line (official code's start)."""
        return self.memories.get(self._item(item), "item") or Memory(text=self.questions.description(item))

    def groups_of(self, user: int) -> list[Group]:
        """Groups the user belongs to, in rank order."""
        return self._groups_of.get(user, [])

    def shown(self, item: int) -> ShownItem:
        return self.questions.shown(item, self.item_memory(item).text)

    def group_lines(self, user: int, domain: int, now: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(group name, recent titles), newest first, of the user's first groups that show anything new in the domain.

        A title is printed once however many groups share it: repeating it costs tokens and tells nothing.
        """
        lines: list[tuple[str, tuple[str, ...]]] = []
        printed: set[int] = set()
        for group in self.groups_of(user):
            items = self.views.recent(group, domain, now, user, self.config.group_window)
            fresh = [item for item in dict.fromkeys(items[::-1].tolist()) if item not in printed]
            if fresh:
                printed.update(fresh)
                lines.append((group.name, tuple(self.questions.title(item) for item in fresh)))
            if len(lines) == self.config.groups_read:
                break
        return tuple(lines)

    def warm_start(self, rows: np.ndarray) -> None:
        """Read plain history into the weighted memories; a model-written memory starts empty instead."""
        if not isinstance(self.writer, StructuredWriter):
            return
        user_of = self.dataset.interactions.user[rows]
        for user in np.unique(user_of).tolist():
            self.plain_rows[user] = rows[user_of == user]
            for key, memory in self.absorbed(self.writer, self.plain_rows[user]).items():
                self.memories.put(self.user_key(user), key, memory)
                self._note(-1, self.user_key(user), key, memory)

    def absorbed(self, writer: StructuredWriter, rows: np.ndarray) -> dict[str, Memory]:
        """Private memories by key after one user's plain `rows`."""
        memories: dict[str, Memory] = {}
        for row in rows.tolist():
            key = self._private_key(int(self._domain[row]))
            memories[key] = writer.absorb(memories.get(key, Memory()), int(self.dataset.interactions.item[row]))
        return memories

    def before(self, rows: np.ndarray, now: int | None) -> np.ndarray:
        return rows if now is None else rows[self.dataset.interactions.time[rows] < now]

    def catch_up(self, journal: Journal, rebuilds: Sequence[int]) -> None:
        """Go on from a journal: memories as last written, the index as of the last committed rebuild step.

        Costs O(state). Only a run that looks up past memories reads them again: one row a private memory version.
        """
        if self.config.recall:
            for event in journal.events(kinds=("private",)):
                self._note(event["step"], event["owner"], event["key"], Memory.load(event["after"]))
        for (owner, key), row in journal.memories().items():
            if owner == "groups":
                self.set_groups(load_groups(row.text))
            else:
                self.memories.put(owner, key, Memory.load(row.text))
        self.recall.restore(rebuilds)

    def put(self, step: int, owner: str, key: str, memory: Memory) -> None:
        """Replace a memory, as written by `step`."""
        self.memories.put(owner, key, memory)
        self._note(step, owner, key, memory)

    def _note(self, step: int, owner: str, key: str, memory: Memory) -> None:
        if self.config.recall and (key == "single" or key.startswith("private:")):
            self.recall.note(Version(step, owner, key, memory.updates, memory.text))

    def set_groups(self, groups: list[Group]) -> None:
        """Replace the interest groups."""
        self.groups = groups
        self._groups_of = {}
        for group in groups:
            for member in group.members:
                self._groups_of.setdefault(member, []).append(group)
        if self.config.recall:
            self.recall.put_tags([group.tags for group in groups])

    # -- one training interaction

    def training_step(
        self, number: int, row: int, negative: int, part: str, rehearsal: np.ndarray | None = None
    ) -> Step:
        """Predict, compare with the log, reflect (§3.2-3.5).

        `rehearsal` (S,) is a slate with the real item: what memories say of it beforehand is recorded without any model
        call, as further cases to fit the choice layer on.
        """
        log = self.dataset.interactions
        user, item = int(log.user[row]), int(log.item[row])
        touches = (self.user_key(user), self._item(item), self._item(negative))
        domain = int(self._domain[row])
        return Step(
            number,
            touches,
            lambda: self._guarded(
                self._train(number, row, negative, part, rehearsal),
                "choice",
                Recorder(self, number, user, domain, part),
                [item, negative],
            ),
        )

    def _train(self, number: int, row: int, negative: int, part: str, rehearsal: np.ndarray | None) -> Steps:
        log = self.dataset.interactions
        user, item, domain = int(log.user[row]), int(log.item[row]), int(self._domain[row])
        names = (self.user_id(user), row)
        real, other = self.shown(item), self.shown(negative)
        record = Recorder(self, number, user, domain, part)
        if rehearsal is not None:
            # Other items' memories may change in any order of steps, so a rehearsal reads the user's side alone.
            evidence = memory_evidence(self, user, domain, int(log.time[row]), rehearsal, read_items=False)
            record.rehearsal(rehearsal.tolist(), evidence)
        decision = yield from self._decide(user, domain, int(log.time[row]), real, other, names)
        record.decision("choice", decision, [item, negative], item if decision.right else negative)
        outcome = Outcome(domain, real, other, decision.right, decision.explanation)

        private = self.private(user, domain)
        written = yield from self.writer.private(private, outcome, names)
        (new_private,) = written.memories
        record.memory(
            "private", self.user_key(user), self._private_key(domain), private, new_private, written.cost, [item]
        )

        taste = new_private
        if self.variant.fusion != "none":
            new_fused = yield from self._fuse(record, user, domain, new_private, names)
            # The item update reads the new fused memory; before other domains said anything, the private one.
            taste = new_fused if new_fused.text else new_private

        old = self.item_memory(item), self.item_memory(negative)
        written = yield from self.writer.items(taste, old, outcome, names, update_negative=self.variant.update_negative)
        record.memory("item", self._item(item), "item", old[0], written.memories[0], written.cost, [item])
        if self.variant.update_negative:
            record.memory("item", self._item(negative), "item", old[1], written.memories[1], Cost(), [negative])
        return record.result()

    def _guarded(self, steps: Steps, kind: str, record: Recorder, items: Sequence[int]) -> Steps:
        """A step whose model call failed for good leaves one event that says so, and changes no memory."""
        try:
            return (yield from steps)
        except CALL_FAULTS as error:
            record.failure(kind, items, error)
            return record.result()

    def _fuse(
        self, record: Recorder, user: int, domain: int, private: Memory, names: tuple[str | int, ...]
    ) -> Generator[Sequence[Call], list[Answer], Memory]:
        old = self.fused(user, domain)
        privates = {**self.privates(user), domain: private}
        if self.variant.fusion == "one_call":
            written = yield from self.writer.fuse_at_once(domain, old, privates, names)
        else:
            others = {d: memory for d, memory in privates.items() if d != domain}
            extracted = yield from self.writer.extract(domain, others, private, names)
            record.memory("fuse_extract", "", "", Memory(), extracted.memories[0], extracted.cost, [])
            written = yield from self.writer.fuse(domain, old, extracted.memories[0], private, names)
        (new,) = written.memories
        record.memory("fuse", self.user_key(user), self._fused_key(domain), old, new, written.cost, [])
        return new

    def read_memory(self, user: int, domain: int, now: int, *, training: bool) -> dict[str, Any]:
        """What the user's prompt says of the user: private and fused memory, lines of the groups' shared memory."""
        code = training and self.config.decision_memory == "code" and self.variant.fusion != "none"
        return {
            "private": "" if code else self.private(user, domain).text,
            "fused": self.fused(user, domain).text,
            "groups": () if code else self.group_lines(user, domain, now),
        }

    def _decide(
        self, user: int, domain: int, now: int, real: ShownItem, other: ShownItem, names: tuple[str | int, ...]
    ) -> Generator[Sequence[Call], list[Answer], Decision]:
        memory = self.read_memory(user, domain, now, training=True)
        if self.config.decision == "generate":
            return (yield from self._decide_by_text(domain, memory, real, other, names))
        return (yield from self.choose(domain, memory, real, other, names))

    def _is_right(self, probability: float, names: tuple[str | int, ...]) -> bool:
        """Exactly undecided agents flip a named coin, so that no order of the candidates is favoured."""
        if probability == 0.5:
            return bool(stream(self.config.seed, "tie", *names).random() < 0.5)
        return probability > 0.5

    def choose(
        self,
        domain: int,
        memory: dict[str, Any],
        real: ShownItem,
        other: ShownItem,
        names: tuple[str | int, ...],
    ) -> Generator[Sequence[Call], list[Answer], Decision]:
        """p(real) from the label log-odds, averaged in logit space over both orders unless `order="paper"`.

        The negative is printed first, as in the paper, then (if asked) the real item.
        """
        orders = [(other, real), (real, other)] if self.config.order == "both" else [(other, real)]
        calls = [Choice(self.questions.choice(domain, memory, *pair), LABELS, site="choice") for pair in orders]
        answers = yield calls
        log_odds = []
        for pair, answer in zip(orders, answers, strict=True):
            assert isinstance(answer, Chosen)
            first, second = answer.log_probs
            log_odds.append(second - first if pair[1] is real else first - second)
        probability = sigmoid(sum(log_odds) / len(log_odds))
        return Decision(
            self._is_right(probability, names), probability, "", self.cost(calls[0], answers), tuple(log_odds)
        )

    def _decide_by_text(
        self, domain: int, memory: dict[str, Any], real: ShownItem, other: ShownItem, names: tuple[str | int, ...]
    ) -> Generator[Sequence[Call], list[Answer], Decision]:
        chat, schema = self.questions.choice_explain(domain, memory, other, real)
        request = Request(
            chat,
            max_tokens=200,
            temperature=self.config.temperature,
            schema=schema,
            seed=call_seed(self.config.seed, "choice_explain", *names),
            site="choice_explain",
        )
        key = call_key(self.fingerprint, request)[:16]
        value, tokens_in, tokens_out = yield from ask_json(request)
        if isinstance(value, MalformedAnswer):
            # The declared no-op: nothing was chosen, so the truth is learned as after a wrong choice.
            return Decision(False, None, "", Cost(key, tokens_in, tokens_out, ok=False, fault=value.reason))
        return Decision(value["choice"] == LABELS[1], None, value["explanation"], Cost(key, tokens_in, tokens_out))

    def cost(self, call: Call, answers: Sequence[Answer]) -> Cost:
        tokens = [answer_tokens(answer) for answer in answers]
        return Cost(call_key(self.fingerprint, call)[:16], sum(t[0] for t in tokens), sum(t[1] for t in tokens))

    # -- one ranked slate

    def ranking_step(self, number: int, slates: Slates, case: int, part: str) -> Step:
        """Score a slate with the state as it stands (§3.8); changes nothing. Rated rows are asked for a rating."""
        user, domain = int(slates.user[case]), int(slates.domain[case])
        items = [int(item) for item in slates.candidates[case]]
        return Step(
            number,
            (f"case:{number}",),
            lambda: self._guarded(
                rank_slate(self, number, slates, case, part), "rank", Recorder(self, number, user, domain, part), items
            ),
        )

    # -- barriers

    def rebuild_step(self, number: int, users: Sequence[int], now: int | None) -> Step:
        """Bring the retrieval index up to date and, where the method has groups, build them anew (§3.6).

        Groups know what happened before `now`, the time of the next training interaction (None: training is over).
        """
        return Step(number, ("groups",), lambda: rebuild(self, number, users, now), barrier=True)


def sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
