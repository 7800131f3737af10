"""Sessions whose caches stay where they are: one buffer is input and output of each.

onnxruntime copies a cache that a model takes and gives back, twice as a rule, in every step. Where
the model only replaces rows (pages, buffers of fixed length), input and output are bound to one
buffer, and a step moves the new rows and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.guard.doors import door
from sfa_onnx.passes.graph.cache_pairs import cache_pairs, why_unpaired
from sfa_onnx.runtime.ort import NUMPY_TYPES, Model, checked_arrays, run_bound, session

__all__ = ["BoundSession", "bind_caches"]

Array = NDArray[Any]


class BoundSession:
    """A session that keeps its caches in place; made by `bind_caches`.

    Attributes:
        session: the onnxruntime session.
        caches: input name -> the buffer, as the last run left it.
        outputs: output name -> the input whose buffer it lies in.
    """

    def __init__(
        self, sess: ort.InferenceSession, caches: dict[str, Array], outputs: dict[str, str]
    ) -> None:
        self.session, self.caches, self.outputs = sess, caches, outputs

    @door
    def run(
        self, feeds: Mapping[str, ArrayLike], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """One step; the caches hold its new rows afterwards.

        Args:
            feeds: every other input; dtypes as the model declares them.
            outputs: names wanted (default: all but the caches).

        Returns:
            Output name -> array; a cache that is asked for is its buffer.

        Raises:
            UsageError: an input is missing, unknown, of another dtype, a bound cache or in the
                memory of one; an output is unknown.
            ContractError: one of our operators refuses its inputs. Nothing of a refused write is
                written, but caches whose turn was earlier have their new rows.
            ModelError: onnxruntime fails.
        """
        if given := [name for name in feeds if name in self.caches]:
            raise UsageError(f"input {given[0]!r} is a bound cache: its buffer is in `caches`")
        declared = [o.name for o in self.session.get_outputs()]
        free = [name for name in declared if name not in self.outputs]
        wanted = free if outputs is None else list(outputs)
        if unknown := [name for name in wanted if name not in declared]:
            raise UsageError(f"the model has no output {unknown}; it has {declared}")
        arrays = checked_arrays(self.session, {**feeds, **self.caches})
        for name, cache in itertools.product(feeds, self.caches):
            if np.may_share_memory(arrays[name], self.caches[cache]):
                raise UsageError(f"input {name!r} lies in the buffer of {cache!r}: pass a copy")
        fetched = [name for name in wanted if name not in self.outputs]
        got = run_bound(self.session, arrays, fetched, self.outputs)
        return {n: got[n] if n in got else self.caches[self.outputs[n]] for n in wanted}


@door
def bind_caches(
    model: Model | bytes | ort.InferenceSession,
    caches: Mapping[str, Array],
    *,
    graph: Model | None = None,
) -> BoundSession:
    """Keep the caches of a model in place: each is read and written in the buffer given here.

    A cache is an input that an output repeats with some rows replaced by `KvCacheWrite`,
    `ScatterND` or `ScatterElements`; which output that is, is read off the graph. No copy is made
    where that node makes the output itself, as in all models of `sfa-onnx kv-cache`.

    Args:
        model: a path, a ModelProto, the bytes of a file, or an open session.
        caches: input name -> its rows at the start: a writeable, contiguous array of the input's
            type and shape, which every run changes. Pass a copy to keep the original.
        graph: the model of an open session whose file is gone, or is not ONNX.

    Returns:
        What runs the model's steps, with every other input fed as usual.

    Raises:
        UsageError: an input named here is no such cache (with the reason), or its array does not
            fit; two arrays share memory.
        ModelError: onnxruntime refuses the model, or its file cannot be read.
    """
    sess = model if isinstance(model, ort.InferenceSession) else session(model)
    proto = _graph(model if graph is None else graph)
    pairs = {p.input: p.output for p in cache_pairs(proto)}
    if not caches:
        raise UsageError(f"no cache was given; {_those(pairs)}")
    for name in caches:
        if name not in pairs:
            reason = why_unpaired(proto, name)
            raise UsageError(f"{name!r} cannot stay in place: {reason}; {_those(pairs)}")
    declared = {i.name: i for i in sess.get_inputs()}
    if missing := [n for n in caches if n not in declared]:
        raise UsageError(f"the session has no input {missing[0]!r}: `graph` is another model's")
    for name, array in caches.items():
        _check(name, array, declared[name])
    for one, other in itertools.combinations(caches, 2):
        if np.may_share_memory(caches[one], caches[other]):
            raise UsageError(f"{one!r} and {other!r} share memory: each cache needs its own")
    return BoundSession(sess, dict(caches), {pairs[n]: n for n in caches})


def _those(pairs: Mapping[str, str]) -> str:
    if not pairs:
        return "this model has no cache that can"
    return f"this model's caches are {list(pairs)}"


def _graph(model: Model | bytes | ort.InferenceSession) -> onnx.ModelProto:
    """The graph that a session runs.

    Raises:
        UsageError: the session does not say.
    """
    if isinstance(model, ort.InferenceSession):
        told: Any = getattr(model, "_model_path", None) or getattr(model, "_model_bytes", None)
        if not told:
            raise UsageError("this session does not hold its model: pass it as `graph`")
        model = told
    if isinstance(model, bytes):
        model = onnx.ModelProto.FromString(model)
    return load_model(model)


def _check(name: str, array: Array, declared: Any) -> None:
    """That an array can be a cache's buffer.

    Raises:
        UsageError: it cannot.
    """
    if not isinstance(array, np.ndarray):
        raise UsageError(f"cache {name!r}: expected a NumPy array, got {type(array).__name__}")
    expected = NUMPY_TYPES.get(declared.type)
    if expected is None or array.dtype != expected:
        raise UsageError(f"cache {name!r}: expected {declared.type}, got {array.dtype}")
    dims = [d if isinstance(d, int) else None for d in declared.shape]
    fits = len(dims) == array.ndim and all(
        d is None or d == n for d, n in zip(dims, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(f"cache {name!r}: expected {declared.shape}, got {list(array.shape)}")
    if not array.flags.carray:
        raise UsageError(
            f"cache {name!r}: expected a writeable array in C order, which is written in place;"
            " np.array(x, order='C') makes one"
        )
