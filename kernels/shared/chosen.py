"""The form of each operator that ran, and why no faster one did: logged once, and kept for the manifest.

Standard library only, and torch where a kernel runs, so that code that writes a manifest can read it without loading
one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("radlads")
_chosen: dict[str, dict[str, str]] = {}


def note_kernel(operator: str, form: str, why: Callable[[], str] | None = None, *, slow: bool = False) -> None:
    """Record that `form` ran a call of `operator`; logged the first time. why: called then, returns why no faster form
    ran. slow: whether a GPU goes without its kernels, which is logged as a warning. Nothing is recorded while
    torch.compile traces."""
    from torch.compiler import is_compiling

    if is_compiling():
        return
    forms = _chosen.setdefault(operator, {})
    if form not in forms:
        reason = forms[form] = "" if why is None else why()
        level = logging.WARNING if slow else logging.INFO
        _log.log(level, "kernel %s: %s%s", operator, form, f" ({reason})" if reason else "")


def chosen_kernels() -> dict[str, str]:
    """Operator → the forms that ran in this process, each with the reason of its first call in brackets."""
    return {
        operator: "; ".join(f"{form} ({reason})" if reason else form for form, reason in forms.items())
        for operator, forms in sorted(_chosen.items())
    }


def forget_kernels() -> None:
    """Start a new record: for a process that runs several jobs, one after the other."""
    _chosen.clear()
