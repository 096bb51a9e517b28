"""The durable record of a run: paid model calls, events, memories. Write once, resume, replay, export.

One SQLite file, one writer. A call's answer is recorded before it is used, a step's events and memory writes are
committed together, and nothing here depends on the order in which steps were finished: the event log is exported in
step order. Not covered: loss of power with `synchronous="NORMAL"` may undo the last commits (the file stays
consistent, the death of the process loses nothing), and file systems without working locks.
"""

from recollect.journal.interrupts import Interrupts
from recollect.journal.records import Failure, MemoryRow, MemoryWrite, RecordedCall, RecordedText, StepCommit
from recollect.journal.store import Journal, remove

__all__ = [
    "Failure",
    "Interrupts",
    "Journal",
    "MemoryRow",
    "MemoryWrite",
    "RecordedCall",
    "RecordedText",
    "StepCommit",
    "remove",
]
