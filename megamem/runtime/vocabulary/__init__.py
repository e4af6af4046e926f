"""The embeddings' part of one training step on one rank, where all ranks share them: IF, S, T and IB (`ir.schedule`).

    passes         SharedVocabulary: the passes of a step
    layout         where a rank is, its rows of the two weights (AbstractShards), and the trainer (AbstractEnds)
    connections    Connections: communicators and lanes, which stay open from step to step; Letter: what a hidden state
                   travels in

Vocabulary parallelism (Yeung et al., arXiv 2411.05288): input and output embedding lie in shards on all ranks of
pipeline and tensor parallelism, and each rank does its share of every microbatch.

    IF   rows of the rank's own words, zero elsewhere; their sum is what F of the first stage begins with
    S    softmax statistics of the rank's part of the logits; with one barrier the input gradient too, up to a factor
    T    gradient of the rank's rows; with two barriers the input gradient too
    IB   gradient of the rank's rows of the input embedding

To the loop the passes are the neighbours beyond both ends of the pipeline: F of the first stage takes from them what it
would receive, and F of the last gives them what it would send; backwards likewise.

**Differences from the paper.** The logits are made a chunk of the vocabulary at a time, in S and again in T
(`kernels.linear_cross_entropy`), so that no softmax is kept in between: 12 bytes a token are, and the hidden state.
Hidden states, embeddings and their gradients travel in the dtype of the model, not in fp32, and the gradient is
reduced to the one rank that needs it. Two gradients of one tied weight are added up where it lies.

**Tensor parallelism.** What travels between pipeline ranks goes from each tensor-parallel rank to its peers. Inside a
stage the ranks of a tensor-parallel group run the same actions, so their collectives need no order of their own; only
the gradient that is made beside the computation (one barrier) has a communicator of its own.

**The gradient of the loss.** T needs, on every rank, by how much the loss changes with that of each token. It is sent
along with the hidden state, so that T waits for nothing but the statistics; the trainer's loss function must be a
weighted sum then (`AbstractEnds.labels`).

    B batch, S sequence, T = S B tokens, D hidden size, K rows of this rank's weight, P pipeline ranks
"""
