"""Section `step`: a whole training step (forward, backward, clipping, AdamW) of a Whisper, by adaptation method.

Weights are random: time does not depend on their values. `frozen` is the floor: forward and backward of the model with
nothing to train, and no optimizer.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.initialization import no_init_weights

from bench.cases import SIZES
from bench.measure import Latency, latencies, latency_fields, peak_mib, reason_of
from fused_s2lora import S2LoraConfig, fuse_whisper, parameter_groups
from fused_s2lora.training.audio_window import POSITIONS, AudioWindow, window_of
from fused_s2lora.training.cuda_graphs import GraphedBackward
from fused_s2lora.training.models import free_memory

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
SIX = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ADDMM_LORA = "addmm-lora-six"
TORCH_ATTENTION = "s2lora-sdpa"  # S2-LoRA with PyTorch's attention, as all others have; on a GPU the same as "s2lora"
METHODS: dict[str, Callable[[int], Any]] = {
    "frozen": lambda rank: None,
    "full": lambda rank: None,
    ADDMM_LORA: lambda rank: None,
    "lora-qv": lambda rank: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]),
    "lora-six": lambda rank: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=SIX),
    "adalora-six": lambda rank: AdaLoraConfig(
        init_r=rank + rank // 2, target_r=rank, lora_alpha=2 * rank, target_modules=SIX, total_step=10_000, tinit=1
    ),
    "vera-six": lambda rank: VeraConfig(r=rank, target_modules=SIX),
    "s2lora": lambda rank: S2LoraConfig(r=rank),
    TORCH_ATTENTION: lambda rank: S2LoraConfig(r=rank),
    "s2lora-unshared": lambda rank: S2LoraConfig.unshared(r=rank),
}
# What goes with weights that bitsandbytes stores in 8 bits or 4, each by its own way.
QUANTIZABLE = ("frozen", "lora-qv", "lora-six", "adalora-six", "s2lora", TORCH_ATTENTION, "s2lora-unshared")
# On a CUDA GPU these are also measured with forward and backward replayed as a CUDA graph.
GRAPHED = ("frozen", ADDMM_LORA, "lora-six", "s2lora")
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class StepCase:
    """A Whisper's training step: the 30 s window, or `trim` to utterances of `audio_s` seconds.

    With `quantize` ("int8" or "nf4") the adapted maps are stored so by bitsandbytes.
    """

    size: str
    batch: int
    window: str = "full"
    audio_s: float = 3.9
    tokens: int = 16
    rank: int = 8
    quantize: str | None = None

    @property
    def mel_frames(self) -> int:
        """Frames of 10 ms that the encoder gets."""
        return AudioWindow(self.window).mel_frames(round(self.audio_s * 16_000))

    @property
    def speech_s(self) -> float:
        """Seconds of audio in the batch: the whole window, or the utterances alone where it is trimmed."""
        return self.batch * (POSITIONS / 50 if self.window == "full" else self.audio_s)

    def __str__(self) -> str:
        window = "30 s" if self.window == "full" else f"trimmed to {self.audio_s} s"
        stored = f"{self.quantize} maps, " if self.quantize else ""
        of = f"batch {self.batch}, {window}, {self.tokens} tokens, rank {self.rank}"
        return f"{self.size} step, {of}, {stored}bf16 autocast"


def whisper(size: str, device: str = "cpu", *, initialised: bool = True) -> WhisperForConditionalGeneration:
    """A Whisper of that size with float32 weights, random ones if `initialised`."""
    width, encoder_layers, decoder_layers, mel_bins = SIZES[size]
    heads = max(1, width // 64)
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
    with torch.device(device), contextlib.nullcontext() if initialised else no_init_weights():
        return WhisperForConditionalGeneration(config)


class AddmmLora(nn.Module):
    """LoRA on a frozen linear map as one would write it by hand: float32 factors, the update added by `addmm`."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(F.linear(rows, self.weight, self.bias), rows @ self.down.mT, self.up.mT, alpha=2.0)
        return y.view(*x.shape[:-1], y.shape[-1])


def _with_addmm_lora(model: nn.Module, rank: int) -> None:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in SIX:
            model.set_submodule(name, AddmmLora(module, rank))  # type: ignore[arg-type]


