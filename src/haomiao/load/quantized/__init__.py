"""Other people's quantized checkpoints (compressed-tensors, GPTQ, AWQ) as `TensorSource`s.

`codes` holds what they share: integer codes and group scales; one file per format says how that format stores them;
`source` puts them together.
"""
