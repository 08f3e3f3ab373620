"""Scoring what a run left, on a tiny Whisper."""

import csv
import io
import json
import shutil

import pytest
import soundfile
import torch
from rich.console import Console
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from fused_s2lora.training import evaluation as evaluation_module
from fused_s2lora.training import merge as merge_module
from fused_s2lora.training import models
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.cli import app
from fused_s2lora.training.decoding import Heard
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.evaluation import Evaluation, TestSet, read_sets, score_set, unit_of
from fused_s2lora.training.merge import merge
from fused_s2lora.training.models import load_base, remembered_speech
from fused_s2lora.training.packaged_model import FOLDER
from fused_s2lora.training.sets import named_sets, scored_sets
from fused_s2lora.training.train import train
from fused_s2lora.training.transcribe import transcribe
from tests.training.comparisons import QUIET
from tests.training.speech import TEXTS, write_folder, write_lines


def test_results_of_another_source_or_language_are_not_taken_over(finished, tones, tmp_path):
    def kept(name: str) -> bool:
        sets = named_sets([name], "en")
        return bool(read_sets(finished / "after", sets))

    other = write_folder(tmp_path / "noisy")  # the same file names
    assert kept(f"same={tones}")
    assert not kept(f"same={other}")
    assert not kept(f"same={tones}@de")
    assert not kept(f"another={tones}")


def test_transcripts_of_recordings_replaced_by_others_of_their_length_are_not_taken_over(tmp_path):
    folder = write_folder(tmp_path / "speech")

    def sets() -> dict[str, TestSet]:
        return named_sets([f"s={folder}"], "en")

    heard = [Heard(text, True) for text in TEXTS]
    Evaluation("after", [score_set("s", sets()["s"], heard)]).write(tmp_path / "after")
    assert read_sets(tmp_path / "after", sets())
    samples, rate = soundfile.read(folder / "u1.flac")
    soundfile.write(folder / "u1.flac", -samples, rate)
    assert not read_sets(tmp_path / "after", sets())
    results = tmp_path / "after" / "results.json"
    written = json.loads(results.read_text())
    del written["sets"]["s"]["audio_sha256"]  # as it was written before there was a digest
    results.write_text(json.dumps(written))
    assert read_sets(tmp_path / "after", sets())