def quantize_maps(model: nn.Module, kind: str) -> None:
    """Gives every adapted map a weight that bitsandbytes stores in 8 bits, "int8", or in 4, "nf4"."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in SIX and isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features, module.bias is not None
            if kind == "int8":
                stored = Linear8bitLt(*sizes, has_fp16_weights=False)
            else:
                stored = Linear4bit(*sizes, torch.bfloat16, quant_type=kind)
            stored.load_state_dict(module.state_dict())
            model.set_submodule(name, stored.to(module.weight.device))


class Step:
    """One training step of `method`, by calling the object."""

    def __init__(self, method: str, case: StepCase, device: str, *, initialised: bool = True) -> None:
        self.case, self.device = case, device
        model: Any = whisper(case.size, device, initialised=initialised)
        self.batch = {
            "input_features": torch.randn(case.batch, model.config.num_mel_bins, case.mel_frames, device=device),
            "labels": torch.randint(0, 50257, (case.batch, case.tokens), device=device),
        }
        if case.quantize:
            if method not in QUANTIZABLE:
                raise ValueError(f"{method} does not go with quantised maps; measure {', '.join(QUANTIZABLE)}")
            quantize_maps(model, case.quantize)
        configuration = METHODS[method](case.rank)
        self.optimizer: torch.optim.Optimizer | None = None
        if method == "frozen":
            model.requires_grad_(False)
            # The conv front end is frozen too, so the gradient is asked for where the first adapted weight needs it.
            model.model.encoder.conv2.register_forward_hook(lambda _module, _in, output: output.requires_grad_())
        if method == ADDMM_LORA:
            _with_addmm_lora(model, case.rank)
        if configuration is not None:
            model = get_peft_model(model, configuration)
        if isinstance(configuration, S2LoraConfig):
            fuse_whisper(model)
        if method == TORCH_ATTENTION:
            model.get_base_model().set_attn_implementation("sdpa")
        self.allocates_ranks = isinstance(configuration, AdaLoraConfig)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.trainable:
            self.optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE))
        self.model, self.steps = model.train(), 0
        self.graphed: GraphedBackward | None = None

    def loss(self) -> Tensor:
        """The forward pass."""
        return self._losses(self.batch)["loss"]

    def _losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with window_of(self.model, self.case.mel_frames), torch.autocast(self.device, torch.bfloat16):
            return {"loss": self.model(**batch).loss}

    def record(self) -> None:
        """From now on forward and backward are a CUDA graph, recorded at the second step."""
        self.graphed = GraphedBackward(self._losses, self.trainable)

    def __call__(self) -> float:
        """The whole step; returns its loss."""
        if self.graphed is None:
            loss = self.loss()
            loss.backward()
        else:
            loss = self.graphed(self.batch)["loss"]
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.steps += 1
            if self.allocates_ranks:
                self.model.base_model.update_and_allocate(self.steps)
            self.optimizer.zero_grad()
        return loss.item()


def on_a_gpu(methods: Iterable[str]) -> list[str]:
    """Without the methods that are there the same as others."""
    return [method for method in methods if method != TORCH_ATTENTION]


def build_step(method: str, case: StepCase, device: str | None = None) -> Step:
    """A training step on `device`, by default the GPU if there is one."""
    return Step(method, case, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def measure(
    case: StepCase, *, methods: Iterable[str] = METHODS, rounds: int = 7, seconds: float = math.inf
) -> Iterator[dict[str, Any]]:
    """A row for every method: latency, audio seconds per second, peak memory; on CUDA also launches and GPU time.

    On CPU the methods take turns, and each one's memory is measured in a process of its own. On CUDA, where several
    models might not fit, each is built, measured and let go in turn; those of `GRAPHED` also with a CUDA graph, in a
    row of their own.
    """
    methods = [method for method in methods if not case.quantize or method in QUANTIZABLE]
    if torch.cuda.is_available():
        methods = on_a_gpu(methods)
        for method in methods:
            yield from _measure_on_cuda(case, method, rounds, seconds / len(methods))
        return
    peaks: dict[str, float] = {}
    steps: dict[str, Step] = {}
    for method in methods:
        try:
            peaks[method] = peak_mib(build_step, method, case)
            steps[method] = build_step(method, case)
        except Exception as error:  # too little memory for its process, say
            yield step_row(case, method, "refused", reason=reason_of(error))
    times = latencies(steps, rounds=rounds, seconds=seconds)
    for method, step in steps.items():
        yield _timed_row(step.case, method, times[method], peak_mib=round(peaks[method], 1))


def _measure_on_cuda(case: StepCase, method: str, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    step, name = None, method
    try:
        step = build_step(method, case)
        yield _measure_step(step, name, rounds, seconds)
        if method in GRAPHED:
            name = f"{method}-graphed"
            step.record()
            yield _measure_step(step, name, rounds, seconds)
    except Exception as error:  # too little memory, say: the other methods are measured all the same
        yield step_row(case, name, "refused", reason=reason_of(error))
    finally:
        del step
        free_memory()


def _measure_step(step: Step, name: str, rounds: int, seconds: float) -> dict[str, Any]:
    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()  # records where there is a graph to record: a replay allocates nothing
    torch.cuda.synchronize()
    memory = {"peak_mib": round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)}
    memory["held_mib"] = round(held / 2**20, 1)
    launches = {} if step.graphed else _kernels(step)
    (latency,) = latencies({name: step}, rounds=rounds, seconds=seconds).values()
    return _timed_row(step.case, name, latency, **launches, **memory)


def _kernels(step: Step) -> dict[str, float]:
    """Kernels that one step starts on the GPU, without copies and fills, and the GPU's time with all it does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
    return {"launches": launches, "gpu_ms": round(sum(event.device_time for event in events) / 1e3, 3)}


def _timed_row(case: StepCase, method: str, latency: Latency, **fields: Any) -> dict[str, Any]:
    rate = case.speech_s / (latency.p50_ms / 1e3)
    return step_row(case, method, "measured", **latency_fields(latency), audio_s_per_s=round(rate, 2), **fields)


def step_row(case: StepCase, method: str, kind: str, **fields: Any) -> dict[str, Any]:
    """One result of this section."""
    return {"section": "step", **asdict(case), "provider": method, "kind": kind, **fields}
