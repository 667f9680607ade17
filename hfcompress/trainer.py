"""One thin mix-in over transformers' trainers: a teacher's loss, and weights that are decoded from latents."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import TrainOutput

from hfcompress import checkpoint, hub, losses
from hfcompress.callbacks import BestLatents, Misses, load_latents
from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError, ResumeError
from hfcompress.networks import check_tokenizers
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.padding import hold_padding_row
from hfcompress.passes import Passes
from hfcompress.schema import Compression, Distillation, Rule
from hfcompress.teacher import check, freeze, logits_of
from hfcompress.teacher_cache import TeacherCache, WithTeacher, take

if TYPE_CHECKING:
    from transformers import Trainer as _Parent
else:
    _Parent = object  # whichever trainer the mix-in is mixed into


class CompressionMixin(_Parent):
    """Adds `teacher=`, `distillation=` and `compression=` to a transformers trainer; the rest is the parent's.

    teacher: a model whose logits have the student's classes. It is frozen and moved to the student's device, neither
    wrapped nor saved. Or its cache for the training dataset: then no teacher is in memory. distillation: weights and
    temperature of its loss. compression: rules (or a `Compression`) for the student's weights.

    The loss is soft · T² · KL + hard · cross-entropy (without a teacher: cross-entropy), each a sum over the labels
    ≠ −100 divided by their number in the whole optimizer step, all micro-batches and processes together, so that the
    gradient depends neither on accumulation nor on the number of processes. With a teacher both parts are logged, as
    `ce` and `kd`. With neither teacher nor compression, one process and no accumulation, all is as in the parent; with
    either, the padding row of a tied embedding is held where it is.

    Raises TeacherError, ConfigError.
    """

    data_collator: Any
    loss_is_scaled_for_ga = True  # transformers ≥ 5.18: the parent must not divide the loss once more

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | TeacherCache | None = None,
        distillation: Distillation | None = None,
        compression: Compression | Sequence[Rule] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if distillation is not None and teacher is None:
            raise ConfigError("distillation= was given without teacher=")
        if teacher is not None and self.compute_loss_func is not None:
            raise ConfigError("teacher= and compute_loss_func= cannot both say what the loss is")
        self.model_accepts_loss_kwargs = True  # makes the parent count the labels of the whole step
        self.distillation = distillation or Distillation()
        self.teacher = self.cache = None
        if isinstance(teacher, TeacherCache):
            teacher.check_temperature(self.distillation.temperature)
            self.cache = teacher
            if isinstance(self.train_dataset, Passes):
                raise ConfigError("a teacher's cache holds rows that are there before training: not a stream's")
        elif teacher is not None:
            check(teacher, self.model)
            check_tokenizers(teacher, self.processing_class)
            self.teacher = freeze(teacher).to(self.args.device)
        if teacher is not None or compression is not None:
            hold_padding_row(self.model)
        self.compressor = self._make_compressor(compression)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel): launch one process a GPU with torchrun"
            )
        if type(self.model).__name__.endswith("ForCausalLM"):
            raise ConfigError(f"{type(self.model).__name__}: decoder-only language models are not what this trains")
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0

    def _make_compressor(self, compression: Compression | Sequence[Rule] | None) -> Compressor | None:
        if compression is None:
            return None
        if self.model_init is not None:
            raise ConfigError("compression= holds latents of one model: give model=, not model_init=")
        if self.optimizer is not None and self.lr_scheduler is not None:
            raise ConfigError("compression= needs to wrap the optimizer: give optimizers=(optimizer, None)")
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise ConfigError("load_best_model_at_end needs the latents, which save_only_model leaves out")
        if not isinstance(compression, Compression):
            compression = Compression(rules=tuple(compression))
        if self.args.world_size > 1:  # DDP gives rank 0's weights to all; the latents must be made of the same
            for parameter in self.model.parameters():
                torch.distributed.broadcast(parameter.data, src=0)
        weight, target, seed = compression.rate_weight, compression.target, self.args.seed
        compressor = Compressor(self.model, compression.rules, rate_weight=weight, target=target, seed=seed)
        self.add_callback(BestLatents(compressor))
        self.add_callback(Misses(compressor))
        return compressor

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The parent's optimizer; with compression, one that steps on the latents."""
        optimizer: Optimizer = super().create_optimizer(model)
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer  # second train()
        if self.compressor is not None and not isinstance(inner, CompressedOptimizer):
            optimizer = self.optimizer = CompressedOptimizer(optimizer, self.compressor)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The parent's; the compressor learns here how many steps it has to come to its target."""
        if self.compressor is not None:
            self.compressor.plan(num_training_steps, lambda: len(checkpoint.to_bytes(self.model, self.compressor)))
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's."""
        self._parts = {}  # of an earlier call, since its last log line
        output: TrainOutput = super().train(*args, **kwargs)
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The parent's; the draws of noisy decodes are for it alone, whoever looks afterwards sees hard weights."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.compressor is not None and self.compressor.noisy:
            self.compressor.write(hard=True)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sums over counted labels ÷ their number in the step. Labels: integers, or probabilities [..., classes]."""
        if "labels" not in inputs or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        cached = take(inputs)
        labels = inputs["labels"]
        forward = self._without_labels(inputs)
        outputs = model(**forward)
        logits = logits_of(outputs)
        divisor, scale = self._normalisation(model, labels, num_items_in_batch)
        parts = {"ce": losses.cross_entropy(logits, labels, self.args.label_smoothing_factor) * scale / divisor}
        loss = parts["ce"]
        if (self.teacher is not None or cached) and model.training:
            soft = self._soft(logits, labels, forward, cached)
            parts["kd"] = soft * scale / divisor
            loss = self.distillation.hard * parts["ce"] + self.distillation.soft * parts["kd"]
            self._note(parts)
        if not return_outputs:
            return loss
        # the parent takes predictions from what follows the loss
        return loss, {"loss": loss, "logits": logits} if isinstance(outputs, Tensor) else {
            **outputs,
            "loss": loss,
        }

    def _soft(self, logits: Tensor, labels: Tensor, forward: dict[str, Any], cached: dict[str, Tensor]) -> Tensor:
        """The teacher's part, summed over the counted labels."""
        temperature = self.distillation.temperature
        if self.teacher is None:
            return losses.cached_distillation(logits, cached, labels, temperature)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = logits_of(self.teacher(**forward))
        return losses.distillation(logits, teacher_logits, labels, temperature)

    def get_train_dataloader(self) -> Any:
        """The parent's; its batches have what the teacher's cache holds of their rows."""
        if isinstance(self.train_dataset, Passes):
            return self.train_dataset.loader(self.data_collator, self._train_batch_size, self.args)
        if self.cache is None:
            return super().get_train_dataloader()
        plain: Any = self.data_collator
        self.data_collator = WithTeacher(plain, self.cache)
        loader = super().get_train_dataloader()
        self.data_collator = plain
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log line, with both parts of the training loss beside their sum, and the way to a target."""
        steps = self.state.global_step - self._parts_since
        if "loss" in logs and self._parts and steps > 0:
            for name, part in self._parts.items():
                logs[name] = self.accelerator.gather(part).mean().item() / steps
            self._parts = {}
        if "loss" in logs and self.compressor is not None and self.compressor.controller is not None:
            logs |= self.compressor.controller.log_line()
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With a target, a model that has not come to it is none of those that can be the best."""
        compressor = self.compressor
        if compressor is not None and compressor.controller is not None:
            outcome = compressor.outcome()
            if not (compressor.controller.arrived and outcome is not None and outcome.reached):
                return False
        best: bool = super()._determine_best_metric(metrics, trial)
        return best

    def _note(self, parts: dict[str, Tensor]) -> None:
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + part.detach()

    def restore(self, folder: Path | str) -> None:
        """Put the weights, and the latents, of a training checkpoint into the model; nothing is trained.

        Raises ResumeError: the checkpoint has no model.safetensors, or no latents where this trainer has compression.
        """
        folder = Path(folder)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ResumeError(f"no {weights.name} in {folder}: it is no checkpoint of this trainer")
        # tied weights are saved once: what the names of a checkpoint leave out is there under another name
        self.model.load_state_dict(load_file(weights), strict=False)
        if self.compressor is not None:
            load_latents(self.compressor, folder)

    def save_compressed(self, folder: Path | str) -> checkpoint.Sizes:
        """Write the compressed file with its config (and tokenizer or image processor) to `folder`; rank 0 only."""
        if self.compressor is None:
            raise ConfigError("this trainer has no compression=; save_model writes its dense weights")
        folder = Path(folder)
        if not self.is_world_process_zero():
            raise ConfigError("save_compressed is for the main process: guard it with is_world_process_zero()")
        sizes = checkpoint.save(self.model, folder, self.compressor)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        return sizes

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's; with compression, what `save_compressed` writes, in one commit without the dense weights."""
        if self.compressor is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        with TemporaryDirectory() as folder:
            hub.write_short_card(folder, self.hub_model_id, self.save_compressed(folder), self.state.log_history)
            where: dict[str, Any] = {"revision": revision or self.args.hub_revision or "main"}
            where |= {"token": token or self.args.hub_token, "message": commit_message or "End of training"}
            return hub.push(Path(folder), self.hub_model_id, replaces_dense=True, **where)

    def _without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model must not compute a loss of its own: it would be averaged over the micro-batch."""
        forward = {name: value for name, value in inputs.items() if name != "labels"}
        model = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in forward:
            forward["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return forward

    def _normalisation(self, model: nn.Module, labels: Tensor, items: Any) -> tuple[Tensor, float]:
        """(divisor, scale): the loss is the sum over this micro-batch · scale / divisor."""
        if not model.training or items is None:
            return losses.count(labels).clamp(min=1), 1.0
        divisor = torch.as_tensor(items, device=labels.device).clamp(min=1)
        # gradients are averaged over processes, so the sum over all of them is what each has, times their number
        return divisor, float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        total = torch.stack([losses.count(batch["labels"]) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total


class CompressionTrainer(CompressionMixin, Trainer):
    """transformers' Trainer with a teacher and compression; see `CompressionMixin`."""


class Seq2SeqCompressionTrainer(CompressionMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with a teacher and compression; see `CompressionMixin`."""