def test_a_group_without_words_does_not_lose_the_evaluation(tmp_path, tiny_folder, short_decoding):
    folder = write_folder(tmp_path / "speech", ("WE CALL IT BEAR", "UM HMM", "THE SUN IS UP"))
    console = Console(record=True, width=200)
    (result,) = evaluate(
        named_sets([f"t={folder}"], "en"), tmp_path / "out", model=str(tiny_folder), precision="fp32",
        group_by=["speaker"], console=console,
    ).sets  # fmt: skip
    assert list(result.rates) == ["all", "speaker s0", "speaker s2"]
    assert result.wordless == ["speaker s1"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["sets"]["t"]["groups_without_words"] == ["speaker s1"]
    nothing = write_folder(tmp_path / "nothing", ("UM", "HMM"))
    with pytest.raises(UserError, match="no transcript has a word left"):
        evaluate(named_sets([f"t={nothing}"], "en"), tmp_path / "no", model=str(tiny_folder), console=QUIET)
    nothing = write_folder(tmp_path / "dots", ("...", "- ?"))
    with pytest.raises(UserError, match="no transcript has a word left"):
        evaluate(named_sets([f"t={nothing}"], "de"), tmp_path / "no", model=str(tiny_folder), console=QUIET)


def test_names_of_test_sets(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "snr=10" / "speech", TEXTS[:2])
    assert list(named_sets([f"noisy={folder}"], "en")) == ["noisy"]
    with pytest.raises(UserError, match=r"the set's name '.*/snr' has a / in it; give NAME=SOURCE"):
        named_sets([str(folder)], "en")
    monkeypatch.chdir(write_folder(tmp_path / "here", TEXTS[:2]))
    assert list(named_sets(["."], "en")) == ["here"]


def test_test_sets_in_a_path_with_an_at_sign(tmp_path):
    folder = write_folder(tmp_path / "me@home" / "speech", TEXTS[:2])
    sets = named_sets([f"a={folder}", f"b={folder}@de"], "en")
    assert [test.language for test in sets.values()] == ["en", "de"]


def test_evaluate_transcribe_and_merge_use_what_training_used(
    finished, tiny_folder, tones, tmp_path, monkeypatch, short_decoding
):
    windows = []
    real = AudioWindow.mel_frames
    monkeypatch.setattr(AudioWindow, "mel_frames", lambda self, n: windows.append(self.mode) or real(self, n))
    adapter = str(finished / "adapter")
    sets = named_sets([f"same={tones}"], "en")
    evaluation = evaluate(
        sets, tmp_path / "out", model=str(tiny_folder), adapter=adapter, precision="fp32", console=QUIET
    )
    expected = [line.split("\t") for line in (finished / "after" / "same.tsv").read_text().splitlines()[1:]]
    assert "trim" in windows
    assert evaluation.sets[0].hypotheses == [row[5] for row in expected]
    transcripts, skipped = transcribe(
        [tones], model=str(tiny_folder), adapter=adapter, precision="fp32", output=tmp_path / "texts.tsv"
    )
    assert [transcript.text for transcript in transcripts] == evaluation.sets[0].hypotheses
    assert not skipped
    assert len((tmp_path / "texts.tsv").read_text().splitlines()) == 1 + len(TEXTS)
    assert merge(adapter, tmp_path / "merged", model=str(tiny_folder))["audio_window"] == "trim"
    merged = evaluate(
        sets, tmp_path / "again", model=str(tmp_path / "merged"), window="trim", precision="fp32", console=QUIET
    )
    assert merged.sets[0].hypotheses == evaluation.sets[0].hypotheses
    assert (merged.label, evaluation.label) == ("merged", "adapted")  # nor is a merged model called zero-shot
    # Where faster-whisper and older versions of transformers look for it.
    features = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert features["feature_size"] == load_base(str(tiny_folder))[0].config.num_mel_bins
    with pytest.raises(UserError, match="exists already"):
        merge(adapter, tmp_path / "merged", model=str(tiny_folder))


def test_a_table_is_whole_or_as_it_was(finished, tones, tmp_path):
    scored = Evaluation("after", list(read_sets(finished / "after", named_sets([f"same={tones}"], "en")).values()))
    scored.write(tmp_path)
    before = (tmp_path / "same.tsv").read_bytes()
    scored.sets[0].heard.pop()  # it fails after having written some lines
    with pytest.raises(ValueError, match="zip"):
        scored.write(tmp_path)
    assert (tmp_path / "same.tsv").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "same.tsv"]


def test_a_transcript_of_hours_is_read_again(tmp_path):
    """Python's csv reads 131,072 characters of a field unless it is told to read more."""
    recording = write_folder(tmp_path / "hours", [("word " * 30_000).strip()])
    sets = named_sets([f"hours={recording}"], "en")
    scored = Evaluation("after", [score_set("hours", sets["hours"], [Heard("word " * 29_000, True)])])
    scored.write(tmp_path / "after")
    again = read_sets(tmp_path / "after", sets)["hours"]
    assert again.rates == scored.sets[0].rates
    assert again.rates["all"]["wer"].deletions == 1_000


