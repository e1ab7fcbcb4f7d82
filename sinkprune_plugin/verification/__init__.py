"""Does the pruned model still work, and is it smaller and faster? Measurements in pairs, and their report."""
