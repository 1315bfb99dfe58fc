"""Descriptions of samples, the files that a lookup reads, and its errors."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import file_server
from data_pipeline.config import DataConfig
from data_pipeline.errors import SampleLogError, StateError
from data_pipeline.history.sample_steps import SampleSteps
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.order.lanes import OrderConfig
from data_pipeline.order.state import Cursor, LaneState, LoaderState, StreamPosition
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.storage.config import CacheConfig, StorageConfig
from mmscale.cli.main import main
from mmscale.config import dump
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import Evidence, SampleLookup
from tests.data_pipeline.conftest import WriteSet, captioned, picture
from tests.trace.conftest import WRITTEN, copied, play, truth, write


def test_shard_and_key_are_told_without_the_shards(
    run: Path,
    steps: list[tuple[int, StepBatch]],
    config: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = config.data.tokenizer.model_copy(update={"path": run / "gone"})
    gone_data = copied(config.data, tmp_path / "data").model_copy(update={"tokenizer": gone})
    (run / "config.yaml").write_text(dump(config.model_copy(update={"data": gone_data})))
    for tar in tmp_path.glob("data/*/*.tar"):
        tar.unlink()
    assert main(["data", "trace", str(run), "--step", "20", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    original = Path(config.data.datasets[0].indexed).parents[1]
    expected = [
        (*place, shard.replace(str(original), f"{tmp_path}/data"), key) for *place, shard, key in truth(steps[19][1])
    ]
    assert [(r["dataset"], r["epoch"], r["sample"], r["shard"], r["key"]) for r in rows] == expected
    assert all(row["notes"] and row["text"] is None for row in rows)
    *_, shard, key = expected[0]
    assert main(["data", "trace", str(run), "--sample", f"{shard}/{key}"]) == 0
    assert "step 20  " in capsys.readouterr().out


def test_data_sets_of_a_server_are_told_and_shown(config: RunConfig, data: DataConfig, tmp_path: Path) -> None:
    """Also without the shards: shard and key need only the indexes and the sample log."""
    folder = tmp_path / "data"
    copied(data, folder)
    with file_server(folder).running() as server:
        datasets = tuple(
            type(one).model_validate(one.model_dump() | {"manifest": f"{server.url}/{one.name}/{one.name}.manifest"})
            for one in data.datasets
        )
        fields = {
            "datasets": datasets,
            "storage": StorageConfig(allow_http=True),
            "cache": CacheConfig(folder=tmp_path / "cache"),
        }
        remote = config.model_copy(update={"data": data.model_copy(update=fields), "stages": config.stages[:1]})
        played = play(remote, 8)
        run = write(remote, played)
        for number in (6, 10):
            lookup = SampleLookup(run)
            samples = lookup.catalog(lookup.loader_of(number))
            shown = [samples.describe(row, 1) for row in lookup.samples_of(number).rows]
            assert all(entry.text and not entry.notes for entry in shown)
            if number == 6:
                found = [(e.row.dataset, e.row.epoch, e.row.sample, e.shard, e.key) for e in shown]
                assert found == truth(played[5][1])
            shard = shown[0].shard
            assert number in [one.step for one in lookup.steps_of(shard, shown[0].key, until=10)]
            assert shard.startswith("http://127.0.0.1:")
        for tar in folder.glob("*/*.tar"):
            tar.unlink()
        shutil.rmtree(tmp_path / "cache")
        lookup = SampleLookup(run)
        samples = lookup.catalog(lookup.loader_of(6))
        shown = [samples.describe(row, 1) for row in lookup.samples_of(6).rows]
        assert [(e.row.dataset, e.row.epoch, e.row.sample, e.shard, e.key) for e in shown] == truth(played[5][1])
        assert all(len(entry.notes) == 1 and entry.text_spans is None for entry in shown)


def test_samples_without_an_index_are_known_by_their_place(config: RunConfig, data: DataConfig) -> None:
    captions = data.datasets[0]
    tars = str(Path(captions.manifest or "").parent / "part-{00000..00003}.tar")
    fields = captions.model_dump() | {"name": "plain", "manifest": None, "shards": (tars,)}
    plain = data.model_copy(update={"datasets": (data.datasets[1], type(captions).model_validate(fields))})
    config = config.model_copy(update={"data": plain})
    played = play(config, WRITTEN)
    run = write(config, played)
    lookup = SampleLookup(run)
    expected: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    samples = lookup.catalog(lookup.loaders[0])
    for number, (_, batch) in enumerate(played, 1):
        rows = lookup.samples_of(number).rows
        assert [(row.dataset, row.epoch, row.sample) for row in rows] == [one[:3] for one in truth(batch)]
        for row in rows:
            if row.dataset == "plain":
                expected[samples.where(row.dataset, row.sample)].add((number, row.epoch))
    origins = [one for one in truth(played[4][1]) if one[0] == "plain"]
    shown = [samples.describe(row) for row in lookup.samples_of(5).rows if row.dataset == "plain"]
    assert [entry.key for entry in shown] == [key for *_, key in origins] != []
    for shard, place in sorted(expected)[::6]:
        assert {(one.step, one.epoch) for one in lookup.steps_of(shard, place)} == expected[shard, place]
    with pytest.raises(SampleLogError, match="its future steps are unknown"):
        list(lookup.steps_of(shard, "#0", until=60))
    with pytest.raises(SampleLogError, match="give the number of the sample"):
        list(lookup.steps_of(shard, "000003"))


@pytest.mark.parametrize("pattern", ["{0}", "{{{0},pipe:cat {1}}}"], ids=["plain", "in braces"])
def test_a_trace_runs_no_command_of_the_configuration(
    config: RunConfig, data: DataConfig, tmp_path: Path, pattern: str
) -> None:
    tar, trail = Path(data.datasets[0].indexed).parent / "part-00000.tar", tmp_path / "trail"
    command = f"pipe:touch {trail}; cat {tar}"
    shards = (pattern.format(command, tar.with_name("part-00001.tar")),)
    fields = data.datasets[0].model_dump() | {"manifest": None, "shards": shards}
    one = data.model_copy(update={"datasets": (type(data.datasets[0]).model_validate(fields),), "lanes": 1})
    config = config.model_copy(update={"data": one})
    run = write(config, play(config, 4))
    trail.unlink()
    assert main(["data", "trace", str(run), "--step", "2", "--html", str(tmp_path / "page.html")]) == 0
    assert main(["data", "trace", str(run), "--step", "8"]) == 1
    assert main(["data", "trace", str(run), "--sample", f"{command}/#0"]) == 0
    assert not trail.exists()


def test_text_and_pictures_are_those_of_the_document(run: Path, config: RunConfig, tmp_path: Path) -> None:
    lookup = SampleLookup(run)
    found = lookup.samples_of(20)
    samples = lookup.catalog(lookup.loader_of(20))
    shown = [samples.describe(row, max_thumbnails=3) for row in found.rows]
    captions = [entry for entry in shown if entry.row.dataset == "captions"]
    assert captions
    for entry in captions:
        number = int(entry.key)
        assert entry.text in (f"<s>[image]thing {number}</s>", "<s>[image]" + "x" * (number % 23 + 1) + "</s>")
        assert len(entry.thumbnails) == 1
        assert entry.thumbnails[0].startswith(b"\xff\xd8")
        assert entry.notes == ()
    assert all(entry.thumbnails == () for entry in shown if entry.row.dataset in ("text", "long"))


def test_what_will_be_left_out_is_foreseen_where_that_shows_without_decoding(
    config: RunConfig,
    data: DataConfig,
    write_set: WriteSet,
) -> None:
    empty = [{"json": b"{}"} if i % 5 == 0 else captioned(i) for i in range(23)]
    one = data.datasets[0].model_copy(update={"manifest": write_set("empty", empty)})
    config = config.model_copy(update={"data": data.model_copy(update={"datasets": (one,)})})
    played = play(config, 20)
    lookup = SampleLookup(write(config, played[:6]))
    shard = next(Path(one.manifest).parent.glob("*-00000.tar"))
    expected = {
        (number, skip.epoch)
        for number, (_, batch) in enumerate(played, 1)
        for skip in batch.skipped
        if skip.key == "000005"
    }
    found = list(lookup.steps_of(str(shard), "000005", until=20))
    assert {(one.step, one.epoch) for one in found} == expected
    assert all(one.skipped for one in found)
    assert {one.source for one in found} == {Evidence.SAMPLE_LOG, Evidence.REPLAY}
    for number in (7, 12, 20):
        left_out = {(record["epoch"], record["index"]) for record in lookup.samples_of(number).skipped}
        assert left_out == {(skip.epoch, skip.index) for skip in played[number - 1][1].skipped}


def test_learned_text_is_told_from_the_prompt(config: RunConfig, data: DataConfig) -> None:
    asked = {"template": {"kind": "caption", "prompts": ["it is"], "answers": [" {name}!"]}}
    fields = data.datasets[0].model_dump() | asked
    one = data.model_copy(update={"datasets": (type(data.datasets[0]).model_validate(fields),)})
    lookup = SampleLookup(write(config.model_copy(update={"data": one}), []))
    samples = lookup.catalog(lookup.loader_of(1))
    for row in lookup.samples_of(1).rows:
        spans = samples.describe(row).text_spans or ()
        said = [(one.kind, one.text) for one in spans if one.kind != "image"]
        assert said == [("read", "<s>"), ("read", "it is"), ("learned", f" thing {row.sample}!</s>")]


def test_an_estimate_follows_weights_that_change(data: DataConfig) -> None:
    """One lane draws one sample of each data set per step until step 20; then the first data set pauses until 50."""
    captions, text = data.datasets[:2]
    changes = [{"from_step": 0, "weight": 1}, {"from_step": 20, "weight": 0}, {"from_step": 50, "weight": 3}]
    pausing = type(captions).model_validate(captions.model_dump() | {"weight": changes})
    other = text.model_copy(update={"weight": 1})
    one = data.model_copy(update={"datasets": (pausing, other), "lanes": 1})
    sizes = {"captions": 41, "text": 17}
    where = SampleSteps(one, 1, "captions", 3, sizes)
    state = LoaderState("", 10, {0: LaneState(StreamPosition.start(2))}, ("captions", "text"))

    def after(draws: int) -> int | None:
        return where.estimate(state, 0, Cursor(0, 0, draws), draws_per_step=2.0)

    assert (after(0), after(9), after(10)) == (11, 20, 21)
    assert after(16) == 50 + 6 / 1.5 + 1  # Ten by step 20, the others at three quarters of two draws per step.
    ending = type(captions).model_validate(captions.model_dump() | {"weight": changes[:2]})
    where = SampleSteps(one.model_copy(update={"datasets": (ending, other)}), 1, "captions", 3, sizes)
    assert after(16) is None


def test_the_page_shows_hostile_text_as_text(
    config: RunConfig,
    data: DataConfig,
    write_set: WriteSet,
    tmp_path: Path,
) -> None:
    evil = "<script>alert(1)</script>\"'&"
    manifest = write_set("evil", [{"png": picture(i), "txt": evil.encode()} for i in range(5)])
    one = data.datasets[0].model_copy(update={"manifest": manifest})
    config = config.model_copy(update={"data": data.model_copy(update={"datasets": (one,)})})
    run = write(config, play(config, 4))
    page = tmp_path / "page.html"
    assert main(["data", "trace", str(run), "--step", "2", "--html", str(page)]) == 0
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "data:image/jpeg;base64," in text
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")


def test_a_changed_configuration_is_named(run: Path, config: RunConfig) -> None:
    changed = config.model_copy(update={"seed": config.seed + 1})
    (run / "config.yaml").write_text(dump(changed))
    with pytest.raises(StateError, match="changed since: seed"):
        SampleLookup(run).samples_of(55)
    shorter = (config.stages[0].model_copy(update={"steps": 10}), config.stages[1])
    (run / "config.yaml").write_text(dump(config.model_copy(update={"stages": shorter})))
    with pytest.raises(SampleLogError, match="its data began at step 10, according to the sample log at 14"):
        SampleLookup(run).samples_of(55)


def test_a_data_set_that_joins_a_running_mixture_moves_nothing(config: RunConfig, data: DataConfig) -> None:
    """The new data set is the first one, so that the numbers of the others change."""
    captions, text, _, long = data.datasets
    before = config.model_copy(
        update={
            "stages": (StageConfig(name="only", steps=60),),
            "data": data.model_copy(update={"datasets": (text, long)}),
        }
    )
    changes = [{"from_step": 20, "weight": 2}]
    joining = type(captions).model_validate(captions.model_dump() | {"weight": changes})
    after = before.model_copy(update={"data": data.model_copy(update={"datasets": (joining, text, long)})})
    with Loader(before.data, before.media_spec, seed=before.seed) as loader:
        played = [(0, next(loader)) for _ in range(20)]
    with Loader(after.data, after.media_spec, seed=after.seed, state=played[-1][1].state) as loader:
        played += [(0, next(loader)) for _ in range(40)]
    lookup = SampleLookup(write(after, played))
    expected: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for number, (_, batch) in enumerate(played, 1):
        assert [(row.dataset, row.epoch, row.sample) for row in lookup.samples_of(number).rows] == [
            t[:3] for t in truth(batch)
        ]
        for _, epoch, _, shard, key in truth(batch):
            expected[shard, key].add((number, epoch))
    for shard, key in sorted(expected)[::5]:
        found = {(one.step, one.epoch) for one in lookup.steps_of(shard, key) if one.source is Evidence.SAMPLE_LOG}
        assert found == expected[shard, key]
    (lookup.config.run_dir / "config.yaml").write_text(dump(before))
    with pytest.raises(SampleLogError, match="no data set captions"):
        list(SampleLookup(lookup.config.run_dir).steps_of(shard, key))


def test_another_order_or_manifest_names_no_wrong_sample(
    run: Path, config: RunConfig, steps: list[tuple[int, StepBatch]], tmp_path: Path
) -> None:
    _, _, _, shard, key = truth(steps[19][1])[0]
    for name, data in (
        ("seed", config.data),
        ("lanes", config.data.model_copy(update={"lanes": 5})),
        ("order", config.data.model_copy(update={"order": OrderConfig(block_size=2)})),
    ):
        changed = config.model_copy(update={"data": data, "seed": config.seed + (name == "seed")})
        (run / "config.yaml").write_text(dump(changed))
        with pytest.raises(SampleLogError, match=f"since these steps were done: {name}"):
            list(SampleLookup(run).steps_of(shard, key))
    changed = config.model_copy(update={"data": copied(config.data, tmp_path / "data")})
    (run / "config.yaml").write_text(dump(changed))
    manifest = Path(changed.data.datasets[0].indexed)
    write_manifest(manifest, sorted(manifest.parent.glob("*.tar"), reverse=True))
    lookup = SampleLookup(run)
    samples = lookup.catalog(lookup.loader_of(20))
    for row, (dataset, *_, key) in zip(lookup.samples_of(20).rows, truth(steps[19][1]), strict=True):
        shown = samples.describe(row)
        if dataset == "captions":
            assert (shown.shard, shown.key, shown.text_spans) == ("", "", None)
            assert "captions.manifest changed since this step was logged" in shown.notes[0]
        else:
            assert shown.key == key


def test_wrong_use_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["--step", "1", "--sample", "a.tar/b"], "either --step N or --sample"),
        ([], "either --step N or --sample"),
        (["--sample", "nothing"], "expected SHARD/KEY"),
        (["--sample", "a.tar/b", "--lane", "1"], "need --step"),
        (["--step", "1", "--until", "9"], "needs --sample"),
    ):
        assert main(["data", "trace", str(run), *words]) == 2
        assert told in " ".join(capsys.readouterr().err.split()).replace("│ ", "")
    assert main(["data", "trace", str(run), "--sample", "absent.tar/b"]) == 1
    assert "no data set of this run has a shard absent.tar" in capsys.readouterr().err
    assert main(["data", "trace", str(tmp_path), "--step", "1"]) == 2
    assert "no run folder" in capsys.readouterr().err
    damaged = run / "sample_log" / "steps-0000000005-0000000008.samples"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert main(["data", "trace", str(run), "--step", "6"]) == 1
    assert "steps-0000000005-0000000008.samples: damaged" in capsys.readouterr().err
    assert main(["data", "trace", str(run), "--step", "9"]) == 0


def test_a_folder_that_was_moved_is_found_by_name_of_the_shard(run: Path, tmp_path: Path, config: RunConfig) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    lookup = SampleLookup(moved)
    row = lookup.samples_of(3).rows[0]
    shard, key = lookup.catalog(lookup.loader_of(3)).where(row.dataset, row.sample)
    long: Any = [(one.step, one.epoch) for one in lookup.steps_of(shard, key)]
    assert long == [(one.step, one.epoch) for one in lookup.steps_of("/".join(Path(shard).parts[-2:]), key)]


def test_a_report_has_a_page_of_the_samples_of_each_loss_spike(
    run: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 20 is in the sample log; step 55 is not, so the report gives the command for it."""
    lines = [
        {"step": step, "loss": 9.0 if step in (20, 55) else 2.0 + 0.01 * (step % 3), "seconds": 1.0, "tokens": 8}
        for step in range(1, 61)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().err == ""
    pages = sorted((run / "report/steps").iterdir())
    assert [page.name for page in pages] == ["step-00000020.html"]
    text = pages[0].read_text()
    rows = SampleLookup(run).samples_of(20).rows
    assert text.count("<article") == min(len(rows), 24)
    with_loss = [row.loss for row in rows if row.loss is not None]
    assert with_loss
    assert f"loss {max(with_loss):.3f}" in text
    report = (run / "report.html").read_text()
    assert 'href="report/steps/step-00000020.html"' in report
    assert "mmscale data trace RUN --step 55" in report


def test_a_damaged_sample_log_costs_the_page_of_a_spike_and_not_the_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": step, "loss": 9.0 if step == 20 else 2.0, "seconds": 1.0} for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for path in (run / "sample_log").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert main(["report", str(run)]) == 0
    assert "no page of the loss spike at step 20: " in capsys.readouterr().err
    assert "mmscale data trace RUN --step 20" in (run / "report.html").read_text()
