"""How a round of the evolutionary search shares out its tokens; the same for sparsities and for structures.

So many new candidates, of which the best go on to the next stage with more tokens. The last stage measures three: two
of them and the best so far (multi-step selection of EvoPress, arXiv 2410.14649, section 3).
"""

from sinkprune_plugin.pruning.evolution import Stage

__all__ = ["OFFSPRING", "round_cost", "round_stages"]

OFFSPRING, SECOND, LAST = 16, 4, 2
# Share of the last stage's tokens that a candidate of the first and the second stage gets.
FIRST_SHARE, SECOND_SHARE = 8, 2


def round_cost() -> float:
    """Cost of a round in measurements of the last stage's length."""
    return OFFSPRING / FIRST_SHARE + SECOND / SECOND_SHARE + LAST + 1


def round_stages(last: int, unit: int = 1) -> tuple[Stage, ...]:
    """The stages of a round.

    :param last: length of the last stage's measurements, in units
    :param unit: tokens of a unit
    :return: three stages
    """
    return (
        Stage(max(last // FIRST_SHARE, 1) * unit, SECOND),
        Stage(max(last // SECOND_SHARE, 1) * unit, LAST),
        Stage(last * unit, 1),
    )
