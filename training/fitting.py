"""A run's training itself: Whisper with its method fitted to speech by the Trainer, to the end or from a checkpoint."""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, Seq2SeqTrainingArguments, WhisperProcessor

from fused_s2lora import S2LoraCallback, interpolate

from .collate import SpeechCollator
from .data import Speech
from .errors import DivergedError, UserError
from .methods import interpolation, learning_rate
from .models import check_language, on_hub, remember_speech, save_processor
from .options import LEAST_STEPS, TrainOptions
from .output import read_json, write_json
from .precision import autocast_dtype, resolved
from .rank_maps import write_rank_maps
from .run import RunFolder, peak_memory_mib, reset_peak_memory, versions
from .text import source_and_language
from .trainer import AdaLoraCallback, SavingAsAsked, SpeechTrainer, StepTimes
from .world import processes, speaks, world

GPU_WORKERS = 4
GRAPH_TOKENS = 16  # CUDA graphs are recorded for transcripts of so many tokens more each; divides 448


def fit(
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
        checkpoint = None  # PEFT cannot restore the allocator's statistics
        if speaks():
            print(f"{run.path}: AdaLoRA does not go on from a checkpoint; its training begins anew", file=sys.stderr)
    if checkpoint is not None:
        _check_steps(run, checkpoint, steps_of(options, len(speech)))
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
            remember_speech(run.adapter, options.audio_window(), language_to_remember(options, whisper), options.task)
        else:
            save_processor(processor, run.model)
        write_rank_maps(model, run.path)
        write_json(run.path / "metrics.json", trainer.state.log_history)
        trainable, total = parameter_counts(model)
        sources = [source_and_language(given)[0] for given in options.data]
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
            "languages": options.spoken_languages(),
            "answers_in_other_languages": len(speech) - utterances,
            "precision": resolved(options.precision),
            "learning_rate": learning_rate(options),
            "interpolation": share,
            "from_hub": [source for source in (options.model, *sources) if on_hub(source)],
            # A run may be scored later and elsewhere than it was trained.
            **{name: value for name, value in versions().items() if name in ("commit", "device", "utc")},
        }
        write_json(run.path / "summary.json", summary)
    world().wait_for_everyone()


def language_to_remember(options: TrainOptions, model: Any) -> str | None:
    """The language that the model is prompted in from now on; None, for it to detect it, of speech in several."""
    spoken = options.spoken_languages()
    return check_language(model, spoken[0]) if len(spoken) == 1 else None


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
        disable_tqdm=not sys.stderr.isatty(),  # in a file a bar would be a line of every step
    )
    # As it is asked here, whatever `accelerate launch` says in the environment.
    arguments.mixed_precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[dtype]
    # Several GPUs in one process would be nn.DataParallel; with torchrun each has a process of its own.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _workers(options: TrainOptions) -> int:
    """Processes that read audio: a GPU would wait for it; without one they take cores from the training itself."""
    if options.workers is not None:
        return options.workers
    return min(GPU_WORKERS, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0


def _check_steps(run: RunFolder, checkpoint: Path, steps: int) -> None:
    """Raises UserError where the run that goes on would have other steps than when it was begun, or other processes."""
    begun = read_json(checkpoint / "trainer_state.json")["max_steps"]
    if begun != steps:
        raise UserError(
            f"{run.path}: was begun with {begun} steps in all, and would have {steps} now; go on with as many "
            "processes and the same speech as then, or give --fresh to start anew"
        )
    by = len([*checkpoint.glob("rng_state*.pth")])  # each has written its own
    if by != processes():  # of as many steps by --max-steps
        raise UserError(
            f"{run.path}: processes were {by} when it was begun, and are {processes()} now; go on with as many as "
            "then, or give --fresh to start anew"
        )


def steps_of(options: TrainOptions, utterances: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them, under torchrun too."""
    if options.max_steps > 0:
        return options.max_steps
    return math.ceil(_epochs(options, utterances) * steps_an_epoch(options, utterances))


def steps_an_epoch(options: TrainOptions, utterances: int) -> int:
    batches = math.ceil(math.ceil(utterances / options.batch_size) / processes())  # of each process
    return math.ceil(batches / options.accumulation)


def _epochs(options: TrainOptions, utterances: int) -> float:
    """Passes over the data: as many as asked for, or as make `LEAST_STEPS`, at least one."""
    if options.epochs is not None:
        return options.epochs
    return max(1, math.ceil(LEAST_STEPS / steps_an_epoch(options, utterances)))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all, each shared one once; of 4 bits there are two in a byte."""
    counts = [
        (parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    return sum(size for size, trainable in counts if trainable), sum(size for size, _ in counts)
