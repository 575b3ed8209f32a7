"""The methods that RLKV is compared with, one file each, behind one interface (``base.py``)."""

from rlkv_eval.methods.base import METHODS, Context, Generator, Method, get_method, token_budget

__all__ = ["METHODS", "Context", "Generator", "Method", "get_method", "token_budget"]
