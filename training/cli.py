"""The command `s2lora`. What each command does is in the module of its name; imports wait until a command runs."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    Adapter,
    AdaptersModel,
    AudioColumn,
    Beams,
    DecodeOnce,
    EvalBatch,
    GroupBy,
    Limit,
    Margin,
    Precision,
    Strict,
    Test,
    TextColumn,
    of_cost,
)
from .cli_train import train
from .errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def _s2lora(context: typer.Context) -> None:
    """Adapt Whisper to low-resource speech with Sparsely Shared LoRA."""
    if context.invoked_subcommand not in ("train", "evaluate"):
        from .world import check_alone

        check_alone(str(context.invoked_subcommand))


app.command()(train)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="YAML file that describes the runs, see docs/reproduction/.")],
    output: Annotated[Path, typer.Option(help="Folder of all runs, tables and figures.")] = Path("runs/comparison"),
    runs: Annotated[int | None, typer.Option(help="Stop after so many runs. [dim]default: all[/dim]")] = None,
) -> None:
    """Train and score many methods alike, and compare them in tables and figures.

    Run again to go on after an interruption; what is finished is not run again. Called several times at once, on one
    GPU or on several, the processes share the runs.
    """
    from .comparison import read_comparison, run_comparison
    from .report import write_report

    comparison = read_comparison(file, output)
    for _ in run_comparison(comparison, most=runs):
        write_report(output)
    write_report(output)
    print(f"tables, figures and report.html: {output}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file. [dim]default: report.html in the folder[/dim]")
    ] = None,
) -> None:
    """One HTML page of a run or a comparison: tables, figures, rank maps, transcripts with the errors marked."""
    from .report import write_report

    print(write_report(run, output))


@app.command()
def evaluate(
    test: Test,
    output: Annotated[str, typer.Option(help="Folder for results.json and transcripts.")] = "runs/evaluation",
    model: AdaptersModel = None,
    adapter: Adapter = None,
    language: Annotated[
        str | None,
        typer.Option(help="Language of other sets. [dim]default: the adapter's or model's, else en[/dim]"),
    ] = None,
    window: Annotated[str | None, of_cost(help="full or trim. [dim]default: the adapter's[/dim]")] = None,
    margin: Margin = None,
    text_column: TextColumn = None,
    audio_column: AudioColumn = None,
    limit: Limit = None,
    strict: Strict = False,
    beams: Beams = 1,
    decode_once: DecodeOnce = False,
    precision: Precision = "auto",
    group_by: GroupBy = [],  # noqa: B006
    eval_batch_size: EvalBatch = 8,
) -> None:
    """Score a Whisper, with or without an adapter, on test sets."""
    from .decoding import Decoding
    from .evaluate import evaluate as run
    from .models import PACKAGED, configured_language, remembered_speech
    from .sets import named_sets

    of_training = remembered_speech(adapter).get("language") if adapter else configured_language(model or PACKAGED)
    language = language or of_training or "en"
    tests = named_sets(test, language, text_column=text_column, audio_column=audio_column, limit=limit, strict=strict)
    run(
        tests,
        output,
        model=model,
        adapter=adapter,
        window=window,
        margin=margin,
        decoding=Decoding(beams, decode_once),
        precision=precision,
        batch_size=eval_batch_size,
        group_by=group_by,
    )


@app.command()
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="Audio files, or folders of them.")],
    model: AdaptersModel = None,
    adapter: Adapter = None,
    language: Annotated[
        str | None, typer.Option(help="Language. [dim]default: the adapter's, else detected[/dim]")
    ] = None,
    window: Annotated[str | None, of_cost(help="full or trim. [dim]default: the adapter's[/dim]")] = None,
    margin: Margin = None,
    beams: Beams = 1,
    decode_once: DecodeOnce = False,
    precision: Precision = "auto",
    eval_batch_size: EvalBatch = 8,
    strict: Strict = False,
    max_segment: Annotated[
        float, typer.Option(help="Longest stretch heard at once, in seconds; a longer recording is cut at its pauses.")
    ] = 30.0,
    timestamps: Annotated[
        bool,
        typer.Option(
            "--timestamps", help="A line for each stretch: file, offset and duration in seconds, text; as --data reads."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Also write a TSV of file and text, ten minutes of audio at a time; a stopped command goes on from it."
        ),
    ] = None,
) -> None:
    """Turn audio files into text."""
    from .transcribe import table
    from .transcribe import transcribe as run

    transcripts, skipped = run(
        list(audio),
        model=model,
        adapter=adapter,
        language=language,
        window=window,
        margin=margin,
        beams=beams,
        decode_once=decode_once,
        precision=precision,
        batch_size=eval_batch_size,
        strict=strict,
        max_segment=max_segment,
        timestamps=timestamps,
        output=output,
    )
    for line in table(transcripts, timestamps):
        typer.echo(line)
    for transcript in transcripts:
        if not transcript.ended:
            typer.echo(f"cut off: {transcript.file}: its transcript has more tokens than are decoded", err=True)
        if not transcript.segments:
            typer.echo(f"no speech found: {transcript.file}", err=True)
    for item in skipped:
        typer.echo(f"skipped: {item.reason}", err=True)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter folder of a run (RUN/adapter) or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    model: AdaptersModel = None,
) -> None:
    """Fold an adapter into its Whisper and save an ordinary model."""
    from .audio_window import AudioWindow
    from .merge import merge as run

    trained = run(adapter, output, model=model)
    typer.echo(f"merged model: {output}")
    if trained.get("audio_window") == "trim":
        usual = AudioWindow().margin
        margin = trained.get("audio_window_margin", usual)
        wider = f" --margin {margin}" if margin != usual else ""
        typer.echo(f"it was trained on trimmed audio: decode it with `s2lora transcribe --window trim{wider}`")


@app.command()
def interpolate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `s2lora train`.")],
    share: Annotated[float, typer.Argument(help="Of all that it learnt, above 0, at most 1, whatever it kept.")],
    output: Annotated[Path | None, typer.Option(help="[dim]default: RUN/adapter-SHARE[/dim]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now. [dim]default: as the run has it[/dim]")
    ] = None,
) -> None:
    """Write the adapter of a run anew with another share of the update, without training."""
    from .interpolate import interpolate_run

    folder = run / f"adapter-{share:g}" if output is None else output
    interpolate_run(run, share, folder, model=model)
    typer.echo(f"adapter with {share:g} of the update: {folder}")


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="Train on these recordings instead of synthetic speech.")] = None,
    test: Annotated[str | None, typer.Option(help="Test on these recordings; needs --data.")] = None,
    output: Annotated[str, typer.Option(help="Folder of the demonstration.")] = "demo-run",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in --output and start anew.")] = False,
) -> None:
    """Adapt Whisper-base to child-like speech in a few minutes on two cores, and show what changed."""
    from .demo import demo as run

    run(data=data, test=test, output=output, fresh=fresh)


@app.command()
def tune(
    show: Annotated[
        bool, typer.Option("--show", help="Print what is remembered, from which file; time nothing.")
    ] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Delete what is remembered; time nothing.")] = False,
    model: Annotated[
        str, typer.Option(help="Whisper: tiny, base, small, medium, large, turbo, hub id, folder, or packaged-base.")
    ] = "packaged-base",
    batch: Annotated[list[int], typer.Option(help="Utterances a batch. Repeat.")] = [4],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of an utterance.")] = 32,
    window: Annotated[str, typer.Option(help="full: 30 s. trim: every length from 1 s.")] = "full",
    rank: Annotated[int, typer.Option(help="Rank of the factors.")] = 8,
    precision: Precision = "auto",
    half_base: Annotated[
        bool, typer.Option("--half-base", help="Frozen weights are stored in half precision.")
    ] = False,
) -> None:
    """Time the ways to compute a layer on your GPU, ahead of training, and remember the fastest.

    Training does the same by itself at each shape's first use. The environment variable S2LORA_BACKEND overrides it.
    """
    import torch

    from . import tune as strategies

    if forget:
        path, there = strategies.forget()
        typer.echo(f"deleted {path}" if there else f"nothing is remembered in {path}")
    elif show:
        strategies.show()
    elif not torch.cuda.is_available():
        typer.echo(strategies.NO_GPU, err=True)
        raise typer.Exit(1)
    else:
        strategies.tune(
            model, batches=batch, tokens=tokens, window=window, rank=rank, precision=precision, half_base=half_base
        )


_STOPPED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Entry point: bad input is one sentence on stderr and status 2, Ctrl-C, or another process's end, how to go on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # PEFT takes AdaLoRA's weights that have given up all their ranks for files half written.
    warnings.filterwarnings("ignore", message=r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape")
    # and AdaLoRA's names of weights for names of modules.
    warnings.filterwarnings("ignore", message=r"The following rank_pattern keys did not match")
    try:
        if len(sys.argv) > 1 and not {"--help", "-h"} & set(sys.argv):
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        app()
    except UserError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except RuntimeError as error:
        from .world import is_of_another

        if not is_of_another(error):
            raise
        gone = "stopped: another process of the run is gone; it says why, or was killed; the same command goes on"
        typer.secho(gone, err=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != _STOPPED:
            raise
        goes_on = bool({"train", "compare", "demo", "evaluate"} & set(sys.argv[1:2]))
        goes_on |= sys.argv[1:2] == ["transcribe"] and any(word.startswith("--output") for word in sys.argv)
        typer.secho("stopped" + "; run the same command again to go on" * goes_on, err=True)
        sys.exit(_STOPPED)
