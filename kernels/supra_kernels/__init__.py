"""The recurrence of linear attention, in several forms of one signature. Imports torch, and triton if it is there."""

from supra_kernels.operator import FORMS, default_form, linear_attention

__all__ = ["FORMS", "default_form", "linear_attention"]
