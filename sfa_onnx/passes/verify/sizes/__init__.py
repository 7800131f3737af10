"""The sizes at which a site is verified."""
