"""Arrays and JSON on disk, for saved models and for checkpoints of runs."""
