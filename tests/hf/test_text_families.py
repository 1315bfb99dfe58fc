"""Text decoders that two ranks train under ZeRO-3 and export: transformers loads them and generates the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint import load_weights
from mmscale.checkpoint.manifest import newest_of, read_manifest
from mmscale.models.build import build_unset
from mmscale.models.config import read_model_config
from tests.engine.ranks import run_ranks
from tests.hf.decoders import reference_model
from tests.hf.reference_models import loaded
from tests.hf.train_and_export import VOCABULARY, export, prepare, text
from tests.models.reference_models import distance
from tests.models.test_parity import text_batch

pytestmark = [pytest.mark.parity, pytest.mark.dist]
FAMILIES = {
    "llama": "llama, tied, grouped, stretched",
    "qwen2": "qwen2, one key head",
    "mistral": "mistral, narrow heads",
    "olmo2": "olmo2, grouped, biased",
    "olmoe": "olmoe, renormalised, grouped, biased",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe, every second block",
    "persimmon": "persimmon",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the work folder of each family; one pair of ranks trains all of them."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    files = []
    for family, folder in folders.items():
        reference_model(FAMILIES[family], vocab_size=VOCABULARY).save_pretrained(folder / "theirs")
        files.append(str(prepare(folder / "theirs", folder, text(), steps=10)))
    run_ranks("tests.hf.text_programs:train_all", 2, {"files": files})
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_on_two_ranks_and_generated_from(family: str, trained: dict[str, Path]) -> None:
    """transformers gives the logits of our checkpoint, and its generation loop the same tokens."""
    folder = trained[family]
    theirs = loaded(export(folder / "theirs", folder), "AutoModelForCausalLM")
    checkpoint = newest_of(folder / "run")
    ours = build_unset(read_model_config(read_manifest(checkpoint).model_config_values), attention="sdpa")
    load_weights(ours, checkpoint)
    prompt = text_batch(VOCABULARY, lengths=[12]).token_ids
    with torch.no_grad():
        ids = theirs.generate(prompt[None], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        whole = replace(text_batch(VOCABULARY, lengths=[17]), token_ids=ids[0])
        mine = ours.head(ours(whole).hidden)
        expected = theirs(ids).logits[0]
    assert torch.equal(ids[0, 12:], mine[11:-1].argmax(-1))
    assert distance(mine, expected) < 5e-6
