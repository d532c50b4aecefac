"""pdserve: disaggregated prefill/decode serving of language models."""

__version__ = "0.1.0"
