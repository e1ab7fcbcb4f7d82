"""Weights with zeros of a known structure."""

import torch


def dense(rows, columns, dtype=torch.bfloat16):
    return torch.randint(1, 100, (rows, columns)).to(dtype)


def n_of_m(n, m, rows=64, columns=240, more=0.0):
    """N zeros in each group of M, and a share of the others zero as well."""
    pruned = torch.rand(rows, columns // m, m).argsort(dim=-1).view(rows, columns) < n
    return dense(rows, columns).masked_fill(pruned | (torch.rand(rows, columns) < more), 0)
