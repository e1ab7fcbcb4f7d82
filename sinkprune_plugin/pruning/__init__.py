"""The mathematics of pruning, torch only: solvers for masks and weights, and how much of each block to prune."""
