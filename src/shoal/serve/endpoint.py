"""What the fleet asks of an endpoint, whatever it speaks: shoal's own wire, or OpenAI's HTTP.

Outputs are pushed, not awaited: one message of an engine carries tokens of all its sequences, and a task and a queue
between every two layers would cost more than everything else done to a token.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from shoal.core.fleet_types import EndpointFailure, EndpointKind, EndpointReport
from shoal.core.types import Output, Rejected, Request


class Attempt(Protocol):
    """One try at one endpoint to generate a request, on the side of the fleet. Called on the event loop; never waits.

    After `ended`, and once the attempt was given up with `Endpoint.abort`, nothing may be called any more.
    """

    request: Request
    """Its id is this attempt's alone, so that what an endpoint says late belongs to no other."""

    def output(self, output: Output) -> None:
        """Tokens of one sequence. The attempt has ended when every one of its sequences had an output with `finish`."""

    def ended(self, reason: EndpointFailure | Rejected) -> None:
        """It will have no more outputs: the endpoint failed, or did not take the request."""


class EndpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a started endpoint."""

    max_len: int
    vocab_size: int
    block_size: int
    """Of its prefix cache, in tokens."""
    num_blocks: int | None = None
    max_sequences: int | None = None
    layout: str = ""
    dtype: str = ""
    weights_digest: str = ""
    exact_resume: bool = False
    """It takes `Request.resume`: a sequence goes on exactly as it would have elsewhere, whatever was asked of it."""


class EndpointListener(Protocol):
    """The fleet, as an endpoint sees it."""

    def reported(self, name: str, report: EndpointReport) -> None:
        """With every step, or now and then; an idle endpoint says once a second that it lives."""

    def gone(self, name: str, reason: str) -> None:
        """Process or connections are lost. Attempts under way have been ended before."""


class Endpoint(Protocol):
    name: str
    info: EndpointInfo
    """Once `start` has returned."""

    @property
    def kind(self) -> EndpointKind: ...

    @property
    def address(self) -> str:
        """A URL, or "pid 123" of an engine of the fleet's own."""

    async def start(self, listener: EndpointListener) -> None:
        """Until it can take requests. Raises EndpointStartError, whose message is for the user."""

    def submit(self, attempt: Attempt) -> None:
        """Begin. Never raises and never waits: what goes wrong comes to the attempt, not before this has returned."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End an attempt or one of its sequences (whose outputs then stop without a last one). Unknown ids are ignored.

        Of a whole attempt nothing is called any more from here on.
        """

    async def stop(self) -> None:
        """End what runs, and the process if the fleet started it. Nothing is left afterwards."""


class EndpointStartError(Exception):
    """The endpoint cannot be used. The message is for the user."""
