"""A round trip: folder, run, training-free export. ``transformers`` loads the exported folder alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml

from data_pipeline.config import DatasetConfig
from data_pipeline.document import MediaItem
from data_pipeline.images.transforms import ImageTransform
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.text.templates import DialogueTemplate
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from mmscale.cli.main import main
from mmscale.cli.trained import open_trained
from mmscale.config.layers import read_layers
from mmscale.config.tree import plain
from mmscale.errors import CheckpointError
from mmscale.hf.chat_template import derive_format
from mmscale.hf.own_tokenizer import write_tokenizer
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from tests.hf import test_clip
from tests.hf.pages import picture, stored
from tests.hf.published_folders import FAMILIES, Published, save, tokenizer
from tests.hf.towers import reference_model as tower
from tests.models.reference_models import distance
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
REPO = Path(__file__).parents[2]


def run(*words: str | Path) -> None:
    assert main(["checkpoint", *map(str, words)]) == 0


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava", "internvl", "smolvlm"])
def test_the_exported_folder_works_alone(family: str, tmp_path: Path) -> None:
    import transformers

    theirs = save(family, tmp_path / "folder")
    run("import", tmp_path / "folder", tmp_path / "run", "--from", "hf")
    original = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    shutil.rmtree(tmp_path / "folder")
    run("export", tmp_path / "run", tmp_path / "out", "--to", "hf")
    auto = transformers.AutoTokenizer if FAMILIES[family].images is None else transformers.AutoProcessor
    words = auto.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert words.rstrip().endswith(("assistant", "[/INST]", "Assistant:"))
    model = getattr(transformers, FAMILIES[family].auto).from_pretrained(tmp_path / "out")
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    for name, content in original.items():
        if not name.endswith(".safetensors") and name != "config.json":
            assert (tmp_path / "out" / name).read_bytes() == content, name
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert kept["max_position_embeddings" if family == "qwen2" else "text_config"]


def test_the_kept_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("qwen2", tmp_path / "folder")
    run("import", tmp_path / "folder", tmp_path / "run", "--from", "hf")
    settings = tmp_path / "run/hf_files/tokenizer_config.json"
    settings.write_text(settings.read_text().replace("im_end", "im_start"))
    assert main(["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "tokenizer_config.json has changed since the import" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["checkpoint", "import", str(tmp_path / "folder"), str(tmp_path / "run"), "--from", "hf"]) == 1
    assert "holds another run; import into a new folder" in " ".join(capsys.readouterr().err.split())


CLIP = ("<pad>", "<|startoftext|>", "<|endoftext|>")


def test_clip_compares_the_same_texts_and_pixels(tmp_path: Path, parity: Recorder) -> None:
    import transformers

    one = Published(CLIP, lambda _: None, processor="CLIPProcessor", adds_begin=True)
    words = tokenizer(one)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = test_clip.reference_model(vocab_size=words.get_vocab_size(), **ids)
    model.save_pretrained(tmp_path / "folder")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=CLIP[1], eos_token=CLIP[2], pad_token=CLIP[2]
    )
    side = test_clip.SIDE
    images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = transformers.CLIPProcessor(images, fast)
    processor.save_pretrained(tmp_path / "folder")
    run("import", tmp_path / "folder", tmp_path / "run", "--from", "hf")
    trained = open_trained(tmp_path / "run")
    data = trained.config.data
    text, image = "The quick red fox", picture((50, 70))
    builder = DocumentBuilder(data.prompts, load_tokenizer(data.tokenizer), trained.config.media_spec)
    document = builder(Sample((ImagePart(stored(image), "png"),), {"caption": text}))
    theirs = processor(text=text, images=image, return_tensors="pt")
    assert document.token_ids.tolist() == theirs["input_ids"][0].tolist()
    parity(
        "clip",
        "pixels of an imported run",
        distance(pixels(trained.config.model.vision, document.items), theirs["pixel_values"][0]),
        2e-6,
    )
    assert data.packing.too_long == "truncate"
    assert main(["chat", str(tmp_path / "run")]) == 2


def pixels(vision: Any, items: Sequence[MediaItem]) -> torch.Tensor:
    """Return the normalised image of one crop, ``(3, side, side)``."""
    (item,) = items
    _, rows, columns = item.grid
    patch = vision.patch_size
    values = torch.from_numpy(item.values.copy()).view(rows, columns, 3, patch, patch).permute(2, 0, 3, 1, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    return (values.reshape(3, rows * patch, columns * patch) / 255 - mean) / std


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_tower_is_the_block_of_a_run(
    name: str, tmp_path: Path, parity: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    tower(name).save_pretrained(tmp_path / "folder")
    size = {"height": 28, "width": 28} if name == "siglip" else {"shortest_edge": 28}
    crop = {} if name == "siglip" else {"crop_size": {"height": 28, "width": 28}}
    processor = getattr(transformers, "SiglipImageProcessor" if name == "siglip" else "CLIPImageProcessor")(
        size=size, **crop
    )
    processor.save_pretrained(tmp_path / "folder")
    run("import", tmp_path / "folder", tmp_path / "tower", "--from", "hf")
    run("export", tmp_path / "tower", tmp_path / "out", "--to", "hf")
    assert (tmp_path / "out/preprocessor_config.json").is_file()
    assert main(["chat", str(tmp_path / "tower")]) == 2
    assert "an imported model without a tokenizer" in " ".join(capsys.readouterr().err.split())
    file = tmp_path / "model.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "vision": {"base": "tower"},
                    "connector": {"kind": "embedding", "projector": {"kind": "linear"}},
                    "decoder": {
                        "vocab_size": 16,
                        "hidden_dim": 8,
                        "num_layers": 1,
                        "attention": {"num_heads": 1},
                        "mlp": {"kind": "dense", "hidden_dim": 8},
                    },
                },
                "data": {"transforms": {"base": "tower"}},
            }
        )
    )
    values = plain(read_layers(file))
    config = ModelConfig.model_validate(values["model"])
    block = {"name": "x", "manifest": "x", "transforms": values["data"]["transforms"]}
    dataset = DatasetConfig.model_validate(block)
    items = ImageTransform(dataset.transforms, media_spec(config))(stored(picture((50, 70))))
    expected = processor(picture((50, 70)), return_tensors="pt").pixel_values[0]
    parity(
        name,
        "pixels of an imported run",
        distance(pixels(config.vision, items), expected),
        2e-6,
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_our_own_tokenizer_is_a_tokenizer_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    # Names of special tokens are text for us. SentencePiece sums in float32, so long texts could give other ids.
    paragraphs = (REPO / "docs/data.md").read_text().replace("<", "(").split("\n\n")
    path = REPO / "examples/text/tokenizer.model"
    if kind == "bpe":
        path = tmp_path / "bpe.model"
        train(path.with_suffix(""), paragraphs, model_type=kind, normalization_rule_name="identity")
    config = SentencePieceTokenizerConfig(path=path)
    template = DialogueTemplate(format="vicuna" if kind == "bpe" else "chatml", system="It's \n good", strip=True)
    write_tokenizer(config, template, tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(config)
    for text in paragraphs:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    found = derive_format(theirs.chat_template, theirs.special_tokens_map, ("<|im_start|>", "<|im_end|>", "</s>"))
    assert found.notes == ()
    derived = DialogueTemplate.model_validate(found.template)
    assert derived == template.model_copy(update={"joined": True, "format": derived.format})


def train(prefix: Path, lines: list[str], **settings: Any) -> None:
    """Train a SentencePiece model; ``settings`` replace those of ``mmscale data tokenizer``."""
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "<pad>"}
    ours = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True}
    options = {"vocab_size": 500, "control_symbols": ["<image>"], "hard_vocab_limit": False, **ids, **ours, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), minloglevel=2, **options
    )


def test_a_sentencepiece_model_that_normalises_is_not_exported_wrongly(tmp_path: Path) -> None:
    train(tmp_path / "other", ["Some words, and ﬁgures with ligatures."] * 50, add_dummy_prefix=True)
    config = SentencePieceTokenizerConfig(path=tmp_path / "other.model")
    with pytest.raises(CheckpointError, match="no tokenizer with equal ids"):
        write_tokenizer(config, DialogueTemplate(), tmp_path)
