"""``gateplug fit | validate | test | predict``: LightningCLI with gateplug's defaults and readable errors."""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from gateplug.cli.errors import SET_UP_ERRORS, UserError, in_words
from gateplug.cli.explain import config_files, explain
from gateplug.cli.names import short_function_names
from gateplug.cli.record import Record
from gateplug.cli.report import show_result
from gateplug.core.resume import ExactResume

STAGES = ("fit", "validate", "test", "predict")
# Errors that say what to correct, when they come before the first batch.
NOISE = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*treespec.*",
    ".*is smaller than the logging interval.*",
    "The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
)


def run(args: list[str]) -> None:
    """Run one stage.

    Args:
        args: The stage and its options.

    Raises:
        UserError: For everything that can be corrected in the configuration.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tips)
    short_function_names()
    record = Record()
    try:
        GateplugCLI(record, args)
    except UserError:
        raise
    except Exception as error:
        if text := in_words(error, record.started):
            raise UserError(text) from error
        raise


def _no_tips(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()  # advertisements


def _last_checkpoint() -> ModelCheckpoint:
    """Keep the last epoch."""
    # Not save_last=True with save_top_k=0: that writes nothing before training ends, and a broken run leaves nothing.
    return ModelCheckpoint(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)


class GateplugCLI(LightningCLI):
    """LightningCLI whose optimizers are built by the module, after plugs were attached."""

    def __init__(self, record: Record, args: list[str]) -> None:
        self.record = record
        self.given = args
        self.seconds: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        plain: dict[str, Any] = {"exit_on_error": False}
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**plain, "prog": "gateplug", **{stage: dict(plain) for stage in STAGES}},
            args=args,
        )

    # ------------------------------------------------------------------ configuration

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the one option that is gateplug's own."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Test after `fit`, if the data module has a test set."
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Read checkpoints safely, from anywhere: Lightning unpickles those of a remote address."""
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "weights_only" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults({"weights_only": True})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; errors become one paragraph."""
        try:
            self.config = parser.parse_args(args)
        except Exception as error:
            raise UserError(explain(error, self.given)) from error

    def _parse_ckpt_path(self) -> None:
        """Take the arguments that a module of the user has saved in the checkpoint, which is read safely."""
        try:
            super()._parse_ckpt_path()
        except Exception as error:
            path = self.config[self.config.subcommand].get("ckpt_path")
            raise UserError(f"{path} is no checkpoint that can be read safely: {explain(error, [])}") from error

    def instantiate_classes(self) -> None:
        """Build module, data and Trainer; errors of constructors become one paragraph."""
        for base in (torch.nn.Module, Callback, torch.optim.Optimizer, object):
            self.parser.add_instantiator(_marked, base, subclasses=True)
        try:
            super().instantiate_classes()
        except SET_UP_ERRORS as error:
            raise UserError(explain(error, self.given)) from error
        self._dump_config()
        self.record.config = self.config_dump["model"]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        """Fill in what the person left open: logger, progress bar, checkpoint, exact resume."""
        if config.get("logger") in (None, True):
            folder = config.get("default_root_dir") or "runs"
            config["logger"] = TensorBoardLogger(folder, name=self._run_name(), default_hp_metric=False)
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        defaults: list[tuple[type, Any]] = [(ExactResume, ExactResume), (Record, lambda: self.record)]
        if config["enable_progress_bar"]:
            defaults.append((ProgressBar, RichProgressBar))
        if config.get("enable_checkpointing") is not False:
            defaults.append((Checkpoint, _last_checkpoint))
        added = [make() for kind, make in defaults if not any(isinstance(c, kind) for c in given)]
        config["callbacks"] = given
        trainer: L.Trainer = super()._instantiate_trainer(config, [*callbacks, *added])
        return trainer

    def _run_name(self) -> str:
        """The first file's name; of a run's own config.yaml, the name of that run."""
        files = config_files(self.given)
        if not files:
            return "gateplug"
        path = Path(files[0]).resolve()
        return path.parent.parent.name if path.stem == "config" else path.stem

    # ------------------------------------------------------------------ the run

    def fit(self, **kwargs: Any) -> None:
        """Train; then test the best checkpoint, or the last weights where no metric chooses."""
        self._timed("fit", self.trainer.fit, **kwargs)
        testable = is_overridden("test_step", self.model) and (is_overridden("test_dataloader", self.datamodule or self.model))
        if not (self._get(self.config, "test_after_fit") and testable) or self.trainer.interrupted:
            return
        if not _has_test_set(self.datamodule):
            return
        kept = self.trainer.checkpoint_callback
        best = isinstance(kept, ModelCheckpoint) and kept.monitor and kept.best_model_path
        self._timed(
            "test",
            self.trainer.test,
            model=self.model,
            datamodule=self.datamodule,
            ckpt_path=kept.best_model_path if isinstance(kept, ModelCheckpoint) and best else None,
            verbose=False,
        )

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation set."""
        self._timed("validate", self.trainer.validate, **{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test set."""
        self._timed("test", self.trainer.test, **{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write what came out to ``predictions.pt`` in the run's folder, unless a callback writes it."""
        predictions = self._timed("predict", self.trainer.predict, **kwargs)
        writes = any(isinstance(c, BasePredictionWriter) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        log_dir = self.trainer.log_dir
        if predictions and not writes and log_dir:
            folder = Path(log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            rank = f".{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
            torch.save(predictions, folder / f"predictions{rank}.pt")

    def _timed(self, name: str, function: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(**kwargs)
        self.seconds[name] = time.perf_counter() - start
        self.metrics |= {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        return result

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        log_dir = self.trainer.log_dir  # on all processes: it is broadcast
        if self.trainer.is_global_zero:
            folder = Path(log_dir) if log_dir else None
            show_result(self.trainer, self.model, self.record, self.metrics, self.seconds, folder)


def _has_test_set(data: L.LightningDataModule | None) -> bool:
    """Whether gateplug's data modules have a test set; of others it is known when they are asked for it."""
    from gateplug.data.module import ExactDataModule

    if not isinstance(data, ExactDataModule):
        return True
    data.setup("test")
    return data._sets["test"] is not None


def _marked(class_type: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate; the error of a constructor remembers whose it is."""
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        if not hasattr(error, "gateplug_class"):
            error.gateplug_class = class_type  # type: ignore[attr-defined]
        raise
