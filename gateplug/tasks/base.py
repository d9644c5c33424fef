"""What the tasks share: a network, an optimizer that is built late, and one look at the first batch."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from gateplug.core.checkpoint import check_plugs
from gateplug.tasks.batch import Batch, call_net, logits_of
from gateplug.tasks.schedule import OptimizerCallable, SchedulerCallable, schedule_config


class Task(L.LightningModule):
    """Base of gateplug's tasks: an ordinary LightningModule around one network.

    Nothing of gateplug's plugs is in it: plugs treat it like a module of your own.

    Args:
        net: The network.
        optimizer: ``parameters -> optimizer``, AdamW if None. It is called when training starts, after plugs were attached.
        scheduler: ``optimizer -> scheduler``; its length is filled in where it is missing, see
            :func:`gateplug.tasks.schedule.schedule_config`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable | None = None,
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        for name, thing in (("optimizer", optimizer), ("scheduler", scheduler)):
            if thing is not None and not callable(thing):
                raise TypeError(
                    f"{name}={type(thing).__name__}(…) is an object that was built already: give what builds it, a class or"
                    f" functools.partial({type(thing).__name__}, …). It is called after plugs have attached their parameters."
                )
        self.net = net
        # no class as the default: the command line would keep its arguments (AdamW's weight decay) when another one is chosen
        self.make_optimizer = optimizer or torch.optim.AdamW
        self.make_scheduler = scheduler
        self._looked_at: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the network for inputs as it takes them."""
        return logits_of(self.net(*args, **kwargs))

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the network for a batch; names that its ``forward`` does not know are left out."""
        return logits_of(call_net(self.net, batch))

    def may_look(self, stage: str, like: Tensor) -> bool:
        """Whether a check may read values: always on the CPU, only once a stage where reading halts a GPU."""
        first = stage not in self._looked_at
        self._looked_at.add(stage)
        return first or like.device.type == "cpu"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the plugs that a checkpoint was written with and that this module does not have."""
        check_plugs(self, checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over all parameters, attached ones included, and its schedule."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        schedule: Any = schedule_config(self.make_scheduler, optimizer, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
