"""Tiny folders in the form of published models: random weights, trained tokenizer, processor and chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.images.video_layout import in_words
from tests.hf import (
    chat_templates,
    test_aria,
    test_fuyu,
    test_idefics3,
    test_internvl,
    test_llava,
    test_pixtral,
    test_qwen2_5_vl,
    test_qwen2_vl,
)
from tests.hf.decoders import SIZES
from tests.hf.mllama_reference import reference_model as mllama_model
from tests.models.reference_models import randomise

_TEXT = """The quick brown fox jumps over the lazy dog. What is in this picture? A red house, and two cats.
user assistant system You are a helpful assistant. Hello there! Please tell me more about it: how many are there?"""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen 2's rule."""


@dataclass(frozen=True)
class Published:
    """A family.

    Attributes:
        special: Special tokens; the first three are padding, begin and end.
        model: Returns the model for a vocabulary size.
        images: Returns the image processor, or None.
        processor: Name of the class of ``transformers`` that joins tokenizer and image processor.
        chat: The chat template; None for none.
        adds_begin: Whether the tokenizer puts its begin token before a text.
        begin: Whether the tokenizer has a begin token.
        named: Special tokens that the processor asks the tokenizer for, by attribute.
        arguments: Further arguments of the processor.
        late: Special tokens after the vocabulary of the model, as Llama 3.2 Vision's image.
        auto: Class of ``transformers`` that opens the folder.
    """

    special: tuple[str, ...]
    model: Callable[[int], Any]
    images: Callable[[], Any] | None = None
    processor: str = ""
    chat: str | None = None
    adds_begin: bool = False
    begin: bool = True
    named: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"


def save(family: str, folder: Path) -> Any:
    """Write the folder of a family; return its model."""
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = in_words  # The package spells numbers in texts about videos.
    one = FAMILIES[family]
    words = fuyu_tokenizer(one) if family == "fuyu" else tokenizer(one)
    model = one.model(words.get_vocab_size() - len(one.late))
    pad, begin, end = one.special[:3]
    end = pad if family == "fuyu" else end
    model.generation_config.eos_token_id = model.config.eos_token_id = words.token_to_id(end)
    model.generation_config.pad_token_id = words.token_to_id(pad)
    model.save_pretrained(folder)
    names = {"bos_token": begin} if one.begin else {}
    extra = [] if family == "fuyu" else [*one.special[3:], *one.late]  # Fuyu's are pieces of the vocabulary.
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, pad_token=pad, **names, extra_special_tokens=dict(one.named) or extra
    )
    if one.images is None:
        fast.chat_template = one.chat
        fast.save_pretrained(folder)
        return model.eval()
    images = one.images()
    parts = [images, fast]
    videos = {"Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor"}
    videos |= {f"{name}Processor": f"{name}VideoProcessor" for name in ("Qwen2VL", "InternVL", "SmolVLM")}
    if one.processor in videos:
        side = {"longest_edge": test_idefics3.CASES[test_idefics3.SECOND]["side"]}
        frames = {"max_image_size": side, "video_sampling": {"fps": 1, "max_frames": 3, "video_size": side}}
        changes = frames if one.processor == "SmolVLMProcessor" else {}
        parts.append(getattr(transformers, videos[one.processor])(**changes))
    whole = getattr(transformers, one.processor)(*parts, **one.arguments)
    whole.chat_template = one.chat
    whole.save_pretrained(folder)
    return model.eval()


def tokenizer(one: Published) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with merges across spaces and newlines, as real ones have."""
    words = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=list(one.special), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([_TEXT] * 4, trainer)
    if one.adds_begin:
        pair = (one.special[1], 1)
        end = [f"{one.special[2]}:0"] if one.processor == "CLIPProcessor" else []
        words.post_processor = processors.TemplateProcessing(
            single=" ".join([f"{pair[0]}:0", "$A:0", *end]), special_tokens=[pair, (one.special[2], 2)]
        )
    words.add_special_tokens(list(one.late))
    return words


def fuyu_tokenizer(one: Published) -> tokenizers.Tokenizer:
    """Return a tokenizer of letters that begins each text with SentencePiece's mark, as their processor expects."""
    letters = [(letter, -2.0) for letter in "▁" + "".join(sorted({*_TEXT} - {" ", "\n"}))]
    pieces = [("<unk>", 0.0), *letters, *((name, 0.0) for name in one.special)]
    words = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Metaspace()
    return words


def text_model(family: str, **keys: Any) -> Callable[[int], Any]:
    """Return a function that makes a random decoder."""

    def make(vocab_size: int) -> Any:
        import transformers

        sizes = {**SIZES, "vocab_size": vocab_size, "max_position_embeddings": 512, "num_key_value_heads": 2}
        sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        if family == "persimmon":
            del sizes["num_key_value_heads"]
        config = transformers.AutoConfig.for_model(family, **{**sizes, **keys})
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model, 0)
        return model

    return make


def _images(name: str, **keys: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**keys)

    return make


def _fuyu(vocab_size: int) -> Any:
    return test_fuyu.reference_model(vocabulary=vocab_size, image_token=vocab_size - 3)


def _mllama(vocab_size: int) -> Any:
    return mllama_model(vocab=vocab_size, image=vocab_size)


