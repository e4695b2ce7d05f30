"""engine/executors."""
