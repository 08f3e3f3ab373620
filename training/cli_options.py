"""Options that several commands of `s2lora` have, and the panels that `--help` shows options in."""

from functools import partial
from typing import Annotated

import typer

of_speech = partial(typer.Option, rich_help_panel="Speech and transcripts")
of_method = partial(typer.Option, rich_help_panel="Method")
of_languages = partial(typer.Option, rich_help_panel="Other languages")
of_training = partial(typer.Option, rich_help_panel="Training")
of_cost = partial(typer.Option, rich_help_panel="Time and memory")
of_scores = partial(typer.Option, rich_help_panel="Decoding and scores")

Model = Annotated[str, typer.Option(help="Whisper to use: hub id, local folder, or [b]packaged-base[/b].")]
AdaptersModel = Annotated[
    str | None,
    typer.Option(
        help="Whisper to use: hub id or local folder. [dim]default: the adapter's, without one packaged-base[/dim]"
    ),
]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder of a run (RUN/adapter) or hub id.")]
Language = Annotated[str, typer.Option(help="Language of the speech: code or English name.")]
Task = Annotated[str, of_speech(help="transcribe, or translate into English.")]
TextColumn = Annotated[str | None, of_speech(help="Column with transcripts. [dim]default: found by name[/dim]")]
AudioColumn = Annotated[str | None, of_speech(help="Column with audio. [dim]default: found by name[/dim]")]
Strict = Annotated[bool, of_speech("--strict", help="Stop at the first bad utterance instead of skipping it.")]
Precision = Annotated[str, of_cost(help="auto, fp32, bf16 or fp16: precision of the products.")]
GroupBy = Annotated[list[str], of_scores(help="Metadata column to break error rates down by, such as age. Repeat.")]
Test = Annotated[
    list[str],
    typer.Option(
        help="Test set NAME=SOURCE@LANGUAGE, language optional, name too but for a source with = in it. Hub id: split "
        "test. Repeat."
    ),
]
Margin = Annotated[int | None, of_cost(help="Positions after the longest. [dim]default: the adapter's, else 64[/dim]")]
Beams = Annotated[int, of_scores(help="Beams of the search for a transcript; 1 is greedy.")]
DecodeOnce = Annotated[
    bool, of_scores("--decode-once", help="Leave a transcript that does not end; do not decode it again.")
]
EvalBatch = Annotated[int, of_scores(help="Utterances decoded at once.")]
Limit = Annotated[int | None, of_speech(help="Use only the first so many utterances of each set, for a quick try.")]
