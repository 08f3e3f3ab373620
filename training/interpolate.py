"""The adapter of a finished run with another share of what it learnt."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from fused_s2lora.interpolation import scale_update

from .errors import UserError
from .methods import METHODS
from .model_card import write_model_card
from .models import load_adapter, load_base, remember_speech, remembered_speech, window_for
from .output import check_empty, read_json, write_json, writing_folder
from .rank_maps import write_rank_maps
from .run import run_options


def recorded_share(options: dict[str, Any], summary: dict[str, Any]) -> float | None:
    """The share of the update that a run of these options, with this summary.json, kept; None where it is not known."""
    usual = None if options["method"] == "s2lora" else 1.0  # S2-LoRA's default has changed, others keep all
    return summary.get("interpolation") or options.get("interpolation") or usual


def trained_share(run: Path) -> tuple[dict[str, Any], float]:
    """The options of the run in this folder, and the share of the update that its adapter has.

    Raises:
        UserError: there is no run that trained an adapter to its end, it does not say, or its method has no share.
    """
    options, summary = run_options(run), run / "summary.json"
    if options is None:
        raise UserError(f"{run}: no run of `s2lora train` in it; give the folder that has its config.json")
    if "interpolation" not in METHODS[options["method"]].reads:
        raise UserError(f"{run}: the update of {options['method']} is not to be scaled; that of s2lora or lora is")
    if not summary.is_file():
        raise UserError(f"{run}: not trained to its end; call `s2lora train` again to go on")
    if not (run / "adapter").is_dir():
        raise UserError(f"{run}: has no adapter, but a whole model or none; only adapters have a share")
    kept = recorded_share(options, read_json(summary))
    if kept is None:
        raise UserError(f"{run}: does not say what share of the update it kept; train it again")
    return options, kept


def interpolate_run(run: Path, share: float, output: Path, *, model: str | None = None) -> PeftModel:
    """Writes the run's adapter with `share` of all that it learnt into `output`, with window, language and task.

    Training scales an adapter once, after its last step, so that any share of a finished run is had without training
    (`fused_s2lora.interpolate`; docs/defaults.md, "A share of the update").

    Args:
        run: folder of a finished `s2lora train` with S2-LoRA, LoRA or AdaLoRA; it is left as it is.
        share: above 0, at most 1: all of the update, whatever the run itself kept.
        model: where the model that was adapted is now; by default where it was.

    Returns:
        The run's model with that adapter.

    Raises:
        UserError: no such run, a share out of range, or `output` is not empty or not writable.
    """
    if not 0 < share <= 1:
        raise UserError(f"SHARE is {share}; give one above 0, at most 1")
    options, kept = trained_share(run)
    check_empty(output, "--output")
    adapter = run / "adapter"
    trained = remembered_speech(adapter)  # which PEFT's own configurations have no field for
    adapted = load_adapter(load_base(model or options["model"])[0], adapter)
    try:
        scale_update(adapted, share / kept)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from error
    with writing_folder(output):
        adapted.save_pretrained(str(output))
        language, task = trained.get("language"), trained.get("task", "transcribe")
        remember_speech(output, window_for(trained, None, None), language, task)
        write_model_card(output, options, read_json(run / "summary.json") | {"interpolation": share})
    return adapted


def take_run(source: Path, share: float, run: Path) -> None:
    """Makes the begun run in folder `run` one that has been trained, as the finished one in `source` was.

    Raises:
        UserError: as `interpolate_run`.
    """
    adapted = interpolate_run(source, share, run / "adapter")
    for name in ("metrics.json", "skipped.tsv"):
        if (source / name).is_file():
            shutil.copy(source / name, run / name)
    write_rank_maps(adapted, run)
    write_json(run / "summary.json", read_json(source / "summary.json") | {"interpolation": share})
