"""Long recordings to utterances: cut at pauses, which a voice activity detector finds."""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .audio import SAMPLE_RATE

SHORTEST_S = 2.0
_KEPT_OF_A_PAUSE_S = 0.4


def speech_segments(samples: np.ndarray, longest_s: float) -> list[tuple[int, int]]:
    """Where in a recording [n] (float32, mono, 16 kHz) something is said: ranges [start, end) of samples, in order.

    None is longer than `longest_s`. What is too long is divided at its longest pause, and its parts again, so that cuts
    lie between sentences rather than in them; speech without a pause is cut where it is too long. Up to 0.4 s of
    silence around it are kept, the rest is left out.

    Speech is found by Silero VAD (https://github.com/snakers4/silero-vad).

    Raises:
        ValueError: `longest_s` is below 2.
    """
    if not longest_s >= SHORTEST_S:
        raise ValueError(f"longest_s={longest_s} is below {SHORTEST_S:.0f}")
    kept = round(_KEPT_OF_A_PAUSE_S * SAMPLE_RATE)
    room = int(longest_s * SAMPLE_RATE) - 2 * kept
    parts = _divided(_spoken(samples, room / SAMPLE_RATE), room)
    if not parts:
        return []
    middles = [(end + start) // 2 for (_, end), (start, _) in pairwise(parts)]
    limits = pairwise([0, *middles, len(samples)])
    return [
        (max(start - kept, low), min(end + kept, high)) for (start, end), (low, high) in zip(parts, limits, strict=True)
    ]


def _divided(spoken: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """The ranges of speech as few that are no longer than `room`: all as one, divided at the longest pauses."""
    parts, left = [], [spoken] if spoken else []
    while left:
        run = left.pop()
        if run[-1][1] - run[0][0] <= room:
            parts.append((run[0][0], run[-1][1]))
            continue
        pauses = [later[0] - earlier[1] for earlier, later in pairwise(run)]
        cut = pauses.index(max(pauses)) + 1
        left += [run[cut:], run[:cut]]
    return parts


def _spoken(samples: np.ndarray, longest_s: float) -> list[tuple[int, int]]:
    """Ranges of samples with speech in them, each at most `longest_s` long."""
    threads = torch.get_num_threads()
    try:
        detect, model = _detector()
        torch.set_num_threads(1)  # its products are tiny
        audio = torch.from_numpy(samples)
        found = detect(audio, model, sampling_rate=SAMPLE_RATE, max_speech_duration_s=longest_s)
    finally:
        torch.set_num_threads(threads)
    return [(one["start"], one["end"]) for one in found]


@functools.cache
def _detector() -> tuple[Callable[..., list[dict[str, int]]], Any]:
    from silero_vad import get_speech_timestamps, load_silero_vad  # importing it leaves torch one thread

    return get_speech_timestamps, load_silero_vad()
