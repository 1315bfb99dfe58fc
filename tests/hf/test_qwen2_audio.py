"""Imported Qwen2-Audio hears like transformers: token ids, logits, loss, all gradients, answers; export bit for bit.

Measured worst cases: 5e-7 in logits, 2e-6 in gradients.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import AudioPart, Provenance, Sample, TextPart
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.cli.trained import open_trained
from mmscale.engine.graph import recompute
from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.models.build import media_spec
from mmscale.optim.schedule import freeze, trained_components
from mmscale.optim.stages import StageConfig
from mmscale.run.imported import import_run
from tests.configs.files import CONFIGS, model_of
from tests.hf.pages import BOS, EOS, PAD, Seen, load, save_tokenizer
from tests.hf.published_folders import FAMILIES, Published, tokenizer
from tests.hf.reference_models import import_reference, imported, loaded, tensors_of
from tests.hf.train_and_export import VOCABULARY, train_and_export
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder
from tests.sounds import encoded, tones

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 6e-6
AUTO = "AutoModelForMultimodalLM"
SOUND, START, END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
SPECIAL = [SOUND, START, END]  # Ids 3 to 5.
BINS, SECONDS, RATE = 8, 1, 16_000
AUDIO = {"start": START, "end": END, "placeholder": SOUND}
Page = list[str | int]
"""Texts, and numbers of samples of clips."""
PAGES: dict[str, Page] = {
    "one clip": [6000, "What is that sound?"],
    "clips of several lengths": ["Audio 1: ", 1001, "\nAudio 2: ", 16_000, "\n", 9_999, "?"],
    "last frames of a chunk": ["x", 15_999, "y", 15_841, "z", 15_840, "."],
    "none": ["text alone"],
}


def reference_model(seed: int = 0, vocabulary: int = 272, sound: int = 3) -> Any:
    """Return a tiny random model that hears chunks of one second; ``sound`` is the id of its placeholder."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "num_mel_bins": BINS,
            "max_source_positions": 50 * SECONDS,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
        },
        audio_token_index=sound,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(words_file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(words_file), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=SPECIAL
    )
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS), words)


def _wave(samples: int) -> np.ndarray:
    """Return the samples that a 16-bit file holds, at full precision."""
    return (np.round(tones(samples, RATE)[0] * 32768) / 32768).astype(np.float32)


def documents(words: Path, spec: MediaSpec, pages: list[Page]) -> list[Document]:
    block = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}, "audio": AUDIO}
    build = DocumentBuilder(DatasetConfig.model_validate(block), load(words, SOUND), spec)

    def part(one: str | int) -> TextPart | AudioPart:
        return TextPart(one) if isinstance(one, str) else AudioPart(encoded(_wave(one)[None]), "wav")

    origin = Provenance("x", "shard", "key", 0)
    return [build(Sample(tuple(map(part, page)), {}, origin)) for page in pages]


def inputs(words: Path, page: Page) -> dict[str, Tensor]:
    theirs = processor(words)
    text = "".join(part if isinstance(part, str) else f"{START}{SOUND}{END}" for part in page)
    clips = [_wave(part) for part in page if isinstance(part, int)]
    given = {"audio": clips, "sampling_rate": RATE} if clips else {}
    return dict(theirs(text=[f"{BOS}{text}{EOS}"], **given, return_tensors="pt", add_special_tokens=False))


class Heard(Seen):
    """Pages with clips as inputs of both implementations."""

    def batch(self, number: int | None = None) -> MultimodalBatch:
        chosen = self.documents if number is None else [self.documents[number]]
        if not any(document.items for document in chosen):
            chosen = [*chosen, dummy_document(self.spec, pad_id=0)]
        return collate([Pack(tuple(chosen), 0)], self.spec)


