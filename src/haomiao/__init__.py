"""Haomiao (毫秒): a real-time LLM engine. A model, a prompt and a budget in; an answer and a receipt out."""

__version__ = "0.1.0"
