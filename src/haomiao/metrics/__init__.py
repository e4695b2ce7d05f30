"""Pure arithmetic and clocks: percentiles, intervals, divergences, timers, and the machine's ceilings.

Knows nothing about models, tokens' text or requests; every function takes arrays and returns numbers.
"""
