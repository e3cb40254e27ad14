"""Running it: recipes, the loop, DeepSpeed, checkpoints, evaluation, metrics, the command line.

Nothing is imported here: `gristmill --help` has to answer at once, and torch alone takes seconds. Import the file
that you need: `from gristmill.ops.recipe import load_recipe`.
"""
