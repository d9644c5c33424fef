"""Language modelling with Hugging Face models: causal, masked, and sequence to sequence."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from gateplug.tasks.base import Task
from gateplug.tasks.batch import Batch, batch_size, check_integer_labels, split_batch
from gateplug.tasks.schedule import OptimizerCallable, SchedulerCallable

IGNORE = -100  # the label of a position without a target, as in torch and transformers


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats, and the number of tokens that it was summed over.

    Args:
        logits: ``(batch, tokens, vocabulary)``, any float type; the loss is computed in float32.
        labels: ``(batch, tokens)``, −100 where there is no target.

    Returns:
        Two scalars.
    """
    nll = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return nll, (labels != IGNORE).sum()


class TokenLoss(Metric):
    """Mean negative log-likelihood per token over an epoch: every token counts the same, whatever its batch."""

    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a batch's summed loss and its number of tokens."""
        self.nll += nll
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Loss per token; 0 without any token."""
        return self.nll / self.tokens.clamp(min=1)


class Perplexity(TokenLoss):
    """exp of the mean loss per token of the whole epoch (not the mean of the batches' perplexities)."""

    def compute(self) -> Tensor:
        """Perplexity; 1 without any token."""
        return super().compute().exp()


class TokenTask(Task):
    """A task whose loss is the mean over tokens; it logs ``loss`` and ``perplexity`` of each stage.

    The training loss is the mean over the tokens of one batch. Under DDP and accumulation, these means are averaged.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable | None = None,
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.train_perplexity, self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity(), Perplexity()
        self.val_loss, self.test_loss = TokenLoss(), TokenLoss()

    def predictions(self, stage: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, tokens, vocabulary)`` and the labels ``(batch, tokens)`` that they are to predict."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss per token of one batch."""
        inputs = split_batch(batch)
        nll, tokens = token_nll(*self.predictions("train", inputs))
        loss = nll / tokens.clamp(min=1)
        self.train_perplexity.update(nll.detach(), tokens)
        size = batch_size(inputs)
        self.log("train/loss", loss.detach(), batch_size=size)
        self.log("train/perplexity", self.train_perplexity, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation metrics."""
        self._evaluate("val", batch, self.val_loss, self.val_perplexity)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test metrics."""
        self._evaluate("test", batch, self.test_loss, self.test_perplexity)

    def _evaluate(self, stage: str, batch: Any, loss: TokenLoss, perplexity: Perplexity) -> None:
        inputs = split_batch(batch)
        nll, tokens = token_nll(*self.predictions(stage, inputs))
        loss.update(nll, tokens)
        perplexity.update(nll, tokens)
        size = batch_size(inputs)
        self.log(f"{stage}/loss", loss, batch_size=size)
        self.log(f"{stage}/perplexity", perplexity, batch_size=size, prog_bar=True)

    def _check(self, stage: str, logits: Tensor, labels: Any) -> None:
        if not isinstance(labels, Tensor) or self.may_look(stage, labels):
            check_integer_labels(labels, logits.shape[-1], ignore=IGNORE)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"The network returned logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)};"
                " they must be (batch, tokens, vocabulary) and (batch, tokens)."
            )


class LanguageModel(TokenTask):
    """Train a causal or a masked language model.

    Logs ``loss`` (nats per token) and ``perplexity`` under ``train/``, ``val/`` and ``test/``; both are taken over all
    tokens of an epoch. Positions with the label −100 do not count.

    Args:
        net: Takes ``input_ids`` (and what else its ``forward`` knows of the batch) and returns logits
            ``(batch, tokens, vocabulary)``: ``gp.hf_model(head="causal-lm" | "masked-lm")``.
        objective: ``causal``: position t predicts the label at t + 1; labels are as ``input_ids``, and are made from
            them and ``attention_mask`` where the batch has none. ``masked``: position t predicts the label at t.
        optimizer: ``parameters -> optimizer``; AdamW by default.
        scheduler: ``optimizer -> scheduler``. The number of steps is filled in where it is missing.

    Raises:
        ValueError: If the objective is unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Literal["causal", "masked"] = "causal",
        optimizer: OptimizerCallable | None = None,
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        if objective not in ("causal", "masked"):
            raise ValueError(f"objective must be 'causal' or 'masked', got {objective!r}.")
        super().__init__(net, optimizer, scheduler)
        self.objective = objective

    def predictions(self, stage: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels, shifted by one position for the causal objective."""
        labels, ids = batch.labels, batch.kwargs.get("input_ids")
        if labels is None and self.objective == "causal" and isinstance(ids, Tensor):
            mask = batch.kwargs.get("attention_mask")
            labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORE)
        logits = self.logits(batch)
        self._check(stage, logits, labels)
        return (logits[:, :-1], labels[:, 1:]) if self.objective == "causal" else (logits, labels)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The likeliest token at each position ``(batch, tokens)``; the next one for a causal model."""
        return self.logits(split_batch(batch)).argmax(-1)


class Seq2Seq(TokenTask):
    """Train an encoder-decoder (T5, BART …) to write ``labels`` given ``input_ids``.

    The decoder reads the labels shifted by one, as the network's own ``prepare_decoder_input_ids_from_labels`` does
    it, unless the batch has ``decoder_input_ids``. Logs as :class:`LanguageModel`.

    Args:
        net: ``gp.hf_model(head="seq2seq-lm")``, or a network that takes ``input_ids`` and ``decoder_input_ids`` or
            ``labels`` and returns logits ``(batch, tokens, vocabulary)``.
        optimizer: ``parameters -> optimizer``; AdamW by default.
        scheduler: ``optimizer -> scheduler``. The number of steps is filled in where it is missing.
    """

    def predictions(self, stage: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the decoder, and the labels."""
        labels = batch.labels
        if not isinstance(labels, Tensor):
            check_integer_labels(labels, 0)
        inputs = dict(batch.kwargs)
        if "decoder_input_ids" not in inputs:
            shift = getattr(self.net, "prepare_decoder_input_ids_from_labels", None)
            # Without `labels`, the network does not compute a loss of its own that nobody reads.
            inputs |= {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        logits = self.logits(Batch(batch.args, inputs, labels))
        self._check(stage, logits, labels)
        return logits, labels

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Tokens that the network generates greedily, by its own ``generate``."""
        inputs = split_batch(batch).kwargs
        known = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        generate: Any = self.net.generate
        generated: Tensor = generate(**known, do_sample=False)
        return generated
