"""The contrastive model: an image tower and a text tower whose outputs are compared. Independent of the engine."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from data_pipeline.batch import MultimodalBatch
from mmscale.models.adapters import with_adapters
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.contrastive import ContrastiveConnector, PairVectors
from mmscale.models.decoder import Decoder
from mmscale.models.flops import TrainingFlops, forward_flops, training_flops
from mmscale.models.parameter_counts import describe_parameters
from mmscale.models.vision_kind import Tower


class ContrastiveModel(nn.Module):
    """Computes a vector of each image and of each text of a batch's pairs, independently of each other.

    The decoder is the text tower. Every batch runs every module, because sharded ranks must run the same modules: packs
    without an image carry a dummy document. A batch without pairs yields no vectors, and its gradients are zero.

    Source: CLIP (arXiv 2103.00020), section 2.4.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, vision: Tower, connector: ContrastiveConnector) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.connector = connector
        self.decoder = decoder

    def forward(self, batch: MultimodalBatch) -> PairVectors:
        """Return the vectors of ``batch.pairs``, in the order of the pairs."""
        media = batch.media["image"]
        features = self.vision(media)
        hidden = self.decoder.embed_tokens(batch.token_ids)
        hidden, _ = self.decoder(hidden, batch.position_ids, batch.attended, None, None)
        vectors: PairVectors = self.connector(features, hidden, media, batch.segments, batch.pairs)
        return vectors

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_parameters(self.components())})"

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each component; every parameter belongs to exactly one."""
        extra = self.decoder.embed_tokens.extra_weight
        parts = {
            "vision": list(self.vision.parameters()),
            "connector": list(self.connector.parameters()),
            "decoder": [parameter for parameter in self.decoder.parameters() if parameter is not extra],
        }
        return with_adapters(self, parts if extra is None else {**parts, "extra_tokens": [extra]})

    def checkpoint_units(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass."""
        return [*self.vision.blocks(), *self.decoder.layers]

    def flops(self, batch: MultimodalBatch) -> int:
        """Return the floating-point operations of one forward pass; see ``models/flops.py``."""
        return forward_flops(self.config, batch)

    def training_flops(
        self, batch: MultimodalBatch, trained: Collection[str], *, recompute: bool = False
    ) -> TrainingFlops:
        """Return the operations of a forward and backward pass that trains the components ``trained``."""
        return training_flops(self.config, batch, trained, recompute=recompute)
