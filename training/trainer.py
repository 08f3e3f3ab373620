"""Hugging Face's Seq2SeqTrainer for waveforms, two learning rates and penalties that are logged apart."""

import functools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import AdaLoraModel
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState, WhisperFeatureExtractor
from transformers import TrainingArguments as Arguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput, sort_checkpoints

from fused_s2lora import S2LoraModel, parameter_groups
from fused_s2lora.optimization import was_skipped

from .audio_window import window_of
from .collate import IGNORED
from .cuda_graphs import GraphedBackward
from .errors import DivergedError, UserError
from .features import LogMel

CHECKPOINTS = 2  # kept of a run


class SpeechTrainer(Seq2SeqTrainer):
    """Batches of `SpeechCollator` in, log-mel features made on the training device, cross-entropy out.

    The optimizer has the groups of `parameter_groups`. The logged `loss` is what is minimised; `cross_entropy`,
    `other_languages`, `sparsity`, `norm` and AdaLoRA's `orthogonality` are its parts. With `cuda_graphs` forward and
    backward are recorded for each shape of batch and replayed (`GraphedBackward`).

    Raises:
        DivergedError: the loss stops being finite, naming the step.
        UserError: audio that was readable before no longer is.
    """

    def __init__(
        self, *args: Any, feature_extractor: WhisperFeatureExtractor, cuda_graphs: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cuda_graphs = cuda_graphs
        self._graphed: GraphedBackward | None = None
        self.log_mel = LogMel(feature_extractor).to(self.args.device)
        # Whisper's forward takes any keyword but averages its loss over the micro-batch, whatever the Trainer passes:
        # left as inferred, accumulated gradients would be too large by the number of accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, Tensor] = {}
        self._part_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a process that reads audio puts its traceback into the error, which is taken out here."""
        try:
            return super().train(*args, **kwargs)
        except UserError as error:
            _, in_worker, message = str(error).rpartition(f"{UserError.__module__}.UserError: ")
            raise (UserError(message.strip()) if in_worker else error) from None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which would take one step more in a run that goes on after its last (`SavingAsAsked`)."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The Trainer's two orders, drawn by seed and epoch alone: a run that goes on finds them again."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return SeededSampler(
            len(rows),
            lengths=rows[self.args.length_column_name][:] if grouped else None,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's share of the batches; the Trainer's fills the last ones up with utterances of others."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = [*BatchSampler(range(len(rows)), self.args.eval_batch_size, drop_last=False)]
        return DataLoader(
            rows,
            batch_sampler=batches[self.args.process_index :: self.args.world_size],
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The mean cross-entropy per token of all the speech, in whatever batches and on however many processes."""
        model: Any = self.model
        unasked: Any = None
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        found: Any = []
        for batch in dataloader:
            step: Any = self.prediction_step(model, batch, prediction_loss_only=True)
            found.append((float(step[0]), int((batch["labels"] != IGNORED).sum())))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        everyones = gather_object(found)
        mean = sum(loss * tokens for loss, tokens in everyones) / sum(tokens for _, tokens in everyones)
        rows: Any = dataloader.dataset
        return EvalLoopOutput(predictions=unasked, label_ids=None, metrics={"eval_loss": mean}, num_samples=len(rows))

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer's file of each process; its state, by which a checkpoint is whole, comes after all of them."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what the arguments name) over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = model or self.model
            assert model is not None
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(model, settings.pop("lr"), weight_decay=self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy per token plus, in training, the adapter's penalties and what keeps other languages."""
        outputs, losses = self._forward(model, self._with_features(inputs))
        if model.training:
            self._note(losses)
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss and gradients of a batch, with `cuda_graphs` from a graph that is recorded for its shape."""
        if not self.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if self._graphed is None:
            parameters = (parameter for parameter in model.parameters() if parameter.requires_grad)
            self._graphed = GraphedBackward(functools.partial(self._losses, model), parameters)
        losses = self._graphed(self._with_features(self._prepare_inputs(inputs)))
        self._note(losses)
        return losses["loss"]

    def _losses(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        with self.compute_loss_context_manager():
            return self._forward(model, batch)[1]

    def _with_features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in inputs.items() if name != "waveforms"}
        return others | {"features": self.log_mel(inputs["waveforms"], inputs["mel_frames"])}

    def _forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Whisper's outputs, and the loss with its parts."""
        whisper = self.accelerator.unwrap_model(model)
        with window_of(whisper, batch["mel_frames"]):
            outputs = model(
                input_features=batch["features"].to(whisper.dtype),
                decoder_input_ids=batch["decoder_input_ids"],
                labels=batch["labels"],
            )
        loss, answers = outputs.loss, torch.zeros((), device=outputs.loss.device)
        if "answer_tokens" in batch:
            answers = _answer_loss(outputs.logits, batch)
            loss = loss + answers
        tuner = getattr(whisper, "base_model", None)
        penalties: dict[str, Tensor] = {}
        cross_entropy = outputs.loss.detach()
        if model.training and isinstance(tuner, S2LoraModel):
            penalties = tuner.last_penalties
            cross_entropy = cross_entropy - sum(penalties.values())
        elif model.training and isinstance(tuner, AdaLoraModel):
            orthogonality = _orthogonality(tuner)
            loss = loss + orthogonality
            penalties = {"orthogonality": orthogonality.detach()}
        parts = {"cross_entropy": cross_entropy, "other_languages": answers.detach(), **penalties}
        return outputs, {"loss": loss, **parts}

    def _note(self, losses: dict[str, Tensor]) -> None:
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower --lr, or raise --warmup; "
                "the last checkpoint is unharmed"
            )
        for name, value in losses.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, 0.0) + value
        self._part_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each part since the last log, over all processes, to a training log.

        Without the Trainer's mean loss of the whole training, which of a run that goes on is that since then alone.
        """
        logs.pop("train_loss", None)
        if "loss" in logs and self._part_steps:
            means = {name: self.accelerator.gather(total).mean() for name, total in self._parts.items()}
            logs |= {name: round(float(mean) / self._part_steps, 5) for name, mean in means.items()}
            self._parts, self._part_steps = {}, 0
        super().log(logs, start_time)


def _answer_loss(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Cross-entropy of the answers' distributions, summed, over the number of tokens the whole batch is to write.

    A token of a transcript weighs a little more, as their mean is taken over them alone.
    """
    tokens, wanted = inputs["answer_tokens"], inputs["answer_probabilities"]
    start = inputs["answer_start"]
    written = logits[:, start : start + tokens.shape[1]].float().log_softmax(dim=-1)
    tokens, wanted = tokens[:, : written.shape[1]], wanted[:, : written.shape[1]]
    count = (inputs["labels"] != IGNORED).sum() + (wanted.sum(dim=-1) > 0).sum()
    return -(wanted * written.gather(-1, tokens)).sum() / count


