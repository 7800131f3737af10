"""The zoo: small models of our own that spell sparse attention the way exporters and people do.

Every family is one module with `cases()`; `tests.zoo.catalogue` collects them; `tests.zoo.score`
runs the product over all of them.
"""
