"""What the journal hears of one request while it runs."""

from __future__ import annotations

from shoal.core.types import Output, TokenLogprobs
from shoal.serve.journal import Journal


class RequestLog:
    """Passes on to the journal what was generated of a request of one prompt."""

    def __init__(self, journal: Journal, request_id: str) -> None:
        self._journal = journal
        self._request_id = request_id

    def progress(self, index: int, token_ids: list[int], logprobs: list[TokenLogprobs]) -> None:
        self._journal.progress(self._request_id, index, token_ids, logprobs)

    def finished(self, output: Output) -> None:
        if output.finish is not None:
            self._journal.finished(self._request_id, output.index, output.finish, output.stop_token, output.num_cached)
