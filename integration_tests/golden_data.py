"""Where the golden numbers and the recipes are, for the tests of this folder."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "fixtures" / "golden"
RECIPES = REPOSITORY / "recipes"
