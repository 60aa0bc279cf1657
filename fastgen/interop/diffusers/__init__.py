"""For users of Hugging Face diffusers: its networks' weights load into ours, and schedulers with its names and verbs take the
place of its own. diffusers itself is not needed."""

from typing import NoReturn

from fastgen.interop.diffusers.schedulers.chain import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from fastgen.interop.diffusers.schedulers.consistency import LCMScheduler, TCDScheduler
from fastgen.interop.diffusers.schedulers.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from fastgen.interop.diffusers.schedulers.flow import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from fastgen.interop.diffusers.schedulers.k_diffusion import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from fastgen.interop.diffusers.schedulers.parallel import DDIMParallelScheduler, DDPMParallelScheduler
from fastgen.interop.diffusers.schedulers.pndm import IPNDMScheduler, PNDMScheduler
from fastgen.interop.diffusers.schedulers.solvers import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from fastgen.interop.diffusers.weights import load, load_autoencoder_kl, load_unet

__all__ = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "load",
    "load_autoencoder_kl",
    "load_unet",
]


def __getattr__(name: str) -> NoReturn:
    if name.endswith("Scheduler"):
        known = ", ".join(other for other in __all__ if other.endswith("Scheduler"))
        raise ImportError(f"fastgen has no {name}; its schedulers with diffusers' names are {known}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
