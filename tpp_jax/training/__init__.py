"""One step function, one loop over phases, checkpoints and progress."""
