"""Fitting of layers: moments of data, ranks, codebooks, masks, and settings that methods share."""
