"""Drawings that need a network: what the newest checkpoint sees in a few images, kept as arrays in the run folder.

A module each: attention, tree, groups, matches; source opens the checkpoint and the images once for all of them. The page
(`report/attention.py` and so on) reads the arrays alone, so that it can be made again without checkpoint, data or torch.
"""
