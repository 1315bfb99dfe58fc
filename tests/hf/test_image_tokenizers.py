"""Imported image tokenizers compute what transformers' classes compute, and an export restores the folder bit for bit.

Distances are the largest difference over the largest value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.checkpoint import TrainState, save
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.errors import CheckpointError
from mmscale.models.build import build_unset
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer import ImageTokenizer, image_tokenizer_digest
from mmscale.nn.init import initialise_
from tests.checkpoint.plain_engine import plain_engine
from tests.hf.reference_models import imported, loaded, tensors_of, their_gradients
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 4e-6, 2e-5
SIDES = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
REFERENCES: dict[str, dict[str, Any]] = {
    "Emu3VQVAE": {
        **SIDES,
        "codebook_size": 96,
        "attn_resolutions": [1],
        "hidden_size": 64,
    },
    "JanusVQVAE": {**SIDES, "num_embeddings": 80, "embed_dim": 6, "latent_channels": 16, "num_patches": 6},
}


def reference_tokenizer(name: str, folder: Path) -> Any:
    """Return a random tokenizer of transformers, saved to ``folder``; its stored means and variances are random."""
    import transformers

    theirs = getattr(transformers, name)(getattr(transformers, f"{name}Config")(**REFERENCES[name]))
    randomise(theirs)
    generator = torch.Generator().manual_seed(3)
    for key, values in theirs.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    theirs.save_pretrained(folder)
    return theirs.eval()


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) * 2 - 1


def encoded(theirs: Any, images: Tensor) -> Any:
    """Return their output; Emu3's class crops each grid to the size of its image."""
    if type(theirs).__name__ == "JanusVQVAE":
        return theirs.encode(images)
    return theirs.encode(images, torch.tensor([images.shape[-2:]] * len(images)))


def tokens_of(theirs: Any, images: Tensor) -> Tensor:
    found = encoded(theirs, images).image_tokens
    side = images.shape[-1] // 2
    return torch.stack(list(found)) if isinstance(found, list) else found.view(len(images), -1, side)


def latents_of(theirs: Any, images: Tensor) -> Tensor:
    hidden = encoded(theirs, images).last_hidden_state
    if type(theirs).__name__ == "JanusVQVAE":
        return theirs.quant_conv(hidden)
    return theirs.quant_conv(hidden.transpose(1, 2)).squeeze(2)  # (N, T, C, h, w) there, one frame of latents.


@pytest.mark.parametrize("name", REFERENCES)
def test_the_same_tokens_and_images(name: str, tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_tokenizer(name, tmp_path / "theirs")
    family = theirs.config.model_type
    ours: ImageTokenizer = imported(tmp_path / "theirs", tmp_path / "run")[0].image_tokenizer
    images = pictures(3, 3, 12, 12)
    with torch.no_grad():
        tokens = ours.encode(images)
        assert torch.equal(tokens, tokens_of(theirs, images))
        assert len(tokens.unique()) > 3
        parity(family, "features", distance(ours.latents(images), latents_of(theirs, images)), BOUND)
        expected = theirs.decode(tokens if name == "Emu3VQVAE" else tokens.flatten(1))
        parity(family, "images", distance(ours.images_of(ours.codes_of(tokens)), expected), BOUND)
        assert torch.equal(ours.decode(tokens), ours.images_of(ours.codes_of(tokens)).clamp(-1, 1))
    assert len(image_tokenizer_digest(ours)) == 64


def test_the_same_tokens_and_images_of_clips(tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_tokenizer("Emu3VQVAE", tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "run")[0].image_tokenizer
    clips = pictures(2, 8, 3, 8, 12)
    with torch.no_grad():
        tokens = ours.encode_clips(clips)
        assert tokens.shape == (2, 2, 4, 6)
        found = theirs.encode(clips, torch.full((2, 2), 64)).image_tokens
        assert torch.equal(tokens, torch.stack(list(found)))
        expected = theirs.decode(tokens)
        parity(
            "emu3_vqgan",
            "clips",
            distance(ours.clips_of(ours.codes_of(tokens.flatten(0, 1)).unflatten(0, (2, 2)).transpose(1, 2)), expected),
            BOUND,
        )
        assert distance(ours.decode_clips(tokens), expected.clamp(-1, 1)) < BOUND
    with pytest.raises(ValueError, match="a clip of 6 frames"):
        ours.encode_clips(clips[:, :6])


@pytest.mark.parametrize("name", REFERENCES)
def test_the_same_gradients(name: str, tmp_path: Path, parity: Recorder) -> None:
    """Of the encoder through its latents, and of codebook and decoder through the images of fixed tokens."""
    theirs = reference_tokenizer(name, tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "run")[0]
    tokenizer: ImageTokenizer = ours.image_tokenizer
    images = pictures(2, 3, 12, 12)
    tokens = tokenizer.encode(images)
    upstream = torch.randn(tokens.shape[0], tokenizer.config.code_dim, 6, 6, generator=torch.Generator().manual_seed(5))
    target = pictures(2, 3, 12, 12)

    latents = tokenizer.latents(images)
    (F.mse_loss(tokenizer.images_of(tokenizer.codes_of(tokens)), target) + (latents * upstream).mean()).backward()
    decoded = theirs.decode(tokens if name == "Emu3VQVAE" else tokens.flatten(1))
    (F.mse_loss(decoded, target) + (latents_of(theirs, images) * upstream).mean()).backward()
    gradients = their_gradients(theirs, tmp_path)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in ours.named_parameters():
        scale = max(float(gradients[key].abs().max()), 1e-2 * largest)
        parity(
            theirs.config.model_type,
            "gradients",
            float((parameter.grad - gradients.pop(key)).abs().max()) / scale,
            GRADIENT_BOUND,
        )
    assert not gradients


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("like", [True, False])
def test_export_restores_the_folder(name: str, like: bool, tmp_path: Path) -> None:
    theirs = reference_tokenizer(name, tmp_path / "theirs")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    report = export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "theirs" if like else None))
    assert report.family == theirs.config.model_type
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    again = loaded(tmp_path / "back", name)
    images = pictures(1, 3, 12, 12)
    assert torch.equal(tokens_of(again, images), tokens_of(theirs, images))


