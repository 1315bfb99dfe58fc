"""SmolVLM 2: Idefics3 under another name. The first SmolVLM files have ``model_type: idefics3``."""

from __future__ import annotations

from mmscale.hf.layouts import idefics3

LAYOUT = idefics3.layout("smolvlm", "SmolVLMForConditionalGeneration")
