"""What is in a checkpoint, and who can load it."""
