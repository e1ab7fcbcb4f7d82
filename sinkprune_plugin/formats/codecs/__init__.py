"""The sparse formats of one tensor: pure functions from dense to parts and back."""
