"""Lossless speculation: tokens are proposed cheaply, computed in one step, and stand where the model chooses the same.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with one difference: a draft is
accepted only if it *is* the token that the sequence chooses at that position, greedily or with the counter-based random
number of that position. Outputs are therefore those of no speculation, to the bit, whatever is proposed.

`proposer` is the protocol; `suffix`, `itself` and `other` propose; `lengths` decides how much, from `costs` and
`acceptance`; `speculator` is the face that the engine's loop knows.
"""
