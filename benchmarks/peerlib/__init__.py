"""What `benchmarks/peers.py` is made of: lines, engines, results, the plot. Not part of the installed package."""
