"""From a fused model to an Ascend NPU; needs no CANN, uses it when present."""
