"""Loading DeepSpeed's pickles runs no code and allocates nothing large; error messages give the reason."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint.export import export_weights
from mmscale.checkpoint.imports import import_checkpoint
from mmscale.checkpoint.imports.files import find_folder, load_pt
from mmscale.errors import CheckpointError

pytestmark = pytest.mark.fault


class Shell:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.touched),)


def model_states(**changes: Any) -> dict[str, Any]:
    """Return the content of a stage-1 file of one rank with one parameter."""
    return {
        "module": OrderedDict(weight=torch.arange(6.0).view(2, 3)),
        "buffer_names": [],
        "param_shapes": [OrderedDict(weight=torch.Size([2, 3]))],
        "shared_params": {},
        "dp_world_size": 1,
        "global_steps": 1,
        "ds_version": "0.19.8",
        **changes,
    }


def optim_states(**changes: Any) -> dict[str, Any]:
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "base_optimizer_state": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}},
            "param_groups": [{"params": [0]}],
        },
        "single_partition_of_fp32_groups": [torch.arange(8.0)],
        "param_slice_mappings": [OrderedDict(weight=fragment_address(numel=6, start=0))],
        "partition_count": [1],
        "zero_stage": 1,
        **changes,
    }
    return {"optimizer_state_dict": state}


def write(folder: Path, model: dict[str, Any], optimizer: dict[str, Any]) -> Path:
    folder.mkdir()
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    torch.save(optimizer, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_the_smallest_checkpoint_imports(tmp_path: Path) -> None:
    report = import_checkpoint(write(tmp_path / "a", model_states(), optim_states()), tmp_path / "run")
    assert (report.trained, report.optimizer_steps, report.layout) == (1, 1, "zero-1")


def test_a_class_that_is_not_listed_is_named_and_does_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    folder = write(tmp_path / "a", model_states(args=Shell(touched)), optim_states())
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt contains a pickled posix\.mkdir"):
        import_checkpoint(folder, tmp_path / "run")
    assert not touched.exists()
    # torch's weights_only accepts a bytearray, which would allocate the size that the file claims.
    folder = write(tmp_path / "b", model_states(), optim_states(note=bytearray(3)))
    with pytest.raises(CheckpointError, match=r"optim_states\.pt contains a pickled .*bytearray"):
        import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_name_built_on_the_stack_is_rejected(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "good.pt")
    hidden = pickle.dumps(os.mkdir, protocol=4)  # STACK_GLOBAL builds the class name from strings on the stack.
    _replace_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", hidden)
    with pytest.raises(CheckpointError, match=r"uses the pickle operation FRAME"):
        load_pt(tmp_path / "bad.pt")


def _replace_pickle(source: Path, target: Path, text: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, text if entry.filename.endswith("/data.pkl") else old.read(entry))


@pytest.mark.timeout(60)
def test_a_pickle_without_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": 1}, tmp_path / "good.pt")
    deep, step = 1_000_000, b"\x85"  # TUPLE1. Python hashes nested tuples by recursion and overflows its stack.
    pickles = {
        "tuples as a key": (b"\x80\x02})" + step * deep + b"K\x01s.", "nests deeper than 100"),
        "lists": (b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b".", "nests deeper than 100"),
        "itself": (b"\x80\x02]q\x00h\x00a.", "nests deeper than 100"),
        "in turn": (b"\x80\x02" + b"]q\x00" + b"]q\x01h\x00aq\x00" * 3 + b"h\x000.", "operation POP"),
        "doubled": (b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".", "holds more than 5000000"),
        "many": (b"\x80\x02" + b"]" * 300 + b".", "more than 200 operations"),
        "short": (b"\x80\x02\x86.", "damaged"),
    }
    for name, (text, message) in pickles.items():
        if name == "many":
            monkeypatch.setattr("mmscale.checkpoint.imports.files._MAX_OPERATIONS", 200)
        _replace_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", text)
        with pytest.raises(CheckpointError, match=message):
            load_pt(tmp_path / "bad.pt")
        monkeypatch.undo()
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_pt(tmp_path / "fifo.pt")


def _changed(held: Any, odd: Iterator[Any]) -> Iterator[Any]:
    """Yield copies of a tree, each with one node replaced by another value."""
    yield next(odd)
    if isinstance(held, dict):
        for key, child in held.items():
            yield from (
                type(held)(held, **{key: inner}) if isinstance(key, str) else {**held, key: inner}
                for inner in _changed(child, odd)
            )
    elif isinstance(held, list):
        for number, child in enumerate(held):
            yield from ([*held[:number], inner, *held[number + 1 :]] for inner in _changed(child, odd))


def test_any_value_at_any_position_is_imported_or_rejected(tmp_path: Path) -> None:
    odd = itertools.cycle([None, "x", -1, 2**70, float("nan"), [], {}, [[1]], True, torch.ones(2, 0), (3, "y")])
    good = (model_states(), optim_states())
    changed = [(model, good[1]) for model in _changed(good[0], odd)]
    changed += [(good[0], optimizer) for optimizer in _changed(good[1], odd)]
    for number, (model, optimizer) in enumerate(changed):
        folder = write(tmp_path / f"a{number}", model, optimizer)
        with contextlib.suppress(CheckpointError):
            import_checkpoint(folder, tmp_path / f"run{number}")


def test_claimed_sizes_are_checked_before_memory_is_allocated(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        text = archive.read("good/data.pkl")
    huge = b"\x8a\x06" + struct.pack("<q", 1 << 46)[:6]  # 2**46 values, as a pickled integer.
    storage, shape, stride = b"K\x04t", b"K\x04\x85", b"K\x01\x85"
    assert all(text.count(part) == 1 for part in (storage, shape, stride))
    claims = {
        "shape": text.replace(shape, huge + b"\x85"),
        "both": text.replace(storage, huge + b"t").replace(shape, huge + b"\x85"),
        "stride": text.replace(shape, huge + b"\x85").replace(stride, b"K\x00\x85"),
    }
    for name, forged in claims.items():
        _replace_pickle(tmp_path / "good.pt", tmp_path / f"{name}.pt", forged)
        with pytest.raises(CheckpointError, match=r"cannot be read|claims more values"):
            load_pt(tmp_path / f"{name}.pt")
    _replace_pickle(tmp_path / "good.pt", tmp_path / "deflated.pt", text, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or truncated"):
        load_pt(tmp_path / "deflated.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_pt(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        ({"param_shapes": [OrderedDict(weight=torch.Size([2, 4]))]}, {}, r"6 of the 8 values of weight\|master"),
        ({"param_shapes": [OrderedDict(other=torch.Size([2, 3]))]}, {}, "weight is not listed"),
        ({"dp_world_size": 2}, {}, r"of the ranks \[0\], expected those of all 2 ranks"),
        ({"param_shapes": 3}, {}, "'param_shapes' is missing or has another type"),
        (
            {},
            {"single_partition_of_fp32_groups": [torch.arange(4.0)]},
            r"weight\|master needs the values 0:6, the tensor has 4",
        ),
        ({}, {"partition_count": [2]}, "split in"),
        ({}, {"base_optimizer_state": [1]}, "'base_optimizer_state' is missing or has another type"),
        ({}, {"base_optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(8)}}}}, "only the state of Adam"),
        (
            {},
            {"base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}}}},
            "has no step count",
        ),
        ({}, {"single_partition_of_fp32_groups": [torch.arange(8, dtype=torch.int16)]}, "number format of weight"),
    ],
)
def test_inconsistent_files_are_rejected(
    tmp_path: Path, model: dict[str, Any], optimizer: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "a", model_states(**model), optim_states(**optimizer))
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(folder, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*"))


def test_folders_that_cannot_be_imported_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="found: none"):
        find_folder(tmp_path)
    for name in ("one", "two"):
        write(tmp_path / name, model_states(), optim_states())
    with pytest.raises(CheckpointError, match="found: one, two"):
        find_folder(tmp_path)
    (tmp_path / "one" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="tensor-parallel"):
        find_folder(tmp_path / "one")
    (tmp_path / "two" / "layer_00-model_states.pt").touch()
    with pytest.raises(CheckpointError, match="pipeline"):
        find_folder(tmp_path / "two")


def _anonymous_bytes() -> int:
    """Return the memory of this process without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak increase of anonymous memory during ``work``, sampled every millisecond."""
    start = peak = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - start


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_neither_import_nor_export_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, numel = 16, 1 << 20  # 64 MiB of masters, twice that of moments.
    shapes = OrderedDict((f"w{index}", torch.Size([numel])) for index in range(count))
    flat = torch.ones(count * numel)
    optimizer = {
        "zero_stage": 3,
        "partition_count": 1,
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": flat, "exp_avg_sq": flat.clone()}}
        },
        "fp32_flat_groups": [flat.clone()],
    }
    model = model_states(module=OrderedDict(), param_shapes=[shapes])
    folder = write(tmp_path / "source", model, {"optimizer_state_dict": optimizer})
    del flat, optimizer
    monkeypatch.setattr("mmscale.checkpoint.export._CHUNK_VALUES", 1 << 18)
    limit_bytes = 44 << 20  # Checksums need 32 MiB at any size. The import copies 192 MiB, the export 64 MiB.
    assert _peak_bytes(lambda: import_checkpoint(folder, tmp_path)) < limit_bytes
    (path,) = tmp_path.glob("step-*")
    assert _peak_bytes(lambda: export_weights(path, tmp_path / "out")) < limit_bytes


def test_an_error_is_one_line_without_advice_to_trust_the_file(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "good.pt")
    pickles = (
        (pickle.dumps({"a": 2**3000}, protocol=2), "uses the pickle operation LONG4"),
        (b"\x80\x02]K\x01b.", r"bad\.pt cannot be read: Can only build"),  # Only torch rejects this BUILD of a list.
    )
    for text, message in pickles:
        _replace_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", text)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_pt(tmp_path / "bad.pt")
        assert not [word for word in ("\n", "weights_only", "https") if word in str(caught.value)]
