"""Multi-channel diffusion models for brain-MRI slices together with their tumour masks."""

__version__ = "0.1.0"
