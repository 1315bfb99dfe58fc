"""The composed model: tower, connector, decoder, head. It contains no word about engines."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from data_pipeline.batch import MultimodalBatch
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.connector import Connector
from mmscale.models.decoder import CrossAttended, Decoder
from mmscale.models.flops import TrainingFlops, forward_flops, training_flops
from mmscale.models.kv_cache import KVCache
from mmscale.models.outputs import AuxLoss, ModelOutput
from mmscale.models.vision_kind import Tower
from mmscale.models.vocabulary import LanguageHead
from mmscale.nn.dropout import Dropout
from mmscale.nn.moe import MoeConfig


class MultimodalModel(nn.Module):
    """Text and, with a tower, images to hidden rows.

    Every batch runs every module: packs without an image carry a null document.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        head: LanguageHead,
        vision: Tower | None,
        connector: Connector | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.connector = connector
        self.decoder = decoder
        self.head = head

    def forward(self, batch: MultimodalBatch, cache: KVCache | None = None) -> ModelOutput:
        """Hidden rows of a batch; with a cache that was started, of one more token a sequence.

        Args:
            batch: Packed documents. With a started ``cache``: one row per sequence, in the same order, and no media.
            cache: Extended in place.

        Raises:
            ValueError: a cache for a batch whose documents have branches; training with dropout on a batch that does
                not say of which step and lanes it is.
        """
        if cache is not None and batch.branched is not None:
            raise ValueError("a document with branches has several ends, so no cache can go on from it")
        resumed = cache is not None and cache.started
        media, num_tokens = batch.media.get("image"), len(batch.token_ids)
        # One call embeds the tokens and the tags of tiles: all ranks make equally many.
        hidden = self.decoder.embed_tokens(
            batch.token_ids if media is None else torch.cat([batch.token_ids, media.tag_ids])
        )
        tags = hidden[num_tokens:]
        if media is not None:
            hidden = hidden[:num_tokens]
        if cache is not None:
            cache.advance(batch.segments, self.config.decoder.attention.kv_heads, self.decoder.head_dim, hidden)
        attended: CrossAttended | None = None
        if self.vision is not None and self.connector is not None:
            if cache is not None and resumed:
                attended = self.connector.resume(cache, batch.segments)
            else:
                media = batch.media["image"]
                features = self.vision(media).to(hidden.dtype)
                hidden, attended = self.connector.connect(hidden, features, tags, media, batch.segments, cache)
        dropout = self._dropout(batch) if self.training and self.config.decoder.dropout else None
        hidden, router = self.decoder(hidden, batch.position_ids, batch.attended, batch.valid, attended, cache, dropout)
        aux = {}
        mlp = self.config.decoder.mlp
        if router is not None and isinstance(mlp, MoeConfig):
            aux["router_balance"] = AuxLoss(router[0], mlp.balance_coefficient)
            aux["router_z"] = AuxLoss(router[1], mlp.z_coefficient)
        return ModelOutput(hidden, aux)

    def _dropout(self, batch: MultimodalBatch) -> Dropout:
        rate = self.config.decoder.dropout
        if batch.dropout_key is None or sum(batch.lane_tokens) != batch.segments.total:
            raise ValueError(
                f"decoder.dropout={rate}: a batch to train on needs dropout_key (seed and step of the run) and "
                "lane_tokens; outside of training call model.eval()"
            )
        chosen = batch.loss_weights > 0 if self.config.decoder.dropout_rows == "learned" else None
        return Dropout.of(rate, batch.dropout_key, batch.lanes, batch.lane_tokens, batch.token_ids.device, chosen)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by component, tied ones once; every parameter belongs to exactly one."""
        parts: dict[str, list[nn.Parameter]] = {}
        if self.vision is not None and (learned := list(self.vision.parameters())):
            parts["vision"] = learned
        if self.connector is not None:
            parts["connector"] = list(self.connector.parameters())
        text = list(dict.fromkeys([*self.decoder.parameters(), *self.head.parameters()]))
        extra = {id(module.extra_weight) for module in (self.decoder.embed_tokens, self.head)}
        parts["decoder"] = [parameter for parameter in text if id(parameter) not in extra]
        if self.config.decoder.extra_tokens is not None:
            parts["extra_tokens"] = [parameter for parameter in text if id(parameter) in extra]
        return parts

    def checkpoint_units(self) -> list[nn.Module]:
        """Blocks worth recomputing in the backward pass."""
        units: list[nn.Module] = self.vision.blocks() if self.vision is not None else []
        units += self.connector.blocks_to_recompute() if self.connector is not None else []
        return units + list(self.decoder.layers)

    def flops(self, batch: MultimodalBatch) -> int:
        """Floating-point operations of one forward with logits for every token; see ``models/flops.py``."""
        return forward_flops(self.config, batch)

    def training_flops(
        self, batch: MultimodalBatch, trained: Collection[str], *, recompute: bool = False
    ) -> TrainingFlops:
        """Operations of a forward and backward in which the components ``trained`` learn."""
        return training_flops(self.config, batch, trained, recompute=recompute)
