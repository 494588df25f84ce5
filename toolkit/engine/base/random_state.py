"""The generators that training draws from, at one moment."""

import random

import numpy as np
import torch


class RandomState:
    """The states of all the generators that a checkpoint holds. Some 10 kB are copied, nothing is synchronised."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)
