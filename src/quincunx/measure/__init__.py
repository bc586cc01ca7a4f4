"""Measure networks: multiplications, seconds, other engines."""
