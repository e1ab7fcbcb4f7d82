"""Root mean square layer normalisation (arXiv 1910.07467)."""

import torch
from torch import nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """x / rms(x), scaled by a weight and shifted by a bias where there are any.

    :param size: width of the last dimension
    :param eps: added to the mean square
    :param affine: with a weight
    :param bias: with a bias; needs ``affine``
    """

    def __init__(self, size: int, eps: float, *, affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension.

        :param x: (…, size)
        :return: (…, size) in the dtype of ``x``
        """
        # float32 for the mean of squares; back to the model's dtype before the weight, as in the official code.
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        if self.weight is not None:
            y = self.weight * y
        if self.bias is not None:
            y = y + self.bias
        return y

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"eps={self.eps}, affine={self.weight is not None}, bias={self.bias is not None}"