def test_counts_are_in_the_columns_of_their_names(tmp_path):
    (test,) = named_sets([f"t={write_folder(tmp_path / 't', ('GO HOME NOW', 'IT IS RED', 'SEE'))}"], "en").values()
    heard = [Heard("Go home now, please.", True), Heard("It red.", False), Heard("Sea.", True, again=True)]
    Evaluation("after", [score_set("t", test, heard)]).write(tmp_path / "after")
    with (tmp_path / "after" / "t.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    counts = ("substitutions", "deletions", "insertions", "length")
    found = [[[int(row[f"{unit}_{name}"]) for name in counts] for unit in ("word", "character")] for row in rows]
    assert found == [[[0, 0, 1, 3], [0, 0, 7, 11]], [[0, 1, 0, 3], [0, 3, 0, 9]], [[1, 0, 0, 1], [1, 0, 0, 3]]]
    assert [(row["cut_off"], row["decoded_again"]) for row in rows] == [("0", "0"), ("1", "0"), ("0", "1")]


@pytest.fixture
def prompts(monkeypatch):
    """Language and task of each decoded batch, which is not decoded."""
    found = []

    def generate(self, input_features, language=None, task=None, **given):
        configured = self.generation_config
        found.append((language or getattr(configured, "language", None), task))
        return torch.full((len(input_features), 1), configured.pad_token_id)

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", generate)
    return found


def test_a_model_says_its_task(finished, options, tiny_folder, tones, tmp_path, prompts, monkeypatch):
    """A merged one, one that was trained as a whole, and one of another tool, which transcribes."""
    monkeypatch.setattr("fused_s2lora.training.decoding._detected", lambda *given: ["de"])
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language": "sw", "task": "translate"}))
    merge(str(adapter), tmp_path / "merged", model=str(tiny_folder))
    run = tmp_path / "run"
    train(options(run, method="bitfit", max_steps=1, language="sw", task="translate"), console=QUIET)
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "merged"),
        "--test",
        f"t={tones}",
        "--output",
        str(tmp_path / "cli"),
    ]
    assert CliRunner().invoke(app, [*command, "--precision", "fp32"], catch_exceptions=False).exit_code == 0
    assert json.loads((tmp_path / "cli" / "results.json").read_text())["sets"]["t"]["language"] == "sw"
    prompts.clear()
    for model, expected in (
        (tmp_path / "merged", ("sw", "translate")),
        (run / "model", ("sw", "translate")),
        (tiny_folder, ("de", "transcribe")),  # what it sounds like
    ):
        transcribe([tones / "u0.flac"], model=str(model), precision="fp32")
        evaluate(named_sets([f"t={tones}"], "sw"), tmp_path / "out", model=str(model), precision="fp32", console=QUIET)
        assert prompts == [expected, ("sw", expected[1])], model
        prompts.clear()


def test_a_translation_is_scored_as_english(options, tiny_folder, tones, tmp_path, prompts):
    run = options(tmp_path / "run", language="zh", task="translate", max_steps=1, test=[f"t={tones}"])
    train(run, console=QUIET)
    sets = named_sets([f"t={tones}"], "zh")
    quick = {"model": str(tiny_folder), "precision": "fp32", "console": QUIET}
    evaluations = [
        Evaluation("after", list(read_sets(tmp_path / "run" / "after", scored_sets(run)).values())),
        evaluate(sets, tmp_path / "adapted", adapter=str(tmp_path / "run" / "adapter"), **quick),
    ]
    for evaluation in evaluations:
        (result,) = evaluation.sets
        assert (result.language, result.scoring_language) == ("zh", "en")
        assert [utterance.length for utterance in result.words] == [4, 4, 4, 3, 4, 3]  # words, not joined
        assert unit_of(evaluation.to_dict()["sets"]["t"]) == "wer"
    assert unit_of({"language": "zh"}) == "cer"
    assert not read_sets(tmp_path / "run" / "after", sets)  # as scored before, in Chinese
    assert set(prompts) == {("zh", "translate")}


@pytest.mark.parametrize(
    ("age", "group"),
    [
        ("7.5", "6-8"), ("8.9", "6-8"), ("9", "9-12"), ("17.5", "13-17"), ("18", "18+"), ("-1", "unknown"),
        ("nan", "unknown"), ("", "unknown"), ("teens", "teens"),
    ],
)  # fmt: skip
def test_groups_of_ages(age, group):
    assert evaluation_module._group_name("age", age) == group


