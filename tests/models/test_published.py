"""Configurations of published models have exactly the published numbers of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main
from mmscale.models.config import ModelConfig
from tests.configs.files import model_of

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"
OWN = ("tiny", "emoji-vq")
COUNTS = {  # Counted in the reference implementations (transformers; Molmo's own code for OLMo-7B-1024).
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "olmo-7b-1024": 7_298_617_344,
    "emu3-vq": 270_740_287,
    "janus-vq": 71_883_403,
    "mistral-nemo-12b": 12_247_782_400,
    "olmoe-1b-7b": 6_919_161_856,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama3.2-11b-vision": 10_670_220_835,
    "llama3.2-11b-vision-448": 10_642_941_475,
    "llama3.2-90b-vision": 88_593_355_323,
    "llama3.2-90b-vision-448": 88_566_075_963,
    "molmo-7b-o": 7_665_032_192,
    "molmo-7b-d": 8_021_025_280,
    "molmo-72b": 73_308_285_952,
    "molmoe-1b": 7_221_875_712,
    "fuyu-8b": 9_408_238_592,
    "clip-vit-l-14-336": 303_507_456,
    "clip-vit-l-14-336-pair": 427_944_193,
    "clip-vit-h-14": 630_766_080,
    "siglip-so400m": 412_987_248,  # Without the pooling head of 15,238,352, which the features do not use.
    "siglip-l-16-384": 303_688_704,  # Likewise, without 12,595,200.
    "internvit-6b": 5_536_496_000,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2-audio-7b": 8_397_094_912,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen2.5-omni-7b": 8_931_813_888,
    "whisper-large-v3": 636_968_960,
    "pixtral-12b": 12_682_739_712,
    "llava-1.5-7b": 7_063_427_072,
    "internvl3-1b": 938_193_024,
    "smolvlm-256m": 256_484_928,
    "nvlm-d-72b": 78_863_416_704,  # Without the 7 zero heads per block in the published files.
    "aria": 25_307_311_216,
    "emu3-8b": 8_492_011_520,  # Without its image tokenizer.
    "janus-1.3b": 2_076_636_811,  # With its image tokenizer, and without the tower's pooling head of 12,595,200.
}
EXPERTS = {  # Blocks, experts of a block that a token does not use, D, F.
    "aria": (28, 64 - 6, 2560, 1664),
    "olmoe-1b-7b": (16, 64 - 8, 2048, 1024),
    "molmoe-1b": (16, 64 - 8, 2048, 1024),
    "mixtral-8x7b": (32, 8 - 2, 4096, 14336),
    "qwen3-30b-a3b": (48, 128 - 8, 2048, 768),
}
TOWERS = {  # Tower, connector.
    "clip-vit-l-14-336-pair": (303_507_456, 1_376_257),  # Without 12 text blocks.
    "qwen2-vl-2b": (665_271_296, None),  # The tower includes the merger.
    "qwen2-vl-7b": (675_759_104, None),
    "qwen2-vl-72b": (699_356_672, None),
    "qwen2.5-vl-3b": (631_975_680, 36_708_608),
    "qwen2.5-vl-7b": (631_975_680, 44_574_464),
    "qwen2.5-vl-32b": (636_401_664, 52_440_320),
    "qwen2.5-vl-72b": (636_401_664, 68_172_032),
    "pixtral-12b": (403_489_792, 31_467_520),
    "llava-1.5-7b": (303_507_456, 20_979_712),
    "internvl3-1b": (304_012_288, 4_482_816),
    "smolvlm-256m": (86_433_024, 7_077_888),
    "aria": (417_792_240, 20_427_136),  # The tower with its unused norm.
    "janus-1.3b": (303_688_704, 6_295_552),
    "qwen2-audio-7b": (636_968_960, 5_246_976),
}
NOMINAL = {  # Sizes were not published: models of the published form with about the published number.
    "mm1.5-1b": (997_853_760, 1e9),
    "mm1.5-3b": (2_967_440_448, 3e9),
    "mm1.5-7b": (7_014_788_672, 7e9),
    "mm1.5-30b": (30_601_908_800, 30e9),
}
NOMINAL_EXPERTS = {  # Number of blocks, width, feed-forward of a model of the published form.
    "mm1.5-1b-moe": (24, 1024, 2816),
    "mm1.5-3b-moe": (28, 2560, 6912),
}
SPLITS = {  # Vision; projector and cross-attention; text without and with the rows for images.
    "llama3.2-11b-vision": (863_567_379, 31_461_376 + 1_744_898_064, 8_030_294_016 - 8 * 4096, 8 * 4096),
    "llama3.2-11b-vision-448": (836_288_019, 31_461_376 + 1_744_898_064, 8_030_294_016 - 8 * 4096, 8 * 4096),
    "llama3.2-90b-vision": (863_567_379, 62_922_752 + 17_113_093_160, 70_553_772_032 - 8 * 8192, 8 * 8192),
    "llama3.2-90b-vision-448": (836_288_019, 62_922_752 + 17_113_093_160, 70_553_772_032 - 8 * 8192, 8 * 8192),
}


_WIDTH, _KEYS, _WIDE = 8192, 1024, 29568
_CROSS_BLOCK = (
    2 * _WIDTH  # Norms.
    + 2 * _WIDTH * _WIDTH  # Queries, output.
    + 2 * _WIDTH * _KEYS  # Keys, values.
    + 3 * _WIDTH * _WIDE  # Feed-forward.
    + 2  # Gates.
)
_PARTS = 5_536_496_000 + 72_706_203_648 + 10 * _CROSS_BLOCK  # InternViT, Qwen2 72B.
_TWO_LAYERS = 1152 * 3584 + 3584 + 3584**2 + 3584
_BAICHUAN_OMNI = (
    7_615_616_512  # Qwen2.5 7B.
    + 412_987_248  # SigLIP without its pooling head.
    + _TWO_LAYERS  # The mean has no weight.
    + (4 * 1152**2 + 1152)  # The convolution of videos.
    + _TWO_LAYERS
    + 636_968_960  # Whisper's encoder.
    + (3 * 5120**2 + 2 * 5120)  # Conv-GMLP: gate, up, down and the norm.
    + (5120 * 3584 + 3584)
)
FORMULAS = {  # Systems whose number was not published.
    "baichuan-omni-7b": _BAICHUAN_OMNI,
    "nvlm-x-72b": _PARTS + 12800 * _WIDTH + _WIDTH,
    "nvlm-h-72b": _PARTS + 2 * 12800 + 12800 * _WIDE + _WIDE * _WIDTH,
}


@pytest.mark.parametrize("name", [*COUNTS, *FORMULAS])
def test_the_published_number_of_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", str(FOLDER / f"{name}.yaml"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["total"] == (COUNTS | FORMULAS)[name]
    layers, idle, dim, expert_dim = EXPERTS.get(name, (0, 0, 0, 0))
    assert counted["active"] == counted["total"] - layers * idle * 3 * dim * expert_dim
    parts = counted["components"]
    if name in SPLITS:
        assert tuple(parts[part] for part in ("vision", "connector", "decoder", "extra_tokens")) == SPLITS[name]
    if name in TOWERS:
        tower, connector = TOWERS[name]
        names = ("vision", "connector") if "vision" in parts else ("audio", "audio_connector")
        found = [parts[part] for part in names]
        assert found[0] == tower - (found[1] if connector is None else 0)
        assert connector in (None, found[1])


@pytest.mark.parametrize("name", NOMINAL)
def test_models_of_unpublished_widths_are_near_their_nominal_size_and_say_so(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FOLDER / f"{name}.yaml"
    assert main(["params", str(path), "--json"]) == 0
    total, nominal = NOMINAL[name]
    assert json.loads(capsys.readouterr().out)["total"] == total
    assert total == pytest.approx(nominal, rel=0.05)
    text = path.read_text()
    assert f": {total:,} parameters" in text
    decoder = text[text.index("decoder:") : text.index("vision:")].splitlines()[1:]
    assert decoder
    assert all(line.endswith("# unknown: not published, our choice") for line in decoder)


@pytest.mark.parametrize("name", ["molmo-7b-o", "molmo-72b", "molmoe-1b"])
def test_a_recipe_on_top_of_another_trains_its_own_model(name: str) -> None:
    model = model_of(FOLDER / f"{name}.yaml")
    assert isinstance(model, ModelConfig)
    dropout = {"dropout": 0.1, "dropout_rows": "learned"}
    decoder = model.decoder.model_copy(update=dropout)
    assert model_of(FOLDER.parent / "recipes" / f"{name}.yaml") == model.model_copy(update={"decoder": decoder})


@pytest.mark.parametrize("name", NOMINAL_EXPERTS)
def test_experts_of_a_model_of_unpublished_widths(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The counts are those of the dense model, and in every second block 64 experts and a router instead of one."""
    counts = []
    for file in (f"{name}.yaml", f"{name.removesuffix('-moe')}.yaml"):
        assert main(["params", str(FOLDER / file), "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out))
    (sparse, dense), (blocks, width, hidden) = counts, NOMINAL_EXPERTS[name]
    router, expert = 64 * width, 3 * width * hidden
    assert sparse["total"] == dense["total"] + blocks // 2 * (63 * expert + router)
    assert sparse["active"] == dense["total"] + blocks // 2 * (1 * expert + router)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f": {sparse['total']:,} parameters, {sparse['active']:,} a token" in text
    decoder = text[text.index("decoder:") : text.index("vision:")].splitlines()[1:]
    published = {"num_experts", "experts_per_token", "every", "balance_coefficient", "z_coefficient"}
    for line in decoder:
        key = line.split(":")[0].strip()
        assert key in ("mlp", "kind") or ("published" in line and ("unknown" in line) == (key not in published)), line


def test_every_published_configuration_has_a_number() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*COUNTS, *FORMULAS, *NOMINAL, *NOMINAL_EXPERTS, *OWN}


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("molmo")])
def test_the_tower_of_molmo(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The tower has 23 of CLIP's 24 blocks; the last of them is built but not used."""
    assert main(["params", str(FOLDER / f"{name}.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"]["vision"] == 290_909_184