def heard(folder: Path, ours: Any, pages: list[Page]) -> Heard:
    words = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    spec = media_spec(ours.config)
    found = Heard(documents(words, spec, pages), [inputs(words, page) for page in pages], spec)
    for document, one in zip(found.documents, found.inputs, strict=True):
        assert document.token_ids.tolist() == one["input_ids"][0].tolist()
    return found


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Any]:
    theirs = reference_model()
    return import_reference(theirs, tmp_path), theirs


def test_the_same_mel_frames(models: tuple[Any, Any], tmp_path: Path, parity: Recorder) -> None:
    ours, _ = models
    found = heard(tmp_path, ours, [PAGES["clips of several lengths"], PAGES["last frames of a chunk"]])
    for document, given in zip(found.documents, found.inputs, strict=True):
        for item, chunk, mask in zip(
            document.items, given["input_features"], given["feature_attention_mask"], strict=True
        ):
            frames = int(mask.sum())
            assert item.grid == (frames + 2, 1, 1)
            read = chunk.t()[: frames + 2]
            parity("qwen2_audio", "mel frames", distance(torch.from_numpy(item.values[: len(read)]), read), BOUND)


@pytest.mark.parametrize(("trained", "recomputes"), [(("all",), False), (("all",), True), (("audio_connector",), True)])
def test_operations_equal_the_counter(
    trained: tuple[str, ...], recomputes: bool, models: tuple[Any, Any], tmp_path: Path
) -> None:
    ours, _ = models
    batch = heard(tmp_path, ours, [PAGES["one clip"]]).batch()
    batch = replace(batch, loss_weights=torch.ones(len(batch.labels)))  # Logits of all rows.
    stage = StageConfig(name="s", steps=1, train=trained)
    freeze(ours, ours.components(), stage)
    assert not ours.audio.positions.weight.requires_grad
    undo = recompute(ours.checkpoint_units()) if recomputes else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ours.head(ours(batch).hidden).sum().backward()
    if undo:
        undo()
    flops = ours.training_flops(batch, trained_components(ours.components(), stage), recompute=recomputes)
    assert flops.hardware == counter.get_total_flops()


def test_export_restores_the_folder(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor

    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    for name, like in (("back", HuggingFace(tmp_path / "theirs")), ("alone", HuggingFace())):
        assert export_weights(checkpoint, tmp_path / name, to=like).family == "qwen2_audio"
        before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "alone")
    assert (extractor.feature_size, extractor.nb_max_frames) == (BINS, 100 * SECONDS)
    again = loaded(tmp_path / "back", AUTO)
    assert again.config.audio_token_id == 3
    found = heard(tmp_path, ours, [PAGES["one clip"]])
    with torch.no_grad():
        assert torch.equal(found.theirs(again), found.theirs(theirs))


def _published(folder: Path) -> tuple[Any, Any]:
    """Write a folder as it is published, with tokenizer, processor and chat template; return model and processor."""
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

    special = (*FAMILIES["qwen2"].special, *SPECIAL)
    words = tokenizer(Published(special, reference_model))
    theirs = reference_model(vocabulary=words.get_vocab_size(), sound=words.token_to_id(SOUND))
    theirs.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=special[2], pad_token=special[0], extra_special_tokens=[*special[3:]]
    )
    process = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS), fast)
    process.save_pretrained(folder)
    return theirs, process


