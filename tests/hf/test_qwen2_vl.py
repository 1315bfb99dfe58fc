"""Qwen2-VL out of a folder of Hugging Face computes what the reference computes, and goes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mmscale.models.build import media_spec
from tests.hf.pages import BOS, EOS, PAD, PAGES, Page, Seen, builder, compare, load, save_tokenizer, written
from tests.hf.twins import imported
from tests.models.twins import randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
IMAGE, START, END, VIDEO = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SPECIAL = [IMAGE, START, END, VIDEO]  # Ids 3 to 6.
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
LAYOUT = {"start": START, "end": END}
TWINS: dict[str, dict[str, Any]] = {
    "untied, two heads a key": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tied, one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie": True},
    "six heads a key, as in 2B": {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 96},
}


def twin(name: str = "untied, two heads a key", seed: int = 0) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    heads = dict(TWINS[name])
    tied = heads.pop("tie", False)
    width = heads.setdefault("hidden_size", 64)
    half = width // heads["num_attention_heads"] // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 272,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half // 2 - half // 8, half - half // 4 - half // 2 + half // 8],
            },
            **heads,
        },
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": width, "num_heads": 2},
        image_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        video_token_id=6,
        tie_word_embeddings=tied,
    )
    model = Qwen2VLForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=SPECIAL
    )
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen2VLVideoProcessor())


def seen(folder: Path, model: Any, pages: list[Page]) -> Seen:
    path = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    theirs = processor(path)

    def process(page: Page) -> dict[str, Tensor]:
        text, pictures = written(page, f"{START}{IMAGE}{END}")
        inputs = theirs(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        return dict(inputs)

    transforms = {"kind": "native", "layout": LAYOUT, **PIXELS}
    return Seen.of(builder(load(path, IMAGE), media_spec(model.config), transforms), process, pages)


@pytest.mark.parametrize("name", TWINS)
def test_the_same_logits_loss_and_gradients(name: str, tmp_path: Path, parity: Recorder) -> None:
    theirs = twin(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    compare(ours, theirs, seen(tmp_path, ours, list(PAGES.values())), tmp_path, parity, (BOUND, GRADIENT_BOUND))
