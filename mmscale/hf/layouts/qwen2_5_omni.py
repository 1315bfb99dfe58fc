"""Qwen2.5-Omni, of which the thinker alone is imported and exported: the parts that speak are left out.

transformers opens an export with the class of the thinker. Its class of the whole model also needs ``spk_dict.pt``, a
pickle with the voices, which an export does not copy.
"""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, with_prefix
from mmscale.hf.layouts import qwen2_5_omni_thinker as thinker
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig

_PART = "thinker_config"
_SPEECH = ("talker_config", "token2wav_config", "enable_audio_output", "enable_talker")


def _to_model(keys: Keys) -> ModelConfig:
    keys.read_keys.update((*_SPEECH, PREPROCESSOR))
    inner = keys.required_object(_PART)
    inner.must_be("model_type", thinker.FAMILY)
    given = {**inner.given, **({PREPROCESSOR: keys.given[PREPROCESSOR]} if PREPROCESSOR in keys.given else {})}
    whole = Keys(given, inner.where, thinker.FAMILY, keys.unread)
    model = thinker.to_model(whole)
    whole.raise_on_unread()
    keys.must_be("hidden_size", model.decoder.hidden_dim)
    return model


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    values = thinker.to_keys(config)
    processors = values.pop(PREPROCESSOR)
    return {
        _PART: {"model_type": thinker.FAMILY, **values},
        "enable_audio_output": False,
        PREPROCESSOR: processors,
    }


LAYOUT = FamilyLayout(
    "qwen2_5_omni",
    "Qwen2_5OmniForConditionalGeneration",
    lambda config: with_prefix(thinker.rules(config), theirs=("", "thinker.")),
    _to_model,
    _to_keys,
    (*(rf"thinker\.{name}" for name in thinker.LAYOUT.unused), r"talker\..*", r"token2wav\..*"),
    aliases=(
        (r"^thinker\.model\.language_model\.", "thinker.model."),
        (r"^thinker\.model\.(visual|audio_tower)\.", r"thinker.\1."),
    ),
    auto_class=None,
    part=_PART,
    images=thinker.images,
    sounds=thinker.LAYOUT.sounds,
)
