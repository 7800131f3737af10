"""Index expressions: which element of a stored tensor an element of a view is."""
