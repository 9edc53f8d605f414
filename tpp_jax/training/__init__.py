"""One step of one task, on one device or many: no config, no files."""
