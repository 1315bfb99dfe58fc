"""The multimodal model: tower, connector, decoder, head. Independent of the engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_pipeline.batch import MultimodalBatch
from mmscale.models.adapters import with_adapters
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.connector import Connector
from mmscale.models.connectors.embedding import write_features
from mmscale.models.decoder import CrossAttentionHooks, Decoder
from mmscale.models.flops import TrainingFlops, forward_flops, training_flops
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.image_tokens import COMPONENT as IMAGE_TOKENS
from mmscale.models.image_tokens import TOKENIZER
from mmscale.models.kv_cache import KVCache
from mmscale.models.modality import ModalityTower
from mmscale.models.parameter_counts import describe_parameters
from mmscale.models.vision_kind import Tower
from mmscale.models.vocabulary import LanguageHead
from mmscale.nn.adapters import adapted_layers
from mmscale.nn.dropout import Dropout
from mmscale.nn.host import to_device
from mmscale.nn.moe import MoeConfig
from mmscale.nn.router import RoutedRows, RouterTensors


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        hidden: ``(T, D)``, after the final norm. ``model.head`` computes logits or the loss from it.
        router: Sums of the routers of all blocks, stacked, over the valid rows; None for a model without experts. An
            objective adds the losses of ``mmscale.objectives.router``.
    """

    hidden: Tensor
    router: RouterTensors | None = None


