"""The imported thinker of Qwen2.5-Omni reads pictures, videos, sounds and text in one sequence like transformers.

Token ids and positions are compared, and an export restores the folder bit for bit. ``test_same_results`` compares
logits, loss, all gradients and answers. The audio towers have blocks of 20 frames, the vision towers windows of 4
patches a side.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import AudioPart, ImagePart, MediaPart, Provenance, Sample, TextPart, VideoPart
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.models.build import media_spec
from tests.hf.pages import AUTO, BOS, EOS, PAD, Seen, bfloat16_ratio, load, picture, save_tokenizer, stored
from tests.hf.reference_models import import_reference, imported, loaded, tensors_of
from tests.hf.test_qwen2_5_vl import VISION
from tests.hf.test_qwen2_vl import PIXELS
from tests.models.reference_models import randomise
from tests.parity_table import Recorder
from tests.sounds import encoded as encoded_sound
from tests.sounds import tones
from tests.videos import decoded
from tests.videos import encoded as encoded_video

pytestmark = pytest.mark.parity
FAMILY = "qwen2_5_omni_thinker"
IMAGE, START, END, VIDEO = "<|IMAGE|>", "<|vision_bos|>", "<|vision_eos|>", "<|VIDEO|>"
SOUND, SOUND_START, SOUND_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
SPECIAL = [IMAGE, START, END, VIDEO, SOUND, SOUND_START, SOUND_END]  # Ids 3 to 9.
NAMED = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "audio_token": SOUND,
    "vision_bos_token": START,
    "vision_eos_token": END,
    "audio_bos_token": SOUND_START,
    "audio_eos_token": SOUND_END,
}
BINS, SECONDS, RATE = 8, 4, 16_000
Part = str | int | tuple[int, ...]
"""A text, the samples of a sound, (height, width) of a picture, (frames, height, width, frames a second) of a video, or
these and the samples of its sound track."""
PAGES: dict[str, list[Part]] = {
    "all": ["See ", (50, 70), "hear ", 20_000, "watch ", (4, 60, 60, 8), 3000, (40, 44), "and compare."],
    "sounds": [9999, "one, ", 32_000, "two."],
    "videos": [(5, 60, 112, 3), "three a second", (1, 56, 56, 8), "still"],
    "slow video, then sound": ["xy", (8, 56, 84, 1), 5000, "one frame a second"],
    "none": ["text alone"],
    "film": ["a ", (10, 60, 60, 2, 50_000), "film and", 4000, "a sound"],
    "short film": [(3, 56, 56, 2, 60_000), "more sound than frames"],
}


def reference_model(seed: int = 0, vocabulary: int = 272, ids: dict[str, int] | None = None, tied: bool = False) -> Any:
    """Return a tiny random thinker; ``ids`` are those of ``SPECIAL`` by name, from 3 without it."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration(_config(vocabulary, ids, tied))
    randomise(model, seed)
    return model.eval()


def _config(vocabulary: int = 272, ids: dict[str, int] | None = None, tied: bool = False) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig

    known = ids or {name: 3 + number for number, name in enumerate(SPECIAL)}
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config=VISION,
        audio_config={
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "num_mel_bins": BINS,
            "n_window": 10,
            "output_dim": 64,
        },
        image_token_index=known[IMAGE],
        video_token_index=known[VIDEO],
        audio_token_index=known[SOUND],
        vision_start_token_id=known[START],
        vision_end_token_id=known[END],
        audio_start_token_id=known[SOUND_START],
        audio_end_token_id=known[SOUND_END],
        tie_word_embeddings=tied,
    )


def processor(words: Any) -> Any:
    from transformers import Qwen2_5OmniProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS)
    return Qwen2_5OmniProcessor(Qwen2VLImageProcessor(**PIXELS), Qwen2VLVideoProcessor(), extractor, words)


