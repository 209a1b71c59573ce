"""What clients may ask of the front."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """
    What one client may ask of the front.

    body_bytes: of a request. read_seconds: from its first byte to its last. requests: at work at once, of all clients;
    more get 429. seconds: from a request to the end of its answer.
    """

    body_bytes: int = 1 << 20
    read_seconds: float = 10.0
    requests: int = 256
    seconds: float = 600.0
