"""``mmscale data encode`` with a tokenizer of a checkpoint: the tokens are those of transformers' class."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.images.transforms import FixedTransform, NativeTransform
from data_pipeline.sample import ImagePart, VideoPart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.token_grid import decode_grid
from data_pipeline.shards.writer import ShardWriter
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.imports import import_folder
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.models.image_tokenizer import image_tokenizer_digest
from mmscale.run.config import RunConfig
from mmscale.run.image_tokens import (
    CheckpointEncoder,
    encoding_transforms,
    load_image_tokenizer,
    tokenizer_of_data,
)
from mmscale.run.stage_weights import check_stage_weights
from tests.data_pipeline.conftest import picture
from tests.evaluate.drawing_models import drawing_data
from tests.hf.test_image_tokenizers import reference_tokenizer
from tests.models.reference_models import randomise
from tests.videos import decoded, encoded, pictured, stored_frames


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

    _check_the_tokenizer_of_a_drawing_model(tmp_path, digest)
    assert main([*words, "--output", str(tmp_path / "out"), *native]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="device cuda:99"):
        CheckpointEncoder.open(tmp_path / "run", "cuda:99")


@pytest.mark.parity
def test_encoded_tokens_of_videos_are_those_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow resizes the frames; groups have four frames, as in the published code of Emu3 (``autoencode.py``)."""
    theirs = reference_tokenizer("Emu3VQVAE", tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "run" / "checkpoints")
    clip, listed = encoded(9, height=16, width=24), stored_frames(3, height=16, width=24)
    fields = {"caption": "b", "videos": [{"video": list(listed), "fps": 2}]}
    with ShardWriter(tmp_path / "in", "a") as writer:
        writer.write("k0", {"mp4": clip, "txt": b"a"})
        writer.write("k1", {**listed, "json": json.dumps(fields).encode()})
    write_manifest(tmp_path / "in" / "a.manifest", writer.shards)
    words = ["data", "encode", str(tmp_path / "run"), str(tmp_path / "in" / "a.manifest"), "--grids-only"]
    frames = "frames: {kind: rate, per_second: 8, min_frames: 1, max_frames: 8}"
    video = ["--video", f"{{{frames}, min_pixels: 96, max_pixels: 96}}"]
    assert main([*words, "--output", str(tmp_path / "out"), *video]) == 0
    capsys.readouterr()
    samples = list(read_samples(tmp_path / "out" / "data.manifest"))
    numbers = (
        [0, 1, 2, 3, 5, 6, 7, 8],
        [0, 1, 2, 2],
    )  # Evenly spread from the first to the last; the last fills a group.
    drawn = np.stack([pictured(number, 16, 24) for number in range(3)])
    for sample, chosen, shown in zip(samples, numbers, (decoded(clip), drawn), strict=True):
        (part,) = (part for part in sample.parts if isinstance(part, VideoPart))
        assert part.grid is not None
        found = decode_grid(part.grid, part.name)
        images = [Image.fromarray(shown[number]).resize((12, 8), Image.Resampling.BICUBIC) for number in chosen]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
        groups = pixels.unflatten(0, (-1, 4))
        with torch.no_grad():
            expected = theirs.encode(groups, torch.full((len(groups), 2), 64)).image_tokens
        theirs_of_groups = torch.cat([each.reshape(-1, 4, 6) for each in expected])
        assert found.codes.shape == theirs_of_groups.shape
        assert float((torch.from_numpy(found.codes) == theirs_of_groups).float().mean()) > 0.95
    assert main([*words, "--output", str(tmp_path / "bad"), "--video", "{frames: {kind: rat}}"]) == 2
    assert "video.frames" in capsys.readouterr().err


