"""Random inputs that a real caller could have sent."""

from __future__ import annotations

from sfa_onnx.runtime.feeds.draw import (
    describe,
    random_feeds,
)

__all__ = [
    "describe",
    "random_feeds",
]
