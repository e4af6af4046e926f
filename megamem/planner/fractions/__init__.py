"""Which share of each tensor's tokens is kept, swapped or recomputed: a linear programme, and MEMO's own rule.

problem.py    what there is to decide on one pipeline rank, and what limits it
linear.py     its exact optimum
simplex.py    how to find it without a solver installed
memo.py       MEMO's rule: one fraction for everything
table.py      an optimum as rows of `activations.table`, which the runtime executes
"""
