"""Export: one solution, written for other engines without another rounding."""
