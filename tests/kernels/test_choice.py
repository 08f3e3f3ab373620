"""Which strategy is chosen, and that what was timed is remembered: with made-up times, on no GPU."""

import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_s2lora.kernels import choice
from fused_s2lora.kernels.choice import VARIABLE, Chooser, default_strategy
from fused_s2lora.kernels.strategy_record import FROZEN, Shape, StrategyFile, shape_of
from tests.kernels.choices import CANDIDATES, CPU, FEW_ROWS, FIELDS, GPU, MS, NAMES, SHAPE, Timer, forbidden


def table_with(strategy: str) -> dict:
    ms = {name: 1.0 if name == strategy else 2.0 for name in NAMES}
    return {"GPU A": {SHAPE.key: {"strategy": strategy, "ms": ms}}}


def test_argument_comes_before_variable_before_file_before_table_before_timing(make, monkeypatch):
    timer = Timer()
    assert make(timer).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    assert timer.asked == [SHAPE]
    table = table_with("augmented")
    make().file.forget()
    assert make(forbidden, table=table).pick("auto", SHAPE, GPU, CANDIDATES) == "augmented"
    make().tune(SHAPE, GPU, CANDIDATES)
    assert make(forbidden, table=table).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    monkeypatch.setenv(VARIABLE, "merged")
    chooser = make(forbidden, table=table)
    assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "merged"
    assert chooser.pick("reference", SHAPE, GPU, CANDIDATES) == "reference"
    for names_none in ("auto", ""):
        monkeypatch.setenv(VARIABLE, names_none)
        assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "fused"


def test_wrong_names_are_refused(make, monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda', not one of auto, reference, merged, fused, augmented"):
        make().pick("cuda", SHAPE, GPU, CANDIDATES)
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(ValueError, match=f"variable {VARIABLE} is 'fastest', not one of auto, reference, merged"):
        make().pick("auto", SHAPE, CPU, CANDIDATES)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match="without reference"):
        make().pick("auto", SHAPE, GPU, {"merged": CANDIDATES["merged"]})


def test_a_cpu_chooses_untimed(make, path, monkeypatch):
    chooser, candidates = make(forbidden), {**CANDIDATES, "split": CANDIDATES["merged"]}
    assert chooser.pick("auto", SHAPE, CPU, candidates) == "merged"
    assert chooser.pick("auto", FEW_ROWS, CPU, candidates) == "split"
    assert chooser.pick("auto", FEW_ROWS, CPU, CANDIDATES) == "merged"
    few, more = (Shape(rows, *FIELDS) for rows in (128, 256))
    monkeypatch.setattr(choice, "REFERENCE_ROWS", 128)
    assert [make(forbidden).pick("auto", shape, CPU, candidates) for shape in (few, more)] == ["reference", "split"]
    half = Shape(65536, 768, 768, 8, 1, torch.bfloat16, torch.bfloat16, True)
    assert chooser.pick("auto", half, CPU, candidates) == "split"
    assert chooser.pick("auto", SHAPE, CPU, {"reference": CANDIDATES["reference"]}) == "reference"
    monkeypatch.setenv(VARIABLE, "reference")
    assert chooser.pick("auto", SHAPE, CPU, CANDIDATES) == "reference"
    assert not path.exists()


def test_ragged_batches_are_timed_once(make):
    timer = Timer()
    chooser = make(timer)
    for rows in (1030, 1500, 2048):
        shape = shape_of(rows, *FIELDS)
        assert shape == SHAPE
        assert shape_of(rows, *FIELDS) is shape
        chooser.pick("auto", shape, GPU, CANDIDATES)
    assert len(timer.asked) == 1


def test_tf32_is_timed_apart(make):
    timer = Timer()
    single = Shape(**{**SHAPE.__dict__, "dtype": torch.float32})
    make(timer).pick("auto", single, GPU, CANDIDATES)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        # After this setting, which HF's Trainer makes too, `allow_tf32` can no longer be read.
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        make(timer).pick("auto", single, GPU, CANDIDATES)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(timer.asked) == 2


