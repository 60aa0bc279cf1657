"""Training: one loop for all models, checkpoints that survive a kill, resumes that change no bit."""

from fastgen.training.run import RunDir, load
from fastgen.training.trainer import FitResult, Hook, NonFiniteLoss, State, fit, resume

__all__ = ["FitResult", "Hook", "NonFiniteLoss", "RunDir", "State", "fit", "load", "resume"]
