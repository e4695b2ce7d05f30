"""Parts of `benchmarks/compression.py`: the ways to compress, and what is drawn and written from their results."""
