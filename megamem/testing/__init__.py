"""Real Megatron-Core models on one CPU machine: the rig, forked gloo ranks, model builders, and an independent memory
count.

Import the part that is needed: `cpu` (the rig), `dist` (ranks), `models` (builders), `live` (storages). Importing
this package loads no torch, because `python -m megamem.testing --help` and the fork server of `dist` come before it.
"""
