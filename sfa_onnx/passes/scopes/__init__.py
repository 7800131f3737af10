"""Graphs inside a model: bodies of If, Loop and Scan, seen with all that lies around them."""
