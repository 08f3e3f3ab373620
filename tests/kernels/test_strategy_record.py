"""What was timed, as a file: keys, versions, damaged and shared files. With made-up times, on no GPU."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from fused_s2lora.kernels import strategy_record
from fused_s2lora.kernels.choice import Chooser
from fused_s2lora.kernels.strategy_record import (
    FROZEN,
    Record,
    Shape,
    StrategyFile,
    committed_table,
    record_from,
    rows_bucket,
    section_of,
    strategies_path,
)
from tests.kernels.choices import CANDIDATES, FEW_ROWS, FIELDS, GPU, MS, SHAPE, Timer, forbidden

EIGHT_ROWS = Shape(16, *FIELDS)


def pick_both(chooser: Chooser) -> list[str]:
    return [chooser.pick("auto", shape, GPU, CANDIDATES) for shape in (SHAPE, FEW_ROWS) for _ in range(3)]


def assert_one_warning(chooser: Chooser, path: Path) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        picked = pick_both(chooser)
    assert picked == ["fused"] * 6
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(0, 16), (1, 16), (16, 16), (17, 32), (1500, 2048), (24_000, 32_768), (32_769, 65_536), (10**6, 65_536)],
)
def test_rows_are_bucketed(rows, bucket):
    assert rows_bucket(rows) == bucket


def test_keys_tell_every_field():
    assert SHAPE.key == "rows<=2048 768->3072 rank 8 x1 bfloat16 weights float32 forward+backward"
    changed = [
        Shape(**{**SHAPE.__dict__, name: value})
        for name, value in {
            "rows_bucket": 65_536, "inputs": 1, "outputs": 2, "rank": 3, "group": 2, "dtype": torch.float16,
            "weight_dtype": torch.bfloat16, "needs_gradient": False,
        }.items()
    ]  # fmt: skip
    assert len({shape.key for shape in (SHAPE, *changed)}) == 9
    assert changed[0].key.startswith("rows>32768 ")


def test_remembered_on_disk_and_read_by_the_next_process(make, path):
    make().pick("auto", SHAPE, GPU, CANDIDATES)
    assert make(forbidden).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    ((section, records),) = json.loads(path.read_text()).items()
    assert section.startswith("GPU A | torch ")
    assert records == {SHAPE.key: {"strategy": "fused", "ms": MS, "errors": {}}}
    assert sorted(file.name for file in path.parent.iterdir()) == ["strategies.json", "strategies.lock"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("torch.__version__", "99"), ("triton.__version__", "99"), ("_state_of_kernels", lambda: "89abcdef")],
)
def test_another_version_times_anew_and_keeps_the_old(make, path, monkeypatch, name, value):
    make().pick("auto", SHAPE, GPU, CANDIDATES)
    monkeypatch.setattr(f"fused_s2lora.kernels.strategy_record.{name}", value)
    timer = Timer()
    make(timer).pick("auto", SHAPE, GPU, CANDIDATES)
    assert timer.asked == [SHAPE]
    assert len(json.loads(path.read_text())) == 2


def test_the_committed_table_is_sound():
    for records in committed_table().values():
        for value in records.values():
            record = record_from(value)
            assert record is not None
            assert "reference" in record.ms
            assert record == Record.of(record.ms, record.errors)


@pytest.mark.parametrize("content", ["{", "[]", '{"GPU A": 3}', "\xff", "[" * 100_000], ids=lambda text: text[:12])
def test_a_corrupt_file_costs_one_warning(make, path, content):
    path.parent.mkdir()
    path.write_bytes(content.encode("latin1"))
    timer = Timer()
    chooser = make(timer)
    assert_one_warning(chooser, path)
    assert timer.asked == [SHAPE, FEW_ROWS]
    assert path.read_bytes() == content.encode("latin1")


DAMAGED = {
    "null": None,
    "no times": {"strategy": "fused"},
    "no time of its own": {"strategy": "split", "ms": MS},
    "a list": {"strategy": ["fused"], "ms": MS},
    "frozen": {"strategy": FROZEN, "ms": MS},
    **{str(ms)[:6]: {"strategy": "fused", "ms": {**MS, "fused": ms}} for ms in ("fast", float("nan"), 0, -1, 10**400)},
}


@pytest.mark.parametrize("record", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_timed_anew(make, path, record):
    path.parent.mkdir()
    path.write_text(json.dumps({section_of("GPU A"): {SHAPE.key: record}}))
    timer = Timer()
    assert make(timer).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    assert make(forbidden).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    assert len(timer.asked) == 1


def test_an_unwritable_folder_costs_one_warning(make, path, monkeypatch):
    def read_only(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    timer = Timer()
    assert_one_warning(make(timer), path)
    assert timer.asked == [SHAPE, FEW_ROWS]


def test_what_is_in_a_folder_that_cannot_be_written_is_used_on(make, path, monkeypatch):
    make().pick("auto", SHAPE, GPU, CANDIDATES)

    def read_only(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(strategy_record.tempfile, "mkstemp", read_only)
    timer = Timer()
    later = make(timer)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        later.pick("auto", FEW_ROWS, GPU, CANDIDATES)
    later.pick("auto", EIGHT_ROWS, GPU, CANDIDATES)
    later.pick("auto", SHAPE, GPU, CANDIDATES)
    assert timer.asked == [FEW_ROWS, EIGHT_ROWS]


def test_a_file_where_the_folder_should_be_costs_one_warning(make, path):
    path.parent.touch()
    with pytest.warns(RuntimeWarning, match="set S2LORA_CACHE to a folder"):
        assert make(forbidden).file.find("GPU A", "nothing") is None
    timer = Timer()
    assert_one_warning(make(timer), path)
    assert timer.asked == [SHAPE, FEW_ROWS]


def test_a_full_disk_leaves_the_old_file(make, path, monkeypatch):
    make().pick("auto", SHAPE, GPU, CANDIDATES)
    before = path.read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        make().pick("auto", FEW_ROWS, GPU, CANDIDATES)
    assert path.read_text() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["strategies.json", "strategies.lock"]


def _remember_some(path: Path, first: int, count: int) -> None:
    file = StrategyFile(path)
    for index in range(first, first + count):
        file.add("GPU", f"shape {index}", Record("reference", {"reference": 1.0}))


def test_processes_add_to_one_file(path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_remember_some, args=(path, 10 * index, 10)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(json.loads(path.read_text())["GPU"]) == 40


def test_what_another_process_timed_meanwhile_is_taken(make):
    early = make(forbidden)
    assert early.file.find("GPU A", "nothing") is None  # the file was read, and was empty
    make().pick("auto", SHAPE, GPU, CANDIDATES)
    assert early.pick("auto", SHAPE, GPU, CANDIDATES) == "fused"


def test_what_was_forgotten_is_not_found_nor_written_again(path):
    file = StrategyFile(path)
    file.add("GPU", "shape", Record("reference", {"reference": 1.0}))
    assert file.forget()
    assert file.find("GPU", "shape") is None
    file.add("GPU", "another", Record("reference", {"reference": 1.0}))
    assert list(json.loads(path.read_text())["GPU"]) == ["another"]


def test_other_users_of_the_folder_can_read_it(path):
    _remember_some(path, 0, 1)
    assert path.stat().st_mode & 0o777 == 0o644


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("S2LORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert strategies_path() == tmp_path / ".cache" / "fused_s2lora" / "strategies.json"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert strategies_path().name == "strategies.json"


def test_the_state_of_kernels_is_that_of_their_source(tmp_path, monkeypatch):
    """A record is of the kernels it timed: any change of one asks for new times."""
    monkeypatch.setattr(strategy_record, "__file__", str(tmp_path / "strategy_record.py"))
    kernel = tmp_path / "merge.py"
    states = []
    for source in ("a = 1", "a = 2", "a = 1"):
        kernel.write_text(source)
        strategy_record._state_of_kernels.cache_clear()
        states.append(strategy_record._state_of_kernels())
    strategy_record._state_of_kernels.cache_clear()
    assert states[0] == states[2] != states[1]