def test_tf32_may_change_within_a_process(make, monkeypatch):
    timer, single = Timer(), Shape(**{**SHAPE.__dict__, "dtype": torch.float32})
    chooser, half = make(timer), SHAPE
    found = []
    for precision, fastest in (("ieee", "fused"), ("tf32", "merged"), ("ieee", "augmented")):
        is_tf32 = precision == "tf32"
        monkeypatch.setattr(choice, "multiplies_as_tf32", lambda kind, yes=is_tf32: yes and kind == torch.float32)
        timer.ms[fastest] = 0.9 * min(timer.ms[name] for name in NAMES)
        found.append([chooser.pick("auto", shape, GPU, CANDIDATES) for shape in (single, half)])
    assert found == [["fused", "fused"], ["merged", "fused"], ["fused", "fused"]]
    assert timer.asked == [single, half, single]


def test_another_gpu_times_anew(make):
    make().pick("auto", SHAPE, GPU, CANDIDATES)
    timer = Timer()
    make(timer, name="GPU B").pick("auto", SHAPE, GPU, CANDIDATES)
    assert timer.asked == [SHAPE]


def test_a_process_chooses_for_each_of_its_devices(path):
    timed, devices = [], [GPU, torch.device("cuda", 1), CPU]

    def timer(shape, device, candidates):
        timed.append(device)
        return {**MS, ("fused", "augmented")[device.index]: 0.9}, {}

    chooser = Chooser(StrategyFile(path), table={}, timer=timer, device_name=lambda device: f"GPU {device.index}")
    for _ in range(2):
        picked = [chooser.pick("auto", SHAPE, device, CANDIDATES) for device in devices]
        assert picked == ["fused", "augmented", "merged"]
    assert timed == devices[:2]


def test_a_strategy_never_tried_is_timed_and_fewer_candidates_are_not(make):
    some = {name: CANDIDATES[name] for name in ("reference", "merged")}
    make(Timer({"reference": 3.0, "merged": 2.0})).pick("auto", SHAPE, GPU, some)
    timer = Timer()
    chooser = make(timer)
    assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    assert len(timer.asked) == 1
    assert chooser.pick("auto", SHAPE, GPU, some) == "merged"
    assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "fused"
    assert len(timer.asked) == 1


def test_never_slower_than_reference(make):
    slow = {"reference": 1.0, "merged": 1.1, "fused": 1.0, "augmented": 9.0, FROZEN: 0.1}
    assert make(Timer(slow)).pick("auto", SHAPE, GPU, CANDIDATES) == "reference"


