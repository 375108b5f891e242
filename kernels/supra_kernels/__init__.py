"""The recurrence of linear attention, in several forms of one signature, and the rotation before it. Imports torch,
and triton when a kernel of it is first called."""

from supra_kernels.boundaries import documents, triton_compiles_for
from supra_kernels.delta import DELTA_FORMS, delta_rule
from supra_kernels.operator import FORMS, default_form, linear_attention, operand_dtype
from supra_kernels.rotary import rotary

__all__ = [
    "DELTA_FORMS",
    "FORMS",
    "default_form",
    "delta_rule",
    "documents",
    "linear_attention",
    "operand_dtype",
    "rotary",
    "triton_compiles_for",
]