def _bytes_processor(file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return processor(PreTrainedTokenizerFast(tokenizer_file=str(file), **names, extra_special_tokens=NAMED))


def wave(samples: int) -> np.ndarray:
    """Return the samples that a 16-bit file holds, at full precision."""
    return (np.round(tones(samples, RATE)[0] * 32768) / 32768).astype(np.float32)


@functools.cache  # Both implementations need the same bytes, and an encoder may give others the next time.
def _clip(part: tuple[int, ...]) -> bytes:
    track = wave(part[4])[None] if len(part) > 4 else None
    kind = "mp4" if track is None else "mkv"
    return encoded_video(part[0], height=part[1], width=part[2], per_second=part[3], kind=kind, sound=track)


def media(part: Part) -> MediaPart:
    """Return a part as a shard stores it."""
    if isinstance(part, int):
        return AudioPart(encoded_sound(wave(part)[None]), f"{part}.wav")
    assert isinstance(part, tuple)
    return VideoPart(_clip(part), "clip.mp4") if len(part) > 2 else ImagePart(stored(picture(part[:2])), "a.png")  # type: ignore[arg-type]


def _documents(words: Path, spec: MediaSpec, pages: list[list[Part]]) -> list[Document]:
    frames = {"frames": {"kind": "uniform", "num_frames": 64}, **PIXELS}
    block = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": {"kind": "native", "layout": {"start": START, "end": END}, **PIXELS},
        "video": {"start": START, "end": END, "placeholder": VIDEO, **frames},
        "audio": {
            "start": SOUND_START,
            "end": SOUND_END,
            "placeholder": SOUND,
            "from_video": True,
            "interleave_seconds": 2,
        },
    }
    build = DocumentBuilder(DatasetConfig.model_validate(block), load(words, IMAGE), spec)
    origin = Provenance("x", "shard", "key", 0)
    return [
        build(Sample(tuple(TextPart(part) if isinstance(part, str) else media(part) for part in page), {}, origin))
        for page in pages
    ]


def process(theirs: Any, text: str, parts: list[Part]) -> dict[str, Any]:
    """Return the inputs of their model for a text with a mark for each of the parts that are no text."""
    pictures = [picture(part[:2]) for part in parts if isinstance(part, tuple) and len(part) == 2]  # type: ignore[arg-type]
    clips = [part for part in parts if isinstance(part, tuple) and len(part) > 2]
    heard = [part for part in parts if isinstance(part, int) or (isinstance(part, tuple) and len(part) > 4)]
    waves = [wave(part if isinstance(part, int) else part[4]) for part in heard]
    given: dict[str, Any] = {"images": pictures or None, "audio": waves or None}
    films = [part for part in clips if len(part) > 4]
    if films:
        assert films == clips, "their code takes the sound of all videos of a text, or of none"
        given["load_audio_from_video"] = True
        given["audio_from_video_indices"] = [None if isinstance(part, int) else films.index(part) for part in heard]
    if clips:
        given["videos"] = [decoded(_clip(clip)).transpose(0, 3, 1, 2) for clip in clips]
        limits = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
        given["videos_kwargs"] = {
            "size": limits,
            "cap_pixels_per_frame": False,
            "do_sample_frames": False,
            "fps": clips[0][3],
            "video_metadata": [
                {"total_num_frames": clip[0], "fps": clip[3], "frames_indices": [*range(clip[0])]} for clip in clips
            ],
        }
    inputs = dict(theirs(text=[text], **given, return_tensors="pt", add_special_tokens=False))
    if clips:  # Their processor assumes one rate for all videos, two frames a second.
        inputs["video_second_per_grid"] = torch.tensor([2 / clip[3] for clip in clips])
    return {**inputs, "use_audio_in_video": True} if films else inputs


