"""Arrays and JSON on disk: what a saved model and a run's checkpoints are made of."""
