"""Folders of Qwen2.5-Omni: the whole model, a folder as it is published, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.images.video import VideoConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.cli.main import main
from mmscale.cli.trained import open_trained
from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.hf.read import PREPROCESSOR
from mmscale.run.imported import import_run
from tests.configs.files import CONFIGS, model_of
from tests.hf import chat_templates
from tests.hf.pages import AUTO, picture, stored
from tests.hf.published_folders import FAMILIES, Published, tokenizer
from tests.hf.reference_models import loaded, tensors_of
from tests.hf.test_qwen2_5_omni import (
    END,
    FAMILY,
    NAMED,
    SPECIAL,
    START,
    VIDEO,
    Part,
    media,
    process,
    processor,
    reference_model,
    wave,
)
from tests.hf.test_qwen2_vl import PIXELS
from tests.hf.train_and_export import VOCABULARY, train_and_export
from tests.sounds import encoded as encoded_sound
from tests.videos import encoded as encoded_video

pytestmark = pytest.mark.parity
TALKER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


SPEECH = {"talker.codec_head.weight": torch.ones(20, 16), "token2wav.code2wav_dit_model.a.weight": torch.ones(2)}


def _save_whole(thinker: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Write a folder of the whole model with this thinker; return the tensors of the thinker."""
    from transformers import Qwen2_5OmniConfig

    thinker.save_pretrained(folder)
    held = {f"thinker.{name}": values.clone() for name, values in tensors_of(folder).items()}
    save_file({**held, **SPEECH}, folder / "model.safetensors", {"format": "pt"})
    talker = dict(TALKER, vocab_size=20, embedding_size=64, num_key_value_heads=2)
    Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), talker_config=talker).save_pretrained(folder)
    return held


def test_the_whole_folder_gives_the_thinker(tmp_path: Path) -> None:
    """What speaks is left out by name. An export like the folder holds the thinker, which their class opens."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    thinker, folder = reference_model(), tmp_path / "whole"
    held = _save_whole(thinker, folder)
    report = import_folder(folder, tmp_path / "run" / "checkpoints")
    assert (report.family, set(report.left_out)) == ("qwen2_5_omni", {*SPEECH})
    export_weights(Path(report.checkpoint), tmp_path / "back", to=HuggingFace(folder))
    after = tensors_of(tmp_path / "back")
    assert after.keys() == held.keys()
    assert all(torch.equal(held[name], after[name]) for name in held)
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert values["enable_audio_output"] is False
    assert values["thinker_config"]["image_token_index"] == 3
    again = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, thinker(input_ids=ids).logits)
    export_weights(Path(report.checkpoint), tmp_path / "alone", to=HuggingFace())
    alone = tensors_of(tmp_path / "alone")
    assert {f"thinker.{name}" for name in alone} == held.keys()


def _published(folder: Path) -> Any:
    """Write a folder as it is published, with tokenizer, processor and chat template; return model and processor."""
    from transformers import PreTrainedTokenizerFast

    special = (*FAMILIES["qwen2"].special, *SPECIAL)
    words = tokenizer(Published(special, reference_model))
    ids = {name: words.token_to_id(name) for name in SPECIAL}
    theirs = reference_model(vocabulary=words.get_vocab_size(), ids=ids)
    _save_whole(theirs, folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=special[2], pad_token=special[0], extra_special_tokens=NAMED
    )
    process = processor(fast)
    process.chat_template = chat_templates.QWEN2_5_OMNI
    process.save_pretrained(folder)
    return theirs, process


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Return the model and processor of a folder, and the run that was imported from it."""
    work = tmp_path_factory.mktemp("published")
    theirs, process = _published(work / "folder")
    done = import_run(work / "folder", work / "run")
    assert done.is_whole
    assert not done.report.data.notes
    return theirs, process, work / "run"


def test_an_imported_folder_reads_conversations(published: tuple[Any, Any, Path]) -> None:
    """The default system turn and the marks of media in all turns are theirs."""
    _, theirs, run = published
    trained = open_trained(run)
    video = trained.config.data.video
    assert video == VideoConfig(start=START, end=END, placeholder=VIDEO)
    assert video is not None
    limits = {"min_pixels": PIXELS["min_pixels"], "max_pixels": PIXELS["max_pixels"]}
    data = trained.config.data.model_copy(update={"video": video.model_copy(update=limits)})
    build = DocumentBuilder(data.prompts, load_tokenizer(data.tokenizer), trained.config.media_spec)
    parts: list[Part] = [(50, 70), 20_000, (4, 60, 60, 2), 9999]
    shown: list[Any] = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What is that?"}]
    turns = [shown, "A red fox.", [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "And two cats?"}]]
    for count, used in ((1, 2), (3, 4)):
        messages = [{"role": ("user", "assistant")[n % 2], "content": one} for n, one in enumerate(turns[:count])]
        written = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = process(theirs, written, parts[:used])
        document = build.build_prompt(Sample(tuple(map(media, parts[:used])), {"messages": messages}))
        assert document.token_ids.tolist() == inputs["input_ids"][0].tolist()


