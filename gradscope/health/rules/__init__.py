"""The rules of the health check, one per file."""
