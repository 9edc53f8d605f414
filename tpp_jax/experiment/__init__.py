"""A run, from one config."""
