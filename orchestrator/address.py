"""Does a cluster answer at RAY_ADDRESS, and why does it not let us in? In one line each."""

from __future__ import annotations

import re
import socket

from workers.contracts import InputError


def require_reachable(address: str) -> None:
    """Raises: InputError within seconds if nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # "auto" or "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"RAY_ADDRESS is {address}, but nothing answers there ({error.strerror or error}): start the cluster or unset it"
        ) from None


def refusal(text: str) -> str:
    """Why a cluster does not take us, and what to do, in one line."""
    told = re.findall(r"(Ray|Python): (\S+)", text)
    if "ersion mismatch" in text and len(told) >= 4:
        cluster, here = ("Ray {} on Python {}".format(*(dict(pair)[key] for key in ("Ray", "Python"))) for pair in (told[:2], told[2:4]))
        return (
            f"the cluster runs {cluster}, this command {here}: use the cluster's versions, or `diffpruning submit`, which uses its Python"
        )
    reason = " ".join(text.split())[:200]
    return f"{reason}; a cluster that asks for a token needs RAY_AUTH_MODE=token and its token"
