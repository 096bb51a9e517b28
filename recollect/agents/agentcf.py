"""AgentCF++: user and item agents that learn from a log (arXiv 2502.13843; base AgentCF: arXiv 2310.09233).

For each training interaction, in one global time order (§3 of the paper):
    decide between the real item and a negative  ->  update the private memory of the domain  ->  fuse what the other
    domains imply into the fused memory  ->  update both items' memories.
Interest groups are rebuilt at fixed points; their shared memory is a view over the log. Ranking reads a frozen state.

Switches for the differences between paper and official code live in `SimulateConfig`. Not covered: the rounds of base
AgentCF that repeat an interaction until the agent is right, and its batches of 20 against one snapshot; dependency
levels (`recollect.agents.scheduler`) give the sequential result instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from recollect.agents.config import SimulateConfig
from recollect.agents.evidence import Evidence, bradley_terry
from recollect.agents.groups import Group, GroupViews, build_groups, groups_of_histories, load_groups
from recollect.agents.item_features import ItemFeatures
from recollect.agents.memory import Memory, MemoryStore
from recollect.agents.questions import LABELS, Questions, ShownItem
from recollect.agents.recall import Recall, Version
from recollect.agents.recorder import Decision, Recorder
from recollect.agents.scheduler import Step, StepResult
from recollect.agents.writers import Cost, Outcome, StructuredWriter, Writer
from recollect.backbones.journaled import CALL_FAULTS
from recollect.backbones.protocol import (
    Answer,
    Call,
    Choice,
    Chosen,
    Request,
    Scored,
    Scoring,
    answer_tokens,
    call_key,
)
from recollect.eval.slates import Slates
from recollect.io import sha256_text
from recollect.journal import Journal
from recollect.prompts.parsing import MalformedAnswer, ask_json
from recollect.rng import call_seed, stream
from recollect.types import Dataset

Steps = Generator[Sequence[Call], list[Answer], StepResult]
RATINGS = ("1", "2", "3", "4", "5")


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
        self._plain_rows: dict[int, np.ndarray] = {}
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

    def _user(self, user: int) -> str:
        return f"user:{self.user_id(user)}"

    def _item(self, item: int) -> str:
        return f"item:{self.item_id(item)}"

    def _private_key(self, domain: int) -> str:
        return f"private:{self.dataset.domains[domain]}" if self.variant.dual else "single"

    def _fused_key(self, domain: int) -> str:
        return f"fused:{self.dataset.domains[domain]}"

    def private(self, user: int, domain: int) -> Memory:
        """The user's private memory of a domain (or the single memory of base AgentCF)."""
        return self.memories.get(self._user(user), self._private_key(domain)) or Memory()

    def fused(self, user: int, domain: int) -> Memory:
        """What the user's other domains imply for this one."""
        return self.memories.get(self._user(user), self._fused_key(domain)) or Memory()

    def privates(self, user: int) -> dict[int, Memory]:
        """Private memories by domain, only of domains the user has been active in."""
        held = self.memories.of(self._user(user), "private:")
        return {d: held[key] for d, name in enumerate(self.dataset.domains) if (key := f"private:{name}") in held}

    def item_memory(self, item: int) -> Memory:
        """The item's memory; before any update its side information in one line (official code's start)."""
        return self.memories.get(self._item(item), "item") or Memory(text=self.questions.description(item))

    def groups_of(self, user: int) -> list[Group]:
        """Groups the user belongs to, in rank order."""
        return self._groups_of.get(user, [])

    def _shown(self, item: int) -> ShownItem:
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
            self._plain_rows[user] = rows[user_of == user]
            for key, memory in self._absorbed(self.writer, self._plain_rows[user]).items():
                self.memories.put(self._user(user), key, memory)
                self._note(-1, self._user(user), key, memory)

    def _absorbed(self, writer: StructuredWriter, rows: np.ndarray) -> dict[str, Memory]:
        """Private memories by key after one user's plain `rows`."""
        memories: dict[str, Memory] = {}
        for row in rows.tolist():
            key = self._private_key(int(self._domain[row]))
            memories[key] = writer.absorb(memories.get(key, Memory()), int(self.dataset.interactions.item[row]))
        return memories

    def _before(self, rows: np.ndarray, now: int | None) -> np.ndarray:
        return rows if now is None else rows[self.dataset.interactions.time[rows] < now]

    def catch_up(self, journal: Journal, rebuilds: Sequence[int]) -> None:
        """Go on from a journal: memories as last written, the index as of the last committed rebuild step."""
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
        touches = (self._user(user), self._item(item), self._item(negative))
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
        real, other = self._shown(item), self._shown(negative)
        record = Recorder(self, number, user, domain, part)
        if rehearsal is not None:
            # Other items' memories may change in any order of steps, so a rehearsal reads the user's side alone.
            evidence = self._memory_evidence(user, domain, int(log.time[row]), rehearsal, read_items=False)
            record.rehearsal(rehearsal.tolist(), evidence)
        decision = yield from self._decide(user, domain, int(log.time[row]), real, other, names)
        record.decision("choice", decision, [item, negative], item if decision.right else negative)
        outcome = Outcome(domain, real, other, decision.right, decision.explanation)

        private = self.private(user, domain)
        written = yield from self.writer.private(private, outcome, names)
        (new_private,) = written.memories
        record.memory(
            "private", self._user(user), self._private_key(domain), private, new_private, written.cost, [item]
        )

        taste = new_private
        if self.variant.fusion != "none":
            new_fused = yield from self._fuse(record, user, domain, new_private, names)
            # The item update reads the new fused memory; before other domains said anything, the private one.
            taste = new_fused if new_fused.text else new_private

        old = self.item_memory(item), self.item_memory(negative)
        written = yield from self.writer.items(
            taste, *old, outcome, names, update_negative=self.variant.update_negative
        )
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
        record.memory("fuse", self._user(user), self._fused_key(domain), old, new, written.cost, [])
        return new

    def _read_memory(self, user: int, domain: int, now: int, *, training: bool) -> dict[str, Any]:
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
        memory = self._read_memory(user, domain, now, training=True)
        if self.config.decision == "generate":
            return (yield from self._decide_by_text(domain, memory, real, other, names))
        return (yield from self._choose(domain, memory, real, other, names))

    def _is_right(self, probability: float, names: tuple[str | int, ...]) -> bool:
        """Exactly undecided agents flip a named coin, so that no order of the candidates is favoured."""
        if probability == 0.5:
            return bool(stream(self.config.seed, "tie", *names).random() < 0.5)
        return probability > 0.5

    def _choose(
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
            self._is_right(probability, names), probability, "", self._cost(calls[0], answers), tuple(log_odds)
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

    def _cost(self, call: Call, answers: Sequence[Answer]) -> Cost:
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
                self._rank(number, slates, case, part), "rank", Recorder(self, number, user, domain, part), items
            ),
        )

    def _rank(self, number: int, slates: Slates, case: int, part: str) -> Steps:
        user, domain, now = int(slates.user[case]), int(slates.domain[case]), int(slates.time[case])
        items = [int(item) for item in slates.candidates[case]]
        target = int(slates.target[case])
        memory = self._read_memory(user, domain, now, training=False)
        record = Recorder(self, number, user, domain, part)
        evidence = self._memory_evidence(user, domain, now, slates.candidates[case], read_items=True)
        cost = yield from self._language_evidence(domain, memory, items, evidence)
        record.ranking(items, target, evidence, cost)
        if part == "test":
            negative = items[0 if target else 1]
            names = (self.user_id(user), int(slates.row[case]), "pair")
            decision = yield from self._choose(domain, memory, self._shown(items[target]), self._shown(negative), names)
            picked = items[target] if decision.right else negative
            record.decision("choice", decision, [items[target], negative], picked)
        rating = self.dataset.interactions.rating
        if rating is not None and not math.isnan(rating[slates.row[case]]):
            call = Choice(self.questions.rating(domain, memory, self._shown(items[target])), RATINGS, site="rating")
            (answer,) = yield [call]
            assert isinstance(answer, Chosen)
            record.rating(items[target], np.exp(answer.log_probs), self._cost(call, [answer]))
        return record.result()

    def _memory_evidence(
        self, user: int, domain: int, now: int, candidates: np.ndarray, *, read_items: bool
    ) -> Evidence:
        """What memories say of each candidate, without any call."""
        evidence = Evidence(len(candidates))
        private, fused = self.private(user, domain), self.fused(user, domain)
        if self.config.writer == "structured":
            evidence.put("private_memory", self.features.match(private.weights, candidates))
            if read_items:
                evidence.put(
                    "item_memory",
                    [evidence.audience(private.weights, self.item_memory(int(item)).weights) for item in candidates],
                )
            if self.variant.fusion != "none":
                evidence.put("fused_memory", self.features.match(fused.weights, candidates))
        else:
            texts = [private.text, fused.text]
            evidence.put("private_memory", self.recall.similarity(texts[0], candidates))
            if self.variant.fusion != "none":
                evidence.put("fused_memory", self.recall.similarity(texts[1], candidates))
        if self.variant.groups != "none":
            groups = self.groups_of(user)
            recent = {
                int(item)
                for group in groups
                for item in self.views.recent(group, domain, now, user, self.config.group_window)
            }
            evidence.put("group_view", self.recall.closest(candidates, sorted(recent)))
            popularity = self.views.popularity(groups, domain, now, user)
            evidence.put("group_popularity", [math.log1p(popularity.get(int(item), 0.0)) for item in candidates])
        if self.config.recall:
            evidence.put("recalled_memory", self.recall.past_memories(self._user(user), candidates))
        return evidence

    def _language_evidence(
        self, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
    ) -> Generator[Sequence[Call], list[Answer], Cost]:
        if self.config.ranking == "pairwise":
            return (yield from self._rank_pairwise(domain, memory, items, evidence))
        if self.config.ranking == "listwise":
            return (yield from self._rank_listwise(domain, memory, items, evidence))
        titles = tuple(self.questions.title(item) for item in items)
        calls = [
            Scoring(self.questions.rank_context(domain, memory), titles, site="rank"),
            Scoring(self.questions.rank_neutral(domain), titles, site="rank_neutral"),
        ]
        user, neutral = answers = yield calls
        assert isinstance(user, Scored)
        assert isinstance(neutral, Scored)
        length = np.asarray(user.n_tokens, dtype=float)
        evidence.put("lm_likelihood", np.asarray(user.log_probs) / length)
        evidence.put("lm_pmi", (np.asarray(user.log_probs) - np.asarray(neutral.log_probs)) / length)
        return self._cost(calls[0], answers)

    def _rank_pairwise(
        self, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
    ) -> Generator[Sequence[Call], list[Answer], Cost]:
        shown = [self._shown(item) for item in items]
        pairs = [pair for a, b in combinations(range(len(items)), 2) for pair in ((a, b), (b, a))]
        calls = [
            Choice(self.questions.choice(domain, memory, shown[a], shown[b]), LABELS, site="pairwise") for a, b in pairs
        ]
        answers = yield calls
        log_odds = np.zeros((len(items), len(items)))
        for (a, b), answer in zip(pairs, answers, strict=True):
            assert isinstance(answer, Chosen)
            odds = (answer.log_probs[0] - answer.log_probs[1]) / 2
            log_odds[a, b] += odds
            log_odds[b, a] -= odds
        evidence.put("lm_pairwise", bradley_terry(log_odds))
        return self._cost(calls[0], answers)

    def _rank_listwise(
        self, domain: int, memory: dict[str, Any], items: list[int], evidence: Evidence
    ) -> Generator[Sequence[Call], list[Answer], Cost]:
        chat, schema, labels = self.questions.rank_list(domain, memory, [self._shown(item) for item in items])
        request = Request(chat, max_tokens=8 * len(items) + 16, schema=schema, site="rank_list")
        key = call_key(self.fingerprint, request)[:16]
        value, tokens_in, tokens_out = yield from ask_json(request)
        if isinstance(value, MalformedAnswer):
            evidence.put("lm_listwise", np.zeros(len(items)))
            return Cost(key, tokens_in, tokens_out, ok=False, fault=value.reason)
        place = {label: position for position, label in reversed(list(enumerate(value)))}
        # Items the model left out share the last place; labels it made up match nothing.
        evidence.put("lm_listwise", [-float(place.get(label, len(items))) for label in labels])
        return Cost(key, tokens_in, tokens_out)

    # -- barriers

    def rebuild_step(self, number: int, users: Sequence[int], now: int | None) -> Step:
        """Bring the retrieval index up to date and, where the method has groups, build them anew (§3.6).

        Groups know what happened before `now`, the time of the next training interaction (None: training is over).
        """
        return Step(number, ("groups",), lambda: self._rebuild(number, users, now), barrier=True)

    def _rebuild(self, number: int, users: Sequence[int], now: int | None) -> Steps:
        if self.config.recall:
            self.recall.index_pending(number)
        record = Recorder(self, number, None, None, "groups")
        if self.variant.groups == "none":
            return record.result()
        if self.variant.groups == "history":
            items = self.dataset.interactions.item
            rows = {user: self._before(self.history_rows[user], now) for user in users}
            vectors = {user: self.recall.vectors(items[held]).mean(axis=0) for user, held in rows.items() if len(held)}
            groups = groups_of_histories(vectors, kept=self.config.groups, seed=self.config.seed)
            cost = Cost()
        else:
            groups, cost = yield from self._tag_groups(number, users, now)
        record.groups(groups, cost)
        return record.result()

    def _tag_groups(
        self, number: int, users: Sequence[int], now: int | None
    ) -> Generator[Sequence[Call], list[Answer], tuple[list[Group], Cost]]:
        """All users' tags are asked for at once: their generators advance in lockstep."""
        asking = {}
        for user in users:
            held = self._tagged_memories(user, now)
            memories = {position: memory for position, memory in enumerate(held.values()) if memory.text}
            if memories:
                asking[user] = self.writer.tags(memories, (self.user_id(user), number))
        found = yield from in_lockstep(asking)
        tags = {user: owned for user, (owned, _) in found.items() if owned}
        distinct = sorted({tag for owned in tags.values() for tag in owned})
        vectors = dict(zip(distinct, self.embed(distinct), strict=True)) if distinct else {}
        costs = [cost for _, cost in found.values()]
        groups = build_groups(
            tags,
            vectors,
            kept=self.config.groups,
            most_clusters=self.config.clusters,
            by=self.config.group_by,
            seed=self.config.seed,
        )
        if self.config.writer == "llm" and groups:
            groups, named = yield from self._name_groups(groups, number)
            costs.append(named)
        hashes = "".join(cost.prompt_hash for cost in costs)
        return groups, Cost(
            sha256_text(hashes)[:16] if hashes else "",
            sum(cost.tokens_in for cost in costs),
            sum(cost.tokens_out for cost in costs),
            ok=all(cost.ok for cost in costs),
            fault="; ".join(sorted({cost.fault for cost in costs if cost.fault})),
        )

    def _tagged_memories(self, user: int, now: int | None) -> Mapping[str, Memory]:
        """The memories tags are read from. A user whose plain history reaches past `now` is known up to it only."""
        plain = self._plain_rows.get(user, np.zeros(0, dtype=np.int64))
        known = self._before(plain, now)
        if len(known) < len(plain) and isinstance(self.writer, StructuredWriter):
            return self._absorbed(self.writer, known)
        if not self.variant.dual:
            return self.memories.of(self._user(user), "single")
        if self.config.tag_source == "fused" and self.variant.fusion != "none":
            fused = self.memories.of(self._user(user), "fused:")
            if any(memory.text for memory in fused.values()):
                return fused
        return self.memories.of(self._user(user), "private:")

    def _name_groups(
        self, groups: list[Group], number: int
    ) -> Generator[Sequence[Call], list[Answer], tuple[list[Group], Cost]]:
        calls = [Request(self.questions.group_name(group.tags), max_tokens=16, site="group_name") for group in groups]
        answers = yield calls
        named = []
        for group, answer in zip(groups, answers, strict=True):
            phrase = self.questions.phrase(getattr(answer, "text", ""))
            named.append(Group(phrase or group.name, group.tags, group.members))
        return named, self._cost(calls[0], answers)


def sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def in_lockstep(
    asking: dict[int, Generator[Sequence[Call], list[Answer], Any]],
) -> Generator[Sequence[Call], list[Answer], dict[int, Any]]:
    """Run several questioners as one: every round yields all their pending calls together, in key order."""
    results: dict[int, Any] = {}
    pending: dict[int, Sequence[Call]] = {}

    def advance(key: int, answers: list[Answer] | None) -> None:
        try:
            pending[key] = next(asking[key]) if answers is None else asking[key].send(answers)
        except StopIteration as stop:
            results[key] = stop.value
            pending.pop(key, None)

    for key in asking:
        advance(key, None)
    while pending:
        order = list(pending)
        sizes = [len(pending[key]) for key in order]
        answers = yield [call for key in order for call in pending[key]]
        start = 0
        for key, size in zip(order, sizes, strict=True):
            advance(key, answers[start : start + size])
            start += size
    return {key: results[key] for key in asking}
