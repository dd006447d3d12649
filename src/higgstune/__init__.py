"""Fine-tune Higgs Audio v2 on your own recordings: prepare, train in two stages, speak."""

__version__ = "0.1.0"