def _check_the_tokenizer_of_a_drawing_model(folder: Path, digest: str) -> None:
    """The tokenizer must be the one that the configuration, or else the manifest, names."""

    def found(manifest: str, tokenizer: str | None) -> str:
        (block,) = drawing_data("separate").model_dump()["datasets"]
        tokens = {**block["image_tokens"], "tokenizer": tokenizer}
        dataset = {**block, "manifest": folder / manifest, "image_tokens": tokens}
        data = DataConfig.model_validate({**drawing_data("separate").model_dump(), "datasets": [dataset]})
        return image_tokenizer_digest(tokenizer_of_data(folder / "run", data, torch.device("cpu")))

    state = torch.get_rng_state()
    assert found("out/data.manifest", None) == found("absent.manifest", digest) == digest
    assert torch.equal(torch.get_rng_state(), state)  # A run that loads it trains on with the same random numbers.
    with pytest.raises(ConfigError, match=r"but abababababab\.\.\. encoded the images of data set drawn"):
        found("out/data.manifest", "ab" * 32)
    with pytest.raises(ConfigError, match="it is unknown which image tokenizer encoded"):
        found("absent.manifest", None)
    with pytest.raises(ConfigError, match="it is unknown which image tokenizer encoded"):
        found("in/a.manifest", None)


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


@pytest.mark.fault
def test_weights_of_a_tokenizer_that_did_not_encode_the_data_are_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 16}
    config = transformers.JanusVQVAEConfig(**sizes, num_embeddings=80, embed_dim=6, num_patches=6)
    for name, seed in (("own", 1), ("other", 2)):
        torch.manual_seed(seed)
        transformers.JanusVQVAE(config).save_pretrained(tmp_path / "hf" / name)
        import_folder(tmp_path / "hf" / name, tmp_path / name / "checkpoints")
    with ShardWriter(tmp_path / "in", "a") as writer:
        writer.write("k", {"png": picture(1, 16, 16), "txt": b"a text"})
    write_manifest(tmp_path / "in" / "a.manifest", writer.shards)
    transforms = ["--transforms", "{kind: fixed, size: 16}"]
    words = ["data", "encode", str(tmp_path / "own"), str(tmp_path / "in" / "a.manifest"), *transforms]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0

    def check(tokenizer: str, manifest: Path) -> None:
        encoder = load_image_tokenizer(tmp_path / tokenizer).config.image_tokenizer.model_dump(mode="json")
        drawn = {"kind": "separate", "codes": 80, "code_dim": 4}
        sizes = {
            "hidden_dim": 32,
            "num_layers": 1,
            "attention": {"num_heads": 2},
            "mlp": {"kind": "dense", "hidden_dim": 32},
        }
        weights = {"checkpoint": str(tmp_path / tokenizer), "components": ["image_tokenizer"]}
        dataset = {"name": "drawing", "manifest": str(manifest), "template": {"kind": "drawing"}}
        run = {
            "run_dir": str(tmp_path / "run"),
            "data": {
                "tokenizer": {"kind": "sentencepiece", "path": "examples/emoji/tokenizer.model"},
                "image_tokens": {"codebook_size": 80, "first_id": 2048},
                "datasets": [dataset],
                "lanes": 1,
                "packing": {"max_tokens": 128},
            },
            "model": {"decoder": {"vocab_size": 2048, "image_tokens": drawn, **sizes}, "image_tokenizer": encoder},
            "stages": [{"name": "draw", "steps": 1, "train": ["decoder"], "weights": [weights]}],
        }
        (tmp_path / "run.yaml").write_text(json.dumps(run))
        loaded = load(tmp_path / "run.yaml", [], RunConfig)
        check_stage_weights(loaded.value, World(0, 1, 0, torch.device("cpu")), TrainState())

    check("own", tmp_path / "out" / "data.manifest")
    with pytest.raises(
        ConfigError, match=r"weights\.0\.checkpoint=.*other: is the image tokenizer .* encoded the images"
    ):
        check("other", tmp_path / "out" / "data.manifest")
    check("other", tmp_path / "in" / "a.manifest")  # Its manifest names no tokenizer.
