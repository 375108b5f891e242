"""The recurrence of linear attention, in several forms of one signature, and the rotation before it. Imports torch,
and triton when a kernel of it is first called."""

from supra_kernels.boundaries import documents, triton_compiles_for
from supra_kernels.operator import FORMS, default_form, linear_attention, operand_dtype
from supra_kernels.rotary import rotary

__all__ = ["FORMS", "default_form", "documents", "linear_attention", "operand_dtype", "rotary", "triton_compiles_for"]
