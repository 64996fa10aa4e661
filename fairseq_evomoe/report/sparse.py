"""Tables that are mostly empty, by scipy, which fairseq 0.12.2 does not bring along."""

from typing import Any

from ..checkpoints.files import CommandError


def sparse() -> Any:
    """The module ``scipy.sparse``.

    Raises:
        CommandError: scipy is not installed.
    """
    try:
        import scipy.sparse
    except ImportError as error:
        raise CommandError(
            "The report is measured with scipy, which is not installed: pip install scipy."
        ) from error
    return scipy.sparse
