"""fairseq's own criterions, plus the routers' auxiliary losses and statistics."""

from . import criterions  # noqa: F401  (registers with fairseq)
