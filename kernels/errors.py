"""Every way a kernel can fail.

KernelError
├── InputError          the molecule or a setting cannot be computed at all
├── EmbedError          no three-dimensional geometry was found
├── ConvergenceError    an iteration ended without converging
│   ├── ScfError        the electrons of one geometry
│   ├── HessianError    the cheaper surface whose Hessian was to start a relaxation
│   └── StepCapError    the steps of a relaxation
├── NotFiniteError      a NaN or an infinity appeared
│   └── CollapsedError  atoms sit on top of each other
├── ResourceError       memory or another resource ran out
└── ProgramError        a program that runs apart died, or failed in a way nobody foresaw
"""

from typing import ClassVar


class KernelError(Exception):
    """A kernel could not give a result; `status` is the class recorded for the item."""

    status: ClassVar[str] = "error"


class InputError(KernelError):
    """The input cannot be computed, now or later; never retried."""

    status: ClassVar[str] = "input"


class EmbedError(KernelError):
    """No three-dimensional geometry was found for a molecular graph."""

    status: ClassVar[str] = "embed"


class ConvergenceError(KernelError):
    """An iteration reached its cap; `history` names the rungs of the ladder tried, in order."""

    status: ClassVar[str] = "convergence"

    def __init__(self, message: str, *, history: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.history = history

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only attributes are lost by the default pickling of exceptions, and errors
        # cross process borders here.
        return _convergence_error, (type(self), str(self), self.history)


class ScfError(ConvergenceError):
    """The self-consistent field of one geometry did not converge."""


class HessianError(ConvergenceError):
    """The surface whose Hessian was to start a relaxation has no answer there."""


class StepCapError(ConvergenceError):
    """A relaxation reached its cap of steps above its force limit."""


class NotFiniteError(KernelError):
    """A position, an energy or a force is NaN or infinite."""

    status: ClassVar[str] = "not_finite"


class CollapsedError(NotFiniteError):
    """Two atoms are so close that any energy computed there is meaningless."""


class ResourceError(KernelError):
    """Memory or another resource ran out; may succeed with more."""

    status: ClassVar[str] = "resource"


class ProgramError(KernelError):
    """A program that runs in a process of its own died, or failed in a way nobody foresaw."""

    status: ClassVar[str] = "crash"


def _convergence_error(
    kind: type[ConvergenceError], message: str, history: tuple[str, ...]
) -> ConvergenceError:
    return kind(message, history=history)
