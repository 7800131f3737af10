"""The vendors' operators that plan an indexer's work for the NPU's cores.

Their result goes to the indexer as `metadata` and nowhere else. The CPU plans by itself: here they
give as many zeros, so that scripts run as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import torch

from sfa_onnx.torch.vendor import schema_in_torch

__all__ = ["Schedule", "define_schedule", "schedules"]

_SIZE: Final = 1024  # int32, in every published version


@dataclass(frozen=True)
class Schedule:
    """A published planning operator, and where its schema was read."""

    namespace: str
    name: str
    schema: str
    source: str

    @property
    def qualified(self) -> str:
        """The name as torch's dispatcher has it."""
        return f"{self.namespace}::{self.name}"


def schedules() -> tuple[Schedule, ...]:
    """Every one of the data file."""
    text = (
        resources.files("sfa_onnx.torch").joinpath("data/vendor_schedules.json").read_text("utf-8")
    )
    return tuple(Schedule(**entry) for entry in json.loads(text))


def define_schedule(library: torch.library.Library, schedule: Schedule) -> bool:
    """Define one where nobody has; whether this was done."""
    if schema_in_torch(schedule.qualified) is not None:
        return False
    library.define(schedule.name + schedule.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(schedule.name, _zeros, "CompositeExplicitAutograd")
    torch.library.register_fake(schedule.qualified, _zeros, lib=library)
    return True


def _zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Beside the lengths, where any are given."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    return torch.zeros(_SIZE, dtype=torch.int32, device=given[0].device if given else "cpu")