def test_the_command_answers_about_a_picture_and_a_sound(
    published: tuple[Any, Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, theirs, run = published
    picture((50, 70)).save(tmp_path / "a.png")
    (tmp_path / "a.wav").write_bytes(encoded_sound(wave(20_000)[None]))
    files = ["--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / "a.wav")]
    assert main(["generate", str(run), *files, "--prompt", "What is that?", "--max-new-tokens", "6", "--json"]) == 0
    content = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What is that?"}]
    written = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = process(theirs, written, [(50, 70), 20_000])
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = theirs.decode(ids, skip_special_tokens=True).strip()
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert expected


PUBLISHED: dict[str, Any] = {  # As fine-tunes of Qwen2.5-Omni 7B publish it, in the format of version 4.
    "model_type": "qwen2_5_omni",
    "architectures": ["Qwen2_5OmniForConditionalGeneration"],
    "enable_audio_output": False,
    "enable_talker": True,
    "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 896},
    "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    "thinker_config": {
        "model_type": "qwen2_5_omni_thinker",
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "user_token_id": 872,
        "audio_token_index": 151646,
        "audio_start_token_id": 151647,
        "audio_end_token_id": 151648,
        "vision_start_token_id": 151652,
        "ignore_index": -100,
        "init_std": 0.02,
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
            "sliding_window": 32768,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "init_std": 0.02,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 25,
            "in_channels": 3,
            "in_chans": 3,
            "init_std": 0.02,
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": 1280,
            "encoder_layers": 32,
            "num_hidden_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "encoder_layerdrop": 0.0,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
            "n_window": 100,
            "output_dim": 3584,
            "activation_function": "gelu",
            "scale_embedding": False,
            "init_std": 0.02,
        },
    },
    PREPROCESSOR: {
        "image_processor_type": "Qwen2VLImageProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "sampling_rate": 16000,
        "feature_size": 128,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 300,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "dither": 0.0,
        "padding_value": 0.0,
    },
}


def test_the_published_configuration_is_the_shipped_one() -> None:
    shipped = forward_config(model_of(CONFIGS / "models/qwen2.5-omni-7b.yaml"))
    assert forward_config(layout_of("qwen2_5_omni").model_config(PUBLISHED, "config.json")) == shipped
    alone = {**PUBLISHED["thinker_config"], PREPROCESSOR: PUBLISHED[PREPROCESSOR]}
    assert forward_config(layout_of(FAMILY).model_config(alone, "config.json")) == shipped


@pytest.mark.parametrize(
    ("block", "key", "value", "message"),
    [
        ("audio_config", "n_window", 1 << 20, "n_window=1048576 must be between 1 and 32768"),
        ("audio_config", "output_dim", 8, "output_dim=8 is not supported, only 3584"),
        ("vision_config", "tokens_per_second", 2, "tokens_per_second=2 is not supported, only 25"),
        (PREPROCESSOR, "chunk_length", 1000, "chunk_length=1000 must be between 1 and 655"),
        (PREPROCESSOR, "hop_length", 80, "hop_length=80 is not supported, only 160"),
    ],
)
def test_values_that_cannot_be_computed_are_rejected(block: str, key: str, value: int, message: str) -> None:
    alone = {**PUBLISHED["thinker_config"], PREPROCESSOR: PUBLISHED[PREPROCESSOR]}
    with pytest.raises(CheckpointError, match=message):
        layout_of(FAMILY).model_config({**alone, block: {**alone[block], key: value}}, "config.json")


@pytest.mark.dist
@pytest.mark.slow
def test_trained_on_two_ranks_of_which_some_see_or_hear_nothing(tmp_path: Path) -> None:
    """Samples are text alone, a picture with a sound, or a film, so packs that lack a tower's input occur on both."""
    theirs = reference_model(vocabulary=VOCABULARY)
    theirs.save_pretrained(tmp_path / "theirs")
    with ShardWriter(tmp_path / "films", "part") as writer:
        for number in range(24):
            members = {"txt": f"red apple {number % 2}".encode()}
            if number % 3 == 1:
                members |= {"png": stored(picture((28, 28))), "wav": encoded_sound(1600, seed=number % 2)}
            elif number % 3 == 2:
                members["mkv"] = encoded_video(4, height=28, width=28, kind="mkv", sound=wave(8000)[None])
            writer.write(f"{number:03d}", members)
    write_manifest(tmp_path / "films.manifest", writer.shards)
    limits = {"min_pixels": 28 * 28, "max_pixels": 28 * 28}
    dataset = {
        "name": "films",
        "manifest": str(tmp_path / "films.manifest"),
        "template": {"kind": "caption", "images": "optional"},
        "transforms": {"kind": "native", **limits},
        "video": limits,
        "audio": {"from_video": True, "interleave_seconds": 0.2},
    }
    folder = train_and_export(tmp_path / "theirs", tmp_path, dataset, max_tokens=48, idle="audio_bos_eos_token")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(folder)
    table = "audio_tower.audio_bos_eos_token.weight"
    assert torch.equal(before[table], after[table])
    loaded(folder, AUTO)
