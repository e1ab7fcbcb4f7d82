"""The mathematics of pruning, torch only: solvers for masks and weights, and how sparse each block gets."""
