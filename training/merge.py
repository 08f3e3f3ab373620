"""An adapter folded into its model: a Whisper like any other, at no cost in inference."""

from pathlib import Path
from typing import Any

from .models import load_adapter, load_base, model_for, remembered_speech, save_processor, set_speech
from .output import check_empty, writing_folder


def merge(adapter: str, output: str | Path, *, model: str | None = None) -> dict[str, Any]:
    """Writes the merged model with its processor into `output`; returns window, language and task of training.

    The model defaults to the one the adapter was trained on. Language and task are set in the merged model's generation
    configuration.

    Raises:
        UserError: a bad model or adapter, or `output` is not empty or not writable.
    """
    folder = Path(output)
    check_empty(folder, "OUTPUT")
    whisper, processor = load_base(model_for(model, adapter))
    trained = remembered_speech(adapter)
    merged = load_adapter(whisper, adapter).merge_and_unload(safe_merge=True)
    set_speech(merged, trained.get("language"), trained.get("task"))
    with writing_folder(folder, "OUTPUT"):
        merged.save_pretrained(folder)
        save_processor(processor, folder)
    return trained
