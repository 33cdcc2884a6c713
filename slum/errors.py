"""Every error a user can meet, and the exit code each one ends the command with.

    SlumError                 1   a bug, or something nobody foresaw
    ├── ConfigError           2   bad input: a file, an argument, a missing consent; nothing was changed
    ├── Conflict              4   somebody else changed the fleet, or this control plane holds another fleet
    ├── OperatorError         5   a provider refused or failed
    ├── Unreachable           6   no control plane, keeper or machine answers
    ├── QuorumLost            7   the ledger cannot commit now
    └── Unhealthy             8   applied, but something does not run as asked

A message says what and where; ``hint`` says what to do next. Only the CLI prints and exits. Exit code 10 (`slum plan`
found changes) and 130 (interrupted) are not errors. docs/cli.md shows the same table, held by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

EXIT_DONE = 0
EXIT_CHANGES = 10
EXIT_INTERRUPTED = 130


class SlumError(Exception):
    """Base of all; *message* is one clear sentence, *hint* the next step (may be empty)."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(SlumError):
    """Bad input. *problems* holds one line for each thing that is wrong, when there are several."""

    exit_code = 2
    code = "bad_input"

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class Conflict(SlumError):
    """The revision moved. *changes* says in words what was changed since, newest last."""

    exit_code = 4
    code = "conflict"

    def __init__(self, message: str, *, hint: str = "", changes: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.changes = tuple(changes)


class OperatorError(SlumError):
    """A provider refused or failed; keeps the provider's status, code and request id where it gave one."""

    exit_code = 5
    code = "operator"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        status: int | None = None,
        provider_code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.provider_code = provider_code
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class Unreachable(SlumError):
    """Nobody answers there."""

    exit_code = 6
    code = "unreachable"


class QuorumLost(SlumError):
    """The ledger has no leader or cannot commit; reads may still work. Safe to retry with the same request id.

    *lasting* says that it has been so for a while: to try again at once is of no use.
    """

    exit_code = 7
    code = "no_quorum"

    def __init__(self, message: str, *, hint: str = "", lasting: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.lasting = lasting


class Unhealthy(SlumError):
    """The desire was committed, but something does not run as asked."""

    exit_code = 8
    code = "unhealthy"


class InvariantError(AssertionError):
    """A rule of a protocol was broken: always a bug, never an input."""


def invariant(condition: object, why: str) -> None:
    """Raise InvariantError with *why* unless *condition* holds; unlike assert, also under ``python -O``."""
    if not condition:
        raise InvariantError(why)


BY_CODE: dict[str, type[SlumError]] = {
    kind.code: kind for kind in (SlumError, ConfigError, Conflict, OperatorError, Unreachable, QuorumLost, Unhealthy)
}
