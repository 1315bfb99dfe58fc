"""A run whose stages change the model: the weights that each transition changes, and those that it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.loader.loader import Loader
from mmscale.checkpoint import TrainState, list_checkpoints, load_weights, read_manifest, read_state
from mmscale.cli.main import main
from mmscale.cli.trained import open_trained
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.models.build import build_model
from mmscale.objectives.next_token import NextToken
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import Evidence, SampleLookup
from mmscale.run.stage_weights import check_stage_weights
from tests.system.conftest import REPO, Run
from tests.system.test_resume import curve

pytestmark = [pytest.mark.dist, pytest.mark.resume]

CHANGES = REPO / "tests/system/changes.yaml"
STEPS = 2
"""Steps of each stage."""
POSITIONS = "vision.positions.position_embedding"
NEW = {"decoder.embed_tokens.extra_weight", "head.extra_weight"}


def start(folder: Path, ranks: int, *words: str) -> Run:
    first = ["train", str(CHANGES)] if ranks == 1 else ["launch", "local", str(CHANGES), "--ranks", str(ranks)]
    return Run(folder, [*first, f"run_dir={folder}", *words], forked=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Run a donor with another seed for one step, and the whole run on two ranks."""
    folder = tmp_path_factory.mktemp("changes")
    asked = "{name: style, manifest: examples/emoji/shards/heldout-style-quick.manifest, field: name, limit: 4}"
    donor = start(folder / "donor", 1, "seed=9", "max_steps=1", f"evaluation.sets=[{asked}]")
    assert "not scored: style; the model of stage read takes no images" in donor.finish()
    whole = start(folder / "whole", 2, f"stages.2.weights.0.checkpoint={donor.folder}")
    whole.finish()
    return donor, whole


class Stages:
    """Return the stages by name: configuration, weights at the end, and the first batch."""

    def __init__(self, run: Run) -> None:
        self.folder = run.folder
        self.config = load(run.folder / "config.yaml", [], RunConfig).value
        self.names = [stage.name for stage in self.config.stages]
        self.paths = list_checkpoints(run.folder / "checkpoints")
        self.lines = run.metrics()
        assert [read_manifest(path).stage for path in self.paths] == self.names

    def number(self, name: str) -> int:
        return self.names.index(name)

    def after(self, name: str) -> dict[str, Tensor]:
        """Return the weights at the end of a stage."""
        number = self.number(name)
        model = build_model(self.config.stage_model(number), seed=None)
        load_weights(model, self.paths[number])
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def before(self, name: str) -> dict[str, Tensor]:
        return self.after(self.names[self.number(name) - 1])

    def first_values(self, name: str) -> dict[str, Tensor]:
        return dict(build_model(self.config.stage_model(self.number(name)), seed=self.config.seed).named_parameters())

    def check(self, name: str, begun: dict[str, Tensor]) -> None:
        """Check that the stage began with the weights ``begun``, trained its components, and changed no others.

        The final weights of trained components are no evidence of their initial values. So compare the loss of the
        first step with that of a plain model with the weights ``begun``, on the first batch of a new loader.
        """
        number = self.number(name)
        stage, model = self.config.stages[number], build_model(self.config.stage_model(number), seed=None)
        trained = {id(p) for part, values in model.components().items() if part in stage.train for p in values}
        after = self.after(name)
        assert set(after) == set(begun)
        for key, parameter in model.named_parameters():
            assert torch.equal(after[key], begun[key]) == (id(parameter) not in trained), key
        model.load_state_dict(begun, strict=False)
        data, spec = self.config.stage_data(number), self.config.stage_media(number)
        state = read_state(self.paths[number - 1]).loader if self.config.continues(number) else None
        with Loader(data, spec, seed=self.config.seed, state=state) as loader, torch.no_grad():
            micros = next(loader).microbatches
            loss = sum(float(NextToken()(model, micro).loss_sum) for micro in micros)
        found = self.lines[number * STEPS]["loss"]
        assert found == pytest.approx(loss / sum(micro.weight for micro in micros), rel=1e-5)


@pytest.fixture(scope="module")
def stages(folders: tuple[Run, Run]) -> Stages:
    return Stages(folders[1])


def test_a_tower_joins_a_text_model(stages: Stages) -> None:
    assert set(stages.before("see")) == {n for n in stages.after("see") if n.startswith(("decoder.", "head."))}
    stages.check("see", {**stages.first_values("see"), **stages.before("see")})


