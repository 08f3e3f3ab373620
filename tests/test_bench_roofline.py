"""The least work of a case, the least time it takes a device, and how fast that device is."""

import pytest
import torch

from bench import cases, roofline
from bench.cases import Case
from bench.measure import Latency
from bench.roofline import Device
from tests.bench_cases import TINY

BOTH = (False, True)  # forward, backward


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(cases.SIZES, "tiny", TINY)  # width 32


def test_the_least_work_of_maps_that_share_an_input():
    forward, backward = map(Case("qkv", "tiny", 10, 4, "bf16").minimum, BOTH)
    x, dx, y, weights = 10 * 32, 10 * 32, 3 * 10 * 32, 3 * 32 * 32
    assert forward[0] == 2 * (x + weights + y)
    assert backward[0] == 2 * (y + weights + x + dx)
    z = d_down = g_down = 10 * 32 * 4  # x Aᵀ, gᵀ x and g A: once for the three
    up = d_up = dy_up = 3 * 10 * 32 * 4  # (z ⊙ e) Bᵀ, dyᵀ z and dy B: of each
    assert forward[1] == 2 * (10 * weights + z + up)
    assert backward[1] == 2 * (10 * weights + dy_up + g_down + d_up + d_down)


def test_the_least_work_of_one_map_and_of_several_groups():
    fc1 = [Case("fc1", "tiny", 10, 4, "fp32").minimum(backward) for backward in BOTH]
    weight, low_rank = 32 * 128, 4 * (32 + 128)
    assert fc1[0] == (4 * (10 * 32 + weight + 10 * 128), 2 * 10 * (weight + low_rank))
    assert fc1[1] == (4 * (10 * 128 + weight + 2 * 10 * 32), 2 * 10 * (weight + 2 * low_rank))
    for backward in BOTH:
        every = [Case(name, "tiny", 10).minimum(backward) for name in ("qkv", "out", "fc1", "fc2")]
        assert Case("encoder-layer", "tiny", 10).minimum(backward) == tuple(map(sum, zip(*every, strict=True)))


@pytest.mark.parametrize(
    ("copy_gb_per_s", "tflops", "forward_ms", "backward_ms"),
    [
        # At 1000 bytes/s a byte takes a millisecond: x, W, y; dy, W, x, dx.
        (1e-6, 1e3, 2 * (320 + 1024 + 320), 2 * (320 + 1024 + 320 + 320)),
        # At 1000 flops/s a flop does: W, A, B; W, twice A, twice B.
        (1e3, 1e-9, 2 * 10 * (1024 + 128 + 128), 2 * 10 * (1024 + 256 + 256)),
    ],
)
def test_the_least_time_of_both_passes_is_their_sum(copy_gb_per_s, tflops, forward_ms, backward_ms):
    device, case = Device("cpu", copy_gb_per_s, {"bf16": tflops}), Case("out", "tiny", 10, 4, "bf16")
    found = [device.floor_ms(case, which) for which in ("forward", "backward", "both")]
    assert found == pytest.approx([forward_ms, backward_ms, forward_ms + backward_ms])


def test_rates_of_a_device_are_of_its_median_times(monkeypatch):
    medians_ms = {"copy": 4.0, "fp32": 8.0, "fp16": 2.0, "bf16": 1.0}

    def latencies(calls, **limits):
        assert set(calls) == set(medians_ms)
        return {name: Latency(0.1, medians_ms[name], 100.0, 20) for name in calls}

    monkeypatch.setattr(roofline, "latencies", latencies)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "randint", lambda *of, **kinds: torch.empty(1))  # nothing is copied
    device = roofline.measure_device()
    assert device.type == "cpu"
    # 256 MiB read and as many written in 4 ms; 1024³ multiplications and as many additions.
    assert device.copy_gb_per_s == pytest.approx(2 * 268.435456e6 / 4e-3 / 1e9)
    product_tflop = 2 * 1.073741824e9 / 1e12
    assert device.matrix_tflops == pytest.approx(
        {"fp32": product_tflop / 8e-3, "fp16": product_tflop / 2e-3}
        | dict.fromkeys(("bf16", "autocast"), product_tflop / 1e-3)
    )
