"""Compare a model of transformers with ours after importing its folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmscale.checkpoint import load_weights
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.models.build import build_unset
from mmscale.models.config import read_model_config


def imported(source: Path, run: Path) -> tuple[Any, Path]:
    """Import a folder; return our model, built from the configuration in the report, and the checkpoint."""
    report = import_folder(source, run / "checkpoints")
    model = build_unset(read_model_config(report.model), attention="sdpa")
    load_weights(model, Path(report.checkpoint))
    return model, Path(report.checkpoint)


def import_reference(theirs: Any, folder: Path) -> Any:
    """Save a model of transformers in ``folder/theirs``; return our model, imported from there."""
    theirs.save_pretrained(folder / "theirs")
    return imported(folder / "theirs", folder / "run")[0]


def their_gradients(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """Return the gradients of a model of transformers by our names: save them as if they were weights, and import them.

    A parameter without a gradient gets zeros.
    """
    carrier = copy.deepcopy(theirs)
    with torch.no_grad():
        for mine, parameter in zip(carrier.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    carrier.save_pretrained(folder / "gradients")
    model, _ = imported(folder / "gradients", folder / "of gradients")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors files of a folder."""
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def loaded(folder: Path, auto_class: str) -> Any:
    """Load a folder with a class of transformers; assert that no key is missing or unexpected."""
    import transformers

    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in info if kind != "error_msgs"), info
    return model.eval()


def trained_parameters(ours: Any) -> list[tuple[str, Any]]:
    """Return the parameters by name, without those of an image tokenizer, which no stage trains."""
    return [(name, value) for name, value in ours.named_parameters() if not name.startswith("image_tokenizer.")]


def assert_restored(theirs: Any, folder: Path) -> None:
    """Assert that import and export of a model that draws, with and without ``--like``, give back the same bits.

    Args:
        theirs: Model of transformers.
        folder: Folder for temporary files.
    """
    theirs.save_pretrained(folder / "theirs", max_shard_size="100KB")
    _, checkpoint = imported(folder / "theirs", folder / "run")
    before, config = tensors_of(folder / "theirs"), json.loads((folder / "theirs/config.json").read_text())
    for name, like in (("back", HuggingFace(folder / "theirs")), ("alone", HuggingFace())):
        report = export_weights(checkpoint, folder / name, to=like, shard_bytes=200_000)
        assert report.family == theirs.config.model_type
        after = tensors_of(folder / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = loaded(folder / name, "AutoModelForImageTextToText")
        ids = torch.tensor([[1, 5, 9, 7]])
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
        if like.like is not None:
            assert json.loads((folder / name / "config.json").read_text()) == config
