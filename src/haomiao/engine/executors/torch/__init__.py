"""The torch executor: the same plan on PyTorch. On the CPU a second reference for tests, on CUDA the GPU engine.

Nothing in here is imported unless a device or an executor that needs it is asked for.
"""
