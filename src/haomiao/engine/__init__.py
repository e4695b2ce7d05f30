"""Serves requests in token ids: sequence state, prefix reuse, scheduling, sampling, the loop, and the executors."""
