"""Does the pruned model still work, and is it smaller and faster? Paired measurements, and their report."""
