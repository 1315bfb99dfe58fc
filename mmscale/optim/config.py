"""Configuration of a stage's optimizer and of the moving average of its weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.io.strict import StrictConfig

Rate = Annotated[float, Field(ge=0, lt=1)]


class _Decaying(StrictConfig):
    kind: str
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, multiplied by the learning rate. Applies to parameters of two or more dimensions,
    including embedding tables. Norms, biases and gates do not decay."""

    @property
    def state_name(self) -> str:
        """Name of the format of the optimizer state. A checkpoint can be resumed only if the name is the same."""
        return self.kind


class AdamWConfig(_Decaying):
    """AdamW. Its two moments take 8 bytes per parameter besides the masters, or about 2 with ``state_bits=8``."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    state_bits: Literal[8, 32] = 32
    """Bits per value of each moment: 32, or 8 with one scale per 256 values."""

    @property
    def state_name(self) -> str:
        """See ``_Decaying.state_name``."""
        return self.kind if self.state_bits == 32 else f"{self.kind} in {self.state_bits} bits"


class AdafactorConfig(_Decaying):
    """Adafactor as ``torch.optim.Adafactor``, with mean squares per row and column of each matrix and no first moment.

    Under ZeRO, the mean squares are summed over the shards of all ranks, so the state is factored at every ZeRO stage.
    The state is small, and every rank keeps all of it. ``learning_rate`` is relative to the RMS of each parameter;
    values are about 1e-2. The learning rate of an update is at most ``1 / sqrt(step)``.
    """

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: float = Field(default=-0.8, le=0)
    """Exponent of the step in the decay rate of the mean squares: ``1 - step ** beta2_decay``."""
    min_scale: float = Field(default=1e-3, ge=0)
    """Lower limit of the parameter RMS that multiplies the learning rate."""
    update_clip: float = Field(default=1.0, ge=1)
    """Upper limit of the RMS of a parameter's update, before the learning rate multiplies it."""


class MuonConfig(_Decaying):
    """Muon as ``torch.optim.Muon`` for matrices, including each expert's; AdamW for embedding tables and all else.

    The update is scaled to the RMS of AdamW's (``match_rms_adamw``), so both use the same ``learning_rate``. Under
    ZeRO, each matrix's update is sent to one rank, orthogonalised there and sent back. Requires torch 2.9.
    """

    kind: Literal["muon"] = "muon"
    momentum: Rate = 0.95
    """Decay rate of the momentum of matrices (Nesterov momentum)."""
    newton_schulz_steps: int = Field(default=5, ge=1, lt=100)
    """Iterations of the orthogonalisation."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of AdamW's two moments, for all parameters that Muon does not update."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of AdamW's update."""


OptimizerConfig = Annotated[AdamWConfig | AdafactorConfig | MuonConfig, Field(discriminator="kind")]


class EmaConfig(StrictConfig):
    """Exponential moving average of the trained weights: fp32 (4 bytes per parameter), sharded like the masters."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Weight of the old average in each update."""
    every_steps: int = Field(default=1, ge=1)
    """Number of applied optimizer steps between two updates of the average. Skipped steps do not count."""