def _orthogonality(tuner: AdaLoraModel) -> Tensor:
    """γ times the mean over P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (arXiv 2303.10512, equation 4, as PEFT weighs it).

    PEFT adds it in its tuner's forward, which PeftModel passes by for a model like Whisper.
    """
    adapter = tuner.trainable_adapter_name
    config: Any = tuner.peft_config[adapter]
    distances = []
    for name, factor in tuner.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            product = factor @ factor.T if "lora_A" in name else factor.T @ factor
            distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
    return config.orth_reg_weight * torch.stack(distances).mean()


class SeededSampler(Sampler[int]):
    """All rows in an order of the seed and the `epoch` it is asked in; with `lengths` similar ones are together."""

    def __init__(
        self, count: int, *, lengths: list[float] | None, batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.count, self.lengths, self.batch_size, self.seed, self.epoch = count, lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class AdaLoraCallback(TrainerCallback):
    """Runs AdaLoRA's budget allocation after each optimizer step, which the Trainer does not do by itself.

    Without effect on other methods, where no rank is to be given up, and where mixed precision skipped the step: its
    gradients are not finite, and importances are means over all steps.
    """

    def on_optimizer_step(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tuner = getattr(kwargs["model"], "base_model", None)
        if not isinstance(tuner, AdaLoraModel) or was_skipped(kwargs["optimizer"]):
            return
        config: Any = tuner.peft_config[tuner.trainable_adapter_name]
        if config.target_r < config.init_r:
            tuner.update_and_allocate(state.global_step + 1)


class SavingAsAsked(TrainerCallback):
    """A run that goes on saves, scores and logs as often as it is asked now, not as its checkpoint says.

    It takes no further step where the checkpoint is of the last, or early stopping has ended the run there. Its best
    checkpoint is looked for where its folder is now. The `CHECKPOINTS` of most steps are kept, or the best and the
    last: the Trainer itself goes by their times, and deletes the last where a clock was set back.
    """

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        saved: Any = state.stateful_callbacks
        control.should_training_stop = saved["TrainerControl"]["args"]["should_training_stop"]
        best = Path(str(args.output_dir), f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            found = sort_checkpoints(str(args.output_dir), best_model_checkpoint=state.best_model_checkpoint)
            for checkpoint in found[:-CHECKPOINTS]:
                shutil.rmtree(checkpoint, ignore_errors=True)


class StepTimes(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, the first from the start of training."""

    def __init__(self) -> None:
        self.durations_s: list[float] = []
        self._last_s = 0.0

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_s = time.perf_counter()

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now_s = time.perf_counter()
        self.durations_s.append(now_s - self._last_s)
        self._last_s = now_s

    def median_s(self) -> float | None:
        """The middle one, which a checkpoint or a slow start does not move; None without a step."""
        return round(statistics.median(self.durations_s), 4) if self.durations_s else None
