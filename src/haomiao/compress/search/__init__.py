"""Search over bits, sparsity, width and depth of a model, by measured error and measured time."""
