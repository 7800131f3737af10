"""Recognition: find, bind, verify, splice. One file per pass."""
