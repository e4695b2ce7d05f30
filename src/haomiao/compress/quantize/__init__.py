"""Quantization: grids and scales, GPTQ with nested planes, scaling and rotation folded into neighbours."""
