"""Loading Whisper and adapters from the hub, a folder or the packaged Whisper-base, with errors one can act on."""

import gc
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from fused_s2lora import S2LoraModel, fuse_whisper

from .audio_window import AudioWindow
from .errors import UserError
from .output import read_json, write_text
from .packaged_model import FOLDER, packaged_whisper_base
from .text import language_code

PACKAGED = "packaged-base"


def load_base(
    model: str, *, dtype: torch.dtype = torch.float32, quantization: BitsAndBytesConfig | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Whisper and its processor. `model` is a hub id, a local folder, or "packaged-base".

    With a `quantization` (see `quantization_of`) its maps are stored so, on the device where they are to be used.

    Raises:
        UserError: there is no such model, it is not a Whisper, or its files are damaged.
    """
    stored: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        place = PartialState(cpu=not torch.cuda.is_available()).device
        stored |= {"quantization_config": quantization, "device_map": {"": place}}
    source = str(packaged_whisper_base()) if model == PACKAGED else model
    if Path(source).is_dir():
        source = str(Path(source).absolute())  # so an adapter of it says where it is, wherever that is asked
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "whisper":
            raise UserError(f"{model}: a {config.model_type} model; give a Whisper, such as openai/whisper-small")
        processor = WhisperProcessor.from_pretrained(source)
        loading: Any = WhisperForConditionalGeneration  # its types know of no second value
        whisper, loaded = loading.from_pretrained(source, **stored, output_loading_info=True)
        if loaded["missing_keys"]:
            raise UserError(
                f"{model}: its weights lack {min(loaded['missing_keys'])}; give the folder of a whole Whisper model"
            )
        _check_files_agree(model, whisper, processor)
        whisper.get_encoder().embed_positions.requires_grad_(False)  # sinusoids, which `from_pretrained` lets train
        return whisper, processor
    except (OSError, ValueError, KeyError, RuntimeError, HFValidationError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{model}: not to be had as a Whisper model ({reason}); give --model a hub id, a folder, or {PACKAGED}"
        ) from error


def _check_files_agree(model: str, whisper: Any, processor: WhisperProcessor) -> None:
    """Raises UserError where tokenizer, generation or feature configuration are not those of this Whisper."""
    tokenizer, generation = processor.tokenizer, whisper.generation_config
    if tokenizer.decode(tokenizer("a", add_special_tokens=False).input_ids) != "a":
        raise UserError(
            f"{model}: has no whole tokenizer; copy tokenizer.json and the files beside it from the Whisper it was "
            "trained from"
        )
    needed = ["is_multilingual", "decoder_start_token_id", "no_timestamps_token_id"]
    needed += ["lang_to_id", "task_to_id"] if getattr(generation, "is_multilingual", False) else []
    if any(getattr(generation, name, None) is None for name in needed):
        raise UserError(
            f"{model}: its generation_config.json knows no languages and tasks, as in older fine-tunes; copy that "
            "file from the Whisper it was trained from"
        )
    tokens = {"<|startoftranscript|>": generation.decoder_start_token_id}
    tokens["<|notimestamps|>"] = generation.no_timestamps_token_id
    if generation.is_multilingual:
        tokens |= generation.lang_to_id | {f"<|{task}|>": index for task, index in generation.task_to_id.items()}
    for token, index in tokens.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != index:
            raise UserError(
                f"{model}: its tokenizer has {token} at {found}, its generation_config.json at {index}; copy both from "
                "the Whisper it was trained from"
            )
    mels, bins = processor.feature_extractor.feature_size, whisper.config.num_mel_bins
    if mels != bins:
        raise UserError(
            f"{model}: its feature extractor makes {mels} mel bins and it reads {bins}; copy preprocessor_config.json "
            "or processor_config.json from the Whisper it was trained from"
        )


def load_adapter(model: WhisperForConditionalGeneration, adapter: str | Path, *, trainable: bool = False) -> PeftModel:
    """The model with the adapter in folder (or hub id) `adapter` on it.

    Raises:
        UserError: there is no adapter, its file is damaged, or it was trained on another model or rank.
    """
    folder, embedding = Path(adapter), model.get_input_embeddings().weight
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter_config.json in it; give the `adapter` folder of a run")
    try:
        with warnings.catch_warnings():
            # Keys like audio_window are ours and unknown to PEFT's own methods.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        _check_mergeable(adapted, embedding)
        if isinstance(adapted.base_model, S2LoraModel):  # which has checked the file itself
            fuse_whisper(adapted)
        elif isinstance(adapted.base_model, BaseTuner):
            _check_complete(adapted, adapted.base_model.prefix, adapter)
        else:
            kind = adapted.active_peft_config.peft_type.value
            raise ValueError(f"{kind} learns prompts, which are not decoded with; give an adapter of weights")
        return adapted
    except SafetensorError as error:
        raise UserError(
            f"{adapter}: adapter_model.safetensors is damaged ({error}); restore it or train again"
        ) from error
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{adapter}: this adapter cannot be put on this model ({reason[:300]})") from error


def _check_mergeable(adapted: PeftModel, embedding: Any) -> None:
    """Raises ValueError where the adapter is on the token embedding or the output, which have one weight.

    Decoded with, and so merged, it would change both. PEFT itself keeps single trained tokens alike in them.
    """
    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
            continue
        if getattr(module.get_base_layer(), "weight", None) is embedding:
            raise ValueError(f"it is on {name}, whose weight is that of both the token embedding and the output")


def _check_complete(adapted: PeftModel, prefix: str, adapter: str | Path) -> None:
    """Raises ValueError where file and model do not have the same tensors of the method, which PEFT passes over."""
    there = {key for key in load_peft_weights(str(adapter), device="cpu") if prefix in key}
    here = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if prefix in key}
    for problem, keys in (("lacks", here - there), ("has", there - here)):
        if keys:
            raise ValueError(
                f"the adapter file does not fit this model: it {problem} {min(keys)}; load it on the model it was "
                "trained on"
            )


def quantization_of(name: str | None, products: torch.dtype | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to store the maps: in 8 bits ("int8") or in 4 ("nf4", scales quantised too); None for None.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if name is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'--quantize {name} needs bitsandbytes; run: pip install "fused-s2lora[quantized]"')
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=products or torch.float32,
    )


def to_best_device(model: nn.Module) -> None:
    """Moves the model to the GPU, if there is one; a quantised one was loaded there."""
    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        model.cuda()


def free_memory() -> None:
    """Gives back what models hold that nothing names any more: parts of one name each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SPEECH_KEYS = ("audio_window", "audio_window_margin", "language", "task")


def remember_speech(adapter: Path, window: AudioWindow, language: str | None, task: str) -> None:
    """Writes window, language and task of training into the adapter's own adapter_config.json."""
    file = adapter / "adapter_config.json"
    values = (window.mode, window.margin, language, task)
    config = read_json(file) | dict(zip(SPEECH_KEYS, values, strict=True))
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")  # ASCII, as PEFT writes it


def set_speech(model: Any, language: str | None, task: str | None) -> None:
    """Puts language and task of training where a model without an adapter has them, its generation configuration."""
    if model.generation_config.is_multilingual:
        model.generation_config.language, model.generation_config.task = language, task


def save_processor(processor: WhisperProcessor, folder: str | Path) -> None:
    """Writes tokenizer and feature extractor, the latter also as preprocessor_config.json, where others look for it.

    Transformers keeps it in processor_config.json since its version 5; faster-whisper and older versions do not.
    """
    processor.save_pretrained(str(folder))
    processor.feature_extractor.save_pretrained(str(folder))


def configured_language(model: str) -> str | None:
    """The language in the generation configuration of a hub id or folder, where a merged model has that of training."""
    if model == PACKAGED:
        return None
    try:
        language = getattr(GenerationConfig.from_pretrained(model), "language", None)
    except (OSError, ValueError, HFValidationError):
        return None  # `load_base` says what is wrong with it
    return language.removeprefix("<|").removesuffix("|>") if isinstance(language, str) else None


def remembered_speech(adapter: str | Path) -> dict[str, Any]:
    """What `remember_speech` wrote, for the keys that are there; nothing for an adapter of another tool.

    Args:
        adapter: a folder, or a hub id.

    Raises:
        UserError: there is no such folder or hub id, or adapter_config.json is not readable.
    """
    config = _adapter_config(adapter)
    return {key: config[key] for key in SPEECH_KEYS if key in config}


def model_for(model: str | None, adapter: str | Path | None) -> str:
    """The model asked for; where that is None the one that the adapter was trained on, else the packaged Whisper-base.

    Raises:
        UserError: one of them is empty, there is no such adapter, or its adapter_config.json is not readable or names
            a folder that is gone.
    """
    if "" in (model, adapter):  # a variable of the shell that is not set; nothing in its place would be another model
        raise UserError(f"--{'model' if model == '' else 'adapter'} is empty; give a hub id or folder, or leave it out")
    if model is None and adapter is not None:
        model = _adapter_config(adapter).get("base_model_name_or_path")
        if model is not None and Path(model).name == FOLDER:  # whose place is another on each machine
            model = PACKAGED
        elif model is not None and Path(model).is_absolute() and not Path(model).exists():
            raise UserError(f"{adapter}: was trained on {model}, which is not there; say by --model where it is now")
    return model or PACKAGED


def load_for_use(model: str | None, adapter: str | None) -> tuple[str, Any, WhisperProcessor, dict[str, Any]]:
    """The name that `model_for` gives, this model with the adapter if there is one, on the best device, its processor,
    and what `remembered_speech` knows of the adapter's training.

    Raises:
        UserError: as `model_for`, `load_base` and `load_adapter`.
    """
    name = model_for(model, adapter)
    whisper, processor = load_base(name)
    trained = remembered_speech(adapter) if adapter else {}
    adapted = load_adapter(whisper, adapter) if adapter else whisper
    to_best_device(adapted)
    return name, adapted, processor, trained


def as_it_is(model: str | None) -> list[Any]:
    """A model's or adapter's name and, of a folder, when its files were last modified."""
    folder = Path(model or "")
    there = sorted(folder.iterdir()) if model and folder.is_dir() else []
    return [model, [file.stat().st_mtime_ns for file in there]]


def on_hub(source: str) -> bool:
    """Whether the model or data set `source`, which was just read, is the hub's: no file or folder, nor packaged."""
    return source != PACKAGED and not Path(source).exists()


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a folder or hub id; nothing for a folder without it."""
    file = Path(adapter) / "adapter_config.json"
    if not Path(adapter).is_dir():
        try:
            file = Path(hf_hub_download(str(adapter), file.name))
        except (OSError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{adapter}: no such folder, and not to be had from the hub ({reason}); give the `adapter` folder of a "
                "run, or a hub id"
            ) from error
    if not file.is_file():
        return {}  # `load_adapter` says what is wrong with it
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); restore it or train again") from error
    return config


def window_for(trained: dict[str, Any], mode: str | None, margin: int | None) -> AudioWindow:
    """The window asked for; what is None is as the adapter was trained (`remembered_speech`), else the full window."""
    chosen = AudioWindow()
    return AudioWindow(
        mode or trained.get("audio_window", chosen.mode),
        trained.get("audio_window_margin", chosen.margin) if margin is None else margin,
    )


def check_language(model: WhisperForConditionalGeneration, language: str | None) -> str | None:
    """Whisper's code for the language, or None for an English-only model, which takes no language.

    Raises:
        UserError: not a language of this model.
    """
    code = language_code(language)
    generation: Any = model.generation_config
    if not generation.is_multilingual:
        if code not in (None, "en"):
            raise UserError(f"language {language!r} on an English-only model; use a multilingual Whisper")
        return None
    if code is not None and f"<|{code}|>" not in generation.lang_to_id:
        raise UserError(f"language {language!r} is not one this Whisper knows; see generation_config.lang_to_id")
    return code
