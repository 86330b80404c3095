"""Distillation of a model that reads images into its mmMamba student (arXiv 2502.13145): the stages are those of
`research/ssm/distillation.py`, over batches of `Conversations`. The paper's teacher is a HoVLE."""

import dataclasses
from typing import Any

import jax

from research.multimodal.task import answers, batch_pictures
from research.ssm.distillation import MambaDistillation
from research.training.task import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class VisionMambaDistillation(MambaDistillation):
    """The model saved at `teacher` reads images. All its stacks of causal layers are converted; towers and connectors
    are shared. `loss` is over the answers' tokens, which alone have weight, and `mimicry` over all. A further metric is
    `answers`, the share of rows that the student answers right. What sees ahead is refused: a recurrence is causal."""

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        self.teacher_model.check_steps("step_ends" in batch)
        return batch["tokens"], batch_pictures(batch, self.compute_dtype), batch["segments"]

    def measured(self, logits: jax.Array, batch: Batch) -> Metrics:
        return super().measured(logits, batch) | {"answers": answers(logits, batch)}
