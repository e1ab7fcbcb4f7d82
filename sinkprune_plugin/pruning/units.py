"""What can be removed from a decoder block as a whole, how much of it stays, and which rows and columns that is.

A unit is what several Linears share: it is a row of those that write it and a column of the one that reads it.

- A channel of the gated MLP: one row of the gate and up projections each, one column of the down projection. Those of a
  routed expert are a kind of their own, of which every expert of a layer keeps as many.
- A query head: ``head_dim`` rows of the query projection and columns of the attention's output projection. Where
  several query heads read one key and value head (grouped-query attention), the group is the unit, with its rows of
  the key and value projections.

Whatever reads the units decides which of them go: only its columns need an input, and removing the columns removes what
was written.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["Amount", "UnitGroup", "UnitKind", "check_amount", "level_widths"]

UnitKind = Literal["channels", "heads", "expert_channels"]

# A number of units to remove, or a share of them.
Amount = int | float


@dataclass(frozen=True)
class UnitGroup:
    """The units of one kind in one decoder block.

    :param field: the recipe's field that says how many go, for messages, such as ``mlp_channels``
    :param noun: what is counted, such as "attention heads"
    :param total: how many there are
    :param together: how many go together only: the query heads of a key and value head; 1 channel
    :param columns_each: columns of each in the Linear that reads it
    :param granularity: what stays is a multiple of it, unless all stay
    """

    field: str
    noun: str
    total: int
    together: int
    columns_each: int
    granularity: int

    @property
    def units(self) -> int:
        """Units that can go one by one."""
        return self.total // self.together

    @property
    def unit_columns(self) -> int:
        """Columns of a unit in the Linear that reads it."""
        return self.together * self.columns_each

    @property
    def step(self) -> int:
        """What may stay is a multiple of this, or all."""
        return math.lcm(self.together, self.granularity)

    def kept(self, amount: Amount) -> int:
        """How many stay.

        :param amount: a number of them to remove, exactly; or a share, of which the nearest possible is taken
        :return: the number that stays, at least one step
        :raises UsageError: if the number can't be kept, or the share rounds to none or to all of them
        """
        check_amount(self.field, amount)
        if not amount:
            return self.total
        if isinstance(amount, int):
            left = self.total - amount
            if left >= 1 and left % self.step == 0:
                return left
            raise self._impossible(f"{self.field} {amount} leaves {max(left, 0)} of {self.total} {self.noun}", left)
        wanted = self.total * (1.0 - amount)
        # Halfway, more stays.
        left = math.floor(wanted / self.step + 0.5) * self.step
        if left < 1 or left >= self.total:
            raise self._impossible(f"{self.field} {amount:g} leaves {wanted:g} of {self.total} {self.noun}", wanted)
        return left

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """Columns of some units in the Linear that reads them.

        :param units: (K,) int64
        :return: (K · ``unit_columns``,) int64, unit after unit
        """
        return _spread(units, self.unit_columns)

    def members(self, units: torch.Tensor) -> torch.Tensor:
        """Channels or query heads of some units.

        :param units: (K,) int64
        :return: (K · ``together``,) int64
        """
        return _spread(units, self.together)

    def _impossible(self, what: str, left: float) -> UsageError:
        lower, upper = math.floor(left / self.step) * self.step, math.floor(left / self.step) * self.step + self.step
        possible = [width for width in (lower, upper) if 1 <= width < self.total] or [self.total]
        group = f", in groups of {self.together} that share a key and value head" if self.together > 1 else ""
        nearest = " and ".join(map(str, possible))
        return UsageError(
            f"{what}, which isn't a multiple of {self.step} between {self.step} and {self.total} (granularity "
            f"{self.granularity}{group}); the nearest that can stay: {nearest}; change {self.field} or `granularity`"
        )


def check_amount(field: str, amount: Amount) -> None:
    """Check a number or share of units to remove by itself.

    :param field: the recipe's field
    :param amount: whole number or share
    :raises UsageError: if a share is outside [0, 1) or a number is negative
    """
    if isinstance(amount, bool) or not (amount >= 0 if isinstance(amount, int) else 0.0 <= amount < 1.0):
        raise UsageError(
            f"{field} {amount:g} is neither a share to remove in [0, 1) nor a whole number of them; give for instance "
            "0.5 for half of them"
        )


def level_widths(group: UnitGroup, number: int) -> list[int]:
    """Widths that a search may choose from: evenly spaced from one step to all.

    :param group: the group
    :param number: most levels
    :return: ascending, the last one ``total``
    """
    steps = list(range(group.step, group.total, group.step))
    # From above: few levels should rather leave out the smallest widths.
    spacing = max(1, math.ceil(len(steps) / max(1, number - 1)))
    return [*reversed(list(reversed(steps))[spacing - 1 :: spacing]), group.total]


def _spread(units: torch.Tensor, each: int) -> torch.Tensor:
    return (units.unsqueeze(1) * each + torch.arange(each, device=units.device)).flatten()
