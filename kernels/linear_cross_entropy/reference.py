"""The definition: linear layer, softmax cross entropy and its companions in plain PyTorch, with all logits in memory.

Computes in the dtype it is given; in float64 it is what the tests hold everything else against.

    T tokens, D hidden size, V vocabulary
"""

import torch

from .options import LossOptions, TokenOutputs


def linear_cross_entropy_reference(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, options: LossOptions
) -> TokenOutputs:
    """Loss, log-probability, entropy and arg-max of every token (`LossOptions` says which); no shards."""
    logits_TV = options.logit_scale * hidden_TD @ weight_VD[: options.vocab_size].T
    if options.softcap is not None:
        logits_TV = options.softcap * torch.tanh(logits_TV / options.softcap)
    log_probabilities_TV = logits_TV.log_softmax(-1)
    log_normaliser_T = logits_TV.logsumexp(-1)

    is_ignored_T = torch.zeros_like(labels_T, dtype=torch.bool)
    if options.ignore_index is not None:
        is_ignored_T = labels_T == options.ignore_index
    words_T1 = labels_T.masked_fill(is_ignored_T, 0).unsqueeze(-1)
    log_probability_T = log_probabilities_TV.gather(-1, words_T1).squeeze(-1)

    loss_T = (
        -(1.0 - options.label_smoothing) * log_probability_T
        - options.label_smoothing * log_probabilities_TV.mean(-1)
        + options.z_loss * log_normaliser_T.square()
    )
    entropy_T = -(log_probabilities_TV.exp() * log_probabilities_TV).sum(-1)
    return TokenOutputs(
        loss=loss_T.masked_fill(is_ignored_T, 0.0),
        log_probability=log_probability_T.masked_fill(is_ignored_T, 0.0),
        entropy=entropy_T.masked_fill(is_ignored_T, 0.0) if options.entropy else None,
        arg_max=logits_TV.argmax(-1) if options.arg_max else None,
    )
