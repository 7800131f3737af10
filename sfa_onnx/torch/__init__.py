"""Optional torch side: the operators as torch ops, and their export."""
