"""Analysis of networks: Jacobians, latency, and groups as text and drawings."""
