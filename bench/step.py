"""A whole training step (forward, backward, clipping, AdamW) of a Whisper, by adaptation method.

    python -m bench.step --size base --batch 4 --window trim

Weights are random: time does not depend on their values. Every method is timed in the same run, in turns.
`frozen` is the floor: forward and backward of the model with nothing to train, no optimizer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from bench.measure import RESULTS, device_name, latencies, latency_fields, peak_mib, record
from fused_s2lora import S2LoraConfig, parameter_groups
from fused_s2lora.training.audio_window import AudioWindow, window_of

# d_model, encoder layers, decoder layers, mel bins
SIZES = {
    "tiny": (384, 4, 4, 80),
    "base": (512, 6, 6, 80),
    "small": (768, 12, 12, 80),
    "medium": (1024, 24, 24, 80),
    "large-v3": (1280, 32, 32, 128),
    "turbo": (1280, 32, 4, 128),
}
SIX = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
METHODS = {
    "frozen": None,
    "lora-qv": lambda rank: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]),
    "lora-six": lambda rank: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=SIX),
    "s2lora": lambda rank: S2LoraConfig(r=rank),
}
LEARNING_RATE = 1e-3


def whisper(size: str) -> WhisperForConditionalGeneration:
    """A Whisper of that size with random weights."""
    width, encoder_layers, decoder_layers, mel_bins = SIZES[size]
    heads = width // 64
    config = WhisperConfig(
        vocab_size=51866 if mel_bins == 128 else 51865,
        num_mel_bins=mel_bins,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        use_cache=False,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config)


def build_step(method: str, size: str, batch: int, mel_frames: int, tokens: int, rank: int) -> Callable[[], float]:
    """One training step as a callable that returns its loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = whisper(size).to(device)
    features = torch.randn(batch, model.config.num_mel_bins, mel_frames, device=device)
    labels = torch.randint(0, 50257, (batch, tokens), device=device)
    configure = METHODS[method]
    if configure is None:
        model.requires_grad_(False)
        # The conv front end is frozen too, so the gradient is asked for where the first adapted weight would need it.
        model.model.encoder.conv2.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        optimizer = None
    else:
        model = get_peft_model(model, configure(rank))
        optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step() -> float:
        with window_of(model, mel_frames), torch.autocast(device, torch.bfloat16):
            loss = model(input_features=features, labels=labels).loss
        loss.backward()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    """Command line: times all methods in one run, prints the table, appends to the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", choices=("full", "trim"), default="full")
    parser.add_argument("--audio-s", type=float, default=3.9, help="longest utterance of the batch, for --window trim")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=RESULTS / "step.jsonl")
    options = parser.parse_args()

    mel_frames = AudioWindow(options.window).mel_frames(round(options.audio_s * 16_000))
    arguments = (options.size, options.batch, mel_frames, options.tokens, options.rank)
    console = Console()
    peaks = {
        method: peak_mib(build_step, method, *arguments)
        for method in track(options.methods, description="peak memory", console=console)
    }
    steps = {method: build_step(method, *arguments) for method in options.methods}
    with console.status(f"timing {options.rounds} rounds of {len(steps)} methods"):
        times = latencies(steps, rounds=options.rounds)

    positions = mel_frames // 2
    case = f"whisper-{options.size} step, batch {options.batch}, {positions} positions, {options.tokens} tokens"
    rows = [
        {
            "case": case,
            "provider": method,
            "kind": "measured",
            **latency_fields(times[method]),
            "peak_mib": peaks[method],
        }
        for method in steps
    ]
    record(options.output, rows)
    console.print(_table(case, rows))


def _table(case: str, rows: list[dict]) -> Table:
    by_name = {row["provider"]: row for row in rows}
    baseline = by_name.get("lora-six")
    table = Table(title=f"{case}, rank and optimizer alike, bf16 autocast · {device_name()}")
    for column in ("method", "p20 ms", "p50 ms", "p80 ms", "time / lora-six", "peak MiB", "memory / lora-six"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        ratios = [f"{row[key] / baseline[key]:.2f}" if baseline else "–" for key in ("p50_ms", "peak_mib")]
        table.add_row(
            row["provider"],
            *(f"{row[key]:.0f}" for key in ("p20_ms", "p50_ms", "p80_ms")),
            ratios[0],
            f"{row['peak_mib']:.0f}",
            ratios[1],
        )
    return table


if __name__ == "__main__":
    main()
