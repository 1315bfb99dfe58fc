"""``mmscale data encode`` with a tokenizer of a checkpoint: the tokens are those of transformers' class."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.images.transforms import FixedTransform, NativeTransform
from data_pipeline.sample import ImagePart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.token_grid import decode_grid
from data_pipeline.shards.writer import ShardWriter
from mmscale.checkpoint.imports import import_folder
from mmscale.cli.main import main
from mmscale.errors import ConfigError
from mmscale.models.image_tokenizer import image_tokenizer_digest
from mmscale.run.image_tokens import CheckpointEncoder, encoding_transforms, load_image_tokenizer
from tests.data_pipeline.conftest import picture
from tests.models.reference_models import randomise


@pytest.mark.parity
def test_encoded_tokens_are_those_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    sizes = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 16}
    config = transformers.JanusVQVAEConfig(**sizes, num_embeddings=80, embed_dim=6, num_patches=6)
    theirs = transformers.JanusVQVAE(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "run" / "checkpoints")
    images = [picture(number, 16 + 8 * (number % 2), 16) for number in range(10)]
    with ShardWriter(tmp_path / "in", "a") as writer:
        for number, image in enumerate(images):
            writer.write(f"k{number}", {"png": image, "txt": b"a text"})
    write_manifest(tmp_path / "in" / "a.manifest", writer.shards)

    words = ["data", "encode", str(tmp_path / "run"), str(tmp_path / "in" / "a.manifest"), "--grids-only", "--json"]
    native = ["--transforms", "{kind: native, min_pixels: 4}"]
    capsys.readouterr()  # Libraries print when they are imported.
    assert main([*words, "--output", str(tmp_path / "out"), *native]) == 0
    results = json.loads(capsys.readouterr().out)
    digest = image_tokenizer_digest(load_image_tokenizer(tmp_path / "run").image_tokenizer)
    assert (results["samples"], results["image_tokenizer"]) == (10, digest)
    manifest = Manifest.open(tmp_path / "out" / "data.manifest")
    assert manifest.image_tokenizer == digest
    for image, sample in zip(images, read_samples(manifest.path), strict=True):
        with Image.open(io.BytesIO(image)) as opened:
            pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = theirs.encode(pixels).image_tokens.view(pixels.shape[2] // 2, -1)
        (part,) = (part for part in sample.parts if isinstance(part, ImagePart))
        assert part.grid is not None
        np.testing.assert_array_equal(decode_grid(part.grid, part.name).codes, expected.numpy())

    assert main([*words, "--output", str(tmp_path / "out"), *native]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="device cuda:99"):
        CheckpointEncoder.open(tmp_path / "run", "cuda:99")


def test_transforms_are_those_of_the_run_or_of_the_command_line(tmp_path: Path) -> None:
    assert encoding_transforms(None, None, 48) == FixedTransform(size=48)
    (tmp_path / "config.yaml").write_text("data: {transforms: {kind: fixed, crop: center, augment: {flip: 0.5}}}\n")
    assert encoding_transforms(tmp_path, None, 48) == FixedTransform(size=48, crop="center")
    assert encoding_transforms(tmp_path, "{kind: native}", 48) == NativeTransform()
    with pytest.raises(ConfigError, match=r"transforms\.size"):
        encoding_transforms(None, "{kind: fixed, size: -1}", 48)


@pytest.mark.fault
def test_the_run_of_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **sizes))
    tower.save_pretrained(tmp_path / "tower")
    import_folder(tmp_path / "tower", tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="its model is no image tokenizer"):
        load_image_tokenizer(tmp_path / "run")
