"""The eight tasks of TRACE: how their prompts are built, what scores them, how long an answer may be.

A prompt is (prefix, body, cue).  The prefix states the task, the cue asks for the answer; only the body may be
shortened.  Where a question is useless without its end (options, the target of a stance), that end counts as cue.
Source: trace_benchmark 2.2, 3.1, 4 (arXiv 2310.06762).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError, UnknownName

Metric = Literal["accuracy", "rouge_l", "edit_similarity", "sari"]
AnswerKind = Literal["letter", "number", "letter_and_text", "text", "code"]
Keep = Literal["head", "tail"]


@dataclass(frozen=True)
class TraceTask:
    """One task.

    instruction: the sentence a prompt begins with ("" for Py150).  heading: what stands between it and the body.
    cue: what a prompt ends with.  cue_from: where the part that must be kept begins, searched from the end.
    keep: the end of the body that survives shortening.  metric: the primary one.  answer: its form.
    max_new_tokens: the generation ceiling.  Scores do not need more, though with SmolLM2's vocabulary one test answer
    of 20Minuten and the explanations (not the letters) of 24 in 400 of ScienceQA are longer.
    epochs_full, epochs_lora: the paper's, for tuning all parameters and for LoRA.
    """

    name: str
    domain: str
    language: str
    instruction: str
    heading: str
    cue: str
    cue_from: str
    keep: Keep
    metric: Metric
    answer: AnswerKind
    max_new_tokens: int
    epochs_full: int
    epochs_lora: int

    @property
    def prefix(self) -> str:
        """Instruction and heading."""
        return self.instruction + self.heading


C_STANCE = TraceTask(
    name="C-STANCE",
    domain="stance of posts",
    language="Chinese",
    instruction="判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。\n",
    heading="文本：\n",
    cue="态度：",
    cue_from="\n对象：\n",
    keep="head",
    metric="accuracy",
    answer="letter",
    max_new_tokens=8,
    epochs_full=1,
    epochs_lora=5,
)
FOMC = TraceTask(
    name="FOMC",
    domain="stance of central bankers",
    language="English",
    instruction="What is the monetary policy stance for the following text? "
    "A. dovish, B. hawkish, C. neutral. Choose one from A, B and C.\n",
    heading="Text:\n",
    cue="Stance:",
    cue_from="\nStance:",
    keep="head",
    metric="accuracy",
    answer="letter",
    max_new_tokens=8,
    epochs_full=1,
    epochs_lora=3,
)
MEETING_BANK = TraceTask(
    name="MeetingBank",
    domain="summaries of council meetings",
    language="English",
    instruction="Write a summary of the following meeting transcripts.\n",
    heading="Meeting transcripts:\n",
    cue="Summary:",
    cue_from="\nSummary:",
    keep="head",
    metric="rouge_l",
    answer="text",
    max_new_tokens=512,
    epochs_full=5,
    epochs_lora=7,
)
PY150 = TraceTask(
    name="Py150",
    domain="next line of code",
    language="Python",
    instruction="",
    heading="",
    cue="",
    cue_from="",
    keep="tail",
    metric="edit_similarity",
    answer="code",
    max_new_tokens=160,
    epochs_full=5,
    epochs_lora=5,
)
SCIENCE_QA = TraceTask(
    name="ScienceQA",
    domain="school science",
    language="English",
    instruction="Choose an answer for the following question and give your reasons.\n\n",
    heading="Question:\n",
    cue="Answer:",
    cue_from="\n\nChoices:\n",
    keep="head",
    metric="accuracy",
    answer="letter_and_text",
    max_new_tokens=512,
    epochs_full=1,
    epochs_lora=3,
)
NUMGLUE_CM = TraceTask(
    name="NumGLUE-cm",
    domain="arithmetic that needs common sense",
    language="English",
    instruction="Solve the following math problem.\n",
    heading="Question:\n",
    cue="Answer:",
    cue_from="\nAnswer:",
    keep="head",
    metric="accuracy",
    answer="number",
    max_new_tokens=16,
    epochs_full=5,
    epochs_lora=5,
)
NUMGLUE_DS = TraceTask(
    name="NumGLUE-ds",
    domain="arithmetic of chemistry and physics",
    language="English",
    instruction="Solve the following math problem.\n",
    heading="Question:\n",
    cue="Answer:",
    cue_from="\nAnswer:",
    keep="head",
    metric="accuracy",
    answer="number",
    max_new_tokens=16,
    epochs_full=5,
    epochs_lora=5,
)
MINUTEN = TraceTask(
    name="20Minuten",
    domain="simplification of news",
    language="German",
    instruction="Provide a simplified version of the following paragraph in German.\n\n",
    heading="Paragraph:\n",
    cue="Simplification:",
    cue_from="\n\nSimplification:",
    keep="head",
    metric="sari",
    answer="text",
    max_new_tokens=256,
    epochs_full=5,
    epochs_lora=7,
)
LIMA = TraceTask(
    name="Lima",
    domain="general instructions",
    language="English",
    instruction="",
    heading="",
    cue="",
    cue_from="",
    keep="head",
    metric="rouge_l",
    answer="text",
    max_new_tokens=512,
    epochs_full=1,
    epochs_lora=1,
)
"""The form of the replay buffer's rows; it has no test answers and is no task of a sequence."""

TRACE_TASKS = (C_STANCE, FOMC, MEETING_BANK, PY150, SCIENCE_QA, NUMGLUE_CM, NUMGLUE_DS, MINUTEN)
STANDARD_ORDER = tuple(task.name for task in TRACE_TASKS)
_BY_NAME = {task.name: task for task in TRACE_TASKS}


def trace_task(name: str) -> TraceTask:
    """The task called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in _BY_NAME:
        hint = "Lima is a replay buffer without scorable answers, not a task" if name == "Lima" else ""
        raise UnknownName("TRACE task", name, STANDARD_ORDER, hint)
    return _BY_NAME[name]


def trace_tasks(names: Sequence[str] = STANDARD_ORDER) -> tuple[TraceTask, ...]:
    """The tasks of a sequence, in the order given.

    Raises:
        UnknownName: a name that is no task.
        ConfigError: no name, or one that occurs twice.
    """
    tasks = tuple(trace_task(name) for name in names)
    if not tasks:
        raise ConfigError(f"no tasks given; name at least one of {', '.join(STANDARD_ORDER)}")
    twice = [name for at, name in enumerate(names) if name in names[:at]]
    if twice:
        raise ConfigError(f"task {twice[0]!r} is given twice; a sequence visits each task once")
    return tasks
