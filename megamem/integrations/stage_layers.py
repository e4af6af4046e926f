"""How a Megatron model's layers are divided among pipeline stages, whatever option of Megatron's says so."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.transformer.enums import LayerType

from megamem.ir.pipeline_split import Split, normal_split
from megamem.planner.models.flags import split_of_flags


def split_of(config: Any) -> Split:
    """The layers of each stage by a TransformerConfig, in the order of the model; empty where all have as many."""
    pipeline, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if (layout := config.pipeline_model_parallel_layout) is not None:
        stages = [layout.layout[rank][chunk] for chunk in range(chunks) for rank in range(pipeline)]
        return normal_split([stage.count(LayerType.decoder) for stage in stages])
    flags = Namespace(
        num_layers=config.num_layers,
        decoder_first_pipeline_num_layers=config.num_layers_in_first_pipeline_stage,
        decoder_last_pipeline_num_layers=config.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=config.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=config.account_for_loss_in_pipeline_split,
    )
    return split_of_flags(flags, pipeline, chunks)
