"""Messages about preferences and the use of the disk."""

from __future__ import annotations

from typing import Any

from simpletuner.server.schemas.base import ApiModel


class ServerPreferences(ApiModel):
    """The preferences of a workspace.

    defaults: options that new drafts start with. default_options: options that the page of
    settings offers. The token itself is never sent.
    """

    has_hub_token: bool
    defaults: dict[str, Any]
    default_options: list[str]


class HubToken(ApiModel):
    """A token of the model hub; "" removes the stored one."""

    token: str


class DefaultsWrite(ApiModel):
    """Options that new drafts start with."""

    defaults: dict[str, Any]


class StorageUse(ApiModel):
    """The size of one folder. removable: it can be deleted, because it is rebuilt when needed."""

    name: str
    path: str
    size_bytes: int
    removable: bool
