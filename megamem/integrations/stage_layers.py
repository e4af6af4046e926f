"""How a Megatron model's layers are divided among pipeline stages, whatever option of Megatron's says so."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import LayerType

from megamem.ir.pipeline_split import Split, ends_split, normal_split, padded_split


def split_of(config: Any) -> Split:
    """The layers of each stage by a TransformerConfig, in the order of the model; empty where all have as many."""
    pipeline, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if (layout := config.pipeline_model_parallel_layout) is not None:
        stages = [layout.layout[rank][chunk] for chunk in range(chunks) for rank in range(pipeline)]
        return normal_split([stage.count(LayerType.decoder) for stage in stages])
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    if first is not None or last is not None:
        return ends_split(config.num_layers, pipeline, chunks, first=first, last=last)
    embedding, loss = config.account_for_embedding_in_pipeline_split, config.account_for_loss_in_pipeline_split
    if embedding or loss:
        return padded_split(config.num_layers, pipeline, chunks, embedding=embedding, loss=loss)
    return ()
