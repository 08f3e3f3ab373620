"""Tables of transcripts that an evaluation leaves."""

import csv
import json

import soundfile

from fused_s2lora.training.decoding import Heard
from fused_s2lora.training.evaluation import Evaluation, read_sets, score_set
from fused_s2lora.training.sets import named_sets
from fused_s2lora.training.utterance_errors import read_errors, write_errors
from tests.training.speech import TEXTS, tone, write_folder


def test_no_column_of_a_table_of_transcripts_comes_twice(tmp_path):
    """Of a test set that has what another system heard, and how many words it has wrong."""
    soundfile.write(tmp_path / "one.wav", tone(0.5), 16_000)
    table = tmp_path / "speech.csv"
    table.write_text("file_name,text,age,hypothesis,word_insertions\none.wav,go home,7,theirs,5\n")
    sets = named_sets([f"same={table}"], "en")
    result = score_set("same", sets["same"], [Heard("ours", True)], ["hypothesis"])
    assert "hypothesis theirs" in result.rates
    Evaluation("zero-shot", [result]).write(tmp_path / "out")
    with (tmp_path / "out" / "same.tsv").open(newline="") as stream:
        header, row = csv.reader(stream, delimiter="\t")
    assert len({*header}) == len(header)
    assert (
        dict(zip(header, row, strict=True)).items()
        >= {"age": "7", "hypothesis": "ours", "word_insertions": "0"}.items()
    )
    assert read_sets(tmp_path / "out", sets)["same"].heard == [Heard("ours", True)]


def test_names_with_line_breaks_are_read_again(tmp_path):
    """A lone carriage return, as in files from old Macs, ends a line of a table too."""
    names = ["a\rb.wav", "a\nb.wav", 'a"b,\tc.wav', "=1+1.wav"]
    for name in names:
        soundfile.write(tmp_path / name, tone(0.5), 16_000)
    with (tmp_path / "speech.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"file_name": name, "text": "go home", "note": "x\ry"}) + "\n" for name in names)
    sets = named_sets([f"same={tmp_path / 'speech.jsonl'}"], "en")
    heard = [Heard("go\rhome", True)] * len(names)
    evaluation = Evaluation("after", [score_set("same", sets["same"], heard)])
    evaluation.write(tmp_path / "after")
    write_errors(tmp_path, evaluation)
    assert read_errors(tmp_path)["same"].utterances == names
    assert read_sets(tmp_path / "after", sets)["same"].heard == heard


def test_a_damaged_table_of_transcripts_is_not_taken_over(tmp_path):
    sets = named_sets([f"s={write_folder(tmp_path / 'speech')}"], "en")
    Evaluation("after", [score_set("s", sets["s"], [Heard(text, True) for text in TEXTS])]).write(tmp_path / "after")
    table = tmp_path / "after" / "s.tsv"
    whole = table.read_text()
    table.write_text(whole, encoding="utf-16")
    assert not read_sets(tmp_path / "after", sets)
    table.write_text(whole.rstrip().rpartition("\t")[0])  # the last line without its last column
    assert not read_sets(tmp_path / "after", sets)
    table.write_text(whole)
    assert read_sets(tmp_path / "after", sets)