def test_groups_of_what_is_not_known_are_one(tmp_path):
    accents = ({"accent": "x"}, {"accent": None}, {"accent": " "}, {})
    rows = ({"path": "one.wav", "text": "A."} | accent for accent in accents)
    source = write_lines(tmp_path, "list.jsonl", *map(json.dumps, rows))
    (test,) = named_sets([f"t={source}"], "en").values()
    rates = evaluation_module.score_set("t", test, [Heard("A.", True)] * 4, ["accent"]).rates
    counts = {group: rate["wer"].utterances for group, rate in rates.items()}
    assert counts == {"all": 4, "accent unknown": 3, "accent x": 1}


def test_a_group_asked_for_twice_is_counted_once(tones):
    (test,) = named_sets([f"t={tones}"], "en").values()
    heard = [Heard(text, True) for text in TEXTS]
    once = evaluation_module.score_set("t", test, heard, ["age"]).rates
    assert evaluation_module.score_set("t", test, heard, ["age", "age"]).rates == once


def test_names_are_shown_as_they_are(tones, options, tmp_path, short_decoding):
    """Also what rich would take for markup."""
    data = write_folder(tmp_path / "speech")
    table = data / "metadata.csv"
    table.write_text(table.read_text().replace("s0", "[/b]").replace("u5.flac", "Talk [/q].flac"))
    shown = Console(width=300, file=io.StringIO())
    run = tmp_path / "run [red]"
    train(options(run, data=[str(data)], test=[f"a[b]={data}"], group_by=["speaker"], max_steps=1), console=shown)
    text = " ".join(shown.file.getvalue().split())
    assert f"{run}: error rates in percent" in text
    assert "Talk [/q].flac" in text
    assert "a[b]" in text
    assert "speaker [/b]" in text


def test_scoring_that_was_stopped_goes_on(tiny_folder, tmp_path, monkeypatch):
    """With the sets that are left; what a set's transcripts should have been may be corrected in between."""
    model, processor = load_base(str(tiny_folder))
    speech = write_folder(tmp_path / "speech")
    heard: list[int] = []

    def transcribe(model, processor, audio, **given):
        if len(heard) == 1 and not heard[0]:
            raise KeyboardInterrupt
        heard.append(len(list(audio)))
        return [Heard("HELLO", True)] * heard[-1]

    monkeypatch.setattr(evaluation_module, "transcribe_speech", transcribe)

    def scored(*names):
        sets = named_sets([f"{name}={speech}" for name in names], "en")
        folder = tmp_path / "scored"
        return evaluation_module.evaluate_sets(
            model, processor, sets, label="x", window=AudioWindow(), folder=folder, progress=False
        )

    scored("one")
    heard[:] = [0]
    with pytest.raises(KeyboardInterrupt):
        scored("one", "two")
    heard.clear()
    table = speech / "metadata.csv"
    table.write_text(table.read_text().replace(TEXTS[0], "HELLO"))
    assert [one.name for one in scored("one", "two").sets] == ["one", "two"]
    assert heard == [len(TEXTS)]
    kept = (tmp_path / "scored" / "one.tsv").read_text().splitlines()[1].split("\t")
    assert "HELLO" in kept
    assert "hello" in kept
    scored("two")
    assert heard == [len(TEXTS)]
    assert sorted(file.name for file in (tmp_path / "scored").iterdir()) == ["results.json", "two.tsv"]


def test_transcripts_that_are_kept_are_scored_by_the_references_of_now(tiny_folder, tmp_path, monkeypatch):
    """Also in the files, where nothing is left to be heard."""
    model, processor = load_base(str(tiny_folder))
    speech = write_folder(tmp_path / "speech", TEXTS[:2])
    monkeypatch.setattr(evaluation_module, "transcribe_speech", lambda *_, **__: [Heard("HELLO", True)] * 2)
    scored = {"label": "x", "window": AudioWindow(), "folder": tmp_path / "scored", "progress": False}
    rates = []
    for right in (TEXTS[0], "HELLO"):
        table = speech / "metadata.csv"
        table.write_text(table.read_text().replace(TEXTS[0], right))
        evaluation_module.evaluate_sets(model, processor, named_sets([f"one={speech}"], "en"), **scored)
        written = json.loads((tmp_path / "scored" / "results.json").read_text())["sets"]["one"]
        rates.append(written["groups"]["all"]["wer"]["rate"])
        with (tmp_path / "scored" / "one.tsv").open(encoding="utf-8") as stream:
            assert next(csv.DictReader(stream, delimiter="\t"))["reference"] == right
        monkeypatch.setattr(evaluation_module, "transcribe_speech", lambda *_, **__: pytest.fail("heard again"))
    assert rates == [100, 80]  # four words of five


