"""What is done for XLA's sake: lowerings, held arrays, compiled programs."""
