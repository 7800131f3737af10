"""The contract of every operator, and what is derived from it: schema, shapes, references."""
