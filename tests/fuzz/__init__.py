"""Hostile models: a corpus, its mutations, and child processes that run every verb on them."""
