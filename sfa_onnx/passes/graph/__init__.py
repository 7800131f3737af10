"""The raw graph: who makes and reads each value, in which scope, and small editable regions."""
