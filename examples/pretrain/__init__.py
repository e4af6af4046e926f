"""The parts of `examples/pretrain_gpt.py`, in the order in which a run uses them.

arguments   flags, and what contradicts what          (no torch: --help and mistakes answer at once)
launch      device, process group, parallel groups, seeds
corpus      text -> Megatron indexed dataset          data   indexed dataset -> microbatches
model       GPTModel, DDP, optimizer, scheduler
checkpoint  save, resume, asynchronous write
loop        the training loop and evaluation
report      progress, TensorBoard, JSON lines, MFU, the comparison
"""
