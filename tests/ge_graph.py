"""The GE graph that the plug-in makes of one node, evaluated with NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.plugin_double import key, parser_text


def expand(plugin, node):
    """(nodes by name without the node's own, all that the double gives), or (None, None)."""
    done = plugin.parse(key(node.op_type), parser_text(node), node.input, name=node.name)
    if done is None:
        return None, None
    prefix = f"{node.name}_"
    for made in done["graph"]:
        made["name"] = made["name"].removeprefix(prefix)
        made["in"] = [(port, source.removeprefix(prefix)) for port, source in made["in"]]
    return {made["name"]: made for made in done["graph"]}, done


def _scatter(var, indices, updates):
    """In place and in order; CANN's takes no index below zero."""
    assert indices.shape[-1] == 1
    assert (indices >= 0).all()
    for (place,), row in zip(indices, updates, strict=True):
        var[place] = row
    return var


def evaluate(graph, feeds, output):
    """Run an expansion with NumPy: what the built-in GE operators mean."""
    kinds = {"0": np.float32, "1": np.float16, "2": np.int8, "9": np.int64}
    done: dict[str, np.ndarray] = {}

    def value(name):
        if name not in done:
            done[name] = one(graph[name])
        return done[name]

    def const(text):
        _, kind, dims, items = text.split(":")
        parse = float.fromhex if kind == "0" else int
        flat = np.array([parse(i) for i in items.split(",") if i], kinds[kind])
        return flat.reshape([int(d) for d in dims.strip("[]").split(",") if d])

    def one(node):
        kind, attrs = node["type"], {k: v.partition(":")[2] for k, v in node["attrs"].items()}
        if kind == "Data":
            return feeds[int(attrs["index"])]
        if kind == "Const":
            return const(node["attrs"]["value"])
        args = [value(name) for _, name in node["in"]]
        f32 = np.float32
        table = {
            "Shape": lambda x: np.array(x.shape, np.int64),
            "StridedSliceV2": lambda x, b, e, ax, st: x[..., b[0] : e[0]],
            "ScatterNdUpdate": _scatter,
            "ConcatD": lambda *p: np.concatenate(p, int(attrs["concat_dim"])),
            "Reshape": lambda x, s: x.reshape(s),
            "Cast": lambda x: x.astype(kinds[attrs["dst_type"]]),
            "Abs": np.abs,
            "Neg": np.negative,
            "Round": np.rint,
            "ReduceMax": lambda x, ax: x.max(tuple(ax), keepdims=attrs["keep_dims"] == "1"),
            "Mul": lambda a, b: (a * b).astype(f32),
            "Maximum": np.maximum,
            "Minimum": np.minimum,
            "DivNoNan": lambda a, b: np.divide(a, b, out=np.zeros_like(b), where=b != 0),
            "Bitcast": lambda x: x.view(kinds[attrs["type"]]).reshape(*x.shape, x.itemsize),
        }
        assert ml_dtypes.bfloat16 not in [getattr(a, "dtype", None) for a in args] or kind == "Cast"
        assert kind in table, f"say here what GE's {kind} computes"
        return table[kind](*args)

    return value(output)
