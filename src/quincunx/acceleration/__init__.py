"""A trained network in, a faster one out: candidates, search, fine-tuning, judgement."""
