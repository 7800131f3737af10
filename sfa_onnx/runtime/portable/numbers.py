"""Floats to bytes and back with standard ONNX arithmetic, exactly.

ONNX before opset 26 cannot reinterpret bits, so a float is taken apart and put together by its
fields: (-1)^sign * (1 or 0 + mantissa / 2^m) * 2^max(exponent - bias, 1 - bias), little-endian in
memory. Every step is exact in float32. The one thing lost is the payload of a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from sfa_onnx.runtime.portable.body import Body

__all__ = ["FORMATS", "Format", "from_bytes", "to_bytes"]


@dataclass(frozen=True)
class Format:
    """A binary float format of `bytes` bytes."""

    bytes: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        """Exponent bias."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def special(self) -> int:
        """Exponent field of Inf and NaN."""
        return int(2**self.exponent_bits - 1)


FORMATS: Final[dict[int, Format]] = {
    TensorProto.FLOAT: Format(4, 8, 23),
    TensorProto.FLOAT16: Format(2, 5, 10),
    TensorProto.BFLOAT16: Format(2, 8, 7),
}


def _powers(form: Format) -> NDArray[np.float32]:
    """Float32 table: exponent field -> 2^max(field - bias, 1 - bias); inf for the special one."""
    exponents = np.maximum(np.arange(form.special + 1), 1) - form.bias
    finite = np.ldexp(np.float32(1), exponents[:-1])
    return np.append(finite, np.float32(np.inf)).astype(np.float32)


def from_bytes(body: Body, raw: str, form: Format) -> str:
    """int8 [..., n * bytes] -> float32 [..., n]."""
    lead = body.dims(raw, 0, -1)
    unsigned = body.op("Mod", body.to_int(raw), body.scalar(256))
    groups = body.reshape(unsigned, lead, -1, form.bytes)
    word = body.constant(256 ** np.arange(form.bytes, dtype=np.int64))
    bits = body.total(body.op("Mul", groups, word), keepdims=0)
    top = body.scalar(2 ** (8 * form.bytes - 1))
    scale = body.scalar(2**form.mantissa_bits)
    negative = body.op("GreaterOrEqual", bits, top)
    magnitude = body.op("Mod", bits, top)
    exponent = body.op("Div", magnitude, scale)
    mantissa = body.op("Mod", magnitude, scale)
    power = body.op("Gather", body.constant(_powers(form)), exponent)
    fraction = body.op("Div", body.to_float(mantissa), body.real(float(2**form.mantissa_bits)))
    hidden = body.to_float(body.op("Greater", exponent, body.scalar(0)))
    value = body.op("Mul", body.op("Add", hidden, fraction), power)
    nan = body.op("Greater", magnitude, body.scalar(form.special * 2**form.mantissa_bits))
    value = body.op("Where", nan, body.real(np.nan), value)
    sign = body.op("Where", negative, body.real(-1), body.real(1))
    return body.op("Mul", value, sign)  # Neg would lose the sign of zero


def to_bytes(body: Body, x: str, form: Format) -> str:
    """float32 [..., n] holding values of `form` -> int8 [..., n * bytes]."""
    nan, infinite = body.op("IsNaN", x), body.op("IsInf", x)
    zero = body.real(0)
    plain = body.op("Where", body.op("Or", nan, infinite), zero, x)
    exponent, mantissa = _fields(body, body.op("Abs", plain), form)
    special = body.scalar(form.special)
    exponent = body.op("Where", body.op("Or", nan, infinite), special, exponent)
    mantissa = body.op("Where", nan, body.scalar(2 ** (form.mantissa_bits - 1)), mantissa)
    negative_zero = body.op("Less", body.op("Div", body.real(1), x), zero)
    negative = body.op("Or", body.op("Less", x, zero), negative_zero)
    sign = body.op("Mul", body.to_int(negative), body.scalar(2 ** (8 * form.bytes - 1)))
    shifted = body.op("Mul", exponent, body.scalar(2**form.mantissa_bits))
    bits = body.op("Add", body.op("Add", sign, shifted), mantissa)
    words = body.constant(256 ** np.arange(form.bytes, dtype=np.int64))
    byte = body.op("Mod", body.op("Div", body.unsqueeze(bits, -1), words), body.scalar(256))
    large = body.op("GreaterOrEqual", byte, body.scalar(128))
    byte = body.op("Where", large, body.op("Sub", byte, body.scalar(256)), byte)
    packed = body.cast(byte, TensorProto.INT8)
    return body.reshape(packed, body.dims(x, 0, -1), -1)


def _fields(body: Body, a: str, form: Format) -> tuple[str, str]:
    """Exponent and mantissa fields (int64) of finite a >= 0."""
    powers = body.constant(_powers(form))
    lowest, highest = body.scalar(1), body.scalar(form.special - 1)
    smallest = body.real(2.0 ** (1 - form.bias))
    guarded = body.op("Max", a, smallest)
    log = body.op("Div", body.op("Log", guarded), body.real(float(np.log(2))))
    guess = body.op("Add", body.to_int(body.op("Floor", log)), body.scalar(form.bias))
    guess = body.op("Min", body.op("Max", guess, lowest), highest)
    # The logarithm may be off by one next to a power of two: look, and step down or up.
    over = body.op("Less", guarded, body.op("Gather", powers, guess))
    guess = body.op("Sub", guess, body.to_int(over))
    above = body.op("Gather", powers, body.op("Add", guess, body.scalar(1)))
    guess = body.op("Add", guess, body.to_int(body.op("GreaterOrEqual", guarded, above)))
    # a / 2^e in two halves, so that no factor is subnormal.
    shift = body.op("Sub", body.scalar(form.bias), guess)
    half = body.op("Div", body.op("Add", shift, body.scalar(512)), body.scalar(2))
    half = body.op("Sub", half, body.scalar(256))
    first = _power_of_two(body, half)
    second = _power_of_two(body, body.op("Sub", shift, half))
    significand = body.op("Mul", body.op("Mul", guarded, first), second)
    normal = body.op("GreaterOrEqual", a, smallest)
    fraction = body.op("Sub", significand, body.real(1))
    tiny = body.op("Mul", a, body.real(2.0 ** (form.bias - 1)))
    fraction = body.op("Where", normal, fraction, tiny)
    mantissa = body.to_int(body.op("Mul", fraction, body.real(float(2**form.mantissa_bits))))
    return body.op("Where", normal, guess, body.scalar(0)), mantissa


def _power_of_two(body: Body, exponent: str) -> str:
    """2^exponent for |exponent| <= 80, from a table."""
    table = np.ldexp(np.float32(1), np.arange(-80, 81)).astype(np.float32)
    return body.op("Gather", body.constant(table), body.op("Add", exponent, body.scalar(80)))
