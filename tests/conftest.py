"""Fixtures of all tests, and where kernels run: compiled on a CUDA GPU, in Triton's interpreter elsewhere."""

import gc
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before anything imports Triton kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub, which without a network takes minutes

import pytest
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from triton.runtime import interpreter

from fused_s2lora.kernels import choice
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.packaged_model import packaged_whisper_base
from tests.few_tokens import few_tokens, renumbered

ROOT = Path(__file__).parents[1]
REFERENCE_ROWS = choice.REFERENCE_ROWS
TINY = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


@pytest.fixture(autouse=True, scope="session")
def few_rows_take_the_way_of_many():
    """On a CPU tiny inputs would all be left to the reference, and the strategies that real ones get to nobody."""
    choice.REFERENCE_ROWS = 0
    yield
    choice.REFERENCE_ROWS = REFERENCE_ROWS


@pytest.fixture(autouse=True, scope="session")
def garbage_is_looked_for_in_what_tests_make():
    """And not in the libraries, which takes half a second each time that a trainer frees its memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def the_interpreter_is_made_ready_once_a_launch():
    """Triton's replaces its whole language at each call of a device function again: two fifths of a kernel's time."""
    prepare = interpreter._patch_lang
    prepared: set[int] = set()  # modules whose functions the running launch has called

    def prepare_once(function):
        module = id(function.__globals__)
        if module in prepared:
            return None
        scope = prepare(function)
        if not prepared:
            undo = scope.restore
            scope.restore = lambda: (undo(), prepared.clear())
        prepared.add(module)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        yield


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """What a test draws without a generator of its own does not depend on the tests that ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def speech_data() -> Path:
    """The folder with speechocean762 and the AISHELL-1 sample; skips where it is missing."""
    folder = Path(os.environ.get("S2LORA_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "speechocean762").is_dir():
        pytest.skip(f"no speech data in {folder}: set S2LORA_DATA to a folder with speechocean762")
    return folder


@pytest.fixture(scope="session")
def packaged_base() -> Path:
    """The packaged Whisper-base, converted once; skips where its wheels are not installed."""
    try:
        return packaged_whisper_base()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny_whisper():
    """Makes small random Whispers, equal for equal arguments; any WhisperConfig field can be given."""

    def make(**fields) -> WhisperForConditionalGeneration:
        config = WhisperConfig(
            **{
                **TINY,
                "vocab_size": 100,
                "max_source_positions": 50,
                "num_mel_bins": 8,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
                "init_std": 0.2,
                **fields,
            }
        )
        torch.manual_seed(0)
        return WhisperForConditionalGeneration(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(packaged_base, tmp_path_factory) -> Path:
    """A model folder: a small random Whisper with the packaged model's tokenizer, cut to fewer tokens."""
    folder = tmp_path_factory.mktemp("tiny-whisper")
    few_tokens(packaged_base, folder)
    settings, generation = (
        renumbered(kind.from_pretrained(packaged_base).to_dict()) for kind in (WhisperConfig, GenerationConfig)
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_dict({**settings, **TINY}))
    model.generation_config = GenerationConfig.from_dict({**generation, "alignment_heads": [[0, 0]]})
    model.save_pretrained(folder)
    return folder
