"""Which channels go, and taking them out: jaxprs and pytrees, no training."""
