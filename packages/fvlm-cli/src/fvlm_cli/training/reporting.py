"""`train.report_to`: whether what a run is to report to can be had, before a model is loaded."""

from __future__ import annotations

from fvlm_cli.config.nearest import hint
from fvlm_core.errors import ConfigError, MissingExtraError

_ANY = ("none", "all")
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_reporting(report_to: str | list[str]) -> None:
    """Check the names that `train.report_to` gives.

    Raises:
        ConfigError: transformers has no integration of a name.
        MissingExtraError: it has, and its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    if set(names) <= set(_ANY):
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    for name in names:
        if name in _ANY or name in installed:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*INTEGRATION_TO_CALLBACK, "none"]
            raise ConfigError(f"train.report_to is {name!r}, which transformers does not know; {hint(name, known)}")
        package = _PACKAGES.get(name, name)
        raise MissingExtraError(
            f"train.report_to is {name!r}, whose package is not installed; pip install {package}, or leave it out."
        )