def test_the_original_code_of_janus_normalises_in_the_search(tmp_path: Path) -> None:
    """``always`` gives the tokens of ``VectorQuantizer`` of the authors: the largest cosine."""
    reference_tokenizer("JanusVQVAE", tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "run")[0].image_tokenizer
    images = pictures(2, 3, 12, 12)
    before = ours.encode(images)
    ours.codebook.normalized = "always"
    latents = ours.latents(images).detach().permute(0, 2, 3, 1)
    cosine = F.cosine_similarity(latents.unsqueeze(-2), ours.codebook.weight.detach(), dim=-1)
    assert torch.equal(ours.encode(images), cosine.argmax(-1))
    assert not torch.equal(ours.encode(images), before)


REFUSED = {
    "another width of attention": ("Emu3VQVAE", {"hidden_size": 32}, "hidden_size=32 is not supported, only 64"),
    "several heads": ("Emu3VQVAE", {"num_attention_heads": 2}, "num_attention_heads=2"),
    "twice the latents": ("JanusVQVAE", {"double_latent": True}, "double_latent=True"),
    "an unknown key": ("JanusVQVAE", {"attn_type": "linear"}, "attn_type='linear' is not known"),
    "a level that is missing": ("Emu3VQVAE", {"attn_resolutions": [2]}, r"attention_levels=\[2\]: there are 2 levels"),
    "a width that the norms cannot divide": ("JanusVQVAE", {"base_channels": 40}, "norm_groups=32: must divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_rejected(case: str, tmp_path: Path) -> None:
    name, keys, message = REFUSED[case]
    reference_tokenizer(name, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "run")


def trained(folder: Path, kind: str, **changes: Any) -> tuple[Any, Path]:
    """Return a tokenizer with everything that only training uses, and its checkpoint."""
    block = {
        "kind": kind,
        "base_dim": 32,
        "multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_levels": [1],
        "latent_dim": 4,
        "codebook_size": 96,
        "code_dim": 4,
        "codebook_update": "ema",
        "idle_counts": True,
        **changes,
    }
    game = {"base_dim": 8, "halvings": 2, "norm_groups": 4}
    sizes = {"image_tokenizer": block, "image_size": 12, "discriminator": game}
    model = build_unset(TokenizerConfig.model_validate(sizes))
    initialise_(model, 3)
    with torch.no_grad():
        model.image_tokenizer.codebook.weight.mul_(torch.linspace(0.1, 9, 96)[:, None])
    engine = plain_engine(model)
    engine.partition.whole.clear()
    return model, save(engine, TrainState(0, 0, 0), folder)


def test_codes_of_length_one_are_exported_where_both_sides_are_scaled(tmp_path: Path) -> None:
    model, checkpoint = trained(tmp_path / "run", "vqgan", normalized_codes="always")
    export_weights(checkpoint, tmp_path / "theirs", to=HuggingFace())
    theirs = loaded(tmp_path / "theirs", "JanusVQVAE")
    assert not any("discriminator" in name for name in tensors_of(tmp_path / "theirs"))
    images = pictures(4, 3, 12, 12)
    tokens = model.image_tokenizer.encode(images)
    assert len(tokens.unique()) > 10
    assert torch.equal(tokens, tokens_of(theirs, images))
    with torch.no_grad():
        mine = model.image_tokenizer.images_of(model.image_tokenizer.codes_of(tokens))
        assert distance(mine, theirs.decode(tokens.flatten(1))) < BOUND


UNKNOWN_TO_JANUS = {
    "codes of any length": ({"normalized_codes": "never"}, "scales codes to length 1"),
    "no attention": ({"attention_levels": []}, r"attention_levels=\[1\], not \[\]"),
    "other norms": ({"norm_groups": 8}, "norm_groups=32, not 8"),
}


@pytest.mark.parametrize("case", UNKNOWN_TO_JANUS)
def test_tokenizers_that_transformers_lacks_are_not_exported(case: str, tmp_path: Path) -> None:
    changes, message = UNKNOWN_TO_JANUS[case]
    _, checkpoint = trained(tmp_path / "run", "vqgan", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_weights(checkpoint, tmp_path / "theirs", to=HuggingFace())


def test_a_trained_tokenizer_is_exported_without_its_statistics(tmp_path: Path) -> None:
    model, checkpoint = trained(tmp_path, "movqgan")
    export_weights(checkpoint, tmp_path / "theirs", to=HuggingFace())
    theirs = loaded(tmp_path / "theirs", "Emu3VQVAE")
    images = pictures(2, 3, 12, 12)
    assert torch.equal(model.image_tokenizer.encode(images), tokens_of(theirs, images))
    again, _ = imported(tmp_path / "theirs", tmp_path / "run")
    assert image_tokenizer_digest(again.image_tokenizer) == image_tokenizer_digest(model.image_tokenizer)
    with torch.no_grad():
        again.image_tokenizer.encoder.conv_in.bias[0] += 1e-6
    assert image_tokenizer_digest(again.image_tokenizer) != image_tokenizer_digest(model.image_tokenizer)