def test_an_imported_folder_hears_conversations(tmp_path: Path, parity: Recorder) -> None:
    """The default system turn, and ``Audio 1: ``, ``Audio 2: ``, ... before clips of all turns, are theirs."""
    theirs, process = _published(tmp_path / "folder")
    done = import_run(tmp_path / "folder", tmp_path / "run")
    assert done.is_whole
    assert not done.report.data.notes
    trained = open_trained(tmp_path / "run")
    data = trained.config.data
    build = DocumentBuilder(data.prompts, load_tokenizer(data.tokenizer), trained.config.media_spec)
    clip = {"type": "audio"}
    turns = [
        [{"type": "text", "text": "Hello there! "}, clip, clip, {"type": "text", "text": "What is that?"}],
        "A red fox.",
        [clip, {"type": "text", "text": "And two cats?"}],
    ]
    lengths = [5000, 16_000, 2222]
    for count, heard_here in ((1, 2), (3, 3)):
        messages = [{"role": ("user", "assistant")[n % 2], "content": one} for n, one in enumerate(turns[:count])]
        written = process.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        waves = [_wave(length) for length in lengths[:heard_here]]
        given = dict(process(text=[written], audio=waves, sampling_rate=RATE, return_tensors="pt"))
        clips = tuple(AudioPart(encoded(wave[None]), f"{n}.wav") for n, wave in enumerate(waves))
        document = build.build_prompt(Sample(clips, {"messages": messages}))
        assert document.token_ids.tolist() == given["input_ids"][0].tolist()
        with torch.no_grad():
            logits = trained.model.head(trained.model(collate([Pack((document,), 0)], build.spec)).hidden)
            parity("qwen2_audio", "logits of an imported run", distance(logits, theirs(**given).logits[0]), 3e-6)


PUBLISHED: dict[str, Any] = {  # The format of version 4 of transformers leaves out class defaults.
    "model_type": "qwen2_audio",
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_token_index": 151646,
    "ignore_index": -100,
    "vocab_size": 156032,
    "torch_dtype": "bfloat16",
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "activation_function": "gelu",
        "scale_embedding": False,
        "max_source_positions": 1500,
    },
    "text_config": {
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-5,
        "sliding_window": 32768,
        "use_mrope": False,
        "vocab_size": 156032,
    },
}


def test_the_published_configuration_is_the_shipped_one() -> None:
    shipped = model_of(CONFIGS / "models/qwen2-audio-7b.yaml")
    assert forward_config(layout_of("qwen2_audio").model_config(PUBLISHED, "config.json")) == forward_config(shipped)


def test_a_folder_with_values_that_do_not_fit_is_rejected_before_its_weights_are_copied(tmp_path: Path) -> None:
    _published(tmp_path / "folder")
    file = tmp_path / "folder/processor_config.json"
    values = json.loads(file.read_text())
    values["feature_extractor"] |= {"hop_length": 80}
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="hop_length=80 is not supported, only 160"):
        import_run(tmp_path / "folder", tmp_path / "run")
    values["feature_extractor"] |= {"hop_length": 160}
    file.write_text(json.dumps(values))
    file = tmp_path / "folder/config.json"
    values = json.loads(file.read_text())
    values["text_config"]["max_position_embeddings"] = -1
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="max_tokens"):
        import_run(tmp_path / "folder", tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists(), "the weights were copied before the configuration was checked"


@pytest.mark.dist
@pytest.mark.slow
def test_trained_on_two_ranks_of_which_some_hear_nothing(tmp_path: Path) -> None:
    """Every third sample is text alone, so packs without a clip occur on either rank; the run must not hang."""
    theirs = reference_model(vocabulary=VOCABULARY, sound=4)
    theirs.save_pretrained(tmp_path / "theirs")
    with ShardWriter(tmp_path / "sounds", "part") as writer:
        for number in range(24):
            members = {"txt": f"red apple {number % 2}".encode()}
            if number % 3:
                members["wav"] = encoded(1600 + 1000 * (number % 3), seed=number % 2)
            writer.write(f"{number:03d}", members)
    write_manifest(tmp_path / "sounds.manifest", writer.shards)
    dataset = {
        "name": "sounds",
        "manifest": str(tmp_path / "sounds.manifest"),
        "template": {"kind": "caption", "images": "optional"},
        "audio": {},
    }
    folder = train_and_export(tmp_path / "theirs", tmp_path, dataset, max_tokens=24, idle="embed_positions")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(folder)
    table = "audio_tower.embed_positions.weight"
    assert torch.equal(before[table], after[table])
    loaded(folder, AUTO)
