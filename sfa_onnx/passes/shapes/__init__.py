"""Concrete sizes of every value of a graph."""
