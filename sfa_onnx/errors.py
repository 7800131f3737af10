"""The error tree.

    SfaError                     anything this package refuses to do; one readable paragraph
    ├── UsageError               the call itself makes no sense (wrong option, missing file)
    ├── ModelError               the model file or graph is not what it must be
    │   ├── WeightsError         external data: where weights lie, or may not lie
    │   └── BudgetError          the model asks for more than a budget allows; the budget is named
    ├── ContractError            inputs or attributes break the operator's contract
    ├── VerificationError        a check was made and did not hold
    ├── MissingError             something this machine lacks (the compiled library, an executable)
    ├── CrashError               a runtime died, or did not come back, on this model; we live on
    └── FaultError               an exception nobody foresaw: a fault of ours, or a model unheard of

Every message says what, where, what was expected, what was found, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "ContractError",
    "CrashError",
    "FaultError",
    "MissingError",
    "ModelError",
    "SfaError",
    "UsageError",
    "VerificationError",
    "WeightsError",
]


class SfaError(Exception):
    """Base of all errors raised on purpose by `sfa_onnx`."""


class UsageError(SfaError):
    """The call makes no sense as it stands; the command exits with 2."""


class ModelError(SfaError):
    """The model file or graph is not what it must be."""


class WeightsError(ModelError):
    """External data lies, or would lie, where a reader of the model rejects it."""


class BudgetError(ModelError):
    """The model asks for more than a budget of `sfa_onnx.guard.budgets` allows."""


class ContractError(SfaError, ValueError):
    """Inputs or attributes break the operator's contract."""


class VerificationError(SfaError):
    """A comparison or an expectation was checked and did not hold; the command exits with 3."""


class MissingError(SfaError):
    """Something this machine lacks: the compiled library, an executable, an optional package."""


class CrashError(SfaError):
    """The worker that ran a third-party runtime died or did not answer in time."""


class FaultError(SfaError):
    """An exception that nobody foresaw; its cause is chained."""
