"""Files and messages of a run."""
