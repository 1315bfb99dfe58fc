"""The order of the data on many ranks: every lane once, the same samples, and findings where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.loader.loader import Loader
from data_pipeline.order.state import LaneState, StreamPosition
from mmscale.cli.run_file import load_run
from mmscale.rehearse import data_order
from mmscale.rehearse.data_order import PART, deal, rehearse_order
from mmscale.rehearse.report import Basis, Report
from mmscale.run.config import RunConfig

QUICKSTART = Path("configs/quickstart.yaml")


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run(QUICKSTART, ["data.lanes=10", "data.packing.max_tokens=128", "data.packing.max_documents=4"]).value


def rehearsed(run: RunConfig, worlds: list[int]) -> tuple[Report, data_order.RehearsedData | None]:
    report = Report()
    data = rehearse_order(
        report,
        run.data,
        run.media_spec,
        run.seed,
        worlds,
        micro_lanes=2,
        draws=5,
        packed_lanes=5,
        advance=lambda: None,
    )
    return report, data


def test_many_ranks_draw_and_pack_what_one_rank_does(run: RunConfig) -> None:
    report, data = rehearsed(run, [6, 4, 1])
    assert data is not None
    equal = [figure for figure in report.figures if "equal one rank's" in figure.name]
    assert [figure.value for figure in equal] == [True] * 6
    assert [figure.basis for figure in equal] == [Basis.REAL] * 3 + [Basis.SCALED] * 3
    assert len(data.states) == 6
    with Loader(run.data.model_copy(update={"workers": 0}), run.media_spec, seed=run.seed) as loader:
        for step in range(3):
            batch = next(loader)
            for lane, documents in data.packs[step].items():
                assert documents == batch.drawn[lane]


def test_a_lane_that_loses_its_position_is_a_finding(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = data_order._Walk.resumed

    def forgetful(self: data_order._Walk, name: str, texts: list[str], world: int) -> data_order.States:
        states = dict(original(self, name, texts, world))
        states[0] = LaneState(StreamPosition.start(1))
        return states

    monkeypatch.setattr(data_order._Walk, "resumed", forgetful)
    report, _ = rehearsed(run, [6, 4])
    assert {finding.name for finding in report.findings} == {"idle-lanes", "order-differs-draws", "order-differs-packs"}


def test_the_remainder_of_the_lanes_becomes_dummy_packs() -> None:
    report = Report()
    deal(report, 10, 4, 2)
    values = {figure.name: figure.value for figure in report.figures}
    # Ranks 0 and 1 have three lanes and two microbatches; ranks 2 and 3 have two lanes and add a dummy.
    assert (values["lanes of a rank, fewest"], values["lanes of a rank, most"]) == (2, 3)
    assert (values["microbatches of every rank and step"], values["dummy packs of a step"]) == (2, 2)
    assert [finding.name for finding in report.findings] == ["idle-lanes"]


def test_fewer_lanes_than_ranks_are_a_finding_with_the_remedy(run: RunConfig) -> None:
    report, data = rehearsed(run, [16, 8])
    assert data is None
    (finding,) = report.findings
    assert (finding.name, finding.seen, finding.limit) == ("lanes-below-ranks", 16, 10)
    assert "data.lanes=32" in finding.message
    assert "--lanes 32" in finding.message


def test_a_data_set_without_a_manifest_is_left_out_openly(run: RunConfig) -> None:
    dataset = run.data.datasets[0].model_copy(update={"manifest": None})
    streamed = run.model_copy(update={"data": run.data.model_copy(update={"datasets": (dataset,)})})
    report, data = rehearsed(streamed, [2, 1])
    assert data is None
    assert report.value(PART, "not rehearsed").startswith("emoji: a data set without a manifest")
