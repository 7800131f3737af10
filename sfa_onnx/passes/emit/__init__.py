"""Emit: the nodes that replace a bound site."""
