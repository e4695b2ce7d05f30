"""What a model costs and how wrong it is: latency, accuracy, and the tables that report them.

Stands on `api`; knows nothing about the command line or the network.
"""
