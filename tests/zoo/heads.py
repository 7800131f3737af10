"""Family: who shares keys and selections: batches, tokens and heads in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx

from tests.zoo.base import FLOAT_KV, Case, Feeds
from tests.zoo.write import Graph

SIZE = {"b": 2, "c": 5, "s": 3, "n": 8, "g": 2, "h": 4, "t": 24, "k": 6, "d": 24, "v": 16}
UNIT = {"1": 1}


@dataclass(frozen=True)
class Layout:
    """Tensors as strings of axis letters, merged axes in one word: "b s gh d".

    b, c: batch; s: tokens; n: heads; g, h: groups of heads; t: keys; k: selected keys; d: width.
    `attend` is the query's layout in the products, where g and h are apart.
    """

    query: str = "b s n d"
    keys: str = "b t d"
    index: str = "b s k"
    attend: str = ""
    gathered: bool = False
    project: bool = False  # the query is cut from a projection [.., n * d]
    one: str = ""  # axes that have size 1

    def size(self, word: str) -> int:
        sizes = [UNIT.get(x) or (1 if x in self.one else SIZE[x]) for x in word]
        return int(np.prod(sizes))

    def shape(self, layout: str) -> tuple[int, ...]:
        return tuple(self.size(w) for w in layout.split())

    @property
    def plain(self) -> str:
        """The query's layout in the products, one letter per axis."""
        return "".join((self.attend or self.query).replace("1", "").split())

    def build(self) -> onnx.ModelProto:
        g = Graph(18)
        letters = self.plain
        apart = [self.size(x) for x in letters]
        q, given = "query", self.shape(self.query)
        if self.project:
            rows = self.query.split()[:-2]
            given = (
                *self.shape(" ".join(rows)),
                self.size(self.query.split()[-2]) * self.size("d"),
            )
            weight = g.const(np.eye(given[-1]), np.float32)
            q = g.reshape(g.op("MatMul", q, weight), *self.shape(self.query))
        q = g.reshape(q, *apart)
        keys = "".join(self.keys.replace("1", "").split())
        kv = g.reshape("kv", *(self.size(x) for x in keys))
        index = "".join(self.index.replace("1", "").split())
        if self.gathered:
            x, rows = self._gather(g, q, kv, keys, index)
        else:
            x, rows = g.op("Einsum", q, kv, equation=f"{letters},{keys}->{letters[:-1]}t"), keys
            x = self._hide(g, x, index)
        p = g.op("Softmax", g.op("Mul", x, g.const(0.2, np.float32)), axis=-1)
        last = "k" if self.gathered else "t"
        value = g.cut(self.rows if self.gathered else kv, 0, SIZE["v"])
        out = letters[:-1] + "v"
        o = g.op("Einsum", p, value, equation=f"{letters[:-1]}{last},{rows[:-1]}v->{out}")
        shape = [*self.shape(" ".join(self.plain[:-1])), SIZE["v"]]
        if self.query[-2] == " ":
            shape = [*self.shape(" ".join(self.query.split()[:-1])), SIZE["v"]]
        o = g.reshape(o, *shape)
        inputs = {
            "query": ("f32", given),
            "kv": ("f32", self.shape(self.keys)),
            "wish": ("f32", self.shape(self.index.replace("k", "t"))),
        }
        return g.model(inputs, {"out": ("f32", shape)}, [o])

    def _chosen(self, g: Graph) -> str:
        axis = self.index.split().index("k")
        return g.op("TopK", "wish", g.ints(SIZE["k"]), outputs=2, axis=axis)[1]

    def _hide(self, g: Graph, x: str, index: str) -> str:
        shape = self.shape(self.index)
        axis = self.index.split().index("k")
        far = tuple(SIZE["t"] if i == axis else d for i, d in enumerate(shape))
        mask = g.op(
            "ScatterElements", g.const(np.full(far, -np.inf), np.float32), self._chosen(g),
            g.const(np.zeros(shape), np.float32), axis=axis,
        )  # fmt: skip
        order = self.plain[:-1] + "t"
        here = index.replace("k", "t")
        mask = g.reshape(mask, *(self.size(x) for x in here))
        perm = sorted(range(len(here)), key=lambda i: order.index(here[i]))
        mask = g.op("Transpose", mask, perm=perm)
        mask = g.reshape(mask, *(self.size(x) if x in here else 1 for x in order))
        return g.op("Add", x, mask)

    def _gather(self, g: Graph, q: str, kv: str, keys: str, index: str) -> tuple[str, str]:
        """Rows [b, (groups,) s, k, d] through GatherElements on the key axis."""
        own = [x for x in keys if x in "bcgn"]
        chosen = [x for x in index if x not in own and x != "k"]
        order = [*own, *chosen, "k", "d"]
        idx = g.reshape(self._chosen(g), *(self.size(x) for x in index))
        there = [x for x in order if x in index]
        idx = g.op("Transpose", idx, perm=[index.index(x) for x in there])
        idx = g.reshape(idx, *(self.size(x) if x in index else 1 for x in order))
        idx = g.op("Expand", idx, g.ints(*(self.size(x) for x in order)))
        merged = int(np.prod([self.size(x) for x in [*chosen, "k"]]))
        idx = g.reshape(idx, *(self.size(x) for x in own), merged, SIZE["d"])
        kv = g.op("Transpose", kv, perm=[keys.index(x) for x in [*own, "t", "d"]])
        rows = g.op("GatherElements", kv, idx, axis=len(own))
        self_rows = g.reshape(rows, *(self.size(x) for x in order))
        object.__setattr__(self, "rows", self_rows)
        letters, rows_in = self.plain, "".join(order)
        x = g.op("Einsum", q, self_rows, equation=f"{letters},{rows_in}->{letters[:-1]}k")
        return x, rows_in

    def feeds(self, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        given = self.shape(self.query)
        if self.project:
            given = (*given[:-2], given[-2] * given[-1])
        wish = self.shape(self.index.replace("k", "t"))
        return {
            "query": rng.standard_normal(given).astype(np.float32),
            "kv": rng.standard_normal(self.shape(self.keys)).astype(np.float32),
            "wish": rng.permuted(
                np.broadcast_to(np.arange(int(np.prod(wish))), (1, int(np.prod(wish)))), axis=-1
            ).reshape(wish).astype(np.float32),
        }  # fmt: skip


BASE = Layout()
FUSE = {
    "bsnd": BASE,
    "bnsd": Layout("b n s d"),
    "sbhd": Layout("s b n d", "t b d", "b s k"),
    "sbhd-unit": Layout("s b n d", "t b 1 d", "b s k"),
    "kv-head-kept": Layout("b n s d", "b 1 t d", "b 1 s k"),
    "kv-head-kept-bsnd": Layout("b s n d", "b t 1 d", "b s 1 k"),
    "two-batches": Layout("b c s n d", "b c t d", "b c s k"),
    "batches-merged": Layout("bc s n d", "b c t d", "b c s k", attend="b c s n d"),
    "batches-bnsd": Layout("b c n s d", "b c t d", "b c s k"),
    "tokens-and-heads": Layout("b sn d", "b t d", "b s k", attend="b s n d"),
    "all-rows": Layout("bsn d", "b t d", "b s k", attend="b s n d"),
    "projected": replace(BASE, project=True),
    "tokens-and-width": Layout("b snd", "b t d", "b s k", attend="b s n d"),
    "tokens-in-two": Layout("b s c n d", "b t d", "b s c k"),
}
KEYS = {
    "groups": Layout("b gh s d", "b g t d", "b s k", attend="b g h s d"),
    "groups-bsnd": Layout("b s gh d", "b t g d", "b s k", attend="b s g h d"),
    "groups-merged-keys": Layout("b s gh d", "b t gd", "b s k", attend="b s g h d"),
    "groups-apart": Layout("b s g h d", "b g t d", "b s k"),
    "groups-apart-bnsd": Layout("b g h s d", "b t g d", "b s k"),
    "groups-projected": Layout("b s gh d", "b g t d", "b s k", attend="b s g h d", project=True),
    "own": Layout("b n s d", "b n t d", "b s k"),
    "own-bsnd": Layout("b s n d", "b t n d", "b s k"),
    "own-and-selection": Layout("b n s d", "b n t d", "b n s k"),
}
SELECTION = {
    "per-head": Layout("b n s d", "b t d", "b n s k"),
    "per-head-bsnd": Layout("b s n d", "b t d", "b s n k"),
    "per-group": Layout("b gh s d", "b t d", "b g s k", attend="b g h s d"),
    "per-head-projected": Layout("b s n d", "b t d", "b s n k", project=True),
}
KEYS_WORDS, SELECTION_WORDS = r"have \d heads", "selects per head"


def cases() -> Iterator[Case]:
    for gathered in (False, True):
        for one in ("", "b", "s", "bs", "n"):
            for name, layout in FUSE.items():
                if ("c" in layout.query and one) or ("snd" in layout.query and one == "n"):
                    continue
                known = {"expect": "either"} if "batches" in name else {}  # not drawn yet
                yield _case(name, layout, gathered, one, op=FLOAT_KV, **known)
            for words, table in ((KEYS_WORDS, KEYS), (SELECTION_WORDS, SELECTION)):
                for name, layout in table.items():
                    if one == "n" or ("s" in one and "project" not in name):
                        continue  # one of each: a batch or a token to anybody who looks
                    yield _case(name, layout, gathered, one, expect="refuse", reason=words)


def _case(name: str, layout: Layout, gathered: bool, one: str, **more) -> Case:
    s = replace(layout, gathered=gathered, one=one)
    form = "gathered" if gathered else "dense"
    tags = {"exporter": "hand", "opset": 18, "dtype": "f32", "dynamic": False}
    one = f"-{one}1" if one else ""
    return Case(f"heads-{name}-{form}{one}", "heads", s.build, s.feeds, tags=tags, **more)
