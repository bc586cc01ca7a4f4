"""Training: loop, recipes, losses, evaluation, checkpoints, processes."""
