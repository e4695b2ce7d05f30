"""Quantized Hugging Face checkpoints: compressed-tensors, GPTQ, AWQ."""
