"""What networks cost: multiplications, seconds, other engines."""
