"""Terms: what an element of a tensor is, normalised by a table of identities."""
