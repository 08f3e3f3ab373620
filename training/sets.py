"""Which speech a run trains on, holds out for development, and is scored on."""

import math
import os
from collections.abc import Sequence

import datasets
import numpy as np

from .data import Speech, load_speech, speakers
from .errors import UserError
from .evaluation import TestSet
from .options import TrainOptions
from .text import language_code, source_and_language


def training_speech(options: TrainOptions) -> tuple[Speech, Speech | None]:
    """Training data of all sources together, and development data if asked for (whole speakers where they are known).

    Raises:
        UserError: as `load_speech`, or too few utterances to hold a share out.
    """
    speech = _joined([_read(given, options) for given in options.data])
    if options.utterances is not None:
        speech = _drawn(speech, options.utterances, options.seed)
    if options.dev is not None:
        return speech, _read(options.dev, options, split="validation")
    if options.dev_share == 0:
        return speech, None
    return _hold_out(speech, options.dev_share, options.seed)


def _read(given: str, options: TrainOptions, split: str = "train") -> Speech:
    """Speech to train on, or of development, from "SOURCE@LANGUAGE"."""
    source, own_language = source_and_language(given)
    language = language_code(own_language or options.language)
    return load_speech(
        source, split=split, limit=options.limit, text_column=options.text_column, audio_column=options.audio_column,
        keep_case=options.keep_case, leading_space=options.leading_space,
        language="en" if options.task == "translate" else language,
        prompt_language=language if language != language_code(options.language) else None, strict=options.strict,
    )  # fmt: skip


def scored_sets(options: TrainOptions) -> dict[str, TestSet]:
    """The test sets a run is scored on, by name, read as its options say.

    Raises:
        UserError: as `named_sets`.
    """
    return named_sets(
        options.test,
        options.language,
        task=options.task,
        text_column=options.text_column,
        audio_column=options.audio_column,
        limit=options.limit,
        strict=options.strict,
    )


def named_sets(
    specifications: Sequence[str],
    language: str | None,
    *,
    task: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    limit: int | None = None,
    strict: bool = False,
) -> dict[str, TestSet]:
    """Test sets by name from "NAME=SOURCE@LANGUAGE"; NAME defaults to the source's last part, LANGUAGE to `language`.

    NAME ends at the first =, so that a source with an = in it needs one. Recordings may be of any length.

    Raises:
        UserError: as `load_speech`, two sets of one name, or a name with a / in it.
    """
    sets: dict[str, TestSet] = {}
    for specification in specifications:
        name, source, own_language = parts_of(specification)
        if name in sets:
            raise UserError(f"two test sets are named {name!r}; name them with --test NAME=SOURCE")
        speech = load_speech(
            source, split="test", text_column=text_column, audio_column=audio_column, limit=limit, strict=strict,
            longest_s=math.inf,
        )  # fmt: skip
        sets[name] = TestSet(speech, language_code(own_language or language), task)
    return sets


def parts_of(specification: str) -> tuple[str, str, str]:
    """Name, source and language, "" without one, of a test set as `named_sets` is given it.

    Raises:
        UserError: a name with a / in it.
    """
    name, source = specification.split("=", 1) if "=" in specification else ("", specification)
    if "/" in name:
        raise UserError(
            f"--test {specification}: the set's name {name!r} has a / in it; give NAME=SOURCE, and a name also "
            "where the source has an = in it"
        )
    path, language = source_and_language(source)
    return name or os.path.basename(os.path.abspath(path)), path, language


def _joined(sources: Sequence[Speech]) -> Speech:
    if len(sources) == 1:
        return sources[0]
    dataset = datasets.concatenate_datasets([source.dataset for source in sources])
    skipped = [item for source in sources for item in source.skipped]
    return Speech(dataset, " + ".join(source.source for source in sources), skipped)


def _drawn(speech: Speech, utterances: int, seed: int) -> Speech:
    if utterances > len(speech):
        raise UserError(f"{speech.source}: --utterances is {utterances}, but there are {len(speech)}")
    chosen = np.random.default_rng(seed).permutation(len(speech))[:utterances]
    return Speech(speech.dataset.select(sorted(chosen)), speech.source, speech.skipped)


def _hold_out(speech: Speech, share: float, seed: int) -> tuple[Speech, Speech]:
    unit, values = speakers(speech)
    names = sorted(set(values))
    np.random.default_rng(seed).shuffle(names)
    held = set(names[: round(share * len(names))])
    chosen = np.array([value in held for value in values])
    if not chosen.any() or chosen.all():
        raise UserError(f"{speech.source}: {len(names)} {unit}s are too few to hold out {share:.0%}; give --dev")
    parts = [Speech(speech.dataset.select(np.flatnonzero(mask)), speech.source) for mask in (~chosen, chosen)]
    parts[0].skipped = speech.skipped
    return parts[0], parts[1]
