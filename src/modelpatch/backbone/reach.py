"""Downloads that end at once where there is no network: the host is tried once, before a library retries for a minute.

with reaching("https://huggingface.co", "timm:resnet50"):
    timm.create_model("resnet50", pretrained=True)      # offline: from the cache, or an error of one line
"""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from modelpatch.errors import BackboneError
from modelpatch.text import first_line

PATIENCE = 2.0  # seconds until a host that does not answer counts as unreachable
PORTS = {"http": 80, "https": 443}
LOCK = threading.RLock()  # the hub's library has one switch for the whole process
ADVICE = (
    "Load it once with a network (the cache keeps it), copy the cache here, or give the weights as a file: weights=PATH, "
    "--weights PATH. Random weights: pretrained=False."
)


@contextmanager
def reaching(address: str, what: str) -> Iterator[None]:
    """Let the body download from `address`, such as "https://huggingface.co", for `what`, such as "timm:resnet50".

    Where the host cannot be reached, the hub's library reads its cache alone. Raises `BackboneError` for what is not there.
    """
    from huggingface_hub import constants

    url = constants.ENDPOINT if address == HUB else address
    refused = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else find_obstacle(url)
    if not refused:
        yield
        return
    with LOCK:
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            yield
        except Exception as error:
            if not is_unreachable(error):
                raise
            host = urlsplit(url).hostname
            raise BackboneError(
                f"{what} is not in this machine's cache, and {host} cannot be reached: {refused}.", ADVICE
            ) from error
        finally:
            constants.HF_HUB_OFFLINE = before


HUB = "https://huggingface.co"  # or what HF_ENDPOINT names


def find_obstacle(url: str) -> str:
    """The reason why the host of a URL, or the proxy in front of it, takes no connection; empty if it does."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def knock() -> None:
        try:
            socket.create_connection(
                (parts.hostname or "", parts.port or PORTS.get(parts.scheme, 443)), PATIENCE
            ).close()
            answers.put("")
        except Exception as error:  # a name that does not resolve, a refused connection, a blocked socket
            answers.put(first_line(error) or type(error).__name__)

    threading.Thread(target=knock, daemon=True).start()  # a resolver that does not answer knows no timeout
    try:
        return answers.get(timeout=PATIENCE)
    except queue.Empty:
        return f"no answer from {parts.hostname} within {PATIENCE:g} s"


def is_unreachable(error: BaseException | None) -> bool:
    """True for an error that comes from a file that is not there or a host that does not answer."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
