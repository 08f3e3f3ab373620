"""Adapting Whisper to speech: `train` reads the data, scores before, trains, saves the adapter and scores after."""

import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

from fused_s2lora import S2LoraCallback, interpolate

from .audio_window import AudioWindow
from .collate import SpeechCollator
from .data import Speech, drop_overlong
from .errors import DivergedError, UserError
from .evaluation import Evaluation, check_sets, evaluate_sets, results_table
from .methods import adapt, check, interpolation, learning_rate
from .model_card import write_model_card
from .models import (
    check_language,
    free_memory,
    load_adapter,
    load_base,
    on_hub,
    quantization_of,
    remember_speech,
    save_processor,
    set_speech,
    to_best_device,
)
from .options import LEAST_STEPS, TrainOptions
from .other_languages import LARGEST_LANGUAGES, with_answers
from .output import read_json, write_json, writing
from .precision import autocast_dtype, resolved
from .rank_maps import write_rank_maps
from .run import RunFolder, check_folder, peak_memory_mib, reset_peak_memory, versions
from .sets import scored_sets, training_speech
from .trainer import AdaLoraCallback, SavingAsAsked, SpeechTrainer, StepTimes
from .world import processes, speaks, world

MAX_LABEL_TOKENS = 448
GPU_WORKERS = 4
GRAPH_TOKENS = 16  # CUDA graphs are recorded for transcripts of so many tokens more each; divides 448


def train(options: TrainOptions, *, fresh: bool = False, console: Console | None = None) -> list[Evaluation]:
    """Adapts a Whisper as `options` say and returns the evaluations before (if asked for) and after.

    A run that was stopped goes on from its last checkpoint when called again with the same options; what is finished is
    not done again. Everything is written into `options.output` (see `RunFolder`).

    Raises:
        UserError: bad input of any kind, in one sentence.
    """
    console = console or Console(quiet=not speaks())
    check(options)
    if options.cuda_graphs:
        _check_one_gpu(options)
    check_folder(options, fresh=fresh)
    speech, dev = training_speech(options)
    tests = scored_sets(options)
    check_sets(tests, options.group_by)
    quantization = quantization_of(options.quantize, autocast_dtype(options.precision))
    model, processor = load_base(options.model)
    language = check_language(model, options.language)
    for further in (*options.keep_languages, *(test.language for test in tests.values())):
        check_language(model, further)
    if options.keep_share and language is None:
        raise UserError(f"--keep-share on {options.model}, an English-only model without others to keep; leave it out")
    if options.task == "translate" and language is None:
        raise UserError(f"--task translate with {options.model}, an English-only model; give a multilingual Whisper")
    tokenizer = processor.tokenizer
    # What it was saved with stays unless it is taken away; transcripts have no timestamps.
    tokenizer.language, tokenizer.task, tokenizer.predict_timestamps = None, None, False
    tokenizer.set_prefix_tokens(language=language, task=options.task if language else None)
    speech = drop_overlong(speech, processor.tokenizer, MAX_LABEL_TOKENS, options.strict)
    if dev is not None:
        dev = drop_overlong(dev, processor.tokenizer, MAX_LABEL_TOKENS, options.strict)
    utterances = len(speech)
    if options.keep_share and round(options.keep_share * utterances) == 0:
        raise UserError(f"--keep-share {options.keep_share} of {utterances} utterances is none of them; give more")
    most = _steps(options, utterances + round(options.keep_share * utterances))
    if options.warmup >= max(1, most):
        raise UserError(f"--warmup {options.warmup:g} is not over in the run's {most} steps; give fewer, or a share")
    with torch.device("meta"):  # whether the method goes with the model is told before anything is deleted or decoded
        adapt(WhisperForConditionalGeneration(model.config), options, steps=_steps(options, utterances))
    run = RunFolder(options, fresh=fresh)
    with writing(run.path), run.alone():
        everything = [speech, *([] if dev is None else [dev]), *(test.speech for test in tests.values())]
        run.check_speech(speech, dev)
        if recased := speech.recased:
            told = f"{recased} of {len(speech)} transcripts in capitals are trained on in sentence case"
            console.print(f"{told}; --keep-case leaves them", markup=False)
        run.write_skipped([item for part in everything for item in part.skipped], console)

        evaluations = []
        scoring: dict[str, Any] = {
            "task": options.task,
            "decoding": options.decoding(),
            "batch_size": options.eval_batch_size,
            "dtype": autocast_dtype(options.precision),
            "group_by": options.group_by,
        }
        if tests and options.before:
            to_best_device(model)
            evaluations.append(
                evaluate_sets(
                    model, processor, tests, label="before", window=AudioWindow(), folder=run.path / "before", **scoring
                )
            )

        adapted: Any
        if run.finished():
            adapted = _trained(model, run)
            console.print(f"{run.path}: already trained, read from {run.trained}", markup=False)
        else:
            speech, asked = _keeping_languages(options, run, speech, model, processor, language)
            if asked:
                console.print(
                    f"{len(speech) - utterances} of {asked} utterances that were also heard in other languages are "
                    f"trained on in those too, to keep them: {run.other_languages}",
                    markup=False,
                )
            # Weights that are stored otherwise are for training alone: an adapter is used, and so scored, with the
            # model as it was, into whose float32 it is merged without loss.
            stored: dict[str, Any] = {"dtype": base_dtype(options), "quantization": quantization}
            otherwise = stored != {"dtype": torch.float32, "quantization": None}
            if otherwise:
                del model
                free_memory()
                model, _ = load_base(options.model, **stored)
            to_best_device(model)
            set_seed(options.seed)  # the factors start at random, before the Trainer seeds anything
            steps = _steps(options, len(speech))
            epochs = steps / _steps_an_epoch(options, len(speech))
            console.print(f"{steps} steps, {epochs:.3g} passes over {len(speech)} utterances", markup=False)
            adapted = adapt(model, options, steps=steps)
            if not isinstance(adapted, PeftModel):
                set_speech(adapted, language, options.task)
            _train(options, run, adapted, processor, speech, dev, utterances)
            if otherwise and tests:
                del model, adapted
                free_memory()
                adapted = _trained(load_base(options.model)[0], run)
        results: list[dict[str, Any]] = []
        if tests:
            to_best_device(adapted)
            after, window = run.path / "after", options.audio_window()
            evaluations.append(
                evaluate_sets(adapted, processor, tests, label=options.method, window=window, folder=after, **scoring)
            )
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


