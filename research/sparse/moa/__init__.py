"""MoA, a mixture of attention spans (arXiv 2406.14909): a sink and sliding window for every head, found by calibration.

influence.py    what masking each attention entry costs
calibration.py  answers of the dense model itself
rules.py        spans as functions of the length, their losses and densities
solve.py        the multi-objective integer program
plan.py         plans as files, and models that run them
planner.py      all of it in order
"""
