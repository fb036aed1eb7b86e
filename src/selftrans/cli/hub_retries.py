"""One line while the client of the Hugging Face hub repeats a request, in place of its two lines for each attempt."""

from __future__ import annotations

import logging
import sys
from urllib.parse import urlsplit

LOGGER = "huggingface_hub.utils._http"  #: where a release logs elsewhere, its own lines are shown
#: parts of the two lines that the client logs for each failed attempt
FAILED, AGAIN = " thrown while requesting ", "Retrying in "


class OneLine(logging.Filter):
    """Replaces the lines of the first failed attempt of a process by one that says what to do; drops those of the others."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the client's own line is shown."""
        message = record.getMessage()
        reason, failed, request = message.partition(FAILED)
        if failed and not self.said:
            from selftrans.messages import printable

            self.said, reason = True, reason.strip("'")
            host = urlsplit(request.split()[-1]).hostname or "the hub"
            print(
                f"selftrans: {printable(host, 80)} does not answer ({printable(reason, 120)}): trying again, up to five "
                "times for each file; HF_HUB_OFFLINE=1 reads files of this machine only",
                file=sys.stderr,
            )
        return not failed and not message.startswith(AGAIN)


def install() -> None:
    """Add the filter to the logger of the client; a second call does nothing."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(each, OneLine) for each in logger.filters):
        logger.addFilter(OneLine())
