"""Compression: calibrate through our own engine, quantize, prune, and know the error.

No torch and no GPU. Memory is bounded by one matrix, its Hessian and a buffer, whatever the number of samples; every
step is kept on disk, so that a run that was killed goes on where it was and ends with the same bytes.
"""
