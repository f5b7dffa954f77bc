"""An error in one line, for logs and messages."""


def reason_of(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message in one line, or the name of its type where it has none.

    Args:
        error: any error.
        limit: characters to keep; None for all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__
