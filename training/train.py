"""Adapting Whisper to speech: `train` reads the data, scores before, trains, saves the adapter and scores after."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor, set_seed

from .audio_window import AudioWindow
from .data import Speech, drop_overlong
from .errors import UserError
from .evaluation import Evaluation, TestSet, check_sets, evaluate_sets, results_table
from .fitting import fit, language_to_remember, steps_an_epoch, steps_of
from .methods import adapt, check
from .model_card import write_model_card
from .models import (
    check_language,
    free_memory,
    load_adapter,
    load_base,
    quantization_of,
    set_speech,
    to_best_device,
)
from .options import TrainOptions
from .other_languages import LARGEST_LANGUAGES, with_answers
from .output import read_json, write_json, writing
from .precision import autocast_dtype, resolved
from .run import RunFolder, check_folder
from .sets import scored_sets, training_speech
from .world import check_not_sharded, processes, speaks, world

MAX_LABEL_TOKENS = 448


@dataclass
class _Given:
    """What a run works with, checked."""

    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    language: str | None
    speech: Speech
    dev: Speech | None
    tests: dict[str, TestSet]

    @property
    def everything(self) -> list[Speech]:
        return [self.speech, *([] if self.dev is None else [self.dev]), *(test.speech for test in self.tests.values())]


def train(options: TrainOptions, *, fresh: bool = False, console: Console | None = None) -> list[Evaluation]:
    """Adapts a Whisper as `options` say and returns the evaluations before (if asked for) and after.

    A run that was stopped goes on from its last checkpoint when called again with the same options; what is finished is
    not done again. Everything is written into `options.output` (see `RunFolder`).

    Raises:
        UserError: bad input of any kind, in one sentence.
    """
    console = console or Console(quiet=not speaks())
    given = _given(options, fresh)
    run = RunFolder(options, fresh=fresh)
    with writing(run.path), run.alone():
        return _run(options, run, given, console)


def _given(options: TrainOptions, fresh: bool) -> _Given:
    """Reads speech and model; what is wrong with them or with the options is told before anything is written."""
    check(options)
    check_not_sharded()
    if options.cuda_graphs:
        _check_one_gpu(options)
    check_folder(options, fresh=fresh)
    speech, dev = training_speech(options)
    tests = scored_sets(options)
    check_sets(tests, options.group_by)
    quantization_of(options.quantize, autocast_dtype(options.precision))
    model, processor = load_base(options.model)
    language = check_language(model, options.language)
    for further in (*options.spoken_languages(), *options.keep_languages, *(test.language for test in tests.values())):
        check_language(model, further)
    if options.keep_share and language is None:
        raise UserError(f"--keep-share on {options.model}, an English-only model without others to keep; leave it out")
    if options.keep_share and not _languages_to_keep(options, model):
        raise UserError(
            "--keep-share keeps Whisper's largest languages, and the speech is in all; add --keep-languages"
        )
    if options.task == "translate" and language is None:
        raise UserError(f"--task translate with {options.model}, an English-only model; give a multilingual Whisper")
    tokenizer = processor.tokenizer
    # What it was saved with stays unless it is taken away; transcripts have no timestamps.
    tokenizer.language, tokenizer.task, tokenizer.predict_timestamps = None, None, False
    tokenizer.set_prefix_tokens(language=language, task=options.task if language else None)
    speech = drop_overlong(speech, tokenizer, MAX_LABEL_TOKENS, options.strict)
    if dev is not None:
        dev = drop_overlong(dev, tokenizer, MAX_LABEL_TOKENS, options.strict)
    utterances = len(speech)
    kept = round(options.keep_share * utterances)
    if options.keep_share and kept == 0:
        raise UserError(f"--keep-share {options.keep_share} of {utterances} utterances is none of them; give more")
    most = steps_of(options, utterances + kept)
    if options.warmup >= max(1, most):
        raise UserError(f"--warmup {options.warmup:g} is not over in the run's {most} steps; give fewer, or a share")
    with torch.device("meta"):  # whether the method goes with the model
        adapt(WhisperForConditionalGeneration(model.config), options, steps=steps_of(options, utterances))
    return _Given(model, processor, language, speech, dev, tests)


def _run(options: TrainOptions, run: RunFolder, given: _Given, console: Console) -> list[Evaluation]:
    run.check_speech(given.speech, given.dev)
    if recased := given.speech.recased:
        told = f"{recased} of {len(given.speech)} transcripts in capitals are trained on in sentence case"
        console.print(f"{told}; --keep-case leaves them", markup=False)
    run.write_skipped([item for part in given.everything for item in part.skipped], console)
    evaluations = []
    scoring: dict[str, Any] = {
        "task": options.task,
        "decoding": options.decoding(),
        "batch_size": options.eval_batch_size,
        "dtype": autocast_dtype(options.precision),
        "group_by": options.group_by,
    }
    if given.tests and options.before:
        to_best_device(given.model)
        before: dict[str, Any] = {"label": "before", "window": AudioWindow(), "folder": run.path / "before"}
        evaluations.append(evaluate_sets(given.model, given.processor, given.tests, **before, **scoring))
    if run.finished():
        adapted = _trained(given.model, run)
        console.print(f"{run.path}: already trained, read from {run.trained}", markup=False)
    else:
        adapted = _adapted(options, run, given, console)
    results: list[dict[str, Any]] = []
    if given.tests:
        to_best_device(adapted)
        after: dict[str, Any] = {
            "label": options.method,
            "window": options.audio_window(),
            "folder": run.path / "after",
        }
        evaluations.append(evaluate_sets(adapted, given.processor, given.tests, **after, **scoring))
        results = [evaluation.to_dict() for evaluation in evaluations]
        if world().is_main_process:
            write_json(run.path / "results.json", results)
        console.print(results_table(evaluations, title=f"{run.path}: error rates in percent"))
    summary = read_json(run.path / "summary.json")
    if world().is_main_process:
        write_model_card(run.trained, asdict(options), summary, results)
    trainable, total = summary["trainable_parameters"], summary["parameters"]
    console.print(f"{run.trained.name}: {run.trained} ({trainable:,} of {total:,} parameters)", markup=False)
    return evaluations


def _adapted(options: TrainOptions, run: RunFolder, given: _Given, console: Console) -> nn.Module:
    """The model, adapted and ready to be scored; takes that of `given` away."""
    model, utterances = given.model, len(given.speech)
    del given.model
    speech, asked = _keeping_languages(options, run, given, model)
    if asked:
        console.print(
            f"{len(speech) - utterances} of {asked} utterances that were also heard in other languages are trained "
            f"on in those too, to keep them: {run.other_languages}",
            markup=False,
        )
    # Weights that are stored otherwise are for training alone: an adapter is used, and so scored, with the model as
    # it was, into whose float32 it is merged without loss.
    quantization = quantization_of(options.quantize, autocast_dtype(options.precision))
    stored: dict[str, Any] = {"dtype": base_dtype(options), "quantization": quantization}
    otherwise = stored != {"dtype": torch.float32, "quantization": None}
    if otherwise:
        del model
        free_memory()
        model, _ = load_base(options.model, **stored)
    to_best_device(model)
    set_seed(options.seed)  # the factors start at random, before the Trainer seeds anything
    steps = steps_of(options, len(speech))
    epochs = steps / steps_an_epoch(options, len(speech))
    console.print(f"{steps} steps, {epochs:.3g} passes over {len(speech)} utterances", markup=False)
    adapted: Any = adapt(model, options, steps=steps)
    if not isinstance(adapted, PeftModel):
        set_speech(adapted, language_to_remember(options, adapted), options.task)
    fit(options, run, adapted, given.processor, speech, given.dev, utterances)
    if otherwise and given.tests:
        del model, adapted
        free_memory()
        adapted = _trained(load_base(options.model)[0], run)
    return adapted


def _check_one_gpu(options: TrainOptions) -> None:
    if not torch.cuda.is_available():
        raise UserError("--cuda-graphs needs a CUDA GPU, and torch sees none; leave it out")
    if resolved(options.precision) == "fp16":
        raise UserError("--cuda-graphs does not go with fp16, which this GPU trains in; give --precision fp32")
    if processes() > 1:
        raise UserError("--cuda-graphs is for one process; leave it out under torchrun")


def base_dtype(options: TrainOptions) -> torch.dtype:
    """What weights are stored in while it trains: float32, or with `half_base` what products are computed in."""
    return (autocast_dtype(options.precision) or torch.float32) if options.half_base else torch.float32


def _keeping_languages(
    options: TrainOptions, run: RunFolder, given: _Given, model: WhisperForConditionalGeneration
) -> tuple[Speech, int]:
    """The speech with answers in other languages, and how many were asked for."""
    if not options.keep_share:
        return given.speech, 0
    to_best_device(model)
    return with_answers(
        given.speech,
        model,
        given.processor,
        share=options.keep_share,
        languages=_languages_to_keep(options, model),
        file=run.other_languages,
        seed=options.seed,
        batch_size=options.eval_batch_size,
        dtype=autocast_dtype(options.precision),
    )


def _languages_to_keep(options: TrainOptions, model: WhisperForConditionalGeneration) -> list[str]:
    spoken = options.spoken_languages()
    wanted = [check_language(model, name) for name in options.keep_languages or LARGEST_LANGUAGES]
    return [code for code in wanted if code is not None and code not in spoken]


def _trained(model: WhisperForConditionalGeneration, run: RunFolder) -> nn.Module:
    if run.trained == run.adapter:
        return load_adapter(model, run.adapter)
    model.load_state_dict(type(model).from_pretrained(str(run.model)).state_dict())
    return model
