"""Measures of how good samples are, on arrays of raw 8-bit levels."""
