"""Stands in for torchaudio, which SGLang's CPU engine imports and does not use."""

from stand_in import stand_in

__version__ = "0.26.0"
__getattr__ = stand_in(__name__)
