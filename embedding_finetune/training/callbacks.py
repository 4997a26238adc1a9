"""What the Trainer calls while it trains: progress on stderr, texts that are cut, the length of a resumed run."""

import logging
from typing import Any

import numpy as np
from transformers import IntervalStrategy, ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from embedding_finetune.command_line import UserError
from embedding_finetune.distributed import gather_objects
from embedding_finetune.progress import Progress, write_line
from embedding_finetune.training.minutes import Clock

logger = logging.getLogger(__name__)


class StderrProgress(ProgressCallback):
    """Progress and log lines, all on stderr: stdout carries results only."""

    def __init__(self, *, disabled: bool) -> None:
        super().__init__()
        self.disabled = disabled

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to show the steps."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = Progress(state.max_steps, "Training", "step", disable=self.disabled)
            self.training_bar.show()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show as many steps as the run has by now."""
        if state.is_world_process_zero:
            self.training_bar.expect(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the values as one line."""
        if state.is_world_process_zero and logs is not None:
            line = "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in logs.items()
                if name != "total_flos"
            )
            write_line(f"step {state.global_step}  {line}")


class CutTexts(TrainerCallback):
    """Counts the texts of the first epoch that were longer than the lengths they are trained with, and says so."""

    def __init__(self, *, query: int, passage: int) -> None:
        self._lengths = {"query": query, "passage": passage}
        self._counts = np.zeros((2, 2), dtype=np.int64)

    def count(self, counts: np.ndarray) -> None:
        """Add those of a batch, as EmbedCollator gives them: (kind, (cut, all))."""
        self._counts += counts

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the numbers of all processes, once."""
        if not self._counts.any():
            return
        counts = np.sum(gather_objects(self._counts), axis=0).tolist()
        self._counts[:] = 0
        for (kind, length), (cut, texts) in zip(self._lengths.items(), counts):
            if cut:
                logger.info(
                    "%d of %d %s texts of the first epoch were cut to --%s_max_len %d", cut, texts, kind, kind, length
                )


class EndOfMinutes(TrainerCallback):
    """Ends a run when its minutes are over, though it has not made the steps that they were to be enough for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop training in all processes, with the checkpoint and the evaluation that a last step has."""
        if state.global_step >= state.max_steps or not gather_objects(self._clock.is_over)[0]:
            return
        logger.warning(
            "warning: --minutes %g are over at step %d of %d: all became slower than it was when steps were timed",
            *(args.minutes, state.global_step, state.max_steps),
        )
        control.should_training_stop = True
        control.should_save |= args.save_strategy == SaveStrategy.STEPS
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS


class RunLength(TrainerCallback):
    """Refuses to resume from a checkpoint that was made after the run is to end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise UserError: the weights would be those of a longer run."""
        if state.global_step > state.max_steps:
            raise UserError(
                f"--num_train_epochs {args.num_train_epochs:g} ends at step {state.max_steps}: the checkpoint is at "
                f"step {state.global_step} already; raise it, or give an earlier checkpoint"
            )