def _inputs(theirs: Any, page: list[Part]) -> dict[str, Any]:
    def written(part: Part) -> str:
        if isinstance(part, str):
            return part
        if isinstance(part, int):
            return f"{SOUND_START}{SOUND}{SOUND_END}"
        return f"{START}{IMAGE if len(part) == 2 else VIDEO}{END}"

    return process(theirs, f"{BOS}{''.join(map(written, page))}{EOS}", page)


class SeenAndHeard(Seen):
    """Pages with pictures, videos and sounds as inputs of both implementations."""

    def batch(self, number: int | None = None) -> MultimodalBatch:
        documents = self.documents if number is None else [self.documents[number]]
        if {item.modality for document in documents for item in document.items} != {"image", "audio"}:
            documents = [*documents, dummy_document(self.spec, pad_id=0)]
        return collate([Pack(tuple(documents), 0)], self.spec)


def omni_seen(folder: Path, ours: Any, pages: list[list[Part]]) -> Seen:
    """Return both inputs of pages; asserts equal token ids."""
    words = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    spec, theirs = media_spec(ours.config), _bytes_processor(words)
    documents, inputs = _documents(words, spec, pages), [_inputs(theirs, page) for page in pages]
    for document, one in zip(documents, inputs, strict=True):
        assert document.token_ids.tolist() == one["input_ids"][0].tolist()
    return SeenAndHeard(documents, inputs, spec)


def test_positions_are_theirs(tmp_path: Path) -> None:
    theirs = reference_model()
    seen = omni_seen(tmp_path, import_reference(theirs, tmp_path), [*PAGES.values()])
    for document, inputs in zip(seen.documents, seen.inputs, strict=True):
        frames = inputs.get("feature_attention_mask")
        positions, _ = theirs.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
            use_audio_in_video=inputs.get("use_audio_in_video", False),
            audio_seqlens=None if frames is None else frames.sum(-1),
            second_per_grids=inputs.get("video_second_per_grid"),
        )
        assert document.position_ids.T.tolist() == positions[:, 0].tolist()
    video = seen.documents[3].position_ids[4:28:6]
    assert video.tolist() == [[4 + 50 * pair, 4, 4] for pair in range(4)]  # Two seconds of 25 positions.


@pytest.mark.slow
def test_in_bfloat16_no_farther_from_the_truth(tmp_path: Path, parity: Recorder) -> None:
    pages = [PAGES["all"], PAGES["sounds"]]
    ratio = bfloat16_ratio(reference_model, omni_seen, tmp_path, pages)
    parity(FAMILY, "error of bfloat16, over theirs", ratio, 1.1)


@pytest.mark.parametrize("tied", [False, True])
def test_export_restores_the_folder(tied: bool, tmp_path: Path) -> None:
    theirs = reference_model(tied=tied)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    _bytes_processor(save_tokenizer(tmp_path / "words/tokenizer.json", SPECIAL)).save_pretrained(tmp_path / "theirs")
    ours, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    assert ours.config.audio.tower.max_frames == 100 * SECONDS
    inputs = omni_seen(tmp_path, ours, [PAGES["all"]]).inputs[0]
    before = tensors_of(tmp_path / "theirs")
    for name, like in (("back", HuggingFace(tmp_path / "theirs")), ("alone", HuggingFace())):
        assert export_weights(checkpoint, tmp_path / name, to=like).family == FAMILY
        after = tensors_of(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = loaded(tmp_path / name, AUTO)
        if like.like is None:  # Without --like the token ids are those of the published model.
            assert again.config.image_token_id == 151655
            continue
        source = loaded(tmp_path / "theirs", AUTO)
        assert again.config.to_dict() == {**source.config.to_dict(), "_name_or_path": str(tmp_path / name)}
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, theirs(**inputs).logits)
    kinds = ("feature_extractor_type", "image_processor_type")
    extractor, images = (json.loads((tmp_path / "alone/preprocessor_config.json").read_text())[key] for key in kinds)
    assert (extractor, images) == ("WhisperFeatureExtractor", "Qwen2VLImageProcessor")
