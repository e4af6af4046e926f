"""Static memory allocation: where each buffer of a program lies, so that the peak is lowest.

solver.py          what a solver is: Solver, Task, Outcome
solvers.py         the solvers by name: auto, greedy, bilevel, exact, mip
validator.py       whether a solution is one, from the definition alone
explain.py         which buffers do not fit into a capacity
sweep.py           a problem in dense form; the lower bound (most bytes live at one instant)
core.py            the inner loops, compiled (native_core.py) or in Python (python_core.py)
passes.py          where the passes of layers repeat in a trace
"""
