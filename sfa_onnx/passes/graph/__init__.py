"""The raw graph: who makes and reads each value, walks over it, and small editable regions."""
