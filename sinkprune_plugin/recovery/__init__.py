"""A short training of a pruned model on fixed zeros, toward the dense model's predictions."""
