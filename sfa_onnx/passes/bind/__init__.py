"""Bind: which values of the graph play which role in an attention over selected keys."""
