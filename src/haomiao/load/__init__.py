"""Checkpoints of others (safetensors, GGUF, the hub, quantized formats), our artifact, and the cache of conversions."""
