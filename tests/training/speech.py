"""Small made-up recordings for the tests of training."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

TEXTS = ("WE CALL IT BEAR", "I SEE A CAT", "THE SUN IS UP", "GO HOME NOW", "WHERE IS MY HAT", "IT IS RED")


def tone(seconds: float, rate: int = 16_000, channels: int = 1, pitch: float = 220.0) -> np.ndarray:
    """A tone in a little noise, [samples] or [samples, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(round(pitch)).normal(scale=0.01, size=time.shape)
    samples = (0.3 * np.sin(2 * np.pi * pitch * time) + noise).astype(np.float32)
    return samples if channels == 1 else np.stack([samples] * channels, axis=1)


def write_folder(folder: Path, texts: Sequence[str] = TEXTS, *, seconds: float = 0.5) -> Path:
    """An audiofolder of tones of growing length with the columns file_name, transcription, speaker and age."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "transcription", "speaker", "age"])
        for index, text in enumerate(texts):
            name = f"u{index}.flac"
            soundfile.write(folder / name, tone(seconds + 0.1 * index, pitch=200 + 30 * index), 16_000)
            writer.writerow([name, text, f"s{index % 3}", 6 + 3 * (index % 3)])
    return folder


def write_lines(folder: Path, name: str, *lines: str) -> Path:
    """A manifest of two recordings, one.wav and two.wav."""
    folder.mkdir(exist_ok=True)
    for recording in ("one.wav", "two.wav"):
        soundfile.write(folder / recording, tone(0.5), 16_000)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")
