"""Lightning indexers in graphs: found, bound, built and verified as attention is."""
