"""One exception tree. Every error a user can cause names the thing, the value seen and what to do.

`exit_code` is what the command line returns: 2 bad input, 74 the disk refused, 75 a server stayed away
(both resumable), 1 anything else.
"""

from __future__ import annotations

from typing import Any


class RecollectError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """By message: errors travel between processes, and some are built from other arguments."""
        return _restored, (type(self), str(self)), dict(self.__dict__)


def _restored(kind: type[RecollectError], message: str) -> RecollectError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class InputError(RecollectError):
    """The user gave something that cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """An option or a combination of options is illegal."""


class DataError(InputError):
    """A data file or folder is missing or malformed; the message names file and row."""


class UnknownName(InputError):
    """A data set, model, scheme or method that does not exist; the message lists the known ones."""

    def __init__(self, kind: str, value: str, known: list[str] | tuple[str, ...], hint: str = "") -> None:
        listed = ", ".join(sorted(known))
        super().__init__(f"unknown {kind} {value!r}; known: {listed}" + (f". {hint}" if hint else ""))


class MissingExtra(InputError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package!r}; install it with: pip install "recollect[{extra}]"')


class ModelFileError(InputError):
    """A model file is absent, corrupt (hash) or of a refused kind."""


class BackboneError(RecollectError):
    """A language model could not answer."""


class BackboneConfigError(BackboneError):
    """The server refuses who or what we ask for (401, 403, 404 model): retrying cannot help."""

    exit_code = 2


class ContextTooLong(BackboneError):
    """The prompt and the answer asked for do not fit the model's context; a shorter memory may."""


class ServerAway(BackboneError):
    """A server stayed unreachable or sick past the patience; what was paid for is in the journal."""

    exit_code = 75


class BudgetReached(BackboneError):
    """A limit on calls, tokens or seconds was reached; the run stopped at a step boundary."""

    exit_code = 75


class TooManyFailures(BackboneError):
    """More agents than `--max-failed` could not act."""


class MalformedOutput(BackboneError):
    """A model's answer is not what was asked for."""


class JournalError(RecollectError):
    """The run's journal cannot be used."""


class JournalLocked(JournalError):
    """Another process writes this run."""

    exit_code = 2


class ResumeRefused(JournalError):
    """The run in this folder was made with other options."""

    exit_code = 2


class ReplayMismatch(JournalError):
    """A replayed run asked something the journal does not hold; the message shows the first difference."""


class StorageRefused(RecollectError):
    """The disk refused a write (full, read-only, quota); nothing is half-written."""

    exit_code = 74


class TrainingDiverged(RecollectError):
    """A loss or a weight became NaN or infinite; nothing later in the run could be trusted."""


class BaselineFailed(RecollectError):
    """What others are compared with does not do what it must do by construction; no comparison is reported."""
