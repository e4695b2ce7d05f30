"""Triton kernels: pointers and sizes, no allocation. Each has a twin in plain torch (`twins`), and runs on the CPU in
Triton's interpreter for tests. Functions that launch them live in `launch`.
"""
