"""Verification: a site is fused only when it *is* the operator, shown in float64."""

from sfa_onnx.passes.verify.probes import PROBES, Probe
from sfa_onnx.passes.verify.verifier import Verifier

__all__ = ["PROBES", "Probe", "Verifier"]
