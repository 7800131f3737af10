"""What stands between an untrusted model and everything else: budgets, doors, the worker."""
