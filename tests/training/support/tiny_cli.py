"""`dalle-train` with the recipe `tiny`, for tests that start processes."""

import sys

import tiny

import training.cli.main
import training.ranks.side_by_side
import training.recipes

training.recipes.RECIPES["tiny"] = tiny.recipe
training.ranks.side_by_side.PROGRAM = (sys.executable, __file__)

if __name__ == "__main__":
    sys.exit(training.cli.main.main())