def test_the_decoder_is_swapped_and_what_was_trained_around_it_stays(folders: tuple[Run, Run], stages: Stages) -> None:
    (path,) = list_checkpoints(folders[0].folder / "checkpoints")
    donor = build_model(stages.config.stage_model(0), seed=None)
    load_weights(donor, path)
    decoder = dict(donor.named_parameters())
    assert not any(torch.equal(value, stages.before("swap")[name]) for name, value in decoder.items())
    stages.check("swap", {**stages.before("swap"), **decoder})


def test_another_rope_base(stages: Stages) -> None:
    number = stages.number("base")
    bases = [stages.config.stage_model(n).decoder.rope for n in range(len(stages.names))]
    assert [rope.theta for rope in bases if rope] == [10_000] * number + [500_000] * (len(bases) - number)
    stages.check("base", stages.before("base"))


def test_longer_sequences(stages: Stages) -> None:
    tokens = [line["tokens"] for line in stages.lines]
    begin = stages.number("context") * STEPS
    assert max(tokens[:begin]) <= 4 * 64 < min(tokens[begin : begin + STEPS])
    stages.check("context", stages.before("context"))


def test_larger_pictures_and_a_resampled_position_table(stages: Stages) -> None:
    begun = stages.before("pictures")
    old = begun[POSITIONS]
    plane = old[1:].T.reshape(1, -1, 4, 4)
    table = F.interpolate(plane, size=(6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    found = stages.after("pictures")[POSITIONS]
    torch.testing.assert_close(found, torch.cat([old[:1], table]), rtol=1e-6, atol=1e-7)
    stages.check("pictures", {**begun, POSITIONS: found})
    with Loader(stages.config.stage_data(5), stages.config.stage_media(5), seed=stages.config.seed) as loader:
        assert {grid for micro in next(loader).microbatches for grid in micro.media["image"].grids} == {(1, 6, 6)}


def test_another_optimizer(stages: Stages) -> None:
    manifests = [read_manifest(path) for path in stages.paths]
    assert [manifest.optimizer for manifest in manifests[5:8]] == ["adamw", "muon", "adamw"]
    stages.check("muon", stages.before("muon"))


def test_other_learning_rates(stages: Stages) -> None:
    begin = stages.number("rates") * STEPS
    assert [stages.lines[begin][f"lr/{name}"] for name in ("vision", "connector")] == pytest.approx(
        [0.55e-6, 0.55e-2], rel=1e-3
    )  # The first of two steps of a cosine schedule that ends at a tenth.
    stages.check("rates", stages.before("rates"))
    old, new = stages.before("rates"), stages.after("rates")
    moved = {
        part: max((new[name] - old[name]).abs().max().item() for name in old if name.startswith(part))
        for part in ("vision", "connector")
    }
    # AdamW's first steps have about the size of the learning rate, for any gradient.
    assert moved["vision"] < 3e-6
    assert moved["connector"] > 5e-3


def test_new_rows_only(stages: Stages) -> None:
    """The old rows are bitwise unchanged, with and without weight decay."""
    number = stages.number("words")
    assert stages.config.stages[number].optimizer.weight_decay > 0
    assert set(stages.after("words")) - set(stages.before("words")) == NEW
    first = stages.first_values("words")
    stages.check("words", {**stages.before("words"), **{name: first[name] for name in NEW}})
    assert stages.lines[number * STEPS]["lr/extra_tokens"] > 0


def test_feed_forwards_become_experts(stages: Stages) -> None:
    """The loss of the first step is that of the dense model, to which ``check`` compares a model with experts."""
    old, first = stages.before("experts"), stages.first_values("experts")
    begun = {name: values for name, values in old.items() if ".mlp." not in name or not name.startswith("decoder.")}
    for name in set(first) - set(begun):
        path = name.rpartition(".experts.")[0]
        if name.endswith(".gate.weight"):
            begun[name] = first[name]
        elif name.endswith(".down_proj"):
            begun[name] = old[f"{path}.down_proj.weight"].expand(4, -1, -1)
        else:
            begun[name] = torch.cat([old[f"{path}.gate_proj.weight"], old[f"{path}.up_proj.weight"]]).expand(4, -1, -1)
    stages.check("experts", begun)
    number = stages.number("experts")
    dense = build_model(stages.config.stage_model(number - 1), seed=None)
    dense.load_state_dict(old, strict=False)
    with Loader(stages.config.stage_data(number), stages.config.stage_media(number), seed=1) as loader, torch.no_grad():
        micros = next(loader).microbatches
        loss = sum(float(NextToken()(dense, micro).loss_sum) for micro in micros) / sum(m.weight for m in micros)
    assert stages.lines[number * STEPS]["loss"] == pytest.approx(loss, rel=1e-5)


def test_data_and_images_decide_whether_the_stream_goes_on(stages: Stages) -> None:
    fresh = [name for number, name in enumerate(stages.names) if not stages.config.continues(number)]
    # Only `context` changes the packing. `pictures` changes crops and data, and the later stages keep its changes. A
    # token of `experts` costs more, so a patch costs relatively less, which changes the packs.
    assert fresh == ["read", "see", "context", "pictures", "experts"]


def test_the_sample_log_has_every_step_and_replays_lost_ones(stages: Stages, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stages.folder, copy, ignore=shutil.ignore_patterns("checkpoints"))
    lookup, last = SampleLookup(stages.folder), STEPS * len(stages.names)
    written = {step: lookup.samples_of(step) for step in range(1, last + 1)}
    assert {found.source for found in written.values()} == {Evidence.SAMPLE_LOG}
    assert [written[step].stage for step in written] == [name for name in stages.names for _ in range(STEPS)]
    for file in (copy / "sample_log").iterdir():
        file.unlink()
    replayed = SampleLookup(copy)
    for step, found in written.items():
        again = replayed.samples_of(step)
        assert again.source is Evidence.REPLAY
        places = [[(row.lane, row.place, row.dataset, row.sample) for row in each.rows] for each in (again, found)]
        assert places[0] == places[1], step


def test_every_checkpoint_is_opened_with_the_model_of_its_stage(
    stages: Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number, path in enumerate(stages.paths):
        trained = open_trained(path)
        assert (trained.stage, trained.model.config) == (number, stages.config.stage_model(number))
    picture = tmp_path / "picture.png"
    Image.new("RGB", (90, 60), "red").save(picture)
    for path in (stages.folder, stages.paths[stages.number("see")]):
        assert main(["generate", str(path), "--image", str(picture), "--json"]) == 0
        assert "text" in json.loads(capsys.readouterr().out)


def test_a_stage_that_was_killed_before_its_first_checkpoint_takes_its_weights_again(
    folders: tuple[Run, Run], stages: Stages, tmp_path: Path
) -> None:
    number = stages.number("swap")
    again = tmp_path / "again"
    shutil.copytree(stages.folder, again)
    (again / "result.json").unlink()
    for path in list_checkpoints(again / "checkpoints")[number:]:
        shutil.rmtree(path)
    steps = (number + 1) * STEPS
    run = start(again, 2, f"stages.2.weights.0.checkpoint={folders[0].folder}", f"max_steps={steps}")
    run.finish()
    assert curve(run) == curve(folders[1])[:steps]


def test_sources_are_checked_before_training_and_only_while_they_are_needed(
    folders: tuple[Run, Run], tmp_path: Path
) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    donor, number, begin = folders[0].folder, 2, 2 * STEPS
    to_come, past = TrainState(begin, number - 1, STEPS), TrainState(begin + 1, number, 1)

    def check(path: Path, state: TrainState, *words: str) -> None:
        config = load(CHANGES, [f"stages.2.weights.0.checkpoint={path}", *words], RunConfig).value
        check_stage_weights(config, world, state)

    for state in (TrainState(), to_come):
        check(donor, state)
        check(list_checkpoints(donor / "checkpoints")[0], state)
        with pytest.raises(ConfigError, match=r"^stages\.2\.weights\.0\.checkpoint=.*absent has no checkpoints"):
            check(tmp_path / "absent", state)
        check(tmp_path / "absent", state, f"max_steps={begin}")  # The run ends before that stage.
    check(tmp_path / "absent", past)
    with pytest.raises(ConfigError, match=r"weights\.0\.checkpoint=.* holds no average of the weights"):
        check(donor, to_come, "stages.2.weights.0.ema=true")
    with pytest.raises(ConfigError, match=r"holds no parameter of vision"):
        check(donor, to_come, "stages.2.weights.0.components=[vision]")
    cut = tmp_path / "cut"
    shutil.copytree(donor, cut)
    (next((cut / "checkpoints").iterdir()) / "rank-00000.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint is complete"):
        check(cut, to_come)


def test_frozen_parameters_have_no_moments(stages: Stages) -> None:
    notes = json.loads((stages.paths[stages.number("words")] / "rank-00000.json").read_text())["tensors"]
    kinds: dict[str, set[str]] = {}
    for key in notes:
        name, _, kind = key.rpartition("|")
        kinds.setdefault(kind, set()).add(name)
    assert kinds["master"] == kinds["exp_avg"] == kinds["exp_avg_sq"] == NEW
    assert not kinds["frozen"] & NEW
