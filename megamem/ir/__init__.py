"""Nouns: what travels between the rooms. Values only, no torch, each valid once it exists.

Words, used everywhere with one meaning (design, section 7):

    stage        a pipeline position
    chunk        the part of a model that a rank holds for one virtual stage
    microbatch   what one forward pass works on
    token range  a slice of dimension 0 of a [s, b, h] tensor
    fraction     a share of the tokens, 0..1
    keep, swap, recompute   the three fates of a saved tensor
    placement    which stage each chunk of each rank is: round-robin (Megatron-Core's) or v
    action       one thing a rank does in a step: F, B (input gradient), W (weight gradient), a send, a reload ...
    schedule     the actions of every rank, in order
    tier         where a stored tensor lies: hbm (device memory) or host
    plan         a configuration with nothing left to decide
"""
