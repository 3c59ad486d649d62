"""Models, from what a user names or hands over."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from perturbkit.audit.opening._opened import PICKLES, OpenedModel
from perturbkit.audit.opening.data import existing
from perturbkit.audit.opening.estimators import is_estimator, open_estimator, open_skops
from perturbkit.audit.opening.exported import open_exported
from perturbkit.audit.opening.huggingface import open_folder, open_named
from perturbkit.audit.opening.onnx import open_onnx
from perturbkit.audit.subject import TextModel
from perturbkit.core import Oracle, checks

__all__ = ["open_model"]

_FILES = {".pt2": open_exported, ".onnx": open_onnx, ".skops": open_skops}
_ALLOWED = "module:function, a .pt2, .onnx or .skops file, a Hugging Face folder, hf:name or predictions.csv"


def open_model(model: Any, device: str | None = None) -> OpenedModel:
    """Open a model.

    Parameters
    ----------
    model : str, Path, nn.Module, estimator, callable or Oracle
        ``module:function``, a ``.pt2``, ``.onnx`` or ``.skops`` file, a Hugging Face folder, ``hf:name``, or an object in
        Python.
    device : str, optional
        Where a module runs.

    Raises
    ------
    ModelError
        If it cannot be opened, with what to do instead.
    """
    if isinstance(model, str | Path):
        opened = _named(str(model), device)
    else:
        opened = OpenedModel(
            model,
            type(model).__name__
            if isinstance(model, nn.Module) or not hasattr(model, "__name__")
            else model.__name__,
        )
    fun = opened.fun
    if isinstance(fun, Oracle):
        return opened
    if isinstance(fun, type) and not isinstance(model, str | Path):
        raise checks.ModelError(
            f"the model is the class {fun.__name__}; allowed: a model made of it, fitted or with its weights. Pass the object."
        )
    if is_estimator(fun):
        return open_estimator(fun, opened.name if isinstance(model, str | Path) else "")
    if not callable(fun):
        raise checks.ModelError(
            f"the model {opened.name} is a {type(fun).__name__}; allowed: an nn.Module, a function of a batch or a fitted "
            "scikit-learn estimator. Return the model itself."
        )
    if isinstance(fun, nn.Module) and fun.training:
        opened.notes.append(
            "The model was handed over in training mode (dropout and batch statistics active); it was audited in "
            "evaluation mode. Call model.eval() before you deploy it."
        )
    if opened.text_model is None and opened.fit_inputs is None:
        opened.text_model = TextModel(fun)
    return opened


def _named(text: str, device: str | None) -> OpenedModel:
    if text.startswith("hf:"):
        return open_named(text.removeprefix("hf:"), device)
    path, suffix = Path(text), Path(text).suffix.lower()
    if suffix in _FILES:
        return _FILES[suffix](existing(path, checks.ModelError))
    if suffix in PICKLES:
        raise checks.ModelError(
            f"the model is {text}, a pickle, which can run code when opened; allowed: {_ALLOWED}. Export a PyTorch model "
            "with torch.export.save(torch.export.export(model, (x,)), 'm.pt2'), or save an estimator with skops.io.dump."
        )
    if path.is_dir():
        return open_folder(path, device)
    module_name, colon, attribute = text.partition(":")
    if not colon or not module_name or not attribute:
        raise checks.ModelError(
            f"the model is {text!r}; allowed: {_ALLOWED}. Write for instance my_package.models:load."
        )
    return OpenedModel(_import_model(module_name, attribute), text)


def _import_model(module_name: str, attribute: str) -> Any:
    """Import ``module:attribute`` with the working folder on the path; call it where it takes no argument."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise checks.ModelError(
                f"importing {module_name} failed: {error}. Install what it needs first."
            ) from error
        raise checks.ModelError(
            f"there is no module {module_name!r} in {Path.cwd()} or installed; allowed: a module that can be "
            "imported from here. Change into its folder or install it."
        ) from error
    except (Exception, SystemExit) as error:
        raise checks.ModelError(
            f"importing {module_name} failed: {type(error).__name__}: {error}. Make the import work on its own first."
        ) from error
    finally:
        sys.path.pop(0)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [n for n in dir(target) if not n.startswith("_")][:12]
            raise checks.ModelError(
                f"{module_name} has no {attribute!r}; allowed: one of its names, such as {', '.join(public)}. "
                "Check the spelling after the colon."
            )
        target = getattr(target, part)
    if (
        isinstance(target, nn.Module)
        or is_estimator(target)
        or not callable(target)
        or not _takes_nothing(target)
    ):
        return target
    try:
        return target()
    except (Exception, SystemExit) as error:
        raise checks.ModelError(
            f"{module_name}:{attribute} raised {type(error).__name__}: {error}. Make the call work on its own first."
        ) from error


def _takes_nothing(fun: Callable[..., Any]) -> bool:
    """Whether a callable makes a model (no required argument) rather than being one."""
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ) and not any(p.kind == p.VAR_POSITIONAL for p in parameters)
