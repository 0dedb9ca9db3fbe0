"""What code of transformers a module runs: families copy the norms, MLPs and rotary positions of Llama word for word.
An exported model carries this file."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

FAMILY_CLASS = "_family_class"
"""The attribute of a class made of a family's, with another forward: the family's class."""


def family_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that of the family in whose place it stands."""
    found: type[nn.Module] = getattr(type(module), FAMILY_CLASS, type(module))
    return found


def family_forward(module: nn.Module) -> Any:
    """The family's forward of a module, whatever runs in its place."""
    return getattr(family_class(module), "forward", None)


def is_llama_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm that rounds before it multiplies by its weight, as Llama's does."""
    return same_code(family_forward(module), llama.LlamaRMSNorm.forward)


def is_llama_mlp(module: nn.Module) -> bool:
    """Whether a module is down(silu(gate(x)) ⊙ up(x))."""
    same = same_code(family_forward(module), llama.LlamaMLP.forward)
    return same and type(module.act_fn) is type(ACT2FN["silu"])


def is_llama_rotary(rotary: Callable[..., Any] | None) -> bool:
    """Whether a family's `apply_rotary_pos_emb` turns whole heads, half against half, in the dtype of q and k."""
    rotary = rotary.args[0] if isinstance(rotary, partial) else rotary  # as decoding/fast_modules.py leaves it
    own = sys.modules[getattr(rotary, "__module__", None) or __name__]
    half = getattr(own, "rotate_half", None)
    return same_code(rotary, llama.apply_rotary_pos_emb) and same_code(half, llama.rotate_half)


def same_code(function: Any, other: Any) -> bool:
    """Whether two functions have the same arguments and body, docstrings left out; False where one has no source."""
    return function is not None and _body(function) is not None and _body(function) == _body(other)


@cache
def _body(function: Any) -> str | None:
    """The syntax of a function's arguments and body, its docstring left out; None without a source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    names = [argument.arg for argument in tree.args.args]
    return f"{names} {[ast.dump(line) for line in body]}"
