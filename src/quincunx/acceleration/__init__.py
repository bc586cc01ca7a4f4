"""Accelerate a trained network: candidates, search, fine-tuning, judgement."""
