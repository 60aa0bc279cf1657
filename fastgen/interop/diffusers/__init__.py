"""For users of Hugging Face diffusers: its networks' weights load into ours. diffusers itself is not needed."""

from fastgen.interop.diffusers.weights import load, load_autoencoder_kl, load_unet

__all__ = ["load", "load_autoencoder_kl", "load_unet"]
