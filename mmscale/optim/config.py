"""Which optimizer a stage uses, and whether it averages its weights: configuration only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.io.strict import StrictConfig

Rate = Annotated[float, Field(ge=0, lt=1)]


class _Decaying(StrictConfig):
    kind: str
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices, times the learning rate; norms, biases and gates never decay."""

    @property
    def state_name(self) -> str:
        """What is kept beside the masters; a checkpoint can be resumed where it is the same."""
        return self.kind


class AdamWConfig(_Decaying):
    """AdamW: two moments, 8 bytes a parameter beside the master, or 2 with ``state_bits=8``."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Floor of the denominator."""
    state_bits: Literal[8, 32] = 32
    """Bits of each moment's value; with 8, every 256 of them share a scale."""

    @property
    def state_name(self) -> str:
        """As ``_Decaying.state_name``."""
        return self.kind if self.state_bits == 32 else f"{self.kind} in {self.state_bits} bits"


class AdafactorConfig(_Decaying):
    """Adafactor as ``torch.optim.Adafactor``: of each matrix the mean squares of rows and columns, no first moment.

    Under ZeRO the rows and columns are summed up over the ranks' shards, so the state stays factored at every stage;
    it is small, and every rank keeps all of it. ``learning_rate`` is relative to the size (RMS) of each parameter:
    about 1e-2.
    """

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: float = Field(default=-0.8, le=0)
    """Exponent of the step in the decay rate of the mean squares: ``1 - step ** beta2_decay``."""
    min_scale: float = Field(default=1e-3, ge=0)
    """Smallest parameter size that the learning rate is multiplied with."""
    update_clip: float = Field(default=1.0, ge=1)
    """Largest RMS of a parameter's update before it is multiplied with the learning rate."""


class MuonConfig(_Decaying):
    """Muon as ``torch.optim.Muon`` for matrices, each expert's too; AdamW for the rest and for embedding tables.

    The update is scaled to the size of AdamW's (``match_rms_adamw``), so one ``learning_rate`` serves both. Under ZeRO
    each matrix's momentum is sent to one rank, orthogonalised there and sent back. Needs torch 2.9.
    """

    kind: Literal["muon"] = "muon"
    momentum: Rate = 0.95
    """Decay rate of the momentum of matrices (Nesterov's form)."""
    newton_schulz_steps: int = Field(default=5, ge=1, lt=100)
    """Iterations of the orthogonalisation."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of AdamW's two moments, for what is no matrix."""
    eps: float = Field(default=1e-8, gt=0)
    """Floor of AdamW's denominator."""


OptimizerConfig = Annotated[AdamWConfig | AdafactorConfig | MuonConfig, Field(discriminator="kind")]


class EmaConfig(StrictConfig):
    """An exponential moving average of the trained weights, fp32, sharded like the masters (4 bytes a parameter)."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the old average that an update keeps."""
    every_steps: int = Field(default=1, ge=1)
    """Update after every so many applied steps of the stage."""
