"""SAELens's training runner, with a checkpoint to resume from after an interruption."""

from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.training._interruption import InterruptedException
from typing_extensions import override


class ResumableTrainingRunner(LanguageModelSAETrainingRunner):
    """
    `LanguageModelSAETrainingRunner` that loses nothing to Ctrl-C or SIGTERM.

    SAELens (6.54) saves the state of the activations store when it is interrupted, into
    a directory that does not exist, and neither the weights nor the optimizer. This
    runner saves a whole checkpoint first, from which `resume_from_checkpoint` goes on.

    Attributes:
        interruption_checkpoint: Where the checkpoint of an interrupted run is; None
            before an interruption, or if `cfg.checkpoint_path` is None.
    """

    interruption_checkpoint: Path | None = None

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        fit = trainer.fit

        def fit_or_save() -> Any:
            try:
                return fit()
            except (KeyboardInterrupt, InterruptedException):
                if self.cfg.checkpoint_path is not None:
                    name = str(trainer.n_training_samples)
                    trainer.save_checkpoint(checkpoint_name=name)
                    self.interruption_checkpoint = Path(self.cfg.checkpoint_path) / name
                raise

        trainer.fit = fit_or_save
        return super().run_trainer_with_interruption_handling(trainer)