class MultimodalModel(nn.Module):
    """Computes hidden rows from text and, with towers, from images and other modalities.

    Every batch runs every module, because sharded ranks must run the same modules: packs that lack a modality carry a
    dummy document. The image tokenizer is the exception: it runs in ``with_codes``, if the data do not hold its codes.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        head: LanguageHead,
        vision: Tower | None,
        connector: Connector | None,
        image_tokenizer: ImageTokenizer | None = None,
        modalities: Mapping[str, tuple[ModalityTower, nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.connector = connector
        for name, (tower, projector) in (modalities or {}).items():
            self.add_module(name, tower)
            self.add_module(f"{name}_connector", projector)
        self.decoder = decoder
        self.head = head
        self.image_tokenizer = image_tokenizer
        self.train()

    def train(self, mode: bool = True) -> MultimodalModel:
        """Set training or evaluation mode. The image tokenizer, which no stage trains, keeps evaluation mode."""
        super().train(mode)
        if self.image_tokenizer is not None:
            self.image_tokenizer.eval()
        return self

    @torch.no_grad()
    def with_codes(self, batch: MultimodalBatch, device: torch.device | None = None) -> MultimodalBatch:
        """Return the batch with the codes of its images as tokens and labels; the batch itself if it has them already.

        Call it once for each microbatch, before the loss reads labels. All ranks must make equally many calls with
        ``batch.uncoded``: under ZeRO-3 each gathers the image tokenizer.

        Args:
            batch: Packed documents.
            device: Device of the model, if the batch is elsewhere. Only the returned token ids and labels are there.

        Raises:
            ValueError: the batch has images without codes, and the model has no image tokenizer.
        """
        images = batch.uncoded
        if images is None:
            return batch
        if self.image_tokenizer is None:
            raise ValueError("the batch has images without codes, and the model has no image_tokenizer to encode them")
        values, slots, learned, ids, labels = (
            each if device is None else to_device(each, device)
            for each in (images.values, images.slots, images.learned, batch.token_ids, batch.labels)
        )
        codes = self.image_tokenizer.codes_of_patches(values, images.grids) + self.config.decoder.image_ids.start
        labels = labels.index_copy(0, slots[learned] - 1, codes[learned])
        return replace(batch, token_ids=ids.index_copy(0, slots, codes), labels=labels, uncoded=None)

    def encoders(self) -> list[nn.Module]:
        """Return the modules of ``with_codes`` that ZeRO-3 should gather in one message each."""
        return [] if self.image_tokenizer is None else [self.image_tokenizer]

    def forward(self, batch: MultimodalBatch, cache: KVCache | None = None) -> ModelOutput:
        """Return the hidden rows of a batch, with the sums of the routers.

        Args:
            batch: Packed documents. Images without codes are encoded here too, but the caller does not get their
                labels: call ``with_codes`` first for a loss. If ``cache`` holds prompts already: one new row per
                sequence, in the same order, without media.
            cache: Keys and values of earlier rows; extended in place.

        Raises:
            ValueError: ``cache`` is set and documents have branches; or the model trains with dropout, and the batch
                has no ``dropout_key`` or its ``lane_tokens`` do not cover all rows. Errors of ``KVCache.advance`` and
                ``Decoder.forward`` also reach the caller.
        """
        if cache is not None and batch.branched is not None:
            raise ValueError("a document with branches has several ends, so a cache cannot continue it")
        batch = self.with_codes(batch)
        resumed = cache is not None and cache.started
        dropout = self._set_masks(batch) if self.training else None
        media, num_tokens = batch.media.get("image"), len(batch.token_ids)
        # Embed tokens and tile tags in one call, so that all ranks gather the table the same number of times.
        hidden = self.decoder.embed_tokens(
            batch.token_ids if media is None else torch.cat([batch.token_ids, media.tag_ids])
        )
        tags = hidden[num_tokens:]
        if media is not None:
            hidden = hidden[:num_tokens]
        if cache is not None:
            cache.advance(batch.segments, self.config.decoder.attention.kv_heads, self.decoder.head_dim, hidden)
        cross_attention: CrossAttentionHooks | None = None
        if self.vision is not None and self.connector is not None:
            if cache is not None and resumed:
                cross_attention = self.connector.resume(cache, batch.segments)
            else:
                media = batch.media["image"]
                features = self.vision(media).to(hidden.dtype)
                hidden, cross_attention = self.connector.connect(hidden, features, tags, media, batch.segments, cache)
        if not resumed:
            for name in self.config.modalities:
                (tower, projector), block = self._parts(name), batch.media[name]
                grids = self.config.modalities[name].feature_grids(block.grids)
                hidden = write_features(hidden, projector(tower(block).to(hidden.dtype), grids), block)
        rows = self._routed_rows(batch) if isinstance(self.config.decoder.mlp, MoeConfig) else None
        hidden, router = self.decoder(hidden, batch.position_ids, batch.attended, rows, cross_attention, cache, dropout)
        return ModelOutput(hidden, router)

    def _parts(self, modality: str) -> tuple[ModalityTower, nn.Module]:
        """Return tower and projector of a modality besides images."""
        return getattr(self, modality), getattr(self, f"{modality}_connector")

    def _routed_rows(self, batch: MultimodalBatch) -> RoutedRows:
        kind, names = torch.zeros_like(batch.token_ids), ("image", *self.config.modalities)
        for number, name in enumerate(names, start=1):
            if (block := batch.media.get(name)) is not None:
                kind[block.scatter_index] = number
        num_valid = batch.num_tokens or None  # 0 can mean that the number is not known.
        return RoutedRows(batch.valid, kind, batch.segments.cu.long(), num_valid, 1 + len(names))

    def _set_masks(self, batch: MultimodalBatch) -> Dropout | None:
        """Give the adapters their dropout masks, and return those of the decoder's blocks; None without dropout."""
        decoder, adapters = self.config.decoder, self.config.adapters
        if adapters is not None and adapters.dropout:
            masks = self._masks(batch, adapters.dropout, "adapters.dropout")
            for path, layer in adapted_layers(self).items():
                layer.masks = masks.for_layer(path)
        rates = {"decoder.dropout": decoder.dropout, "decoder.attention_dropout": decoder.attention_dropout}
        if isinstance(decoder.mlp, MoeConfig):
            rates |= {f"decoder.mlp.{key}": getattr(decoder.mlp, key) for key in ("expert_dropout", "jitter")}
        used = [key for key, rate in rates.items() if rate]
        if not used:
            return None
        masks = self._masks(batch, rates[used[0]], used[0])
        masks = replace(masks, rate=decoder.dropout, attention_rate=decoder.attention_dropout)
        return replace(masks, chosen=batch.loss_weights > 0) if decoder.dropout_rows == "learned" else masks

    def _masks(self, batch: MultimodalBatch, rate: float, key: str) -> Dropout:
        if batch.dropout_key is None or sum(batch.lane_tokens) != batch.segments.total:
            raise ValueError(
                f"{key}={rate}: a training batch needs dropout_key (seed and step of the run) and "
                "lane_tokens (rows of each lane); outside of training call model.eval()"
            )
        device = batch.token_ids.device
        return Dropout.for_microbatch(rate, batch.dropout_key, batch.lanes, batch.lane_tokens, device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_parameters(self.components())})"

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each component, tied ones once; every parameter belongs to exactly one."""
        parts: dict[str, list[nn.Parameter]] = {}
        if self.vision is not None and (learned := list(self.vision.parameters())):
            parts["vision"] = learned
        if self.connector is not None:
            parts |= self.connector.components()
        for name, modality in self.config.modalities.items():
            tower, projector = self._parts(name)
            parts |= {name: list(tower.parameters())} if modality.tower.learns else {}
            parts[f"{name}_connector"] = list(projector.parameters())
        image = [p for each in (self.decoder.embed_tokens.image, self.head.image) if each for p in each.parameters()]
        drawn = {id(parameter) for parameter in image}
        both = dict.fromkeys([*self.decoder.parameters(), *self.head.parameters()])
        text = [parameter for parameter in both if id(parameter) not in drawn]
        extra = {id(module.extra_weight) for module in (self.decoder.embed_tokens, self.head)}
        parts["decoder"] = [parameter for parameter in text if id(parameter) not in extra]
        if self.config.decoder.extra_tokens is not None:
            parts["extra_tokens"] = [parameter for parameter in text if id(parameter) in extra]
        if image:
            parts[IMAGE_TOKENS] = image
        if self.image_tokenizer is not None:
            parts[TOKENIZER] = list(self.image_tokenizer.parameters())
        return with_adapters(self, parts)

    def checkpoint_units(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass."""
        units: list[nn.Module] = self.vision.blocks() if self.vision is not None else []
        units += self.connector.blocks_to_recompute() if self.connector is not None else []
        units += [block for name in self.config.modalities for block in self._parts(name)[0].blocks()]
        return units + list(self.decoder.layers)

    def flops(self, batch: MultimodalBatch) -> int:
        """Return the operations of one forward pass with logits for every token; see ``models/flops.py``."""
        return forward_flops(self.config, batch)

    def training_flops(
        self, batch: MultimodalBatch, trained: Collection[str], *, recompute: bool = False
    ) -> TrainingFlops:
        """Return the operations of a forward and backward pass that trains the components ``trained``."""
        return training_flops(self.config, batch, trained, recompute=recompute)
