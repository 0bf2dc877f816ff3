"""Callbacks and hooks for the frameworks that offer them; all share the interception in ``recording``."""
