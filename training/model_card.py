"""The README.md of an adapter or model, as a model hub shows it: what was trained, how, and what it is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from .evaluation import ALL, unit_of
from .methods import METHODS
from .models import PACKAGED, on_hub
from .output import markdown_table, write_text
from .text import language_code, source_and_language

_PACKAGED_FROM = "openai/whisper-base"
_TASK = "automatic-speech-recognition"
_ADAPTER = """
    s2lora transcribe RECORDINGS --adapter THIS

```python
import fused_s2lora  # PEFT knows its adapters then
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

whisper = WhisperForConditionalGeneration.from_pretrained("{base}")
model = PeftModel.from_pretrained(whisper, "THIS")
```
"""
_WHOLE = """
    s2lora transcribe RECORDINGS --model THIS{window}

```python
from transformers import WhisperForConditionalGeneration

model = WhisperForConditionalGeneration.from_pretrained("THIS")
```
"""
_COUNTED = "Errors of texts normalised as OpenAI does for Whisper; 95 % intervals, by bootstrap over utterances."
_TRIMMED = " It was trained on trimmed audio, as `s2lora` trims it; other programs pad to 30 s."


def write_model_card(
    folder: Path, options: dict[str, Any], summary: dict[str, Any], results: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes README.md into `folder`, in the place of PEFT's, which has the headings of a card and nothing under them.

    Its metadata has base model, language, data sets and error rates as the Hugging Face hub reads them. What lies in
    folders of this machine is not named.

    Args:
        folder: of an adapter, or of a whole model.
        options: the run's, as in its config.json.
        summary: the run's summary.json.
        results: the run's results.json, just written, the last entry by what is in `folder`; none where not scored.
    """
    whole = METHODS[options["method"]].config is None
    from_hub = summary.get("from_hub", [])
    base = options["model"] if options["model"] in from_hub else None
    if options["model"] == PACKAGED:
        base = _PACKAGED_FROM
    languages = summary.get("languages") or [language_code(options["language"]) or "en"]
    spoken = " and ".join(LANGUAGES[code].title() for code in languages)
    title = f"{base or 'Whisper'} adapted to {spoken} speech"
    sources = [source_and_language(given)[0] for given in options["data"]]
    sets = results[-1]["sets"] if results else {}
    data = ModelCardData(
        base_model=base,
        datasets=[source.split(":")[0] for source in sources if source in from_hub] or None,
        eval_results=[_result(name, scored) for name, scored in sets.items()] or None,
        language=languages if len(languages) > 1 else languages[0],
        library_name="transformers" if whole else "peft",
        metrics=sorted({unit_of(scored) for scored in sets.values()}) or None,
        model_name=title,
        pipeline_tag=_TASK,
        tags=["whisper", options["method"]],
    )
    window = " --window trim" if options["window"] == "trim" else ""
    use = _WHOLE.format(window=window) if whole else _ADAPTER.format(base=base or "THE-MODEL-IT-WAS-TRAINED-ON")
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {title}\n", _training(options, summary)]
    parts += ["\n## Error rates\n", _error_rates(results), f"\n{_COUNTED}"] if results else []
    parts += ["\n## Use\n", f"THIS stands for the folder or hub id of this file.{_TRIMMED if window else ''}", use]
    write_text(folder / "README.md", "\n".join(parts))


def _training(options: dict[str, Any], summary: dict[str, Any]) -> str:
    method = METHODS[options["method"]]
    trained, share = summary["trainable_parameters"], summary.get("interpolation", 1.0)
    rows = {
        "method": method.title,
        "rank": options["rank"] if "rank" in method.reads else None,
        "trained parameters": f"{trained:,} of {summary['parameters']:,}",
        "share of the update kept": share if share != 1 else None,
        "speech": f"{summary['utterances']:,} utterances",
        "steps": f"{summary['steps']:,} of {options['batch_size'] * options['accumulation']} utterances",
        "learning rate": summary.get("learning_rate"),
        "precision": summary.get("precision"),
        "frozen weights": options.get("quantize"),
        "task": options["task"],
        "seed": options["seed"],
    }
    shown = [[name, str(value)] for name, value in rows.items() if value is not None]
    return markdown_table(["training", ""], shown)


def _error_rates(results: Sequence[dict[str, Any]]) -> str:
    """A line for each set and group, in percent, by the model before, where it was scored, and after."""
    rows = []
    for name, scored in results[-1]["sets"].items():
        unit = unit_of(scored)
        for group in scored["groups"]:
            rates = [entry["sets"][name]["groups"][group][unit] for entry in results]
            figures = [f"{rate['rate']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}]" for rate in rates]
            label = name if group == ALL else f"{name}, {group}"
            rows.append([label, f"{rates[-1]['utterances']:,}", f"{unit.upper()}, %", *figures])
    return markdown_table(["speech", "utterances", "", *["before", "after"][-len(results) :]], rows)


def _result(name: str, scored: dict[str, Any]) -> EvalResult:
    unit = unit_of(scored)
    rate = scored["groups"][ALL][unit]["rate"]
    source = scored["source"]
    return EvalResult(
        task_type=_TASK,
        dataset_type=source.split(":")[0] if on_hub(source) else name,
        dataset_name=name,
        metric_type=unit,
        metric_value=round(float(rate), 2),
    )