def test_groups_are_sorted_by_number(tmp_path):
    names = ["grade 10", "grade 9", "grade ²"]
    assert sorted(names, key=evaluation_module._natural) == ["grade ²", "grade 9", "grade 10"]


def test_an_adapter_says_its_language(finished, tiny_folder, tones, tmp_path, short_decoding, monkeypatch):
    """From a folder, and from the hub, whose download stands here for it."""
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language": "sw"}))
    arguments = ["--model", str(tiny_folder), "--precision", "fp32", "--test", f"t={tones}"]
    for given, expected in (([], "sw"), (["--language", "de"], "de")):
        command = ["evaluate", *arguments, *given, "--adapter", str(adapter), "--output", str(tmp_path / expected)]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        written = json.loads((tmp_path / expected / "results.json").read_text())
        assert written["sets"]["t"]["language"] == expected
    merged = tmp_path / "merged"
    shutil.copytree(tiny_folder, merged)
    file = merged / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language": "<|de|>"}))  # as in its `lang_to_id`
    assert models.configured_language(str(merged)) == "de"
    monkeypatch.setattr(models, "hf_hub_download", lambda repository, name: str(adapter / name))
    assert remembered_speech("user/adapter")["language"] == "sw"


def test_an_adapter_says_its_model(finished, tiny_folder, tones, tmp_path, short_decoding, monkeypatch):
    """Every command takes it from there; the packaged one is found wherever it is on this machine."""
    adapter = str(finished / "adapter")
    assert models.model_for(None, adapter) == str(tiny_folder)
    assert models.model_for("org/whisper", adapter) == "org/whisper"
    assert models.model_for(None, None) == models.PACKAGED
    loaded = []
    load = models.load_base
    for module in (models, merge_module):  # evaluate and transcribe by `load_for_use`
        monkeypatch.setattr(module, "load_base", lambda model, **more: loaded.append(model) or load(model, **more))
    scored, merged, heard = (str(tmp_path / name) for name in ("scored", "merged", "heard.tsv"))
    for command in (
        ["evaluate", "--adapter", adapter, "--test", f"t={tones}", "--precision", "fp32", "--output", scored],
        ["transcribe", str(tones), "--adapter", adapter, "--precision", "fp32", "--output", heard],
        ["merge", adapter, merged],
    ):
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert loaded == 3 * [str(tiny_folder)]

    copied = tmp_path / "copied"
    shutil.copytree(adapter, copied)
    file = copied / "adapter_config.json"
    elsewhere = {"base_model_name_or_path": f"/home/another/.cache/fused_s2lora/{FOLDER}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | elsewhere))
    assert models.model_for(None, copied) == models.PACKAGED
    gone = {"base_model_name_or_path": str(tmp_path / "gone")}
    file.write_text(json.dumps(json.loads(file.read_text()) | gone))
    with pytest.raises(
        UserError, match=r"copied: was trained on .*gone, which is not there; say by --model where it is"
    ):
        models.model_for(None, copied)
    monkeypatch.chdir(tiny_folder.parent)
    assert models.load_base(tiny_folder.name)[0].name_or_path == str(tiny_folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | elsewhere))
    monkeypatch.setattr(models, "hf_hub_download", lambda repository, name: str(copied / name))
    assert models.model_for(None, "user/adapter") == models.PACKAGED
