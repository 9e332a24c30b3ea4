"""What a command ends with when it cannot go on: one line and an exit code. Standard library only."""

from __future__ import annotations

from typing import ClassVar


class InputError(ValueError):
    """A mistake of the user's: one line that says what, which value, and what to do. Exit code 2."""

    exit_code: ClassVar[int] = 2


class BudgetUnreachable(InputError):
    """No sub-network is small enough for the budget. Exit code 3."""

    exit_code: ClassVar[int] = 3


class VerificationError(InputError):
    """A published file is not what its manifest says. Exit code 4."""

    exit_code: ClassVar[int] = 4


class RunFailed(RuntimeError):
    """Work failed for a reason outside the user's input; the text names the part, its log and how to go on. Exit code 1."""

    exit_code: ClassVar[int] = 1
