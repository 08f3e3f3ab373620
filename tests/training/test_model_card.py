"""The card that a hub shows of an adapter or a model."""

import json

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from fused_s2lora.training.interpolate import interpolate_run
from fused_s2lora.training.model_card import write_model_card
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET


def test_the_card_of_a_run_names_its_results_and_no_place_on_this_machine(finished, tiny_folder, tones):
    card = ModelCard.load(finished / "adapter" / "README.md")
    assert card.data.language == "en"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    assert card.data.base_model is None
    assert card.data.datasets is None
    before, after = json.loads((finished / "results.json").read_text())
    (result,) = card.data.eval_results
    groups = after["sets"]["same"]["groups"]
    assert (result.dataset_name, result.dataset_type, result.metric_type) == ("same", "same", "wer")
    assert result.metric_value == round(groups["all"]["wer"]["rate"], 2)
    assert len(groups) > 1  # by age, or as another test has asked since
    for group in groups:
        rates = [entry["sets"]["same"]["groups"][group]["wer"] for entry in (before, after)]
        figures = [f"{rate['rate']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}]" for rate in rates]
        name = "same" if group == "all" else f"same, {group}"
        assert f"| {name} | {rates[0]['utterances']} | WER, % | {' | '.join(figures)} |" in card.text
    assert "| share of the update kept | 0.75 |" in card.text
    assert "`s2lora` trims" in card.text
    assert "More Information Needed" not in card.content
    for place in (tiny_folder, tones, finished):
        assert str(place) not in card.content


@pytest.fixture
def told(finished, tmp_path):
    """The card of options, summary and results of a run as given, else as the finished one's."""

    def write(options: dict, summary: dict, results: list) -> ModelCard:
        config, was = (json.loads((finished / name).read_text()) for name in ("config.json", "summary.json"))
        write_model_card(tmp_path, config | options, was | summary, results)
        return ModelCard.load(tmp_path / "README.md")

    return write


def test_what_is_from_the_hub_is_named(told, finished, tones):
    results = json.loads((finished / "results.json").read_text())[1:]
    scored = results[0]["sets"]["same"]
    results[0]["sets"] = {"own": scored, "child": scored | {"source": "org/speech:zh:test", "scoring_language": "zh"}}
    sources = ["org/speech:zh:train", "org/more@Chinese", str(tones)]
    options = {"model": "openai/whisper-small", "data": sources, "language": "chinese", "accumulation": 3}
    from_hub = ["openai/whisper-small", "org/speech:zh:train", "org/more"]
    card = told(options, {"from_hub": from_hub, "languages": ["zh"]}, results)
    assert card.data.base_model == "openai/whisper-small"
    assert card.data.datasets == ["org/speech", "org/more"]
    assert card.data.language == "zh"
    assert sorted(card.data.metrics) == ["cer", "wer"]
    own, child = card.data.eval_results
    assert (own.dataset_type, own.metric_type) == ("own", "wer")
    assert (child.dataset_type, child.metric_type) == ("org/speech", "cer")
    assert child.metric_value == round(scored["groups"]["all"]["cer"]["rate"], 2)
    assert card.text.strip().startswith("# openai/whisper-small adapted to Chinese speech")
    assert 'from_pretrained("openai/whisper-small")' in card.text
    assert "| steps | 6 of 6 utterances |" in card.text
    assert "| speech | utterances |  | after |" in card.text
    assert str(tones) not in card.content
    assert told({"model": "packaged-base", "window": "full"}, {}, []).data.base_model == "openai/whisper-base"


def test_what_was_not_scored_has_no_error_rates(finished, options, tmp_path):
    interpolate_run(finished, 0.5, tmp_path / "half")
    card = ModelCard.load(tmp_path / "half" / "README.md")
    assert "| share of the update kept | 0.5 |" in card.text
    assert "Error rates" not in card.text
    assert card.data.eval_results is None
    train(options(tmp_path / "run", method="full", max_steps=1), console=QUIET)
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert "| method | full fine-tuning |" in card.text
    assert "| rank |" not in card.text
    assert "--model THIS --window trim" in card.text
    assert "PeftModel" not in card.text


def test_names_in_a_card_are_shown_as_they_are(told, finished):
    results = json.loads((finished / "results.json").read_text())
    for entry in results:
        entry["sets"] = {"<b>own* [a](b)": entry["sets"]["same"]}
    card = MarkdownIt("commonmark").enable("table").render(told({}, {}, results).text)
    assert "<td>&lt;b&gt;own* [a](b)</td>" in card
