"""The time of a step of one rank, from operations, bytes and messages.

    compute         products: operations / (peak * share); other operations: bytes / (bandwidth * share)
    traffic         ZeRO gathers and reductions; the part ``overlap`` of it can run during computation
    exchange        token rows of expert parallelism; never overlapped
    optimizer       reads and writes of gradients, masters and moments
    host            Python and DeepSpeed's hooks: on CUDA concurrent with the device, on a CPU in addition

Bytes that a rank sends, for W ranks, M microbatches, N values of which n are trained, and w bytes of a weight (factor
(W - 1) / W left out):

    stage 0    8 n                              all-reduce in float32
    stage 1    8 n + w n                        and gather of the updated weights
    stage 2    8 n M + w n                      DeepSpeed all-reduces every bucket of each microbatch
    stage 3    M (2 w N - w L + 4 n)            L values stay from the forward to the backward pass
    experts    M (2 w N_e - w L_e + 4 n_e) / P  over W / P ranks, with P ranks that share the experts
    exchange   4 w k T D, or 6 with recomputation, for each layer with experts and T tokens; factor (P - 1) / P

Balanced experts are assumed. Source of the formulas: Rajbhandari et al. 2020 (arXiv 1910.02054), section 7; Lepikhin et
al. 2020 (arXiv 2006.16668), section 3.2. ``benchmarks.expert_traffic`` counts these bytes in real steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from mmscale.models.flops import model_products
from mmscale.nn.block import AttentionConfig, MlpBase
from mmscale.nn.experts import Experts
from mmscale.nn.moe import MoeConfig
from mmscale.optim.config import AdafactorConfig, AdamWConfig, MuonConfig
from mmscale.optim.schedule import trained_components
from mmscale.plan.cluster import Cluster
from mmscale.plan.load import StageLoad
from mmscale.run.config import RunConfig

GRADIENT_BYTES = 4
"""Gradients are reduced in float32."""
_TOWER_BLOCK = 30
"""Values that a row of a block in the tower of another modality reads and writes, for each channel. This is
``_row_values`` with a key head for each query head, and a feed-forward block of four times the width."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of values of a model that decide traffic and the optimizer's work.

    Attributes:
        total: N, all values.
        trained: n.
        experts, trained_experts: The parts of both in routed experts.
        expert_layers: Layers with routed experts.
        units: Blocks, each of which ZeRO-3 gathers in one message.
    """

    total: int
    trained: int
    experts: int
    trained_experts: int
    expert_layers: int
    units: int


@lru_cache(maxsize=64)
def model_sizes(config: ModelConfig, trained: frozenset[str]) -> ModelSizes:
    """Count the values of ``config`` of which the components ``trained`` are trained. Builds it on the meta device."""
    model = build_weights(config)
    parts = {id(p): p.numel() for name, part in model.components().items() if name in trained for p in part}
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    of_experts = [parameter for module in experts for parameter in module.parameters()]
    return ModelSizes(
        total=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parts.values()),
        experts=sum(parameter.numel() for parameter in of_experts),
        trained_experts=sum(parameter.numel() for parameter in of_experts if id(parameter) in parts),
        expert_layers=len(experts),
        units=len(model.checkpoint_units()) + 2,  # type: ignore[operator]  # And the embedding and the head.
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one rank by cause, and what they were computed from.

    Attributes:
        products: Products with weights, those of experts included.
        attention: Scores and mixing of values.
        memory_bound: Norms, activations, residuals, logits, routing, and reads of weights.
        optimizer: The optimizer's step, with the gradient's norm and, with offload, the transfers to the host.
        traffic: ZeRO's messages, as if nothing ran during them.
        exposed: The part of ``traffic`` that no computation hides.
        exchange: All-to-all exchanges of token rows.
        host: Python and DeepSpeed's hooks.
        seconds: The whole step.
        model_flops: Operations of a rank without recomputation.
        sent_bytes: Bytes that a rank sends, exchanges included.
        microbatches: M.
    """

    products: float
    attention: float
    memory_bound: float
    optimizer: float
    traffic: float
    exposed: float
    exchange: float
    host: float
    seconds: float
    model_flops: float
    sent_bytes: float
    microbatches: int

    def parts(self) -> dict[str, float]:
        """Return the seconds by name, without the sum."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:8]}


def step_time(config: RunConfig, number: int, load: StageLoad, cluster: Cluster, precision: str) -> StepTime:
    """Return the time of a step of stage ``number``.

    Args:
        config: The run.
        number: The stage.
        load: Its mean pack.
        cluster: The machines.
        precision: ``bf16``, ``fp16`` or ``fp32``.
    """
    return _Step(config, number, load, cluster, precision).time()


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    number: int
    load: StageLoad
    cluster: Cluster
    precision: str

    @property
    def model(self) -> ModelConfig:
        return self.config.decoder_model(self.number)

    @property
    def trained(self) -> frozenset[str]:
        return frozenset(trained_components(self.model.components, self.config.stages[self.number]))

    @property
    def packs(self) -> int:
        """Packs of the rank with most of them."""
        return math.ceil(self.config.stage_data(self.number).lanes / self.cluster.ranks)

    @property
    def microbatches(self) -> int:
        return math.ceil(self.packs / self.config.engine.micro_lanes)

    @property
    def value_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def time(self) -> StepTime:
        device, engine = self.cluster.accelerator, self.config.engine
        sizes = model_sizes(self.model, self.trained)
        products, attention, flops = self._product_seconds()
        memory_bound = self._moved_bytes(sizes) / (device.memory_bandwidth * device.memory_share)
        sent, traffic = self._traffic(sizes)
        exchanged, exchange = self._exchange(sizes)
        compute = products + attention + memory_bound
        overlaps = engine.overlap_communication and device.device == "cuda"
        exposed = traffic - min(device.overlap * traffic, compute) if overlaps else traffic
        optimizer = self._optimizer_seconds(sizes)
        host = self.microbatches * sizes.units * device.unit_seconds + device.step_seconds
        busy = compute + exposed + exchange + optimizer
        return StepTime(
            products=products,
            attention=attention,
            memory_bound=memory_bound,
            optimizer=optimizer,
            traffic=traffic,
            exposed=exposed,
            exchange=exchange,
            host=host,
            seconds=max(busy, host) if device.device == "cuda" else busy + host,
            model_flops=flops,
            sent_bytes=sent + exchanged,
            microbatches=self.microbatches,
        )

    def _product_seconds(self) -> tuple[float, float, float]:
        """Return the seconds of products with weights and of attention, and the model's operations, of all packs."""
        device, recompute = self.cluster.accelerator, self.config.engine.activation_checkpointing
        peak = device.peak_flops[self.precision]  # type: ignore[index]
        dense = attention = experts = model_flops = 0.0
        stage_models = [(self.model, self.trained, recompute)]
        teachers = self.load.counts[1:]
        if teachers:
            from mmscale.run.stage_teachers import teacher_models

            stage_models += [(each, frozenset(), False) for each in teacher_models(self.config, self.number)]
        for (model, trained, again), counts in zip(stage_models, self.load.counts, strict=True):
            for product in model_products(model, trained):
                # ``passes`` is a count of microbatches, all others of packs.
                count = self.microbatches if product.per == "passes" else self.packs * counts.get(product.per, 0.0)
                work = count * (product.forward + product.backward + (product.recomputed if again else 0))
                model_flops += count * (product.forward + product.backward)
                if product.per.endswith("_pairs"):
                    # A kernel skips the masked half of causal attention. Counts include it.
                    attention += work / 2 if product.per == "token_pairs" else work
                else:
                    dense += work
            routed = sum(_routed_flops(model.decoder.hidden_dim, mlp) for mlp in model.decoder.block_mlps())
            factor = 1 + (1 + again + ("decoder" in trained) if trained else 0)
            experts += self.packs * counts["token_rows"] * routed * factor
        experts = min(experts, dense)
        seconds = (dense - experts) / (peak * device.matmul_share) + experts / (peak * device.expert_share)
        return seconds, attention / (peak * device.attention_share), model_flops

    def _moved_bytes(self, sizes: ModelSizes) -> float:
        """Return the bytes of operations without products, of all microbatches of a rank."""
        counts, w = self.load.counts[0], self.value_bytes
        recompute = self.config.engine.activation_checkpointing
        moved = 0.0
        for rows, values, learns in _block_values(self.model, self.trained):
            passes = (3 + recompute) if learns else 1
            moved += self.packs * counts.get(rows, 0.0) * values * w * passes
        if self.model.predicts_tokens:
            # Logits are float32: written, read for the maximum and the sum, and replaced by their gradient.
            moved += self.packs * counts["logit_rows"] * self.model.decoder.vocab_size * 4 * 5
        # Each microbatch reads all weights forward and backward, and writes and reduces the gradient.
        moved += self.microbatches * (2 * w * sizes.total + (w + 2 * GRADIENT_BYTES) * sizes.trained)
        if self.config.engine.zero_stage == 3:  # A gather writes a buffer, and copies it to the parameters.
            moved += self.microbatches * 2 * 3 * w * sizes.total
        return moved

    def _traffic(self, sizes: ModelSizes) -> tuple[float, float]:
        """Return the bytes that a rank sends for weights and gradients, and their seconds."""
        engine, ranks, w, m = self.config.engine, self.cluster.ranks, self.value_bytes, self.microbatches
        if ranks == 1:
            return 0.0, 0.0
        n, factor = sizes.trained, (ranks - 1) / ranks
        if engine.zero_stage < 3:
            reduced = 2 * GRADIENT_BYTES * n * (m if engine.zero_stage == 2 else 1)
            gathered = w * n if engine.zero_stage else 0
            messages = m * n / engine.reduce_bucket_elements + n / engine.gather_bucket_elements + 2
            sent = (reduced + gathered) * factor
            return sent, self.cluster.collective_seconds(sent, messages, ranks)
        shared, size = sizes.experts, engine.expert_parallel
        kept = min(sizes.total, engine.live_parameter_elements // 2) / sizes.total
        per_value = (2 - kept) * w
        rest = m * (per_value * (sizes.total - shared) + GRADIENT_BYTES * (n - sizes.trained_experts)) * factor
        messages = m * ((2 - kept) * sizes.units + max(sizes.units, n / engine.reduce_bucket_elements))
        experts = m * (per_value * shared + GRADIENT_BYTES * sizes.trained_experts) / size * (1 - size / ranks)
        seconds = self.cluster.collective_seconds(rest, messages, ranks)
        return rest + experts, seconds + self.cluster.collective_seconds(
            experts, messages if size > 1 else 0, ranks // size, stride=size
        )

    def _exchange(self, sizes: ModelSizes) -> tuple[float, float]:
        """Return the bytes that a rank sends to share experts, and their seconds."""
        size, mlp = self.config.engine.expert_parallel, self.model.decoder.mlp
        if size == 1 or not isinstance(mlp, MoeConfig):
            return 0.0, 0.0
        rows = self.packs * self.load.counts[0]["token_rows"] * mlp.experts_per_token
        passes = 6 if self.config.engine.activation_checkpointing else 4
        sent = passes * self.value_bytes * rows * self.model.decoder.hidden_dim * sizes.expert_layers * (1 - 1 / size)
        messages = passes * self.microbatches * sizes.expert_layers
        return sent, self.cluster.exchange_seconds(sent, messages, size)

    def _optimizer_seconds(self, sizes: ModelSizes) -> float:
        device, engine = self.cluster.accelerator, self.config.engine
        values = sizes.trained / (self.cluster.ranks if engine.zero_stage else 1)
        state = state_bytes(self.config, self.number)
        # Norm, unscaling and update read and write the gradient; masters and state are read and written.
        moved = values * (4 * GRADIENT_BYTES + 2 * (4 + state) + self.value_bytes)
        if engine.offload == "none":
            return moved / (device.memory_bandwidth * device.optimizer_share)
        transferred = values * (GRADIENT_BYTES + self.value_bytes)
        return moved / device.host_memory_bandwidth + transferred / device.host_bandwidth


def state_bytes(config: RunConfig, number: int) -> float:
    """Return the bytes of optimizer state for each trained value, without the float32 master."""
    optimizer = config.stages[number].optimizer
    if isinstance(optimizer, AdamWConfig):
        return 8.0 if optimizer.state_bits == 32 else 2 * (1 + 4 / 256)
    if isinstance(optimizer, MuonConfig):
        return 4.0
    assert isinstance(optimizer, AdafactorConfig)
    return 0.0  # One number for each row and column.


def _routed_flops(dim: int, mlp: MlpBase) -> int:
    """Return the forward operations of one row in routed experts."""
    return 6 * dim * mlp.expert_dim * mlp.experts_per_token if isinstance(mlp, MoeConfig) else 0


def _block_values(model: ModelConfig, trained: frozenset[str]) -> Iterator[tuple[str, float, bool]]:
    """Yield, for each block: its count, values that a row reads and writes forward, and whether it has a backward."""
    decoder, vision, connector = model.decoder, model.vision, model.connector
    for name, modality in model.modalities.items():
        for _ in range(modality.tower.num_blocks):
            yield f"{name}.tower_rows", _TOWER_BLOCK * modality.tower.feature_dim, name in trained
    for mlp in decoder.block_mlps():
        yield "token_rows", _row_values(decoder.hidden_dim, decoder.attention, mlp), bool(trained)
    if vision is None or connector is None:
        return
    if vision.kind == "transformer":
        layers = vision.num_layers + (0 if vision.tiles is None else vision.tiles.global_layers)
        values = _row_values(vision.hidden_dim, vision.attention, vision.mlp)
        for _ in range(layers):
            yield "tower_rows", values, "vision" in trained
    for _ in connector.block_layers(decoder):
        attention, mlp = connector.shapes(decoder)  # type: ignore[union-attr]  # Only these kinds have blocks.
        yield "token_rows", _row_values(decoder.hidden_dim, attention, mlp), bool(trained)


def _row_values(dim: int, attention: AttentionConfig, mlp: MlpBase) -> float:
    """Return the values that one row of a block reads and writes forward, without the operands of products."""
    heads, groups = attention.num_heads, attention.kv_heads
    width = attention.resolved_head_dim(dim)
    values = 2 * 2 * dim + 2 * 3 * dim  # Two norms and two residual sums.
    values += 4 * (heads + groups) * width + 2 * (heads + groups) * width  # Rotary positions; attention.
    if isinstance(mlp, MoeConfig):
        k = mlp.experts_per_token
        # Copies of rows to the experts and back; activations; probabilities in float32.
        return values + k * (4 * dim + 5 * mlp.expert_dim) + 5 * mlp.shared_dim + 8 * mlp.num_experts
    hidden: int = mlp.hidden_dim  # type: ignore[attr-defined]
    return values + (5 if mlp.gated else 2) * hidden  # type: ignore[attr-defined]
