"""Single-label classification of anything that a network turns into logits."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from gateplug.tasks.base import Task
from gateplug.tasks.batch import Batch, batch_size, check_integer_labels, split_batch
from gateplug.tasks.schedule import OptimizerCallable, SchedulerCallable


class Classifier(Task):
    """Train a network to classify, and report accuracy and calibration.

    Batches may be dicts (``pixel_values`` or ``input_ids`` … and ``labels``), a Hugging Face ``BatchEncoding``,
    ``(x, y)`` or ``(dict, y)``. Labels are never given to the network: the loss is computed here, in float32.

    Logs ``train/loss``, ``train/accuracy``, and ``loss``, ``accuracy`` and ``calibration_error`` under ``val/`` and
    ``test/``. The calibration error is the expected one, with 15 bins of equal width.

    Args:
        net: Takes a batch's inputs and returns logits ``(batch, num_classes)``, as a tensor, a dict with ``logits`` or
            a Hugging Face output.
        num_classes: Number of classes, at least 2.
        optimizer: ``parameters -> optimizer``; AdamW by default.
        scheduler: ``optimizer -> scheduler``. The number of steps is filled in where it is missing.
        label_smoothing: Weight of the uniform distribution in the target, in [0, 1). Training loss only.

    Raises:
        ValueError: If ``num_classes`` or ``label_smoothing`` is out of range.

    Example:
        >>> import gateplug as gp
        >>> task = gp.Classifier(torch.nn.Linear(4, 3), num_classes=3)
        >>> task(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable | None = None,
        scheduler: SchedulerCallable | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        super().__init__(net, optimizer, scheduler)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

        def accuracy() -> MulticlassAccuracy:
            return MulticlassAccuracy(num_classes, average="micro", validate_args=False)

        # validate_args=False: torchmetrics would read the labels back from the GPU at every step.
        self.train_accuracy, self.val_accuracy, self.test_accuracy = accuracy(), accuracy(), accuracy()
        self.val_calibration_error = MulticlassCalibrationError(num_classes, validate_args=False)
        self.test_calibration_error = MulticlassCalibrationError(num_classes, validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        inputs = split_batch(batch)
        logits = self._checked_logits("train", inputs)
        loss = F.cross_entropy(logits, inputs.labels, label_smoothing=self.label_smoothing)
        self.train_accuracy.update(logits.detach().softmax(-1), inputs.labels)
        size = batch_size(inputs)
        self.log("train/loss", loss.detach(), batch_size=size)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation metrics."""
        self._evaluate("val", batch, self.val_accuracy, self.val_calibration_error)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test metrics."""
        self._evaluate("test", batch, self.test_accuracy, self.test_calibration_error)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Probabilities ``(batch, num_classes)`` and the likeliest ``labels`` ``(batch,)``; labels given are unused."""
        probabilities = self.logits(split_batch(batch)).float().softmax(-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(-1)}

    def _evaluate(
        self, stage: str, batch: Any, accuracy: MulticlassAccuracy, calibration_error: MulticlassCalibrationError
    ) -> None:
        inputs = split_batch(batch)
        logits = self._checked_logits(stage, inputs)
        # Probabilities, not logits: torchmetrics takes logits that happen to lie in [0, 1] for probabilities.
        probabilities = logits.softmax(-1)
        accuracy.update(probabilities, inputs.labels)
        calibration_error.update(probabilities, inputs.labels)
        size = batch_size(inputs)
        self.log(f"{stage}/loss", F.cross_entropy(logits, inputs.labels), batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, batch_size=size, prog_bar=True)
        self.log(f"{stage}/calibration_error", calibration_error, batch_size=size)

    def _checked_logits(self, stage: str, inputs: Batch) -> Tensor:
        """Logits in float32 after the checks of shapes, and of values where reading them is free."""
        labels = inputs.labels
        if not isinstance(labels, Tensor) or self.may_look(stage, labels):
            check_integer_labels(labels, self.num_classes)
        logits = self.logits(inputs)
        if logits.shape != (*labels.shape, self.num_classes) or labels.dim() != 1:
            raise ValueError(
                f"The network returned logits of shape {tuple(logits.shape)} for labels of shape"
                f" {tuple(labels.shape)}; they must be (batch, {self.num_classes}) and (batch,). Give the network"
                f" {self.num_classes} outputs (`num_labels` of `gp.hf_model`), or correct `num_classes`."
            )
        return logits.float()
