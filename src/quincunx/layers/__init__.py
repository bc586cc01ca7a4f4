"""Modules over the operators, and graphs of networks with these modules as leaves."""
