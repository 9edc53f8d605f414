"""Import and export of weights in formats of PyTorch and of language models."""