def test_threads_time_a_shape_once(make):
    timer = Timer()
    chooser = make(timer)
    threads = [threading.Thread(target=chooser.pick, args=("auto", SHAPE, GPU, CANDIDATES)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.asked == [SHAPE]


def test_a_failed_candidate_is_left_out_and_its_error_kept(make, path):
    ms = {name: value for name, value in MS.items() if name != "fused"}
    timer = Timer(ms, {"fused": "RuntimeError: no kernel"})
    with pytest.warns(RuntimeWarning, match="on GPU A the strategy fused failed, and is left out: RuntimeError: no k"):
        assert make(timer).pick("auto", SHAPE, GPU, CANDIDATES) == "merged"
    assert make(forbidden).pick("auto", SHAPE, GPU, CANDIDATES) == "merged"
    assert "RuntimeError: no kernel" in path.read_text()


def test_a_lack_of_memory_is_not_remembered_for_the_next_process(make, path):
    timer = Timer({"reference": 1.0}, dict.fromkeys(NAMES[1:], "out of memory"))
    chooser = make(timer)
    assert [chooser.pick("auto", SHAPE, GPU, CANDIDATES) for _ in range(3)] == ["reference"] * 3
    assert len(timer.asked) == 1
    chooser.pick("auto", FEW_ROWS, GPU, CANDIDATES)
    assert not path.exists()


def test_where_all_failed_but_reference_the_next_process_tries_again(make, path):
    """As without a C compiler, which is soon installed."""
    timer = Timer({"reference": 1.0, FROZEN: 0.5}, dict.fromkeys(NAMES[1:], "RuntimeError: no C compiler"))
    with pytest.warns(RuntimeWarning, match="no C compiler") as caught:
        assert make(timer).pick("auto", SHAPE, GPU, CANDIDATES) == "reference"
    assert len(caught) == len(NAMES) - 1
    assert make(Timer()).pick("auto", SHAPE, GPU, CANDIDATES) == "fused"


def test_a_timer_that_fails_never_stops_training(make):
    asked = []

    def broken(shape, device, candidates):
        asked.append(shape)
        raise torch.OutOfMemoryError("2 GiB more than there are")

    chooser = make(broken)
    with pytest.warns(RuntimeWarning, match="2 GiB more") as caught:
        assert [chooser.pick("auto", SHAPE, GPU, CANDIDATES) for _ in range(3)] == ["merged"] * 3
    assert (len(asked), len(caught)) == (1, 1)
    none_ran = make(Timer({}, dict.fromkeys(NAMES, "RuntimeError: no kernel")))
    with pytest.warns(RuntimeWarning, match="the strategy reference failed"):
        assert none_ran.pick("auto", SHAPE, GPU, CANDIDATES) == "merged"


def test_default_rule():
    assert default_strategy(SHAPE, GPU, NAMES) == "merged"
    assert default_strategy(FEW_ROWS, GPU, NAMES) == "merged"
    assert default_strategy(FEW_ROWS, GPU, ("reference", "split")) == "reference"


def test_a_gpu_that_is_not_here_is_not_timed(make):
    chooser = make(forbidden, name=None)
    assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "merged"
    with pytest.raises(ValueError, match="no CUDA GPU"):
        chooser.tune(SHAPE, GPU, CANDIDATES)


def capturing(patch):
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def deterministic(patch):
    patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def tracing(patch):
    patch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("state", [capturing, deterministic, tracing])
def test_never_timed_while(make, state):
    chooser = make(forbidden)
    with pytest.MonkeyPatch.context() as patch:
        state(patch)
        assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "merged"
        assert chooser.pick("auto", FEW_ROWS, GPU, CANDIDATES) == "merged"
        assert make(forbidden, table=table_with("augmented")).pick("auto", SHAPE, GPU, CANDIDATES) == "augmented"
    timer = Timer({**MS, "reference": 0.5})
    chooser._timer = timer
    assert chooser.pick("auto", SHAPE, GPU, CANDIDATES) == "reference", "the default was for those calls only"


def test_never_timed_on_tensors_without_data(make):
    with FakeTensorMode():
        assert make(forbidden).pick("auto", SHAPE, GPU, CANDIDATES) == "merged"


def test_never_timed_within_a_backward_pass(make):
    picked = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: picked.append(make(forbidden).pick("auto", SHAPE, GPU, CANDIDATES)))
    y.backward()
    assert picked == ["merged"]


@pytest.fixture
def process_chooser(make, monkeypatch):
    chooser = make(forbidden)
    monkeypatch.setattr(choice, "_chooser", chooser)
    return chooser


def test_torch_compile_takes_the_choice_as_a_constant(make, process_chooser):
    make().tune(SHAPE, GPU, CANDIDATES)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x):
        name = choice.pick("auto", shape_of(x.shape[0], *FIELDS), GPU, CANDIDATES)
        return x * {"fused": 2, "merged": 3}[name]

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        results = [compiled(torch.ones(rows))[0].item() for rows in (1500, 1501, 2000, 1030, 5000, 5001, 64)]
    assert results == [2, 2, 2, 2, 3, 3, 3]
    assert len(graphs) <= 4, "one graph a bucket, and the first before rows were dynamic"


def test_the_process_has_one_chooser_made_on_first_use(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_chooser", None)
    monkeypatch.setenv("S2LORA_CACHE", str(tmp_path))
    assert choice.pick("auto", SHAPE, CPU, CANDIDATES) == "merged"
    assert choice.chooser() is choice.chooser()
    assert choice.chooser().file.path == tmp_path / "strategies.json"
