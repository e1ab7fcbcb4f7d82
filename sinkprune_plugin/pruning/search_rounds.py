"""How the evolutionary search shares out its tokens; the same for sparsities and for structures.

A round has so many new candidates, of which the best go on to the next stage with more tokens. The last stage measures
three: two of them and the best so far (multi-step selection of EvoPress, arXiv 2410.14649, section 3).
"""

from dataclasses import replace

from sinkprune_plugin.pruning.evolution import SearchOptions, Stage

__all__ = ["search_options"]

OFFSPRING, SECOND, LAST = 16, 4, 2
# Share of the last stage's tokens that a candidate of the first and the second stage gets.
FIRST_SHARE, SECOND_SHARE = 8, 2
# Rounds for each group of levels, so that every one can move by several levels.
ROUNDS_PER_GROUP = 4
# Passes of the last stage at least: a small budget makes fewer rounds, not coarser ones.
LEAST_PASSES = 8
# Forward tokens that a token of a recovery step counts: the dense model's, forward, backward (twice a forward pass),
# and once more with the recovered weights.
RECOVERY_COST = 5


def search_options(
    budget: int, pass_tokens: int, passes: int, groups: int, seed: int, recovery_tokens: int = 0
) -> SearchOptions:
    """How a search spends its tokens.

    :param budget: the recipe's ``search_budget``
    :param pass_tokens: tokens of a pass, or of one pass of every process: what a measurement takes at least
    :param passes: so many of them there are
    :param groups: groups of levels, such as decoder blocks with targets
    :param seed: seed of the mutations
    :param recovery_tokens: tokens that each candidate of a last stage is recovered on before it is measured
    :return: options with as many rounds as the groups need, or fewer where the budget isn't enough for them, and as
        many passes in each as the budget is then enough for
    :raises UsageError: if the budget isn't enough for one round
    """
    rounds = ROUNDS_PER_GROUP * groups
    left = budget / rounds - (LAST + 1) * RECOVERY_COST * recovery_tokens
    last = max(int(left / _round_cost(recovered=recovery_tokens > 0) / pass_tokens), LEAST_PASSES)
    last = max(min(last, passes), 1)
    # The measured passes too go through the dense model, for the blocks' inputs that its outputs belong to.
    recovery = RECOVERY_COST * recovery_tokens + last * pass_tokens if recovery_tokens else 0
    stages = (
        Stage(max(last // FIRST_SHARE, 1) * pass_tokens, SECOND),
        Stage(max(last // SECOND_SHARE, 1) * pass_tokens, LAST),
        Stage(last * pass_tokens, 1, recovery),
    )
    options = SearchOptions(budget, OFFSPRING, stages, seed)
    return replace(options, budget=min(budget, rounds * options.round_tokens))


def _round_cost(*, recovered: bool) -> float:
    """Cost of a round's measurements in those of the last stage's length."""
    return OFFSPRING / FIRST_SHARE + SECOND / SECOND_SHARE + (LAST + 1) * (2 if recovered else 1)
