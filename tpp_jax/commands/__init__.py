"""The command line, one file per mode."""
