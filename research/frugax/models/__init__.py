"""Language models: plain parameters in nested dicts, linen modules inside."""

from frugax.models import llama

__all__ = ['llama']
