"""Workarounds and settings for XLA: lowerings, shared results, compiled programs."""