_BASE = ("<pad>", "<s>", "</s>")
_CHATML = ("<|endoftext|>", "<|start|>", "<|im_end|>", "<|im_start|>")
_LLAMA3 = ("<|pad|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_SMOL = (
    "<|im_end|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    *test_idefics3.SPECIAL[1:2],
    *test_idefics3.SPECIAL[3:],
)
FAMILIES: dict[str, Published] = {
    "llama": Published(_LLAMA3, text_model("llama"), chat=chat_templates.LLAMA3, adds_begin=True),
    "qwen2": Published(_CHATML, text_model("qwen2"), chat=chat_templates.QWEN2_5, begin=False),
    "mistral": Published(
        (*_BASE, "[INST]", "[/INST]"),
        text_model("mistral", sliding_window=None),
        chat=chat_templates.MISTRAL,
        adds_begin=True,
    ),
    "olmo2": Published(_BASE, text_model("olmo2"), chat=chat_templates.OLMO2),
    "olmoe": Published(_BASE, text_model("olmoe", num_experts=6, num_experts_per_tok=3), chat=chat_templates.OLMO2),
    "mixtral": Published(
        (*_BASE, "[INST]", "[/INST]"),
        text_model("mixtral", num_local_experts=4),
        chat=chat_templates.MISTRAL,
        adds_begin=True,
    ),
    "qwen3_moe": Published(
        (*_CHATML, "<think>", "</think>"),
        text_model("qwen3_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=24),
        chat=chat_templates.QWEN3,
        begin=False,
    ),
    "llama, Vicuna's words": Published(_BASE, text_model("llama"), chat=chat_templates.VICUNA, adds_begin=True),
    "persimmon": Published(
        _BASE,
        text_model(
            "persimmon",
            rope_parameters={"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5},
        ),
        adds_begin=True,
    ),
    "fuyu": Published(
        ("|ENDOFTEXT|", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"),
        _fuyu,
        _images("FuyuImageProcessor", size={"height": 60, "width": 72}, patch_size={"height": 6, "width": 6}),
        "FuyuProcessor",
        auto="AutoModelForImageTextToText",
    ),
    "mllama": Published(
        (*_LLAMA3, "<|python_tag|>"),
        _mllama,
        _images("MllamaImageProcessor", size={"height": 12, "width": 12}, max_image_tiles=4),
        "MllamaProcessor",
        chat_templates.LLAMA3_VISION,
        adds_begin=True,
        late=("<|image|>",),
        auto="AutoModelForImageTextToText",
    ),
    "qwen2_vl": Published(
        (*_CHATML[:3], "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>"),
        lambda size: test_qwen2_vl.reference_model(vocabulary=size),
        _images("Qwen2VLImageProcessor", **test_qwen2_vl.PIXELS),
        "Qwen2VLProcessor",
        chat_templates.QWEN2_VL,
        begin=False,
        auto="AutoModelForImageTextToText",
    ),
    "qwen2_5_vl": Published(
        (*_CHATML[:3], "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>"),
        lambda size: test_qwen2_5_vl.reference_model(vocabulary=size),
        _images("Qwen2VLImageProcessor", **test_qwen2_vl.PIXELS),
        "Qwen2_5_VLProcessor",
        chat_templates.QWEN2_VL,
        begin=False,
        auto="AutoModelForImageTextToText",
    ),
    "aria": Published(
        (*_BASE[:2], "<|im_end|>", *test_aria.SPECIAL, "<|im_start|>"),
        lambda size: test_aria.reference_model(vocabulary=size),
        _images("AriaImageProcessor"),
        "AriaProcessor",
        chat_templates.ARIA,
        adds_begin=True,
        named={"image_token": test_aria.IMAGE},
        arguments={"size_conversion": test_aria.NUMBERS},
        auto="AutoModelForImageTextToText",
    ),
    "llava": Published(
        (*_BASE, "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        lambda size: test_pixtral.reference_model(vocabulary=size),
        _images("PixtralImageProcessor", size={"longest_edge": 80}),
        "PixtralProcessor",
        chat_templates.PIXTRAL,
        adds_begin=True,
        arguments={"patch_size": 16},
        auto="AutoModelForImageTextToText",
    ),
    "llava, CLIP": Published(
        (*_BASE, "<image>"),
        lambda size: test_llava.reference_model(vocabulary=size),
        _images("CLIPImageProcessor", **test_llava.PIXELS),
        "LlavaProcessor",
        chat_templates.LLAVA,
        adds_begin=True,
        arguments={
            "patch_size": test_llava.PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        auto="AutoModelForImageTextToText",
    ),
    "internvl": Published(
        (*_CHATML[:3], *test_internvl.SPECIAL, "<|im_start|>"),
        lambda size: test_internvl.reference_model(vocabulary=size),
        _images("GotOcr2ImageProcessor", **test_internvl.PIXELS),
        "InternVLProcessor",
        chat_templates.INTERNVL,
        begin=False,
        named=test_internvl.NAMED,
        arguments={"image_seq_length": 4},
        auto="AutoModelForImageTextToText",
    ),
    "idefics3": Published(
        _SMOL,
        lambda size: test_idefics3.reference_model(vocabulary=size),
        _images("Idefics3ImageProcessor", **test_idefics3.pixels()),
        "Idefics3Processor",
        chat_templates.IDEFICS3,
        arguments={"image_seq_len": 4},
        auto="AutoModelForImageTextToText",
    ),
    "smolvlm": Published(
        _SMOL,
        lambda size: test_idefics3.reference_model(test_idefics3.SECOND, vocabulary=size),
        _images("SmolVLMImageProcessor", **test_idefics3.pixels(test_idefics3.SECOND)),
        "SmolVLMProcessor",
        chat_templates.IDEFICS3,
        arguments={"image_seq_len": 4},
        auto="AutoModelForImageTextToText",
    ),
}
