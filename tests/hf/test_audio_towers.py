"""Imported audio encoders give the results of transformers, and an export restores the folder bit for bit.

Measured worst cases: 2.7e-7 in features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.manifest import newest_of, read_manifest
from mmscale.checkpoint.warm_start import match
from mmscale.errors import CheckpointError
from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from tests.hf.reference_models import imported, tensors_of
from tests.models.audio import SIZES, audio_block, clip, encode_masked, padded, tower_config, with_silence
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND = 2e-6
LENGTHS = [7, 40, 38, 12]


def whole_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "max_target_positions": 9}
    theirs = WhisperForConditionalGeneration(WhisperConfig(vocab_size=9, **ids, **decoder, **SIZES))
    randomise(theirs)
    return theirs.eval()


def test_a_folder_of_whisper_gives_its_encoder(tmp_path: Path, parity: Recorder) -> None:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    theirs = whole_whisper()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.model.encoder.save_pretrained(tmp_path / "alone")
    (ours, checkpoint), (alone, _) = (imported(tmp_path / of, tmp_path / f"run-{of}") for of in ("whole", "alone"))
    assert ours.config == alone.config
    pairs = zip(ours.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    clips = [clip(length, length) for length in LENGTHS]
    with torch.no_grad():
        expected = torch.cat([theirs.model.encoder(padded(each)).last_hidden_state[0] for each in clips])
        found = ours.audio(audio_block([padded(each)[0].t() for each in clips]))
    parity("whisper", "features of an imported tower", distance(found, expected), BOUND)
    assert export_weights(checkpoint, tmp_path / "back", to=HuggingFace()).family == "whisper"
    before, after = tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, info = WhisperEncoder.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in info if kind != "error_msgs"), info
    with torch.no_grad():
        assert torch.equal(again(padded(clips[0])).last_hidden_state, theirs.model.encoder(padded(clips[0]))[0])


def test_the_encoder_of_qwen2_audio(tmp_path: Path, parity: Recorder) -> None:
    from transformers import AutoModel, Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    theirs = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**SIZES)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    clips = [clip(length, length) for length in LENGTHS]
    with torch.no_grad():
        expected = torch.cat([encode_masked(theirs, each) for each in clips])
        found = ours.audio(audio_block([with_silence(each) for each in clips]))
    parity("qwen2_audio_encoder", "features of an imported tower", distance(found, expected), BOUND)
    for name, like in (("back", HuggingFace(tmp_path / "theirs")), ("alone", HuggingFace())):
        assert export_weights(checkpoint, tmp_path / name, to=like).family == "qwen2_audio_encoder"
        before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert type(AutoModel.from_pretrained(tmp_path / name)) is Qwen2AudioEncoder


def test_an_imported_tower_is_loaded_into_a_model(tmp_path: Path) -> None:
    """As a stage does with ``weights: [{checkpoint: ..., components: [audio]}]``."""
    whole_whisper().save_pretrained(tmp_path / "whisper")
    import_folder(tmp_path / "whisper", tmp_path / "tower" / "checkpoints")
    decoder = {
        "vocab_size": 8,
        "hidden_dim": 16,
        "num_layers": 1,
        "attention": {"num_heads": 1},
        "mlp": {"kind": "dense", "hidden_dim": 8},
    }
    audio = {"tower": tower_config(padded=False, pool=2).model_dump(), "projector": {"kind": "conv_gmlp"}}
    model = build_weights(ModelConfig.model_validate({"decoder": decoder, "audio": audio}))
    report = match(model, read_manifest(newest_of(tmp_path / "tower")), ["audio"])
    assert (report.unused, report.mismatched, report.resampled) == ((), (), ())
    assert len(report.loaded) == len(list(model.audio.parameters()))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5"),
        ({"d_model": 2}, "hidden_dim=2"),
        ({"encoder_attention_heads": 0}, "num_heads"),
    ],
)
def test_unsupported_values_are_rejected(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole_whisper().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "run")
