"""Models as files: opened and saved without reading weights, wherever those lie."""
