"""The door of every public function: only errors of `sfa_onnx.errors` leave through it."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from google.protobuf.message import DecodeError, EncodeError
from onnx.checker import ValidationError
from onnx.defs import SchemaError
from onnx.shape_inference import InferenceError

from sfa_onnx.errors import BudgetError, FaultError, ModelError, SfaError, UsageError
from sfa_onnx.guard.text import printable

__all__ = ["as_ours", "door"]

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("sfa_onnx")
_MODEL_ERRORS: Final = (ValidationError, InferenceError, SchemaError, DecodeError, EncodeError)
_NEXT: Final = {
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free some space; nothing was left half-written",
    errno.EDQUOT: "free some space; nothing was left half-written",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the symbolic links lead in a circle",
}


def door(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public function: what it raises is an `SfaError`, or the caller's own mistake.

    A call that does not fit the signature stays a TypeError; broken pipes and keyboard interrupts
    pass, for they are not errors of the call.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (SfaError, BrokenPipeError):
            raise
        except Exception as error:
            inside = error.__traceback__ and error.__traceback__.tb_next
            if inside is None:  # raised by the call itself: arguments that do not fit
                raise
            raise as_ours(error, function.__name__) from error

    return wrapped


def as_ours(error: Exception, where: str) -> SfaError:
    """The error of ours that says what a foreign one means.

    Args:
        error: any exception that is not an `SfaError`.
        where: the function or verb that was stopped by it.

    Raises:
        KeyboardInterrupt: it is one, of which the import of a C++ module made an ImportError.
    """
    if _interrupted(error):
        raise KeyboardInterrupt from error
    if isinstance(error, OSError):
        return UsageError(_of_system(error, where))
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return UsageError(printable(f"{where}: {error}; {_NEXT[errno.ELOOP]}"))
    if isinstance(error, MemoryError):
        return BudgetError(
            f"{where}: this machine's memory does not suffice ({error or 'out of memory'}); the"
            " budget here is what the system gives a process. Use a smaller model or machine limits"
        )
    if isinstance(error, RecursionError):
        return ModelError(f"{where}: the model is nested too deeply; flatten it and try again")
    text = printable(str(error)).strip() or "no further text"
    if isinstance(error, _MODEL_ERRORS):
        return ModelError(f"{where}: onnx rejects the model: {text}; export it again, or repair it")
    _log.debug("unforeseen in %s", where, exc_info=error)
    return FaultError(
        f"{where}: stopped by {type(error).__name__}: {text}. Either the model breaks a rule that"
        " nobody looked at, or this is a fault of sfa-onnx: please report it with the model"
    )


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C led to an error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _of_system(error: OSError, where: str) -> str:
    """What happened to which file, and what to do about it."""
    name = error.filename if error.filename is not None else where
    reason = error.strerror or str(error) or type(error).__name__
    hint = _NEXT.get(error.errno or 0, "check the path and the device")
    return printable(f"{name}: {reason}; {hint}")
