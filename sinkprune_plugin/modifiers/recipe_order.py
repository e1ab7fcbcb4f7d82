"""Which modifiers of a recipe come before and after one of them; known while they are initialized."""

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

__all__ = ["blocks_at_its_turn", "earlier_modifiers", "later_modifiers"]


def earlier_modifiers(modifier: Modifier) -> list[Modifier]:
    """Those that run before a modifier, in their order.

    :param modifier: a modifier of the active session's recipe
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    return modifiers[: _position(modifier, modifiers)]


def later_modifiers(modifier: Modifier) -> list[Modifier]:
    """Those that run after a modifier, in their order.

    :param modifier: a modifier of the active session's recipe
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    return modifiers[_position(modifier, modifiers) + 1 :]


def blocks_at_its_turn(modifier: Modifier, blocks: int) -> int:
    """Decoder blocks that the model has when a modifier runs.

    :param modifier: a modifier of the active session's recipe
    :param blocks: blocks that it has now
    """
    left = [getattr(earlier, "blocks_left", None) for earlier in earlier_modifiers(modifier)]
    return next((number for number in reversed(left) if number is not None), blocks)


def _position(modifier: Modifier, modifiers: list[Modifier]) -> int:
    # One that a test initializes by itself isn't among them.
    return next((index for index, each in enumerate(modifiers) if each is modifier), len(modifiers))
