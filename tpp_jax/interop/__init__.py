"""Import and export of weights in PyTorch's formats."""
