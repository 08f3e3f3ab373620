"""What one training run is asked to do."""

import math
from dataclasses import dataclass, field

from .audio_window import AudioWindow
from .decoding import Decoding
from .errors import UserError
from .precision import check_precision
from .text import language_code, source_and_language

QUANTIZATIONS = ("int8", "nf4")
_MOST_WORKERS = 1000
LEAST_STEPS = 250  # by default; so many are what little speech is trained for, in as many epochs as that takes


@dataclass
class TrainOptions:
    """Options of `train`, one for each option of `s2lora train`, where they are explained.

    Raises:
        UserError: a value out of range or options that contradict each other.
    """

    data: list[str]
    output: str
    model: str = "packaged-base"
    test: list[str] = field(default_factory=list)  # NAME=SOURCE[@LANGUAGE] or SOURCE
    dev: str | None = None
    dev_share: float = 0.0
    language: str = "en"
    task: str = "transcribe"
    text_column: str | None = None
    audio_column: str | None = None
    keep_case: bool = False
    leading_space: bool = True
    limit: int | None = None
    utterances: int | None = None
    strict: bool = False

    method: str = "s2lora"
    preset: str = "default"
    rank: int = 8
    target_modules: list[str] | None = None
    exclude_modules: str | None = None
    sharing: str | None = None
    sparsity_weight: float | None = None
    norm_weight: float | None = None
    penalty: str | None = None
    freeze_factors: bool = False
    lr: float | None = None
    coefficient_lr_ratio: float | None = None
    interpolation: float | None = None
    keep_share: float = 0.0
    keep_languages: list[str] = field(default_factory=list)  # none: `LARGEST_LANGUAGES`
    learn_language: bool = True

    epochs: float | None = None  # none: one, or as many as make `LEAST_STEPS`
    max_steps: int = -1
    batch_size: int = 4
    accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    spec_augment: bool = False
    early_stopping: int = 0
    window: str = "full"
    margin: int = 64
    full_share: float = 0.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    half_base: bool = False
    quantize: str | None = None  # of `QUANTIZATIONS`
    cuda_graphs: bool = False
    workers: int | None = None  # on a GPU `GPU_WORKERS`, else none
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 100

    before: bool = True
    beams: int = 1
    decode_once: bool = False
    group_by: list[str] = field(default_factory=list)
    eval_batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("no training data: name a folder, manifest or hub id with --data")
        spoken, kept = self.spoken_languages(), [language_code(one) for one in self.keep_languages]
        self.audio_window()
        self.decoding()
        if self.task not in ("transcribe", "translate"):
            raise UserError(f"--task {self.task!r} is not one of transcribe, translate")
        check_precision(self.precision)
        for name in ("rank", "batch_size", "accumulation", "eval_batch_size", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        weights = ("sparsity_weight", "norm_weight")
        for name in ("epochs", "warmup", "weight_decay", "lr", "coefficient_lr_ratio", *weights):
            if not math.isfinite(getattr(self, name) or 0):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a finite number")
        for name in ("early_stopping", "seed", "warmup", "weight_decay", "workers", *weights):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give 0 or more")
        if self.workers is not None and self.workers > _MOST_WORKERS:
            raise UserError(f"--workers is {self.workers}; give at most {_MOST_WORKERS} processes")
        if self.seed >= 2**32:
            raise UserError(f"--seed is {self.seed}; give a number below 2**32")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"--max-steps is {self.max_steps}; give at least 1, or -1 for --epochs")
        if self.epochs is not None and not self.epochs > 0 and self.max_steps < 1:
            raise UserError(f"--epochs is {self.epochs}; give a positive number, or --max-steps")
        if self.utterances is not None and self.utterances < 1:
            raise UserError(f"--utterances is {self.utterances}; give at least 1")
        for name in ("dev_share", "full_share", "keep_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a share from 0 up to 1")
        if kept and not set(kept) - set(spoken):
            raise UserError("--keep-languages names the language of the speech alone; name others")
        if self.keep_languages and not self.keep_share:
            raise UserError("--keep-languages needs a share of the utterances; give --keep-share, such as 0.25")
        if self.keep_share and self.task == "translate":
            raise UserError("--keep-share goes with --task transcribe only; leave it out")
        if self.dev is not None and self.dev_share > 0:
            raise UserError("--dev and --dev-share exclude each other; give one of them")
        if self.early_stopping and self.dev is None and not self.dev_share:
            raise UserError("--early-stopping needs a development set; give --dev or --dev-share")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise UserError(f"--quantize {self.quantize!r} is not one of {', '.join(QUANTIZATIONS)}")
        if self.quantize is not None and self.half_base:
            raise UserError("--half-base and --quantize exclude each other; give one of them")
        if self.cuda_graphs:
            self._check_cuda_graphs()
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr is {self.lr}; give a positive learning rate")
        if self.interpolation is not None and not 0 < self.interpolation <= 1:
            raise UserError(f"--interpolation is {self.interpolation}; give a share above 0, at most 1")

    def _check_cuda_graphs(self) -> None:
        """What a recorded step cannot have: another shape every time, and anything drawn or decided on the host."""
        without = {
            "--window trim": self.window != "full",
            "--accumulation": self.accumulation > 1,
            "--gradient-checkpointing": self.gradient_checkpointing,
            "--half-base": self.half_base,
            "--quantize": self.quantize is not None,
            "--spec-augment": self.spec_augment,
            "--precision fp16": self.precision == "fp16",
        }
        for option, given in without.items():
            if given:
                raise UserError(f"--cuda-graphs does not go with {option}; leave out one of them")

    def spoken_languages(self) -> list[str]:
        """Codes of the languages of the speech that is trained on or held out, each once.

        Raises:
            UserError: Whisper does not know one of them.
        """
        codes = [language_code(language or self.language) for _, language in self.learnt_from()]
        return list(dict.fromkeys(code for code in codes if code is not None))

    def learnt_from(self) -> list[tuple[str, str]]:
        """Source and language, "" without one, of all speech that is trained on or held out."""
        return [source_and_language(given) for given in (*self.data, self.dev) if given is not None]

    def audio_window(self) -> AudioWindow:
        """The window of training."""
        return AudioWindow(self.window, self.margin)

    def decoding(self) -> Decoding:
        """How the test sets are transcribed."""
        return Decoding(self.beams, self.decode_once)
