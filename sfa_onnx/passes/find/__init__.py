"""Find: every normalisation over selected keys."""
