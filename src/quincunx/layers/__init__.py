"""Modules over the operators, and networks as graphs of them."""
