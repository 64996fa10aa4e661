"""fairseq's own criterions, plus the routers' auxiliary losses and statistics."""

from . import criterions, distillation  # noqa: F401  (register with fairseq)
