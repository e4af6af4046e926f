"""Schedule, vocabulary, activations, allocator and layout, weighed together under memory and time.

settle.py     one schedule: budgets of its ranks, the optimum of each, the configuration that it makes
layout.py     one layout: its schedules, the best of them, what lost and by how much
search.py     all layouts of a number of GPUs; the longest sequence, the fewest GPUs
explain.py    the tables of a plan: reasons, alternatives, Pareto front
"""
