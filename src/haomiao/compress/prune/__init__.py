"""Pruning: tiles, patterns and whole parts of a model, scored by the error that their removal causes."""
