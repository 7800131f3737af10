"""Open the sizes that a file fixes, so that large static sites run at small ones."""
