"""The built-in trainer's rows from a stage that feeds it: sample n is row n of the training, a text of at least seq + 1 characters."""

import numpy as np
import torch
from torch import Tensor

from qipan.errors import InvalidInput
from qipan.trainer.data import UNKNOWN, Corpus
from qipan.trainer.stream import fed
from qipan.workload import Task


class FedRows:
    """The task's `data` still gives the vocabulary, and the texts on which it is validated and tested."""

    def __init__(self, stage: str, corpus: Corpus) -> None:
        self.stream = fed(stage)
        self._token = corpus.token

    @staticmethod
    def of(task: Task, corpus: Corpus) -> "FedRows | None":
        feeders = task.stage.fed_by if task.stage is not None else ()
        return FedRows(feeders[0], corpus) if feeders else None

    def rows(self, first: int, last: int, seq: int) -> Tensor:
        """Shape (last - first, seq + 1).  Raises InvalidInput for a sample that is too short."""
        return torch.from_numpy(
            np.array([self._row(position, seq) for position in range(first, last)], dtype=np.int64)
        )

    def _row(self, position: int, seq: int) -> list[int]:
        text = self.stream.raw(position).get("txt", b"").decode("utf-8")
        if len(text) <= seq:
            raise InvalidInput(
                f"sample {position} of {self.stream.stage} has {len(text)} characters of txt; a row of work.seq {seq} needs {seq + 1}"
            )
        return [self._token.get(character, UNKNOWN) for character in text[: seq + 1]]