def _workers(options: TrainOptions) -> int:
    """Processes that read audio: a GPU would wait for it; without one they take cores from the training itself."""
    if options.workers is not None:
        return options.workers
    return min(GPU_WORKERS, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0


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


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all, each shared one once; of 4 bits there are two in a byte."""
    counts = [
        (parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    return sum(size for size, trainable in counts if trainable), sum(size for size, _ in counts)


def _keeping_languages(
    options: TrainOptions,
    run: RunFolder,
    speech: Speech,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    language: str | None,
) -> tuple[Speech, int]:
    """The speech with answers in other languages, and how many were asked for."""
    if not options.keep_share:
        return speech, 0
    to_best_device(model)
    wanted = [check_language(model, name) for name in options.keep_languages or LARGEST_LANGUAGES]
    return with_answers(
        speech,
        model,
        processor,
        share=options.keep_share,
        languages=[code for code in wanted if code is not None and code != language],
        file=run.other_languages,
        seed=options.seed,
        batch_size=options.eval_batch_size,
        dtype=autocast_dtype(options.precision),
    )


def _steps(options: TrainOptions, utterances: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them, under torchrun too."""
    if options.max_steps > 0:
        return options.max_steps
    return math.ceil(_epochs(options, utterances) * _steps_an_epoch(options, utterances))


def _steps_an_epoch(options: TrainOptions, utterances: int) -> int:
    batches = math.ceil(math.ceil(utterances / options.batch_size) / processes())  # of each process
    return math.ceil(batches / options.accumulation)


def _epochs(options: TrainOptions, utterances: int) -> float:
    """Passes over the data: as many as asked for, or as make `LEAST_STEPS`, at least one."""
    if options.epochs is not None:
        return options.epochs
    return max(1, math.ceil(LEAST_STEPS / _steps_an_epoch(options, utterances)))


def _check_steps(run: RunFolder, checkpoint: Path, steps: int) -> None:
    """Raises UserError where the run that goes on would have more steps in all, or fewer, than when it was begun."""
    begun = read_json(checkpoint / "trainer_state.json")["max_steps"]
    if begun != steps:
        raise UserError(
            f"{run.path}: was begun with {begun} steps in all, and would have {steps} now; go on with as many "
            "processes and the same speech as then, or give --fresh to start anew"
        )


def _trained(model: WhisperForConditionalGeneration, run: RunFolder) -> nn.Module:
    if run.trained == run.adapter:
        return load_adapter(model, run.adapter)
    model.load_state_dict(type(model).from_pretrained(str(run.model)).state_dict())
    return model


def _arguments(options: TrainOptions, run: RunFolder, epochs: float, has_dev: bool) -> Seq2SeqTrainingArguments:
    dtype = autocast_dtype(options.precision)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=epochs,
        max_steps=options.max_steps,
        learning_rate=learning_rate(options),
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,  # below 1 it is a share of all steps
        weight_decay=options.weight_decay,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if options.window == "trim" else "random",
        length_column_name="duration_s",
        dataloader_num_workers=_workers(options),
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if has_dev else "no",
        eval_steps=options.save_steps,
        load_best_model_at_end=has_dev,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        ddp_find_unused_parameters=False,  # there are none, and looking for them walks the graph at every step
        log_level_replica="error",  # as the command has it for the first process
        restore_callback_states_from_checkpoint=options.early_stopping > 0,  # the checks without gain so far
        seed=options.seed,
        data_seed=options.seed,
        report_to=["tensorboard"],
    )
    # Several GPUs in one process would be nn.DataParallel; with torchrun each has a process of its own.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _train(
    options: TrainOptions,
    run: RunFolder,
    model: Any,
    processor: WhisperProcessor,
    speech: Speech,
    dev: Speech | None,
    utterances: int,
) -> None:
    """Trains to the end, from the last checkpoint if there is one, and writes adapter, summary and rank pattern.

    Of `speech` the first `utterances` are the user's own.
    """
    wrapped = isinstance(model, PeftModel)
    whisper: Any = model.get_base_model() if wrapped else model
    whisper.config.use_cache = False
    if options.gradient_checkpointing:
        whisper.gradient_checkpointing_enable({"use_reentrant": False})
    augmenting = {"apply_spec_augment": options.spec_augment, "mask_time_prob": 0.05, "mask_feature_prob": 0.05}
    found = {name: getattr(whisper.config, name) for name in augmenting}
    whisper.config.update(augmenting)
    step_times = StepTimes()
    callbacks: list[Any] = [S2LoraCallback(), AdaLoraCallback(), SavingAsAsked(), step_times]
    if options.early_stopping:
        callbacks.append(EarlyStoppingCallback(options.early_stopping))
    trainer = SpeechTrainer(
        model=model,
        args=_arguments(options, run, _epochs(options, len(speech)), dev is not None),
        train_dataset=speech.dataset,
        eval_dataset=None if dev is None else dev.dataset,
        data_collator=SpeechCollator(
            processor.tokenizer,
            options.audio_window(),
            full_share=options.full_share,
            seed=options.seed,
            learn_language=options.learn_language,
            token_multiple=GRAPH_TOKENS if options.cuda_graphs else 1,
        ),
        callbacks=callbacks,
        feature_extractor=processor.feature_extractor,
        cuda_graphs=options.cuda_graphs,
    )
    checkpoint = run.last_checkpoint()
    if checkpoint is not None and options.method.startswith("adalora"):
        checkpoint = None  # PEFT cannot restore the allocator's statistics, so a killed AdaLoRA run starts anew
    if checkpoint is not None:
        _check_steps(run, checkpoint, _steps(options, len(speech)))
    reset_peak_memory()
    start = time.perf_counter()
    first_step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - start
    # Every loss was finite, each of them before its step.
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise DivergedError("the last step left weights that are not finite; lower --lr, or raise --warmup")
    whisper.config.use_cache = True
    whisper.config.update(found)
    if (share := interpolation(options)) != 1:
        interpolate(model, share)
    if world().is_main_process:
        model.save_pretrained(str(run.adapter if wrapped else run.model))
        if wrapped:
            language = check_language(whisper, options.language)
            remember_speech(run.adapter, options.audio_window(), language, options.task)
        else:
            save_processor(processor, run.model)
        write_rank_maps(model, run.path)
        write_json(run.path / "metrics.json", trainer.state.log_history)
        trainable, total = parameter_counts(model)
        summary = {
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch or 0, 3),
            "resumed_at_step": first_step,
            "train_s": round(seconds, 1),
            "step_s": step_times.median_s(),
            "peak_memory_mib": round(peak_memory_mib()),
            "trainable_parameters": trainable,
            "parameters": total,
            "utterances": utterances,
            "answers_in_other_languages": len(speech) - utterances,
            "precision": resolved(options.precision),
            "learning_rate": learning_rate(options),
            "interpolation": share,
            "from_hub": [source for source in (options.model, *options.data) if on_hub(source)],
            # A run may be scored later and elsewhere than it was trained.
            **{name: value for name, value in versions().items() if name in ("commit", "device", "utc")},
        }
        write_json(run.path / "summary.json", summary)
    world().wait_for_everyone()
