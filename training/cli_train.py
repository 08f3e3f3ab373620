"""`s2lora train`: its options, which are those of `TrainOptions`, and what they do."""

from typing import Annotated

import typer

from .cli_options import (
    AudioColumn,
    Beams,
    DecodeOnce,
    EvalBatch,
    GroupBy,
    Language,
    Limit,
    Model,
    Precision,
    Strict,
    Task,
    Test,
    TextColumn,
    of_cost,
    of_languages,
    of_method,
    of_scores,
    of_speech,
    of_training,
)


def train(
    data: Annotated[
        list[str],
        typer.Option(
            help="Training speech: audiofolder, .csv/.tsv/.jsonl manifest, folder of `save_to_disk`, or hub id "
            "ORG/SET, ORG/SET:SPLIT or ORG/SET:CONFIG:SPLIT. A row with offset and duration, in seconds, is a segment "
            "of its file. Repeat. SOURCE@LANGUAGE: in another language than --language."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder of this run.")] = "runs/s2lora",
    model: Model = "packaged-base",
    test: Test = [],  # noqa: B006
    dev: Annotated[
        str | None,
        typer.Option(
            help="Development speech SOURCE@LANGUAGE, language optional, to keep the best checkpoint. Hub id: split "
            "validation."
        ),
    ] = None,
    dev_share: Annotated[float, typer.Option(help="Or this share of the training data, whole speakers.")] = 0.0,
    language: Language = "en",
    task: Task = "transcribe",
    text_column: TextColumn = None,
    audio_column: AudioColumn = None,
    keep_case: Annotated[bool, of_speech("--keep-case", help="Do not turn bare capitals into sentence case.")] = False,
    leading_space: Annotated[
        bool,
        of_speech(help="Begin transcripts with a space, as Whisper does where words have spaces between them."),
    ] = True,
    limit: Limit = None,
    utterances: Annotated[
        int | None, of_speech(help="Train on so many utterances, drawn at random with --seed.")
    ] = None,
    strict: Strict = False,
    method: Annotated[str, of_method(help="s2lora, or to compare with: lora, adalora, ..., full.")] = "s2lora",
    preset: Annotated[
        str,
        of_method(help="S2-LoRA's settings: default, those of the paper, or unshared: LoRA's parameters and start."),
    ] = "default",
    rank: Annotated[int, of_method(help="Rank of the factors.")] = 8,
    target_modules: Annotated[
        list[str] | None, of_method(help="Linear maps to adapt. Repeat. [dim]default: the method's own[/dim]")
    ] = None,
    exclude_modules: Annotated[
        str | None, of_method(help="S2-LoRA: leave out linear maps whose whole name fits this regular expression.")
    ] = None,
    sharing: Annotated[
        str | None, of_method(help="Factors per module, stack, all or none. [dim]default: module[/dim]")
    ] = None,
    sparsity_weight: Annotated[float | None, of_method(help="α₁. [dim]default: the preset's[/dim]")] = None,
    norm_weight: Annotated[float | None, of_method(help="α₂. [dim]default: the preset's[/dim]")] = None,
    penalty: Annotated[str | None, of_method(help="soft, or proximal for exact zeros.")] = None,
    freeze_factors: Annotated[
        bool, of_method("--freeze-factors", help="Leave the shared factors as they start; train coefficients only.")
    ] = False,
    lr: Annotated[
        float | None,
        of_training(
            help="Learning rate of the factors. [dim]default: the method's; S2-LoRA's falls with the root of a rank "
            "above 8[/dim]"
        ),
    ] = None,
    coefficient_lr_ratio: Annotated[
        float | None, of_training(help="Learning rate of the coefficients over --lr. [dim]default: the preset's[/dim]")
    ] = None,
    interpolation: Annotated[
        float | None,
        of_method(
            help="Share of the update kept after training; with less, less of other speech is forgotten. "
            "[dim]default: the preset's, all of it for other methods[/dim]"
        ),
    ] = None,
    keep_share: Annotated[
        float,
        of_languages(
            help="Share of the utterances trained on a second time under prompts of other languages, towards how the "
            "unadapted model begins to answer there, so that those languages are kept. Not with --task translate."
        ),
    ] = 0.0,
    keep_languages: Annotated[
        list[str], of_languages(help="Languages to keep. Repeat. [dim]default: Whisper's eight largest[/dim]")
    ] = [],  # noqa: B006
    learn_language: Annotated[
        bool,
        of_languages(help="Train on the language's token of the prompt too, which decoding is given and never writes."),
    ] = True,
    epochs: Annotated[
        float | None, of_training(help="Passes over the data. [dim]default: one, or as many as make 250 steps[/dim]")
    ] = None,
    max_steps: Annotated[int, of_training(help="Stop after so many steps; -1 for --epochs.")] = -1,
    batch_size: Annotated[int, of_training(help="Utterances a batch.")] = 4,
    accumulation: Annotated[int, of_training(help="Batches an optimizer step.")] = 1,
    warmup: Annotated[float, of_training(help="Share of steps (below 1) or number of steps to warm up.")] = 0.1,
    weight_decay: Annotated[float, of_training(help="AdamW's decay of the factors.")] = 0.0,
    spec_augment: Annotated[bool, of_training("--spec-augment", help="Mask time and mel bands at random.")] = False,
    early_stopping: Annotated[int, of_training(help="Stop after so many checks without gain; 0: never.")] = 0,
    window: Annotated[
        str,
        of_cost(help="full: 30 s always. trim: the batch's longest utterance, several times faster if short."),
    ] = "full",
    margin: Annotated[int, of_cost(help="Positions of 20 ms after the longest utterance, for trim.")] = 64,
    full_share: Annotated[float, of_cost(help="Share of batches with the full window, for trim.")] = 0.0,
    precision: Precision = "auto",
    gradient_checkpointing: Annotated[
        bool, of_cost("--gradient-checkpointing", help="Less memory, about a third slower.")
    ] = False,
    half_base: Annotated[bool, of_cost("--half-base", help="Store the frozen weights in half precision.")] = False,
    quantize: Annotated[
        str | None,
        of_cost(help="Store the frozen maps in 8 bits, int8, or in 4, nf4, by bitsandbytes, where memory is short."),
    ] = None,
    cuda_graphs: Annotated[
        bool,
        of_cost(
            "--cuda-graphs",
            help="On a CUDA GPU record a step once for each length of transcripts and replay it, which spares the host "
            "most of its work. New, and not yet measured. Only with the full window.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        of_cost(help="Processes that read audio for training. [dim]default: up to 4 with a GPU, else none[/dim]"),
    ] = None,
    seed: Annotated[int, of_training(help="Seed of everything random.")] = 0,
    logging_steps: Annotated[int, of_training(help="Steps between two log lines.")] = 10,
    save_steps: Annotated[int, of_training(help="Steps between two checkpoints.")] = 100,
    before: Annotated[bool, of_scores(help="Also score the tests before training.")] = True,
    beams: Beams = 1,
    decode_once: DecodeOnce = False,
    group_by: GroupBy = [],  # noqa: B006
    eval_batch_size: EvalBatch = 8,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in --output and start anew.")] = False,
) -> None:
    """Adapt a Whisper to recordings with transcripts, and see the error rate before and after.

    Run again with the same options to go on after an interruption.
    """
    options = {name: value for name, value in locals().items() if name != "fresh"}
    from .options import TrainOptions
    from .train import train as run

    run(TrainOptions(**options), fresh=fresh)
