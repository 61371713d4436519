"""Validate Papaours API keys in any ASGI or WSGI app: cached speed and immediate revocation."""

from .authenticator import AsyncAuthenticator, Authenticator
from .digest import PepperRing, parse_peppers, peppers_from_environment
from .exceptions import (
    AdministrationError,
    ConfigurationError,
    Conflict,
    InvalidInput,
    NotFound,
    Overloaded,
    PapaoursAuthError,
    Reason,
    Refused,
    StoreUnavailable,
    SystemMachineProtected,
)
from .format import KeyFormat, Secret
from .keys import AsyncKeys, Keys
from .model import Grant, Identity, Key, KeyInfo, Machine, MachineInfo
from .stores import open_async_store, open_store

__all__ = [
    "AdministrationError",
    "AsyncAuthenticator",
    "AsyncKeys",
    "Authenticator",
    "ConfigurationError",
    "Conflict",
    "Grant",
    "Identity",
    "InvalidInput",
    "Key",
    "KeyFormat",
    "KeyInfo",
    "Keys",
    "Machine",
    "MachineInfo",
    "NotFound",
    "Overloaded",
    "PapaoursAuthError",
    "PepperRing",
    "Reason",
    "Refused",
    "Secret",
    "StoreUnavailable",
    "SystemMachineProtected",
    "open_async_store",
    "open_store",
    "parse_peppers",
    "peppers_from_environment",
]
__version__ = "0.1.0"
