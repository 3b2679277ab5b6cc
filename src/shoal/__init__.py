"""shoal: plans, serves and proves multi-GPU and multi-node LLM inference."""

__version__ = "0.1.0"
